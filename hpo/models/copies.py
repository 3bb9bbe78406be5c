"""Copies of modules that hold more than parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy of a module. What it has computed and kept, such as the weight of `weight_norm` or a hidden state, is
    copied without its graph, which torch's own deepcopy refuses.

    Raises TypeError if something in it cannot be copied: a lock, an open file.
    """
    with _WithoutGraph():
        copied = deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # cuDNN wants its weights in one piece, which deepcopy has taken apart
    return copied


class _WithoutGraph(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))
