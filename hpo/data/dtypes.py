"""Types of tensors that are replaced by others, because torch or numpy can do little with them."""

from __future__ import annotations

import torch
from torch import Tensor

_REPLACED = {
    torch.float64: torch.float32,
    torch.bfloat16: torch.float32,  # which numpy does not have
    torch.uint16: torch.int32,  # of which torch 2.15 has no maximum
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
}


def of_usual_type(values: Tensor) -> Tensor:
    """The same values as float32, int32 or int64 where their type is rarely supported; else the tensor itself."""
    return values.to(_REPLACED.get(values.dtype, values.dtype))
