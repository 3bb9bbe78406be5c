"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from uuid import uuid4

_CHUNK = 2**20


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file under another name, make sure of it on the disk, and rename it; folders are made.

    Processes that write the same file replace each other's. Raises OSError where it cannot be written, a full disk for
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


def allocate(descriptor: int, num_bytes: int) -> None:
    """Reserve room on the disk for a file that will be mapped: on a full disk, writing to its map would kill us.

    Raises OSError where there is too little.
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


def _fsync_folder(folder: Path) -> None:
    """Make the rename itself survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
