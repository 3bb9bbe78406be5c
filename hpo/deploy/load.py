"""Load a trial's best checkpoint as a module ready to predict."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.config import TrainConfig
from hpo.errors import CheckpointError, UsageError
from hpo.home import Home, find_storage
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.plugins import OBJECTIVES, load_objective, require_registered
from hpo.records import Certainty
from hpo.search.storage import read_storage
from hpo.search.study import Study
from hpo.search.winner import CERTAINTIES, TEST_READINGS, find_winner, no_winner_yet, reading_of
from hpo.sources import changed_sources, source_checksums
from hpo.tracking.store import home_store_uri, open_store
from hpo.training.checkpoint import load_weights
from hpo.training.trained import BEST_WEIGHTS, CHECKPOINT, REFIT, TrialDescription
from hpo.trial import TrainedTrial, loop_seed

if TYPE_CHECKING:
    from hpo.objective import Objective
    from hpo.tracking.store import TrackingStore

_logger = logging.getLogger(__name__)


def load_best(
    study: str,
    *,
    home: Path | None = None,
    tracking_uri: str | None = None,
    storage: str | None = None,
    task: str | Objective | None = None,
    device: str = "cpu",
    trial: int | None = None,
) -> Any:
    """Return the best model of a study, or of another `trial` whose weights were kept, in eval mode on `device`.

    With a confirmation that is the best training of the confirmed configuration, and after a refit the refitted model.

    It is a `PreprocessedModel`; or, if the task has a training loop of its own, what that gave to `trial.save_model`:
    the state dict of a module, or the dictionary itself.

    A `PreprocessedModel` contains its preprocessing: it takes raw inputs, such as (N, 3, 32, 32) uint8 images, and
    returns logits (N, classes), or values in the target's units. `.classes` names the classes. Only tensors are
    unpickled (weights_only), after their SHA-256 has been checked. The task's code must be importable; if it has moved
    since the search, `task` names it as on the command line, or is the `Objective` itself. `storage` is the URL of a
    shared database; without `task`, the study's task must then be a registered one.

    Raises UnknownNameError for an unknown study, UsageError while no trial has finished, for a cross-validated trial
    that is not the winner and for a training loop that saved no model, CheckpointError for damage.
    """
    home = Home.find(home).path
    storage = find_storage(storage)
    opened = Study.load(read_storage(home, storage), study)
    if storage is not None and task is None:
        require_registered(OBJECTIVES, opened.task_reference)
    number, is_refit = choose_trial(opened, trial)
    store = open_store(home, find_runs(opened, home, tracking_uri, is_shared=storage is not None))
    folder = download_trial(store, opened, number, is_refit=is_refit)
    if TrialDescription.read(folder).spec is None:
        return saved_model(folder, device)
    model = load_from_folder(folder, opened, number, device, task).model
    known = (opened.recorded(CERTAINTIES) or {}).get(reading_of(number, is_refit=is_refit))
    model.certainty = known and Certainty.from_dict(known)
    return model


def choose_trial(study: Study, trial: int | None) -> tuple[int, bool]:
    """The number of the trial whose model is wanted, and whether it is the model that was trained on all examples.

    It is the winner's unless another trial is named. Raises UsageError if there is none.
    """
    winner = find_winner(study)
    if winner is None:
        raise no_winner_yet(study.name)
    number = winner.trial if trial is None else study.trial(trial).number
    if study.settings.folds and str(number) not in (study.recorded(TEST_READINGS) or {}):
        raise UsageError(
            f"trial {number} of study '{study.name}' has no model of its own: with --folds only the winner gets one, "
            "trained on all examples when the search has all its trials."
        )
    return number, winner.is_refit and trial is None


def load_run(
    run_id: str,
    *,
    task: str | Objective,
    home: Path | None = None,
    tracking_uri: str | None = None,
    device: str = "cpu",
) -> Any:
    """Return the best model of a run of `hpo train` or `hpo rerun`, as `load_best` does of a study.

    `task` is what was trained, as on the command line: no store may say what code is imported. Raises StoreError for an
    unknown run and one without a model, CheckpointError for damage.
    """
    store = open_store(Home.find(home).path, tracking_uri)
    folder = store.download(run_id, CHECKPOINT)
    if TrialDescription.read(folder).spec is None:
        return saved_model(folder, device)
    objective = load_objective(task) if isinstance(task, str) else task
    return _rebuild(folder, objective, f"run {run_id}", device).model


def find_runs(study: Study, home: Path, given: str | None, *, is_shared: bool) -> str | None:
    """URI of the MLflow store that has the runs of a study; None leaves it to the environment.

    A shared database does not say: whoever can write to it must not choose who gets the password of an MLflow account.
    """
    return given if is_shared else given or study.tracking_uri or home_store_uri(home)


def _load_objective(task: str | Objective | None, study: Study) -> Objective:
    if task is not None:
        return load_objective(task) if isinstance(task, str) else task
    try:
        return load_objective(study.task_reference)
    except UsageError as error:
        raise UsageError(f"{error} If the task has moved since the search, pass its new location as task=.") from error


@dataclass(frozen=True)
class LoadedTrial:
    """A trial's best model and the settings that it was trained with."""

    model: PreprocessedModel
    config: TrainConfig


