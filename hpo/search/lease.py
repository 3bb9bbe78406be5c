"""Who works on a study: a row in its database for each coordinator, renewed for as long as it lives.

Every time is the database's, so that no two machines' clocks are compared. A session that was not renewed for a whole
lease is taken for dead, and its trials are adopted by others. Nobody adopts right after the database was away: first
everyone has one lease's time to renew. The sums work out for three renewals a lease: whoever is gone for a whole lease
by an outage of the database saw it away for at least two thirds of one, so every other session missed renewals too, and
a gap of half a lease sets the waiting going.

A session that has trained all it will, and refits and tests the winner, keeps its row: the study is still worked on,
and the session's files are not those of the dead. Nobody waits for it, though; see `Session.conclude`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar
from uuid import uuid4

from sqlalchemy import (
    Column,
    Double,
    Integer,
    MetaData,
    String,
    Table,
    and_,
    case,
    delete,
    insert,
    inspect,
    select,
    text,
    update,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from hpo.errors import first_line
from hpo.machine import process_host
from hpo.search.storage import SCHEMA_LOCK, OutageError, StudyStorage

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from sqlalchemy import ColumnElement, Connection, Delete

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)

# Who holds a study's lock and asks the database nothing for long loses it: a process that was stopped, say.
_TRY_LOCK = text("SELECT pg_try_advisory_lock(:key), set_config('idle_session_timeout', :idle, false)")
_LOCK = text("SELECT pg_advisory_lock(:key)")
_UNLOCK = text("SELECT pg_advisory_unlock(:key), set_config('idle_session_timeout', '0', false)")

_IDLE_S = 300
"""Seconds of silence after which the database takes the lock away."""

_SIGN_OF_LIFE_S = 60.0
"""Seconds between signs of life during an action that takes long."""

_SAID_AFTER_S = 5.0
"""Seconds of waiting for a study's lock after which the user is told for whom."""

_FORGOTTEN_AFTER_S = 24 * 3600
"""Age at which the row of a dead session is removed, by the next one that begins."""

_CONCLUDING = "/concluding"
"""Follows the study's name in the row of a session that concludes. No name of a study holds a slash, and an older hpo
does not see such a row, which a further column would be in the way of."""

_SESSIONS = Table(
    "hpo_session",
    MetaData(),
    Column("id", String(32), primary_key=True),
    Column("study", String(512), nullable=False, index=True),
    Column("name", String(256), nullable=False),
    Column("lease_s", Double, nullable=False),
    Column("renewed_at", Double, nullable=False),  # seconds since 1970 by the database's clock, as the next one
    Column("unbroken_since", Double, nullable=False),
    Column("num_lapses", Integer, nullable=False),
)


class _Now(FunctionElement[float]):
    """Seconds since 1970 by the database's clock."""

    type = Double()
    inherit_cache = True


@compiles(_Now, "postgresql")
def _now_in_postgresql(element: _Now, compiler: Any, **options: Any) -> str:
    return "extract(epoch FROM clock_timestamp())::double precision"


