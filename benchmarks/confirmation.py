"""What confirming the best configurations gains over the luckiest trial, and over more trials for the same cost.

    python benchmarks/confirmation.py --tables                      minutes on two cores, with the extra `bench`
    python benchmarks/confirmation.py --real digits --seeds 20      real searches, each confirmed
    python benchmarks/confirmation.py --equal                       what chance does where nothing is to be found

On the tables of HPOLib and HPOBench each configuration was trained with four or five seeds: a trial sees one of them,
and what a configuration is truly worth is their mean. Regret is 0 at the best known mean and 1 at the median one. On
real data the test split judges the luckiest trial's model, and then the confirmed one's. Equal configurations differ by
their seeds alone, whose values are normal.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
import torch
from bench_tasks import TABLES_DEVELOPMENT, TableTask
from machine import describe_machine
from optuna.storages import InMemoryStorage
from torch.nn import functional

from hpo.config import Direction, TrainConfig
from hpo.data.examples import DataSpec
from hpo.objective import NOTHING_OWN
from hpo.records import TrialRecord
from hpo.search.confirmation import Plan, Race, find_plan
from hpo.search.settings import StudySettings
from hpo.search.study import Study
from hpo.training.comparison import compare_outputs

BOOTSTRAP_SAMPLES = 5000


@dataclass(frozen=True)
class Outcome:
    """One search: the true regret of each choice, and how many trainings the confirmation took."""

    lucky: float
    confirmed: float
    longer: float
    """Of the luckiest of a search that had as many more trials as the confirmation had trainings."""
    num_trainings: int


def simulate(family: str, dataset: str, seed: int, *, trials: int, plan: str) -> Outcome:
    """Search a table, confirm the best configurations, and search on for the same cost."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    task = TableTask(family, dataset)
    rng = np.random.default_rng(seed)
    study = _make_study(task, seed, trials)
    study.remember_session(num_trials=trials, task_reference=task.name, tracking_uri=None, confirm=plan)
    for _ in range(trials):
        _train(study, task, study.ask().number, rng)
    lucky = study.best()
    while (suggestion := study.ask_repeat()) is not None:
        _train(study, task, suggestion.number, rng)
    winner, num_trainings = study.race.winner, len(study.repeats())
    longer = _make_study(task, seed, trials)
    rng = np.random.default_rng(seed)
    for _ in range(trials + num_trainings):
        _train(longer, task, longer.ask().number, rng)
    best_of_longer = longer.best()
    assert lucky is not None, "no trial of a table fails"
    assert winner is not None, "no repeat of a table fails"
    assert best_of_longer is not None, "no trial of a table fails"

    def true_regret(values: dict[str, int | float | str]) -> float:
        return float(task.regret(task.curves(values, rng)[1])[-1])

    return Outcome(*map(true_regret, (lucky.values, winner.trial.values, best_of_longer.values)), num_trainings)


def _make_study(task: TableTask, seed: int, trials: int) -> Study:
    settings = StudySettings(
        task="table",
        space=task.space("good"),
        seed=seed,
        strategy="priority",
        pruner="none",
        max_epochs=1,
        metric="loss",
        direction=Direction.MINIMIZE,
        limit=None,
        planned_trials=trials,
    )
    return Study.open(InMemoryStorage(), "table", settings)


def _train(study: Study, task: TableTask, number: int, rng: np.random.Generator) -> None:
    observed = float(task.curves(study.trial(number).values, rng)[0][-1])
    study.report(number, 1, observed)
    study.tell(number, "complete", value=observed, best_epoch=1)


