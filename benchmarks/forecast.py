"""How often the forecasts of `hpo show` come true, on tasks whose searches the weights were not fitted to.

    python benchmarks/forecast.py --lcbench DIR --searches FILE

DIR holds LCBench's surrogate; the extra `bench` brings onnxruntime and the tables (see search_quality.py). FILE keeps
the searches, a line of JSON each; those that it has are not run again.

Each search has 110 trials; those of LCBench are run with the pruners `sha` and `model`. LCBench's surrogate has no
grid of values, as the accuracy over a validation split has: so its errors are also taken to the nearest multiple of
1/64, 1/300 and 1/2000. Forecasts are made after 20, 30, ... 80 trials, with weights fitted to all other tasks, and
compared with what the next trials have gained. Then each search is stopped as `--stop-when-flat` would, and compared
with what 30 more trials would have gained.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from bench_tasks import LCBENCH_DEVELOPMENT, TABLES_DEVELOPMENT, BenchTask, LCBenchTask, TableTask
from machine import describe_machine
from numpy.typing import NDArray
from search_quality import OurStudy

from hpo.config import derive_seed
from hpo.search.forecast import CHANCE, MIN_TRIALS, NUM_MORE, features, gain_at

NUM_TRIALS = 110
MORE_LCBENCH = ("189866", "189354", "167190", "167083", "126026", "146212", "167104", "167161")
SPLITS = (64, 300, 2000)
"""Validation examples whose accuracy an error of LCBench is rounded to."""

MARKS = range(20, 81, 10)
GAINS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02)
"""Gains in error, or squared error, that the weights are fitted for."""

Array = NDArray[np.float64]
Search = dict[str, Any]


def run_search(task: BenchTask, family: str, pruner: str, seed: int) -> Search:
    """The best value of each trial of one search, in the order of the trials."""
    rng = np.random.default_rng(derive_seed(seed, task.name, "noise"))
    study = OurStudy(task, task.space("good"), seed, NUM_TRIALS, strategy="priority", pruner=pruner)
    values: list[float] = []
    for _ in range(NUM_TRIALS):
        job = study.ask()
        observed, _true = task.curves(job.values, rng)
        epoch, stopped = 0, False
        while epoch < task.num_epochs and not stopped:
            epoch += 1
            stopped = study.report(job.key, epoch, float(observed[epoch - 1]))
        values.append(float(observed[:epoch].min()))
        study.tell(job.key, values[-1], stopped=stopped and epoch < task.num_epochs)
    return {"task": task.name, "kind": family, "pruner": pruner, "seed": seed, "values": values}


def searches(lcbench: Path, kept: Path, seeds: int) -> list[Search]:
    """The searches of the file, with those that it lacks."""
    found = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    known = {(each["task"], each["pruner"], each["seed"]) for each in found}
    tasks: list[tuple[BenchTask, str, str]] = [(TableTask(*names), "tables", "none") for names in TABLES_DEVELOPMENT]
    for number, pruner in itertools.product(LCBENCH_DEVELOPMENT + MORE_LCBENCH, ("sha", "model")):
        tasks.append((LCBenchTask(lcbench, number), "lcbench", pruner))
    with kept.open("a") as file:
        for seed in range(seeds):
            for task, family, pruner in tasks:
                if (task.name, pruner, seed) not in known:
                    found.append(run_search(task, family, pruner, seed))
                    print(json.dumps(found[-1]), file=file, flush=True)
    return found


def by_size(found: list[Search]) -> list[Search]:
    """The searches, and those of LCBench once more for each size of a validation split."""
    rounded = [
        each | {"kind": f"{each['kind']}, {size} examples", "values": [round(v * size) / size for v in each["values"]]}
        for size in SPLITS
        for each in found
        if each["kind"] == "lcbench"
    ]
    return found + rounded


def gained(search: Search, num_trials: int, num_more: int) -> float:
    """How much the next trials gain over the best of the first ones."""
    values = search["values"]
    return min(values[:num_trials]) - min(values[: num_trials + num_more])


def fit(known: list[Search]) -> Array:
    """Weights of a logistic model, by Newton's method, with a small penalty."""
    cases = [(each, n, m, g) for each in known for n in (20, 30, 50, 80) for m in (10, NUM_MORE) for g in GAINS]
    inputs = np.array([features(each["values"][:n], m, g) for each, n, m, g in cases])
    came_true = np.array([gained(each, n, m) < max(g, 1e-12) for each, n, m, g in cases], dtype=float)
    weights = np.zeros(inputs.shape[1])
    for _ in range(50):
        chances = 1 / (1 + np.exp(-inputs @ weights))
        curvature = inputs.T @ (inputs * (chances * (1 - chances))[:, None]) + np.eye(len(weights))
        weights -= np.linalg.solve(curvature, inputs.T @ (chances - came_true) + weights)
    return weights


def held_out(known: list[Search]) -> Iterator[tuple[Search, Array]]:
    """Each search with the weights that the other tasks give."""
    for task in dict.fromkeys(each["task"] for each in known):
        weights = fit([each for each in known if each["task"] != task])
        yield from ((each, weights) for each in known if each["task"] == task)


def stopped_after(search: Search, gain: float, weights: Array) -> int | None:
    """Trials after which `--stop-when-flat` would stop the search; None if not within 80."""
    trials = range(MIN_TRIALS, MARKS[-1] + 1)
    return next((n for n in trials if gain_at(search["values"][:n], NUM_MORE, CHANCE, weights) < gain), None)


def print_report(known: list[Search]) -> None:
    pairs = list(held_out(known))
    for family in dict.fromkeys(each["kind"] for each in known):
        own = [(each, weights) for each, weights in pairs if each["kind"] == family]
        print(f"\n{family}: {len(own)} searches\n\n| chance | next trials | came true |\n| ---: | ---: | ---: |")
        for chance in (0.5, 0.8, 0.9):
            for more in (10, NUM_MORE):
                hits = [
                    gained(each, n, more) <= gain_at(each["values"][:n], more, chance, weights) + 1e-12
                    for each, weights in own
                    for n in MARKS
                ]
                print(f"| {chance:.0%} | {more} | {np.mean(hits):.0%} of {len(hits)} |")
        print("\n| `--stop-when-flat` | stopped | after | came true |\n| ---: | ---: | ---: | ---: |")
        for gain in GAINS[1:-1]:
            stops = [(each, n) for each, weights in own if (n := stopped_after(each, gain, weights))]
            if stops:
                hits = [gained(each, n, NUM_MORE) < gain for each, n in stops]
                after = np.mean([n for _, n in stops])
                print(f"| {gain} | {len(stops)} of {len(own)} | {after:.0f} trials | {np.mean(hits):.0%} |")
    print(f"\nWeights from all tasks: {fit(known).round(2)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lcbench", type=Path, required=True)
    parser.add_argument("--searches", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    print(describe_machine("optuna", "numpy"))
    print_report(by_size(searches(given.lcbench, given.searches, given.seeds)))
