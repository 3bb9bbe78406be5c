"""What `--warm-start` of a study of another task gains, and what a wrong one costs, on LCBench.

    python benchmarks/warm_start.py --lcbench DIR

Each of the eight development tasks of search_quality.py, which says what regret and DIR are, is searched from nothing,
after a study of the next task, and after a study of its own task in which every loss was negated, so that it took the
worst configurations for the best. The earlier studies have 30 complete trials.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from bench_tasks import LCBENCH_DEVELOPMENT, BenchTask, LCBenchTask
from machine import describe_machine
from search_quality import CONTENDERS, MARKS, OurStudy, print_table, simulate_all

from hpo.search.study import Study
from hpo.search.warm_start import NUM_OF_ANOTHER_TASK, best_configurations, observations
from hpo.space import Space

NUM_EARLIER_TRIALS = 30


class WarmStarted(OurStudy):
    """hpo's own study after an earlier one of task `sources[task.name]`, whose losses have this sign."""

    def __init__(
        self, task: BenchTask, space: Space, seed: int, runs: int, *, sources: dict[str, BenchTask], sign: float
    ) -> None:
        super().__init__(task, space, seed, runs, strategy="priority", pruner="sha")
        earlier = _Earlier(sources[task.name], space, seed, NUM_EARLIER_TRIALS, strategy="priority", pruner="none")
        study = earlier.searched(sources[task.name], sign)
        self._study.enqueue(best_configurations(study, space, most=NUM_OF_ANOTHER_TASK), "from study earlier")
        self._study.learn_from("earlier", observations(study, space))


class _Earlier(OurStudy):
    def searched(self, task: BenchTask, sign: float) -> Study:
        """The study after its trials."""
        for _ in range(NUM_EARLIER_TRIALS):
            job = self.ask()
            losses, _ = task.curves(job.values, np.random.default_rng(0))
            self.tell(job.key, sign * float(losses.min()), stopped=False)
        return self._study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lcbench", type=Path, required=True, metavar="DIR", help="folder of LCBench's surrogate")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--runs", type=int, default=20, metavar="N", help="epochs to spend, in full runs")
    arguments = parser.parse_args()
    print(describe_machine("optuna", "numpy"))
    tasks: list[BenchTask] = [LCBenchTask(arguments.lcbench, task) for task in LCBENCH_DEVELOPMENT]
    following = {task.name: after for task, after in zip(tasks, tasks[1:] + tasks[:1], strict=True)}
    CONTENDERS["another task"] = partial(WarmStarted, sources=following, sign=1.0)
    CONTENDERS["wrong"] = partial(WarmStarted, sources={task.name: task for task in tasks}, sign=-1.0)
    contenders = ("another task", "wrong", "priority")
    outcomes = simulate_all(contenders, tasks, arguments.seeds, default="good", workers=1, runs=arguments.runs)
    marks = [mark for mark in MARKS if mark <= arguments.runs]
    for name in ("another task", "wrong"):
        pair = {key: outcome for key, outcome in outcomes.items() if key[0] in (name, "priority")}
        print_table(f"LCBench, 8 tasks x {arguments.seeds} seeds, after a study: {name}", pair, marks, "epochs")


if __name__ == "__main__":
    main()
