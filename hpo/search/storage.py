"""The database of the studies: sqlite in the home for one machine, PostgreSQL for several.

PostgreSQL may go away for a while: every call is then made again until it answers. A call whose answer was lost may
have been carried out, so each must be harmless the second time:

    reports, attributes    write the same row again
    parameters             are refused as there already, which Optuna takes for done
    how a trial ended      is compared with what is stored
    back to the queue      is left alone where someone has taken the trial since
    a new trial, or one    may leave a running trial that has no owner. Asking is therefore done in Session.exclusively:
    from the queue         an outage breaks its lock, and it begins again, with adopting the trials that have none
"""

from __future__ import annotations

import logging
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import optuna
from filelock import FileLock, Timeout
from optuna.distributions import BaseDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, InMemoryStorage, _CachedStorage
from optuna.trial import TrialState
from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError
from sqlalchemy.pool import NullPool

from hpo.database import TIMEOUT_S, connect_sqlite, prepare_sqlite, reason_and_advice, without_password
from hpo.errors import StoreError
from hpo.home import Home, find_storage
from hpo.search.optuna_tables import DirectStorage, refuse_another
from hpo.search.optuna_tables import OutageError as OutageError

PATIENCE_S = 300.0
"""How long an outage may last."""

SCHEMA_LOCK = 0x68706F  # "hpo"
"""Key of the lock in PostgreSQL that is held while tables are made; several that make them at once fail."""

_P = ParamSpec("_P")
_T = TypeVar("_T")
_logger = logging.getLogger(__name__)


Storage = BaseStorage
"""What `open_storage` and `read_storage` return."""


