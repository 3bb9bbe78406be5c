"""The home: the one folder below which everything that a command writes lies.

mlruns/
    mlflow.db, artifacts/    runs, curves, plots and checkpoints, as the MLflow UI shows them
    optuna.db                the studies
    checkpoints/<study>/     states of trials that are running or can be resumed
    splits/                  training and validation data of running searches, as their workers map them
    exports/<study>/         models in formats for others
    spool/                   curves on their way to MLflow
    logs/                    what the workers print
    locks/                   one lock a study: one search at a time; whose files the home keeps, and where its data lay

`Home` owns this layout: nobody else joins a path below it. A home may be moved, copied or mounted elsewhere.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout

from hpo.database import without_password
from hpo.errors import StoreError, UsageError
from hpo.files import write_atomically

_LEAST_SPACE = 20_000_000  # bytes: two empty databases and a few small checkpoints
STUDY_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def find_data_dir(given: Path | None = None) -> Path:
    """Where data sets lie: as given, else HPO_DATA_DIR, else ~/.cache/hpo/data. It need not exist yet."""
    return Path(given or os.environ.get("HPO_DATA_DIR") or Path.home() / ".cache" / "hpo" / "data").absolute()


def find_storage(given: str | None) -> str | None:
    """URL of the database of the studies: as given, else HPO_STORAGE, else None for the one in the home."""
    return given or os.environ.get("HPO_STORAGE") or None


def check_study_name(name: str) -> str:
    """The name, if it is safe as a part of a path."""
    if STUDY_NAME.fullmatch(name) is None:
        raise UsageError(
            f"'{name}' cannot name a study: use 1 to 64 letters, digits, '.', '_' or '-', a letter or digit first."
        )
    return name


@dataclass(frozen=True)
class Home:
    """The layout of a home. Nothing of it is made or read before a method is called that says so."""

    path: Path
    """Absolute."""

    @classmethod
    def find(cls, given: Path | None = None) -> Self:
        """The home as given, else HPO_HOME, else ./mlruns. It need not exist yet."""
        return cls(Path(given or os.environ.get("HPO_HOME") or "mlruns").absolute())

    @property
    def mlflow_database(self) -> Path:
        return self.path / "mlflow.db"

    @property
    def optuna_database(self) -> Path:
        return self.path / "optuna.db"

    @property
    def artifacts(self) -> Path:
        return self.path / "artifacts"

    def study(self, name: str) -> StudyFiles:
        """The files of one study."""
        return StudyFiles(self, name)

    def create(self) -> None:
        """Make the home if it is not there, and be sure that it can be used."""
        probe = self.path / "locks" / f".probe-{os.getpid()}"
        try:
            probe.parent.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise StoreError(
                f"the home {self.path} cannot be written: {error.strerror}; choose another with --home or HPO_HOME."
            ) from error
        with _readable(self.artifacts):
            if self.artifacts.is_symlink():
                self.artifacts.stat()  # it leads nowhere while a disk is not mounted, or to itself

    def require(self) -> Self:
        """The home, if there is one: a command that only looks must not make it."""
        with _readable(self.path):
            is_there = self.path.is_dir()
        if not is_there:
            raise UsageError(
                f"there is no home {self.path} yet; start with `hpo search`, or choose another with --home."
            )
        return self

    def has_studies(self) -> bool:
        """Whether a database of studies is there. Raises StoreError if this user may not look."""
        with _readable(self.path):
            return self.optuna_database.exists()

    def require_space(self, num_bytes: int) -> None:
        """Raise StoreError if the disk has no room for this much and the least that a search writes."""
        existing = next(folder for folder in (self.path, *self.path.parents) if folder.exists())
        free, needed = shutil.disk_usage(existing).free, num_bytes + _LEAST_SPACE
        if free < needed:
            raise StoreError(
                f"the home {self.path} has {free / 1e6:.0f} MB left, and a search needs {needed / 1e6:.0f} MB at "
                "least; make room, or choose another with --home or HPO_HOME."
            )


@dataclass(frozen=True)
class StudyFiles:
    """What a home keeps under the name of one study."""

    home: Home
    name: str

    @property
    def artifacts(self) -> Path:
        """Where MLflow puts the files of the study's runs, unless a server decides."""
        return self.home.artifacts / self.name

    @property
    def checkpoints(self) -> Path:
        """A folder for each trial that runs or can be resumed: `trial-0007.2` is the second attempt at trial 7."""
        return self.home.path / "checkpoints" / self.name

    @property
    def spool(self) -> Path:
        """A folder for each session, with a file for each trial that MLflow does not have yet."""
        return self.home.path / "spool" / self.name

    @property
    def logs(self) -> Path:
        """What the workers print."""
        return self.home.path / "logs" / self.name

    def splits(self, session: str) -> Path:
        """The training and validation data of a session, as its workers map them."""
        return self._splits / f"{session}.pt"

    @property
    def _splits(self) -> Path:
        return self.home.path / "splits" / self.name

    def splits_of_the_dead(self, living: Callable[[], Collection[str]]) -> list[Path]:
        """The data that sessions have left which are not among the `living`."""
        found = sorted(self._splits.glob("*.pt"))  # before the sessions: whoever has a file by now is one of them
        alive = living()
        return [file for file in found if file.stem not in alive]

    def exported(self, form: str) -> Path:
        """Where `hpo export` puts a format unless it is told."""
        return self.home.path / "exports" / self.name / form

    def trial_folders(self) -> list[tuple[int, Path]]:
        """The folders with checkpoints, and the number of the trial that each belongs to."""
        return [
            (int(folder.name.removeprefix("trial-").partition(".")[0]), folder)
            for folder in sorted(self.checkpoints.glob("trial-[0-9]*"))
        ]

    def claim_trial_folder(self, number: int, attempt: int) -> Path:
        """The folder of an attempt at a trial, with the checkpoints of the attempt before.

        Renamed, so that a worker which was cut off and keeps writing harms nothing that is read.
        """
        folder = self.checkpoints / f"trial-{number:04d}.{attempt}"
        for earlier in (folder.with_suffix(f".{before}") for before in range(attempt - 1, 0, -1)):
            if earlier.exists():
                earlier.rename(folder)
                break
        return folder

    def spool_file(self, session: str, number: int) -> Path:
        """What MLflow does not have yet of a trial."""
        return self.spool / session / f"trial-{number:04d}.jsonl"

    def is_spooled(self, number: int) -> bool:
        """Whether MLflow lacks anything of a trial, of any session."""
        return any(self.spool.glob(f"*/trial-{number:04d}.jsonl"))

    def claim(self, storage: str | None, data_dir: Path) -> None:
        """Note whose files these are, and where the data lie, for commands that are given the study's name alone.

        Raises UsageError if they are another database's.
        """
        self.require_own(storage)
        try:
            write_atomically(self._owner_file, _database_name(storage).encode())
            if data_dir == find_data_dir():
                self._data_file.unlink(missing_ok=True)
            else:
                write_atomically(self._data_file, str(data_dir).encode())
        except OSError as error:
            raise StoreError(
                f"cannot write {self._owner_file.parent}: {error.strerror}; choose another with --home or HPO_HOME."
            ) from error

    def require_own(self, storage: str | None) -> None:
        """Raise UsageError if these files belong to a study of that name in another database."""
        ours = _database_name(storage)
        with _readable(self._owner_file):
            theirs = self._owner_file.read_text(encoding="utf-8") if self._owner_file.exists() else ours
        if theirs != ours:
            raise UsageError(
                f"the home {self.home.path} keeps files of the study '{self.name}' in {theirs}, not of the one in "
                f"{ours}; use another home with --home, or another name with --study."
            )

    @property
    def _owner_file(self) -> Path:
        return self.home.path / "locks" / f"{self.name}.database"

    @property
    def data_dir(self) -> Path | None:
        """Where the data of the study lay, if a search was told with `--data-dir` and they are still there."""
        if not self._data_file.exists():
            return None
        path = Path(self._data_file.read_text(encoding="utf-8"))
        return path if path.exists() else None

    @property
    def _data_file(self) -> Path:
        return self.home.path / "locks" / f"{self.name}.data"

    def require_unlocked(self) -> None:
        """Raise UsageError if another process holds the study; nothing is written."""
        with _readable(self._lock_file):
            is_there = self._lock_file.exists()
        if is_there:
            with self.locked():
                pass

    @contextmanager
    def registering(self) -> Iterator[None]:
        """Hold the registration of the study's models for this process, and wait for another one that does."""
        lock = FileLock(self.home.path / "locks" / f"{self.name}.register.lock")
        with _readable(self._lock_file):
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @property
    def _lock_file(self) -> Path:
        return self.home.path / "locks" / f"{self.name}.lock"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the study for this process; the operating system lets go of it when the process dies."""
        lock = FileLock(self._lock_file)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise UsageError(
                f"study '{self.name}' is being searched by another process; wait for it, or choose another name with "
                "--study."
            ) from None
        except OSError as error:
            raise StoreError(
                f"cannot lock {self._lock_file}: {error.strerror}; fix it, or choose another home with --home or "
                "HPO_HOME."
            ) from error
        try:
            yield
        finally:
            lock.release()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raise StoreError if a file or folder of the home is damaged, or closed to this user."""
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise StoreError(
            f"cannot read {path}: {reason}; fix it, or choose another home with --home or HPO_HOME."
        ) from error


def _database_name(storage: str | None) -> str:
    return without_password(storage).partition("?")[0] if storage else "the home"
