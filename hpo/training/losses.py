"""The losses of a training, by name; torch's own where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from hpo.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.config import TrainConfig
    from hpo.data.examples import Split

LossFunction = Callable[["Tensor", "Tensor"], "Tensor"]
"""From outputs (B, num_outputs) and targets (B,) to the mean over the batch, a scalar on their device.

Those for classes also take targets (B, num_classes): the share that an example has of each, when examples are mixed."""

CLASSIFICATION_LOSSES = ("cross_entropy", "binary_cross_entropy", "focal")


def training_loss(config: TrainConfig, train: Split, num_classes: int) -> LossFunction:
    """The loss that is minimised: `loss_function` with the class weights that `config` asks for.

    Raises UsageError for a loss, or weights, that do not fit the data.
    """
    if config.class_weights == "none":
        return loss_function(config, num_classes, target_scale(train))
    if not num_classes:
        raise UsageError("class_weights='balanced' is for classes; this task is a regression: use 'none'.")
    weights = _balanced_weights(train, num_classes).to(config.device)
    return loss_function(config, num_classes, target_scale(train), class_weights=weights)


def loss_function(
    config: TrainConfig, num_classes: int, target_scale: float, *, class_weights: Tensor | None = None
) -> LossFunction:
    """The loss that `config` names; `num_classes` is 0 for a regression. It is what an evaluation measures.

    Those of a regression divide outputs and targets by `target_scale`, so that step sizes do not depend on the target's
    units: predicting the mean gives an `mse` of 1. Raises UsageError for a loss that does not fit the data.
    """
    fitting = CLASSIFICATION_LOSSES if num_classes else tuple(_REGRESSION_LOSSES)
    if config.loss not in fitting:
        data = f"{num_classes} classes" if num_classes else "no classes (a regression)"
        raise UsageError(f"loss '{config.loss}' does not fit data with {data}; use {' or '.join(fitting)}.")
    if not num_classes:
        # A tensor, so that a compiled step is the same for every fold.
        scale = torch.tensor(target_scale, dtype=torch.float32, device=config.device)
        return partial(_scaled, _REGRESSION_LOSSES[config.loss], scale)

    def as_tensor(value: float, *, matters: bool) -> Tensor | None:
        # A tensor, so that a compiled step is the same for every trial.
        return torch.tensor(value, device=config.device) if matters else None

    smoothing = as_tensor(config.label_smoothing, matters=config.label_smoothing > 0)
    gamma = as_tensor(config.focal_gamma, matters=config.loss == "focal")
    if config.loss == "binary_cross_entropy":
        return partial(_binary_cross_entropy, smoothing, class_weights)
    if smoothing is gamma is class_weights is None:
        return functional.cross_entropy
    return partial(_cross_entropy, smoothing, gamma, class_weights)


def _cross_entropy(
    smoothing: Tensor | None, gamma: Tensor | None, class_weights: Tensor | None, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy, changed by what is given.

    Smoothing: each class gets its part of the target (Szegedy et al. 2016, arXiv:1512.00567, section 7). Gamma: an
    example counts with the power of what its class lacks to a share of 1 (Lin et al. 2017, arXiv:1708.02002, equation
    4). Weights (num_classes,): an example counts with its class's. An example of several classes has their losses by
    its shares. The mean is over the examples, not their weights, so that half a batch is half of a batch's gradient.
    """
    log_shares = functional.log_softmax(outputs.float(), dim=1)  # autocast leaves some of these operations in fp16
    losses = surprise = -log_shares  # (B, num_classes), for each class as if it were the right one
    if smoothing is not None:
        losses = (1 - smoothing) * surprise - smoothing * log_shares.mean(1, keepdim=True)
    if gamma is not None:
        # Kept off 0, where the power's slope is infinite for a gamma below 1.
        losses = losses * (-torch.expm1(-surprise)).clamp(min=1e-6) ** gamma
    if class_weights is not None:
        losses = losses * class_weights
    if targets.is_floating_point():
        return (losses * targets).sum(1).mean()
    return losses.gather(1, targets[:, None]).mean()


def _binary_cross_entropy(
    smoothing: Tensor | None, class_weights: Tensor | None, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Each class against all others, a sigmoid for each logit; the mean over classes and examples.

    For ImageNet in Wightman et al. 2021, arXiv:2110.00476. Smoothing is that of `_cross_entropy`, and an example counts
    with its class's weight, or with the mean of several by its shares.
    """
    shares = targets
    if not targets.is_floating_point():
        shares = torch.zeros_like(outputs, dtype=torch.float32).scatter(1, targets[:, None], 1.0)
    wanted = shares if smoothing is None else (1 - smoothing) * shares + smoothing / outputs.shape[1]
    losses = functional.binary_cross_entropy_with_logits(outputs.float(), wanted, reduction="none").mean(1)  # (B,)
    return losses.mean() if class_weights is None else (losses * (shares * class_weights).sum(1)).mean()


def _balanced_weights(train: Split, num_classes: int) -> Tensor:
    """Weights (num_classes,) with which all classes count alike and an example 1 in the mean.

    King and Zeng 2001, https://doi.org/10.1093/oxfordjournals.pan.a004868; scikit-learn's "balanced".
    """
    counts = torch.bincount(train.targets, minlength=num_classes)
    return len(train) / (num_classes * counts.clamp(min=1).float())


def target_scale(train: Split) -> float:
    """Standard deviation of a regression's training targets; 1 where they are all equal, and for class indices."""
    if not train.targets.is_floating_point():
        return 1.0
    return float(train.targets.double().std(correction=0)) or 1.0


def _scaled(loss: LossFunction, scale: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    # (B, 1) against (B,) would silently broadcast to (B, B).
    return loss(outputs.reshape(targets.shape).float() / scale, targets / scale)


def _log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """The logarithm of the error's hyperbolic cosine, without overflow (Saleh and Saleh 2022, arXiv:2208.04564)."""
    error = outputs - targets
    return (error + functional.softplus(-2 * error) - math.log(2)).mean()


_REGRESSION_LOSSES: dict[str, LossFunction] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,  # Huber 1964, https://doi.org/10.1214/aoms/1177703732, quadratic up to 1
    "log_cosh": _log_cosh,
}
