"""The database of the studies: sqlite in the home, opened by one coordinator and any number of readers."""

from __future__ import annotations

import sqlite3
from functools import partial
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage

from hpo.errors import StoreError

FILE_NAME = "optuna.db"
TIMEOUT_SECONDS = 60


def open_storage(home: Path) -> BaseStorage:
    """The storage in `home/optuna.db`, made on first use; several processes may do so at once.

    Raises StoreError where the home cannot be written, or the file is damaged or of another version of Optuna.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    path = home / FILE_NAME
    try:
        home.mkdir(parents=True, exist_ok=True)
        # Of two processes that lay out the tables at once, one would fail.
        with FileLock(home / f".{FILE_NAME}.lock", timeout=TIMEOUT_SECONDS):
            _check_integrity(path)
            # The connection is made here and not from a URL, which gives a meaning to ?, %, { and } in a path.
            connect = {"creator": partial(_connect, path)}
            return RDBStorage(f"sqlite:///{FILE_NAME}", engine_kwargs=connect)
    except (OSError, sqlite3.OperationalError) as error:
        raise StoreError(f"{path} cannot be opened: {error}; choose another home with --home or HPO_HOME.") from error
    except sqlite3.DatabaseError as error:
        raise StoreError(
            f"{path} is damaged: {error}; put a copy in its place, move it away, or choose another home with --home."
        ) from error
    except RuntimeError as error:  # Optuna's word for tables of another version
        raise StoreError(f"{path} is of another version of Optuna: {error}") from error


def read_storage(home: Path) -> BaseStorage:
    """The storage for looking at studies; where there is none yet, an empty one in memory, and nothing is written."""
    return open_storage(home) if (home / FILE_NAME).exists() else InMemoryStorage()


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=TIMEOUT_SECONDS, check_same_thread=False)
    # Readers do not wait for the writer; a power cut may take the last trials' ends, and harms nothing else.
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")
    return connection


def _check_integrity(path: Path) -> None:
    connection = _connect(path)
    try:
        findings = [row[0] for row in connection.execute("PRAGMA quick_check(1)")]
    finally:
        connection.close()
    if findings != ["ok"]:
        raise sqlite3.DatabaseError(findings[0].replace("\n", " "))
