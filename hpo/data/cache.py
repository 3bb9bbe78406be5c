"""Converted splits, kept so that originals are decoded once.

A file is `<name>.<fingerprint of the originals>.<SHA-256 of the file>.pt`: changed originals are converted again, and a
damaged file is noticed. It is written under another name and then renamed, so that processes that convert at the same
time replace each other's file by an equal one.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hpo.data.examples import Split
from hpo.files import write_atomically

_logger = logging.getLogger(__name__)


def cached_split(folder: Path, name: str, originals: Iterable[Path], convert: Callable[[], Split]) -> Split:
    """The split as it was converted before, or converted now and kept in `folder` where that can be written."""
    fingerprint = _fingerprint(originals)
    for path in sorted(folder.glob(f"{name}.{fingerprint}.*.pt")):
        split = _load(path)
        if split is not None:
            return split
    return _convert(folder, name, fingerprint, convert)


def ensure_converted(folder: Path, name: str, originals: Iterable[Path], convert: Callable[[], Split]) -> None:
    """Convert a split that will be wanted later, if it has not been: damage in its files shows now."""
    fingerprint = _fingerprint(originals)
    if not any(folder.glob(f"{name}.{fingerprint}.*.pt")):
        _convert(folder, name, fingerprint, convert)


def _convert(folder: Path, name: str, fingerprint: str, convert: Callable[[], Split]) -> Split:
    split = convert()
    try:
        _save(split, folder, name, fingerprint)
    except OSError as problem:
        _logger.warning("%s cannot be kept in %s (%s); it is converted again each time.", name, folder, problem)
    return split


def _fingerprint(originals: Iterable[Path]) -> str:
    """Changes when a file is added, removed, renamed, resized or written to."""
    digest = hashlib.sha256()
    for path in originals:
        status = path.stat()
        digest.update(f"{path.parent.name}/{path.name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _load(path: Path) -> Split | None:
    try:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != path.suffixes[-2][1:]:
                _logger.warning("%s is damaged; the originals are converted again.", path)
                return None
            file.seek(0)
            return Split(**torch.load(file, weights_only=True))
    except OSError as problem:
        _logger.warning("%s cannot be read (%s); the originals are converted again.", path, problem)
        return None


def _save(split: Split, folder: Path, name: str, fingerprint: str) -> None:
    content = io.BytesIO()
    torch.save({"inputs": split.inputs, "targets": split.targets}, content)
    digest = hashlib.sha256(content.getbuffer()).hexdigest()
    path = folder / f"{name}.{fingerprint}.{digest}.pt"
    write_atomically(path, content.getbuffer())
    for outdated in set(folder.glob(f"{name}.*.pt")) - {path}:
        outdated.unlink(missing_ok=True)
