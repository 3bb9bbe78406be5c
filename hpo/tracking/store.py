"""The MLflow store of a home: where it is, opened once, and refused with a reason where it cannot be used."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from hpo.database import prepare_sqlite, reason_and_advice, without_password
from hpo.errors import OF_A_FULL_DISK, StoreError, UnknownNameError, disk_refusal, first_line
from hpo.home import Home
from hpo.tracking.view import TRIALS_VIEW, view_address

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run
    from mlflow.store.artifact.artifact_repo import ArtifactRepository

_logger = logging.getLogger(__name__)
_SCHEMES = ("http", "https", "databricks", "sqlite", "postgresql", "mysql", "mssql")
_LOCK_TIMEOUT_S = 120.0  # creating the schema takes 3 s on a quiet machine
_CONNECT_TIMEOUT_S = 5.0
_creating = threading.Lock()
"""Held while a schema is made: alembic, which MLflow makes it by, knows one database a process."""

STUDY_ID_TAG = "hpo.study_id"
TRIAL_TAG = "hpo.trial"
ORPHANED_TAG = "hpo.orphaned"
"""On a run whose study is gone: its database was lost, and another study has its name."""

# Telemetry stays off and MLflow's progress bars, links and INFO lines off the user's terminal. Five retries, its own
# default, block for a minute when a server is down; the sender retries by itself.
_MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",  # it would put the lock file of the current folder into each model
    "GIT_PYTHON_REFRESH": "quiet",
}


def open_store(home: Path, tracking_uri: str | None = None) -> TrackingStore:
    """The store at `tracking_uri`, else at MLFLOW_TRACKING_URI, else in `home`/mlflow.db.

    A database is created where there is none; any number of processes may do so at once. Raises StoreError if the
    home cannot be written, the database is damaged or from another MLflow, or the server does not answer.
    """
    home = home.absolute()
    if odd := re.search(r"\?|%[0-9A-Fa-f]{2}", str(home)):  # SQLAlchemy takes %20 for a blank, and MLflow as it is
        raise StoreError(
            f"the path {home} contains '{odd[0]}', which a database URL cannot; choose another with --home."
        )
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or home_store_uri(home)
    _require_known_scheme(uri)
    prepare_mlflow()
    _require_readable_variables()
    database = _sqlite_path(uri)
    if _is_server(uri):
        _require_answer(uri)
    if database:
        Home(home).create()
        return TrackingStore(
            home=home, uri=uri, client=_open_sqlite(database, uri, is_in_home=uri == home_store_uri(home))
        )
    client = _connect(uri)  # before the home is made: a wrong address leaves nothing behind
    Home(home).create()
    return TrackingStore(home=home, uri=uri, client=client)


@dataclass(frozen=True)
class TrackingStore:
    """An open MLflow store, and the home whose studies it records."""

    home: Path
    uri: str
    client: MlflowClient

    @property
    def is_in_home(self) -> bool:
        """Whether it is the home's own store, not one that was named."""
        return self.uri == home_store_uri(self.home)

    @property
    def is_server(self) -> bool:
        """Whether the store is an MLflow server, not a database that this process opens itself."""
        return _is_server(self.uri)

    def open_experiment(self, study: str, tags: Mapping[str, str]) -> str:
        """The id of a study's experiment, `hpo/<study>`, which is created on first use; sets `tags` on it.

        One that was deleted in MLflow's UI is restored with its runs, which a warning says.
        """
        experiment = self._restored(study) or self._find_experiment(study)
        experiment_id = experiment.experiment_id if experiment else self._create_experiment(study)
        with explained(self.uri):
            for key, value in tags.items():
                _set_raced(partial(self.client.set_experiment_tag, experiment_id, key, value))
        return experiment_id

    def find_trial_run(self, study: str, number: int, study_id: str | None = None) -> str:
        """The run id of a trial of the study with that id. Raises StoreError if MLflow has no such run."""
        run_id = self.trial_run(study, number, study_id)
        if run_id is None:
            raise StoreError(
                f"MLflow at {without_password(self.uri)} has no run of trial {number} in study '{study}': "
                "it was deleted, or is in another store (--tracking-uri)."
            )
        return run_id

    def trial_run(self, study: str, number: int, study_id: str | None = None) -> str | None:
        """The same, and None if MLflow has no such run."""
        experiment = self._find_experiment(study)
        with explained(self.uri):
            of_trial = f"tags.`{TRIAL_TAG}` = '{number}'"
            runs = search_runs(self.client, experiment.experiment_id, of_trial, study_id) if experiment else []
        return str(runs[0].info.run_id) if runs else None

    def download(self, run_id: str, artifact_path: str) -> Path:
        """A local path of one of a run's files or folders: the file itself where the artifacts are local.

        Raises StoreError if the run has no such file.
        """
        import mlflow.exceptions

        try:
            # MlflowClient.download_artifacts would copy a local file to a temporary folder that nobody removes.
            path = self._artifacts(run_id).download_artifacts(artifact_path)  # type: ignore[no-untyped-call]
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise StoreError(
                f"run {run_id} in {without_password(self.uri)} has no file '{artifact_path}': {first_line(error)}"
            ) from error
        return Path(path)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, which another machine may be setting at the same moment."""
        with explained(self.uri):
            for key, value in tags.items():
                _set_raced(partial(self.client.set_tag, run_id, key, value))

    def delete_tag(self, run_id: str, key: str) -> None:
        """Delete a tag of a run; that another machine has just done so is not an error."""
        import mlflow.exceptions

        with explained(self.uri):
            try:
                self.client.delete_tag(run_id, key)
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise

    def tags(self, run_id: str) -> dict[str, str]:
        """The tags of a run."""
        with explained(self.uri):
            return dict(self.client.get_run(run_id).data.tags)

    def file_sizes(self, run_id: str, folder: str) -> dict[str, int]:
        """The files in a folder of a run's artifacts, by path, and their sizes in bytes."""
        with explained(self.uri):
            files = self._artifacts(run_id).list_artifacts(folder)
        return {file.path: file.file_size or 0 for file in files if not file.is_dir}

    def upload(self, run_id: str, folder: Path, artifact_path: str) -> None:
        """Copy the files of a folder to a run's artifacts; what has their names there is replaced."""
        with explained(self.uri):
            self.client.log_artifacts(run_id, str(folder), artifact_path)

    def remove_file(self, run_id: str, artifact_path: str) -> None:
        """Delete one of a run's files; a missing file is not an error."""
        with explained(self.uri):
            if artifact_path in self.file_sizes(run_id, artifact_path.rpartition("/")[0]):
                self._artifacts(run_id).delete_artifacts(artifact_path)  # type: ignore[no-untyped-call]

    def _artifacts(self, run_id: str) -> ArtifactRepository:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        artifacts = self.client.get_run(run_id).info.artifact_uri
        return get_artifact_repository(artifacts, tracking_uri=self.uri)

    def study_url(self, study: str, base_url: str, view: str = TRIALS_VIEW) -> str:
        """Where the UI shows a study: its trials, the best first. Raises UnknownNameError for an unknown study."""
        experiment = self._find_experiment(study)
        if experiment is None:
            raise UnknownNameError("study", study, self.studies())
        return base_url.rstrip("/") + view_address(experiment.experiment_id, view)

    def studies(self) -> list[str]:
        """Names of the studies that the store holds, the newest first."""
        with explained(self.uri):
            found = self.client.search_experiments(filter_string=f"name LIKE '{_experiment_name('')}%'")
        return [experiment.name.removeprefix(_experiment_name("")) for experiment in found]

    def optimise(self) -> None:
        """Give the query planner its statistics: sorting 10 000 runs takes 0.08 s with them and 11 s without."""
        path = _sqlite_path(self.uri)
        if path is None:
            return
        # A store that is in use or full is as right without them.
        with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path, timeout=20)) as database:
            database.execute("PRAGMA analysis_limit=1000")
            database.execute("ANALYZE")

    def _restored(self, study: str) -> Experiment | None:
        """The study's experiment if it was deleted, which it is no longer."""
        with explained(self.uri):
            experiment = self.client.get_experiment_by_name(_experiment_name(study))
            if experiment is None or experiment.lifecycle_stage != "deleted":
                return None
            self.client.restore_experiment(experiment.experiment_id)
        _logger.warning("the experiment '%s' was deleted in MLflow; it is restored with its runs.", experiment.name)
        return experiment

    def _find_experiment(self, study: str) -> Experiment | None:
        with explained(self.uri):
            experiment = self.client.get_experiment_by_name(_experiment_name(study))
        if experiment and experiment.lifecycle_stage == "deleted":
            raise StoreError(
                f"the experiment '{experiment.name}' in {without_password(self.uri)} was deleted; bring it back with "
                f"`mlflow experiments restore -x {experiment.experiment_id}`, or continue the study, which restores it."
            )
        return experiment

    def _create_experiment(self, study: str) -> str:
        # A server decides where artifacts lie. A database would put them below the current folder.
        location = None if self.is_server else Home(self.home).study(study).artifacts.as_uri()
        with explained(self.uri):
            return self.client.create_experiment(
                _experiment_name(study),
                artifact_location=location,
                # Without it versions of MLflow 3 ask every visitor whether this is a GenAI experiment.
                tags={"mlflow.experimentKind": "custom_model_development"},
            )


