"""The weights averaged over a training, which often do better than the last ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from hpo.errors import UsageError, in_one_line
from hpo.models.copies import copy_of
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
    step changes. Raises UsageError for a model that cannot be copied.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        try:
            self.model = copy_of(model)
        except TypeError as error:
            raise UsageError(
                f"ema_decay and swa_start average a copy of the model, which cannot be copied: {in_one_line(error)}; "
                "make such objects in forward, or give the module a __deepcopy__."
            ) from error
        # Walking a deep model for its parameters takes as long as a small layer. Integers are not averaged.
        self._parameters = [p for p in self.model.parameters() if _is_averaged(p)]
        self._model_parameters = [p for p in model.parameters() if _is_averaged(p)]
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
        _take_buffers(self.model, model)
        with autocast(precision, next(model.parameters()).device):
            _renew_batch_norms(self.model, batches)
        return self.model


def _is_averaged(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def _take_buffers(model: nn.Module, other: nn.Module) -> None:
    """Give a model the buffers of another, which may have made or enlarged some since it was copied."""
    others = dict(other.named_modules())
    for path, module in model.named_modules():
        for name, buffer in others[path].named_buffers(recurse=False):
            if not hasattr(module, name):
                continue  # it belongs to a layer that a compiled step has put in
            own = getattr(module, name)
            if isinstance(own, torch.Tensor) and own.shape == buffer.shape:
                own.copy_(buffer)
            else:
                setattr(module, name, buffer.clone())


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
