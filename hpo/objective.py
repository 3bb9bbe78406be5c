"""What a task gives to the search: its data, its model, its loss, its metric and the direction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.config import METRICS, Direction
from hpo.errors import UnknownNameError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.data.mapped import MappedImages
    from hpo.space import Space


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


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A task: its data, model, loss, metric and search space.

    A parameter of the search space that is a field of `TrainConfig` sets the trainer; every other parameter
    is passed to `model` by its name, so `model` must accept it as a keyword.
    """

    name: str
    """Short name, as on the command line."""

    description: str
    """One line for `hpo tasks`."""

    load: Callable[[Path], Dataset]
    """Read the data set below the data directory; raises DataError when it is missing or damaged."""

    model: Callable[..., nn.Module]
    """`model(spec, **parameters)`: a network from normalised inputs (B, *input_shape) to outputs (B, num_outputs).

    If the network has a method `initialize_from_data(inputs)`, it is called with the first 512 normalised training
    examples before the training. `hpo.mlp`, `hpo.convnet`, `hpo.airnet` and `hpo.pretrained` are such functions."""

    loss: str = "cross_entropy"
    """One of `hpo.config.LOSSES`."""

    metric: str = "accuracy"
    """The metric to optimise on the validation split: one of `hpo.config.METRICS`."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `TrainConfig` that differ from their defaults for this task, such as max_epochs."""

    space: Space | None = None
    """The search space; if omitted, the registered space of the same name is used."""

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UnknownNameError("metric", self.metric, METRICS)

    @property
    def direction(self) -> Direction:
        """Whether a larger or a smaller metric is better."""
        return METRICS[self.metric]

    def model_parameters(self) -> set[str]:
        """Names that `model` accepts as keywords."""
        signature = inspect.signature(self.model)
        return {p.name for p in list(signature.parameters.values())[1:] if p.kind is not p.VAR_KEYWORD}
