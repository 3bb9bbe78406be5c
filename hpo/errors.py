"""The exceptions that a user can meet.

HpoError                    something expected went wrong; the message is for the user   (exit code 1)
├── UsageError              what was given is wrong                                       (exit code 2)
│   ├── UnknownNameError    no such task, space, study, strategy, ...; suggests a near miss
│   ├── SpaceError          a search space, one of its parameters, or a `-p` override
│   ├── StudyMismatchError  the study of that name was created with other settings
│   ├── DataError           a data set is missing or damaged
│   └── StoreError          the home or a store cannot be used, at the start or later (full disk)
│       └── OutageError     the database does not answer (hpo.search.optuna_tables)
├── CheckpointError         a checkpoint is damaged, or was not written by hpo
├── DeviceMemoryError       a training does not fit into the memory of its device
├── InfeasibleError         a model costs more than --constraint allows (hpo.execution.worker)
├── ExportError             a model cannot be exported, or its export is not equal to it
└── SearchError             the search had to stop before it was complete

TrialTakenError (hpo.search.study) is internal: another session has taken a trial over.
"""

import errno
import os
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

OF_A_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of an OSError for a disk that is full, or of which this user, or a file, may have no more."""

OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, *OF_A_FULL_DISK),
    *(errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
)
"""Numbers of an OSError for what a disk or another account's file refuses to any command, at any file."""


class HpoError(Exception):
    """Something expected went wrong; the message is one line for the user, whatever names it quotes."""

    exit_code = 1

    def __str__(self) -> str:
        return visible(super().__str__())


class UsageError(HpoError, ValueError):
    """What was given is wrong. Except for StoreError, raised before any work starts and before anything is written."""

    exit_code = 2


class UnknownNameError(UsageError):
    """No such name; suggests a near miss and lists what exists."""

    def __init__(self, kind: str, given: str, available: Iterable[str], advice: str = "") -> None:
        names = list(available)
        near = _near_miss(given, names)
        suggestion = f"; did you mean '{near}'?" if near else "."
        listing = f"Available: {', '.join(names)}." if names else f"There is no {kind} yet."
        super().__init__(" ".join(filter(None, (f"no {kind} '{given}'{suggestion}", listing, advice))))


def _near_miss(given: str, names: list[str]) -> str | None:
    """The name that was probably meant: a slip of the finger, or the initials of one another (lr, learning_rate)."""
    close = get_close_matches(given.lower(), names, n=1)
    if close:
        return close[0]
    return next((name for name in names if _initials(given) == name or _initials(name) == given), None)


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.replace("-", "_").split("_") if word)


class SpaceError(UsageError):
    """A search space, one of its parameters, or an override is wrong."""


class StudyMismatchError(UsageError):
    """A study of that name exists and was created with other settings."""


class DataError(UsageError):
    """A data set is missing or damaged; the message says how to get it."""


class StoreError(UsageError):
    """The home, or a store in it, cannot be used; a full disk or an outage can raise it during a search."""


class CheckpointError(HpoError):
    """A checkpoint is damaged, or was not written by hpo."""


class DeviceMemoryError(HpoError):
    """A training does not fit into the memory of its device."""


class ExportError(HpoError):
    """A model cannot be exported, or its export does not return what the checkpoint does."""


class SearchError(HpoError):
    """The search had to stop before it was complete."""


def disk_refusal(error: OSError, otherwise: str) -> str:
    """What the disk refused; `otherwise` says what may have been written where the system does not name the file."""
    file = error.filename2 or error.filename  # of a copy the second one is written
    advice = "; make room there" if error.errno in OF_A_FULL_DISK else ""
    return f"cannot use {os.fsdecode(file) if file else otherwise}: {error.strerror or error}{advice}"


def visible(text: str) -> str:
    """Text with escapes, as Python writes them, for what a terminal would obey or not show: line breaks, colours."""
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def in_one_line(error: BaseException) -> str:
    """What an error says, with the name of its type where it is not one of ours."""
    if isinstance(error, HpoError):
        return str(error)
    return f"{type(error).__name__}: {visible(' '.join(str(error).split()))}{place_of(error)}"


def first_line(error: object) -> str:
    """What an error of a library says, without what follows its first line."""
    return str(error).strip().partition("\n")[0]


def place_of(error: BaseException) -> str:
    """Where in a user's own code an error was raised, as ` (model.py:28)`; empty if that was in a library."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_of_library(frame.filename)]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _is_of_library(file: str) -> bool:
    paths = sysconfig.get_paths()
    libraries = (str(Path(__file__).parent), paths["stdlib"], paths["purelib"], paths["platlib"])
    return not Path(file).is_file() or any(Path(file).is_relative_to(library) for library in libraries)
