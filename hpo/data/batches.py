"""Batches of a split that lies on the device as a whole: picked by index, augmented there, without workers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpo.data.augment import Augmentation, build_augmentations
from hpo.data.mixing import Mixing
from hpo.errors import UsageError
from hpo.objective import Split


class TrainingBatches:
    """The batches of an epoch, in an order and with an augmentation that are new in each iteration.

    `order` and `augmentation` are CPU generators, drawn from at the start of an epoch only: their states between epochs
    are all that an exact resume needs. The last batch is dropped where it would be smaller.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        order: torch.Generator,
        augmentation: torch.Generator,
        augment: str,
        augment_strength: float = 0.5,
        mixing: Mixing | None = None,
        sampling: str = "uniform",
    ) -> None:
        """With a `sampling` of "balanced" each class is drawn equally often, so that rare examples are repeated."""
        if batch_size > len(split):
            raise UsageError(
                f"batch_size={batch_size} is larger than the training split of {len(split)} examples; "
                f"choose at most {len(split)}."
            )
        self._split = split
        self._batch_size = batch_size
        self._order = order
        self._augmentation = augmentation
        self._augmentations = _augmentations(augment, augment_strength, split)
        self._mixing = mixing
        if mixing:
            mixing.check(split)
        self._chances = _balanced_chances(split) if sampling == "balanced" else None

    def __len__(self) -> int:
        return len(self._split) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices, *draws in zip(*self._draw_epoch(), strict=True):
            inputs, targets = (values.index_select(0, indices) for values in (self._split.inputs, self._split.targets))
            for augmentation, drawn in zip(self._augmentations, draws, strict=False):  # the mixing's come last
                inputs = augmentation.apply(inputs, drawn)
            yield self._mixing.apply(inputs, targets, draws[-1]) if self._mixing else (inputs, targets)

    def _draw_epoch(self) -> list[tuple[Tensor, ...]]:
        """Indices, then the draws of each augmentation and of the mixing, all in batches on the device."""
        num_used = len(self) * self._batch_size
        size = self._split.inputs.shape[-2:]
        drawn = [self._draw_order()[:num_used]]
        changes: list[Augmentation | Mixing] = [*self._augmentations, *([self._mixing] if self._mixing else [])]
        drawn += [change.draw(num_used, size, self._augmentation) for change in changes]
        return [torch.split(draws.to(self._split.inputs.device), self._batch_size) for draws in drawn]

    def _draw_order(self) -> Tensor:
        if self._chances is None:
            return torch.randperm(len(self._split), generator=self._order)
        return torch.multinomial(self._chances, len(self._split), replacement=True, generator=self._order)


def _balanced_chances(split: Split) -> Tensor:
    """For each example, on the CPU, a chance with which all classes have the same."""
    if split.targets.is_floating_point():
        raise UsageError("sampling='balanced' is for classes; this task is a regression: use 'uniform'.")
    targets = split.targets.cpu()
    return (1 / torch.bincount(targets).double())[targets]


def _augmentations(augment: str, strength: float, split: Split) -> tuple[Augmentation, ...]:
    augmentations = build_augmentations(augment, strength)
    if augmentations and split.inputs.ndim != 4:
        raise UsageError(f"augment={augment!r} is for images (C, H, W); this task's examples are vectors: use 'none'.")
    return augmentations


def evaluation_batches(split: Split, batch_size: int = 2048) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once, in order; the last batch may be smaller."""
    return zip(torch.split(split.inputs, batch_size), torch.split(split.targets, batch_size), strict=True)
