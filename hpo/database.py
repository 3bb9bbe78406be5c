"""What every database has in common here: how sqlite is opened, and what a message may say of an address."""

from __future__ import annotations

import logging
import os
import re
import shutil
import sqlite3
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

from hpo.errors import StoreError, first_line
from hpo.machine import file_system

_logger = logging.getLogger(__name__)

TIMEOUT_S = 60.0
"""How long a writer waits for another one."""

_LEAST_ROOM = 2**20
"""Bytes: a write-ahead log, its index and a few pages."""

_NETWORK = re.compile(r"nfs\d?|cifs|smb\w*|afpfs|9p|afs|ncpfs|lustre|beegfs|gpfs|ceph|fuse\.(?!fuseblk|ntfs).+")
"""Types of file systems that several machines share, or that may be."""


def prepare_sqlite(path: Path, *, holding: str) -> None:
    """Be sure that a database can be used, and keeps a write-ahead log; where there is none, an empty one is made.

    `holding` says what is lost with it. Raises StoreError if it is damaged, or cannot be opened or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        damage = _find_damage_though_full(path)
        if not path.exists() and (kind := _network_file_system(path.parent)):
            _logger.warning(
                "%s is on a network file system (%s): its database is kept without a write-ahead log, which is slower "
                "and safe only if the server's locks work; a home on a local disk (--home) has neither problem.",
                path.parent, kind,
            )  # fmt: skip
        if damage is None:
            connect_sqlite(path).close()
    except (OSError, sqlite3.OperationalError) as error:
        raise StoreError(f"{path} cannot be opened: {reason_and_advice(error, path)}") from error
    if damage is not None:
        raise StoreError(
            f"{path} is damaged ({damage}); restore a copy, or move it away: a new one is made, without {holding}."
        )


def connect_sqlite(path: Path) -> sqlite3.Connection:
    """A connection that any thread may use.

    The write-ahead log needs memory that all processes share, which a network file system does not have
    (https://sqlite.org/wal.html): there the journal is a file that is rolled back.
    """
    connection = sqlite3.connect(path, timeout=TIMEOUT_S, check_same_thread=False)
    if _network_file_system(path.parent):
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("PRAGMA synchronous=FULL")
        return connection
    if is_full(path.parent):
        return connection  # the log may find room where its index does not, and nobody could read the database then
    # Readers do not wait for the writer; a power cut may take the last transactions, and harms nothing else.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def reason_and_advice(error: Exception, path: Path) -> str:
    """Why a database cannot be used, in the words of the system or of sqlite, and what to do about it."""
    reason = getattr(error, "strerror", None) or getattr(error, "orig", None) or first_line(error)
    if is_full(path.parent):
        return f"its disk is full ({reason}); make room there, then run the same command again."
    if path.exists() and not os.access(path.parent, os.W_OK):
        return f"{reason}; copy the home to where it can be written, and name that with --home or HPO_HOME."
    return f"{reason}; choose another home with --home or HPO_HOME."


def is_full(folder: Path) -> bool:
    """Whether a disk has less room than a database needs to be opened."""
    try:
        return shutil.disk_usage(folder).free < _LEAST_ROOM
    except OSError:
        return False


def _lacks_room(error: sqlite3.OperationalError) -> bool:
    """Whether sqlite could not make or extend one of the files that lie beside a database: its words vary."""
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)


@cache
def _network_file_system(folder: Path) -> str | None:
    """Type of the file system of a folder if other machines may write to it too."""
    kind = file_system(folder)
    return kind if _NETWORK.fullmatch(kind) else None


def _find_damage_though_full(path: Path) -> str | None:
    """The same as `_find_damage`, where the disk has no room for the write-ahead log too.

    To read a database that keeps one takes two more files. So that `hpo gc` can make room, the log is put away until
    there is some; if another process has the database open, those files are there, and it stays.
    """
    try:
        return _find_damage(path)
    except sqlite3.OperationalError as error:
        if not _lacks_room(error):
            raise
        with suppress(sqlite3.OperationalError):
            _put_log_away(path)
        return _find_damage(path)


def _put_log_away(path: Path) -> None:
    """Let a database be read without its write-ahead log, and write nothing but its first page for that."""
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
        database.execute("PRAGMA locking_mode=EXCLUSIVE")  # the index of the log is then in memory, not in a file
        database.execute("PRAGMA journal_mode=MEMORY")  # of this connection alone; for others it is DELETE


def _find_damage(path: Path) -> str | None:
    if not path.exists() or path.stat().st_size == 0:
        return None
    try:
        with closing(sqlite3.connect(path, timeout=TIMEOUT_S)) as database:
            finding = str(database.execute("PRAGMA quick_check(1)").fetchone()[0])
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError as error:
        finding = str(error)
    return None if finding == "ok" else finding.replace("\n", " ")


def without_password(url: str) -> str:
    """An address for messages and logs."""
    url = re.sub(r"(://[^:/?#@]*:).*@", r"\1***@", url)
    return re.sub(r"([?&]\w*passw(?:or)?d=)[^&]*", r"\1***", url)
