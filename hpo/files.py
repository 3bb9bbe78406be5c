"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from hpo.errors import StoreError

MAX_SOCKET_FOLDER = 70
"""Bytes of a folder's path that leave room for multiprocessing's own names: a socket's address has 104 on macOS, 108 on
Linux."""

_CHUNK = 2**20


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name, make sure of it on the disk, and rename it; folders are made.

    Processes that write the same file replace each other's. Raises OSError if it cannot be written, a full disk for
    one; what was there before then stays as it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _fsync_folder(path.parent)


def size_of(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def temporary_folder() -> TemporaryDirectory[str]:
    """A new folder in the system's temporary one, removed at the end of the block. Raises StoreError without one."""
    require_temporary_folder()
    return TemporaryDirectory()


def require_temporary_folder() -> None:
    """Raise StoreError if no temporary folder can be written: neither TMPDIR nor the system's own."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        given = f" (TMPDIR={os.environ['TMPDIR']})" if os.environ.get("TMPDIR") else ""
        raise StoreError(
            f"there is no temporary folder that can be written{given}; set TMPDIR to a folder that can."
        ) from error


@contextmanager
def temporary_folder_for_sockets() -> Iterator[None]:
    """Let multiprocessing put its sockets where their addresses fit: a long TMPDIR makes them too long.

    Raises StoreError if no folder does.
    """
    require_temporary_folder()
    before = tempfile.tempdir
    for folder in (tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm"):
        if len(os.fsencode(folder)) <= MAX_SOCKET_FOLDER and os.access(folder, os.W_OK | os.X_OK):
            break
    else:
        raise StoreError(
            f"the temporary folder {before} has a path of more than {MAX_SOCKET_FOLDER} bytes, which sockets cannot "
            "have, and /tmp cannot be written; set TMPDIR to a folder with a shorter path."
        )
    tempfile.tempdir = folder
    try:
        yield
    finally:
        tempfile.tempdir = before


def allocate(descriptor: int, num_bytes: int) -> None:
    """Reserve room on the disk for a file that will be mapped: on a full disk, writing to its map would kill us.

    Raises OSError if there is too little.
    """
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)
        return
    except AttributeError:  # macOS has no such call
        pass
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # nor has each file system
            raise
    for start in range(0, num_bytes, _CHUNK):
        os.pwrite(descriptor, bytes(min(_CHUNK, num_bytes - start)), start)


def keep_end(path: Path, max_bytes: int) -> None:
    """Cut a text file that has grown beyond `max_bytes` to its second half; processes may append to it meanwhile.

    What they write at that moment may be lost.
    """
    if not path.exists() or path.stat().st_size <= max_bytes:
        return
    with path.open("r+b") as file:
        file.seek(-(max_bytes // 2), os.SEEK_END)
        end = file.read().partition(b"\n")[2]
        file.seek(0)
        file.write(b"... (the beginning was cut)\n" + end)
        file.truncate()


def _fsync_folder(folder: Path) -> None:
    """Make the rename itself survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