def open_storage(home: Path, url: str | None = None) -> BaseStorage:
    """The storage at `url`, else in `home/optuna.db`, made on first use; several processes may do so at once.

    Raises StoreError if the home cannot be written, the file is damaged, nothing answers at the URL, it is not a
    PostgreSQL's, or the tables are of another version of Optuna.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _open_sqlite(Home(home).optuna_database) if url is None else _open_postgresql(url)


def read_storage(home: Path, url: str | None = None) -> BaseStorage:
    """The storage for looking at studies; where there is none yet, an empty one in memory, and nothing is written."""
    if url is None:
        return open_storage(home) if Home(home).has_studies() else InMemoryStorage()
    with _connected(url) as connection:
        is_there = inspect(connection).has_table("studies")
    return open_storage(home, url) if is_there else InMemoryStorage()


def find_studies(home: Path | None, url: str | None) -> BaseStorage:
    """`read_storage` of a home and a database as a user names them; see `Home.find` and `find_storage`."""
    return read_storage(Home.find(home).path, find_storage(url))


def _patiently(method: Callable[Concatenate[Any, _P], _T]) -> Callable[Concatenate[Any, _P], _T]:
    @wraps(method)
    def patient(self: StudyStorage, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self.outlast(partial(method, self, *args, **kwargs))

    return patient


class StudyStorage(_CachedStorage):
    """What `open_storage` returns. With PostgreSQL every call waits for a database that is away; see `outlast`."""

    def __init__(self, backend: DirectStorage, *, patience_s: float = PATIENCE_S) -> None:
        super().__init__(backend)
        self.patience_s = patience_s
        """How long an outage may last; a process that has to leave sets it to 0."""

        self.engine: Engine = backend.engine
        self.is_shared = self.engine.name == "postgresql"
        """Whether other machines may use it too; sqlite is for one alone, and is never away."""

        self._direct = backend
        self._sessions = backend.scoped_session
        self._thread = threading.local()
        self._is_away = False
        weakref.finalize(self, backend.engine.dispose)  # connections are closed, not dropped

    def outlast(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, which is made again for as long as the database does not answer.

        Raises OutageError once that has lasted for `patience_s`; within `bound_to` at once.
        """
        began = None
        wait_s = 0.1
        while True:
            try:
                result = call()
            except (StorageInternalError, DBAPIError, OutageError) as error:
                if not (self.is_shared and _is_outage(error)):
                    raise
                began = began or time.monotonic()
                if self.is_bound or time.monotonic() - began >= self.patience_s:
                    raise self._given_up(error) from error
                self._note_outage(error)
                time.sleep(wait_s * random.uniform(0.5, 1))
                wait_s = min(5.0, 2 * wait_s)
            else:
                self._note_answer()
                return result

    @contextmanager
    def bound_to(self, connection: Connection) -> Iterator[None]:
        """Send what this thread asks of the storage through one connection, which may not be replaced if it breaks."""
        event.listen(connection, "begin", refuse_another)
        self._sessions.remove()
        self._sessions(bind=connection)
        self._thread.is_bound = True
        try:
            yield
        finally:
            self._thread.is_bound = False
            self._sessions.remove()
            event.remove(connection, "begin", refuse_another)

    @property
    def is_bound(self) -> bool:
        """Whether this thread is within `bound_to`."""
        return getattr(self._thread, "is_bound", False)

    def _given_up(self, error: Exception) -> OutageError:
        if isinstance(error, OutageError):
            return error
        url = self.engine.url.render_as_string()
        return OutageError(
            f"the study's database {url} does not answer ({_reason(error)}); run the same command again when it does."
        )

    def _note_outage(self, error: Exception) -> None:
        """Warn, once an outage."""
        if not self._is_away:
            self._is_away = True
            _logger.warning(
                "the study's database does not answer (%s); trying again for up to %.0f s",
                _reason(error),
                self.patience_s,
            )

    def _note_answer(self) -> None:
        if self._is_away:
            self._is_away = False
            _logger.warning("the study's database answers again")

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        write = partial(super().set_trial_state_values, trial_id, state, values)
        if not self.is_shared:
            return write()
        taken = self.get_trial(trial_id).datetime_start if state == TrialState.WAITING else None
        is_first = True

        def settle() -> bool:
            nonlocal is_first
            if is_first:
                is_first = False
                return write()
            # What a lost answer has left: done by us, or done and since then overtaken by others.
            trial = self.get_trial(trial_id)
            if state == TrialState.WAITING and (trial.state == state or trial.datetime_start != taken):
                return True
            if state.is_finished() and trial.state == state and trial.values == (list(values) if values else None):
                return True
            return write()

        return self.outlast(settle)

    @_patiently
    def reopen_trial(self, trial_id: int, key: str, value: Any) -> None:
        """Put a finished trial back into the queue, with one more attribute; nothing is done to one that waits."""
        self._direct.reopen_trial(trial_id, key, value)

    @_patiently
    def redeclare(
        self,
        study_id: int,
        distributions: Mapping[str, BaseDistribution],
        encoded: Callable[[Mapping[str, Any]], dict[str, Any]],
        attributes: Mapping[str, Any],
    ) -> None:
        """Declare parameters of a study's trials again, and replace attributes of the study, all of it or nothing.

        `encoded` returns values of the former declaration as the new one has them. No other process has the study open.
        """
        self._direct.redeclare(study_id, distributions, encoded, attributes)
        self._studies.pop(study_id, None)  # what the cache holds of its trials

    @_patiently
    def get_trial_user_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._direct.get_trial_user_attrs(trial_id)

    @_patiently
    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._direct.get_trial_system_attrs(trial_id)

    create_new_study = _patiently(_CachedStorage.create_new_study)
    delete_study = _patiently(_CachedStorage.delete_study)
    set_study_user_attr = _patiently(_CachedStorage.set_study_user_attr)
    set_study_system_attr = _patiently(_CachedStorage.set_study_system_attr)
    get_study_id_from_name = _patiently(_CachedStorage.get_study_id_from_name)
    get_study_name_from_id = _patiently(_CachedStorage.get_study_name_from_id)
    get_study_directions = _patiently(_CachedStorage.get_study_directions)
    get_study_user_attrs = _patiently(_CachedStorage.get_study_user_attrs)
    get_study_system_attrs = _patiently(_CachedStorage.get_study_system_attrs)
    get_all_studies = _patiently(_CachedStorage.get_all_studies)
    create_new_trial = _patiently(_CachedStorage.create_new_trial)
    set_trial_param = _patiently(_CachedStorage.set_trial_param)
    get_trial_id_from_study_id_trial_number = _patiently(_CachedStorage.get_trial_id_from_study_id_trial_number)
    set_trial_intermediate_value = _patiently(_CachedStorage.set_trial_intermediate_value)
    set_trial_user_attr = _patiently(_CachedStorage.set_trial_user_attr)
    set_trial_system_attr = _patiently(_CachedStorage.set_trial_system_attr)
    get_trial = _patiently(_CachedStorage.get_trial)
    get_all_trials = _patiently(_CachedStorage.get_all_trials)


