"""Data sets divided: into training and validation for a study, and a test split where none came with the data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.config import derive_seed
from hpo.data.conversion import TargetConversion
from hpo.data.examples import Dataset, DataSpec, Groups, SealedSplit, Split, Vocabulary, converted
from hpo.data.kinds import strata
from hpo.data.loaded import Loaded
from hpo.data.mapped import MappedImages
from hpo.data.parts import Ragged, map_parts
from hpo.errors import UsageError
from hpo.machine import memory_bytes

if TYPE_CHECKING:
    from hpo.data.parts import Examples, Part
    from hpo.data.preprocessing import RawExamples

_logger = logging.getLogger(__name__)

MEMORY_SHARE = 0.25
"""Of the memory of the machine or its container, what images from a file may take; more of them stay in the file."""

Indices = NDArray[np.int64]

VALIDATION_FRACTION = 0.2
"""Share of the training examples that a study validates on."""


@dataclass(frozen=True)
class Splits:
    """What a trial sees of a data set: its training and its validation split, on one device."""

    train: Split
    validation: Split
    spec: DataSpec
    groups: Tensor | None = None
    """The group of each example, in the order of `all_examples`, int64; None where each stands for itself."""

    @property
    def num_bytes(self) -> int:
        """Size of all that is in memory; images that stay in their file are not."""
        return self.train.num_bytes + self.validation.num_bytes

    def to(self, device: torch.device | str) -> Splits:
        return replace(self, train=self.train.to(device), validation=self.validation.to(device))


def save_splits(splits: Splits, path: Path) -> None:
    """Write the splits to a file for `load_splits`; folders are made. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        with unfinished.open("wb") as file:
            tensors = {name: _to_plain(getattr(splits, name)) for name in ("train", "validation")}
            torch.save({**tensors, "spec": splits.spec.to_dict(), "groups": splits.groups}, file)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_splits(path: Path) -> Splits:
    """The splits in a file, mapped into memory: any number of processes share one copy, and opening it costs nothing.

    Raises OSError if there is no such file.
    """
    saved = torch.load(path, mmap=True, weights_only=True)
    train, validation = (_from_plain(saved[name]) for name in ("train", "validation"))
    return Splits(train, validation, DataSpec.from_dict(saved["spec"]), saved["groups"])


def _to_plain(split: Split) -> dict[str, Any]:
    return {name: map_parts(_plain_part, getattr(split, name)) for name in ("inputs", "targets")}


def _plain_part(part: Part | Loaded | None) -> Any:
    """What a file holds of a part: a list, to tell it from a mapping of parts, or the tensor itself."""
    if isinstance(part, MappedImages):
        return ["images in a file", str(part.file), part.num_images, tuple(part.shape[1:]), part.rows]
    if isinstance(part, Loaded):
        pickled = torch.frombuffer(bytearray(cloudpickle.dumps(part.source)), dtype=torch.uint8)
        return ["a Dataset", pickled, part.rows]
    if isinstance(part, Ragged):
        return ["sequences", part.values, part.lengths, part.padding, part.synonyms]
    return part


def _from_plain(saved: dict[str, Any]) -> Split:
    return Split(**{name: map_parts(_part_from_plain, saved[name]) for name in ("inputs", "targets")})


def _part_from_plain(plain: Any) -> Part | Loaded | None:
    if not isinstance(plain, list):
        return cast("Part | None", plain)
    what, *content = plain
    if what == "a Dataset":  # our own session has written it, from the task's code
        pickled, rows = content
        return Loaded(cloudpickle.loads(pickled.numpy().tobytes()), rows)
    if what == "sequences":
        values, lengths, padding, *synonyms = content  # an earlier version wrote none
        return Ragged(values, lengths, padding=padding, synonyms=synonyms[0] if synonyms else None)
    file, num_images, image_shape, rows = content
    return MappedImages(Path(file), num_images, image_shape, rows)