def run_tables(trials: int, plan: str, seeds: int) -> None:
    """Print what confirming gains on each table, and over all of them."""
    rows: dict[str, list[Outcome]] = {}
    with ProcessPoolExecutor(2) as processes:
        for family, dataset in TABLES_DEVELOPMENT:
            one = partial(simulate, family, dataset, trials=trials, plan=plan)
            rows[f"{family} {dataset}"] = list(processes.map(one, range(seeds)))
    print(f"{trials} trials, then --confirm {plan}; {seeds} seeds; true regret\n")
    print("| table | luckiest | confirmed | longer search | better / same / worse | trainings |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, outcomes in rows.items():
        print(_row(name, outcomes))
    print(_row("all", [outcome for outcomes in rows.values() for outcome in outcomes]))
    for what, gain in (
        ("luckiest", lambda o: o.lucky - o.confirmed),
        ("longer search", lambda o: o.longer - o.confirmed),
    ):
        low, mean, high = _interval([[gain(outcome) for outcome in outcomes] for outcomes in rows.values()])
        print(f"\nregret of the {what} less that of the confirmed: {mean:.4f} [{low:.4f}, {high:.4f}]")


def _row(name: str, outcomes: Sequence[Outcome]) -> str:
    signs = [int(np.sign(outcome.lucky - outcome.confirmed)) for outcome in outcomes]
    shares = " / ".join(f"{100 * signs.count(sign) / len(signs):.0f}%" for sign in (1, 0, -1))
    means = " | ".join(
        f"{np.mean([getattr(o, kind) for o in outcomes]):.4f}" for kind in ("lucky", "confirmed", "longer")
    )
    return f"| {name} | {means} | {shares} | {np.mean([o.num_trainings for o in outcomes]):.1f} |"


def _interval(groups: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """The mean over groups with its 95% interval, of a bootstrap over the seeds of each group."""
    values, rng = np.array(groups), np.random.default_rng(0)
    drawn = rng.integers(values.shape[1], size=(BOOTSTRAP_SAMPLES, *values.shape))
    means = np.take_along_axis(values[None], drawn, axis=2).mean(axis=(1, 2))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(values.mean()), float(high)


def run_real(task: str, trials: int, plan: str, seeds: int, limit: int | None, epochs: int) -> None:
    """Search a real task with each seed, confirm, and compare both winners' models on the test split."""
    from hpo.session.search import resume_study, run_search

    rows = []
    print("seed: validation and test of the luckiest; of the confirmed; whether another configuration won")
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            home = Path(folder)
            found = run_search(task, trials=trials, epochs=epochs, limit=limit, seed=seed, workers=2, home=home)
            confirmed = resume_study(study=task, confirm=plan, workers=2, home=home)
        assert found.winner is not None, "a trial has a result"
        assert confirmed.winner is not None, "a repeat has a result"
        assert found.winner.test is not None, "the search is complete"
        assert confirmed.winner.test is not None, "the confirmation is complete"
        metric = found.winner.metric
        changed = confirmed.winner.searched != found.winner.trial
        rows.append(
            [
                *(found.winner.validation, found.winner.test[metric]),
                *(confirmed.winner.validation, confirmed.winner.test[metric]),
                float(changed),
            ]
        )
        print(seed, " ".join(f"{value:.4f}" for value in rows[-1]), flush=True)
    values = np.array(rows)
    differences: list[tuple[str, Callable[[], np.ndarray]]] = [
        ("test, confirmed less luckiest", lambda: values[:, 3] - values[:, 1]),
        ("optimism of the luckiest (validation less test)", lambda: values[:, 0] - values[:, 1]),
        ("optimism of the confirmed", lambda: values[:, 2] - values[:, 3]),
    ]
    for what, of in differences:
        low, mean, high = _interval([list(of())])
        print(f"{what}: {mean:.4f} [{low:.4f}, {high:.4f}]")
    print(f"another configuration won in {values[:, 4].mean():.0%} of the searches")


def run_equal(plan: str, trials: int, races: int) -> None:
    """Print how often one of several equal configurations is dropped, how optimistic the winner's mean is, and how
    often the interval of its gain over the default holds 0."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(races, trials + 1 + find_plan(plan).num_trainings))
    finished = [_race(find_plan(plan), trials, drawn) for drawn in values]
    dropped = [any(map(race.is_behind, race.contenders)) for race, _ in finished]
    means = [race.leader.mean for race, _ in finished if race.leader and race.leader.mean is not None]
    found = [compared for race, default in finished if (compared := race.compared(default))]
    held = [not compared.is_distinct for compared in found]
    print(
        f"{plan}, {races} races of equal configurations: one is dropped in {np.mean(dropped):.0%}; the winner's mean "
        f"is {np.mean(means):.2f} standard deviations too high; the interval of its gain holds 0 in {np.mean(held):.0%}"
    )


def run_equal_models(trials: int, searches: int) -> None:
    """Print how often the best of equally good models would be told from the first, and how often it is.

    Each is right on 95% of 288 validation examples, of which half of the difficulty is common to all models.
    """
    draw = torch.Generator().manual_seed(0)
    given: dict[str, Any] = {"num_examples": 288, "target_scale": 1.0, "own": NOTHING_OWN, "seed": 0}
    spec, config = DataSpec((1,), ("wrong", "right"), "classification"), TrainConfig(metric="accuracy")
    targets, found = torch.ones(288, dtype=torch.long), []
    for _ in range(searches):
        difficulty = (torch.randn(288, generator=draw) + torch.randn(trials, 288, generator=draw)) / 2**0.5
        outputs = functional.one_hot((difficulty < 1.645).long(), 2).float()
        best = int(outputs[:, :, 1].mean(1).argmax())
        pair = outputs[best], outputs[0], targets, config
        lows = [compare_outputs(*pair, spec=spec, num_candidates=n, **given).low for n in (1, trials - 1)]
        found.append([low > 0 for low in lows])
    alone, among = np.mean(found, axis=0)
    print(f"the best of {trials} equal models gains in {among:.1%} of {searches} searches; as if alone in {alone:.0%}")


def _race(plan: Plan, trials: int, values: np.ndarray) -> tuple[Race, TrialRecord]:
    """A search and its confirmation, in which each training has the next value; and the search's first trial."""
    drawn = iter(values.tolist())
    searched = [_record(number, next(drawn), number) for number in range(trials)]
    repeats: list[TrialRecord] = []
    while (chosen := Race.of(plan, searched, repeats, Direction.MAXIMIZE).next) is not None:
        of = chosen.trial.number
        repeats.append(_record(trials + len(repeats), next(drawn), of, repeats=of))
    return Race.of(plan, searched, repeats, Direction.MAXIMIZE), searched[0]


def _record(number: int, value: float, configuration: int, repeats: int | None = None) -> TrialRecord:
    return TrialRecord(
        number=number, state="complete", value=value, values={"x": configuration}, inactive=(), curve={1: value},
        best_epoch=1, stage="", reason=None, repeats=repeats,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--real", metavar="TASK")
    parser.add_argument("--equal", action="store_true")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--plan", default="quick")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    print(describe_machine("torch", "optuna"))
    if given.tables:
        run_tables(given.trials, given.plan, given.seeds)
    if given.real:
        run_real(given.real, given.trials, given.plan, given.seeds, given.limit, given.epochs)
    if given.equal:
        run_equal(given.plan, given.trials, races=1500)
        run_equal_models(given.trials, searches=1000)
    if not (given.tables or given.real or given.equal):
        parser.error("give --tables, --real TASK or --equal")


if __name__ == "__main__":
    main()
