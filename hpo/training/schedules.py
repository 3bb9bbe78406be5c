"""Learning-rate schedules by name, stepped once after each optimizer step.

Step k (from 0) of `num_steps` is taken at the rate of the k-th point of the curve; after the last step the rate is at
the curve's end. Each but one-cycle may begin with a linear warm-up (Goyal et al. 2017, arXiv:1706.02677, section 2.2).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, ReduceLROnPlateau

from hpo.config import Direction

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hpo.config import TrainConfig


def build_schedule(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> LRScheduler | Plateau:
    """The schedule that `config` names, stretched over the `num_steps` (at least 1) of the whole training."""
    if config.schedule == "one_cycle":
        return _one_cycle(optimizer, config, num_steps)
    num_warmup_steps = min(int(config.warmup_fraction * num_steps), num_steps - 1)
    if config.schedule == "plateau":
        return Plateau(optimizer, config, num_warmup_steps)

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return _rise(step, num_warmup_steps)
        return _fall(config, step - num_warmup_steps, num_steps - num_warmup_steps)

    return LambdaLR(optimizer, factor)


class Plateau:
    """Multiplies the rate by `decay_factor` after `plateau_patience` epochs in which the metric did not improve.

    torch's ReduceLROnPlateau behind a linear warm-up, whose epochs do not count.
    """

    def __init__(self, optimizer: Optimizer, config: TrainConfig, num_warmup_steps: int) -> None:
        self._num_warmup_steps = num_warmup_steps
        self._warmup = LambdaLR(optimizer, lambda step: _rise(step, num_warmup_steps))
        self._reduction = ReduceLROnPlateau(
            optimizer,
            mode="max" if config.direction is Direction.MAXIMIZE else "min",
            factor=config.decay_factor,
            patience=config.plateau_patience - 1,  # torch's is the number that is still borne
            threshold=config.min_delta,
            threshold_mode="abs",
        )

    @property
    def _is_warm(self) -> bool:
        return self._warmup.last_epoch >= self._num_warmup_steps

    def step(self) -> None:
        if not self._is_warm:
            self._warmup.step()

    def end_epoch(self, value: float) -> None:
        """Take in the metric that decides, on the validation split."""
        if self._is_warm:
            self._reduction.step(value)

    def state_dict(self) -> dict[str, Any]:
        return {"warmup": self._warmup.state_dict(), "reduction": self._reduction.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._warmup.load_state_dict(state["warmup"])
        self._reduction.load_state_dict(state["reduction"])


def _rise(step: int, num_steps: int) -> float:
    """The part of the peak at a step of the warm-up; 1 at its end."""
    return (step + 1) / (num_steps + 1)


def _fall(config: TrainConfig, step: int, num_steps: int) -> float:
    """The part of the peak at a step after the warm-up, from 1 at step 0 to the curve's end at `num_steps`."""
    progress = step / num_steps
    match config.schedule:
        case "constant":
            return 1.0
        case "step":
            # At one half and at three quarters, as He et al. 2016, arXiv:1512.03385, section 4.2.
            return math.pow(config.decay_factor, (progress >= 0.5) + (progress >= 0.75))
        case "exponential":
            return math.pow(config.decay_factor, progress)
        case "cosine":
            return _cosine(progress)
        case "cosine_restarts":
            return _cosine(_progress_in_cycle(step, num_steps, config.num_cycles))
    raise AssertionError(f"TrainConfig let schedule {config.schedule!r} pass")


def _cosine(progress: float) -> float:
    """From 1 to 0 as progress goes from 0 to 1 (SGDR, Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _progress_in_cycle(step: int, num_steps: int, num_cycles: int) -> float:
    """Where a step lies in its cycle, of cycles that double their length (SGDR with T_mult = 2), the last one ending
    with the training."""
    units = step * ((1 << num_cycles) - 1)  # a step is that many of the num_steps units that the first cycle has
    cycle = min((units // num_steps + 1).bit_length() - 1, num_cycles - 1)
    return (units - ((1 << cycle) - 1) * num_steps) / ((1 << cycle) * num_steps)


def _one_cycle(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> OneCycleLR:
    """Up to the peak rate over 30 % of the steps and down to nearly 0, momentum the other way round (arXiv:1708.07120).

    The momentum that the user chose is the highest; torch's ratio of lowest to highest, 0.85 to 0.95, is kept. Where
    there is a beta1 instead, it lies between the two: 0.9 gives torch's.
    """
    max_momentum = config.momentum if "momentum" in optimizer.defaults else (1 + config.beta1) / 2
    return OneCycleLR(
        optimizer,
        max_lr=[group["lr"] for group in optimizer.param_groups],
        # One point more than there are steps: the end is where the last step leads to. With num_steps points the
        # call after the last step would leave the curve, and a single step would be taken at a rate of nearly 0.
        total_steps=num_steps + 1,
        cycle_momentum=not optimizer.defaults.keys().isdisjoint(("momentum", "betas")),  # Adagrad has neither
        max_momentum=max_momentum,
        base_momentum=max_momentum * 0.85 / 0.95,
    )
