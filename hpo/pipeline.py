"""One search from beginning to end: check what was asked for, open the study, run the trials, crown the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpo.data.datasets import split_dataset
from hpo.deploy.finish import Winner, crown_winner, find_winner, write_summary
from hpo.errors import SearchError, StoreError, StudyMismatchError, UnknownNameError, UsageError
from hpo.execution.coordinator import Coordinator
from hpo.execution.observer import Observer
from hpo.home import check_study_name, find_data_dir, find_home, study_lock
from hpo.objective import Dataset
from hpo.plugins import Task, load_task
from hpo.preflight import check_task, choose_device, load_dataset
from hpo.report import to_plain
from hpo.search.pruners import PRUNERS
from hpo.search.samplers import STRATEGIES
from hpo.search.storage import open_storage, read_storage
from hpo.search.study import Study, StudySettings, read_settings
from hpo.tracking.recorder import StudyRuns
from hpo.tracking.store import TrackingStore, home_store_uri, open_store
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
    is_done: bool
    """Whether all of them have run; only then is the winner tested."""
    interrupted: bool
    """Whether someone stopped the search."""
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
    name = check_study_name(found.objective.name if study is None else study)
    earlier = _earlier_study(home, name)
    if earlier and earlier.settings.space_reference and space is None:
        found = load_task(task, earlier.settings.space_reference)
    settings = _settle(
        found,
        earlier.settings if earlier else None,
        {
            "space_reference": space,
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
    dataset = load_dataset(found, find_data_dir(data_dir))
    splits = split_dataset(dataset, validation_fraction=VALIDATION_FRACTION, seed=settings.seed, limit=settings.limit)
    check_task(found, splits)

    observer.note("opening the MLflow store")
    store = open_store(home, _agreed_tracking_uri(earlier, home, tracking_uri))
    with study_lock(home, name):
        opened = Study.open(open_storage(home), name, settings)
        opened.remember_session(
            num_trials=trials or opened.num_trials,
            task_reference=found.reference,
            tracking_uri=None if store.is_in_home else store.uri,
        )
        with _open_runs(store, opened, found) as runs:
            runs.recover()
            coordinator = Coordinator(
                study=opened,
                runs=runs,
                task=found,
                splits=splits,
                device=chosen_device,
                checkpoints=home / "checkpoints" / name,
                num_trials=opened.num_trials,
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
        is_done=coordinator.is_done,
        interrupted=coordinator.interrupted,
        winner=winner,
    )


def _earlier_study(home: Path, name: str) -> Study | None:
    storage = read_storage(home)
    return Study.load(storage, name) if read_settings(storage, name) else None


def _agreed_tracking_uri(earlier: Study | None, home: Path, given: str | None) -> str | None:
    """Where the study's runs go: where they went so far, so that they stay together."""
    if earlier is None:
        return given
    # Not None for the home's own store: MLFLOW_TRACKING_URI would then lead elsewhere.
    so_far = earlier.tracking_uri or home_store_uri(home)
    if given not in (None, so_far):
        raise StudyMismatchError(
            f"the runs of study '{earlier.name}' are in {so_far}, not in {given}; "
            "leave --tracking-uri away, or use another name with --study."
        )
    return so_far


def _run_and_crown(
    coordinator: Coordinator, study: Study, runs: StudyRuns, dataset: Dataset, device: str, observer: Observer
) -> Winner | None:
    """Run the trials and write the summary, whose run ends as the search does."""
    summary = runs.summary_run()
    try:
        coordinator.run()
        observer.note("drawing the plots" + (" and testing the winner" if coordinator.is_done else ""))
        runs.flush()
        coordinator.remove_old_checkpoints()
        winner = crown_winner(study, runs.store, dataset.test, device) if coordinator.is_done else find_winner(study)
        write_summary(study, summary, winner)
        summary.finish("complete" if coordinator.is_done else "interrupted")
        return winner
    except StoreError as error:
        raise SearchError(f"{error} The trials are kept: the same command again finishes the study.") from error
    except BaseException as error:
        with suppress(StoreError):  # it must not hide why we are here
            summary.finish("failed" if isinstance(error, Exception) else "interrupted")
        raise
    finally:
        observer.search_ended()


def _settle(task: Task, stored: StudySettings | None, given: Mapping[str, Any]) -> StudySettings:
    """What is given, else what the study was made with, else the defaults; each of it checked."""
    defaults: dict[str, Any] = {
        "space_reference": None,
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
        task=task.objective.name,
        space=task.narrow(chosen["overrides"]).space,
        metric=task.objective.metric,
        direction=task.objective.direction,
        **chosen,
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
