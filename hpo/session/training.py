"""`hpo train`: one training of a task, logged as a run of its own, without a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.checks.compatibility import check_task
from hpo.config import derive_seed
from hpo.data.datasets import split_dataset
from hpo.data_options import Given
from hpo.errors import UsageError
from hpo.execution.messages import Assignment, Setup
from hpo.execution.task_code import task_code
from hpo.files import temporary_folder
from hpo.home import check_study_name
from hpo.machine import num_cores
from hpo.plugins import load_task
from hpo.provenance import Provenance
from hpo.records import Training
from hpo.session.alone import ended, log_model, run_alone
from hpo.session.options import checked
from hpo.session.preparation import SILENCE_S
from hpo.session.request import check_options_of_loop, require_started_once, this_machine
from hpo.task import load_dataset
from hpo.tracking.runs import begin_run
from hpo.tracking.store import open_store
from hpo.training.device import ranks_of_trial

if TYPE_CHECKING:
    from hpo.space import Space
    from hpo.training.trainer import EpochResult


def train_once(
    task: str,
    *,
    overrides: Sequence[str] = (),
    fixed: Sequence[str] = (),
    epochs: int | None = None,
    seed: int | None = None,
    limit: int | None = None,
    data_options: Given = (),
    space: str | None = None,
    metric: str | None = None,
    tell: Callable[[EpochResult], None] = lambda result: None,
    **machine_options: Any,
) -> Training:
    """Train one configuration of a task: its default one, except for `overrides` such as `lr=0.1`.

    The parameters are the options of `hpo train`, and `tell` hears of each epoch. It trains as trial 0 of a study with
    this seed would. Raises UsageError if something given is wrong, before anything is written, and SearchError where
    the training fails.
    """
    require_started_once()
    lists = {"overrides": overrides, "fixed": fixed, "data_options": data_options}
    asked: Mapping[str, Any] = checked({**machine_options, **lists, "epochs": epochs, "seed": seed, "limit": limit})
    overrides, fixed, data_options = (asked[name] for name in lists)
    machine = this_machine(asked)
    found = load_task(task, space)
    of_trainer = {"fixed": fixed, "limit": limit, "metric": metric, "data_options": data_options}
    check_options_of_loop(found.objective, {**machine_options, **of_trainer})
    if not found.objective.train:
        found = found.with_data_options(data_options).suited_to_data(machine.data_dir)
    found = found.narrow(tuple(overrides)).fix(fixed).judged_by(metric or found.objective.metric)
    _require_one_value_each(found.space, overrides)
    name, seed = check_study_name(found.objective.name), seed or 0
    configuration = found.space.active(found.space.defaults())
    settings = {"max_epochs": epochs} if epochs is not None else {}
    config = found.train_config(
        configuration, **settings, seed=derive_seed(seed, 0), device=machine.device, **machine.trainer
    )
    dataset = None if found.objective.train else load_dataset(found, machine.data_dir)
    splits = None
    if dataset:
        splits = split_dataset(dataset, seed=seed, limit=limit)
        check_task(found, splits)
    provenance = Provenance.of_session(found.objective, dataset)
    store = open_store(machine.home.path, machine.tracking_uri)
    tags = {**provenance.tags(), "hpo.task": name, "hpo.seed": str(seed)}
    run = begin_run(store, name, "training", found.objective.description, tags=tags, params=configuration)
    num_ranks = ranks_of_trial(machine.resources.gpus_per_trial)
    setup = Setup(
        **task_code(found),
        splits=None,
        num_threads=max(1, num_cores() // num_ranks),
        num_ranks=num_ranks,
        silence_s=SILENCE_S,
        log=machine.home.study(name).logs,
    )
    results: list[EpochResult] = []

    def report(result: EpochResult) -> bool:
        results.append(result)
        run.log_epoch(result.epoch, result.metrics)
        tell(result)
        return not result.diverged

    with ended(run), temporary_folder() as folder:
        parameters = found.model_parameters(configuration)
        assignment = Assignment(number=0, model_parameters=parameters, config=config, folder=Path(folder))
        done = run_alone(assignment, setup, splits, report)
        last = results[-1]
        if last.best_value is not None:
            run.log_metrics({f"best/{found.objective.metric}": last.best_value})
            log_model(run, assignment.folder, has_weights=done.has_weights)
    return Training(
        task=found.reference,
        configuration=configuration,
        metric=found.objective.metric,
        seed=seed,
        curve={result.epoch: result.value for result in results},
        best_epoch=last.best_epoch,
        best_value=last.best_value,
        diverged=last.diverged,
        has_model=last.best_value is not None and done.has_weights,
        run_id=run.run_id,
        home=machine.home.path,
    )


def _require_one_value_each(space: Space, overrides: Sequence[str]) -> None:
    for override in overrides:
        name = override.partition("=")[0].strip()
        if name in space.parameters and not space.parameters[name].is_fixed:
            raise UsageError(f"-p {override} is more than one value; a training has one: give -p {name}=VALUE.")