def load_trial(
    store: TrackingStore,
    study: Study,
    number: int,
    device: str,
    task: str | Objective | None = None,
    *,
    is_refit: bool = False,
) -> LoadedTrial:
    """The best checkpoint of one trial, rebuilt from what its MLflow run holds; or what it became when it was refit.

    Which task's code is imported is decided by the study, not by the run, which may come from a server of many people.
    """
    return load_from_folder(download_trial(store, study, number, is_refit=is_refit), study, number, device, task)


def load_trained_trial(store: TrackingStore, study: Study, number: int, device: str) -> TrainedTrial:
    """What a trial of a task's own training loop has left in its MLflow run."""
    folder = download_trial(store, study, number)
    description = TrialDescription.read(folder)
    has_model = description.weights_sha256 is not None
    return TrainedTrial(
        number=number,
        parameters=description.model_parameters,
        seed=loop_seed(description.config.seed),
        device=device,
        best_epoch=description.best_epoch,
        best_value=description.best_value,
        model=saved_model(folder) if has_model else None,
        folder=folder,
    )


def download_trial(store: TrackingStore, study: Study, number: int, *, is_refit: bool = False) -> Path:
    """The folder with a trial's best weights and their description."""
    return store.download(store.find_trial_run(study.name, number, study.id), REFIT if is_refit else CHECKPOINT)


def saved_model(folder: Path, device: str = "cpu") -> dict[str, Any]:
    """What a training loop of the task's own has saved. Raises UsageError if that is nothing."""
    sha256 = TrialDescription.read(folder).weights_sha256
    if sha256 is None:
        raise UsageError("its training loop saved no model: it did not call trial.save_model(model) before a report.")
    return load_weights(folder / BEST_WEIGHTS, sha256, device)


def load_from_folder(
    folder: Path, study: Study, number: int, device: str, task: str | Objective | None = None
) -> LoadedTrial:
    """The best checkpoint of one trial, rebuilt from what a folder holds."""
    return _rebuild(folder, _load_objective(task, study), f"trial {number} of study '{study.name}'", device)


def _rebuild(folder: Path, objective: Objective, what: str, device: str) -> LoadedTrial:
    description = TrialDescription.read(folder)
    if description.spec is None or description.weights_sha256 is None:
        raise CheckpointError(f"{folder} has no model of the shared trainer; restore what was there.")
    model = build_model(objective, description.spec, description.model_parameters, seed=0, pretrained=False)
    changed = changed_sources(description.sources, source_checksums(objective)) if description.sources else []
    if changed:
        _logger.warning(
            "%s was trained with another version of %s; its predictions may differ.",
            what,
            ", ".join(changed),
        )
    weights = load_weights(folder / BEST_WEIGHTS, description.weights_sha256)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the weights of {what} do not fit the model that its task builds now "
            f"({reason[:300]}); restore the source that it was trained with"
            + (f": {', '.join(changed)} changed since." if changed else ".")
        ) from error
    return LoadedTrial(model.eval().to(device), replace(description.config, device=device))
