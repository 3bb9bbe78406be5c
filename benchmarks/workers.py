"""How many trials an hour a machine makes with 1, 2 and 4 workers: `python benchmarks/workers.py`.

The same trials of Fashion-MNIST, drawn at random and none of them pruned, are searched with each number of workers. The
cores are shared out between them as `hpo search` does: one worker computes with a thread a core, as many workers as
cores with a thread each. The clock runs from the first epoch that a search reports to the end of its last trial:
starting up is left out. The data sets are found by HPO_DATA_DIR. The last line names what was used.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from machine import describe_machine
from rich.console import Console
from rich.table import Table

from hpo.execution.observer import Observer
from hpo.session.search import run_search

if TYPE_CHECKING:
    from hpo.records import EndState
    from hpo.search.study import Suggestion
    from hpo.training.trainer import EpochResult


class Clock(Observer):
    """When trials trained."""

    def __init__(self) -> None:
        self.first_epoch_s = 0.0
        self.last_end_s = 0.0
        self.num_epochs = -1

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        self.first_epoch_s = self.first_epoch_s or time.monotonic()
        self.num_epochs += 1

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        self.last_end_s = time.monotonic()

    @property
    def epochs_an_hour(self) -> float:
        return 3600 * self.num_epochs / (self.last_end_s - self.first_epoch_s)


def measure(workers: int, options: argparse.Namespace) -> float:
    """Trials an hour."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as home:
        run_search(
            "fashion_mnist",
            home=Path(home),
            trials=options.trials,
            epochs=options.epochs,
            workers=workers,
            strategy="random",
            pruner="none",
            compile="off",
            overrides=("batch_size=256", "depth=2", "width=256"),
            observer=clock,
        )
    return clock.epochs_an_hour / options.epochs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    if "HPO_DATA_DIR" not in os.environ:
        parser.error("HPO_DATA_DIR must name the folder of the data sets.")
    table = Table("workers", "trials an hour", f"times those of {options.workers[0]}")
    first = None
    for workers in options.workers:
        trials_an_hour = measure(workers, options)
        first = first or trials_an_hour
        table.add_row(str(workers), f"{trials_an_hour:.0f}", f"{trials_an_hour / first:.2f}")
    console = Console()
    console.print(table)
    console.print(describe_machine("torch"))


if __name__ == "__main__":
    main()
