"""The devices of this machine: which of them a search can use, and how much memory each worker may take."""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch

from hpo.errors import DeviceMemoryError, UnknownNameError, UsageError

_T = TypeVar("_T")
_logger = logging.getLogger(__name__)

CONTEXT_BYTES = 0.6e9
"""What a process has on a GPU beside torch's tensors: the context, cuBLAS, cuDNN and compiled kernels, none of which
torch's own limit counts (pytorch#58466). 0.3 to 0.6 GB."""

USABLE_SHARE = 0.95
"""Of a GPU's memory, what the workers may divide; a desktop or the driver has the rest."""

_PROBE_S = 120.0
_PROBE = """
import json, sys, torch

def reason(index):
    try:
        ones = torch.ones(2, 2, device=f"cuda:{index}")
        return None if (ones @ ones).sum().item() == 8 else "a product is wrong"
    except Exception as error:
        return f"{type(error).__name__}: {error}".partition("\\n")[0]

print(json.dumps([reason(index) for index in range(int(sys.argv[1]))]))
"""


def choose_device(given: str) -> str:
    """The device as torch names it; "auto" is a GPU if there is one that works, and says why if one does not.

    "cuda" stands for all GPUs that work, if the first one does; if it does not, "auto" is the first one that works.
    Raises UnknownNameError for a device that this machine does not have, UsageError for a GPU that cannot be used.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    available = ["auto", "cpu", *(["cuda", *gpus] if gpus else [])]
    if given not in available:
        raise UnknownNameError("device", given, available)
    if given == "cpu" or not gpus:
        return "cpu"
    reasons = why_gpus_fail()
    working = [gpu for gpu, reason in zip(gpus, reasons, strict=True) if reason is None]
    if given != "auto":
        if reason := reasons[gpus.index(given) if given in gpus else 0]:
            raise UsageError(
                f"--device {given} cannot be used: {reason}. Update the driver, install a torch build that supports "
                f"this GPU, or use --device {next(iter(working), 'cpu')}."
            )
        return given
    chosen = "cuda" if gpus[0] in working else next(iter(working), "cpu")
    for gpu, reason in zip(gpus, reasons, strict=True):
        if reason:
            _logger.warning("the GPU %s cannot be used (%s); training on %s instead", gpu, reason, chosen)
    return chosen


@cache
def why_gpus_fail() -> tuple[str | None, ...]:
    """For each GPU that the driver lists, why it cannot multiply two matrices; None if it can.

    NVML lists cards that the installed driver, or this build of torch, cannot run. It is tried in a child process,
    because workers are forked from processes that must not have a CUDA context.
    """
    num_gpus = torch.cuda.device_count()
    command = [sys.executable, "-P", "-c", _PROBE, str(num_gpus)]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PROBE_S)
        return tuple(json.loads(found.stdout))
    except subprocess.TimeoutExpired:
        reason = f"a small product took longer than {_PROBE_S:.0f} s"
    except subprocess.CalledProcessError as error:
        lines: list[str] = [line for line in error.stderr.splitlines() if line and not line[0].isspace()]
        # The last line that begins a message: torch appends hints to it, on lines of their own.
        errors = [line for line in lines if "Error: " in line]
        reason = (errors or lines or [f"it ended with code {error.returncode}"])[-1].rstrip(".")
    return (reason,) * num_gpus


def visible_gpus(device: str) -> list[str]:
    """A value of CUDA_VISIBLE_DEVICES for each GPU that a device stands for and that works; none for the CPU.

    Names in CUDA_VISIBLE_DEVICES that stand for no GPU are left out, as CUDA does. MIG slices are used where they are
    listed by their UUIDs, one for each worker; CUDA itself shows a process no more than one of them.
    """
    if device == "cpu":
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    indices = range(torch.cuda.device_count())
    names = [name.strip() for name in given.split(",")] if given else [str(index) for index in indices]
    index = torch.device(device).index
    if index is not None:
        return [names[index]]
    if names[0].startswith("MIG-"):
        return names
    return [name for name, reason in zip(names, why_gpus_fail(), strict=False) if reason is None]


def check_gpus_per_trial(given: float | None, *, gpus: Sequence[str], num_workers: int | None) -> None:
    """Raise UsageError if `--gpus-per-trial` cannot be had with these values of CUDA_VISIBLE_DEVICES."""
    if given is None:
        return
    num_gpus = len(gpus)
    require_share_or_whole(given)
    if num_gpus == 0 or given == 0:
        raise UsageError(f"--gpus-per-trial {given:g} is for GPUs, and trials run on the CPU here; omit it.")
    if given > num_gpus:
        raise UsageError(f"--gpus-per-trial {given:g} is more than there are: {num_gpus}; give at most {num_gpus}.")
    if given > 1 and gpus[0].startswith("MIG-"):
        raise UsageError(f"--gpus-per-trial {given:g} is for whole GPUs: MIG slices cannot train a trial together.")
    room = num_gpus // ranks_of_trial(given) * trials_on_gpu(given)
    if num_workers is not None and num_workers > room:
        raise UsageError(
            f"--workers {num_workers} do not fit on {num_gpus} GPUs with --gpus-per-trial {given:g}; give at most "
            f"--workers {room}."
        )


def require_share_or_whole(gpus_per_trial: float) -> None:
    """Raise UsageError unless it is 0, a share of one GPU, or a whole number of them."""
    is_share = gpus_per_trial == 0 or 0.0001 <= gpus_per_trial <= 1  # Ray counts in steps of 1/10000
    if not (is_share or (gpus_per_trial > 1 and gpus_per_trial % 1 == 0)):
        raise UsageError(
            f"--gpus-per-trial {gpus_per_trial:g} is not allowed: it must be 0, a share of one GPU from 0.0001 to 1, "
            "or a whole number of GPUs."
        )


def ranks_of_trial(gpus_per_trial: float | None) -> int:
    """How many processes train a trial, one per GPU."""
    return max(1, int(gpus_per_trial or 1))


def trials_on_gpu(gpus_per_trial: float | None) -> int:
    """How many trials share a GPU, or several of them."""
    return int(1 / gpus_per_trial + 1e-9) if gpus_per_trial and gpus_per_trial < 1 else 1


def memory_share(num_workers: int, num_gpus: int) -> float:
    """The part of a GPU that each worker may take when they are spread over the GPUs in turn; 1 for one of its own."""
    return 1 / -(-num_workers // num_gpus)


def limit_memory(share: float) -> None:
    """Let this process take its share of the current GPU's memory, context included.

    Raises DeviceMemoryError if nothing is left of the share beside the context.
    """
    _, total = torch.cuda.mem_get_info()
    limit = USABLE_SHARE * share * total - CONTEXT_BYTES
    if limit <= 0:
        raise DeviceMemoryError(
            f"{1 / share:.0f} workers do not fit on a GPU with {total / 1e9:.1f} GB: each needs "
            f"{CONTEXT_BYTES / 1e9} GB before its first tensor; use fewer --workers."
        )
    torch.cuda.set_per_process_memory_fraction(limit / total)


def wait_for(device: torch.device) -> None:
    """Return when a GPU has done all that it was given; at once for a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give back what a failed attempt has taken of a GPU's memory."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def prepare_deterministic_products() -> None:
    """Let cuBLAS compute the same in each run; torch 2.9 and cuBLAS read this once, at a process's first product."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


_ALLOCATION_FAILED = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that the device's memory is full, in the words of torch or of a library that allocates."""
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _ALLOCATION_FAILED)


def in_fitting_batches(attempt: Callable[[int], _T], batch_size: int) -> _T:
    """What `attempt` returns for a batch size, which is halved until the device's memory holds a batch.

    Raises DeviceMemoryError if it cannot hold one example.
    """
    while True:
        try:
            return attempt(batch_size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if batch_size == 1:
                raise DeviceMemoryError(
                    "out of memory (oom) while evaluating one example at a time; choose a smaller model."
                ) from None
        # Not in the handler: while it runs, the error holds the tensors of the attempt.
        batch_size = (batch_size + 1) // 2
        torch.cuda.empty_cache()
