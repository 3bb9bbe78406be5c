"""What a task gives to the search: its data, model, loss and metric, or a training loop of its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.config import LOSSES, METRICS, Direction
from hpo.data.examples import Dataset
from hpo.errors import UnknownNameError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from hpo.space import Space
    from hpo.trial import TrainedTrial, Trial


METRIC_NAME = re.compile(r"[A-Za-z0-9_./-]+(?: [A-Za-z0-9_./-]+)*")
"""What MLflow takes everywhere, on Windows too."""

METRIC_CHARACTERS = "letters, digits, '_', '.', '/', '-' and single spaces"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A task: its data, model, loss, metric and search space; or a training loop of its own, `train`.

    A parameter of the search space that is a field of `TrainConfig` sets the trainer; every other parameter
    is passed to `model` by its name, so `model` must accept it as a keyword. With `train` there is no `load` and no
    `model`, and every parameter is the loop's.
    """

    name: str
    """Short name, as on the command line."""

    description: str
    """One line for `hpo tasks`."""

    load: Callable[[Path], Dataset] | None = None
    """Read the data set below the data directory; raises DataError when it is missing or damaged."""

    model: Callable[..., nn.Module] | None = None
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

    train: Callable[[Trial], object] | None = None
    """A training loop of your own, in place of `load` and `model`: it trains one `Trial` and reports its epochs."""

    test: Callable[[TrainedTrial], Mapping[str, float]] | None = None
    """With `train`: the scores of a `TrainedTrial` on the test split. It is called once for each winner of a complete
    search; if omitted, nothing is tested."""

    direction: Direction | str | None = None
    """With `train`: "maximize" or "minimize" its metric, which may have any name."""

    def __post_init__(self) -> None:
        if self.train:
            self._check_loop()
            return
        if self.load is None or self.model is None:
            raise UsageError(f"task '{self.name}' needs load= and model=, or a training loop of its own, train=.")
        if self.loss not in LOSSES:
            raise UnknownNameError("loss", str(self.loss), LOSSES)
        if self.metric not in METRICS:
            raise UnknownNameError("metric", self.metric, METRICS)
        for name in ("test", "direction"):
            if getattr(self, name) is not None:
                raise UsageError(f"{name}= of task '{self.name}' is for a training loop of its own, train=; omit it.")

    def _check_loop(self) -> None:
        for name in ("load", "model"):
            if getattr(self, name) is not None:
                raise UsageError(
                    f"task '{self.name}' has both train= and {name}=; its loop reads its own data: omit it."
                )
        if self.direction not in [*Direction]:
            raise UsageError(
                f"task '{self.name}' must say whether a larger or a smaller {self.metric} is better: "
                f'direction="maximize" or direction="minimize", not {self.direction!r}.'
            )
        if not METRIC_NAME.fullmatch(self.metric):
            raise UsageError(f"metric '{self.metric}' of task '{self.name}' may have {METRIC_CHARACTERS} alone.")
        unknown = next((name for name in self.settings if name != "max_epochs"), None)
        if unknown is not None:
            raise UsageError(
                f"settings of task '{self.name}' may only have max_epochs, not {unknown}: its loop is not the shared "
                "trainer."
            )

    @property
    def better(self) -> Direction:
        """Whether a larger or a smaller metric is better."""
        return METRICS[self.metric] if self.direction is None else Direction(self.direction)

    def model_parameters(self) -> set[str]:
        """Names that `model` accepts as keywords."""
        assert self.model is not None, "a task has a model, or a loop, which takes any parameter"
        signature = inspect.signature(self.model)
        return {p.name for p in list(signature.parameters.values())[1:] if p.kind is not p.VAR_KEYWORD}