def search_runs(client: MlflowClient, experiment_id: str, filter_string: str, study_id: str | None = None) -> list[Run]:
    """All runs of an experiment that a filter selects, page by page; with an id those of that study alone.

    Without one, the runs that a lost study of the same name has left are passed over.
    """
    runs: list[Run] = []
    token = None
    while True:
        page = client.search_runs([experiment_id], filter_string, max_results=1000, page_token=token)
        runs.extend(page)
        token = page.token
        if not token:
            return [run for run in runs if is_of_study(run, study_id)]


def is_of_study(run: Run, study_id: str | None) -> bool:
    """Whether a run is of the study with that id; without one, whether it is not known to be of a lost study."""
    if study_id is None:
        return ORPHANED_TAG not in run.data.tags
    return run.data.tags.get(STUDY_ID_TAG) == study_id


def _set_raced(set_tag: Callable[[], object]) -> None:
    """Set a tag; a second time where another machine did so at the same moment.

    MLflow looks for the tag and, where there is none, inserts it: of two that find none, one is refused.
    """
    import mlflow.exceptions

    try:
        set_tag()
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "BAD_REQUEST":  # what MLflow says of all that a database refuses
            raise
        set_tag()


@contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn what MLflow raises into a StoreError that names the store."""
    import mlflow.exceptions
    import requests

    try:
        yield
    except (mlflow.exceptions.MlflowException, requests.RequestException) as error:  # the latter for artifacts
        raise StoreError(f"MLflow at {without_password(uri)} refused: {first_line(error)}") from error
    except OSError as error:  # artifacts are written to a temporary file first
        if error.errno not in OF_A_FULL_DISK:
            raise
        refusal = disk_refusal(error, "its artifacts, or temporary files (TMPDIR)")
        raise StoreError(f"MLflow at {without_password(uri)} {refusal}.") from error


def prepare_mlflow() -> None:
    """Set what MLflow reads when it is imported; what the user has set stays."""
    for name, value in _MLFLOW_SETTINGS.items():
        os.environ.setdefault(name, value)


def _experiment_name(study: str) -> str:
    return f"hpo/{study}"


def _require_known_scheme(uri: str) -> None:
    scheme = urlsplit(uri).scheme.split("+")[0]
    if scheme not in _SCHEMES:
        raise StoreError(
            f"tracking URI '{without_password(uri)}' is not supported: use {'://, '.join(_SCHEMES)}://; "
            "plain directories are not supported."
        )


def home_store_uri(home: Path) -> str:
    """The URI of the home's own store."""
    return f"sqlite:///{Home(home).mlflow_database}"


