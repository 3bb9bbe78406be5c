"""When to stop, and which epoch was the best."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.config import Direction


class EarlyStopping:
    """Knows the best epoch, and stops after `patience` epochs without improvement.

    Two thresholds are kept apart. The best epoch, whose weights are kept, is any strict improvement on the best so far.
    An improvement in the sense of `patience` must gain at least `min_delta` on the last value that was one, so many
    small gains add up. The first `stop_after` epochs never stop the training. A value that is not finite is worse than
    anything: it is never the best, and always an epoch without improvement.
    """

    def __init__(self, direction: Direction, *, patience: int, min_delta: float = 0.0, stop_after: int = 0) -> None:
        self.direction = direction
        self.patience = patience
        self.min_delta = min_delta
        self.stop_after = stop_after
        self.best_value: float | None = None
        self.best_epoch: int | None = None
        self._epoch = 0
        self._improved_value: float | None = None
        self._improved_epoch = 0

    def update(self, epoch: int, value: float) -> bool:
        """Take in the value of an epoch (from 1); returns whether it is the best so far."""
        self._epoch = epoch
        if not math.isfinite(value):
            return False
        gain = self._gain(value, self._improved_value)
        if gain > 0 and gain >= self.min_delta:
            self._improved_value, self._improved_epoch = value, epoch
        if self._gain(value, self.best_value) <= 0:
            return False
        self.best_value, self.best_epoch = value, epoch
        return True

    @property
    def should_stop(self) -> bool:
        return self._epoch > self.stop_after and self._epoch - self._improved_epoch >= self.patience

    def _gain(self, value: float, reference: float | None) -> float:
        if reference is None:
            return math.inf
        return self.direction.gain(value, over=reference)

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "direction"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: value for name, value in state.items() if name != "direction"})
