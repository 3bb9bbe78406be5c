"""Optimizers by name; torch's own, fused where torch has a fused kernel (SGD, Adam and AdamW)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import optim

if TYPE_CHECKING:
    from torch import nn

    from hpo.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> optim.Optimizer:
    """The optimizer that `config` names, over all parameters of `model`, which must be on its device already."""
    groups = _parameter_groups(model, config.weight_decay)
    match config.optimizer:
        case "sgd":
            nesterov = config.nesterov and config.momentum > 0
            return optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        case "adam":
            return optim.Adam(groups, lr=config.lr, fused=True)
        case "adamw":
            return optim.AdamW(groups, lr=config.lr, fused=True)
        case "nadam":
            return optim.NAdam(groups, lr=config.lr)
        case "rmsprop":
            return optim.RMSprop(groups, lr=config.lr, momentum=config.momentum)
    raise AssertionError(f"TrainConfig let optimizer {config.optimizer!r} pass")


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay; biases and the parameters of norms (one dimension or none) without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
