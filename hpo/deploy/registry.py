"""MLflow's model registry: a model that MLflow has logged, its versions, and the champion among them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from hpo.database import without_password
from hpo.deploy.results import Registration
from hpo.errors import UsageError
from hpo.tracking.store import explained

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion

    from hpo.config import Direction
    from hpo.tracking.store import TrackingStore

CHAMPION = "champion"
"""Alias of the version that is in use: `models:/NAME@champion`."""

Promotion = Literal["always", "if-better", "never"]

_SCORE, _PROTOCOL = "hpo.score", "hpo.protocol"
_MAX_DESCRIPTION = 5000  # characters that the registry's table holds


@dataclass(frozen=True, kw_only=True)
class Score:
    """A test score, and how it was measured: two with the same protocol can be compared."""

    value: float
    protocol: str
    """The metric, and the checksum of the data with the size of its test split."""


def check_promotion(given: str) -> Promotion:
    """Raise UsageError for what `--promote` does not know."""
    for known in get_args(Promotion):
        if given == known:
            return known  # type: ignore[no-any-return]
    raise UsageError(f"--promote {given} is not allowed: use one of {', '.join(get_args(Promotion))}.")


def check_name(name: str) -> None:
    """Raise UsageError for a name that MLflow takes for no model, or cannot look for."""
    if not name.strip() or set(name) & set("/:'\""):
        raise UsageError(
            f"--name '{name}' is not allowed: a registered model has a name without slashes, colons and quotes."
        )


def log_model(store: TrackingStore, run_id: str, folder: Path, *, tags: Mapping[str, str]) -> str:
    """Log the folder of an MLflow model as a model of a run; its id."""
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus
    from mlflow.models import Model

    client = store.client
    with explained(store.uri):
        run = client.get_run(run_id)
        logged = client.create_logged_model(
            run.info.experiment_id, "model", run_id, tags=dict(tags), params=dict(run.data.params), model_type="pt2"
        )
        try:
            described = Model.load(str(folder))
            described.model_id, described.run_id = logged.model_id, run_id
            described.save(str(folder / "MLmodel"))
            client.log_model_artifacts(logged.model_id, str(folder))
            client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step=0)])
        except BaseException:
            client.finalize_logged_model(logged.model_id, LoggedModelStatus.FAILED)
            raise
        client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    return str(logged.model_id)


def find_version(store: TrackingStore, name: str, run_id: str, tags: Mapping[str, str]) -> ModelVersion | None:
    """The latest version of a registered model that is of this run and has these tags; None if there is none."""
    with explained(store.uri):
        of_run = store.client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    same = [version for version in of_run if tags.items() <= version.tags.items()]
    return max(same, key=lambda version: int(version.version), default=None)


def add_version(
    store: TrackingStore, name: str, model_id: str, run_id: str, *, card: str, tags: Mapping[str, str]
) -> ModelVersion:
    """Make a logged model a version of a registered one, which is created where it is new."""
    client = store.client
    with explained(store.uri):
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description="The winners of hpo's searches of this task.")
        with _as_default(store):
            return client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id,
                tags=dict(tags),
                description=card[:_MAX_DESCRIPTION],
                model_id=model_id,
            )


def enter(
    store: TrackingStore, version: ModelVersion, *, score: Score | None, direction: Direction, promote: Promotion
) -> Registration:
    """Note a version's test score, and make it the champion where it is to be."""
    client, name = store.client, version.name
    with explained(store.uri):
        if score:
            client.set_model_version_tag(name, version.version, _SCORE, repr(score.value))
            client.set_model_version_tag(name, version.version, _PROTOCOL, score.protocol)
        becomes, reason = _decide(promote, score, _champion(store, name), version, direction)
        if becomes:
            client.set_registered_model_alias(name, CHAMPION, version.version)
    return Registration(
        name=name,
        version=int(version.version),
        model_id=str(version.source).removeprefix("models:/"),
        tracking_uri=without_password(store.uri),
        is_champion=becomes,
        reason=reason,
    )


@contextmanager
def _as_default(store: TrackingStore) -> Iterator[None]:
    """MLflow's registry looks for logged models in the default store, whatever client asks (3.17.2)."""
    import mlflow

    is_set = mlflow.is_tracking_uri_set()  # type: ignore[no-untyped-call]
    before = mlflow.get_tracking_uri() if is_set else None
    mlflow.set_tracking_uri(store.uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # type: ignore[arg-type]


def _champion(store: TrackingStore, name: str) -> ModelVersion | None:
    model = store.client.get_registered_model(name)
    number = model.aliases.get(CHAMPION)
    return None if number is None else store.client.get_model_version(name, str(number))


def _decide(
    promote: Promotion,
    score: Score | None,
    champion: ModelVersion | None,
    version: ModelVersion,
    direction: Direction,
) -> tuple[bool, str]:
    """Whether a version is the champion from now on, and why."""
    if champion is not None and champion.version == version.version:
        return True, "it was the champion already"
    if promote == "never":
        return False, "--promote never"
    if promote == "always":
        return True, "--promote always"
    if champion is None:
        return True, "there was no champion"
    if score is None:
        return False, "it has no test score"
    theirs = champion.tags.get(_SCORE)
    if theirs is None or champion.tags.get(_PROTOCOL) != score.protocol:
        return False, f"version {champion.version}, the champion, was tested in another way; --promote always decides"
    gain = direction.gain(score.value, over=float(theirs))
    compared = f"test score {score.value:.4f}, the champion (version {champion.version}) has {float(theirs):.4f}"
    return gain > 0, compared