def _open_sqlite(path: Path) -> StudyStorage:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of two processes that lay out the tables at once, one would fail.
        with FileLock(path.with_name(f".{path.name}.lock"), timeout=TIMEOUT_S):
            prepare_sqlite(path, holding="the studies so far")
            # The connection is made here and not from a URL, which gives a meaning to ?, %, { and } in a path.
            return StudyStorage(DirectStorage(f"sqlite:///{path.name}", {"creator": partial(connect_sqlite, path)}))
    except Timeout as error:
        raise StoreError(f"another process has held {error.lock_file} for {TIMEOUT_S:.0f} s; stop it first.") from error
    except RuntimeError as error:  # Optuna's word for tables of another version
        raise StoreError(_of_another_version(str(path), f"sqlite:///{path}", error)) from error
    except (OSError, StorageInternalError, OperationalError) as error:  # of the tables that Optuna lays out, too
        raise StoreError(f"{path} cannot be opened: {reason_and_advice(error, path)}") from error


def _open_postgresql(url: str) -> StudyStorage:
    with _connected(url) as connection:
        # Of two processes that make the tables at once, one would fail.
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": SCHEMA_LOCK})
        try:
            address = connection.engine.url
            # Optuna fills in {names}; a password may hold braces.
            template = address.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
            return StudyStorage(
                DirectStorage(template, {"connect_args": _connect_args(address), "pool_pre_ping": True})
            )
        except RuntimeError as error:
            shown = without_password(url)
            raise StoreError(_of_another_version(f"the database {shown}", shown, error)) from error
        except (StorageInternalError, DBAPIError) as error:
            raise StoreError(
                f"the database {without_password(url)} cannot be used: {_reason(error)}; its user must be allowed to "
                "make tables in it."
            ) from error


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    """A connection to PostgreSQL, closed at the end. Raises StoreError if there is none to be had."""
    address = _postgresql_address(url)
    shown = without_password(url)
    try:
        engine = create_engine(address, connect_args=_connect_args(address), poolclass=NullPool)
        connection = engine.connect()
    except ImportError as error:
        raise StoreError(
            f"PostgreSQL's driver is not installed ({error}); run `pip install 'hpo-torch[postgres]'`."
        ) from error
    except DBAPIError as error:
        reason = _reason(error)
        if "FATAL" in reason:
            raise StoreError(
                f"PostgreSQL at {shown} refuses: {reason}; check the user, the password (in the URL, PGPASSWORD or "
                "~/.pgpass) and the database."
            ) from error
        raise StoreError(
            f"no PostgreSQL answers at {shown}: {reason}; start it, or check the host and the port."
        ) from error
    with connection:
        yield connection


def _postgresql_address(url: str) -> URL:
    shown = without_password(url)
    wanted = "give postgresql+psycopg://USER@HOST/DATABASE, or omit it to use SQLite in the home, on one machine"
    try:
        address = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise StoreError(f"'{shown}' is not a database URL; {wanted}.") from error
    if address.get_backend_name() == "sqlite":
        raise StoreError(
            f"the storage '{shown}' is sqlite, whose locks and write-ahead log do not work between machines; {wanted}."
        )
    if address.drivername not in ("postgresql", "postgresql+psycopg"):
        raise StoreError(f"the storage '{shown}' is not PostgreSQL with psycopg; {wanted}.")
    return address.set(drivername="postgresql+psycopg")


def _connect_args(address: URL) -> dict[str, str | int]:
    """What makes a lost connection known in seconds, except what the URL itself sets."""
    wanted: dict[str, str | int] = {
        "connect_timeout": 5,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 20_000,
        "application_name": "hpo",
        # A process that is stopped in the middle of a transaction must not hold up the others forever. For a machine
        # that was cut off the server must look by itself, or it keeps that machine's locks for hours.
        "options": "-c idle_in_transaction_session_timeout=30s "
        "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=3",
    }
    return {name: value for name, value in wanted.items() if name not in address.query}


def _of_another_version(what: str, url: str, error: RuntimeError) -> str:
    if "storage upgrade" in str(error):
        return (
            f"{what} was made by an older Optuna; make a copy of it, then run `optuna storage upgrade --storage {url}`."
        )
    return f"{what} was made by a newer Optuna than {optuna.__version__}; use the version of hpo that made it."


def _is_outage(error: Exception) -> bool:
    if isinstance(error, OutageError):
        return True
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return isinstance(cause, OperationalError | InterfaceError) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    )


def _reason(error: Exception) -> str:
    """What the database or its driver says, in one line."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    lines = str(cause.orig if isinstance(cause, DBAPIError) else cause).strip().splitlines()
    return next((line for line in lines if "FATAL" in line), lines[0] if lines else type(error).__name__).strip()
