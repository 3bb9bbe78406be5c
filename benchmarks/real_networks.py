"""Search strategies on real networks: the epochs that each needs to reach what random search reaches at its end.

    python benchmarks/real_networks.py --data-dir DIR
    python benchmarks/real_networks.py --data-dir DIR --seconds 20 --contenders priority+budget priority random

Trains the tasks' own networks with hpo's trainer, one after another in one process on one thread. Every search may
spend the epochs of 30 full trials, or --seconds of CPU time in training; one that stops trials early gets more of them.
Searches are paired by seed, which also divides the data; the intervals are 95% of a bootstrap over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from machine import describe_machine

from hpo.config import Direction

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
import torch
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage

from hpo.config import derive_seed
from hpo.data.datasets import Splits, split_dataset
from hpo.models.preprocessed import build_model
from hpo.plugins import load_task
from hpo.search import stored
from hpo.search.settings import StudySettings
from hpo.search.study import Study
from hpo.task import Task
from hpo.training.trainer import fit

NUM_FULL_TRIALS = 30
VALIDATION_FRACTION = 0.2
MARKS = (5, 10, 20, 30)
"""Full trials whose epochs, or parts of the seconds, a search has spent when its best value is shown."""

BOOTSTRAP_SAMPLES = 5000

CONTENDERS = {
    "priority": ("priority", "sha"),
    "priority+model": ("priority", "model"),
    "priority+budget": ("priority", "sha"),
    "tpe": ("tpe", "none"),
    "random": ("random", "none"),
}
"""Strategies and pruners; with a budget, `priority` weighs what an epoch takes."""

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task, cut down to what a core trains in a minute or two."""

    name: str
    limit: int | None
    """Examples, those of the validation split among them; None for all."""

    max_epochs: int


PROBLEMS = (
    Problem(name="digits", limit=None, max_epochs=6),
    Problem(name="fashion_mnist", limit=5000, max_epochs=6),
    Problem(name="diabetes", limit=None, max_epochs=20),
    Problem(name="examples/definitions.py", limit=800, max_epochs=6),
)


@dataclass(frozen=True)
class Course:
    """How far a search has come after each of its epochs."""

    spent: Values
    """(n,) epochs, or seconds, so far."""

    best: Values
    """(n,) the best value of the task's metric so far, on the validation split."""

    num_trials: int


def search(problem: Problem, task: Task, splits: Splits, contender: str, seed: int, *, seconds: float | None) -> Course:
    """Run one search until its seconds, or the epochs of NUM_FULL_TRIALS trials, are used up."""
    budget = seconds or float(NUM_FULL_TRIALS * problem.max_epochs)
    study = _open_study(problem, task, contender, seed)
    spent, best = [0.0], [-math.inf]
    while spent[-1] < budget:
        for value, cost in train(problem, task, splits, study, budget - spent[-1], by_seconds=seconds is not None):
            spent.append(spent[-1] + cost)
            best.append(max(best[-1], value))
    return Course(np.array(spent), np.array(best), len(study.trials()))


def _open_study(problem: Problem, task: Task, contender: str, seed: int) -> Study:
    strategy, pruner = CONTENDERS[contender]
    settings = StudySettings(
        task=problem.name,
        space=task.space,
        seed=seed,
        strategy=strategy,
        pruner=pruner,
        max_epochs=problem.max_epochs,
        metric=task.objective.metric,
        direction=Direction.MAXIMIZE,
        limit=problem.limit,
        planned_trials=NUM_FULL_TRIALS,
    )
    study = Study.open(InMemoryStorage(), "real networks", settings)
    if contender.endswith("+budget"):
        study.record(stored.BUDGET, math.inf)
    return study


def train(
    problem: Problem, task: Task, splits: Splits, study: Study, budget: float, *, by_seconds: bool
) -> list[tuple[float, float]]:
    """Train what the study suggests, within the budget; the metric of each epoch, and what it cost."""
    suggestion = study.ask()
    config = task.train_config(suggestion.active_values, max_epochs=problem.max_epochs, seed=suggestion.seed)
    parameters = task.model_parameters(suggestion.active_values)
    model = build_model(task.objective, splits.spec, parameters, seed=derive_seed(suggestion.seed, "initialisation"))
    model.fit_statistics(splits.train)
    epochs: list[tuple[float, float]] = []
    is_weak, trained_s = False, 0.0
    began = time.process_time()
    with closing(fit(model, splits, config)) as results:
        for result in results:
            epoch_s = time.process_time() - began
            trained_s += epoch_s
            epochs.append((-math.inf if result.diverged else result.value, epoch_s if by_seconds else 1.0))
            is_weak = not result.diverged and study.report(suggestion.number, result.epoch, result.value)
            if is_weak or sum(cost for _, cost in epochs) >= budget:
                break
            began = time.process_time()
    state = "diverged" if result.diverged else "pruned" if is_weak else "complete"
    study.tell(suggestion.number, state, value=result.best_value, best_epoch=result.best_epoch, trained_s=trained_s)
    return epochs


