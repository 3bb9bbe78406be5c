"""`hpo rerun`: a trial of a study once more, compared with what it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.config import derive_seed
from hpo.deploy.load import load_from_folder, load_trial
from hpo.errors import CheckpointError, StoreError, UsageError
from hpo.execution.messages import Assignment, Setup
from hpo.execution.task_code import task_code
from hpo.files import temporary_folder
from hpo.machine import num_cores
from hpo.provenance import Provenance, sessions
from hpo.records import ELIGIBLE, Rerun, mean_of_finite
from hpo.session.alone import ended, log_model, run_alone
from hpo.session.options import checked
from hpo.session.preparation import SILENCE_S, read_data, split
from hpo.session.request import agreed_tracking_uri, request_of_study, require_started_once, this_machine
from hpo.tracking.runs import begin_run
from hpo.tracking.store import open_store
from hpo.training.comparison import Difference, compare_folds, compare_models
from hpo.training.device import visible_gpus
from hpo.training.losses import target_scale

if TYPE_CHECKING:
    from hpo.data.datasets import Splits
    from hpo.records import TrialRecord
    from hpo.search.study import Study
    from hpo.session.request import Machine
    from hpo.tracking.store import TrackingStore
    from hpo.training.trainer import EpochResult


def rerun_trial(
    study: str,
    *,
    trial: int,
    seed: int | None = None,
    tell: Callable[[EpochResult], None] = lambda result: None,
    **machine_options: Any,
) -> Rerun:
    """Run a trial again, with its own seed or another one, and compare it with what it was.

    The parameters are the options of `hpo rerun`. The split is that of the study whatever the seed, and the training
    goes as far as the trial came. Nothing of the study changes. Raises UsageError if something given is wrong, and
    SearchError if the training fails.
    """
    require_started_once()
    machine = this_machine(checked({**machine_options, "study": study}))
    request, opened = request_of_study(machine, study)
    record = _find_trial(opened, trial)
    dataset = read_data(request)
    splits = split(dataset, request) if dataset else None
    store = open_store(machine.home.path, agreed_tracking_uri(machine, opened))
    objective, settings = request.task.objective, opened.settings
    changes = _changes(Provenance.of_session(objective, dataset), opened, trial)
    values = settings.space.active(record.values)
    settled = _settled(store, opened, trial)
    config = request.task.train_config(
        values,
        max_epochs=settings.max_epochs,
        seed=opened.trial_seed(trial) if seed is None else derive_seed(seed, trial),
        device=machine.device,
        **{name: settled[name] for name in ("precision", "compile") if name in settled and not objective.train},
        **machine.trainer,
    )
    num_ranks = processes = int(settled.get("processes", 1))
    if processes > len(visible_gpus(machine.device)):
        num_ranks = 1
    if num_ranks < processes:
        changes.append(f"the GPUs of the trial ({processes} -> 1)")
    setup = Setup(
        **task_code(request.task),
        splits=None,
        num_threads=int(settled.get("threads", num_cores())),
        num_ranks=num_ranks,
        silence_s=SILENCE_S,
        log=machine.home.study(study).logs,
    )
    tags = {"hpo.trial_again": str(trial), "hpo.seed": str(settings.seed if seed is None else seed)}
    run = begin_run(store, study, "rerun", objective.description, tags=tags, params=values)
    last_step = max(record.curve)
    curve: dict[int, float] = {}
    results: list[EpochResult] = []

    def report(result: EpochResult) -> bool:
        results.append(result)
        run.log_epoch(result.epoch, result.metrics)
        tell(result)
        if result.fold is None:
            curve[result.epoch] = result.value
        elif result.is_last:
            curve[result.fold] = math.nan if result.fold_value is None else result.fold_value
        return not result.diverged and max(curve, default=0) < last_step

    with ended(run), temporary_folder() as folder:
        assignment = Assignment(
            number=trial,
            model_parameters=request.task.model_parameters(values),
            config=config,
            folder=Path(folder),
            folds=settings.folds,
        )
        done = run_alone(assignment, setup, splits, report)
        value = results[-1].best_value
        if value is not None and not settings.folds:
            run.log_metrics({f"best/{settings.metric}": value})
            log_model(run, assignment.folder, has_weights=done.has_weights)
        # Of a pruned trial with folds the study has an estimate for all of them.
        is_part = settings.folds and record.state == "pruned"
        earlier_value = mean_of_finite(record.curve.values()) if is_part else record.value
        first = _first_difference(record.curve, curve)
        interval = None
        if first is not None and value is not None and earlier_value is not None:
            interval = _interval(record, curve, splits, opened, store, assignment.folder, machine)
    return Rerun(
        study=study,
        trial=trial,
        metric=settings.metric,
        seed=settings.seed if seed is None else seed,
        is_same_seed=seed in (None, settings.seed),
        value=value,
        earlier_value=earlier_value,
        first_difference=first,
        difference=None if value is None or earlier_value is None else value - earlier_value,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        changes=changes,
        run_id=run.run_id,
        home=machine.home.path,
    )


def _find_trial(study: Study, number: int) -> TrialRecord:
    record = study.trial(number)
    if record.state not in (*ELIGIBLE, "diverged") or not record.curve:
        raise UsageError(f"trial {number} of study '{study.name}' is {record.state}: there is nothing to compare with.")
    return record


def _settled(store: TrackingStore, study: Study, number: int) -> Mapping[str, str]:
    """What the trial had settled on: precision, compile, threads, processes; empty where its run is gone."""
    try:
        tags = store.tags(store.find_trial_run(study.name, number, study.id))
    except StoreError:
        return {}
    names = ("precision", "compile", "threads", "processes")
    return {name: tags[f"hpo.{name}"] for name in names if f"hpo.{name}" in tags}


def _changes(now: Provenance, study: Study, number: int) -> list[str]:
    """What has changed since the session that ran the trial."""
    earlier = [session for session in sessions(study) if session.first_trial <= number]
    if not earlier:
        return []
    then = earlier[-1]
    versions = [
        f"{name} {then.versions.get(name, 'unknown')} -> {version}"
        for name, version in now.versions.items()
        if then.versions.get(name) != version
    ]
    machine = [] if then.machine == now.machine else [f"the machine ({then.machine} -> {now.machine})"]
    return [*now.changes_since(then), *versions, *machine]


def _first_difference(before: Mapping[int, float], now: Mapping[int, float]) -> int | None:
    """The first step whose values differ in any bit; two that are not finite are equal."""

    def differing() -> Iterator[int]:
        for step in sorted(before.keys() | now.keys()):
            values = before.get(step), now.get(step)
            if values[0] != values[1] and not all(value is not None and math.isnan(value) for value in values):
                yield step

    return next(differing(), None)


def _interval(
    record: TrialRecord,
    curve: Mapping[int, float],
    splits: Splits | None,
    study: Study,
    store: TrackingStore,
    folder: Path,
    machine: Machine,
) -> Difference | None:
    """The difference with its 95% interval; None where there is nothing to take it from."""
    if study.settings.folds:
        return compare_folds(curve, record.curve, num_folds=study.settings.folds)
    if splits is None:
        return None
    try:
        earlier = load_trial(store, study, record.number, machine.device)
    except (CheckpointError, StoreError):  # the weights of weak trials are not kept
        return None
    now = load_from_folder(folder, study, record.number, machine.device)
    return compare_models(
        (now.model, now.config),
        (earlier.model, earlier.config),
        splits.validation,
        spec=splits.spec,
        target_scale=target_scale(splits.train, splits.spec),
        seed=derive_seed(study.settings.seed, "comparison"),
    )
