"""Examples and batches of any shape: tensors, sequences of different lengths, and mappings or tuples of these.

A split holds its examples one way, and a batch of them looks another way where that helps: sequences are stored one
after the other, and padded in a batch.

    stored                          in a batch
    Tensor (N, ...)                 Tensor (B, ...)
    MappedImages (N, C, H, W)       Tensor (B, C, H, W)
    Ragged, N sequences             Padded (B, L, ...)
    Loaded, N of a torch Dataset    what its collate function makes
    mapping or tuple of those       mapping or tuple of theirs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from hpo.data.loaded import Loaded
from hpo.data.loaded import Rows as Rows
from hpo.data.mapped import MappedImages
from hpo.errors import DataError

_Structure = TypeVar("_Structure")


@dataclass(frozen=True, eq=False)
class Padded:
    """A batch of sequences, each filled up to the length of the longest."""

    values: Tensor
    """(B, L, ...)"""

    lengths: Tensor
    """(B,) int64: how many of the values are a sequence's own."""

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mask(self) -> Tensor:
        """(B, L) bool: True where a sequence has a value of its own."""
        return torch.arange(self.values.shape[1], device=self.values.device) < self.lengths[:, None]


def values_and_lengths(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The values of a batch, and the lengths of its sequences; None where all are of the same."""
    return (batch.values, batch.lengths) if isinstance(batch, Padded) else (batch, None)


class Ragged:
    """Sequences of different lengths, one after the other in one tensor; a batch of them is `Padded`."""

    def __init__(self, values: Tensor, lengths: Tensor, *, padding: float = 0, synonyms: Tensor | None = None) -> None:
        """`values` (total, ...) are those of all sequences, `lengths` (N,) int64 on the CPU says how many each has.

        `padding` is what fills up the shorter sequences of a batch. `synonyms` (vocabulary, choices) are other ids for
        each id, from `hpo.read_synonyms`. Raises DataError if lengths and values disagree.
        """
        if lengths.ndim != 1 or int(lengths.sum()) != len(values) or (len(lengths) and int(lengths.min()) < 0):
            raise DataError(
                f"the lengths of sequences add up to {int(lengths.sum())}, but there are {len(values)} values; each "
                "length must be at least 0."
            )
        self.values = values
        self.lengths = lengths
        self.padding = padding
        self.synonyms = synonyms
        self._starts = lengths.cumsum(0) - lengths  # on the CPU, where batches are planned
        self._starts_there, self._lengths_there = (part.to(values.device) for part in (self._starts, lengths))

    @classmethod
    def of(
        cls,
        sequences: Iterable[Tensor | np.ndarray[Any, Any] | list[Any]],
        *,
        padding: float = 0,
        synonyms: Tensor | None = None,
    ) -> Ragged:
        """From sequences (L, ...) of one type and shape; raises DataError if they do not go together."""
        tensors = [torch.as_tensor(sequence) for sequence in sequences]
        try:
            values = torch.cat(tensors) if tensors else torch.empty(0)
        except RuntimeError as error:
            raise DataError(f"the sequences cannot be combined: {error}") from error
        types = {tensor.dtype for tensor in tensors if len(tensor)}
        if len(types) > 1:
            raise DataError(f"the sequences have several types ({', '.join(sorted(map(str, types)))}); give them one.")
        lengths = torch.tensor([len(tensor) for tensor in tensors], dtype=torch.int64)
        return cls(values.to(next(iter(types), values.dtype)), lengths, padding=padding, synonyms=synonyms)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + 4 * self.lengths.nbytes

    def padded(self, rows: Rows, rows_there: Rows) -> Padded:
        """The batch of some sequences, given by the same rows on the CPU and where the values are.

        The length of the longest is known on the CPU, so nothing waits for a device.
        """
        longest = max(1, int(self.lengths[rows].max()))
        starts, lengths = self._starts_there[rows_there], self._lengths_there[rows_there]
        positions = torch.arange(longest, device=self.device)
        is_own = positions < lengths[:, None]
        index = torch.where(is_own, starts[:, None] + positions, 0)
        values = (
            self.values.index_select(0, index.flatten()) if len(self.values) else self.values.new_zeros(index.numel())
        )
        values = values.view(*index.shape, *self.values.shape[1:])
        is_own = is_own.view(*is_own.shape, *[1] * (values.ndim - 2))
        return Padded(
            values.where(is_own, torch.full((), self.padding, dtype=values.dtype, device=self.device)), lengths
        )

    def select(self, rows: Rows) -> Ragged:
        """Those of these rows alone, on the CPU."""
        lengths, starts = self.lengths[rows], self._starts[rows]
        within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        index = (within + starts.repeat_interleave(lengths)).to(self.device)
        return self._like(self.values[index], lengths)

    def join(self, others: Ragged) -> Ragged:
        """These sequences and then others."""
        values, lengths = torch.cat((self.values, others.values)), torch.cat((self.lengths, others.lengths))
        return self._like(values, lengths)

    def _like(self, values: Tensor, lengths: Tensor) -> Ragged:
        return Ragged(values, lengths, padding=self.padding, synonyms=self.synonyms)

    def to(self, device: torch.device | str) -> Ragged:
        return self._like(self.values.to(device), self.lengths)


Part = Tensor | MappedImages | Ragged
Examples = Part | Loaded | Mapping[str, Any] | tuple[Any, ...]
"""How a split holds inputs or targets: one part, a mapping or tuple of several; `Loaded` stands for both."""

Batch = Any
"""What a model or a loss gets: Tensor, Padded, or a mapping or tuple of them."""


def is_image_or_number(dtype: torch.dtype) -> bool:
    """Whether values of this type can be added up; other integers are ids."""
    return dtype.is_floating_point or dtype == torch.uint8


def named_parts(examples: Examples, name: str = "") -> dict[str, Part]:
    """All parts by name: "" for a single one, else what leads there, such as "image" or "0.left"."""
    if isinstance(examples, Mapping | tuple):
        inner = examples.items() if isinstance(examples, Mapping) else enumerate(examples)
        prefix = f"{name}." if name else ""
        return {at: part for key, each in inner for at, part in named_parts(each, f"{prefix}{key}").items()}
    return {name: cast(Part, examples)}


def parts(examples: Examples) -> list[Part]:
    """All parts, in order."""
    return list(named_parts(examples).values())


def map_parts(function: Callable[..., Any], examples: Any, *others: Any) -> Any:
    """The same structure with each part replaced by what the function makes of it (and of the same part of others)."""
    if isinstance(examples, Mapping):
        return {key: map_parts(function, each, *(o[key] for o in others)) for key, each in examples.items()}
    if isinstance(examples, tuple):
        return tuple(map_parts(function, each, *(o[i] for o in others)) for i, each in enumerate(examples))
    return function(examples, *others)


def select(examples: Examples, rows: Rows) -> Examples:
    """The examples of these rows alone, stored as before."""

    def select_part(part: Part) -> Part:
        return part[rows] if isinstance(part, Tensor) else part.select(rows)

    return cast(Examples, map_parts(select_part, examples))


def taken(examples: Examples, rows: Rows, rows_there: Rows) -> Batch:
    """The batch of these rows, given on the CPU and where the examples are."""
    if isinstance(examples, Tensor):  # the usual case, without detours
        return examples[rows_there] if isinstance(rows_there, slice) else examples.index_select(0, rows_there)

    def take_part(part: Part) -> Tensor | Padded:
        if isinstance(part, Ragged):
            return part.padded(rows, rows_there)
        return part[rows_there] if isinstance(rows_there, slice) else part.index_select(0, rows_there)

    return cast(Batch, map_parts(take_part, examples))


def map_tensors(function: Callable[..., Tensor], batch: _Structure, *others: Any) -> _Structure:
    """The same structure with each tensor replaced by what the function makes of it (and of the same one of others).

    Structures are tuples, lists, mappings and dataclasses, in any depth; what is neither that nor a tensor stays.
    """
    first: Any = batch
    if isinstance(first, Tensor):
        return cast(_Structure, function(first, *others))
    if isinstance(first, Mapping):
        changed: Any = {key: map_tensors(function, first[key], *(o[key] for o in others)) for key in first}
        return cast(_Structure, changed)
    if isinstance(first, tuple | list):
        items = [map_tensors(function, *each) for each in zip(first, *others, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)  # type: ignore[return-value]
    if is_dataclass(first) and not isinstance(first, type):
        names = [each.name for each in fields(first)]
        kept = {n: map_tensors(function, getattr(first, n), *(getattr(o, n) for o in others)) for n in names}
        return cast(_Structure, replace(first, **kept))
    return batch


def tensors_of(batch: Any) -> list[Tensor]:
    """All tensors in a structure, in order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, batch)
    return found


def joined(batches: Iterable[Any]) -> Any:
    """Batches put one after the other, and sequences padded to the longest of all; of scalars the mean."""

    def join(*tensors: Tensor) -> Tensor:
        if tensors[0].ndim == 0:
            return torch.stack(tensors).mean(0)
        if len({tensor.shape[1:] for tensor in tensors}) > 1:  # (B, L, ...) of different lengths
            longest = max(tensor.shape[1] for tensor in tensors)
            tensors = tuple(_lengthened(tensor, longest) for tensor in tensors)
        return torch.cat(tensors)

    first, *others = batches
    return map_tensors(join, first, *others)


def _lengthened(tensor: Tensor, length: int) -> Tensor:
    """The last element repeated: it is not counted, and a transcription reads it once."""
    return torch.cat((tensor, *[tensor[:, -1:]] * (length - tensor.shape[1])), dim=1)


def to_device(batch: _Structure, device: torch.device | str) -> _Structure:
    """The batch on a device."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    return map_tensors(move, batch)