# --- the table --------------------------------------------------------------------------------------------------------


def cost_to_reach(course: Course, target: float) -> float:
    """What a search had spent when it reached a value of the metric; all that it spent if it never did."""
    hits = course.best >= target
    return float(course.spent[hits.argmax()] if hits.any() else course.spent[-1])


def value_at(mark: int, course: Course) -> float:
    """The best value when a search had spent this many of NUM_FULL_TRIALS parts of its budget."""
    return float(course.best[course.spent <= course.spent[-1] * mark / NUM_FULL_TRIALS][-1])


def gain_at(mark: int, own: list[Course], others: list[Course]) -> str:
    """The mean difference of paired searches at a mark, with its standard error."""
    gains = np.array([value_at(mark, a) - value_at(mark, b) for a, b in zip(own, others, strict=True)])
    return f"{gains.mean():+.4f} ± {gains.std(ddof=1) / math.sqrt(len(gains)):.4f}"


def interval(values: Values) -> str:
    """The mean of the values with its 95% interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    digits = 1 if values.mean() > 1 else 4
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_table(problem: Problem, metric: str, courses: dict[str, list[Course]], unit: str) -> None:
    """One row a contender; the searches of each are in the order of their seeds."""
    num_seeds = len(courses["random"])
    size = "all" if problem.limit is None else f"{problem.limit}"
    print(f"\n{problem.name}: {size} examples, {problem.max_epochs} epochs a trial, {num_seeds} seeds\n")
    marks = " / ".join(map(str, MARKS))
    print(f"| strategy, pruner | {unit} to random search's end | had by | {metric} | after {marks} trials' | trials |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    targets = [course.best[-1] for course in courses["random"]]
    for name, own in courses.items():
        needed = interval(np.array([cost_to_reach(each, target) for each, target in zip(own, targets, strict=True)]))
        num_reached = sum(each.best[-1] >= target for each, target in zip(own, targets, strict=True))
        end = interval(np.array([each.best[-1] for each in own]))
        on_the_way = " / ".join(f"{np.mean([value_at(mark, each) for each in own]):.4f}" for mark in MARKS)
        trials = np.mean([each.num_trials for each in own])
        about = f"| `{name}`, `{CONTENDERS[name][1]}` | {needed} | {num_reached} of {num_seeds} | {end}"
        print(f"{about} | {on_the_way} | {trials:.0f} |")
    first, *others = courses
    print(f"\nHow much better `{first}` is after {marks} trials' {unit}, with standard errors over the seeds:\n")
    for name in others:
        print(f"- than `{name}`: {' / '.join(gain_at(mark, courses[first], courses[name]) for mark in MARKS)}")
    sys.stdout.flush()


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(f"{describe_machine('torch', 'optuna')}, one of them used")
    began = time.process_time()
    for problem in (problem for problem in PROBLEMS if problem.name in arguments.tasks):
        task = load_task(problem.name)
        dataset = task.objective.load(arguments.data_dir)
        courses: dict[str, list[Course]] = {name: [] for name in arguments.contenders}
        for seed, contender in itertools.product(range(arguments.seeds), arguments.contenders):
            splits = split_dataset(dataset, validation_fraction=VALIDATION_FRACTION, seed=seed, limit=problem.limit)
            courses[contender].append(search(problem, task, splits, contender, seed, seconds=arguments.seconds))
        print_table(problem, task.objective.metric, courses, "seconds" if arguments.seconds else "epochs")
    print(f"\n{time.process_time() - began:.0f} s of CPU")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="folder that holds FashionMNIST/")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--seconds", type=float, metavar="S", help="CPU time of a search's training, in place of epochs"
    )
    parser.add_argument("--tasks", nargs="+", default=[each.name for each in PROBLEMS], metavar="NAME")
    parser.add_argument(
        "--contenders", nargs="+", default=["priority", "tpe", "random"], choices=CONTENDERS, metavar="NAME"
    )
    arguments = parser.parse_args()
    if "random" not in arguments.contenders:
        parser.error("--contenders must include random, whose end is what the others are to reach.")
    return arguments


if __name__ == "__main__":
    main()