def split_dataset(
    dataset: Dataset, *, validation_fraction: float = VALIDATION_FRACTION, seed: int, limit: int | None = None
) -> Splits:
    """Divide the training examples into those that are trained on and those that are validated on.

    Seeded, and stratified by class, or by the rarest of several labels; the size of the validation split is rounded up.
    Groups stay whole, so the size is only near to that, and of ordered examples the last ones are validated on.
    `limit` keeps that many of all examples (of ordered ones the last), and a larger limit keeps them too. The test
    split stays sealed. Raises UsageError if the examples do not suffice.
    """
    if not 0 < validation_fraction < 1:
        raise UsageError(f"validation_fraction={validation_fraction} is not allowed: it must be between 0 and 1.")
    if limit is not None and not 1 <= limit <= len(dataset.train):
        raise UsageError(
            f"limit={limit} is not allowed: it must be from 1 to the {len(dataset.train)} examples there are."
        )
    spec = dataset.spec
    dataset.train.require_sound(spec)
    kept, of_validation = _divided(dataset, validation_fraction, derive_seed(seed, "split"), limit)
    train, validation = (_select(dataset.train, kept[chosen]) for chosen in (~of_validation, of_validation))
    if isinstance(train.inputs, MappedImages) and len(kept) * train.inputs[:1].nbytes <= MEMORY_SHARE * memory_bytes():
        train, validation = train.in_memory(), validation.in_memory()
    _require_examples(train, validation, spec)
    ordered = torch.from_numpy(np.concatenate((kept[of_validation], kept[~of_validation])))
    groups = None if dataset.groups is None else torch.as_tensor(dataset.groups)[ordered]
    return Splits(*dataset.encoded(train, validation), groups)


def _divided(dataset: Dataset, fraction: float, seed: int, limit: int | None) -> tuple[Indices, NDArray[np.bool_]]:
    """The examples that are kept, by row, and which of them are validated on."""
    spec, num_classes = dataset.spec, len(dataset.spec.classes)
    if dataset.is_ordered:
        kept = np.arange(len(dataset.train))[-limit if limit else 0 :]
        return kept, np.arange(len(kept)) >= len(kept) - math.ceil(len(kept) * fraction)
    kept = _stratified_order(dataset.train, spec.kind, num_classes, seed)
    if dataset.groups is None:
        kept = kept[:limit]
        return kept, np.arange(len(kept)) < math.ceil(len(kept) * fraction)
    groups = np.asarray(dataset.groups)
    _, first = np.unique(groups[kept], return_index=True)  # where each group begins in that order
    kept = kept[np.argsort(first[groups[kept]], kind="stable")][:limit]
    labels = strata(spec.kind, dataset.train.targets, num_classes)
    parts = group_parts(groups[kept], None if labels is None else labels[kept], max(2, round(1 / fraction)))
    sizes = np.bincount(parts)
    if len(sizes) < 2:
        raise UsageError(f"the {len(kept)} examples are all of one group, which cannot be divided.")
    # The nearest in size, except parts that hold the only group of a class.
    nearest = np.argsort(np.abs(sizes - fraction * len(kept)), kind="stable")
    known = np.zeros(len(kept), dtype=np.int64) if labels is None else labels[kept]
    num_known = len(np.unique(known))
    whole = [part for part in nearest if len(np.unique(known[parts != part])) == num_known]
    if not whole:
        raise UsageError(
            "the groups cannot be divided: without some of them training would lack a class, whichever they are; more "
            "groups must have each class."
        )
    return kept, parts == whole[0]


def group_parts(groups: NDArray[Any], labels: NDArray[Any] | None, num_parts: int) -> Indices:
    """A part for each example, from 0 on, at most `num_parts`.

    Groups stay whole, and the parts are alike in size and labels, as far as the groups allow. The largest group comes
    first, and each goes where least is yet of what it has. Of equal ones the first comes first.
    """
    names, first, of_group = np.unique(groups, return_index=True, return_inverse=True)
    of_label = np.zeros(len(groups), dtype=np.int64) if labels is None else np.unique(labels, return_inverse=True)[1]
    num_labels = int(of_label.max()) + 1
    counts = np.zeros((len(names), num_labels + 1))
    np.add.at(counts, (of_group, of_label), 1)
    counts[:, -1] = counts.sum(1)
    weights = counts / counts.sum(0) ** 2
    weights[:, -1] *= num_labels  # the size counts as much as all labels together
    sums, chosen = np.zeros((min(num_parts, len(names)), num_labels + 1)), np.empty(len(names), dtype=np.int64)
    for group in np.lexsort((first, -counts[:, -1])):
        chosen[group] = (sums @ weights[group]).argmin()
        sums[chosen[group]] += counts[group]
    parts: Indices = chosen[of_group]
    return parts


