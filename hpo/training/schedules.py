"""Learning-rate schedules by name, stepped once after each optimizer step.

Step k (from 0) of `num_steps` is taken at the rate of the k-th point of the curve; after the last step the rate is at
the curve's end. Each but one-cycle may begin with a linear warm-up (Goyal et al. 2017, arXiv:1706.02677, section 2.2).

A training computes the points of an epoch before its first step. torch's schedulers compute each in its step, which
takes as long as a small layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.optim.lr_scheduler import ReduceLROnPlateau

from hpo.config import Direction
from hpo.methods import SCHEDULES

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from hpo.config import TrainConfig


class Point(NamedTuple):
    """Where the curve is at a step."""

    rates: tuple[float, ...]
    """The learning rate of each group of parameters."""

    momentum: float | None
    """The momentum, or beta1, of all groups; None if the schedule does not change it."""


def build_schedule(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Schedule | Plateau:
    """The schedule that `config` names, stretched over the `num_steps` (at least 1) of the whole training."""
    built: Schedule | Plateau = SCHEDULES[config.schedule].load()(optimizer, config, num_steps)
    return built


class Schedule:
    """Sets the rates of an optimizer's groups, and their momentum where it varies, for the step that comes next."""

    def __init__(
        self,
        optimizer: Optimizer,
        num_steps: int,
        rate: Callable[[float, int], float],
        momentum: Callable[[int], float] | None = None,
    ) -> None:
        """`rate` computes a group's rate from its peak, which is the one that it has now, and the step.

        `momentum` computes the momentum of all groups, or their beta1, at a step.
        """
        self._optimizer = optimizer
        self._num_steps = num_steps
        self._rate, self._momentum = rate, momentum
        self._peaks = [group["lr"] for group in optimizer.param_groups]
        self._has_betas = "momentum" not in optimizer.defaults
        self._points: list[Point] = []
        self._first = 0  # the step that the first of them is for
        self.num_steps_done = 0
        self._set(self._point(0))

    def step(self) -> None:
        """Move on to the next step."""
        self.num_steps_done += 1
        self._set(self._point(self.num_steps_done))

    def compute_ahead(self, num_steps: int) -> list[Point]:
        """The points of the next steps, from the one that is set now; they are kept for `step`."""
        self._first = self.num_steps_done
        self._points = [self._computed(self._first + index) for index in range(num_steps + 1)]
        return self._points[:-1]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.num_steps_done}  # as torch's schedulers name it

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the steps that were made; the optimizer's state has the rates."""
        self.num_steps_done = state["last_epoch"]

    def _point(self, step: int) -> Point:
        index = step - self._first
        return self._points[index] if 0 <= index < len(self._points) else self._computed(step)

    def _computed(self, step: int) -> Point:
        step = min(step, self._num_steps)  # the curve's end
        by_peak = {peak: self._rate(peak, step) for peak in self._peaks}
        momentum = self._momentum(step) if self._momentum else None
        return Point(tuple(by_peak[peak] for peak in self._peaks), momentum)

    def _set(self, point: Point) -> None:
        for group, rate in zip(self._optimizer.param_groups, point.rates, strict=True):
            group["lr"] = rate
            if point.momentum is None:
                continue
            if self._has_betas:
                group["betas"] = (point.momentum, *group["betas"][1:])
            else:
                group["momentum"] = point.momentum


class Plateau:
    """Multiplies the rate by `decay_factor` after `plateau_patience` epochs in which the metric did not improve.

    torch's ReduceLROnPlateau behind a linear warm-up, whose epochs do not count.
    """

    def __init__(self, optimizer: Optimizer, config: TrainConfig, num_warmup_steps: int) -> None:
        self._optimizer = optimizer
        self._num_warmup_steps = num_warmup_steps
        self._warmup = Schedule(optimizer, num_warmup_steps, lambda peak, step: peak * _rise(step, num_warmup_steps))
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
        return self._warmup.num_steps_done >= self._num_warmup_steps

    def step(self) -> None:
        if not self._is_warm:
            self._warmup.step()

    def compute_ahead(self, num_steps: int) -> list[Point]:
        """The points of the next steps, from the one that is set now, if none of them ends an epoch."""
        if not self._is_warm:
            return self._warmup.compute_ahead(num_steps)
        return [Point(tuple(group["lr"] for group in self._optimizer.param_groups), None)] * num_steps

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


