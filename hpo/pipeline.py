"""One search from beginning to end: check what was asked for, open the study, run the trials, crown the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from hpo.data.datasets import Splits, split_dataset
from hpo.deploy.finish import Winner, crown_winner, find_winner, write_summary
from hpo.errors import SearchError, SpaceError, UnknownNameError, UsageError
from hpo.execution.coordinator import Coordinator
from hpo.execution.observer import Observer
from hpo.home import check_study_name, find_data_dir, find_home, study_lock
from hpo.models.preprocessed import build_model
from hpo.objective import Dataset
from hpo.plugins import Task, load_task
from hpo.report import to_plain
from hpo.search.pruners import PRUNERS
from hpo.search.samplers import STRATEGIES
from hpo.search.storage import open_storage, read_storage
from hpo.search.study import Study, StudySettings, read_settings
from hpo.tracking.recorder import StudyRuns
from hpo.tracking.store import TrackingStore, open_store
from hpo.training.metrics import check_metric
from hpo.trial import TrialState

VALIDATION_FRACTION = 0.2
DEFAULT_TRIALS = 100
NUM_COLUMNS = 5  # parameters in MLflow's table of runs, the first in tuning priority


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """How a search ended."""

    study: str
    home: Path
    counts: Mapping[TrialState, int]
    """Trials of the study by how they ended."""
    num_trials: int
    """Complete and pruned trials that were asked for."""
    interrupted: bool
    winner: Winner | None

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON can hold it."""
        plain: dict[str, Any] = to_plain(asdict(self) | {"home": str(self.home)})
        return plain


def run_search(
    task: str,
    *,
    trials: int | None = None,
    epochs: int | None = None,
    overrides: Sequence[str] = (),
    timeout: float | None = None,
    study: str | None = None,
    strategy: str | None = None,
    pruner: str | None = None,
    seed: int | None = None,
    limit: int | None = None,
    space: str | None = None,
    device: str = "auto",
    data_dir: Path | None = None,
    home: Path | None = None,
    tracking_uri: str | None = None,
    observer: Observer | None = None,
) -> SearchOutcome:
    """Search a task's hyperparameters; the parameters are the options of `hpo search`, `timeout` is in seconds.

    A study of that name goes on: what is left out (None) stays as the study has it, what is given must agree with it.
    Raises UsageError before anything is written when something given is wrong, SearchError when trials keep failing.
    """
    observer = observer or Observer()
    home = find_home(home)
    found = load_task(task, space)
    name = check_study_name(study or found.objective.name)
    settings = _settle(
        found,
        read_settings(read_storage(home), name),
        {
            "overrides": tuple(overrides) or None,
            "planned_trials": trials,
            "max_epochs": epochs,
            "strategy": strategy,
            "pruner": pruner,
            "seed": seed,
            "limit": limit,
        },
    )
    found = found.narrow(settings.overrides)
    chosen_device = choose_device(device)

    observer.note(f"loading the data of {found.objective.name}")
    dataset = found.objective.load(find_data_dir(data_dir))
    splits = split_dataset(dataset, validation_fraction=VALIDATION_FRACTION, seed=settings.seed, limit=settings.limit)
    _check_batch_sizes(found, splits)
    _check_model(found, splits)

    observer.note("opening the MLflow store")
    store = open_store(home, tracking_uri)
    with study_lock(home, name):
        opened = Study.open(open_storage(home), name, settings)
        with _open_runs(store, opened, found) as runs:
            runs.recover()
            coordinator = Coordinator(
                study=opened,
                runs=runs,
                task=found,
                splits=splits,
                device=chosen_device,
                checkpoints=home / "checkpoints" / name,
                num_trials=trials or opened.settings.planned_trials,
                timeout_s=timeout,
                observer=observer,
            )
            winner = _run_and_crown(coordinator, opened, runs, dataset, chosen_device, observer)
        store.optimise()
    return SearchOutcome(
        study=name,
        home=home,
        counts=opened.counts(),
        num_trials=coordinator.num_trials,
        interrupted=coordinator.interrupted,
        winner=winner,
    )


