"""The weights averaged over the steps of a training, which often do better than the last ones."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn, update_bn

from hpo.training.precision import autocast

if TYPE_CHECKING:
    from torch import Tensor, nn


class AveragedWeights:
    """A copy of a model whose parameters follow its own as an exponential moving average.

    Polyak and Juditsky 1992, https://doi.org/10.1137/0330046; exponential in Tarvainen and Valpola 2017,
    arXiv:1703.01780. torch's AveragedModel pairs buffers by their order, which a compiled step changes.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = deepcopy(model)
        self._average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

    def update(self, model: nn.Module) -> None:
        """Take in the parameters after a step."""
        self._average(list(self.model.parameters()), list(model.parameters()), None)

    @torch.no_grad()
    def settle(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: str) -> nn.Module:
        """The averaged model, ready to be measured: with the buffers of `model`, but batch norms that have seen
        `batches` through the averaged weights. Without batch norms, `batches` are not touched."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(model.get_buffer(name))
        with autocast(precision, next(model.parameters()).device):
            update_bn(batches, self.model)
        return self.model
