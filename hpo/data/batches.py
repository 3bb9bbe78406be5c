"""Batches of a split, picked by index and augmented on the device, without workers.

A split lies on the device as a whole where its memory allows. Else it stays where it is, in memory or in a file, and
its batches are streamed: the same batches, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hpo.config import (
    SPECTROGRAM_AUGMENTATIONS,
    TEXT_AUGMENTATIONS,
    WAVEFORM_AUGMENTATIONS,
    augmentation_names,
    derive_seed,
)
from hpo.data.augment import Augmentation, Moving, build_augmentations
from hpo.data.loaded import Loaded
from hpo.data.mapped import MappedImages
from hpo.data.mixing import Mixing, build_mixing
from hpo.data.oversampling import oversample
from hpo.data.pacing import Curriculum, Difficulty, Growth, build_curriculum, build_growth
from hpo.data.parts import Padded, Ragged, map_parts, map_tensors, parts, tensors_of
from hpo.errors import UsageError

if TYPE_CHECKING:
    from hpo.config import TrainConfig
    from hpo.data.datasets import Splits
    from hpo.data.examples import DataSpec, Split
    from hpo.data.parts import Batch, Examples, Part, Rows

DEVICE_SHARE = 0.5
"""Of the device's free memory, what splits that stay there may take."""

GROUPED_BATCHES = 50
"""Batches of sequences that are sorted by length together."""

_SMALL_EXAMPLE = 3 * 32 * 32  # values
_STATES_OF_AN_ELEMENT = 64  # values that a network makes of an element of a sequence, at least


def place(splits: Splits, device: torch.device | str) -> Splits:
    """The splits on the device, where they leave it room to train; else as they are, to be streamed."""
    wanted, there = torch.device(device), splits.train.device
    if there.type == wanted.type and wanted.index in (None, there.index):
        return splits
    is_mapped = any(isinstance(part, MappedImages | Loaded) for part in (*splits.train.parts, *splits.validation.parts))
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


