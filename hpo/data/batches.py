"""Batches of a split, picked by index and augmented on the device, without workers.

A split lies on the device as a whole where its memory allows. Else it stays where it is, in memory or in a file, and
its batches are streamed: the same batches, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpo.data.augment import Augmentation, build_augmentations
from hpo.data.examples import Split
from hpo.data.mixing import Mixing, build_mixing
from hpo.errors import UsageError

if TYPE_CHECKING:
    from hpo.config import TrainConfig
    from hpo.data.datasets import Splits
    from hpo.data.mapped import MappedImages

DEVICE_SHARE = 0.5
"""Of the device's free memory, what splits that stay there may take."""

_SMALL_EXAMPLE = 3 * 32 * 32  # values
_Rows = Tensor | slice


def place(splits: Splits, device: torch.device | str) -> Splits:
    """The splits on the device, where they leave it room to train; else as they are, to be streamed."""
    wanted, there = torch.device(device), splits.train.targets.device
    if there.type == wanted.type and wanted.index in (None, there.index):
        return splits
    is_mapped = not all(isinstance(split.inputs, Tensor) for split in (splits.train, splits.validation))
    if is_mapped or splits.num_bytes > DEVICE_SHARE * _free_memory(torch.device(device)):
        return splits
    try:
        return splits.to(device)
    except torch.OutOfMemoryError:  # another process was faster, or the memory lies in pieces
        torch.cuda.empty_cache()
        return splits


def _free_memory(device: torch.device) -> float:
    """Bytes that this process may still take; on a CPU what is in memory is on the device already."""
    if device.type != "cuda":
        return float("inf")
    # Some of these functions refuse a device without an index.
    index = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(index)
    reserved = torch.cuda.memory_reserved(index)
    own_limit = torch.cuda.get_per_process_memory_fraction(index) * total - reserved
    return min(free, own_limit) + reserved - torch.cuda.memory_allocated(index)


class TrainingBatches:
    """The batches of an epoch, in an order and with an augmentation that are new in each iteration.

    `order` and `augmentation` are CPU generators, drawn from at the start of an epoch only: their states between epochs
    are all that an exact resume needs, with `epoch`, the number of the epoch, from 1, which the caller sets. The last
    batch is dropped where it would be smaller.
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
        device: torch.device | str | None = None,
    ) -> None:
        """With a `sampling` of "balanced" each class is drawn equally often, so that rare examples are repeated.

        The batches are on `device`, by default where the split is.
        """
        if batch_size > len(split):
            raise UsageError(
                f"batch_size={batch_size} is larger than the training split of {len(split)} examples; "
                f"choose at most {len(split)}."
            )
        self.epoch = 1
        self._split = split
        self._batch_size = batch_size
        self._device = torch.device(device or split.targets.device)
        self._order = order
        self._augmentation = augmentation
        self._augmentations = _augmentations(augment, augment_strength, split)
        self._mixing = mixing
        if mixing:
            mixing.check(split)
        self._chances = _balanced_chances(split) if sampling == "balanced" else None

    def __len__(self) -> int:
        return len(self._split) // self._batch_size

    def first(self) -> tuple[Tensor, Tensor]:
        """The first examples of the split as a batch, as they are; nothing is drawn."""
        split, size = self._split, self._batch_size
        return split.inputs[:size].to(self._device), split.targets[:size].to(self._device)

    @property
    def are_mixed(self) -> bool:
        """Whether targets are the shares (B, num_classes) of mixed examples."""
        return self._mixing is not None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, *draws = self._draw_epoch()
        for (inputs, targets), *drawn in zip(_fetched(self._split, order, self._device), *draws, strict=True):
            yield self._changed(inputs, targets, drawn)

    def drawn(self) -> Iterator[tuple[Tensor, ...]]:
        """For each batch of an epoch what is random about it, on the device; `make` turns it into the batch.

        It is for a split that is on the device itself.
        """
        return zip(*self._draw_epoch(), strict=True)

    def make(self, rows: Tensor, *draws: Tensor) -> tuple[Tensor, Tensor]:
        """The batch that `drawn` has described. It is computed from tensors alone, as a CUDA graph needs it."""
        return self._changed(*_taken(self._split, rows), draws)

    def _changed(self, inputs: Tensor, targets: Tensor, draws: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        for augmentation, of_batch in zip(self._augmentations, draws, strict=False):  # the mixing's come last
            inputs = augmentation.apply(inputs, of_batch)
        return self._mixing.apply(inputs, targets, draws[-1]) if self._mixing else (inputs, targets)

    def _draw_epoch(self) -> list[tuple[Tensor, ...]]:
        """Indices, where the split is, and the draws of augmentations and mixing on the device, all in batches."""
        order = self._draw_order()[: len(self) * self._batch_size]
        size = self._split.inputs.shape[-2:]
        changes: list[Augmentation | Mixing] = [*self._augmentations, *([self._mixing] if self._mixing else [])]
        draws = [change.draw(order, size, self.epoch, self._augmentation).to(self._device) for change in changes]
        return [torch.split(drawn, self._batch_size) for drawn in (order.to(self._split.targets.device), *draws)]

    def _draw_order(self) -> Tensor:
        if self._chances is None:
            return torch.randperm(len(self._split), generator=self._order)
        return torch.multinomial(self._chances, len(self._split), replacement=True, generator=self._order)


def build_batches(
    split: Split, config: TrainConfig, num_classes: int, *, order: torch.Generator, augmentation: torch.Generator
) -> TrainingBatches:
    """The training batches that `config` asks for, on its device. Raises UsageError where they do not fit the data."""
    return TrainingBatches(
        split,
        config.batch_size,
        order=order,
        augmentation=augmentation,
        augment=config.augment,
        augment_strength=config.augment_strength,
        mixing=build_mixing(config, num_classes),
        sampling=config.sampling,
        device=config.device,
    )


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


def evaluation_batches(
    split: Split, batch_size: int = 2048, device: torch.device | str | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once, in order, on `device` (by default where the split is); the last batch may be smaller."""
    rows = [slice(first, first + batch_size) for first in range(0, len(split), batch_size)]
    return _fetched(split, rows, torch.device(device or split.targets.device))