def _require_readable_variables() -> None:
    """Raise StoreError for a variable that MLflow cannot read, such as a number of connections that is not a number."""
    from mlflow import environment_variables

    for name, variable in vars(environment_variables).items():
        if name.startswith("MLFLOW_") and name in os.environ:
            try:
                variable.get()
            except ValueError as error:
                raise StoreError(
                    f"MLflow cannot read {name}={os.environ[name]}: {first_line(error)}; unset it, or set it to "
                    "another value."
                ) from error


def _is_server(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https", "databricks")


def _require_answer(uri: str) -> None:
    """Fail in seconds where nothing listens; MLflow's own retries take longer and end in a page of text."""
    parts = urlsplit(uri)
    if parts.scheme == "databricks":
        return
    try:
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
    except ValueError as error:
        raise StoreError(f"the tracking URI '{without_password(uri)}' is wrong: {error}.") from error
    try:
        socket.create_connection((parts.hostname or "", port), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise StoreError(
            f"no MLflow server answers at {without_password(uri)} ({error.strerror or error}); start it, or omit "
            "--tracking-uri and unset MLFLOW_TRACKING_URI to record in the home."
        ) from error


def _sqlite_path(uri: str) -> Path | None:
    if not uri.startswith("sqlite"):
        return None
    path = uri.partition(":///")[2].partition("?")[0]
    if not path or path == ":memory:":
        raise StoreError(
            f"the tracking URI '{without_password(uri)}' does not name a file; use sqlite:////ABSOLUTE/PATH/mlflow.db."
        )
    return Path(path)


def _open_sqlite(path: Path, uri: str, *, is_in_home: bool) -> MlflowClient:
    """Creates the schema under a lock: without one, 3 of 4 processes that start at once crash."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S):
            if not path.exists() or path.stat().st_size == 0:
                with _creating:
                    _create(path)
            # The write-ahead log makes logging 3 times cheaper.
            prepare_sqlite(path, holding="the curves so far")
            if is_in_home:
                _follow_home(path)
            return _connect(uri)
    except Timeout as error:
        raise StoreError(f"another process has held {path}.lock for {_LOCK_TIMEOUT_S:.0f} s; stop it first.") from error
    except (OSError, sqlite3.DatabaseError, SQLAlchemyError) as error:
        raise StoreError(f"cannot open {path}: {reason_and_advice(error, path)}") from error


def _follow_home(database: Path) -> None:
    """Let artifacts be found in the home of this database, wherever it was when they were written.

    MLflow stores absolute addresses of artifacts: after a home was renamed, copied or mounted elsewhere, its models
    could not be found, and a search would write into the old place. The tables are MLflow 3.17.2's.
    """
    home = Home(database.parent)
    prefix = _experiment_name("")
    with closing(sqlite3.connect(database, timeout=20)) as connection, connection:
        stored = connection.execute(
            "SELECT experiment_id, name, artifact_location FROM experiments WHERE name LIKE ?", (f"{prefix}%",)
        ).fetchall()
        for experiment_id, name, location in stored:
            study = name.removeprefix(prefix)
            wanted = home.study(study).artifacts.as_uri()
            if location == wanted or not (location.startswith("file:") and location.endswith(f"/artifacts/{study}")):
                continue
            connection.execute(
                "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (wanted, experiment_id)
            )
            connection.execute(
                "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                (wanted, len(location) + 1, experiment_id, len(location), location),
            )
            for table, column in (("logged_models", "artifact_location"), ("model_versions", "storage_location")):
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (wanted, len(location) + 1, len(location) + 1, f"{location}/"),
                )


def _create(path: Path) -> None:
    """Make the schema in a file aside and move it into place: killed half-way, MLflow's own way left it unusable."""
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

    aside = path.with_name(f"{path.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    engine = create_sqlalchemy_engine(f"sqlite:///{aside / path.name}")  # type: ignore[no-untyped-call]
    _initialize_tables(engine)  # type: ignore[no-untyped-call]
    engine.dispose()
    (aside / path.name).replace(path)
    aside.rmdir()


def _connect(uri: str) -> MlflowClient:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    # It prints the traceback of each error that it raises too; a full disk has one a second.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from sqlalchemy.exc import SQLAlchemyError

    try:
        client = MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
    except (MlflowException, SQLAlchemyError, ImportError) as error:  # a database's driver may be missing
        if "database schema" in str(error):
            shown = without_password(uri)
            raise StoreError(
                f"the MLflow store at {shown} was made by another MLflow than {version('mlflow')}; make a copy of it, "
                f"then run `mlflow db upgrade {shown}`."
            ) from error
        raise StoreError(f"cannot use the MLflow store at {without_password(uri)}: {first_line(error)}") from error
    return client
