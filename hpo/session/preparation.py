"""The first phase of a search: read and check all that it needs. Nothing is written, and no trial has begun."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from uuid import uuid4

from hpo.checks.checklist import quick_part
from hpo.checks.compatibility import check_comparable, check_task, check_test_split
from hpo.checks.rehearsal import LIMIT_S, REHEARSAL, check_rehearsal
from hpo.checks.verdicts import Subject, in_few_lines
from hpo.data.datasets import VALIDATION_FRACTION, all_examples, check_folds, split_dataset
from hpo.errors import UsageError
from hpo.execution.executors import start_workers
from hpo.execution.local import warm_up
from hpo.execution.messages import Setup
from hpo.execution.task_code import task_code
from hpo.provenance import Provenance, require_unchanged
from hpo.session.request import agreed_tracking_uri, read_study
from hpo.task import load_dataset

if TYPE_CHECKING:
    from hpo.checks.verdicts import Verdict
    from hpo.data.datasets import Splits
    from hpo.data.examples import Dataset, SealedSplit
    from hpo.execution.observer import Observer
    from hpo.execution.pool import WorkerPool
    from hpo.session.request import Machine, Request

SILENCE_S = 30.0
"""Seconds of silence after which a worker, or a whole session, counts as dead."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A search that could begin."""

    request: Request
    session_id: str
    splits: Splits | None
    """None for a task with a training loop of its own, which reads its data itself."""
    test: SealedSplit | None
    provenance: Provenance
    verdicts: Sequence[Verdict]
    """What the checks before the first trial have found."""
    workers: WorkerPool
    """None of them works yet."""
    tracking_uri: str | None
    """Where the runs go; None leaves it to the environment."""


def prepare(request: Request, observer: Observer) -> Prepared:
    """Read the data, split it, check the task with it and find the workers. Raises UsageError if anything fails."""
    machine = request.machine
    files = machine.home.study(request.study)
    files.require_own(machine.storage)
    if not machine.is_shared:
        files.require_unlocked()
    if machine.executor == "local":
        warm_up()  # the workers' server imports torch while the data is read
    if unused := request.settings.unused_confidence:
        observer.found(f"note: {unused}.")
    dataset = read_data(request, observer)
    provenance = Provenance.of_session(request.task.objective, dataset)
    study = read_study(machine, request.study)
    if study:
        require_unchanged(study, provenance, accept_changes=machine.accepts_changes)
    splits = split(dataset, request) if dataset else None
    test = dataset.test_for(splits.spec) if dataset and splits else None
    verdicts = _checked(splits, test, request, observer, is_new=study is None) if splits and test else []
    machine.home.require_space(splits.num_bytes if splits else 0)
    session_id = uuid4().hex
    setup = Setup(
        **task_code(request.task),
        splits=files.splits(session_id) if splits else None,
        num_threads=1,
        silence_s=SILENCE_S,
        log=files.logs,
    )
    return Prepared(
        request=request,
        session_id=session_id,
        splits=splits,
        test=test,
        provenance=provenance,
        verdicts=verdicts,
        workers=start_workers(machine.executor, setup, machine.resources),
        tracking_uri=agreed_tracking_uri(machine, study),
    )


def read_data(request: Request, observer: Observer | None = None) -> Dataset | None:
    """The task's data; None for a training loop of its own."""
    if request.task.objective.train:
        return None
    if observer:
        observer.note(f"loading the data of {request.task.objective.name}")
    return load_dataset(request.task, request.machine.data_dir)


def split(dataset: Dataset, request: Request) -> Splits:
    """The data as the study divides them. Raises UsageError if the examples do not suffice."""
    settings = request.settings
    if settings.folds and dataset.is_ordered:
        raise UsageError(
            f"--folds {settings.folds} is not possible: the examples are in the order of time, and most folds would be "
            "judged by what came before; omit --folds, and the last fifth is validated on."
        )
    if settings.folds:
        check_folds(dataset.train, dataset.spec, settings.folds)
    fraction = 1 / settings.folds if settings.folds else VALIDATION_FRACTION
    splits = split_dataset(dataset, validation_fraction=fraction, seed=settings.seed, limit=settings.limit)
    if settings.folds:  # with --limit there are fewer, and only here the groups are known
        check_folds(all_examples(splits), splits.spec, settings.folds, splits.groups)
    return splits


def _checked(
    splits: Splits, test: SealedSplit, request: Request, observer: Observer, *, is_new: bool
) -> Sequence[Verdict]:
    """What the checks before the first trial find. Raises UsageError if the task does not fit its data, or the
    default configuration does not train."""
    check_task(request.task, splits)
    if is_new:
        check_comparable(request.task, splits.spec)
        check_test_split(test, splits.spec)
    subject = Subject.of(request.task, splits, "cpu")
    verdicts = quick_part(subject)
    if request.is_rehearsed(is_new=is_new):
        observer.note(f"rehearsing: one step of the default configuration and the extremes, at most {LIMIT_S:.0f} s")
        verdicts.append(_rehearsed(subject, request.machine))
    for line in in_few_lines(verdicts, request.task.reference):
        observer.found(line)
    return verdicts


def _rehearsed(subject: Subject, machine: Machine) -> Verdict:
    verdict = replace(check_rehearsal(subject, machine.trainer, machine.resources), check=REHEARSAL)
    if verdict.state == "wrong":
        raise UsageError(f"{verdict.text}: {verdict.advice}, or search anyway with --no-rehearse.")
    return verdict
