"""Examples of a task as the trainer takes them, where nothing has to be guessed: arrays, class names, labels from 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.data.dtypes import of_usual_type
from hpo.data.parts import Ragged, map_parts
from hpo.errors import DataError

_OF_INTEGERS = ("classification", "tagging", "segmentation", "embedding", "instances", "transcription")
_SMALL = (torch.bool, torch.uint8)  # of masks and of several labels, which stay as they are
_OF_NUMBERS = ("regression", "box", "soft_labels")


def convert_inputs(inputs: Any) -> Any:
    """Inputs with arrays as tensors, of types that torch supports well."""
    return map_parts(lambda part: _supported(_tensor(part)), _unwrapped(inputs))


def same_parts(one: Any, other: Any) -> bool:
    """Whether these are the same parts, because nothing was converted."""
    are_same: list[bool] = []
    map_parts(lambda part, its_original: are_same.append(part is its_original), one, other)
    return all(are_same)


@dataclass(frozen=True)
class TargetConversion:
    """How the targets of each split become indices of classes, or numbers.

    An array becomes a tensor. Of one class for each example, names become indices, and so do whole numbers of any type,
    true and false, and labels that count from 1 to the number of classes. Names and truth values need no `classes`.
    """

    classes: tuple[str, ...] = ()
    kind: str | None = None
    first: int = 0
    """The label of the first class: 0 or 1."""
    named: Mapping[str, TargetConversion] = field(default_factory=dict)
    """That of each of several targets."""
    given: Any = ()
    """The classes as the task has given them."""

    @classmethod
    def of(cls, targets: Any, classes: Any, kind: Any) -> TargetConversion:
        """The one that the targets of the training split need. Raises DataError for an example without a label."""
        targets = _unwrapped(targets)
        if isinstance(classes, Mapping) or isinstance(kind, Mapping):
            each = targets if isinstance(targets, Mapping) else {}
            found = {name: cls.of(part, _for(classes, name, ()), _for(kind, name)) for name, part in each.items()}
            return cls(named=found, given=classes)
        given, classes = classes, tuple(classes)
        if kind not in (None, "classification"):
            return cls(classes, kind, given=given)
        values = _tensor(targets)
        if _is_names(values):
            return cls(classes or tuple(sorted(set(_names(values)))), kind, given=given)
        if isinstance(values, Tensor) and values.dtype == torch.bool and values.ndim == 1 and not classes:
            return cls(("false", "true"), kind)
        found_kind = kind or ("classification" if classes else None)
        first = int(found_kind is not None and _counts_from_1(values, len(classes)))
        return cls(classes, kind, first, given=given)

    @property
    def names(self) -> Any:
        """The names of the classes as the task has given them, with those that the targets themselves say."""
        if not self.named:
            return self.given or self.classes
        found = {name: each.classes for name, each in self.named.items() if each.classes}
        return {**found, **self.given} if isinstance(self.given, Mapping) else found or self.given

    def __call__(self, targets: Any) -> Any:
        """Targets of a split. Raises DataError for a name that is no class."""
        targets = _unwrapped(targets)
        if self.named:
            return {name: self.named[name](part) if name in self.named else part for name, part in targets.items()}
        if targets is None or self.kind == "own" or isinstance(targets, Mapping | tuple):
            return map_parts(_tensor, targets)
        values = _tensor(targets)
        if _is_names(values):
            return _indices(_names(values), self.classes) if self.classes else values
        if isinstance(values, Ragged):
            is_short = _is_integral(values.values) and values.dtype != torch.int64
            return _with(values, torch.Tensor.long) if is_short else values
        if not isinstance(values, Tensor):
            return values
        kind = self.kind or ("classification" if self.classes and values.ndim == 1 else None)
        if kind in _OF_NUMBERS:
            return values.float() if values.dtype == torch.float64 or _is_integral(values) else values
        if kind == "classification" and values.ndim == 1 and _is_whole(values):
            return values.long() - 1 if self.first else values.long()
        if (kind in _OF_INTEGERS or self.classes) and _is_integral(values) and values.dtype not in _SMALL:
            return values.long()
        return _supported(values)


def _for(given: Any, name: str, default: Any = None) -> Any:
    return given.get(name, default) if isinstance(given, Mapping) else default


def _unwrapped(examples: Any) -> Any:
    """Columns of a data frame and lists as arrays; a tuple or a mapping is several parts."""
    return examples.to_numpy() if hasattr(examples, "to_numpy") else examples


def _tensor(part: Any) -> Any:
    """An array or a list of numbers as a tensor; of texts as an array; anything else as it is."""
    part = _unwrapped(part)
    if isinstance(part, list) and part and isinstance(part[0], str | int | float | bool):
        part = np.array(part, dtype=object if isinstance(part[0], str) else None)
    if not isinstance(part, np.ndarray) or part.dtype.kind not in "biuf":
        return part
    own = part if part.dtype.isnative and part.flags.writeable else part.astype(part.dtype.newbyteorder("="))
    return torch.from_numpy(np.ascontiguousarray(own))


def _supported(part: Any) -> Any:
    if isinstance(part, Ragged):
        values = of_usual_type(part.values)
        return part if values is part.values else _with(part, lambda _: values)
    return of_usual_type(part) if isinstance(part, Tensor) else part


def _with(part: Ragged, convert: Callable[[Tensor], Tensor]) -> Ragged:
    return Ragged(convert(part.values), part.lengths, padding=part.padding, synonyms=part.synonyms)


def _is_names(values: Any) -> bool:
    return (
        isinstance(values, np.ndarray)
        and values.ndim == 1
        and len(values) > 0
        and (values.dtype.kind == "U" or (values.dtype.kind == "O" and any(isinstance(each, str) for each in values)))
    )


def _names(values: Any) -> list[str]:
    for row, name in enumerate(values):
        if not isinstance(name, str):
            raise DataError(f"the target of example {row} is {name!r}, but others are names of classes; leave it out.")
    return list(map(str, values))


def _indices(names: Sequence[str], classes: Sequence[str]) -> Tensor:
    known = {name: index for index, name in enumerate(classes)}
    if unknown := next((name for name in names if name not in known), None):
        raise DataError(f"the target '{unknown}' is not one of the classes {', '.join(classes)}.")
    return torch.tensor([known[name] for name in names])


def _is_integral(values: Tensor) -> bool:
    return not values.is_floating_point() and not values.is_complex()


def _is_whole(values: Tensor) -> bool:
    return _is_integral(values) or (values.is_floating_point() and bool((values == values.round()).all()))


def _counts_from_1(values: Any, num_classes: int) -> bool:
    """Whether the labels are all of 1 ... num_classes, and nothing else."""
    if not isinstance(values, Tensor) or values.ndim != 1 or values.dtype == torch.bool or not _is_whole(values):
        return False
    return num_classes > 1 and set(values.tolist()) == set(range(1, num_classes + 1))
