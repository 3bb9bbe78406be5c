"""The weights averaged over a training, which often do better than the last ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from copy import deepcopy
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from hpo.training.precision import autocast

if TYPE_CHECKING:
    from torch import nn

    from hpo.config import TrainConfig
    from hpo.data.parts import Batch


class AveragedWeights:
    """A copy of a model whose parameters are the average of its own.

    Over the steps, as an exponential moving average (Polyak and Juditsky 1992, https://doi.org/10.1137/0330046;
    exponential in Tarvainen and Valpola 2017, arXiv:1703.01780); or over the ends of the epochs from one on, all alike:
    SWA (Izmailov et al. 2018, arXiv:1803.05407). torch's AveragedModel pairs buffers by their order, which a compiled
    step changes.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        self.model = deepcopy(model)
        # Walking a deep model for its parameters takes as long as a small layer.
        self._parameters = list(self.model.parameters())
        self._model_parameters = list(model.parameters())
        self.first_epoch = max(1, math.ceil(config.swa_start * config.max_epochs))
        """The first after which there is an average."""
        self._ema = get_ema_multi_avg_fn(config.ema_decay) if config.ema_decay > 0 else None  # type: ignore[no-untyped-call]
        self._swa = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]

    def end_step(self) -> None:
        """Take in the model's parameters after a step."""
        if self._ema:
            self._ema(self._parameters, self._model_parameters, None)

    def end_epoch(self, epoch: int) -> None:
        """Take in the model's parameters after an epoch, from `first_epoch` on."""
        if not self._ema:
            self._swa(self._parameters, self._model_parameters, epoch - self.first_epoch)

    @torch.no_grad()
    def settle(self, model: nn.Module, batches: Iterable[tuple[Batch, Batch]], precision: str) -> nn.Module:
        """The averaged model, ready to be measured: with the buffers of `model`, but batch norms that have seen
        `batches` through the averaged weights. Without batch norms, `batches` are not touched."""
        for name, buffer in self.model.named_buffers():
            buffer.copy_(model.get_buffer(name))
        with autocast(precision, next(model.parameters()).device):
            _renew_batch_norms(self.model, batches)
        return self.model


def _renew_batch_norms(model: nn.Module, batches: Iterable[tuple[Batch, Batch]]) -> None:
    """Recompute the statistics of batch norms in a pass over `batches`.

    It is torch's update_bn, except for frozen norms, which stay in evaluation mode and keep theirs.
    """
    model.train()
    momenta = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm) and m.training}
    if not momenta:
        return
    for norm in momenta:
        norm.reset_running_stats()
    for number, (inputs, _) in enumerate(batches, start=1):
        for norm in momenta:
            # The mean over all batches. torch's own way to it, a momentum of None, has the host wait for a GPU to tell
            # how many batches there were, in each norm of each batch.
            norm.momentum = 1 / number
        model(inputs)
    for norm, momentum in momenta.items():
        norm.momentum = momentum