def all_examples(splits: Splits) -> Split:
    """Those that are trained on and those that are validated on, in an order that is stratified by class."""
    first, second = splits.validation, splits.train  # as split_dataset has taken them from its order
    inputs, targets = (
        map_parts(_joined, getattr(first, part), getattr(second, part)) for part in ("inputs", "targets")
    )
    return Split(inputs, targets)


def folds(splits: Splits, num_folds: int) -> Iterator[Splits]:
    """All examples of `splits` divided again for a cross-validation: each is validated on in one fold.

    The folds are of the same size, up to one example, and hold the classes in proportion. Groups stay whole, and the
    folds are then only about as large.
    """
    examples = all_examples(splits)
    if splits.groups is not None:
        labels = strata(splits.spec.kind, examples.targets, len(splits.spec.classes))
        parts = group_parts(splits.groups.numpy(), labels, num_folds)
        for part in range(num_folds):
            of_fold, others = np.flatnonzero(parts == part), np.flatnonzero(parts != part)
            yield Splits(_select(examples, others), _select(examples, of_fold), splits.spec)
        return
    ends = [len(examples) * number // num_folds for number in range(num_folds + 1)]
    for begin, end in pairwise(ends):
        left_out = np.arange(begin, end)
        others = np.delete(np.arange(len(examples)), left_out)
        yield Splits(_select(examples, others), _select(examples, left_out), splits.spec)


def check_folds(examples: Split, spec: DataSpec, num_folds: int, groups: Tensor | None = None) -> None:
    """Raise UsageError if there are too few examples, of a class perhaps, or groups for each fold to have one."""
    if groups is not None and (num_groups := len(set(groups.tolist()))) < num_folds:
        raise UsageError(f"--folds {num_folds} is not allowed: the examples are of only {num_groups} groups.")
    counts = class_counts(examples, spec)
    for name, count in {"": len(examples), **counts}.items():
        if count < num_folds:
            of_what = f"examples of '{name}'" if name else "examples"
            raise UsageError(f"--folds {num_folds} is not allowed: there are only {count} {of_what}.")


def hold_out(
    inputs: Examples,
    targets: Examples | None,
    classes: Sequence[str] | Mapping[str, Sequence[str]] = (),
    *,
    test_fraction: float = 0.2,
    seed: int = 0,
    kind: str | Mapping[str, str] | None = None,
    vocabulary: Vocabulary | Mapping[str, Vocabulary] | None = None,
    normalise: bool | Mapping[str, bool] = True,
    raw: RawExamples | None = None,
    groups: Groups | None = None,
    is_ordered: bool = False,
) -> Dataset:
    """A data set whose test split is taken out of its own examples, for data that come without an official one.

    Stratified by class, or by the rarest of several labels; groups stay whole, and of ordered examples the last ones
    are held out. The other arguments are those of `Dataset`. The same examples are held out for ever: a study's seed
    has no part in it. With a `kind` of "instances" and no targets each example is numbered.
    """
    whole = Split(inputs, targets)
    if not isinstance(inputs, Loaded):
        convert = TargetConversion.of(targets, classes, kind)
        whole, classes = converted(whole, convert), convert.names
    if kind == "instances" and targets is None:
        whole = Split(inputs, torch.arange(len(whole)))
    given: dict[str, Any] = {
        "classes": dict(classes) if isinstance(classes, Mapping) else tuple(classes),
        "kind": kind,
        "vocabulary": vocabulary,
        "normalise": normalise,
        "raw": raw,
    }
    spec = Dataset(whole, SealedSplit(lambda: whole, 0), **given).spec
    whole.require_sound(spec)
    undivided = Dataset(whole, SealedSplit(lambda: whole, 0), **given, groups=groups, is_ordered=is_ordered)
    order, is_held_out = _divided(undivided, test_fraction, seed, None)
    rest, test = order[~is_held_out], _select(whole, order[is_held_out])
    if vocabulary is None and raw is None:  # of the test split nothing is to be known but this
        given["vocabulary"] = {
            name: each.categories or each.vocabulary for name, each in spec.input_specs.items() if each.vocabulary
        }
    of_rest = None if undivided.groups is None else np.asarray(undivided.groups)[rest]
    test_split = SealedSplit(lambda: test, len(test))
    return Dataset(_select(whole, rest), test_split, **given, groups=of_rest, is_ordered=is_ordered)


def class_counts(split: Split, spec: DataSpec) -> dict[str, int]:
    """Examples that have each class, or each of several labels; nothing for other kinds."""
    if spec.kind == "classification" and isinstance(split.targets, Tensor):
        counts = torch.bincount(split.targets, minlength=len(spec.classes))
    elif spec.kind == "multilabel" and isinstance(split.targets, Tensor):
        counts = split.targets.bool().sum(0)
    else:
        return {}
    return dict(zip(spec.classes, counts.tolist(), strict=True))


def _stratified_order(split: Split, kind: str, num_classes: int, seed: int) -> Indices:
    """A random order in which every beginning holds the classes in proportion, where there are some."""
    # RandomState's stream is frozen (NEP 19): a split outlives upgrades. It takes seeds of 32 bits.
    order = np.random.RandomState(seed % 2**32).permutation(len(split))
    groups = strata(kind, split.targets, num_classes)
    if groups is None:
        return order
    labels = groups[order]
    quantiles = np.empty(len(split))
    for members in (np.flatnonzero(labels == label) for label in range(num_classes + 1)):
        quantiles[members] = (np.arange(len(members)) + 0.5) / max(1, len(members))
    return order[np.argsort(quantiles, kind="stable")]


def _require_examples(train: Split, validation: Split, spec: DataSpec) -> None:
    """Raise UsageError if there is nothing to learn or to judge by; a rare class may be missing in one split."""
    num_examples = len(train) + len(validation)
    for name, split in (("training", train), ("validation", validation)):
        if len(split) == 0:
            raise UsageError(f"{num_examples} examples leave none for {name}; there must be more, or a larger --limit.")
    if missing := _missing_classes(train, spec):
        raise UsageError(
            f"{num_examples} examples of {len(spec.classes)} classes leave none of '{missing[0]}' for training; "
            "there must be more, or a larger --limit."
        )
    if missing := _missing_classes(validation, spec):
        counts = class_counts(train, spec)
        _logger.warning(
            "the validation split has no example of %s%s, so nothing judges how well %s learned.",
            ", ".join(f"'{name}' ({counts[name]} for training)" for name in missing[:3]),
            f" and {len(missing) - 3} more classes" if len(missing) > 3 else "",
            "they are" if len(missing) > 1 else "it is",
        )


def _missing_classes(split: Split, spec: DataSpec) -> list[str]:
    return [name for name, count in class_counts(split, spec).items() if count == 0]


def _joined(first: Part | Loaded | None, second: Part | Loaded | None) -> Part | Loaded | None:
    """The examples of both; mapped images are of the same file."""
    if isinstance(first, MappedImages) and isinstance(second, MappedImages):
        return first.join(second)
    if isinstance(first, Ragged) and isinstance(second, Ragged):
        return first.join(second)
    if isinstance(first, Loaded) and isinstance(second, Loaded):
        return first.join(second)
    if first is None:
        return None
    assert isinstance(first, Tensor), "a data set lies in one place"
    assert isinstance(second, Tensor), "a data set lies in one place"
    return torch.cat((first, second))


def _select(split: Split, indices: Indices) -> Split:
    return split.select(torch.from_numpy(indices))