def own_part(num_examples: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Where the part of a rank begins and ends in a batch that is divided over ranks."""
    return num_examples * rank // num_ranks, num_examples * (rank + 1) // num_ranks


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
        unknown_token: int = 0,
        sampling: str = "uniform",
        kind: str = "classification",
        num_views: int = 1,
        accumulate: int = 1,
        curriculum: Curriculum | None = None,
        growth: Growth | None = None,
        device: torch.device | str | None = None,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        """With a `sampling` of "balanced" each class is drawn equally often, so that rare examples are repeated. With
        several views each example is as many times in its batch, one after the other, augmented separately. A batch
        is one of a step, of `accumulate` times `batch_size` examples. A `curriculum` says which examples are drawn, and
        `growth` how large they are.

        The batches are on `device`, by default where the split is. With `num_ranks` processes each has its part of
        every `batch_size` examples; all draw the same for the whole.
        """
        if batch_size * accumulate > len(split):
            times = f" times accumulate={accumulate}" if accumulate > 1 else ""
            raise UsageError(
                f"batch_size={batch_size}{times} is larger than the training split of {len(split)} examples; "
                f"choose at most {len(split)}."
            )
        if batch_size < num_ranks:
            raise UsageError(
                f"batch_size={batch_size} cannot be divided over {num_ranks} GPUs; choose at least {num_ranks}."
            )
        self.epoch = 1
        self._split = split
        self._batch_size = batch_size * accumulate
        begin, end = own_part(batch_size, rank, num_ranks)
        self._part_size = end - begin
        self.curriculum = curriculum
        self._growth = growth
        self._device = torch.device(device or split.device)
        self._order = order
        self._augmentation = augmentation
        self._kind = kind
        self._augmentations = _augmentations(
            augment, augment_strength, split, kind=kind, unknown_token=unknown_token, device=self._device
        )
        self._num_views = num_views
        self._mixing = mixing
        if mixing:
            mixing.check(split)
        self._chances = _balanced_chances(split) if sampling == "balanced" else None
        self._own_rows: Tensor | None = None
        """Of the rows of a batch, those of this rank; None for all."""
        self._unmixed: Tensor | None = None
        """Of these, on the device, those that are not there only because the next one is mixed with them."""
        if num_ranks > 1:
            # An example is mixed with the one before it, which may be in another part.
            first = begin - 1 if mixing else begin
            own = torch.arange(0, self._batch_size, batch_size)[:, None] + torch.arange(first, end)
            self._own_rows = own.flatten() % self._batch_size
            if mixing:
                self._unmixed = torch.arange(own.numel()).view_as(own)[:, 1:].flatten().to(self._device)
        self._lengths = next((part.lengths for part in parts(split.inputs) if isinstance(part, Ragged)), None)

    def __len__(self) -> int:
        return len(self._split) // self._batch_size

    def first(self) -> tuple[Batch, Batch]:
        """The first examples of the split as a batch, as they are; nothing is drawn."""
        return self._split.first(self._part_size, self._device)

    @property
    def are_mixed(self) -> bool:
        """Whether targets are the shares (B, num_classes) of mixed examples."""
        return self._mixing is not None

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        order, *draws = self._draw_epoch()
        seed = self._draw_seed()
        for (inputs, targets), *drawn in zip(_fetched(self._split, order, self._device, seed), *draws, strict=True):
            yield self._changed(inputs, targets, drawn)

    def _draw_seed(self) -> int | None:
        """Of what an epoch's examples draw by themselves, if they are read from a torch Dataset."""
        if not isinstance(self._split.inputs, Loaded):
            return None
        return int(torch.randint(2**62, (), generator=self._augmentation))

    def drawn(self) -> Iterator[tuple[Tensor, ...]]:
        """For each batch of an epoch what is random about it, on the device; `make` turns it into the batch.

        It is for a plain split that is on the device itself.
        """
        order, *draws = self._draw_epoch()
        return zip((there for _, there in order), *draws, strict=True)

    def make(self, rows: Tensor, *draws: Tensor) -> tuple[Batch, Batch]:
        """The batch that `drawn` has described. It is computed from tensors alone, as a CUDA graph needs it."""
        return self._changed(*self._split.batch(rows), draws)

    def _changed(self, inputs: Batch, targets: Batch, draws: Sequence[Tensor]) -> tuple[Batch, Batch]:
        inputs, targets = self._augmented_or_mixed(inputs, targets, draws)
        return self._growth.apply(inputs, targets, self.epoch) if self._growth else (inputs, targets)

    def _augmented_or_mixed(self, inputs: Batch, targets: Batch, draws: Sequence[Tensor]) -> tuple[Batch, Batch]:
        if self._num_views > 1:
            return _in_views(self._augmentations, inputs, targets, draws)
        if self._augmentations:
            if self._kind in ("segmentation", "box"):
                targets = _moved(self._augmentations, self._kind, targets, inputs.shape[-2:], draws)
            inputs = _augmented(self._augmentations, inputs, draws)
        if not self._mixing:
            return inputs, targets
        assert isinstance(inputs, Tensor), "other inputs are not mixed"
        assert isinstance(targets, Tensor), "other targets are not mixed"
        inputs, targets = self._mixing.apply(inputs, targets, draws[-1])
        return (inputs, targets) if self._unmixed is None else (inputs[self._unmixed], targets[self._unmixed])

    def _draw_epoch(self) -> tuple[list[tuple[Tensor, Tensor]], *tuple[tuple[Tensor, ...], ...]]:
        """For each batch its rows, on the CPU and where the split is, and the draws of augmentations and mixing."""
        order = self._draw_order()[: len(self) * self._batch_size]
        changes: list[tuple[Augmentation | Mixing, int]] = []
        changes += _of_views(self._augmentations, self._num_views, self.epoch)
        changes += [(self._mixing, self.epoch)] if self._mixing else []
        size = _image_size(self._split) if changes else ()
        draws = [change.draw(order, size, epoch, self._augmentation).to(self._device) for change, epoch in changes]
        there = order.to(self._split.device)
        rows, rows_there, *in_batches = (self._in_batches(drawn) for drawn in (order, there, *draws))
        return list(zip(rows, rows_there, strict=True)), *in_batches

    def _in_batches(self, drawn: Tensor) -> tuple[Tensor, ...]:
        """What was drawn for the examples of an epoch (N, ...), by batch; with ranks, this one's part of each."""
        if self._own_rows is None:
            return torch.split(drawn, self._batch_size)
        in_rows = drawn.view(-1, self._batch_size, *drawn.shape[1:])
        return in_rows.index_select(1, self._own_rows.to(drawn.device)).unbind()

    def _draw_order(self) -> Tensor:
        pool = self.curriculum.pool(self.epoch, self._order) if self.curriculum else None
        if self._chances is not None:
            chances = (
                self._chances
                if pool is None
                else torch.zeros_like(self._chances).index_copy_(0, pool, self._chances[pool])
            )
            order = torch.multinomial(chances, len(self._split), replacement=True, generator=self._order)
        elif pool is not None:
            order = self._repeated(pool)
        else:
            order = torch.randperm(len(self._split), generator=self._order)
        return order if self._lengths is None else self._grouped(order)

    def _repeated(self, pool: Tensor) -> Tensor:
        """As many rows as there are examples: all of the pool in a new order, again and again."""
        num_rounds = -(-len(self._split) // len(pool))
        rounds = [pool[torch.randperm(len(pool), generator=self._order)] for _ in range(num_rounds)]
        return torch.cat(rounds)[: len(self._split)]

    def _grouped(self, order: Tensor) -> Tensor:
        """The order with sequences of similar lengths in the same batch, which saves padding.

        Only as many batches are sorted together that it stays random who meets whom (Khomenko et al. 2016,
        arXiv:1708.05604); which batch comes first is drawn again.
        """
        assert self._lengths is not None, "there are sequences"
        size = self._batch_size
        parts = torch.split(order[: len(self) * size], GROUPED_BATCHES * size)
        ordered = torch.cat([part[self._lengths[part].argsort(stable=True)] for part in parts])
        return ordered.view(-1, size)[torch.randperm(len(self), generator=self._order)].flatten()


def build_batches(
    split: Split,
    config: TrainConfig,
    spec: DataSpec,
    *,
    order: torch.Generator,
    augmentation: torch.Generator,
    difficulty: Difficulty | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> TrainingBatches:
    """The training batches that `config` asks for, on its device. Raises UsageError if they do not fit the data.

    `difficulty` is the task's own, for a curriculum. Each of several ranks has its part of every batch.
    """
    if spec.kind == "instances" and config.augment == "none":
        raise UsageError(
            "targets of the kind instances need augment=...: without it two views of an example would be the same."
        )
    if config.sampling == "smote":
        if config.curriculum != "none":
            raise UsageError("sampling='smote' cannot be combined with a curriculum: use 'balanced'.")
        split = oversample(split, derive_seed(config.seed, "smote"))
    return TrainingBatches(
        split,
        config.batch_size,
        order=order,
        augmentation=augmentation,
        augment=config.augment,
        augment_strength=config.augment_strength,
        mixing=build_mixing(config, spec),
        unknown_token=config.unknown_token,
        sampling=config.sampling,
        kind=spec.kind,
        num_views=num_views(spec),
        accumulate=config.accumulate,
        curriculum=build_curriculum(config, split, spec, difficulty),
        growth=build_growth(config, split, spec),
        device=config.device,
        rank=rank,
        num_ranks=num_ranks,
    )


def num_views(spec: DataSpec) -> int:
    """How many times each example is in a batch: twice where one is to be found again by the other."""
    return 2 if spec.kind == "instances" else 1


def _of_views(augmentations: Sequence[Augmentation], num_views: int, epoch: int) -> Iterator[tuple[Augmentation, int]]:
    """The augmentations of each view in turn, with the epoch that they draw for.

    A second view has the draws of the next epoch: what alternates from epoch to epoch would make both alike.
    """
    for view in range(num_views):
        for augmentation in augmentations:
            yield augmentation, epoch + view


def _augmented(augmentations: Sequence[Augmentation], inputs: Batch, draws: Sequence[Tensor]) -> Batch:
    """Each augmentation in turn, by its draws; there may be more of these."""
    for augmentation, of_batch in zip(augmentations, draws, strict=False):
        inputs = augmentation.apply(inputs, of_batch)
    return inputs


def _moved(
    augmentations: Sequence[Augmentation], kind: str, targets: Tensor, size: Sequence[int], draws: Sequence[Tensor]
) -> Tensor:
    """Masks, or boxes, moved as the images are."""
    for augmentation, of_batch in zip(augmentations, draws, strict=False):
        if not isinstance(augmentation, Moving):
            continue
        if kind == "segmentation":
            targets = augmentation.move_masks(targets, of_batch)
        else:
            targets = augmentation.move_boxes(targets, of_batch, size)
    return targets


def _in_views(
    augmentations: Sequence[Augmentation], inputs: Batch, targets: Batch, draws: Sequence[Tensor]
) -> tuple[Batch, Batch]:
    """The views of an example one after the other, so that each half of a batch holds whole examples."""
    size = len(augmentations)
    views = [
        (_augmented(augmentations, inputs, draws[first : first + size]), targets)
        for first in range(0, len(draws), size)
    ]
    return map_tensors(lambda *of_views: torch.stack(of_views, dim=1).flatten(0, 1), *views)


def _balanced_chances(split: Split) -> Tensor:
    """For each example, on the CPU, a chance with which all classes have the same."""
    targets = split.targets
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.ndim != 1:
        raise UsageError("sampling='balanced' is for classes, which this task does not have: use 'uniform'.")
    targets = targets.cpu()
    return (1 / torch.bincount(targets).double())[targets]


def _augmentations(
    augment: str,
    strength: float,
    split: Split,
    *,
    kind: str,
    unknown_token: int,
    device: torch.device,
) -> tuple[Augmentation, ...]:
    """Raises UsageError for those that do not fit the inputs, or would make the targets wrong."""
    inputs = split.inputs
    for name in augmentation_names(augment):
        _require_fitting(name, inputs)
    words = inputs if isinstance(inputs, Ragged) else None
    augmentations = build_augmentations(augment, strength, words=words, unknown_token=unknown_token, device=device)
    for augmentation, name in zip(augmentations, augmentation_names(augment), strict=True):
        if kind == "tagging" and not getattr(augmentation, "keeps_positions", True):
            raise UsageError(f"augment={name!r} moves elements away from their labels; this task labels each element.")
        if kind == "several" and isinstance(augmentation, Moving):
            raise UsageError(f"augment={name!r} moves pixels, and several targets may depend on them: use others.")
    return augmentations


def _require_fitting(name: str, inputs: Examples) -> None:
    is_float = isinstance(inputs, Tensor | Ragged) and inputs.dtype.is_floating_point
    ndim = inputs.values.ndim + 1 if isinstance(inputs, Ragged) else getattr(inputs, "ndim", 0)
    if name in TEXT_AUGMENTATIONS:
        fits, wanted = isinstance(inputs, Ragged) and not is_float and ndim == 2, "texts: Ragged ids of tokens"
    elif name in WAVEFORM_AUGMENTATIONS:
        fits = is_float and (ndim == 2 or (ndim == 3 and isinstance(inputs, Tensor)))
        wanted = "waveforms: floats (N, T) or (N, C, T), or Ragged floats"
    elif name in SPECTROGRAM_AUGMENTATIONS:
        fits = is_float and (ndim == 3 or (ndim == 4 and isinstance(inputs, Tensor)))
        wanted = "spectrograms: floats (N, F, T) or (N, C, F, T), or Ragged (T, F)"
    else:
        fits, wanted = isinstance(inputs, Tensor | MappedImages) and ndim == 4, "images (C, H, W)"
    if not fits:
        raise UsageError(f"augment={name!r} is for {wanted}; this task has other inputs: use 'none'.")


def _image_size(split: Split) -> Sequence[int]:
    inputs = split.inputs
    return inputs.shape[-2:] if isinstance(inputs, Tensor | MappedImages) else ()


def evaluation_batches(
    split: Split, batch_size: int, device: torch.device | str | None = None
) -> Iterator[tuple[Batch, Batch]]:
    """Every example once, in order, on `device` (by default where the split is); the last batch may be smaller."""
    rows = [slice(first, first + batch_size) for first in range(0, len(split), batch_size)]
    return _fetched(split, [(some, some) for some in rows], torch.device(device or split.device))


def evaluation_views(split: Split, config: TrainConfig, batch_size: int) -> Iterator[tuple[Batch, Batch]]:
    """Every example in two views, in order, on the device of `config`, by draws that are the same each time."""
    device = torch.device(config.device)
    augmentations = _augmentations(
        config.augment,
        config.augment_strength,
        split,
        kind="instances",
        unknown_token=config.unknown_token,
        device=device,
    )
    rows, generator = torch.arange(len(split)), torch.Generator().manual_seed(0)
    size = _image_size(split)
    draws = [each.draw(rows, size, epoch, generator).to(device) for each, epoch in _of_views(augmentations, 2, epoch=1)]
    in_batches = (torch.split(drawn, batch_size) for drawn in draws)
    for (inputs, targets), *drawn in zip(evaluation_batches(split, batch_size, device), *in_batches, strict=True):
        yield _in_views(augmentations, inputs, targets, drawn)


def evaluation_batch_size(split: Split, training_batch_size: int, *, convolves_on_cpu: bool) -> int:
    """2048 for small examples, and a training's batch of large ones: what fits with gradients fits without.

    Convolutions on a CPU get 256: their outputs for 2048 images of 32x32 fall out of its caches, and are so large that
    each is fetched from the system again, which took as long as the arithmetic (torch 2.15, one core). Sequences count
    with the length of the longest.
    """
    if isinstance(split.inputs, Loaded) or max(map(_values_in_example, split.parts)) > _SMALL_EXAMPLE:
        return training_batch_size
    return 256 if convolves_on_cpu else 2048


def _values_in_example(part: Part) -> int:
    if not isinstance(part, Ragged):
        return part.shape[1:].numel()
    return int(part.lengths.max()) * part.values.shape[1:].numel() * _STATES_OF_AN_ELEMENT


def _fetched(
    split: Split, batches: Iterable[tuple[Rows, Rows]], device: torch.device, seed: int | None = None
) -> Iterator[tuple[Batch, Batch]]:
    """The examples in the rows of each batch, on the device; with a `seed` a torch Dataset's as for a training."""
    to_gpu = device.type == "cuda" and split.device.type != "cuda"
    if isinstance(split.inputs, Loaded):
        read = split.inputs.batches((here for here, _ in batches), seed=seed)
        yield from _streamed(map(_in_pinned_memory, read), device) if to_gpu else read
    elif to_gpu:
        yield from _streamed((_pinned(split, here) for here, _ in batches), device)
    else:
        for rows, rows_there in batches:
            yield split.batch(rows, rows_there)


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream beside the default one, the same for each trial: torch keeps memory for every stream that it has used.

    Data are copied to the GPU on it, and steps are captured on it; no trial does both.
    """
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _streamed(batches: Iterable[tuple[Batch, Batch]], device: torch.device) -> Iterator[tuple[Batch, Batch]]:
    """Batches in pinned memory on their way to a GPU, one ahead of the one at work, on another stream.

    torch keeps pinned memory for the next batch, and gives it out only when the copy is done.
    """
    stream = side_stream(device)

    def send(batch: tuple[Batch, Batch]) -> tuple[tuple[Batch, Batch], torch.cuda.Event]:
        with torch.cuda.stream(stream):
            return map_tensors(lambda part: part.to(device, non_blocking=True), batch), stream.record_event()

    def receive(sent: tuple[Batch, Batch], arrival: torch.cuda.Event) -> tuple[Batch, Batch]:
        at_work = torch.cuda.current_stream(device)
        at_work.wait_event(arrival)
        for part in tensors_of(sent):
            part.record_stream(at_work)  # or its memory would be given to a later batch while it is in use
        return sent

    ahead = None
    for batch in batches:
        following = send(batch)
        if ahead:
            yield receive(*ahead)
        ahead = following
    if ahead:
        yield receive(*ahead)


def _in_pinned_memory(batch: tuple[Batch, Batch]) -> tuple[Batch, Batch]:
    return map_tensors(lambda tensor: tensor.pin_memory(), batch)


def _pinned(split: Split, rows: Rows) -> tuple[Batch, Batch]:
    """The batch of these rows in pinned memory: what has one shape is gathered there at once."""

    def pin(part: Part) -> Tensor | Padded:
        if isinstance(part, Ragged):
            return map_tensors(lambda tensor: tensor.pin_memory(), part.padded(rows, rows))
        num_rows = len(range(*rows.indices(len(part)))) if isinstance(rows, slice) else len(rows)
        pinned = torch.empty((num_rows, *part.shape[1:]), dtype=part.dtype, pin_memory=True)
        if isinstance(rows, slice):
            return pinned.copy_(part[rows])
        if isinstance(part, Tensor):
            return torch.index_select(part, 0, rows, out=pinned)
        return part.index_select(0, rows, out=pinned)

    inputs = map_parts(pin, split.inputs)
    return inputs, inputs if split.targets is None else map_parts(pin, split.targets)
