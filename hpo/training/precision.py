"""In what type a training multiplies: fp32, or half of it where the hardware gains from that."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpo.data.parts import tensors_of
from hpo.errors import UsageError, in_one_line
from hpo.training.device import is_out_of_memory, wait_for

if TYPE_CHECKING:
    from hpo.training.losses import LossFunction

_logger = logging.getLogger(__name__)

_fastest: dict[tuple[str, tuple[tuple[int, ...], ...], str], str] = {}
"""What was measured in this process, by architecture, shape of the batch and device."""

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def settle_precision(
    wanted: str, model: nn.Module, loss_function: LossFunction, batch: Callable[[], tuple[Any, Any]]
) -> str:
    """`wanted`, or for "auto" the faster of fp32 and bf16, which is measured for models with convolutions.

    Convolutions are bound by arithmetic, and bf16 has fp32's range, so it needs no scaling. Small linear layers are
    bound by everything else: they stay in fp32. bf16 is not always faster, even where the processor has instructions
    for it. So a few passes over what `batch` returns, examples (B, ...) with targets (B,), are timed, and the result is
    kept for the next model of the same architecture and batch. The model, its gradients and the random state are left
    as they were. fp32 wins where bf16 gains less than 5%, and if the model does not run in bf16, which is logged.

    Raises UsageError for fp16 with complex parameters, whose gradients torch cannot scale.
    """
    if wanted == "fp16" and any(parameter.is_complex() for parameter in model.parameters()):
        raise UsageError("--precision fp16 does not work with complex parameters; use bf16 or fp32.")
    if wanted != "auto":
        return wanted
    if not (has_convolutions(model) and _multiplies_bf16(next(model.parameters()).device)):
        return "fp32"
    inputs, targets = batch()
    device = next(model.parameters()).device
    key = (str(model), tuple(tuple(tensor.shape) for tensor in tensors_of(inputs)), str(device))
    if key not in _fastest:
        try:
            _fastest[key] = _measure_fastest(model, loss_function, inputs, targets)
        except RuntimeError as error:
            if is_out_of_memory(error):
                return "bf16"  # it needs half of the memory
            # An operation that does not exist in bf16, such as an FFT on a GPU.
            _logger.warning("the model does not run in bf16 and is trained in fp32: %s", in_one_line(error)[:200])
            _fastest[key] = "fp32"
    return _fastest[key]


def _measure_fastest(model: nn.Module, loss_function: LossFunction, inputs: Any, targets: Any) -> str:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    was_training, device = model.training, next(model.parameters()).device
    model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            # In turn, so that what else the machine does falls on both; the first pass of each is not counted.
            seconds = [
                [_seconds_a_pass(model, loss_function, inputs, targets, precision) for precision in ("fp32", "bf16")]
                for _ in range(3)
            ]
    finally:
        model.train(was_training)
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    fp32, bf16 = (min(times[1:]) for times in zip(*seconds, strict=True))
    return "bf16" if bf16 < 0.95 * fp32 else "fp32"


def _seconds_a_pass(model: nn.Module, loss_function: LossFunction, inputs: Any, targets: Any, precision: str) -> float:
    """The time of a forward and a backward pass."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = weights[0].device
    wait_for(device)
    started = time.perf_counter()
    with autocast(precision, device):
        loss = loss_function(model(inputs), targets)
    torch.autograd.grad(loss, weights, allow_unused=True)
    wait_for(device)
    return time.perf_counter() - started


def has_convolutions(model: nn.Module) -> bool:
    """Whether the model has a 2d convolution, which is fastest with channels last in memory."""
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def _multiplies_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def autocast(precision: str, device: torch.device | str) -> AbstractContextManager[None]:
    """Run what gains from it in `precision`; weights, sums and losses stay in fp32. Nothing changes for "fp32"."""
    half = _HALF.get(precision)
    return torch.autocast(torch.device(device).type, dtype=half) if half else nullcontext()