@compiles(_Now, "sqlite")
def _now_in_sqlite(element: _Now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


_AGE = _Now() - _SESSIONS.c.renewed_at
_IS_LIVING = _SESSIONS.c.lease_s >= _AGE


@dataclass(frozen=True)
class SessionInfo:
    """A coordinator that works on a study."""

    id: str
    process: str
    """HOST:PID, in a container HOST@NAMESPACE:PID"""

    seconds_since_renewal: float
    """By the database's clock."""

    is_concluding: bool = False
    """Whether it has trained all it will, and MLflow has the weights of its trials."""

    @property
    def name(self) -> str:
        """HOST:PID"""
        return re.sub(r"@\d+(?=:\d+$)", "", self.process)

    @property
    def is_gone(self) -> bool:
        """Whether its process could be seen from here, and is gone: the lease has yet to expire."""
        host, _, pid = self.process.rpartition(":")
        if host != process_host():
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's
            return False
        return False


def living_sessions(storage: BaseStorage, study: str) -> list[SessionInfo]:
    """The sessions of a study whose lease has not expired; none where the storage holds no sessions at all."""
    if not isinstance(storage, StudyStorage):
        return []

    def read() -> list[SessionInfo]:
        with storage.engine.begin() as connection:
            if not inspect(connection).has_table(_SESSIONS.name):
                return []
            columns = select(_SESSIONS.c.id, _SESSIONS.c.name, _AGE, _SESSIONS.c.study != study)
            return [SessionInfo(*row) for row in connection.execute(columns.where(_of(study), _IS_LIVING))]

    return storage.outlast(read)


def searchers_of(storage: BaseStorage, study: str) -> list[str]:
    """HOST:PID of the processes that work on a study."""
    return [session.name for session in living_sessions(storage, study) if not session.is_gone]


class Session:
    """A coordinator's presence in a study: a row that it renews, and that expires by the database's clock."""

    def __init__(
        self, storage: BaseStorage, study: str, *, session_id: str | None = None, lease_s: float = 30.0
    ) -> None:
        """`session_id` must be new in the world, as uuid4().hex is; without one it is that."""
        assert isinstance(storage, StudyStorage), "a session needs a database"
        self.id = session_id or uuid4().hex
        self._storage = storage
        self._study = study
        self._written_study = study
        self._lease_s = lease_s
        self._renewing = threading.Lock()
        self._renewed_at = 0.0  # by this machine's clock, before the database was asked
        self._num_lapses = 0
        self._has_lapsed = False
        self._ended = threading.Event()
        self._renewer = threading.Thread(target=self._keep_renewing, name="session renewal", daemon=True)

    def __enter__(self) -> Self:
        self._storage.outlast(self._begin)
        self._renewer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._renewer.join()
        try:
            with self._storage.engine.begin() as connection:
                connection.execute(delete(_SESSIONS).where(_SESSIONS.c.id == self.id))
        except SQLAlchemyError as refusal:  # the row expires by itself
            _logger.info("the session's row stays behind: %s", first_line(refusal))

    @property
    def is_shared(self) -> bool:
        """Whether other machines may work on the study."""
        return self._storage.is_shared

    def hurry(self) -> None:
        """Wait no longer for a database that is away: this process has to leave."""
        self._storage.patience_s = 0

    def living(self) -> set[str]:
        """The ids of the study's sessions whose lease has not expired, and this one's."""
        return {self.id} | {session.id for session in living_sessions(self._storage, self._study)}

    def forget_others(self) -> None:
        """Remove the study's other sessions, of which the caller knows that they are dead."""
        others = delete(_SESSIONS).where(_of(self._study), _SESSIONS.c.id != self.id)
        self._storage.outlast(lambda: self._execute(others))

    def forget_gone(self) -> set[str]:
        """Remove the sessions of this machine whose process is gone, without waiting for their lease; their ids."""
        gone = {session.id for session in living_sessions(self._storage, self._study) if session.is_gone}
        self._storage.outlast(lambda: self._execute(delete(_SESSIONS).where(_SESSIONS.c.id.in_(gone))))
        return gone

    def others(self) -> list[SessionInfo]:
        """The study's other living sessions, without those that conclude it."""
        found = living_sessions(self._storage, self._study)
        return [other for other in found if other.id != self.id and not other.is_concluding]

    def conclude(self) -> None:
        """Say that this session trains no more trials, and that MLflow has the weights of those that it trained.

        It is among the `living` until its end, but no longer among the `others`, who would wait for each other.
        """
        self._written_study = self._study + _CONCLUDING
        self._storage.outlast(self._renew)

    def has_lapsed(self) -> bool:
        """Whether the lease ran out since this was last asked: the caller must see which trials are still its own.

        When it says so the lease is renewed already. It waits for a database that is away.
        """
        if _monotonic() - self._renewed_at > self._lease_s:  # this process was stopped, and the renewer is not yet up
            self._storage.outlast(self._renew)
        with self._renewing:
            has_lapsed, self._has_lapsed = self._has_lapsed, False
        return has_lapsed

    def may_adopt(self) -> bool:
        """Whether this session has been renewed without a gap for a whole lease, so that the others could be, too."""
        is_unbroken = and_(self._lease_s / 2 >= _AGE, _Now() - _SESSIONS.c.unbroken_since >= self._lease_s)
        own = select(_SESSIONS.c.id).where(_SESSIONS.c.id == self.id, is_unbroken)

        def read() -> bool:
            with self._storage.engine.begin() as connection:
                return connection.execute(own).first() is not None

        return self._storage.outlast(read)

    def exclusively(self, action: Callable[[], _T], *, takes_long: bool = False) -> _T:
        """What `action` returns when it is run under the study's lock; nobody else's action runs meanwhile.

        An outage of the database breaks the lock. The action is then run again from its beginning, so it must look at
        the study again, and put back trials that have no owner, for its own last attempt may have left one. An action
        that asks the database nothing for 5 minutes loses the lock; one that `takes_long` only if its process is
        stopped for that time.
        """

        def attempt() -> _T:
            with self.exclusive(takes_long=takes_long):
                return action()

        return self._storage.outlast(attempt)

    @contextmanager
    def exclusive(self, *, takes_long: bool = False) -> Iterator[None]:
        """Hold the study's lock in the database. With sqlite nothing is done: the home's file lock holds.

        The lock belongs to one connection, which this thread asks the storage through: it is held for exactly as long
        as the statements get through. Raises OutageError at the first one that does not; `exclusively` begins again.
        """
        if not self._storage.is_shared or self._storage.is_bound:  # this thread has it already
            yield
            return
        with self._storage.outlast(self._lock) as connection:
            try:
                with self._storage.bound_to(connection), _kept_alive(connection) if takes_long else nullcontext():
                    yield
            finally:
                self._unlock(connection)

    def _lock(self) -> Connection:
        connection = self._storage.engine.connect()
        try:
            is_free = connection.execute(_TRY_LOCK, {"key": self._lock_key, "idle": f"{_IDLE_S}s"}).scalar_one()
            if not is_free:
                with self._waiting_told():
                    connection.execute(_LOCK, {"key": self._lock_key})
            connection.commit()
        except BaseException:
            connection.invalidate()
            connection.close()
            raise
        return connection

    @contextmanager
    def _waiting_told(self) -> Iterator[None]:
        """Tell the user for whom we wait, once that takes long."""
        telling = threading.Timer(_SAID_AFTER_S, self._tell_who_is_waited_for)
        telling.daemon = True
        telling.start()
        try:
            yield
        finally:
            telling.cancel()

    def _tell_who_is_waited_for(self) -> None:
        try:
            found = living_sessions(self._storage, self._study)
        except OutageError:  # which was told
            return
        names = [each.name for each in found if each.is_concluding and each.id != self.id]
        if names:
            _logger.warning(
                "waiting for %s to finish: study '%s' is complete, and its winner is refit or tested there",
                " and ".join(names),
                self._study,
            )
        else:
            _logger.warning("waiting for another session of study '%s', which may take up to 5 minutes", self._study)

    def _unlock(self, connection: Connection) -> None:
        if connection.invalidated:  # the lock went with the connection
            return
        try:
            connection.rollback()
            connection.execute(_UNLOCK, {"key": self._lock_key})
            connection.commit()
        except SQLAlchemyError:
            connection.invalidate()

    @property
    def _lock_key(self) -> int:
        return int.from_bytes(hashlib.sha256(f"hpo:{self._study}".encode()).digest()[:8], signed=True)

    def _begin(self) -> None:
        with self._storage.engine.begin() as connection:
            if self._storage.is_shared:
                # Of two processes that make the table at once, one would fail.
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            _SESSIONS.metadata.create_all(connection)
            connection.execute(delete(_SESSIONS).where(_of(self._study), _AGE > _FORGOTTEN_AFTER_S))
        self._renew()
        self._has_lapsed = False

    def _keep_renewing(self) -> None:
        wait_s = self._lease_s / 3
        while not self._ended.wait(wait_s):
            try:
                self._renew()
            except SQLAlchemyError as error:  # whoever needs the database next tells the user
                _logger.debug("the session was not renewed: %s", first_line(error))
                wait_s = min(1.0, self._lease_s / 10)
            else:
                wait_s = self._lease_s / 3

    def _renew(self) -> None:
        with self._renewing:
            asked_at = _monotonic()
            num_lapses = self._write_row()
            # Until a moment ago the others saw the row of last time, even if this one was on its way for long.
            was_seen_dead = _monotonic() - self._renewed_at > self._lease_s
            self._has_lapsed |= was_seen_dead or num_lapses != self._num_lapses
            self._num_lapses = num_lapses
            self._renewed_at = asked_at

    def _write_row(self) -> int:
        """Renew the row, or recreate it if it is gone; return how often the lease has expired so far."""
        is_own = _SESSIONS.c.id == self.id
        with self._storage.engine.begin() as connection:
            if connection.execute(_RENEWAL.where(is_own).values(study=self._written_study)).rowcount:
                return int(connection.execute(select(_SESSIONS.c.num_lapses).where(is_own)).scalar_one())
            row = {
                "id": self.id,
                "study": self._written_study,
                "name": f"{process_host()}:{os.getpid()}",
                "lease_s": self._lease_s,
                "renewed_at": _Now(),
                "unbroken_since": _Now(),
                "num_lapses": self._num_lapses + 1,
            }
            connection.execute(insert(_SESSIONS).values(row))
            return self._num_lapses + 1

    def _execute(self, statement: Delete) -> None:
        with self._storage.engine.begin() as connection:
            connection.execute(statement)


_RENEWAL = update(_SESSIONS).values(
    renewed_at=_Now(),
    unbroken_since=case((_SESSIONS.c.lease_s / 2 < _AGE, _Now()), else_=_SESSIONS.c.unbroken_since),
    num_lapses=_SESSIONS.c.num_lapses + case((_SESSIONS.c.lease_s < _AGE, 1), else_=0),
)


@contextmanager
def _kept_alive(connection: Connection) -> Iterator[None]:
    """Send an empty query now and then, so that the database does not take a process that computes for a stopped one.

    It goes past SQLAlchemy and psycopg, whose transactions belong to another thread: it begins none, and ends none.
    """
    driver: Any = connection.connection.driver_connection
    ended = threading.Event()

    def give_signs_of_life() -> None:
        while not ended.wait(_SIGN_OF_LIFE_S):
            try:
                with driver.lock:
                    driver.pgconn.exec_(b"")
            except driver.Error:  # the connection is gone; the action's next statement says so
                return

    giving = threading.Thread(target=give_signs_of_life, name="signs of life", daemon=True)
    giving.start()
    try:
        yield
    finally:
        ended.set()
        giving.join()


def _of(study: str) -> ColumnElement[bool]:
    return _SESSIONS.c.study.in_((study, study + _CONCLUDING))


def _monotonic() -> float:
    """Seconds on this machine, those too in which it slept."""
    if sys.platform == "linux":
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.clock_gettime(time.CLOCK_MONOTONIC)  # of macOS: Python's own clock stands still while it sleeps
