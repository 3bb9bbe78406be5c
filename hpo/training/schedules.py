"""Learning-rate schedules by name, stepped once after each optimizer step.

Step k (from 0) of `num_steps` is taken at the rate of the k-th point of the curve; after the last step the rate is at
the curve's end.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hpo.config import TrainConfig


def build_schedule(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> LRScheduler:
    """The schedule that `config` names, stretched over the `num_steps` (at least 1) of the whole training."""
    if config.schedule == "one_cycle":
        return _one_cycle(optimizer, config, num_steps)
    num_warmup_steps = min(int(config.warmup_fraction * num_steps), num_steps - 1)

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return (step + 1) / (num_warmup_steps + 1)
        if config.schedule == "constant":
            return 1.0
        return _cosine((step - num_warmup_steps) / (num_steps - num_warmup_steps))

    return LambdaLR(optimizer, factor)


def _cosine(progress: float) -> float:
    """From 1 to 0 as progress goes from 0 to 1 (SGDR without restarts, arXiv:1608.03983, equation 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _one_cycle(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> OneCycleLR:
    """Up to the peak rate over 30 % of the steps and down to nearly 0, momentum the other way round (arXiv:1708.07120).

    The momentum that the user chose is the highest; torch's ratio of lowest to highest, 0.85 to 0.95, is kept. Where
    there is a beta1 instead, it lies between the two: 0.9 gives torch's.
    """
    max_momentum = config.momentum if "momentum" in optimizer.defaults else (1 + config.beta1) / 2
    return OneCycleLR(
        optimizer,
        max_lr=config.lr,
        # One point more than there are steps: the end is where the last step leads to. With num_steps points the
        # call after the last step would leave the curve, and a single step would be taken at a rate of nearly 0.
        total_steps=num_steps + 1,
        cycle_momentum=not optimizer.defaults.keys().isdisjoint(("momentum", "betas")),  # Adagrad has neither
        max_momentum=max_momentum,
        base_momentum=max_momentum * 0.85 / 0.95,
    )
