"""What a task gives to the search: its data, its model, its loss, its metric and the direction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.config import LOSSES, METRICS, Direction
from hpo.data.examples import Dataset
from hpo.errors import UnknownNameError

if TYPE_CHECKING:
    from torch import nn

    from hpo.space import Space


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
        if self.loss not in LOSSES:
            raise UnknownNameError("loss", str(self.loss), LOSSES)
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