def evaluation_batch_size(split: Split, training_batch_size: int, *, convolves_on_cpu: bool) -> int:
    """2048 for small examples, and a training's batch of large ones: what fits with gradients fits without.

    Convolutions on a CPU get 256: their outputs for 2048 images of 32x32 fall out of its caches, and are so large that
    each is fetched from the system again, which took as long as the arithmetic (torch 2.15, one core).
    """
    if split.inputs.shape[1:].numel() > _SMALL_EXAMPLE:
        return training_batch_size
    return 256 if convolves_on_cpu else 2048


def _fetched(split: Split, batches: Iterable[_Rows], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The examples in the rows of each batch, on the device."""
    if device.type == "cuda" and split.targets.device.type != "cuda":
        yield from _streamed(split, batches, device)
    else:
        for rows in batches:
            yield _taken(split, rows)


def _streamed(split: Split, batches: Iterable[_Rows], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches on their way to a GPU one ahead of the one at work: through pinned memory, on a stream of their own."""
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def send(rows: _Rows) -> tuple[tuple[Tensor, Tensor], torch.cuda.Event]:
        # torch keeps pinned memory for the next batch, and gives it out only when the copy is done.
        inputs, targets = _pinned(split.inputs, rows), _pinned(split.targets, rows)
        with torch.cuda.stream(stream):
            sent = inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            return sent, stream.record_event()

    def receive(sent: tuple[Tensor, Tensor], arrival: torch.cuda.Event) -> tuple[Tensor, Tensor]:
        at_work = torch.cuda.current_stream(device)
        at_work.wait_event(arrival)
        for part in sent:
            part.record_stream(at_work)  # or its memory would be given to a later batch while it is in use
        return sent

    ahead = None
    for rows in batches:
        following = send(rows)
        if ahead:
            yield receive(*ahead)
        ahead = following
    if ahead:
        yield receive(*ahead)


def _pinned(examples: Tensor | MappedImages, rows: _Rows) -> Tensor:
    """The examples in these rows, gathered into pinned memory at once."""
    num_rows = len(range(*rows.indices(len(examples)))) if isinstance(rows, slice) else len(rows)
    pinned = torch.empty((num_rows, *examples.shape[1:]), dtype=examples.dtype, pin_memory=True)
    if isinstance(rows, slice):
        return pinned.copy_(examples[rows])
    if isinstance(examples, Tensor):
        return torch.index_select(examples, 0, rows, out=pinned)
    return examples.index_select(0, rows, out=pinned)


def _taken(split: Split, rows: _Rows) -> tuple[Tensor, Tensor]:
    if isinstance(rows, slice):
        return split.inputs[rows], split.targets[rows]
    return split.inputs.index_select(0, rows), split.targets.index_select(0, rows)
