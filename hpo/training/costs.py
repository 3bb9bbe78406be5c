"""What a model costs: objectives beside its metric, each of which is better when smaller."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

    from hpo.data.parts import Batch


TIMING_S = 0.2
"""Seconds of passes that a latency is the median of."""


def measure_costs(model: nn.Module, example: Batch, names: Iterable[str]) -> dict[str, float]:
    """The named costs (hpo.config.COSTS) of a model in evaluation mode; `example` is a batch of one, on its device.

    params   trainable parameters
    latency  milliseconds of a forward pass of the example: the median of `TIMING_S` of passes, after warming up
    """
    return {name: _COSTS[name](model, example) for name in names}


def _count_parameters(model: nn.Module, example: Batch) -> float:
    network = getattr(model, "network", model)  # without a loss's own parameters
    return float(sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad))


@torch.no_grad()
def _measure_latency(model: nn.Module, example: Batch) -> float:
    from torch.utils.benchmark import Timer  # it looks for compilers, and says what it misses

    timer = Timer("model(example)", globals={"model": model, "example": example}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=TIMING_S).median * 1000


_COSTS = {"params": _count_parameters, "latency": _measure_latency}
