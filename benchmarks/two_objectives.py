"""Searches for two objectives side by side: the hypervolume of their fronts, on LCBench.

    python benchmarks/two_objectives.py --lcbench DIR

A trial has the validation error of an MLP, and its seconds per epoch; both are minimised. search_quality.py says what
DIR is. Each search begins with the default configuration. What is compared is how much of the hypervolume is missing:
that of the front of all searches of a task has 0, and no front at all 1. The reference point is the median of random
search in each objective. The intervals are 95% of a bootstrap over tasks.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from bench_tasks import LCBENCH_DEVELOPMENT, LCBenchTask
from machine import describe_machine
from numpy.typing import NDArray
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from search_quality import Regrets, ratio_of_means

from hpo.search.encoding import distribution
from hpo.search.priority import PrioritySampler
from hpo.search.wrappers import DefaultFirstSampler
from hpo.space import Space

MARKS = (10, 20, 40, 60)

Points = NDArray[np.float64]
"""(n, 2) losses of the trials of a search, in their order."""

SAMPLERS: dict[str, Callable[[Space, int], BaseSampler]] = {
    "priority": lambda space, seed: PrioritySampler(space, seed=seed, num_trials=max(MARKS)),
    "tpe": lambda space, seed: DefaultFirstSampler(TPESampler(seed=seed), space),
    "nsga2": lambda space, seed: DefaultFirstSampler(NSGAIISampler(seed=seed), space),
    "gp": lambda space, seed: DefaultFirstSampler(GPSampler(seed=seed, warn_independent_sampling=False), space),
    "random": lambda space, seed: DefaultFirstSampler(RandomSampler(seed=seed), space),
}


def search(task: LCBenchTask, sampler: str, seed: int, num_trials: int) -> tuple[Points, float]:
    """The losses of a search, and its seconds of CPU per trial."""
    space = task.space("good")
    distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=SAMPLERS[sampler](space, seed))
    began = time.process_time()
    for _ in range(num_trials):
        trial = study.ask(distributions)
        errors, _ = task.curves(trial.params, np.random.default_rng(0))
        study.tell(trial, (errors.min(), task.epoch_s(trial.params)))
    return np.array([trial.values for trial in study.trials]), (time.process_time() - began) / num_trials


def hypervolume(points: Points) -> float:
    """The area that points beat, up to (1, 1)."""
    total, lowest = 0.0, 1.0
    for left, bottom in points[np.lexsort((points[:, 1], points[:, 0]))]:
        if left < 1.0 and bottom < lowest:
            total += (1.0 - left) * (lowest - bottom)
            lowest = bottom
    return total


def missing(searches: dict[tuple[str, int], Points], mark: int) -> dict[tuple[str, int], float]:
    """The share of the hypervolume that searches of one task miss after `mark` trials, by sampler and seed."""
    everything = np.concatenate(list(searches.values()))
    random = np.concatenate([points for (sampler, _), points in searches.items() if sampler == "random"])
    best, reference = everything.min(axis=0), np.median(random, axis=0)
    scaled = {key: (points - best) / (reference - best) for key, points in searches.items()}
    whole = hypervolume(np.concatenate(list(scaled.values())))
    return {key: 1.0 - hypervolume(points[:mark]) / whole for key, points in scaled.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lcbench", type=Path, required=True, metavar="DIR", help="folder of LCBench's surrogate")
    parser.add_argument("--samplers", nargs="+", default=list(SAMPLERS), choices=SAMPLERS, metavar="NAME")
    parser.add_argument("--tasks", nargs="+", default=LCBENCH_DEVELOPMENT, metavar="ID", help="OpenML tasks of LCBench")
    parser.add_argument("--seeds", type=int, default=5, metavar="N")
    parser.add_argument("--trials", type=int, default=max(MARKS), metavar="N")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    print(describe_machine("optuna", "numpy"))
    samplers = list(dict.fromkeys([*arguments.samplers, "random"]))  # the reference point is random search's
    seconds: dict[str, list[float]] = {sampler: [] for sampler in samplers}
    by_task: list[Any] = []
    for task in arguments.tasks:
        searches: dict[tuple[str, int], Points] = {}
        for sampler, seed in itertools.product(samplers, range(arguments.seeds)):
            points, seconds_per_trial = search(LCBenchTask(arguments.lcbench, task), sampler, seed, arguments.trials)
            searches[sampler, seed] = points
            seconds[sampler].append(seconds_per_trial)
        by_task.append(searches)
        print(f"searched {task}", flush=True)
    for mark in (mark for mark in MARKS if mark <= arguments.trials):
        shares = [missing(searches, mark) for searches in by_task]
        found: Regrets = {
            sampler: np.array([[share[sampler, seed] for seed in range(arguments.seeds)] for share in shares])
            for sampler in samplers
        }
        print(f"\n| missing after {mark} trials | share | {samplers[0]} : this | CPU s per trial |")
        print("| --- | ---: | ---: | ---: |")
        for sampler in samplers:
            ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio_of_means(found[samplers[0]], found[sampler]))
            print(f"| {sampler} | {found[sampler].mean():.3f} | {ratio} | {np.mean(seconds[sampler]):.3f} |")


if __name__ == "__main__":
    main()
