"""The coordinator: the only one that asks and tells, the only writer of its trials.

It owns the budget (the study's total of finished trials), hands each trial to a worker, decides after every
epoch whether to continue, writes down how the trial ended, in Optuna and in MLflow, and queues again what a dead worker
has left. Where several machines search one study each has a coordinator; what one of them runs is its own until its
lease expires.
"""

from __future__ import annotations

import logging
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hpo.errors import SearchError, StoreError
from hpo.execution.deaths import Deaths
from hpo.execution.limits import Limits
from hpo.execution.messages import Assignment, Decision, EpochDone, TrialDone, TrialInfeasible, TrialRaised
from hpo.execution.observer import Observer, Standing
from hpo.execution.pool import WorkerDied
from hpo.execution.retention import BestTrials, without_use_for_checkpoints
from hpo.machine import STOP_SIGNALS, leave_closed_terminal
from hpo.records import ELIGIBLE, OUT_OF_BUDGET, TIMED_OUT
from hpo.search.study import TrialTakenError
from hpo.search.winner import forget_models
from hpo.tracking.spool import rounded
from hpo.training.trained import BEST_WEIGHTS, CHECKPOINT, files_of_model

if TYPE_CHECKING:
    from hpo.execution.pool import Event, WorkerPool
    from hpo.home import StudyFiles
    from hpo.records import EndState
    from hpo.search.lease import Session
    from hpo.search.study import Study, Suggestion
    from hpo.task import Task
    from hpo.tracking.runs import StudyRuns, TrialRun
    from hpo.training.trainer import EpochResult

MAX_FAILURES_IN_A_ROW = 5
_LOOK_AROUND_S = 1.0
"""Seconds between looks at what is not an event: the clock, the lease, other coordinators."""

_ADOPTION_S = 5.0
"""Seconds between searches for trials of dead coordinators."""

_REMOVAL_S = 2.0
"""Seconds between removals of checkpoints, which read the whole study; a search ends with one."""

_FLUSH_S = 10.0

_TAKEN = "taken over by another machine"

_logger = logging.getLogger(__name__)