# What builds each schedule, by its name in hpo.methods.


def constant(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Schedule:
    return _warmed_up(optimizer, config, num_steps, lambda step, num_steps: 1.0)


def step(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Schedule:
    """Falls at one half and at three quarters, as in He et al. 2016, arXiv:1512.03385, section 4.2."""

    def fall(step: int, num_steps: int) -> float:
        return math.pow(config.decay_factor, (step / num_steps >= 0.5) + (step / num_steps >= 0.75))

    return _warmed_up(optimizer, config, num_steps, fall)


def exponential(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Schedule:
    return _warmed_up(
        optimizer, config, num_steps, lambda step, num_steps: math.pow(config.decay_factor, step / num_steps)
    )


def cosine(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Schedule:
    return _warmed_up(optimizer, config, num_steps, lambda step, num_steps: _cosine(step / num_steps))


def cosine_restarts(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Schedule:
    def fall(step: int, num_steps: int) -> float:
        return _cosine(_progress_in_cycle(step, num_steps, config.num_cycles))

    return _warmed_up(optimizer, config, num_steps, fall)


def plateau(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Plateau:
    return Plateau(optimizer, config, _num_warmup_steps(config, num_steps))


def _warmed_up(
    optimizer: Optimizer, config: TrainConfig, num_steps: int, fall: Callable[[int, int], float]
) -> Schedule:
    """A linear warm-up, then `fall`: the share of the peak at a step after it, of that many."""
    num_warmup_steps = _num_warmup_steps(config, num_steps)

    def rate(peak: float, step: int) -> float:
        if step < num_warmup_steps:
            return peak * _rise(step, num_warmup_steps)
        return peak * fall(step - num_warmup_steps, num_steps - num_warmup_steps)

    return Schedule(optimizer, num_steps, rate)


def _num_warmup_steps(config: TrainConfig, num_steps: int) -> int:
    return min(int(config.warmup_fraction * num_steps), num_steps - 1)


def _cosine(progress: float) -> float:
    """From 1 to 0 as progress goes from 0 to 1 (SGDR, Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5)."""
    return (1 + math.cos(math.pi * progress)) / 2


def _progress_in_cycle(step: int, num_steps: int, num_cycles: int) -> float:
    """Where a step lies in its cycle, of cycles that double their length (SGDR with T_mult = 2), the last one ending
    with the training."""
    units = step * ((1 << num_cycles) - 1)  # a step is that many of the num_steps units that the first cycle has
    cycle = min((units // num_steps + 1).bit_length() - 1, num_cycles - 1)
    return (units - ((1 << cycle) - 1) * num_steps) / ((1 << cycle) * num_steps)


def one_cycle(optimizer: Optimizer, config: TrainConfig, num_steps: int) -> Schedule:
    """Up to the peak rate over 30% of the steps and down to nearly 0, momentum the other way round (arXiv:1708.07120).

    The points are those of torch's OneCycleLR with `num_steps + 1` of them, so that the last step leads to the end. The
    momentum that the user chose is the highest; torch's ratio of lowest to highest, 0.85 to 0.95, is kept. If there is
    a beta1 instead, it lies between the two: 0.9 gives torch's.
    """
    highest = config.momentum if "momentum" in optimizer.defaults else (1 + config.beta1) / 2
    lowest = highest * 0.85 / 0.95
    top = 0.3 * (num_steps + 1) - 1  # the step of the peak, which may lie between two steps

    def between(first: float, peak: float, last: float, step: int) -> float:
        if step <= top:
            return _annealed(first, peak, step / top)
        return _annealed(peak, last, (step - top) / (num_steps - top))

    varies = not optimizer.defaults.keys().isdisjoint(("momentum", "betas"))  # Adagrad has neither
    return Schedule(
        optimizer,
        num_steps,
        rate=lambda peak, step: between(peak / 25, peak, peak / 25 / 1e4, step),
        momentum=(lambda step: between(highest, lowest, highest, step)) if varies else None,
    )


def _annealed(start: float, end: float, progress: float) -> float:
    """From start to end along half a cosine."""
    return end + (start - end) / 2 * (math.cos(math.pi * progress) + 1)
