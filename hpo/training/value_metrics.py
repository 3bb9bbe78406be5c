"""Metrics of targets that are numbers: values, boxes, or the inputs themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from hpo.data.parts import tensors_of
from hpo.training.losses import iou_of_pairs

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class RegressionMetrics:
    """MSE, RMSE, MAE and R2 in the target's units, from sums in float64; of several values the means over them.

    Targets are summed as differences to the first one, so that R2 keeps its digits where the mean is large
    beside the deviation.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._sums: Tensor | None = None  # (4,) or (4, values)
        self._num_examples = 0
        self._shift: Tensor | None = None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in outputs (B,) or (B, 1) and targets (B,), or both (B, values)."""
        targets = targets.double()
        if self._sums is None or self._shift is None:
            self._shift = targets[0]
            self._sums = torch.zeros(4, *targets.shape[1:], dtype=torch.float64, device=self._device)
        error = outputs.detach().reshape(targets.shape).double() - targets
        shifted = targets - self._shift
        sums = [error.abs().sum(0), error.square().sum(0), shifted.sum(0), shifted.square().sum(0)]
        self._sums += torch.stack(sums)
        self._num_examples += len(targets)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        assert self._sums is not None, "there are examples"
        assert self._shift is not None, "there are examples"
        num_all = int(total(torch.tensor(self._num_examples)))
        common = total(self._shift * (self._num_examples / num_all))
        # Each process has differences to a target of its own.
        change = self._shift - common
        absolute, squared, shifted, shifted_squared = self._sums
        shifted_squared = shifted_squared + 2 * change * shifted + self._num_examples * change.square()
        shifted = shifted + self._num_examples * change
        self._sums = total(torch.stack((absolute, squared, shifted, shifted_squared)))
        self._shift, self._num_examples = common, num_all

    def compute(self) -> dict[str, Tensor]:
        """R2 of targets that are all equal is 1 where every prediction is exact and 0 otherwise."""
        assert self._sums is not None, "there are examples"
        absolute, squared, shifted, shifted_squared = self._sums
        mse = squared / self._num_examples
        total = shifted_squared - shifted.square() / self._num_examples
        r2 = torch.where(total > 0, 1 - squared / total, (squared == 0).double())
        metrics = {"mse": mse, "rmse": mse.sqrt(), "mae": absolute / self._num_examples, "r2": r2}
        return {name: value.mean() for name, value in metrics.items()}


class ReconstructionMetrics:
    """MSE, RMSE and MAE of all values of the inputs, in their units."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._num_values = 0

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Take in outputs, of several tensors the first, and the inputs (B, ...)."""
        error = tensors_of(outputs)[0].detach().reshape(targets.shape).double() - targets
        self._sums += torch.stack((error.square().sum(), error.abs().sum()))
        self._num_values += targets.numel()

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._sums = total(self._sums)
        self._num_values = int(total(torch.tensor(self._num_values)))

    def compute(self) -> dict[str, Tensor]:
        mse, mae = self._sums / self._num_values
        return {"mse": mse, "rmse": mse.sqrt(), "mae": mae}


class BoxMetrics:
    """Mean intersection over union, and mean absolute error of the four numbers in pixels."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._num_examples = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in boxes (B, 4), x1 y1 x2 y2."""
        errors = (outputs - targets).abs().double().mean(1)
        self._sums += torch.stack((iou_of_pairs(outputs, targets).double().sum(), errors.sum()))
        self._num_examples += len(targets)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._sums = total(self._sums)
        self._num_examples = int(total(torch.tensor(self._num_examples)))

    def compute(self) -> dict[str, Tensor]:
        mean_iou, mae = self._sums / self._num_examples
        return {"mean_iou": mean_iou, "mae": mae}
