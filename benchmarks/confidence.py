"""What `confidence` in the defaults gains where it is right, and what it costs where it is wrong, on LCBench.

    python benchmarks/confidence.py --lcbench DIR

Each of the eight development tasks of search_quality.py, which says what regret and DIR are, is searched without a
pruner, so that each trial is a full run. Of some defaults the user says how sure they are:

right      of four near the optimum; the other three are far from it
wrong      of four far from the optimum; the other three are near it
all right  of all seven, near the optimum
all wrong  of all seven, far from it

Near the optimum is a normal step of 0.15 of the range from its value, another one for each seed; far from it is the
poor default configuration of search_quality.py.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_tasks import LCBENCH_DEVELOPMENT, LCBenchTask
from machine import describe_machine
from search_quality import CONTENDERS, MARKS, OurStudy, print_table, simulate_all

from hpo.config import derive_seed
from hpo.parameters import CONFIDENCES, Choice, Value
from hpo.search.encoding import Encoding
from hpo.space import Group, Space

STEP = 0.15
FOUR = ("learning_rate", "num_layers", "momentum", "max_dropout")
OTHERS = ("batch_size", "max_units", "weight_decay")
CASES = {
    "right": (FOUR, FOUR),
    "wrong": (FOUR, OTHERS),
    "all right": (FOUR + OTHERS, FOUR + OTHERS),
    "all wrong": (FOUR + OTHERS, ()),
}
"""The parameters whose defaults the user is sure of, and those whose defaults are near the optimum."""


class Told(OurStudy):
    """hpo's own study in one of the cases; without a level nothing is said."""

    def __init__(
        self, task: LCBenchTask, space: Space, seed: int, runs: int, *, case: str, level: str | None = None
    ) -> None:
        sure, near = CASES[case]
        optimum = near_optimum(task, space, seed)
        groups = []
        for group in space.groups:
            parameters = {}
            for name, parameter in group.parameters.items():
                assert not isinstance(parameter, Choice), "LCBench has numbers alone"
                default = optimum[name] if name in near else parameter.default
                parameters[name] = replace(parameter, default=default, confidence=level if name in sure else None)
            groups.append(Group(group.name, **parameters))
        super().__init__(task, Space(*groups), seed, runs, strategy="priority", pruner="none")


def near_optimum(task: LCBenchTask, space: Space, seed: int) -> dict[str, Value]:
    """A configuration in the neighbourhood of the best one, another one for each seed."""
    encoding = Encoding(space)
    rng = np.random.default_rng(derive_seed(seed, task.name, "near"))
    optimum = encoding.units(_optimum(task))
    return encoding.values(np.clip(optimum + STEP * rng.normal(size=optimum.shape), 0.0, 1.0))


@cache
def _optimum(task: LCBenchTask) -> dict[str, Value]:
    return task.optimum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lcbench", type=Path, required=True, metavar="DIR", help="folder of LCBench's surrogate")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--levels", nargs="+", default=CONFIDENCES, choices=CONFIDENCES, metavar="LEVEL")
    parser.add_argument("--seeds", type=int, default=3, metavar="N")
    parser.add_argument("--runs", type=int, default=30, metavar="N", help="trials of a search")
    arguments = parser.parse_args()
    print(describe_machine("optuna", "numpy"))
    tasks = [LCBenchTask(arguments.lcbench, task) for task in LCBENCH_DEVELOPMENT]
    marks = [mark for mark in MARKS if mark <= arguments.runs]
    for case in arguments.cases:
        contenders = {level: partial(Told, case=case, level=level) for level in arguments.levels}
        CONTENDERS.update(contenders | {"nothing said": partial(Told, case=case)})
        outcomes = simulate_all(
            [*contenders, "nothing said"], tasks, arguments.seeds, default="poor", workers=1, runs=arguments.runs
        )
        for level in contenders:
            pair = {key: outcome for key, outcome in outcomes.items() if key[0] in (level, "nothing said")}
            print_table(f"{case}, {level} confidence, {arguments.seeds} seeds", pair, marks, "trials")


if __name__ == "__main__":
    main()
