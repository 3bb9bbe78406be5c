"""`hpo register`: the winner of a study as a model of its run, and as a version in MLflow's model registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.deploy.exporters import find_exporter
from hpo.deploy.registry import Score, add_version, check_name, check_promotion, enter, find_version, log_model
from hpo.errors import ExportError
from hpo.files import temporary_folder
from hpo.provenance import sessions
from hpo.session.export import check_export, choose, describe, load_with_data, write
from hpo.training.trained import TrialDescription

if TYPE_CHECKING:
    from hpo.deploy.exporters import Exporter
    from hpo.deploy.results import Registration
    from hpo.objective import Objective
    from hpo.session.export import Chosen


def register_best(
    study: str,
    *,
    promote: str = "if-better",
    name: str | None = None,
    trial: int | None = None,
    task: str | Objective | None = None,
    tell: Callable[[str], None] = lambda text: None,
    **machine_options: Any,
) -> Registration:
    """Log the best model of a study, or of another `trial`, in MLflow, and register it as `hpo-TASK` or as `name`.

    It is the export of format mlflow, checked as `export_best` does, so `models:/hpo-TASK@champion` is loaded without
    hpo. What was registered before stays the version that it is. With `promote="if-better"` the version gets the alias
    `champion` if there is none, or if its test score is better than the champion's and both were tested by the same
    metric on the same data; `always` and `never` do not ask. The other parameters are the options of `hpo register`.

    Raises UsageError if something given is wrong, ExportError for a model that cannot be exported, StoreError if
    MLflow refuses.
    """
    how, exporter = check_promotion(promote), find_exporter("mlflow")
    if name is not None:
        check_name(name)
    chosen = choose(study, trial=trial, task=task, **machine_options)
    if chosen.objective.train:
        raise ExportError(
            f"task '{chosen.objective.name}' has a training loop of its own (train=), which saved a state dict and no "
            "network; register it with MLflow's own functions."
        )
    run_id = chosen.store.find_trial_run(study, chosen.trial, chosen.study.id)
    registered_as = name or f"hpo-{chosen.objective.name}"
    tags = {
        "hpo.study": study,
        "hpo.trial": str(chosen.trial),
        "hpo.task": chosen.objective.name,
        "hpo.refit": str(chosen.is_refit).lower(),
        "hpo.weights": str(TrialDescription.read(chosen.folder).weights_sha256),  # a trial may train on
    }
    with chosen.request.machine.home.study(study).registering():
        version = find_version(chosen.store, registered_as, run_id, tags)
        if version is None:
            card = chosen.card()
            model_id = _log(chosen, exporter, run_id, card=card, tags=tags, tell=tell)
            version = add_version(chosen.store, registered_as, model_id, run_id, card=card, tags=tags)
        else:
            tell(f"version {version.version} is this model")
    direction = chosen.study.settings.direction
    return enter(chosen.store, version, score=_score(chosen), direction=direction, promote=how)


def _log(
    chosen: Chosen,
    exporter: Exporter,
    run_id: str,
    *,
    card: str,
    tags: Mapping[str, str],
    tell: Callable[[str], None],
) -> str:
    """Write the model, check it, and log it in MLflow as a model of its run; its id."""
    tell("reading the data")
    _, _, exportable = load_with_data(chosen)
    with temporary_folder() as workshop:
        folder = Path(workshop) / "model"
        folder.mkdir()
        tell("writing and checking the model")
        write(exporter, exportable, folder, describe(chosen, exportable, exporter.runtime, None), card)
        check_export(exporter, folder, exportable, chosen.objective, None)
        return log_model(chosen.store, run_id, folder, tags=tags)


def _score(chosen: Chosen) -> Score | None:
    """The winner's test score; None for what was not tested."""
    winner, metric = chosen.winner, chosen.study.settings.metric
    if winner is None or not winner.test or metric not in winner.test:
        return None
    found = sessions(chosen.study)
    data = found[-1].data if found else ""
    return Score(value=winner.test[metric], protocol=f"{metric} on the test split of {data}")
