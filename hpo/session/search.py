"""A search: what was asked is prepared, its study opened, its trials run, and its winner found."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Unpack

from hpo.checks.checklist import log_verdicts
from hpo.errors import SearchError, StoreError
from hpo.execution.hooks import CommandRunner, Notifier
from hpo.execution.observer import Observer, Observers
from hpo.plugins import OBJECTIVES, SEARCH_SPACES, require_registered
from hpo.records import SearchOutcome
from hpo.search.lease import Session
from hpo.search.storage import open_storage, read_storage
from hpo.search.study import Study
from hpo.search.winner import find_winner, front_rows
from hpo.session.conclude import conclude, write_summary
from hpo.session.opening import enqueue, extensions_alone, open_search, remember
from hpo.session.options import SearchOptions, checked, require_submittable
from hpo.session.preparation import prepare
from hpo.session.request import agreed_tracking_uri, read_request, request_for, task_of, this_machine
from hpo.terminal.notebook import notebook_progress

if TYPE_CHECKING:
    from hpo.objective import Objective
    from hpo.records import Winner
    from hpo.session.opening import Opened
    from hpo.session.options import SubmitOptions, WorkerOptions
    from hpo.session.preparation import Prepared
    from hpo.session.request import Request
    from hpo.tracking.runs import SummaryRun

RENEWAL_S = 120.0
"""Seconds after which plots and findings in MLflow are renewed while a search runs."""

_logger = logging.getLogger(__name__)


def run_search(
    task: str | Objective, *, observer: Observer | None = None, **options: Unpack[SearchOptions]
) -> SearchOutcome:
    """Search a task's hyperparameters. The keywords are the options of `hpo search`; `timeout` is in seconds.

    `task` is the name of a registered task, a FILE.py, module:attribute, or an `Objective` made in a script or
    notebook, which is sent to this session's own workers by cloudpickle. If a study of that name exists, the search
    resumes it: omitted options (None) keep the study's values, and those that are given must agree with it. Raises
    UsageError for wrong options, before anything is written, and SearchError if trials keep failing.

    `observer` hears of everything that happens. Without one, progress is drawn in a notebook, and nothing elsewhere.
    """
    with notebook_progress() if observer is None else nullcontext(observer) as chosen:
        return _search(read_request(task, options), chosen)


def submit_study(task: str, **options: Unpack[SubmitOptions]) -> Study:
    """Queue a study in a shared database for `join_search`, or ask for more trials of one; nothing is trained here.

    The keywords are the options of `hpo submit`. What is stored are names of registered tasks and spaces and checked
    settings, never code. Raises UsageError when something given is wrong.
    """
    require_submittable(options)
    require_registered(OBJECTIVES, task)
    if space := options.get("space"):
        require_registered(SEARCH_SPACES, space)
    request = read_request(task, {**options, "device": "cpu", "join": True})
    machine = request.machine
    agreed_tracking_uri(machine, None)  # those who join will need one, too
    database = open_storage(machine.home.path, machine.storage)

    def open_study() -> Study:
        study = Study.open(database, request.study, request.settings, extensions=extensions_alone(request, session))
        remember(study, request, task_reference=task, tracking_uri=None)
        enqueue(study, request.proposals)
        return study

    session = Session(database, request.study)
    return session.exclusively(open_study)


def join_search(study: str, *, observer: Observer | None = None, **options: Unpack[WorkerOptions]) -> SearchOutcome:
    """Run trials of a study in a shared database until it has all of them, beside any number of other machines.

    The keywords are the options of `hpo worker`. The study names its task, which must be registered on this machine
    too. Raises UsageError before any trial when something given is wrong.
    """
    checked_options = checked({**options, "join": True, "study": study})
    machine = this_machine(checked_options)
    task = task_of(machine, Study.load(read_storage(machine.home.path, machine.storage), study))
    return _search(request_for(machine, task, checked_options), observer or Observer())


def resume_study(*, observer: Observer | None = None, **options: Unpack[SearchOptions]) -> SearchOutcome:
    """Resume the `study` of that name, whose task it knows: to confirm or to refit its winner.

    Raises UsageError if the task can no longer be found; then resume it with `run_search`.
    """
    asked = checked(options)
    machine, name = this_machine(asked), asked.get("study") or ""
    task = task_of(machine, Study.load(read_storage(machine.home.path, machine.storage), name))
    return _search(request_for(machine, task, asked), observer or Observer())


def _search(request: Request, observer: Observer) -> SearchOutcome:
    prepared = prepare(request, observer)
    observer = Observers(observer, *_hooks(request))  # only now, since they start threads
    try:
        with open_search(prepared, observer) as opened, _ended_summary(opened, observer):
            run(prepared, opened)
            winner = conclude(prepared, opened, observer)
        outcome = _outcome(request, opened, winner)
    except Exception as error:
        observer.search_failed(error)
        raise
    observer.search_concluded(outcome)
    return outcome


def _hooks(request: Request) -> Iterator[Observer]:
    machine = request.machine
    if machine.notify:
        yield Notifier(machine.notify, request.study)
    if machine.on_best:
        yield CommandRunner(machine.on_best, request.study, machine.home.path)


def run(prepared: Prepared, opened: Opened) -> None:
    """Run the trials that are missing, and keep the summary in MLflow up to date meanwhile."""
    log_verdicts(opened.summary, prepared.verdicts)
    opened.coordinator.run(_Renewal(opened.study, opened.summary))


@contextmanager
def _ended_summary(opened: Opened, observer: Observer) -> Iterator[None]:
    """The summary's run ends as the search does."""
    try:
        yield
        if not opened.session.others():
            opened.summary.finish("complete" if opened.coordinator.is_done else "interrupted")
    except StoreError as error:
        with suppress(StoreError):
            opened.summary.finish("interrupted")
        raise SearchError(f"{error} The trials are kept: run the same command again to finish the study.") from error
    except BaseException as error:
        with suppress(StoreError):  # it must not hide why we are here
            opened.summary.finish("failed" if isinstance(error, Exception) else "interrupted")
        raise
    finally:
        observer.search_ended()


class _Renewal:
    """Writes the summary while the search runs: every `RENEWAL_S` seconds, and in 2% of the time at most."""

    def __init__(self, study: Study, summary: SummaryRun) -> None:
        self._study, self._summary = study, summary
        self._due = time.monotonic() + RENEWAL_S

    def __call__(self) -> None:
        started = time.monotonic()
        if started < self._due or not self._study.num_finished:
            return
        try:
            write_summary(self._study, self._summary, find_winner(self._study))
        except StoreError as error:  # a server that is down for a while must not end the search
            _logger.warning("the plots in MLflow are not renewed: %s", error)
        self._due = time.monotonic() + max(RENEWAL_S, 50 * (time.monotonic() - started))


def _outcome(request: Request, opened: Opened, winner: Winner | None) -> SearchOutcome:
    study, coordinator = opened.study, opened.coordinator
    return SearchOutcome(
        study=study.name,
        home=request.machine.home.path,
        counts=study.counts(),
        num_trials=study.num_trials,
        is_done=coordinator.is_done,
        interrupted=coordinator.interrupted,
        winner=winner,
        to_continue=tuple(trial.number for trial in study.finalists()) if not study.remaining(study.num_trials) else (),
        front=front_rows(study),
        trials=(*study.trials(), *study.repeats()),
        stopped_at=study.stop_at if study.has_reached_target else None,
        flat_gain=study.stop_when_flat if study.is_flat else None,
        spent_budget_s=study.budget_s if study.has_spent_budget else None,
    )
