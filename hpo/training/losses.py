"""The losses of a training, by name; torch's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from hpo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.config import TrainConfig
    from hpo.objective import Split

LossFunction = Callable[["Tensor", "Tensor"], "Tensor"]
"""From outputs (B, num_outputs) and targets (B,) to the mean over the batch, a scalar on their device."""

CLASSIFICATION_LOSSES = ("cross_entropy",)
REGRESSION_LOSSES = ("mse",)


def loss_function(config: TrainConfig, num_classes: int, target_scale: float) -> LossFunction:
    """The loss that `config` names; `num_classes` is 0 for a regression.

    `mse` divides outputs and targets by `target_scale`, so that step sizes do not depend on the target's units:
    predicting the mean gives a loss of 1. Raises UsageError for a loss that does not fit the data.
    """
    fitting = CLASSIFICATION_LOSSES if num_classes else REGRESSION_LOSSES
    if config.loss not in fitting:
        data = f"{num_classes} classes" if num_classes else "no classes (a regression)"
        raise UsageError(f"loss '{config.loss}' does not fit data with {data}; use {' or '.join(fitting)}.")
    if config.loss == "mse":
        return partial(_scaled_mse, target_scale)
    if config.label_smoothing == 0:
        return functional.cross_entropy
    # The smoothing as a tensor: a compiled step is then the same for every trial.
    return partial(_smoothed_cross_entropy, torch.tensor(config.label_smoothing, device=config.device))


def _smoothed_cross_entropy(smoothing: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy where each class gets its part of `smoothing` (Szegedy et al. 2016, arXiv:1512.00567, 7)."""
    log_shares = functional.log_softmax(outputs, dim=1)
    return (1 - smoothing) * functional.nll_loss(log_shares, targets) - smoothing * log_shares.mean()


def target_scale(train: Split) -> float:
    """Standard deviation of a regression's training targets; 1 where they are all equal, and for class indices."""
    if not train.targets.is_floating_point():
        return 1.0
    return float(train.targets.double().std(correction=0)) or 1.0


def _scaled_mse(scale: float, outputs: Tensor, targets: Tensor) -> Tensor:
    # (B, 1) against (B,) would silently broadcast to (B, B).
    return functional.mse_loss(outputs.reshape(targets.shape) / scale, targets / scale)
