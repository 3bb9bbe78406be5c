"""One search from beginning to end: check what was asked for, open the study, run the trials, crown the winner."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from hpo.checks.checklist import log_verdicts, quick_part
from hpo.checks.compatibility import check_task
from hpo.checks.verdicts import Subject, Verdict, in_few_lines
from hpo.config import Direction
from hpo.data.datasets import VALIDATION_FRACTION, check_folds, save_splits, split_dataset
from hpo.errors import SearchError, StoreError, UsageError
from hpo.execution.coordinator import Coordinator
from hpo.execution.local import LocalWorkers, warm_up
from hpo.execution.messages import Setup
from hpo.execution.observer import Observer
from hpo.plugins import OBJECTIVES, SEARCH_SPACES, require_registered
from hpo.provenance import Provenance, record_session, require_unchanged
from hpo.records import SearchOutcome, Winner
from hpo.search.lease import Session
from hpo.search.storage import open_storage, read_storage
from hpo.search.study import Study
from hpo.search.winner import find_winner, front_rows
from hpo.session.conclude import crown_winner, refit_winner, write_summary
from hpo.session.request import (
    DEFAULT_KEEP,
    Means,
    Proposal,
    agree,
    agreed_tracking_uri,
    find_means,
    find_proposals,
    read_study,
)
from hpo.task import load_dataset
from hpo.tracking.runs import StudyRuns
from hpo.tracking.store import TrackingStore, open_store
from hpo.training.device import memory_share, visible_gpus

if TYPE_CHECKING:
    from hpo.data.datasets import Splits
    from hpo.execution.pool import WorkerPool
    from hpo.home import StudyFiles
    from hpo.search.settings import StudySettings
    from hpo.task import Task
    from hpo.tracking.runs import SummaryRun

NUM_COLUMNS = 5  # parameters in MLflow's table of runs, the first in tuning priority
SILENCE_S = 30.0
"""Seconds of silence after which a worker, or a whole session, counts as dead."""

RENEWAL_S = 120.0
"""Seconds after which plots and findings in MLflow are renewed while a search runs."""

_POLL_S = 0.5
_logger = logging.getLogger(__name__)


def run_search(
    task: str,
    *,
    trials: int | None = None,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
    timeout: float | None = None,
    workers: int | None = None,
    study: str | None = None,
    strategy: str | None = None,
    pruner: str | None = None,
    first_rung: int | None = None,
    seed: int | None = None,
    limit: int | None = None,
    space: str | None = None,
    metric: str | None = None,
    folds: int | None = None,
    objectives: Sequence[str] = (),
    tries: Sequence[str] = (),
    warm_starts: Sequence[str] = (),
    device: str = "auto",
    keep: int = DEFAULT_KEEP,
    executor: str = "local",
    address: str | None = None,
    gpus_per_trial: float | None = None,
    precision: str | None = None,
    compile: str | None = None,
    deterministic: bool = False,
    accept_changes: bool = False,
    data_dir: Path | None = None,
    home: Path | None = None,
    storage: str | None = None,
    join: bool = False,
    tracking_uri: str | None = None,
    observer: Observer | None = None,
) -> SearchOutcome:
    """Search a task's hyperparameters. The parameters are the options of `hpo search`; `timeout` is in seconds.

    If a study of that name exists, the search resumes it: omitted parameters (None) keep the study's values, and those
    that are given must agree with it. Raises UsageError for wrong parameters, before anything is written, and
    SearchError if trials keep failing.
    """
    means = find_means(
        home=home,
        storage=storage,
        tracking_uri=tracking_uri,
        data_dir=data_dir,
        device=device,
        workers=workers,
        keep=keep,
        timeout=timeout,
        join=join,
        executor=executor,
        address=address,
        gpus_per_trial=gpus_per_trial,
        precision=precision,
        compile=compile,
        deterministic=deterministic,
        accept_changes=accept_changes,
    )
    given = _study_fields(
        trials, epochs, overrides, strategy, pruner, first_rung, seed, limit, space, metric, folds, objectives
    )
    found, name, settings = agree(means, task, study, given)
    proposals = find_proposals(means, name, settings, tries, warm_starts)
    return _search(found, name, settings, trials, proposals, means, observer or Observer())


def submit_study(
    task: str,
    *,
    trials: int | None = None,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
    study: str | None = None,
    strategy: str | None = None,
    pruner: str | None = None,
    first_rung: int | None = None,
    seed: int | None = None,
    limit: int | None = None,
    space: str | None = None,
    metric: str | None = None,
    folds: int | None = None,
    objectives: Sequence[str] = (),
    tries: Sequence[str] = (),
    warm_starts: Sequence[str] = (),
    home: Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
) -> Study:
    """Queue a study in a shared database for `join_search`, or ask for more trials of one; nothing is trained here.

    What is stored are names of registered tasks and spaces and checked settings, never code. Raises UsageError when
    something given is wrong.
    """
    means = find_means(home=home, storage=storage, tracking_uri=tracking_uri, device="cpu", join=True)
    require_registered(OBJECTIVES, task)
    if space is not None:
        require_registered(SEARCH_SPACES, space)
    given = _study_fields(
        trials, epochs, overrides, strategy, pruner, first_rung, seed, limit, space, metric, folds, objectives
    )
    _, name, settings = agree(means, task, study, given)
    proposals = find_proposals(means, name, settings, tries, warm_starts)
    agreed_tracking_uri(means, None)  # those who join will need one, too
    database = open_storage(means.home.path, means.storage)

    def open_study() -> Study:
        study = Study.open(database, name, settings)
        study.remember_session(num_trials=trials or study.num_trials, task_reference=task, tracking_uri=None)
        _enqueue(study, proposals)
        return study

    return Session(database, name).exclusively(open_study)


def join_search(
    study: str,
    *,
    timeout: float | None = None,
    workers: int | None = None,
    device: str = "auto",
    precision: str | None = None,
    compile: str | None = None,
    deterministic: bool = False,
    accept_changes: bool = False,
    keep: int = DEFAULT_KEEP,
    data_dir: Path | None = None,
    home: Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
    observer: Observer | None = None,
) -> SearchOutcome:
    """Run trials of a study in a shared database until it has all of them, beside any number of other machines.

    The study names its task, which must be registered on this machine too. Raises UsageError before any trial when
    something given is wrong.
    """
    means = find_means(
        home=home,
        storage=storage,
        tracking_uri=tracking_uri,
        data_dir=data_dir,
        device=device,
        workers=workers,
        keep=keep,
        timeout=timeout,
        join=True,
        precision=precision,
        compile=compile,
        deterministic=deterministic,
        accept_changes=accept_changes,
    )
    task = Study.load(read_storage(means.home.path, means.storage), study).task_reference
    # Whoever can write to the database must not choose what code runs here.
    require_registered(OBJECTIVES, task)
    found, name, settings = agree(means, task, study, {})
    return _search(found, name, settings, None, [], means, observer or Observer())


def _study_fields(
    trials: int | None,
    epochs: int | None,
    overrides: Sequence[str],
    strategy: str | None,
    pruner: str | None,
    first_rung: int | None,
    seed: int | None,
    limit: int | None,
    space: str | None,
    metric: str | None,
    folds: int | None,
    objectives: Sequence[str],
) -> dict[str, Any]:
    """The options of `hpo search` as fields of StudySettings."""
    return {
        "space_reference": space,
        "overrides": tuple(overrides) or None,
        "planned_trials": trials,
        "max_epochs": epochs,
        "strategy": strategy,
        "pruner": pruner,
        "first_rung": first_rung,
        "seed": seed,
        "limit": limit,
        "metric": metric,
        "folds": folds,
        "objectives": tuple(objectives) or None,
    }


def _enqueue(study: Study, proposals: Sequence[Proposal]) -> None:
    for proposal in proposals:
        study.enqueue(proposal.configurations, proposal.stage)


def _search(
    task: Task,
    name: str,
    settings: StudySettings,
    trials: int | None,
    proposals: Sequence[Proposal],
    means: Means,
    observer: Observer,
) -> SearchOutcome:
    files = means.home.study(name)
    files.require_own(means.storage)
    if means.executor == "local":
        warm_up()  # the workers' server imports torch while the data are read
    observer.note(f"loading the data of {task.objective.name}")
    dataset = load_dataset(task, means.data_dir)
    provenance = Provenance.of_session(task.objective, dataset)
    if known := read_study(means, name):
        require_unchanged(known, provenance, accept_changes=means.accepts_changes)
    fraction = 1 / settings.folds if settings.folds else VALIDATION_FRACTION
    splits = split_dataset(dataset, validation_fraction=fraction, seed=settings.seed, limit=settings.limit)
    if settings.folds:
        check_folds(splits, settings.folds)
    check_task(task, splits)
    verdicts = quick_part(Subject.of(task, splits, "cpu"))
    for line in in_few_lines(verdicts, task.reference):
        observer.found(line)
    means.home.require_space(splits.num_bytes)
    session_id = uuid4().hex
    splits_file = files.splits(session_id)
    workers = _find_workers(task, name, splits_file, means)

    observer.note("opening the MLflow store")
    store = open_store(means.home.path, agreed_tracking_uri(means, read_study(means, name)))
    with nullcontext() if means.is_shared else files.locked(), ExitStack() as presence:
        files.claim(means.storage)
        database = open_storage(means.home.path, means.storage)
        session = presence.enter_context(Session(database, name, session_id=session_id))

        def open_study() -> Study:
            gone = session.forget_gone()
            _require_alone(session, means, name)
            study = Study.open(database, name, settings)
            record_session(study, provenance, accept_changes=means.accepts_changes)
            study.remember_session(
                num_trials=trials or study.num_trials,
                task_reference=task.reference,
                tracking_uri=None if store.is_in_home or means.is_shared else store.uri,
            )
            study.requeue(number for number, owner in study.owners().items() if owner in gone or not means.is_shared)
            _enqueue(study, proposals)
            return study

        study = session.exclusively(open_study)
        if num_queued := study.counts()["queued"]:
            observer.note(f"{num_queued} queued configurations are tried first")
        # Of two machines that make the experiment at once, one would fail.
        opened = session.exclusively(partial(_open_runs, store, study, task, session, provenance))
        with opened as runs, _written(splits, files, session):
            coordinator = Coordinator(
                study=study,
                session=session,
                runs=runs,
                task=task,
                workers=workers,
                files=files,
                keep=means.keep,
                timeout_s=means.timeout_s,
                trainer=means.trainer,
                observer=observer,
            )
            crown = partial(crown_winner, study, store, splits, dataset.test, means.device, task.reference)
            if settings.folds:
                crown = partial(crown, partial(refit_winner, study, store, splits, task, means.device, means.trainer))
            winner = _run_and_crown(coordinator, session, study, runs, verdicts, crown, presence.close, observer)
        store.optimise()
    return SearchOutcome(
        study=name,
        home=means.home.path,
        counts=study.counts(),
        num_trials=study.num_trials,
        is_done=coordinator.is_done,
        interrupted=coordinator.interrupted,
        winner=winner,
        to_continue=tuple(trial.number for trial in study.finalists()) if not study.remaining(study.num_trials) else (),
        front=front_rows(study),
    )


def _require_alone(session: Session, means: Means, name: str) -> None:
    """A study is searched once, unless this session was asked to join."""
    if not means.is_shared:
        session.forget_others()  # we hold the home's lock: they are dead
    elif not means.joins and (others := session.others()):
        raise UsageError(
            f"study '{name}' is being searched by {', '.join(other.name for other in others)}; join in with --join, "
            "or choose another name with --study."
        )


@contextmanager
def _written(splits: Splits, files: StudyFiles, session: Session) -> Iterator[None]:
    """The splits in a file that the workers map into memory, for as long as the session runs."""
    for left in files.splits_of_the_dead(session.living):
        left.unlink(missing_ok=True)
    path = files.splits(session.id)
    try:
        save_splits(splits, path)
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; choose another home with --home.") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _find_workers(task: Task, name: str, splits: Path, means: Means) -> WorkerPool:
    setup = Setup(task_reference=task.reference, splits=splits, num_threads=1, silence_s=SILENCE_S)
    if means.executor == "ray":
        from hpo.execution.ray import RayWorkers

        setup = replace(setup, gpu_share=means.gpus_per_trial or 1.0)
        return RayWorkers(
            setup, num_workers=means.workers, address=means.ray_address, gpus_per_trial=means.gpus_per_trial
        )
    gpus = visible_gpus(means.device)
    num_cores = len(os.sched_getaffinity(0))
    num_workers = means.workers or len(gpus) or num_cores
    setup = replace(
        setup,
        num_threads=max(1, num_cores // num_workers),
        gpu_share=memory_share(num_workers, len(gpus)) if gpus else 1.0,
        log=means.home.study(name).logs,
    )
    return LocalWorkers(setup, num_workers=num_workers, gpus=gpus)


def _run_and_crown(
    coordinator: Coordinator,
    session: Session,
    study: Study,
    runs: StudyRuns,
    verdicts: Sequence[Verdict],
    crown: Callable[[], Winner | None],
    leave: Callable[[], None],
    observer: Observer,
) -> Winner | None:
    """Run the trials and write the summary, whose run ends as the search does.

    Others see us in the study until `leave` is called: then MLflow has the weights of all our trials.
    """
    summary = session.exclusively(runs.summary_run)
    try:
        log_verdicts(summary, verdicts)
        coordinator.run(_Renewal(study, summary))
        ending = "training the winner on all examples" if study.settings.folds else "testing the winner"
        observer.note("drawing the plots" + (f" and {ending}" if coordinator.is_done else ""))
        runs.flush()
        coordinator.remove_old_checkpoints()
        leave()
        if coordinator.is_done:
            _await_others(session)
        # Reading and judging the test split may take its time.
        winner = session.exclusively(crown, idle="0") if coordinator.is_done else find_winner(study)
        if study.settings.costs:
            runs.mark_front({trial.number for trial in study.front()})
        write_summary(study, summary, winner)
        if not session.others():
            summary.finish("complete" if coordinator.is_done else "interrupted")
        return winner
    except StoreError as error:
        with suppress(StoreError):
            summary.finish("interrupted")
        raise SearchError(f"{error} The trials are kept: the same command again finishes the study.") from error
    except BaseException as error:
        with suppress(StoreError):  # it must not hide why we are here
            summary.finish("failed" if isinstance(error, Exception) else "interrupted")
        raise
    finally:
        observer.search_ended()


class _Renewal:
    """Writes the summary while the search runs: every `RENEWAL_S` seconds, and in 2 % of the time at most."""

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


def _await_others(session: Session) -> None:
    """Wait until MLflow has the weights of other machines' trials too."""
    while session.others():
        time.sleep(_POLL_S)


def _open_runs(store: TrackingStore, study: Study, task: Task, session: Session, provenance: Provenance) -> StudyRuns:
    settings = study.settings
    best_first = "descending" if settings.direction is Direction.MAXIMIZE else "ascending"
    value = f", the mean of {settings.folds} folds" if settings.folds else ""
    note = (
        f"{task.objective.description}\n\nSorted by `best/{settings.metric}`{value} ({best_first}), the best trial is "
        "on top; its curves are under *Model metrics*, its weights in the artifacts. The run *study summary* holds the "
        "plots, the search space and the winner."
    )
    return StudyRuns(
        store,
        study.name,
        metric=settings.metric,
        direction=settings.direction,
        session=session.id,
        study_id=study.id,
        is_new=all(trial.state == "queued" for trial in study.trials()),
        columns=list(settings.space.parameters)[:NUM_COLUMNS],
        costs=settings.costs,
        tags={"hpo.task": settings.task},
        run_tags=provenance.tags(),
        note=note,
    )
