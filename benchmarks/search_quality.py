"""The search strategies side by side on tasks with known learning curves, on a simulated clock.

    python benchmarks/search_quality.py --quick --lcbench DIR       under a minute on two cores
    python benchmarks/search_quality.py --lcbench DIR --tables      everything
    python benchmarks/search_quality.py --cost                      what asking for a trial costs
    python benchmarks/search_quality.py --seconds --lcbench DIR --workers 1 --contenders priority priority+budget
                                                                    at equal seconds in place of equal epochs

DIR holds LCBench's surrogate (model.onnx and encoding.json of YAHPO Gym). The extra `bench` brings onnxruntime, the
tables of HPOLib and HPOBench, and SMAC3 as a peer from outside. The peer `priorband` takes `neural-pipeline-search`
(0.17), which needs an older pandas than hpo: install it in an environment of its own.

Regret is 0 at the best known loss and 1 at that of a typical random configuration; it is that of the best epoch so far,
of any trial. A full run is as many epochs as a trial has at the most: a strategy that stops trials early gets more of
them for the same epochs. Strategies are paired by task and seed; the intervals are 95% of a bootstrap over tasks.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import os
import resource
import sys
import tempfile
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe_machine

from hpo.config import Direction

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from bench_tasks import LCBENCH_DEVELOPMENT, TABLES_DEVELOPMENT, BenchTask, LCBenchTask, TableTask
from numpy.typing import NDArray
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState

from hpo.config import derive_seed
from hpo.parameters import Choice, Float, Int, Value
from hpo.search import stored
from hpo.search.encoding import distribution
from hpo.search.settings import StudySettings
from hpo.search.study import Study
from hpo.space import Space

MARKS = (5, 10, 20, 30, 50, 100)
BOOTSTRAP_SAMPLES = 5000

Curve = NDArray[np.float64]


# --- who is compared --------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A configuration to train, from the epoch after `start_epoch` on."""

    key: int
    values: dict[str, Value]
    start_epoch: int = 0


class Contender(ABC):
    """A search that is asked for jobs and told how they went."""

    @abstractmethod
    def ask(self) -> Job: ...

    @abstractmethod
    def report(self, key: int, epoch: int, loss: float) -> bool:
        """Whether the job is to stop here."""

    @abstractmethod
    def tell(self, key: int, loss: float, *, stopped: bool, trained_s: float = 0.0) -> None:
        """The job has ended after `trained_s` seconds, with this loss at its best epoch."""

    def finalists(self) -> list[int]:
        """Jobs that were stopped and are to run to their end before the search is over, the most promising first."""
        return []


class OurStudy(Contender):
    """hpo's own study, as `hpo search` runs it."""

    def __init__(
        self,
        task: BenchTask,
        space: Space,
        seed: int,
        runs: int,
        *,
        strategy: str,
        pruner: str,
        has_budget: bool = False,
    ) -> None:
        settings = StudySettings(
            task=task.name,
            space=space,
            seed=seed,
            strategy=strategy,
            pruner=pruner,
            max_epochs=task.num_epochs,
            metric="loss",
            direction=Direction.MINIMIZE,
            limit=None,
            planned_trials=max(100, runs),
        )
        self._study = Study.open(InMemoryStorage(), "bench", settings)
        if has_budget:
            self._study.record(stored.BUDGET, math.inf)

    def ask(self) -> Job:
        suggestion = self._study.ask()
        return Job(suggestion.number, suggestion.values)

    def report(self, key: int, epoch: int, loss: float) -> bool:
        return self._study.report(key, epoch, loss)

    def tell(self, key: int, loss: float, *, stopped: bool, trained_s: float = 0.0) -> None:
        self._study.tell(key, "pruned" if stopped else "complete", value=loss, trained_s=trained_s)

    def finalists(self) -> list[int]:
        return [trial.number for trial in self._study.finalists()]


