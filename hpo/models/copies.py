"""Copies of modules that hold more than parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from torch import nn


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of a module. What it has computed and kept, such as the weight of `weight_norm` or a hidden state, is
    copied without its graph, which torch's own deepcopy refuses.

    Raises TypeError if something in it cannot be copied: a lock, an open file.
    """
    with _WithoutGraph():
        return deepcopy(model)


class _WithoutGraph(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
