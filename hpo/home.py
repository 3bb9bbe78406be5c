"""The home: the one folder below which everything that a command writes lies.

mlruns/
    mlflow.db, artifacts/    runs, curves, plots and checkpoints, as the MLflow UI shows them
    optuna.db                the studies
    checkpoints/<study>/     states of trials that are running or can be resumed
    splits/                  training and validation data of running searches, as their workers map them
    spool/                   curves on their way to MLflow
    logs/                    what the workers print
    locks/                   one lock a study: one search at a time; and whose files the home keeps
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from hpo.database import without_password
from hpo.errors import StoreError, UsageError
from hpo.files import write_atomically

_LEAST_SPACE = 20_000_000  # bytes: two empty databases and a few small checkpoints
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def find_home(given: Path | None = None) -> Path:
    """The home's absolute path: as given, else HPO_HOME, else ./mlruns. It need not exist yet."""
    return Path(given or os.environ.get("HPO_HOME") or "mlruns").absolute()


def find_data_dir(given: Path | None = None) -> Path:
    """Where data sets lie: as given, else HPO_DATA_DIR, else ~/.cache/hpo/data. It need not exist yet."""
    return Path(given or os.environ.get("HPO_DATA_DIR") or Path.home() / ".cache" / "hpo" / "data").absolute()


def find_storage(given: str | None = None) -> str | None:
    """URL of the database of the studies: as given, else HPO_STORAGE, else None for the one in the home."""
    return given or os.environ.get("HPO_STORAGE") or None


def check_study_name(name: str) -> str:
    """The name, if it is safe as a part of a path."""
    if STUDY_NAME.fullmatch(name) is None:
        raise UsageError(
            f"'{name}' cannot name a study: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first."
        )
    return name


def create_home(home: Path) -> None:
    """Make the home if it is not there, and be sure that it can be written."""
    try:
        (home / "locks").mkdir(parents=True, exist_ok=True)
        probe = home / "locks" / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"the home {home} cannot be written: {error.strerror}; choose another with --home or HPO_HOME."
        ) from error


def require_space(home: Path, num_bytes: int) -> None:
    """Raise StoreError where the disk has no room for this much and the least that a search writes."""
    existing = next(folder for folder in (home, *home.parents) if folder.exists())
    free, needed = shutil.disk_usage(existing).free, num_bytes + _LEAST_SPACE
    if free < needed:
        raise StoreError(
            f"the home {home} has {free / 1e6:.0f} MB left, and a search needs {needed / 1e6:.0f} MB at least; "
            "make room, or choose another with --home or HPO_HOME."
        )


def require_home(home: Path) -> Path:
    """The home, if there is one: a command that only looks must not make it."""
    if not home.is_dir():
        raise UsageError(f"there is no home {home} yet; start with `hpo search`, or choose another with --home.")
    return home


def claim_files(home: Path, study: str, *, storage: str | None) -> None:
    """Note whose files the home keeps under a study's name. Raises UsageError where they are another database's."""
    require_own_files(home, study, storage=storage)
    path = _owner_file(home, study)
    try:
        write_atomically(path, _database_name(storage).encode())
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; choose another with --home or HPO_HOME.") from error


def require_own_files(home: Path, study: str, *, storage: str | None) -> None:
    """Raise UsageError where what the home keeps of a study belongs to one of that name in another database."""
    ours, owner_file = _database_name(storage), _owner_file(home, study)
    theirs = owner_file.read_text() if owner_file.exists() else ours
    if theirs != ours:
        raise UsageError(
            f"the home {home} keeps files of the study '{study}' in {theirs}, not of the one in {ours}; "
            "use another home with --home, or another name with --study."
        )


def _owner_file(home: Path, study: str) -> Path:
    return home / "locks" / f"{study}.database"


def _database_name(storage: str | None) -> str:
    return without_password(storage).partition("?")[0] if storage else "the home"


@contextmanager
def study_lock(home: Path, study: str) -> Iterator[None]:
    """Hold the study for this process; the operating system lets go of it when the process dies."""
    lock = FileLock(home / "locks" / f"{study}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UsageError(
            f"study '{study}' is being searched by another process; wait for it, or choose another name with --study."
        ) from None
    try:
        yield
    finally:
        lock.release()
