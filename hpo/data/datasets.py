"""Data sets divided: into training and validation for a study, and a test split where none came with the data."""

from __future__ import annotations

import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.config import derive_seed
from hpo.data.examples import Dataset, DataSpec, SealedSplit, Split
from hpo.data.mapped import MappedImages
from hpo.errors import DataError, UsageError

MEMORY_SHARE = 0.25
"""Of the machine's memory, what images from a file may take; more of them stay in the file."""

Indices = NDArray[np.int64]

_logger = logging.getLogger(__name__)
VALIDATION_FRACTION = 0.2
"""Share of the training examples that a study validates on."""


@dataclass(frozen=True)
class Splits:
    """What a trial sees of a data set: its training and its validation split, on one device."""

    train: Split
    validation: Split
    spec: DataSpec

    @property
    def num_bytes(self) -> int:
        """Size of all tensors; images that stay in their file are none."""
        splits = (self.train, self.validation)
        parts = (part for split in splits for part in (split.inputs, split.targets))
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))

    def to(self, device: torch.device | str) -> Splits:
        return replace(self, train=_moved(self.train, device), validation=_moved(self.validation, device))


def save_splits(splits: Splits, path: Path) -> None:
    """Write the splits to a file for `load_splits`; folders are made. Raises OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            tensors = {name: _to_plain(getattr(splits, name)) for name in ("train", "validation")}
            torch.save({**tensors, "spec": asdict(splits.spec)}, file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_splits(path: Path) -> Splits:
    """The splits in a file, mapped into memory: any number of processes share one copy, and opening it costs nothing.

    Raises OSError where there is no such file.
    """
    saved = torch.load(path, mmap=True, weights_only=True)
    spec = DataSpec(**{name: tuple(values) for name, values in saved["spec"].items()})
    return Splits(_from_plain(saved["train"]), _from_plain(saved["validation"]), spec)


def _to_plain(split: Split) -> dict[str, Any]:
    inputs = split.inputs
    if isinstance(inputs, Tensor):
        return {"inputs": inputs, "targets": split.targets}
    mapped = {"file": str(inputs.file), "num_images": inputs.num_images, "image_shape": tuple(inputs.shape[1:])}
    return {"mapped": mapped | {"rows": inputs.rows}, "targets": split.targets}


def _from_plain(saved: dict[str, Any]) -> Split:
    if mapped := saved.get("mapped"):
        return Split(MappedImages(**mapped | {"file": Path(mapped["file"])}), saved["targets"])
    return Split(**saved)


def _moved(split: Split, device: torch.device | str) -> Split:
    assert isinstance(split.inputs, Tensor), "images in a file have no device"
    return Split(split.inputs.to(device), split.targets.to(device))


def split_dataset(
    dataset: Dataset, *, validation_fraction: float = VALIDATION_FRACTION, seed: int, limit: int | None = None
) -> Splits:
    """Divide the training examples into those that are trained on and those that are validated on.

    Seeded, and stratified by class for a classification; the size of the validation split is rounded up. `limit` keeps
    that many of all examples, and a larger limit keeps them too. The test split stays sealed. Raises UsageError
    where the examples do not suffice.
    """
    if not 0 < validation_fraction < 1:
        raise UsageError(f"validation_fraction={validation_fraction} is not allowed: it must be between 0 and 1.")
    if limit is not None and not 1 <= limit <= len(dataset.train):
        raise UsageError(
            f"limit={limit} is not allowed: it must be from 1 to the {len(dataset.train)} examples there are."
        )
    _require_sound(dataset.train, dataset.classes)
    kept = _stratified_order(dataset.train, dataset.classes, derive_seed(seed, "split"))[:limit]
    num_validation = math.ceil(len(kept) * validation_fraction)
    train, validation = _select(dataset.train, kept[num_validation:]), _select(dataset.train, kept[:num_validation])
    if isinstance(train.inputs, MappedImages) and len(kept) * train.inputs[:1].nbytes <= MEMORY_SHARE * _memory():
        train, validation = _read(train), _read(validation)
    _require_examples(train, validation, dataset.classes)
    return Splits(train, validation, dataset.spec)


def all_examples(splits: Splits) -> Split:
    """Those that are trained on and those that are validated on, in an order that is stratified by class."""
    parts = (splits.validation, splits.train)  # as split_dataset has taken them from its order
    return Split(_joined([part.inputs for part in parts]), torch.cat([part.targets for part in parts]))


def folds(splits: Splits, num_folds: int) -> Iterator[Splits]:
    """All examples of `splits` divided again for a cross-validation: each is validated on in one fold.

    The folds are of the same size, but for one example, and hold the classes in proportion.
    """
    examples = all_examples(splits)
    ends = [len(examples) * number // num_folds for number in range(num_folds + 1)]
    for begin, end in pairwise(ends):
        left_out = np.arange(begin, end)
        others = np.delete(np.arange(len(examples)), left_out)
        yield Splits(_select(examples, others), _select(examples, left_out), splits.spec)


def check_folds(examples: Split, classes: Sequence[str], num_folds: int) -> None:
    """Raise UsageError where there are too few examples, of a class perhaps, for each fold to have one."""
    counts = dict(zip(classes, torch.bincount(examples.targets).tolist(), strict=True)) if classes else {}
    for name, count in {"": len(examples), **counts}.items():
        if count < num_folds:
            of_what = f"examples of '{name}'" if name else "examples"
            raise UsageError(f"--folds {num_folds} is not allowed: there are only {count} {of_what}.")


def hold_out(
    inputs: Tensor | MappedImages, targets: Tensor, classes: Sequence[str], *, test_fraction: float = 0.2, seed: int = 0
) -> Dataset:
    """A data set whose test split is taken out of its own examples, for data that come without an official one.

    Stratified by class for a classification; `classes` is empty for a regression. The same examples are held out for
    ever: a study's seed has no part in it.
    """
    whole = Split(inputs, targets)
    _require_sound(whole, classes)
    order = _stratified_order(whole, classes, seed)
    num_test = math.ceil(len(whole) * test_fraction)
    test = _select(whole, order[:num_test])
    return Dataset(_select(whole, order[num_test:]), SealedSplit(lambda: test, num_test), tuple(classes))


def _stratified_order(split: Split, classes: Sequence[str], seed: int) -> Indices:
    """A random order in which every beginning holds the classes in proportion; any order for a regression."""
    # RandomState's stream is frozen (NEP 19): a split outlives upgrades. It takes seeds of 32 bits.
    order = np.random.RandomState(seed % 2**32).permutation(len(split))
    if not classes:
        return order
    labels = split.targets.numpy()[order]
    quantiles = np.empty(len(split))
    for members in (np.flatnonzero(labels == label) for label in range(len(classes))):
        quantiles[members] = (np.arange(len(members)) + 0.5) / len(members)
    return order[np.argsort(quantiles, kind="stable")]


def _require_sound(split: Split, classes: Sequence[str]) -> None:
    """Raise DataError for what would end every trial, and on a GPU without a word about the cause."""
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise DataError(f"the class name '{repeated[0]}' is given twice; each class needs a name of its own.")
    if len(classes) == 1:
        raise DataError(f"there is only the class '{classes[0]}': a classification needs two, a regression none.")
    inputs, targets = split.inputs, split.targets
    if not (isinstance(inputs, Tensor | MappedImages) and isinstance(targets, Tensor)):
        given = f"{type(inputs).__name__} and {type(targets).__name__}"
        raise DataError(f"inputs and targets must be torch tensors, not {given}.")
    if len(inputs) != len(targets):
        raise DataError(f"the data have {len(inputs)} inputs for {len(targets)} targets.")
    if isinstance(inputs, Tensor) and inputs.dtype != torch.uint8 and not inputs.is_floating_point():
        raise DataError(
            f"the data's inputs are {inputs.dtype}; they must be uint8 images or floats. Numbers become floats with "
            ".float(); token ids would be normalised like numbers, and are not supported."
        )
    if isinstance(inputs, Tensor) and inputs.is_floating_point() and not inputs.isfinite().all():
        raise DataError("the data's inputs hold NaN or infinite values; fill them in or leave those examples out.")
    given = f"{targets.dtype} of shape {tuple(targets.shape)}"
    if classes:
        if targets.dtype != torch.int64 or targets.ndim != 1:
            raise DataError(f"targets must be the classes' indices, int64 of shape (N,), not {given}.")
        if targets.min() < 0 or targets.max() >= len(classes):
            range_given = f"from {int(targets.min())} to {int(targets.max())}"
            raise DataError(f"the targets are {range_given}; {len(classes)} classes have the indices from 0.")
    else:
        if not targets.is_floating_point() or targets.ndim != 1:
            raise DataError(f"a regression's targets must be floats of shape (N,), not {given}; or name the classes.")
        if not targets.isfinite().all():
            raise DataError("the data's targets hold NaN or infinite values; leave those examples out.")


def _require_examples(train: Split, validation: Split, classes: Sequence[str]) -> None:
    """Raise UsageError where there is nothing to learn or to judge by; a rare class may be missing in one split."""
    num_examples = len(train) + len(validation)
    for name, split in (("training", train), ("validation", validation)):
        if len(split) == 0:
            raise UsageError(f"{num_examples} examples leave none for {name}; there must be more, or a larger --limit.")
    if missing := _missing_classes(train, classes):
        raise UsageError(
            f"{num_examples} examples of {len(classes)} classes leave none of '{missing[0]}' for training; "
            "there must be more, or a larger --limit."
        )
    if missing := _missing_classes(validation, classes):
        _logger.warning(
            "the validation split has no example of %s%s, so nothing judges how well %s learned.",
            ", ".join(f"'{name}'" for name in missing[:3]),
            f" and {len(missing) - 3} more classes" if len(missing) > 3 else "",
            "they are" if len(missing) > 1 else "it is",
        )


def _missing_classes(split: Split, classes: Sequence[str]) -> list[str]:
    counts = torch.bincount(split.targets, minlength=len(classes)).tolist() if classes else []
    return [name for name, count in zip(classes, counts, strict=True) if count == 0]


def _joined(inputs: Sequence[Tensor | MappedImages]) -> Tensor | MappedImages:
    """The examples of both; mapped images are of the same file."""
    first, second = inputs
    if isinstance(first, MappedImages) and isinstance(second, MappedImages):
        return first.join(second)
    assert isinstance(first, Tensor), "a data set lies in one place"
    assert isinstance(second, Tensor), "a data set lies in one place"
    return torch.cat((first, second))


def _select(split: Split, indices: Indices) -> Split:
    rows = torch.from_numpy(indices)
    inputs = split.inputs[rows] if isinstance(split.inputs, Tensor) else split.inputs.select(rows)
    return Split(inputs, split.targets[rows])


def _read(split: Split) -> Split:
    """The split with its images in memory."""
    return Split(split.inputs[:], split.targets)


def _memory() -> int:
    """Bytes of memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