class PlainOptuna(Contender):
    """Optuna without hpo."""

    def __init__(
        self,
        task: BenchTask,
        space: Space,
        seed: int,
        runs: int,
        *,
        sampler: Callable[[int], BaseSampler],
        pruner: Callable[[int], BasePruner] | None = None,
        default_first: bool = False,
    ) -> None:
        self._distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
        self._study = optuna.create_study(
            study_name=f"bench {seed}",
            sampler=sampler(seed),
            pruner=pruner(task.num_epochs) if pruner else optuna.pruners.NopPruner(),
        )
        if default_first:
            self._study.enqueue_trial(space.defaults())
        self._running: dict[int, optuna.Trial] = {}

    def ask(self) -> Job:
        trial = self._study.ask(self._distributions)
        self._running[trial.number] = trial
        return Job(trial.number, trial.params)

    def report(self, key: int, epoch: int, loss: float) -> bool:
        self._running[key].report(loss, epoch)
        return self._running[key].should_prune()

    def tell(self, key: int, loss: float, *, stopped: bool, trained_s: float = 0.0) -> None:
        trial = self._running.pop(key)
        if stopped:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, loss)


class PromotingPeer(Contender):
    """A search that trains configurations for some epochs and promotes the best of them.

    A promoted configuration continues from where it was, so that it pays only for its new epochs, which is in the
    peer's favour.
    """

    def __init__(self, task: BenchTask) -> None:
        self._has_epochs = task.num_epochs > 1
        self._numbers = itertools.count()
        self._trained: dict[Any, int] = {}
        self._running: dict[int, tuple[Any, Any, int]] = {}

    def _start(self, asked: Any, configuration: Any, values: dict[str, Value], last_epoch: int) -> Job:
        """The job for what the peer has asked; `configuration` is the same whenever it is promoted."""
        key = next(self._numbers)
        self._running[key] = asked, configuration, last_epoch
        return Job(key, values, self._trained.get(configuration, 0) if self._has_epochs else 0)

    def _end(self, key: int) -> Any:
        """What the peer had asked for."""
        asked, configuration, last_epoch = self._running.pop(key)
        self._trained[configuration] = last_epoch
        return asked

    def report(self, key: int, epoch: int, loss: float) -> bool:
        return epoch >= self._running[key][2]


