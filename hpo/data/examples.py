"""Examples of a task: a split in memory, the sealed test split, the data set, and what a model must know about it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.data.mapped import MappedImages


@dataclass(frozen=True)
class Split:
    """Examples of one split, in memory; images that do not fit there stay in a file, and are read when indexed."""

    inputs: Tensor | MappedImages  # (N, C, H, W) uint8 images or (N, F) float32 features
    targets: Tensor  # (N,) int64 class indices or (N,) float32 values

    def __len__(self) -> int:
        return len(self.targets)

    def fingerprints(self) -> list[bytes]:
        """A hash of the inputs of each example: equal inputs have equal hashes."""
        parts = (self.inputs[first : first + 1024].numpy() for first in range(0, len(self), 1024))
        return [blake2b(example.tobytes(), digest_size=16).digest() for part in parts for example in part]


class SealedSplit:
    """The test split: opened once, for the winner of a study.

    Before that only its size is visible; `times_opened` lets a test check this.
    """

    def __init__(self, read: Callable[[], Split], size: int) -> None:
        self._read = read
        self._size = size
        self.times_opened = 0

    def __len__(self) -> int:
        return self._size

    def open(self) -> Split:
        """The examples. Only the final report of a study calls this."""
        self.times_opened += 1
        return self._read()

    def count_known(self, fingerprints: Collection[bytes]) -> int:
        """Number of examples whose fingerprint is among these. The split stays sealed."""
        return sum(fingerprint in fingerprints for fingerprint in self._read().fingerprints())


@dataclass(frozen=True)
class Dataset:
    """All examples of a task. `classes` names the class of each index; it is empty for a regression."""

    train: Split
    test: SealedSplit
    classes: tuple[str, ...] = ()

    @property
    def spec(self) -> DataSpec:
        return DataSpec(input_shape=tuple(self.train.inputs.shape[1:]), classes=self.classes)


@dataclass(frozen=True)
class DataSpec:
    """What a model must know about the data: plain values, stored beside each checkpoint."""

    input_shape: tuple[int, ...]  # (C, H, W) or (F,)
    classes: tuple[str, ...] = ()

    @property
    def num_outputs(self) -> int:
        """One logit per class, or one value for a regression."""
        return len(self.classes) or 1
