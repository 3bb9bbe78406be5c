"""In what type a training multiplies: fp32, or half of it where the hardware gains from that."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import nn

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def settle_precision(wanted: str, model: nn.Module, device: torch.device | str) -> str:
    """`wanted`, or for "auto" what pays: bf16 for models with convolutions where the device multiplies it, else fp32.

    Convolutions are bound by arithmetic, and bf16 has fp32's range, so it needs no scaling. Small linear layers are
    bound by everything else. A processor without instructions for bf16 emulates it, several times slower than fp32.
    """
    if wanted != "auto":
        return wanted
    return "bf16" if has_convolutions(model) and _multiplies_bf16(torch.device(device)) else "fp32"


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
    return torch.autocast(torch.device(device).type, dtype=half, enabled=half is not None)