class Smac(PromotingPeer):
    """SMAC3's multi-fidelity facade: Hyperband with a random forest."""

    def __init__(self, task: BenchTask, space: Space, seed: int, runs: int) -> None:
        import smac

        super().__init__(task)
        self._task = task
        self._folder = tempfile.TemporaryDirectory()
        facade = smac.MultiFidelityFacade if task.num_epochs > 1 else smac.HyperparameterOptimizationFacade
        budgets = {"min_budget": max(1, task.num_epochs // 27), "max_budget": task.num_epochs}
        scenario = smac.Scenario(
            _config_space(space, seed),
            deterministic=task.num_epochs > 1,
            n_trials=100_000,
            seed=seed,
            output_directory=Path(self._folder.name),
            **(budgets if task.num_epochs > 1 else {}),
        )
        design = facade.get_initial_design(
            scenario, n_configs=10, additional_configs=[scenario.configspace.get_default_configuration()]
        )
        self._smac = facade(
            scenario, lambda config, seed=0, budget=0: 0.0, initial_design=design, overwrite=True, logging_level=50
        )

    def ask(self) -> Job:
        info = self._smac.ask()
        last_epoch = round(info.budget) if info.budget else self._task.num_epochs
        return self._start(info, info.config, dict(info.config), last_epoch)

    def tell(self, key: int, loss: float, *, stopped: bool, trained_s: float = 0.0) -> None:
        from smac.runhistory.dataclasses import TrialValue

        self._smac.tell(self._end(key), TrialValue(cost=loss), save=False)


def _config_space(space: Space, seed: int) -> Any:
    import ConfigSpace as cs  # noqa: N813

    def hyperparameter(name: str) -> Any:
        parameter = space.parameters[name]
        if isinstance(parameter, Choice):
            return cs.CategoricalHyperparameter(name, parameter.choices, default_value=parameter.default)
        kind = cs.UniformIntegerHyperparameter if isinstance(parameter.low, int) else cs.UniformFloatHyperparameter
        return kind(name, parameter.low, parameter.high, log=parameter.log, default_value=parameter.default)

    result = cs.ConfigurationSpace(seed=seed)
    result.add([hyperparameter(name) for name in space.parameters])
    return result


class PriorBand(PromotingPeer):
    """NePS's PriorBand (Mallik et al., 2023, arXiv:2306.12370): Hyperband that samples near the default configuration
    too."""

    def __init__(self, task: BenchTask, space: Space, seed: int, runs: int) -> None:
        import random

        import neps
        import torch

        super().__init__(task)
        random.seed(seed)  # it draws from the global generators
        np.random.seed(seed)
        torch.manual_seed(seed)
        parameters = {name: _neps_parameter(parameter) for name, parameter in space.parameters.items()}
        epochs = neps.IntegerFidelity(max(1, task.num_epochs // 27), task.num_epochs)
        pipeline = type("Pipeline", (neps.PipelineSpace,), parameters | {"epochs": epochs})
        self._neps = neps.AskAndTell(neps.algorithms.priorband(pipeline(), sample_prior_first=True))

    def ask(self) -> Job:
        trial = self._neps.ask()
        values = dict(trial.config)
        last_epoch = values.pop("epochs")
        return self._start(trial, trial.id.partition("_rung_")[0], values, last_epoch)

    def tell(self, key: int, loss: float, *, stopped: bool, trained_s: float = 0.0) -> None:
        self._neps.tell(self._end(key), loss)


def _neps_parameter(parameter: Float | Int | Choice) -> Any:
    import neps

    if isinstance(parameter, Choice):
        prior = parameter.choices.index(parameter.default)
        return neps.Categorical(parameter.choices, prior=prior, prior_confidence="medium")
    kind = neps.Integer if isinstance(parameter, Int) else neps.Float
    return kind(parameter.low, parameter.high, log=parameter.log, prior=parameter.default, prior_confidence="medium")


def _sha_from_a_fifth(max_epochs: int) -> BasePruner:
    return SuccessiveHalvingPruner(min_resource=max(1, max_epochs // 5), reduction_factor=3)


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "priority": partial(OurStudy, strategy="priority", pruner="sha"),
    "priority+model": partial(OurStudy, strategy="priority", pruner="model"),
    "priority+budget": partial(OurStudy, strategy="priority", pruner="sha", has_budget=True),
    "optuna": partial(PlainOptuna, sampler=lambda seed: TPESampler(seed=seed), pruner=lambda _: MedianPruner()),
    "tpe+default+sha": partial(
        PlainOptuna, sampler=lambda seed: TPESampler(seed=seed), pruner=_sha_from_a_fifth, default_first=True
    ),
    "tpe+hyperband": partial(
        PlainOptuna,
        sampler=lambda seed: TPESampler(seed=seed),
        pruner=lambda epochs: HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3),
    ),
    "tpe": partial(PlainOptuna, sampler=lambda seed: TPESampler(seed=seed)),
    "gp": partial(PlainOptuna, sampler=lambda seed: GPSampler(seed=seed)),
    "random": partial(PlainOptuna, sampler=lambda seed: RandomSampler(seed=seed)),
    "smac": Smac,
    "priorband": PriorBand,
}
DESCRIPTIONS = {
    "priority": "hpo's default: --strategy priority --pruner sha",
    "priority+model": "the same with --pruner model",
    "priority+budget": "hpo's default with --budget, which makes it weigh seconds",
    "optuna": "Optuna's defaults: TPESampler, MedianPruner",
    "tpe+default+sha": "TPESampler, default configuration first, SuccessiveHalvingPruner(epochs / 5, 3)",
    "tpe+hyperband": "TPESampler, HyperbandPruner(1, epochs, 3)",
    "tpe": "TPESampler, no pruner",
    "gp": "GPSampler, no pruner",
    "random": "RandomSampler, no pruner",
    "smac": "SMAC3's MultiFidelityFacade, default configuration first (tables: HyperparameterOptimizationFacade)",
    "priorband": "NePS's PriorBand, default configuration first, with medium confidence in it",
}
INSTALLED = [name for name in CONTENDERS if name not in ("priority+model", "priority+budget", "priorband")]
"""Those that the extra brings, at equal epochs."""

QUICK = ("priority", "optuna", "tpe+default+sha", "tpe+hyperband", "random")


# --- the simulated clock ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One search to simulate."""

    task: BenchTask
    contender: str
    seed: int
    default: str
    workers: int
    runs: int
    by_seconds: bool = False
    """Whether an epoch costs its seconds; otherwise it costs 1."""


@dataclass(frozen=True)
class Outcome:
    """What a search has reached."""

    by_cost: Curve
    """Regret after epochs, or seconds, worth 1, 2, ... full runs; that of the default configuration in seconds."""

    by_trials: Curve
    """Regret after 1, 2, ... trials."""

    cpu_s: float


Outcomes = dict[tuple[str, str, int], Outcome]
"""By contender, task and seed."""


@dataclass(order=True)
class _Training:
    clock: float
    key: int
    job: Job = field(compare=False)
    observed: Curve = field(compare=False)
    true: Curve = field(compare=False)
    epoch: int = field(compare=False)
    epoch_cost: float = field(compare=False)
    lowest: float = field(default=math.inf, compare=False)
    is_final: bool = field(default=False, compare=False)
    """Whether it was stopped and is continued to its end, as hpo's study does when it has its trials."""


def simulate(setting: Setting) -> Outcome:
    """Run a search with asynchronous workers until its epochs, or its seconds, are used up.

    The last of them are those that the contender's finalists need to run to their end.
    """
    _silence()
    task = setting.task
    rng = np.random.default_rng(derive_seed(setting.seed, task.name, "noise"))
    began = time.process_time()
    space = task.space(setting.default)
    contender = CONTENDERS[setting.contender](task, space, setting.seed, setting.runs)
    full_run = task.num_epochs * _epoch_cost(setting, space.defaults())
    budget = setting.runs * full_run
    used, reached = [0.0], [math.inf]
    by_trials: list[float] = []
    incumbent_observed, incumbent_true = math.inf, math.inf

    stopped_runs: dict[int, _Training] = {}
    finalists: list[_Training] = []

    def start(clock: float) -> _Training:
        if not any(run.is_final for run in stopped_runs.values()):
            finalists[:] = [stopped_runs[key] for key in contender.finalists()]
        needed = sum((task.num_epochs - run.epoch) * run.epoch_cost for run in finalists)
        if finalists and budget - used[-1] <= needed:
            run = finalists.pop(0)
            run.clock, run.is_final = clock + run.epoch_cost, True
            return run
        job = contender.ask()
        cost = _epoch_cost(setting, job.values)
        return _Training(clock + cost, job.key, job, *task.curves(job.values, rng), job.start_epoch, cost)

    training = [start(0.0) for _ in range(setting.workers)]
    while used[-1] < budget:
        run = heapq.heappop(training)
        loss = float(run.observed[run.epoch])
        run.lowest = min(run.lowest, loss)
        if loss < incumbent_observed:
            incumbent_observed, incumbent_true = loss, float(run.true[run.epoch])
        used.append(used[-1] + run.epoch_cost)
        reached.append(incumbent_true)
        run.epoch += 1
        stopped = not run.is_final and contender.report(run.key, run.epoch, loss)
        if stopped or run.epoch == task.num_epochs:
            if not run.is_final:
                stopped_early = stopped and run.epoch < task.num_epochs
                contender.tell(run.key, run.lowest, stopped=stopped_early, trained_s=run.epoch * run.epoch_cost)
                by_trials.append(incumbent_true)
                stopped_runs |= {run.key: run} if stopped else {}
            heapq.heappush(training, start(run.clock))
        else:
            run.clock += run.epoch_cost
            heapq.heappush(training, run)
    marks = full_run * np.arange(1, setting.runs + 1)
    last_within = np.searchsorted(used, marks, side="right") - 1
    return Outcome(
        task.regret(np.array(reached)[last_within]),
        task.regret(np.array(by_trials)),
        time.process_time() - began,
    )


def simulate_all(
    contenders: Sequence[str], tasks: Sequence[BenchTask], num_seeds: int, *, jobs: int = 1, **setting: Any
) -> Outcomes:
    """The outcome of each contender on each task with each seed; `setting` has the other fields of Setting."""
    keys = list(itertools.product(contenders, tasks, range(num_seeds)))
    settings = [Setting(contender=name, task=task, seed=seed, **setting) for name, task, seed in keys]
    with ProcessPoolExecutor(jobs) as pool:
        outcomes = list(pool.map(simulate, settings) if jobs > 1 else map(simulate, settings))
    return {(name, task.name, seed): outcome for (name, task, seed), outcome in zip(keys, outcomes, strict=True)}


def _epoch_cost(setting: Setting, values: dict[str, Value]) -> float:
    if not setting.by_seconds:
        return 1.0
    assert isinstance(setting.task, LCBenchTask), "only LCBench says how long an epoch takes"
    return setting.task.epoch_s(values)


def _silence() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")


# --- tables -----------------------------------------------------------------------------------------------------------

Regrets = dict[str, Curve]
"""(tasks, seeds) regrets of each contender."""


def compare(outcomes: Outcomes, read: Callable[[Outcome], float]) -> Regrets:
    """One number of each outcome, in the order of the keys."""
    names, tasks, seeds = (list(dict.fromkeys(column)) for column in zip(*outcomes, strict=True))
    return {name: np.array([[read(outcomes[name, task, seed]) for seed in seeds] for task in tasks]) for name in names}


def ratio_of_means(ours: Curve, theirs: Curve) -> tuple[float, float, float]:
    """Ratio of the mean regrets, with the bounds of its 95% interval from a bootstrap over tasks."""
    ours, theirs = ours.mean(axis=1), theirs.mean(axis=1)
    drawn = np.random.default_rng(0).integers(len(ours), size=(BOOTSTRAP_SAMPLES, len(ours)))
    ratios = ours[drawn].mean(axis=1) / theirs[drawn].mean(axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(ours.mean() / theirs.mean()), float(low), float(high)


def print_table(title: str, outcomes: Outcomes, marks: list[int], kind: str) -> None:
    """Mean regret of each contender, and what the first one's is of the others'."""
    print(f"\n{title}\n")
    columns = [compare(outcomes, partial(_regret_at, mark=mark, kind=kind)) for mark in marks]
    names = list(columns[0])
    header = " | ".join(f"{mark:>19}" for mark in marks)
    print(f"| regret at {'.. trials' if kind == 'trials' else f'{kind} worth .. full runs':<26} | {header} |")
    print(f"| {'-' * 36} | {' | '.join(['-' * 19] * len(marks))} |")
    for name in names:
        print(f"| {name:<36} | {' | '.join(f'{column[name].mean():>19.3f}' for column in columns)} |")
    for name in names[1:]:
        cells = ["{:.2f} [{:.2f}, {:.2f}]".format(*ratio_of_means(c[names[0]], c[name])) for c in columns]
        print(f"| {f'{names[0]} : {name}':<36} | {' | '.join(f'{cell:>19}' for cell in cells)} |")
    seconds = {name: np.mean([o.cpu_s for key, o in outcomes.items() if key[0] == name]) for name in names}
    trials = {name: np.mean([len(o.by_trials) for key, o in outcomes.items() if key[0] == name]) for name in names}
    print(
        "\nTrials and CPU seconds a search: " + ", ".join(f"{n} {trials[n]:.0f} in {seconds[n]:.1f} s" for n in names)
    )
    tails = {name: np.quantile(columns[-1][name], 0.9) for name in names}
    print(f"90th percentile of all searches at {marks[-1]}: " + ", ".join(f"{n} {tails[n]:.3f}" for n in names))
    sys.stdout.flush()


def _regret_at(outcome: Outcome, *, mark: int, kind: str) -> float:
    regrets = outcome.by_trials if kind == "trials" else outcome.by_cost
    return float(regrets[min(mark, len(regrets)) - 1])


# --- the cost of asking -----------------------------------------------------------------------------------------------


COST_MARKS = {0: (10, 50, 100, 200, 249, 251, 500, 1_000, 2_000, 5_000, 10_000), 64: (100, 200, 500, 1_000)}
"""Trials to ask for, by the number of others that are running then."""


def print_cost() -> None:
    """CPU seconds to ask for trial 10, 100, ... of the default strategy, and the memory that the process holds."""
    _silence()
    random = np.random.default_rng(0)
    task_space = LCBenchTask.space(object.__new__(LCBenchTask), "good")
    settings = StudySettings(
        task="cost", space=task_space, seed=0, strategy="priority", pruner="model", max_epochs=20, metric="loss",
        direction=Direction.MINIMIZE, limit=None, planned_trials=10_000,
    )  # fmt: skip
    for num_running, marks in COST_MARKS.items():
        study = Study.open(InMemoryStorage(), "cost", settings)
        print(f"\n| trial, {num_running} others running | ask, s of CPU |\n| ---: | ---: |")
        for mark in marks:
            _fill(study, mark - 2 - num_running, random)
            running = [_ask_at_random(study, random) for _ in range(num_running)]
            for number, values in running:
                study.report(number, 1, _loss(values, 1, random))
            times = []
            for _ in range(3):
                began = time.process_time()
                suggestion = study.ask()
                times.append(time.process_time() - began)
                _train(study, suggestion.number, suggestion.values, random)
            print(f"| {mark} | {sorted(times)[1]:.3f} |", flush=True)
            for number, values in running:
                _train(study, number, values, random, after=1)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nPeak memory: {memory:.0f} MiB")


def _fill(study: Study, total: int, random: np.random.Generator) -> None:
    """Add random trials, which cost nothing to ask for."""
    for _ in range(total - study.num_finished):
        _train(study, *_ask_at_random(study, random), random)


def _ask_at_random(study: Study, random: np.random.Generator) -> tuple[int, dict[str, Value]]:
    sampler, study._optuna.sampler = study._optuna.sampler, RandomSampler(seed=int(random.integers(2**32)))
    suggestion = study.ask()
    study._optuna.sampler = sampler
    return suggestion.number, suggestion.values


def _train(study: Study, number: int, values: dict[str, Value], random: np.random.Generator, *, after: int = 0) -> None:
    """The epochs of a trial that follow the epoch `after`."""
    for epoch in range(after + 1, 21):
        loss = _loss(values, epoch, random)
        if study.report(number, epoch, loss):
            study.tell(number, "pruned", value=loss)
            return
    study.tell(number, "complete", value=loss)


def _loss(values: dict[str, Value], epoch: int, random: np.random.Generator) -> float:
    floor = (math.log10(float(values["learning_rate"])) + 2) ** 2 + float(values["max_dropout"])
    return floor + 1 / epoch + 0.01 * random.normal()


# --- the command ------------------------------------------------------------------------------------------------------


def main() -> None:
    arguments = _parse()
    print(describe_machine("optuna", "numpy"))
    for name in arguments.contenders:
        print(f"  {name}: {DESCRIPTIONS[name]}")
    marks = [mark for mark in MARKS if mark <= arguments.runs]
    unit = "seconds" if arguments.seconds else "epochs"
    if arguments.lcbench:
        tasks: list[BenchTask] = [LCBenchTask(arguments.lcbench, task) for task in arguments.tasks]
        for title, outcomes in _each_setting(arguments, tasks):
            print_table(f"LCBench, {title}, at equal {unit}", outcomes, marks, unit)
            if arguments.by_trials:
                print_table(f"LCBench, {title}, at equal trials", outcomes, marks, "trials")
    if arguments.tables:
        tasks = [TableTask(*table) for table in TABLES_DEVELOPMENT]
        for title, outcomes in _each_setting(arguments, tasks):
            print_table(f"HPOLib and HPOBench, {title}", outcomes, marks, "trials")
    if arguments.cost:
        print_cost()


def _each_setting(arguments: argparse.Namespace, tasks: list[BenchTask]) -> Iterator[tuple[str, Outcomes]]:
    for default, workers in itertools.product(arguments.defaults, arguments.workers):
        title = f"{len(tasks)} tasks x {arguments.seeds} seeds, {default} default, {workers} worker(s)"
        yield (
            title,
            simulate_all(
                arguments.contenders,
                tasks,
                arguments.seeds,
                jobs=arguments.jobs,
                default=default,
                workers=workers,
                runs=arguments.runs,
                by_seconds=arguments.seconds,
            ),
        )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lcbench", type=Path, metavar="DIR", help="folder of LCBench's surrogate")
    parser.add_argument("--tables", action="store_true", help="the tables of HPOLib and HPOBench too")
    parser.add_argument("--cost", action="store_true", help="the cost of asking for a trial")
    parser.add_argument("--quick", action="store_true", help="one seed, 30 full runs, the cheap contenders")
    parser.add_argument("--seconds", action="store_true", help="an epoch costs its time; for --lcbench alone")
    parser.add_argument("--by-trials", action="store_true", help="also at an equal number of trials")
    parser.add_argument("--contenders", nargs="+", default=INSTALLED, choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=LCBENCH_DEVELOPMENT, metavar="ID", help="OpenML tasks of LCBench")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--runs", type=int, default=100, metavar="N", help="epochs to spend, in full runs")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16], metavar="N")
    parser.add_argument("--defaults", nargs="+", default=["good", "poor"], choices=["good", "poor"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.contenders = [name for name in arguments.contenders if name in QUICK]
        arguments.seeds, arguments.runs, arguments.workers, arguments.defaults = 1, 30, [1], ["good"]
    if arguments.seconds and (arguments.tables or not arguments.lcbench):
        parser.error("--seconds needs --lcbench, and no --tables: only LCBench says how long an epoch takes.")
    if not (arguments.lcbench or arguments.tables or arguments.cost):
        parser.error("nothing to do; give --lcbench DIR, --tables or --cost.")
    return arguments


if __name__ == "__main__":
    main()