def _run_and_crown(
    coordinator: Coordinator, study: Study, runs: StudyRuns, dataset: Dataset, device: str, observer: Observer
) -> Winner | None:
    """Run the trials and write the summary, whose run ends as the search does."""
    summary = runs.summary_run()
    state: Literal["complete", "failed", "interrupted"] = "interrupted"
    try:
        coordinator.run()
        observer.note("drawing the plots and testing the winner")
        if coordinator.interrupted:
            winner = find_winner(study)
        else:
            winner = crown_winner(study, runs.store, dataset.test, device)
            state = "complete"
        write_summary(study, summary, winner)
        return winner
    except SearchError:
        state = "failed"
        raise
    finally:
        summary.finish(state)
        observer.search_ended()


def _settle(task: Task, stored: StudySettings | None, given: Mapping[str, Any]) -> StudySettings:
    """What is given, else what the study was made with, else the defaults; each of it checked."""
    defaults: dict[str, Any] = {
        "overrides": (),
        "planned_trials": DEFAULT_TRIALS,
        "max_epochs": task.train_config({}).max_epochs,
        "strategy": "priority",
        "pruner": "sha",
        "seed": 0,
        "limit": None,
    }
    known = {name: getattr(stored, name) for name in defaults} if stored else defaults
    chosen = known | {name: value for name, value in given.items() if value is not None}
    for option, name in (("--trials", "planned_trials"), ("--epochs", "max_epochs"), ("--limit", "limit")):
        if chosen[name] is not None and chosen[name] < 1:
            raise UsageError(f"{option} {chosen[name]} is not allowed: it must be at least 1.")
    if chosen["seed"] < 0:
        raise UsageError(f"--seed {chosen['seed']} is not allowed: it must be at least 0.")
    for kind, names in (("strategy", STRATEGIES), ("pruner", PRUNERS)):
        if chosen[kind] not in names:
            raise UnknownNameError(kind, chosen[kind], names)
    return StudySettings(
        task=task.reference,
        space=task.narrow(chosen["overrides"]).space,
        metric=task.objective.metric,
        direction=task.objective.direction,
        **chosen,
    )


def choose_device(given: str) -> str:
    """The device as torch names it; `auto` is a GPU where there is one. Raises UnknownNameError for one that is not."""
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if given == "auto":
        return "cuda" if gpus else "cpu"
    available = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
    if given not in available:
        raise UnknownNameError("device", given, available)
    return given


def _check_batch_sizes(task: Task, splits: Splits) -> None:
    """Every batch size that may be drawn must fit, or trials would fail one by one."""
    values = task.space.parameters["batch_size"].extremes() if "batch_size" in task.space.parameters else ()
    for batch_size in values or (task.train_config({}).batch_size,):
        if int(batch_size) > len(splits.train):
            raise SpaceError(
                f"batch_size {batch_size} is larger than the {len(splits.train)} training examples; "
                "allow smaller ones only, as -p batch_size=32,64, or raise --limit."
            )


def _check_model(task: Task, splits: Splits) -> None:
    """Build the default configuration and let it see two examples, so that a mistake in a task is found at once."""
    config = task.train_config(task.space.active(task.space.defaults()))
    check_metric(config.metric, len(splits.spec.classes))
    parameters = task.model_parameters(task.space.active(task.space.defaults()))
    try:
        model = build_model(task.objective, splits.spec, parameters, seed=0).eval()
        model.fit_statistics(splits.train)
        shape = tuple(model(splits.train.inputs[:2]).shape)
    except Exception as error:  # the model is a stranger's code and may raise anything
        raise UsageError(
            f"the model of task '{task.objective.name}' fails with the default configuration: "
            f"{type(error).__name__}: {error}"
        ) from error
    wanted = (2, splits.spec.num_outputs) if splits.spec.classes else (2,)
    if shape != wanted:
        raise UsageError(
            f"the model of task '{task.objective.name}' gives outputs of shape {shape} for 2 examples, not {wanted}."
        )


def _open_runs(store: TrackingStore, study: Study, task: Task) -> StudyRuns:
    settings = study.settings
    best_first = "descending" if settings.direction == "maximize" else "ascending"
    note = (
        f"{task.objective.description}\n\nSorted by `best/{settings.metric}` ({best_first}), the best trial is on top; "
        "its curves are under *Model metrics*, its weights in the artifacts. The run *study summary* holds the plots, "
        "the search space and the winner."
    )
    return StudyRuns(
        store,
        study.name,
        metric=settings.metric,
        direction=settings.direction,
        columns=list(settings.space.parameters)[:NUM_COLUMNS],
        tags={"hpo.task": settings.task},
        note=note,
    )
