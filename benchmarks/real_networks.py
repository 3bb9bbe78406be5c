"""Search strategies on real networks: the epochs that each needs to reach what random search reaches at its end.

    python benchmarks/real_networks.py --data-dir DIR

Trains the tasks' own networks with hpo's trainer, one after another in one process on one thread. Every search may
spend the epochs of 30 full trials; one that stops trials early gets more of them. Searches are paired by seed, which
also divides the data; the intervals are 95 % of a bootstrap over seeds.
"""

from __future__ import annotations

import argparse
import itertools
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
from hpo.search.settings import StudySettings
from hpo.search.study import Study, Suggestion
from hpo.task import Task
from hpo.training.trainer import fit

NUM_FULL_TRIALS = 30
VALIDATION_FRACTION = 0.2
BOOTSTRAP_SAMPLES = 5000

CONTENDERS = {"priority": "model", "tpe": "none", "random": "none"}
"""The strategies, each with its pruner."""

Values = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A task, cut down to what a core trains in a minute or two."""

    name: str
    limit: int | None
    """Examples, those of the validation split among them; None for all."""

    max_epochs: int

    @property
    def budget(self) -> int:
        """Epochs of one search."""
        return NUM_FULL_TRIALS * self.max_epochs


PROBLEMS = (
    Problem(name="digits", limit=None, max_epochs=6),
    Problem(name="fashion_mnist", limit=5000, max_epochs=6),
)


def search(problem: Problem, task: Task, splits: Splits, strategy: str, seed: int) -> tuple[Values, int]:
    """Run one search; gives the best validation accuracy after each epoch (budget,), and the number of trials."""
    study = _open_study(problem, task, strategy, seed)
    reached: list[float] = []
    best = 0.0
    while len(reached) < problem.budget:
        suggestion = study.ask()
        for accuracy in train(problem, task, splits, study, suggestion, problem.budget - len(reached)):
            best = max(best, accuracy)
            reached.append(best)
    return np.array(reached), len(study.trials())


def _open_study(problem: Problem, task: Task, strategy: str, seed: int) -> Study:
    settings = StudySettings(
        task=problem.name,
        space=task.space,
        seed=seed,
        strategy=strategy,
        pruner=CONTENDERS[strategy],
        max_epochs=problem.max_epochs,
        metric="accuracy",
        direction=Direction.MAXIMIZE,
        limit=problem.limit,
        planned_trials=NUM_FULL_TRIALS,
    )
    return Study.open(InMemoryStorage(), "real networks", settings)


def train(
    problem: Problem, task: Task, splits: Splits, study: Study, suggestion: Suggestion, num_epochs: int
) -> list[float]:
    """Train a suggestion for `num_epochs` at the most, and tell the study; gives the accuracies, 0 for NaN."""
    config = task.train_config(suggestion.active_values, max_epochs=problem.max_epochs, seed=suggestion.seed)
    parameters = task.model_parameters(suggestion.active_values)
    model = build_model(task.objective, splits.spec, parameters, seed=derive_seed(suggestion.seed, "initialisation"))
    model.fit_statistics(splits.train)
    accuracies: list[float] = []
    is_weak = False
    with closing(fit(model, splits, config)) as results:
        for result in itertools.islice(results, num_epochs):
            accuracies.append(0.0 if result.diverged else result.value)
            is_weak = not result.diverged and study.report(suggestion.number, result.epoch, result.value)
            if is_weak:
                break
    state = "diverged" if result.diverged else "pruned" if is_weak else "complete"
    study.tell(suggestion.number, state, value=result.best_value, best_epoch=result.best_epoch)
    return accuracies


# --- the table --------------------------------------------------------------------------------------------------------


def epochs_to_reach(curves: Values, targets: Values) -> Values:
    """First epoch in which each search (seeds, epochs) has its target (seeds,); the last one where it never has."""
    hits = curves >= targets[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, curves.shape[1]).astype(np.float64)


def interval(values: Values) -> str:
    """The mean of the values with its 95 % interval."""
    drawn = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP_SAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    digits = 1 if values.mean() > 1 else 4
    return f"{values.mean():.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def print_table(problem: Problem, curves: dict[str, Values], trials: dict[str, float]) -> None:
    """One row a strategy: (seeds, epochs) curves of the best accuracy so far, and the mean number of trials."""
    num_seeds = len(curves["random"])
    size = "all" if problem.limit is None else f"{problem.limit}"
    print(f"\n{problem.name}: {size} examples, {problem.max_epochs} epochs a trial, {num_seeds} seeds\n")
    print(f"| strategy, pruner | epochs of {problem.budget} to random search's end | had by | accuracy | trials |")
    print("| --- | ---: | ---: | ---: | ---: |")
    targets = curves["random"][:, -1]
    for name, pruner in CONTENDERS.items():
        needed = interval(epochs_to_reach(curves[name], targets))
        num_reached = int((curves[name][:, -1] >= targets).sum())
        end = interval(curves[name][:, -1])
        print(f"| `{name}`, `{pruner}` | {needed} | {num_reached} of {num_seeds} | {end} | {trials[name]:.0f} |")
    sys.stdout.flush()


def main() -> None:
    arguments = _parse()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(f"{describe_machine('torch', 'optuna')}, one of them used")
    began = time.process_time()
    for problem in PROBLEMS:
        task = load_task(problem.name)
        dataset = task.objective.load(arguments.data_dir)
        curves: dict[str, list[Values]] = {name: [] for name in CONTENDERS}
        trials: dict[str, list[int]] = {name: [] for name in CONTENDERS}
        for seed, strategy in itertools.product(range(arguments.seeds), CONTENDERS):
            splits = split_dataset(dataset, validation_fraction=VALIDATION_FRACTION, seed=seed, limit=problem.limit)
            curve, num_trials = search(problem, task, splits, strategy, seed)
            curves[strategy].append(curve)
            trials[strategy].append(num_trials)
        print_table(
            problem,
            {name: np.array(rows) for name, rows in curves.items()},
            {name: float(np.mean(counts)) for name, counts in trials.items()},
        )
    print(f"\n{time.process_time() - began:.0f} s of CPU")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR", help="folder that holds FashionMNIST/")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    return parser.parse_args()


if __name__ == "__main__":
    main()