class Coordinator:
    """Runs the trials of one study until its total is reached, time is up or someone stops it.

    After a first Ctrl-C, SIGTERM or SIGHUP the running trials end their epoch and are kept for the next start; a second
    one leaves at once, and they continue from the epoch before. `interrupted` tells either from a search that is done.
    """

    def __init__(
        self,
        *,
        study: Study,
        session: Session,
        runs: StudyRuns,
        task: Task,
        workers: WorkerPool,
        files: StudyFiles,
        keep: int,
        timeout_s: float | None,
        trainer: Mapping[str, Any],
        observer: Observer,
    ) -> None:
        """The best weights of `keep` trials stay in MLflow, and checkpoints among the home's `files` of the study.

        `trainer` are settings of TrainConfig that are this machine's, such as its precision.
        """
        self._study = study
        self._session = session
        self._runs = runs
        self._task = task
        self._workers = workers
        self._files = files
        self._best = BestTrials(study, keep)
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._limits = Limits(study)
        self._observer = observer
        self._trainer = trainer
        self._attempts: dict[int, _Attempt] = {}
        self._deaths = Deaths()
        self._next_question = self._next_adoption = self._next_removal = 0.0
        self._failures: list[str] = []
        self.interrupted = False

    def run(self, look_around: Callable[[], None] = lambda: None) -> None:
        """Run what is missing, and call `look_around` at least once a second.

        Raises SearchError when trial after trial fails.
        """
        self._runs.recover(self._session.living, self._study.owners)
        self.remove_old_checkpoints()
        self._observer.search_started(self._standing())
        try:
            with self._signals_heard(), _threads_alternate_often(), self._workers:
                while self._should_continue():
                    look_around()
                    for number, event in self._workers.events(_LOOK_AROUND_S):
                        self._let_go_of_lost_trials()
                        if number in self._attempts:
                            self._handle(self._attempts[number], event)
                    self._let_go_of_lost_trials()
                    self._adopt_orphans()
        finally:
            # Whatever was under way when something went wrong goes back to the queue.
            self._session.exclusively(partial(self._study.release, self._session.id))

    @property
    def is_done(self) -> bool:
        """Whether the study has all the trials that were asked for, and each that may win has run to its end."""
        return self._study.is_done

    def remove_old_checkpoints(self) -> None:
        """Delete the checkpoints of trials that have ended for good, once MLflow has all of them."""
        folders = self._files.trial_folders()
        ended = without_use_for_checkpoints(self._study, {number for number, _ in folders})
        for number, folder in folders:
            if number in ended and self._runs.has_arrived(number):
                with suppress(FileNotFoundError):  # another session of this home was faster
                    shutil.rmtree(folder)

    def _standing(self) -> Standing:
        with self._study.seen_once():
            return self._read_standing()

    def _read_standing(self) -> Standing:
        best, race, running = self._study.best(), self._study.race, self._running_s()
        return Standing(
            study=self._study.name,
            metric=f"mean {self._study.settings.metric}" if self._study.settings.folds else self._study.settings.metric,
            direction=self._study.settings.direction,
            num_trials=self._study.num_trials,
            counts=self._study.counts(),
            best=None if best is None or best.value is None else (best.number, best.value),
            num_repeats=race.plan.num_trainings,
            num_repeated=sum(contender.num_ended for contender in race.contenders),
            budget_s=self._study.budget_s,
            trained_s=self._study.trained_s(besides=running) + sum(running.values()),
        )

    def _should_continue(self) -> bool:
        """Hand out what is missing; whether there is anything to wait for."""
        self._hand_out_trials()
        if self._attempts:
            return True
        # Workers may have yet to arrive, and another coordinator that dies leaves its trials to us.
        return not self._is_stopping() and not self.is_done

    def _hand_out_trials(self) -> None:
        while not self._is_stopping() and self._workers.has_room() and time.monotonic() >= self._next_question:
            suggestion = self._session.exclusively(self._ask)
            if suggestion is None:  # unless a trial of ours ends, only another session can change that
                self._next_question = time.monotonic() + _LOOK_AROUND_S
            else:
                self._begin(suggestion)

    def _ask(self) -> Suggestion | None:
        """The next trial, if one is missing. Done again from the beginning when the database went away meanwhile."""
        with self._study.seen_once():
            begun = [number for number, owner in self._study.owners().items() if owner in ("", self._session.id)]
            lost = [number for number in begun if number not in self._attempts]
            num_remaining, num_running = self._num_remaining(), self._study.counts()["running"]
            interrupted = self._study.to_resume(is_budget_spent=False)
        if lost:
            self._study.requeue(lost)
            return self._ask()
        if num_remaining == num_running == 0 and (finalists := self._study.finalists()):
            forget_models(self._study, [finalist.number for finalist in finalists])
            self._study.continue_finalists()
            with self._study.seen_once():
                num_remaining, interrupted = self._num_remaining(), self._study.to_resume(is_budget_spent=False)
        if num_remaining and interrupted:  # before what is only queued
            return self._study.resume(interrupted[0], self._session.id)
        if num_remaining:
            return self._study.ask(self._session.id)
        return self._study.ask_repeat(self._session.id) if self._study.has_searched else None

    def _num_remaining(self) -> int:
        with self._study.seen_once():
            if self._limits.is_budget_spent(self._running_s()):
                return len(self._study.to_resume(is_budget_spent=True))
            return self._study.remaining(self._study.num_trials)

    def _running_s(self) -> dict[int, float]:
        """Seconds that each of our trials has trained, in all its attempts; without repeats, which no budget holds."""
        return {
            number: attempt.trained_s
            for number, attempt in self._attempts.items()
            if attempt.suggestion.repeats is None
        }

    def _is_stopping(self) -> bool:
        if len(self._failures) >= MAX_FAILURES_IN_A_ROW:
            raise SearchError(
                f"{MAX_FAILURES_IN_A_ROW} trials failed in a row; the first one with: {self._failures[0]}"
            )
        return self.interrupted or self._time_is_up()

    def _time_is_up(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _begin(self, suggestion: Suggestion) -> None:
        """Hand a trial to a worker; one that was begun before continues from its newest checkpoint."""
        if suggestion.pruned:
            self._runs.flush(_FLUSH_S)  # its folder gets another name, and MLflow may yet have to fetch weights from it
        self._limits.read_again()
        if self._session.is_shared or suggestion.pruned or self._limits.has_budget:
            self._observer.study_moved(self._standing())
        self._observer.trial_started(suggestion)
        attempt = _Attempt(
            suggestion,
            self._open_run(suggestion),
            self._files.claim_trial_folder(suggestion.number, suggestion.attempt),
        )
        self._attempts[suggestion.number] = attempt
        self._workers.run(
            Assignment(
                number=suggestion.number,
                model_parameters=self._task.model_parameters(suggestion.active_values),
                config=self._task.train_config(
                    suggestion.active_values,
                    max_epochs=self._study.settings.max_epochs,
                    seed=suggestion.seed,
                    device=self._workers.device,
                    **self._trainer,
                ),
                folder=attempt.folder,
                costs=self._study.settings.costs,
                # A repeat has another seed, and costs what its configuration did.
                limits=self._study.settings.limits if suggestion.repeats is None else {},
                folds=self._study.settings.folds,
            )
        )

    def _open_run(self, suggestion: Suggestion) -> TrialRun:
        tags = {"hpo.stage": suggestion.stage}
        if suggestion.repeats is not None:
            tags["hpo.repeats"] = str(suggestion.repeats)
        return self._runs.trial_run(
            suggestion.number, attempt=suggestion.attempt, params=suggestion.active_values, tags=tags
        )

    def _handle(self, attempt: _Attempt, event: Event) -> None:
        match event:
            case EpochDone(result):
                self._workers.answer(attempt.number, self._decide(attempt, result))
                return
            case TrialRaised(reason, trace):
                attempt.end("failed", reason)
                attempt.run.log_text(trace, "traceback.txt")
            case TrialInfeasible(reason):
                attempt.end("infeasible", reason)
            case WorkerDied():
                self._on_worker_death(attempt, event)
            case TrialDone(costs, has_weights):
                attempt.costs, attempt.has_weights = costs, has_weights
        self._write_down(attempt)

    def _decide(self, attempt: _Attempt, result: EpochResult) -> Decision:
        """Write an epoch's result down, and answer the worker."""
        if attempt.last is None or attempt.last.settled != result.settled:
            attempt.run.set_tags({f"hpo.{name}": value for name, value in result.settled.items()})
        # The first result of a resumed trial is known already, unless the process died before it was written down.
        attempt.last, attempt.moved_at = result, time.monotonic()
        self._deaths.on_epoch_done(attempt.number, result.epoch)
        attempt.run.log_epoch(result.epoch, {**result.metrics, **self._best_so_far(result)})
        self._observer.epoch_done(attempt.suggestion, result)
        if result.diverged:
            losses = (loss for name, loss in result.metrics.items() if name in ("train/loss", "val/loss"))
            is_of_metric = self._task.objective.train or all(map(math.isfinite, losses))
            what = self._study.settings.metric if is_of_metric else "the loss"
            return attempt.end("diverged", f"{what} was not finite in epoch {result.epoch}")
        try:
            is_weak = self._report(attempt.number, result)
        except TrialTakenError:
            return attempt.end("interrupted", _TAKEN)
        if is_weak:
            return attempt.end("pruned", self._study.pruning_reason(attempt.number, result.fold or result.epoch))
        return self._decide_by_time(attempt, result)

    def _decide_by_time(self, attempt: _Attempt, result: EpochResult) -> Decision:
        """Whether a trial that is good enough has the time to continue."""
        if not result.is_last and self._limits.is_trial_over(attempt.trained_s):
            # As if it had stopped early: under this limit it has shown what it can.
            return attempt.end("complete", f"{TIMED_OUT} in epoch {result.epoch}")
        if self.interrupted:
            return attempt.end("interrupted", "stopped by hand")
        if self._time_is_up():
            return attempt.end("interrupted", "the time was up")
        if self._is_out_of_budget(attempt, result):
            state: EndState = "pruned" if self._study.may_end_early else "interrupted"
            return attempt.end(state, OUT_OF_BUDGET)
        return Decision.CONTINUE

    def _is_out_of_budget(self, attempt: _Attempt, result: EpochResult) -> bool:
        """Whether a trial has to end because the trials together have trained for as long as they may."""
        if result.is_last or attempt.suggestion.repeats is not None:
            return False
        return self._limits.is_budget_spent(self._running_s())

    def _best_so_far(self, result: EpochResult) -> dict[str, float]:
        """For the table of runs, where an epoch is the best one of its trial; with folds the end tells their mean."""
        if result.fold or not result.is_best or result.best_value is None:
            return {}
        return {f"best/{self._study.settings.metric}": rounded(result.best_value)}

    def _report(self, number: int, result: EpochResult) -> bool:
        """Tell the study of an epoch, or of a fold that is over; whether the trial is too weak to continue."""
        trained_s = self._attempts[number].trained_s
        if result.fold is None:
            return self._study.report(number, result.epoch, result.value, trained_s=trained_s)
        if not result.is_last:
            return False
        assert result.fold_value is not None, "a fold that did not diverge has a value"
        return self._study.report(number, result.fold, result.fold_value, trained_s=trained_s)

    def _on_worker_death(self, attempt: _Attempt, death: WorkerDied) -> None:
        """Queue the trial again, unless it has killed one worker after another in the same epoch."""
        epoch, age_s = attempt.last.epoch if attempt.last else 0, time.monotonic() - attempt.moved_at
        why_it_fails = self._deaths.on_worker_death(attempt.number, epoch, death, age_s)
        if why_it_fails:
            attempt.end("failed", f"{death.reason} ({why_it_fails})")
        else:
            attempt.end("interrupted", death.reason)

    def _write_down(self, attempt: _Attempt) -> None:
        """MLflow's spool first, Optuna second: after a kill in between the trial simply ends again."""
        # A trial that cannot win has no value in the table of runs, which is sorted by it, and needs no weights.
        value = self._value_of(attempt) if attempt.state in ELIGIBLE else None
        repeats = attempt.suggestion.repeats
        outdone = [] if value is None else self._best.add(attempt.number, value, attempt.costs, repeats=repeats)
        logged_value = value
        if attempt.suggestion.pruned and attempt.state in ("diverged", "failed"):  # it had a value when it was pruned
            outdone, logged_value = [attempt.number], math.nan
            self._best.remove(attempt.number)
        has_model = not self._study.settings.folds  # else the winner alone, when it is trained on all examples
        if value is not None and attempt.number not in outdone and has_model:
            for name in files_of_model(has_weights=attempt.has_weights):
                attempt.run.log_file(attempt.folder / name, CHECKPOINT)
        attempt.run.finish(attempt.state, value=logged_value, reason=attempt.reason, costs=attempt.costs)
        if not self._session.exclusively(partial(self._tell, attempt, value)):
            self._let_go(attempt)
            return
        del self._attempts[attempt.number]
        self._next_question = 0.0
        self._limits.read_again()
        for number in outdone:
            if number != attempt.number or attempt.suggestion.attempt > 1:  # else it was never sent
                self._runs.remove_file(number, f"{CHECKPOINT}/{BEST_WEIGHTS}")
        self._count_failures(attempt)
        if attempt.state != "interrupted" and time.monotonic() >= self._next_removal:
            self._next_removal = time.monotonic() + _REMOVAL_S
            self.remove_old_checkpoints()
        self._observer.trial_ended(attempt.suggestion, attempt.state, _with_value(attempt.last, value), attempt.reason)

    def _value_of(self, attempt: _Attempt) -> float | None:
        if attempt.state == "pruned" and self._study.settings.folds:
            return self._study.estimated_mean(attempt.number)
        return attempt.best_value

    def _tell(self, attempt: _Attempt, value: float | None) -> bool:
        """Tell the study how a trial ended; False where another machine has taken it over."""
        if self._study.owners().get(attempt.number) != self._session.id:
            # Told already if the answer to a first try was lost in an outage.
            return self._study.last_owner(attempt.number) == self._session.id
        self._study.tell(
            attempt.number,
            attempt.state,
            value=value,
            best_epoch=attempt.last.best_epoch if attempt.last else None,
            reason=attempt.reason,
            costs=attempt.costs,
            symptoms=attempt.last.symptoms if attempt.last else None,
            trained_s=attempt.trained_s,
        )
        return True

    def _count_failures(self, attempt: _Attempt) -> None:
        if attempt.state == "failed":
            self._failures.append(attempt.reason or "")
        elif attempt.state != "interrupted":
            self._failures.clear()

    def _adopt_orphans(self) -> None:
        """Now and then, look for trials of coordinators that have died."""
        if time.monotonic() < self._next_adoption:
            return
        self._next_adoption = time.monotonic() + _ADOPTION_S
        if self._session.may_adopt() and self._session.exclusively(self._put_orphans_back):
            try:
                self._runs.recover(self._session.living, self._study.owners)
            except StoreError as error:  # what is left of the dead is recorded by the next search
                _logger.warning("%s", error)

    def _put_orphans_back(self) -> bool:
        """Put the trials of dead coordinators into the queue; whether there were any."""
        living = self._session.living()
        orphans = [number for number, owner in self._study.owners().items() if owner not in living]
        self._study.requeue(orphans)
        return bool(orphans)

    def _let_go_of_lost_trials(self) -> None:
        """After a time in which our lease was not renewed: forget the trials that others have taken over."""
        if not self._session.has_lapsed():
            return
        owners = self._study.owners()
        for attempt in [
            attempt for attempt in self._attempts.values() if owners.get(attempt.number) != self._session.id
        ]:
            self._let_go(attempt)

    def _let_go(self, attempt: _Attempt) -> None:
        """Forget a trial that another machine has taken over, and tell MLflow nothing more of it."""
        del self._attempts[attempt.number]
        self._next_question = 0.0
        self._workers.abandon(attempt.number)
        self._runs.abandon(attempt.number)
        self._study.forget(attempt.number)
        self._observer.trial_ended(attempt.suggestion, "interrupted", attempt.last, _TAKEN)

    @contextmanager
    def _signals_heard(self) -> Iterator[None]:
        """Turn the first signal to stop into a polite request; only the main thread can be signalled.

        After `nohup` a closed terminal is none.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        heard = [each for each in STOP_SIGNALS if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        leave_closed_terminal(number)
        if self.interrupted:
            self._session.hurry()
            raise KeyboardInterrupt
        self.interrupted = True
        self._observer.note("stopping after the current epoch; press Ctrl-C again to stop now")


@contextmanager
def _threads_alternate_often() -> Iterator[None]:
    """Let no thread compute for more than half a millisecond while another one waits.

    Each row that the coordinator reads from sqlite would else wait up to 5 ms for the thread that tells MLflow.
    """
    usual = sys.getswitchinterval()
    sys.setswitchinterval(0.0005)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def _with_value(result: EpochResult | None, value: float | None) -> EpochResult | None:
    """The last result of a trial with the value that it counts with: with folds that of a pruned one is estimated."""
    return result if result is None or value is None else replace(result, best_value=value)


@dataclass
class _Attempt:
    """One attempt at a trial: what its worker has reported, and how it ends."""

    suggestion: Suggestion
    run: TrialRun
    folder: Path
    state: EndState = "complete"
    reason: str | None = None
    last: EpochResult | None = None
    costs: dict[str, float] = field(default_factory=dict)
    has_weights: bool = True
    began_at: float = field(default_factory=time.monotonic)
    """When a worker got it, in seconds of the monotonic clock."""
    moved_at: float = field(default_factory=time.monotonic)
    """When it began, or ended its last epoch."""

    def end(self, state: EndState, reason: str) -> Decision:
        self.state, self.reason = state, reason
        return Decision.LEAVE if state == "interrupted" else Decision.STOP

    @property
    def number(self) -> int:
        return self.suggestion.number

    @property
    def trained_s(self) -> float:
        """Seconds that workers were busy with the trial, in all its attempts."""
        return self.suggestion.trained_s + time.monotonic() - self.began_at

    @property
    def best_value(self) -> float | None:
        return self.last.best_value if self.last else None
