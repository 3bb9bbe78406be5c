"""A checksum of a data set, by which a study knows whether it is searched on the data that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpo.data.examples import Split
from hpo.data.loaded import Loaded
from hpo.data.parts import Ragged, named_parts

if TYPE_CHECKING:
    from hpo.data.examples import Dataset
    from hpo.data.parts import Part

MAX_BYTES = 2**30
"""Inputs that are read for a checksum: about a second of SHA-256. Of more, evenly spaced examples are read."""

NUM_READ = 256
"""Examples of a torch Dataset that are read for a checksum."""

_NUM_AT_ONCE = 1024  # examples


def data_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the training examples, the class names and the size of the test split, as 64 hexadecimal digits.

    All targets count, and all inputs up to `MAX_BYTES`; of larger inputs the first, the last and evenly spaced examples
    in between. The order of the examples counts as well: the seed chooses the validation split by position. The test
    split stays sealed.
    """
    train, digest = dataset.train, hashlib.sha256()
    if isinstance(train.inputs, Loaded):  # some are read; all targets count
        some = _rows(len(train), MAX_BYTES // NUM_READ)
        digest.update(b"".join(train.select(some).fingerprints()))
        train = Split(torch.arange(len(train)), train.targets)
    inputs = named_parts(train.inputs)
    targets = {} if train.targets is None else named_parts(train.targets)
    digest.update(repr(_about(dataset, inputs, targets)).encode())
    for part in targets.values():
        _read(digest.update, part, torch.arange(len(part)))
    for part in inputs.values():
        bytes_per_example = part.nbytes // len(part)
        _read(digest.update, part, _rows(len(part), bytes_per_example * len(inputs)))
    if dataset.groups is not None:
        digest.update(torch.as_tensor(dataset.groups).numpy().tobytes())
    if dataset.is_ordered:
        digest.update(b"ordered")
    if dataset.raw is not None and isinstance(train.inputs, torch.Tensor):
        for content in dataset.raw.content(train.inputs):
            digest.update(content)
    return digest.hexdigest()


def _about(dataset: Dataset, inputs: dict[str, Part], targets: dict[str, Part]) -> tuple[Any, ...]:
    if inputs.keys() == targets.keys() == {""} and not any(isinstance(p, Ragged) for p in (inputs[""], targets[""])):
        first, wanted = inputs[""], targets[""]
        assert not isinstance(first, Ragged), "seen above"
        return tuple(first.shape), str(first.dtype), str(wanted.dtype), dataset.classes, len(dataset.test)
    described = [[(name, str(part.dtype), len(part)) for name, part in named.items()] for named in (inputs, targets)]
    return *described, dataset.kind, dataset.classes, len(dataset.test)


def _read(take: Callable[[memoryview], None], part: Part, rows: Tensor) -> None:
    for some in torch.split(rows, _NUM_AT_ONCE):
        if isinstance(part, Ragged):
            chosen = part.select(some)
            take(chosen.lengths.numpy().data)
            take(chosen.values.contiguous().numpy().data)
        else:
            take(part.index_select(0, some).numpy().data)


def _rows(num_examples: int, bytes_per_example: int) -> torch.Tensor:
    """Indices of the examples whose inputs are read."""
    num_read = min(num_examples, max(2, MAX_BYTES // max(1, bytes_per_example)))
    return torch.linspace(0, num_examples - 1, num_read, dtype=torch.float64).round().long()
