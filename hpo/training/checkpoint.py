"""Checkpoints that are either whole or not there, and are known to be undamaged before they are read.

The SHA-256 of the content is a part of the file's name, so that one atomic rename publishes both.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from hpo.errors import CheckpointError
from hpo.files import write_atomically

_logger = logging.getLogger(__name__)

WRITING_SHARE = 0.05
"""Of the time, what writing checkpoints takes, unless a write takes longer than a tenth of a second: see MAX_REST_S."""

MAX_REST_S = 2.0
"""After which the newest state is written in any case, seconds."""

_FILE_NAME = re.compile(r"epoch-(\d+)\.([0-9a-f]{64})\.pt")


class _Checkpoint(NamedTuple):
    epoch: int
    sha256: str
    path: Path


class CheckpointFolder:
    """The newest two checkpoints of a training run, `epoch-0007.<sha256>.pt`; one writer at a time owns the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, state: Mapping[str, Any], epoch: int) -> None:
        """Write the state after `epoch`, made of tensors and plain values, and delete what it supersedes.

        Raises OSError if it cannot be written, a full disk for one; the earlier checkpoints stay as they are.
        """
        content = _to_bytes(state)
        written = self.path / f"epoch-{epoch:04d}.{_sha256(content)}.pt"
        write_atomically(written, content)
        self._delete_all_but(written, epoch)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """The newest undamaged epoch and its state, tensors on the CPU; None where there is none.

        A damaged file is reported through `logging` and passed over. Raises CheckpointError for a file that is whole
        but was not written by `save`.
        """
        for checkpoint in self._newest_first():
            content = checkpoint.path.read_bytes()
            if _sha256(content) == checkpoint.sha256:
                return checkpoint.epoch, _from_bytes(content, checkpoint.path)
            _logger.warning(
                "%s is damaged and is not used; an earlier checkpoint is, if there is one.", checkpoint.path
            )
        return None

    def _newest_first(self) -> list[_Checkpoint]:
        matches = ((_FILE_NAME.fullmatch(path.name), path) for path in self.path.glob("epoch-*.pt"))
        found = [_Checkpoint(int(match[1]), match[2], path) for match, path in matches if match]
        return sorted(found, reverse=True)

    def _delete_all_but(self, written: Path, epoch: int) -> None:
        """Keep what was written and the newest before it; a file of the same epoch or a later one was damaged."""
        checkpoints = self._newest_first()
        earlier = [checkpoint.path for checkpoint in checkpoints if checkpoint.epoch < epoch]
        left_by_a_crash = self.path.glob(".epoch-*.tmp")
        for path in {checkpoint.path for checkpoint in checkpoints}.union(left_by_a_crash) - {written, *earlier[:1]}:
            path.unlink()


class CheckpointWriter:
    """Writes the newest state of a training in a thread, so that no epoch waits for the disk.

    Each epoch hands over a copy of its state, on the CPU. The thread writes the newest one and then rests, so that
    writing takes `WRITING_SHARE` of the time; but it rests for `MAX_REST_S` at most. A process that is killed loses the
    epoch under way and what was not written yet: at most `MAX_REST_S` and the time of a write. Use it as a context
    manager: leaving it writes the last state.
    """

    def __init__(self, folder: CheckpointFolder) -> None:
        self._folder = folder
        self._changed = threading.Condition()
        self._waiting: tuple[Mapping[str, Any], int] | None = None
        self._error: Exception | None = None
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name="hpo-checkpoints", daemon=True)
        self._thread.start()

    def save(self, state: Mapping[str, Any], epoch: int) -> None:
        """Hand over the state after `epoch`. Raises what writing an earlier one has raised, OSError for one."""
        copied = _copied_to_cpu(state)
        with self._changed:
            self._raise_error()
            self._waiting = copied, epoch
            self._changed.notify()

    def close(self) -> None:
        """Write the last state, and end the thread. Raises what writing has raised."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()
        self._raise_error()

    def _raise_error(self) -> None:
        error, self._error = self._error, None
        if error:
            raise error

    def _run(self) -> None:
        while job := self._next():
            started = time.monotonic()
            try:
                self._folder.save(*job)
            except Exception as error:  # raised again where the training runs
                with self._changed:
                    self._error = error
            del job  # its memory, which may be as much as the model's, is not needed while the thread rests
            self._rest(time.monotonic() - started)

    def _next(self) -> tuple[Mapping[str, Any], int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closing)
            job, self._waiting = self._waiting, None
            return job

    def _rest(self, writing_s: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, min(MAX_REST_S, writing_s * (1 / WRITING_SHARE - 1)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copied_to_cpu(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy that the training does not change; from a GPU by way of pinned memory, with a single wait."""
    devices: set[torch.device] = set()

    def copied(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            devices.add(value.device)
            target = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            return target.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {name: copied(each) for name, each in value.items()}
        return [copied(each) for each in value] if isinstance(value, list) else value

    plain: Mapping[str, Any] = copied(state)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()
    return plain


def save_weights(weights: Mapping[str, Any], path: Path) -> str:
    """Write a model's weights, on the CPU, atomically; returns the file's SHA-256, which `load_weights` asks for.

    Beside tensors, a training loop of a task's own may have plain values in them.
    """
    content = _to_bytes({name: _on_device(value, "cpu") for name, value in weights.items()})
    write_atomically(path, content)
    return _sha256(content)


def _on_device(value: Any, device: str) -> Any:
    """The value with the tensors in it, and in dictionaries, lists and tuples, moved to a device."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, Mapping):
        return {name: _on_device(each, device) for name, each in value.items()}
    return type(value)(_on_device(each, device) for each in value) if type(value) in (list, tuple) else value


def load_weights(path: Path, sha256: str, device: str = "cpu") -> dict[str, Any]:
    """The weights in a file that `save_weights` wrote, on the device.

    Raises CheckpointError if the file is missing, differs from what was written, or holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the weights cannot be loaded.")
    content = path.read_bytes()
    if _sha256(content) != sha256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is {_sha256(content)}, written was {sha256}.")
    return _from_bytes(content, path, device)


def _to_bytes(state: Mapping[str, Any]) -> bytes:
    # In memory first: torch masks the cause of a failed write, and the digest is a part of the name.
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()


def _from_bytes(content: bytes, path: Path, device: str = "cpu") -> dict[str, Any]:
    try:
        state = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except Exception as problem:  # torch raises whatever it stumbles over in foreign bytes
        raise CheckpointError(
            f"{path} was not written by hpo: it is not a file of tensors and plain values."
        ) from problem
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} was not written by hpo: it holds a {type(state).__name__}, not a dictionary.")
    return state


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
