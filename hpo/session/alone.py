"""One training outside of a search, in a worker of its own as a trial has it, and its run in MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.data.datasets import save_splits
from hpo.errors import SearchError
from hpo.execution.local import LocalWorkers
from hpo.execution.messages import Assignment, Decision, EpochDone, Setup, TrialDone, TrialRaised
from hpo.execution.pool import WorkerDied
from hpo.files import temporary_folder
from hpo.training.device import visible_gpus
from hpo.training.trained import CHECKPOINT, files_of_model

if TYPE_CHECKING:
    from hpo.data.datasets import Splits
    from hpo.execution.pool import Event
    from hpo.tracking.runs import SummaryRun
    from hpo.training.trainer import EpochResult

_POLL_S = 1.0

Report = Callable[["EpochResult"], bool]
"""Takes each result, and returns whether to continue."""


def run_alone(assignment: Assignment, setup: Setup, splits: Splits | None, report: Report) -> TrialDone:
    """Run one trial to its end, or until `report` says so. Raises SearchError if it fails or its worker dies."""
    gpus = visible_gpus(assignment.config.device)[: setup.num_ranks]
    device = "cuda" if gpus else "cpu"  # in the worker, which sees no other GPU
    assignment = replace(assignment, config=replace(assignment.config, device=device))
    with _in_a_file(splits) as path:
        pool = LocalWorkers(replace(setup, splits=path), num_workers=1, gpus=[",".join(gpus)] if gpus else [])
        with pool:
            pool.run(assignment)
            while True:
                for _, event in pool.events(_POLL_S):
                    if isinstance(event, TrialDone):
                        return event
                    pool.answer(assignment.number, _decide(event, report))


@contextmanager
def _in_a_file(splits: Splits | None) -> Iterator[Path | None]:
    if splits is None:
        yield None
        return
    with temporary_folder() as folder:
        path = Path(folder) / "splits.pt"
        save_splits(splits, path)
        yield path


def _decide(event: Event, report: Report) -> Decision:
    match event:
        case EpochDone(result):
            return Decision.CONTINUE if report(result) else Decision.STOP
        case TrialRaised(reason):
            raise SearchError(f"the training failed: {reason}")
        case WorkerDied(reason):
            raise SearchError(f"the training did not end: {reason}")
    raise AssertionError(event)


@contextmanager
def ended(run: SummaryRun) -> Iterator[None]:
    """The run ends as what happens meanwhile does."""
    try:
        yield
    except BaseException as error:
        run.finish("failed" if isinstance(error, Exception) else "interrupted")
        raise
    run.finish("complete")


def log_model(run: SummaryRun, folder: Path, *, has_weights: bool) -> None:
    """Put what a trial has left in its folder into a run's artifacts."""
    for name in files_of_model(has_weights=has_weights):
        run.log_file(folder / name, CHECKPOINT)
