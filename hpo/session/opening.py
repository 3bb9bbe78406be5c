"""The second phase of a search: open its study and its stores, and write down that a session searches it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.checks.rehearsal import REHEARSAL
from hpo.config import Direction
from hpo.data.datasets import save_splits
from hpo.errors import StoreError, UsageError
from hpo.execution.coordinator import Coordinator
from hpo.provenance import record_session
from hpo.search import stored
from hpo.search.lease import Session
from hpo.search.storage import Storage, open_storage
from hpo.search.study import Study
from hpo.tracking.runs import StudyRuns
from hpo.tracking.store import open_store

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpo.execution.observer import Observer
    from hpo.session.preparation import Prepared
    from hpo.session.request import Proposal, Request
    from hpo.tracking.runs import SummaryRun
    from hpo.tracking.store import TrackingStore

NUM_COLUMNS = 5  # parameters in MLflow's table of runs, the first in tuning priority


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A study that this session searches."""

    study: Study
    session: Session
    store: TrackingStore
    runs: StudyRuns
    summary: SummaryRun
    """RUNNING until the search ends."""
    coordinator: Coordinator


@contextmanager
def open_search(prepared: Prepared, observer: Observer) -> Iterator[Opened]:
    """The study, opened for this session alone or beside those that it joins; closed in the end, whatever happens."""
    request, machine = prepared.request, prepared.request.machine
    files = machine.home.study(request.study)
    observer.note("opening the MLflow store")
    store = open_store(machine.home.path, prepared.tracking_uri)
    with nullcontext() if machine.is_shared else files.locked(), ExitStack() as presence:
        files.claim(machine.storage, machine.data_dir)
        database = open_storage(machine.home.path, machine.storage)
        session = presence.enter_context(Session(database, request.study, session_id=prepared.session_id))
        study = session.exclusively(lambda: _open_study(prepared, database, session, store))
        if num_queued := study.counts()["queued"]:
            observer.note(f"{num_queued} queued configurations are tried first")
        # Of two machines that make the experiment at once, one would fail.
        opened_runs = session.exclusively(lambda: _open_runs(prepared, study, session, store))
        with opened_runs as runs, _written_splits(prepared, session):
            _note_missing_runs(study, runs, observer)
            yield Opened(
                study=study,
                session=session,
                store=store,
                runs=runs,
                summary=session.exclusively(runs.summary_run),
                coordinator=Coordinator(
                    study=study,
                    session=session,
                    runs=runs,
                    task=request.task,
                    workers=prepared.workers,
                    files=files,
                    keep=machine.keep,
                    timeout_s=machine.timeout_s,
                    trainer=machine.trainer,
                    observer=observer,
                ),
            )
        store.optimise()


def enqueue(study: Study, proposals: Sequence[Proposal]) -> None:
    """Let the proposals be tried first. The caller holds the study's lock."""
    for proposal in proposals:
        study.enqueue(proposal.configurations, proposal.stage)
        if proposal.observations:
            study.learn_from(proposal.source, proposal.observations)


def _open_study(prepared: Prepared, database: Storage, session: Session, store: TrackingStore) -> Study:
    """The study, made if need be, with what this session was asked for; the lock is held."""
    request, machine = prepared.request, prepared.request.machine
    gone = session.forget_gone()
    _require_alone(prepared, session)
    study = Study.open(database, request.study, request.settings, extensions=extensions_alone(request, session))
    record_session(study, prepared.provenance, accept_changes=machine.accepts_changes)
    tracking_uri = None if store.is_in_home or machine.is_shared else store.uri
    remember(study, request, task_reference=request.task.reference, tracking_uri=tracking_uri)
    for verdict in prepared.verdicts:
        if verdict.check == REHEARSAL and verdict.state == "warning":
            study.record(stored.REHEARSAL, f"{verdict.text}: {verdict.advice}")
    study.requeue(number for number, owner in study.owners().items() if owner in gone or not machine.is_shared)
    enqueue(study, request.proposals)
    return study


def remember(study: Study, request: Request, *, task_reference: str, tracking_uri: str | None) -> None:
    """Let the study keep what was asked for."""
    study.remember_session(
        num_trials=request.trials or study.num_trials,
        task_reference=task_reference,
        tracking_uri=tracking_uri,
        has_test=request.task.has_test,
        has_loop=request.task.objective.train is not None,
        confirm=request.confirm,
        stop_at=request.stop_at,
        stop_when_flat=request.stop_when_flat,
        budget_s=request.budget_s,
        trial_timeout_s=request.trial_timeout_s,
        refit=request.refit,
    )


def extensions_alone(request: Request, session: Session) -> tuple[str, ...]:
    """What the request widens. Raises UsageError if others search the study, who would not hear of it."""
    if request.extensions and (others := session.others()):
        raise UsageError(
            f"--extend cannot widen study '{request.study}' while it is being searched by "
            f"{', '.join(other.name for other in others)}; stop them first."
        )
    return request.extensions


def _require_alone(prepared: Prepared, session: Session) -> None:
    """A study is searched once, unless this session was asked to join."""
    machine = prepared.request.machine
    if not machine.is_shared:
        session.forget_others()  # we hold the home's lock: they are dead
    elif not machine.joins and (others := session.others()):
        raise UsageError(
            f"study '{prepared.request.study}' is being searched by {', '.join(other.name for other in others)}; join "
            "in with --join, or choose another name with --study."
        )


def _open_runs(prepared: Prepared, study: Study, session: Session, store: TrackingStore) -> StudyRuns:
    settings = study.settings
    best_first = "descending" if settings.direction is Direction.MAXIMIZE else "ascending"
    value = f", the mean of {settings.folds} folds" if settings.folds else ""
    note = (
        f"{prepared.request.task.objective.description}\n\nSorted by `best/{settings.metric}`{value} ({best_first}), "
        "the best trial is on top; its curves are under *Model metrics*, its weights in the artifacts. The run *study "
        "summary* holds the plots, the search space and the winner."
    )
    return StudyRuns(
        store,
        study.name,
        metric=settings.metric,
        direction=settings.direction,
        session=session.id,
        study_id=study.id,
        is_new=not study.has_begun,
        is_shared=prepared.request.machine.is_shared,
        columns=list(settings.space.parameters)[:NUM_COLUMNS],
        costs=settings.costs,
        tags={"hpo.task": settings.task},
        run_tags=prepared.provenance.tags(),
        note=note,
    )


def _note_missing_runs(study: Study, runs: StudyRuns, observer: Observer) -> None:
    ended = [trial.number for trial in study.trials() if trial.state in ("complete", "pruned")]
    if missing := runs.missing(ended) if ended else []:
        named = ", ".join(map(str, missing[:5])) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        observer.note(
            f"MLflow has no run of trial {named}: deleted, with curves and weights; the study continues without them"
        )


@contextmanager
def _written_splits(prepared: Prepared, session: Session) -> Iterator[None]:
    """The splits, if hpo has them, in a file that the workers map into memory, for as long as the session runs."""
    files = prepared.request.machine.home.study(prepared.request.study)
    for left in files.splits_of_the_dead(session.living):
        left.unlink(missing_ok=True)
    if prepared.splits is None:
        yield
        return
    path = files.splits(session.id)
    try:
        save_splits(prepared.splits, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; choose another home with --home.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
