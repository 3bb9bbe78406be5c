"""Metrics of targets with a class for each position: masks, tags and transcriptions."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from hpo.data.kinds import IGNORED, read_greedily
from hpo.data.parts import Padded, values_and_lengths
from hpo.training.losses import outputs_by_position

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class MaskMetrics:
    """Mean intersection over union and Dice coefficient over the classes, and the accuracy of pixels, from a confusion
    matrix of all pixels. A class that is in no mask, neither given nor wanted, is left out."""

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self._num_classes = num_classes
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.float64, device=device)  # the last for IGNORED

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in logits (B, num_classes, H, W) and masks (B, H, W)."""
        logits, labels = outputs_by_position(outputs, targets)
        cells = labels * self._num_classes + logits.argmax(-1)
        cells = torch.where(labels == IGNORED, self._num_classes**2, cells).flatten()
        self._counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._counts = total(self._counts)

    def compute(self) -> dict[str, Tensor]:
        confusion = self._counts[:-1].view(self._num_classes, self._num_classes)
        correct, actual, given = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        num_seen = (actual + given > 0).sum()
        return {
            "mean_iou": (correct / (actual + given - correct)).nan_to_num().sum() / num_seen,
            "dice": (2 * correct / (actual + given)).nan_to_num().sum() / num_seen,
            "accuracy": correct.sum() / confusion.sum(),
        }


class TagMetrics:
    """Accuracy of elements, and perplexity: e to the mean cross-entropy of an element, without label smoothing."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, cross-entropy, elements

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in logits (B, L, num_classes) and labels (B, L)."""
        logits, labels = outputs_by_position(outputs, targets)
        is_counted = labels != IGNORED
        surprise = -logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        surprise = torch.where(is_counted, surprise, 0.0).double().sum()
        self._sums += torch.stack(((logits.argmax(-1) == labels).sum(), surprise, is_counted.sum()))

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._sums = total(self._sums)

    def compute(self) -> dict[str, Tensor]:
        right, surprise, num_elements = self._sums
        return {"accuracy": right / num_elements, "perplexity": (surprise / num_elements).exp()}


class TranscriptMetrics:
    """Character error rate (edits to get from what was read to what is written, per class written), and the share of
    transcriptions without an error. Read greedily, and compared on the CPU at the epoch's end."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._all: list[tuple[Tensor, Tensor | None, Padded]] = []

    def update(self, outputs: Any, targets: Padded) -> None:
        """Take in logits (B, T, num_classes + 1), or Padded of them, and the classes written."""
        logits, lengths = values_and_lengths(outputs)
        self._blank = logits.shape[-1] - 1
        self._all.append((logits.argmax(-1), lengths, targets))

    def compute(self) -> dict[str, Tensor]:
        from torchmetrics.functional.text import char_error_rate

        read = [text for best, lengths, _ in self._all for text in read_greedily(best, lengths, self._blank)]
        written = [
            row[:length]
            for *_, targets in self._all
            for row, length in zip(targets.values.tolist(), targets.lengths.tolist(), strict=True)
        ]
        texts, wanted = (["".join(map(chr, row)) for row in rows] for rows in (read, written))
        exact = sum(map(operator.eq, texts, wanted)) / len(wanted)
        rate = char_error_rate(texts, wanted)
        return {"character_error_rate": rate.to(self._device), "exact_match": torch.tensor(exact, device=self._device)}
