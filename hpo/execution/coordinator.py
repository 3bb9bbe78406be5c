"""The coordinator: the only one that asks and tells, the only writer of a study.

It owns the budget (the study's total of complete and pruned trials), hands each trial to a worker, decides after every
epoch whether to go on, and writes down how the trial ended, in Optuna and in MLflow.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from hpo.errors import SearchError, StoreError
from hpo.execution.observer import Observer, SearchStart
from hpo.execution.worker import BEST_WEIGHTS, CHECKPOINT, DESCRIPTION, Assignment, Decision, run_trial
from hpo.trial import CROWNABLE

if TYPE_CHECKING:
    from hpo.data.datasets import Splits
    from hpo.plugins import Task
    from hpo.search.study import Study, Suggestion
    from hpo.tracking.recorder import StudyRuns, TrialRun
    from hpo.training.trainer import EpochResult
    from hpo.trial import EndState

MAX_FAILURES_IN_A_ROW = 5


class Coordinator:
    """Runs the trials of one study, one after the other, until its total is reached, time is up or someone stops it.

    After a first Ctrl-C or SIGTERM the running trial ends its epoch and is kept for the next start; a second one leaves
    at once, and the trial goes on from the epoch before. `interrupted` tells either from a search that is done.
    """

    def __init__(
        self,
        *,
        study: Study,
        runs: StudyRuns,
        task: Task,
        splits: Splits,
        device: str,
        checkpoints: Path,
        num_trials: int,
        timeout_s: float | None,
        observer: Observer,
    ) -> None:
        self._study = study
        self._runs = runs
        self._task = task
        self._splits = splits
        self._device = device
        self._checkpoints = checkpoints
        self.num_trials = num_trials
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._observer = observer
        self._failures: list[str] = []
        self.interrupted = False

    def run(self) -> None:
        """Run what is missing. Raises SearchError when trial after trial fails."""
        self._study.adopt_orphans()
        self.remove_old_checkpoints()
        self._observer.search_started(self._start())
        try:
            with self._signals_heard():
                while self._wants_another_trial():
                    self._run_trial(self._study.ask())
        finally:
            # Whatever was under way when something went wrong goes back to the queue.
            self._study.adopt_orphans()

    @property
    def is_done(self) -> bool:
        """Whether the study has all the trials that were asked for."""
        return self._study.remaining(self.num_trials) == 0

    def remove_old_checkpoints(self) -> None:
        """Delete the checkpoints of trials that have ended, once MLflow has all of them."""
        states = {trial.number: trial.state for trial in self._study.trials()}
        for folder in self._checkpoints.glob("trial-*"):
            number = int(folder.name.removeprefix("trial-"))
            if states.get(number) not in ("running", "interrupted") and self._runs.has_arrived(number):
                shutil.rmtree(folder)

    def _start(self) -> SearchStart:
        best = self._study.best()
        return SearchStart(
            study=self._study.name,
            metric=self._study.settings.metric,
            direction=self._study.settings.direction,
            num_trials=self.num_trials,
            counts=self._study.counts(),
            best=None if best is None or best.value is None else (best.number, best.value),
        )

    def _wants_another_trial(self) -> bool:
        if self.interrupted or self._time_is_up():
            return False
        if len(self._failures) == MAX_FAILURES_IN_A_ROW:
            raise SearchError(
                f"{MAX_FAILURES_IN_A_ROW} trials failed in a row; the first one with: {self._failures[0]}"
            )
        return not self.is_done

    def _time_is_up(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _run_trial(self, suggestion: Suggestion) -> None:
        self._observer.trial_started(suggestion)
        attempt = _Attempt(suggestion, self._open_run(suggestion))
        assignment = Assignment(
            number=suggestion.number,
            model_parameters=self._task.model_parameters(suggestion.active_values),
            config=self._task.train_config(
                suggestion.active_values,
                max_epochs=self._study.settings.max_epochs,
                seed=suggestion.seed,
                device=self._device,
            ),
            folder=self._checkpoints / f"trial-{suggestion.number:04d}",
        )
        try:
            run_trial(assignment, self._task, self._splits, partial(self._decide, attempt))
        except KeyboardInterrupt:
            attempt.end("interrupted", "stopped by hand")
        except (SearchError, StoreError):  # ours, not the trial's: it goes back to the queue
            raise
        except Exception as error:  # the model and the data are the user's: whatever they raise ends this trial only
            attempt.end("failed", f"{type(error).__name__}: {error}")
            attempt.run.log_text(traceback.format_exc(), "traceback.txt")
        self._write_down(attempt, assignment.folder)
        self.remove_old_checkpoints()
        self._observer.trial_ended(suggestion, attempt.state, attempt.last, attempt.reason)

    def _open_run(self, suggestion: Suggestion) -> TrialRun:
        tags = {"hpo.stage": suggestion.stage, "hpo.attempt": str(suggestion.attempt)}
        return self._runs.trial_run(suggestion.number, params=suggestion.active_values, tags=tags)

    def _decide(self, attempt: _Attempt, result: EpochResult) -> Decision:
        """Write an epoch's result down, and answer the worker."""
        # The first result of a resumed trial is known already, unless the process died before it was written down.
        attempt.last = result
        attempt.run.log_epoch(result.epoch, result.metrics)
        self._observer.epoch_done(attempt.suggestion, result)
        if result.diverged:
            return attempt.end("diverged", f"the loss was not finite in epoch {result.epoch}")
        if self._study.report(attempt.suggestion.number, result.epoch, result.value):
            return attempt.end("pruned", f"weaker than the others at epoch {result.epoch}")
        if self.interrupted:
            return attempt.end("interrupted", "stopped by hand")
        if self._time_is_up():
            return attempt.end("interrupted", "the time was up")
        return Decision.GO_ON

    def _write_down(self, attempt: _Attempt, folder: Path) -> None:
        """MLflow's spool first, Optuna second: after a kill in between the trial simply ends again."""
        if attempt.state not in ("interrupted", "failed"):
            for name in (BEST_WEIGHTS, DESCRIPTION):
                if (folder / name).exists():
                    attempt.run.log_file(folder / name, CHECKPOINT)
        # A trial that cannot win has no value in the table of runs, which is sorted by it.
        value = attempt.best_value if attempt.state in CROWNABLE else None
        attempt.run.finish(attempt.state, value=value, reason=attempt.reason)
        self._study.tell(
            attempt.suggestion.number,
            attempt.state,
            value=value,
            best_epoch=attempt.last.best_epoch if attempt.last else None,
            reason=attempt.reason,
        )
        if attempt.state == "failed":
            self._failures.append(attempt.reason or "")
        elif attempt.state != "interrupted":
            self._failures.clear()

    @contextmanager
    def _signals_heard(self) -> Iterator[None]:
        """Turn the first SIGINT or SIGTERM into a polite request; only the main thread can be signalled."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self._observer.note("stopping after this epoch; once more to stop at once")


@dataclass
class _Attempt:
    """One attempt at a trial: what the worker has reported, and how it ends."""

    suggestion: Suggestion
    run: TrialRun
    state: EndState = "complete"
    reason: str | None = None
    last: EpochResult | None = None

    def end(self, state: EndState, reason: str) -> Decision:
        self.state, self.reason = state, reason
        return Decision.LEAVE if state == "interrupted" else Decision.STOP

    @property
    def best_value(self) -> float | None:
        return self.last.best_value if self.last else None
