"""What a task gives to the search: its data, model, loss and metric, or a training loop of its own."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from hpo.config import AUTO, LOSSES, METRICS, OWN, SEVERAL, Direction
from hpo.errors import UnknownNameError, UsageError, in_one_line

if TYPE_CHECKING:
    from torch import nn

    from hpo.data.examples import Dataset
    from hpo.space import Space
    from hpo.trial import TrainedTrial, Trial


METRIC_NAME = re.compile(r"[A-Za-z0-9_./-]+(?: [A-Za-z0-9_./-]+)*")
"""What MLflow takes everywhere, on Windows too."""

WEIGHTINGS = ("fixed", "uncertainty")
"""How the losses of several targets are added up: by their weights, or by what is learned of their noise as well."""

METRIC_CHARACTERS = "letters, digits, '_', '.', '/', '-' and single spaces"


@dataclass(frozen=True)
class Own:
    """What a task brings of its own, as one trial uses it; see the fields of `Objective` with these names."""

    loss: Callable[[Any, Any], Any] | None = None
    metrics: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    optimizer: Callable[..., Any] | None = None
    difficulty: Callable[[Any, Any], Any] | None = None
    losses: Mapping[str, str] = field(default_factory=dict)
    """The name of the loss of each of several targets."""
    weights: Mapping[str, float] = field(default_factory=dict)
    """What a target's loss is multiplied by, if not by 1."""
    weighting: str = "fixed"
    """One of WEIGHTINGS."""
    weigh: Any = None
    """The model's `Weighing` of these losses."""


NOTHING_OWN = Own()


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

    load: Callable[..., Dataset] | None = None
    """`load(data_dir)` reads the data set below the data directory; raises DataError when it is missing or damaged.

    Further keywords of type str, int, float or bool are options, which `--data-option NAME=VALUE` gives:
    `def load(data_dir: Path, *, label: str, rows: int = 1000)`. One without a default must be given."""

    model: Callable[..., nn.Module] | None = None
    """`model(spec, **parameters)`: a network from normalised inputs to outputs, such as (B, *spec.input_shape) to
    (B, spec.num_outputs); docs/tasks.md has the shapes for each kind of target.

    If the network has a method `initialize_from_data(inputs)`, it is called with the first 512 normalised training
    examples before the training. `hpo.mlp`, `hpo.convnet`, `hpo.airnet` and `hpo.pretrained` are such functions."""

    loss: str | Mapping[str, str] | Callable[..., Any] = "cross_entropy"
    """One of `hpo.config.LOSSES`; "auto" for the usual one of the kind of target that the data have; or a loss of your
    own: a function `(outputs, targets) -> scalar` that returns the mean
    over the batch, or an `nn.Module` (the class, or an instance of which each trial gets a copy).

    Its other keywords can be searched like the model's; the parameters of a module are trained with the model's. Where
    the data have no targets, the inputs stand for them. Outputs are whatever the model returns.

    For several targets that the data name it is a mapping from their names to names of losses. Then `weight_NAME`, the
    weight of a target, and `weighting`, "fixed" or "uncertainty", are parameters that can be searched."""

    metric: str = "accuracy"
    """The metric to optimise on the validation split: one of `hpo.config.METRICS`, "NAME/METRIC" for one of several
    targets, "auto" for the usual one of the kind of target, or a name in `metrics`."""

    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metrics of your own by name: a class of torchmetrics or another factory, called without arguments, of objects
    with `update(outputs, targets)` and `compute()`. They are measured on the validation and the test split. The one
    that decides is maximised or minimised by its `higher_is_better`, or else by `direction`."""

    optimizer: Callable[..., Any] | None = None
    """An optimizer of your own: `optimizer(groups, config)`, from the parameters in groups as torch.optim takes them
    (with `weight_decay` and `lr`) and the trial's TrainConfig. It is the trial's where `optimizer` is "own", which is
    then the default."""

    difficulty: Callable[[Any, Any], Any] | None = None
    """`difficulty(inputs, targets)`: a tensor (N,) with a number for each example of a split, larger for harder ones,
    from its inputs and targets as the split holds them. A `curriculum` of "given" goes by it."""

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
    """Whether to "maximize" or "minimize" the metric. With `train` it must be given, and the metric may have any name;
    else it is for a metric in `metrics` that does not say so itself."""

    def __post_init__(self) -> None:
        if self.train:
            self._check_loop()
            return
        if self.load is None or self.model is None:
            raise UsageError(f"task '{self.name}' needs load= and model=, or a training loop of its own, train=.")
        if self.test is not None:
            raise UsageError(f"test= of task '{self.name}' is for a training loop of its own, train=; omit it.")
        if isinstance(self.loss, str) and self.loss not in (AUTO, *LOSSES):
            raise UnknownNameError("loss", self.loss, [AUTO, *LOSSES])
        if isinstance(self.loss, Mapping):
            self._check_losses(self.loss)
        elif not isinstance(self.loss, str) and not callable(self.loss):
            raise UsageError(
                f"loss={self.loss!r} is not allowed: it must be the name of a loss, a function or an nn.Module."
            )
        self._check_metrics()

    def _check_losses(self, losses: Mapping[str, str]) -> None:
        for target, loss in losses.items():
            if not target.isidentifier():
                raise UsageError(f"the target '{target}' must have a name of letters, digits and '_', for weight_NAME.")
            if loss not in LOSSES:
                raise UnknownNameError(f"loss for the target {target}:", str(loss), LOSSES)

    def _check_metrics(self) -> None:
        if self.metric not in (AUTO, *self.metric_names):
            raise UnknownNameError("metric", str(self.metric), self.metric_names)
        for name, factory in self.metrics.items():
            if not callable(factory):
                raise UsageError(
                    f"metrics[{name!r}] is a {type(factory).__name__}; it must be a class or a function that makes one."
                )
            if not METRIC_NAME.fullmatch(name):
                raise UsageError(f"metric '{name}' of task '{self.name}' may have {METRIC_CHARACTERS} alone.")
        if self.direction is not None and self.metric not in self.metrics:
            raise UsageError(
                f"direction= of task '{self.name}' is for a training loop or a metric of its own; it is known for "
                f"{self.metric}: omit it."
            )

    @property
    def metric_names(self) -> list[str]:
        """All metrics that may decide."""
        if self.train:
            return [self.metric]
        if isinstance(self.loss, Mapping):
            of_targets = [f"{target}/{metric}" for target in self.loss for metric in METRICS if metric != "loss"]
            return ["loss", *of_targets, *self.metrics]
        return list(dict.fromkeys([*METRICS, *self.metrics]))

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
    def is_for_any_kind(self) -> bool:
        """Whether the loss or the metric follows from the kind of target, which the data alone show."""
        return AUTO in (self.loss, self.metric)

    @property
    def better(self) -> Direction:
        """Whether a larger or a smaller metric is better.

        Raises UsageError if a metric of the task's own does not say so.
        """
        if self.direction is not None:
            return Direction(self.direction)
        if self.metric not in self.metrics:
            return METRICS[self.metric.rpartition("/")[2]]
        factory = self.metrics[self.metric]
        is_larger_better = getattr(factory, "higher_is_better", None)  # a property of an object, where not of its class
        if not isinstance(is_larger_better, bool):
            is_larger_better = getattr(factory(), "higher_is_better", None)
        if not isinstance(is_larger_better, bool):
            raise UsageError(
                f"task '{self.name}' must say whether a larger or a smaller {self.metric} is better: "
                'direction="maximize" or direction="minimize".'
            )
        return Direction.MAXIMIZE if is_larger_better else Direction.MINIMIZE

    @property
    def judged_by(self) -> dict[str, str]:
        """The fields of a TrainConfig that follow from what the task minimises, measures and brings of its own; not
        those that only the data can tell."""
        named = SEVERAL if isinstance(self.loss, Mapping) else OWN
        fields = {"loss": self.loss if isinstance(self.loss, str) else named, "metric": self.metric}
        fields = {name: value for name, value in fields.items() if value != AUTO}
        if self.metric not in (AUTO, *METRICS):
            fields["metric_direction"] = self.better.value
        return fields | ({"optimizer": OWN} if self.optimizer else {})

    def own(self, parameters: Mapping[str, Any]) -> Own:
        """What the task brings of its own, with the parameters of one configuration; a loss with weights is new."""
        if isinstance(self.loss, Mapping):
            return self._own_of_several(self.loss, parameters)
        loss = None if isinstance(self.loss, str) else self._build_loss(parameters)
        return Own(loss, self.metrics, self.optimizer, self.difficulty)

    def _own_of_several(self, losses: Mapping[str, str], parameters: Mapping[str, Any]) -> Own:
        weights = {target: float(parameters.get(f"weight_{target}", 1.0)) for target in losses}
        for target, weight in weights.items():
            if weight < 0:
                raise UsageError(f"weight_{target}={weight} is not allowed: it must be at least 0.")
        weighting = parameters.get("weighting", "fixed")
        if weighting not in WEIGHTINGS:
            raise UnknownNameError("weighting", str(weighting), WEIGHTINGS)
        return Own(
            None, self.metrics, self.optimizer, self.difficulty, losses=losses, weights=weights, weighting=weighting
        )

    def _build_loss(self, parameters: Mapping[str, Any]) -> Callable[[Any, Any], Any]:
        assert not isinstance(self.loss, str | Mapping), "it has no name"
        keywords = {name: value for name, value in parameters.items() if name in self.loss_parameters()}
        if isinstance(self.loss, type):
            built: Callable[[Any, Any], Any] = self.loss(**keywords)
            return built
        if hasattr(self.loss, "state_dict"):
            return self._copied_loss()
        return partial(self.loss, **keywords) if keywords else self.loss

    def _copied_loss(self) -> Callable[[Any, Any], Any]:
        """A copy of the loss, whose parameters are trained, for one trial."""
        try:
            copied: Callable[[Any, Any], Any] = deepcopy(self.loss)  # type: ignore[assignment]
        except Exception as error:  # whatever is in it may raise anything
            raise UsageError(
                f"the loss of task '{self.name}' cannot be copied for each trial: {in_one_line(error)}; give its "
                "class, or a function, instead."
            ) from error
        return copied

    def model_parameters(self) -> set[str]:
        """Names that `model` accepts as keywords."""
        assert self.model is not None, "a task has a model, or a loop, which takes any parameter"
        return _keywords(self.model, after=1)

    def loss_parameters(self) -> set[str]:
        """Names that a loss of the task's own accepts as keywords, or the losses of several targets together."""
        if isinstance(self.loss, Mapping):
            return {"weighting", *(f"weight_{target}" for target in self.loss)}
        if isinstance(self.loss, str) or (hasattr(self.loss, "state_dict") and not isinstance(self.loss, type)):
            return set()
        return _keywords(self.loss, after=0 if isinstance(self.loss, type) else 2)


def _keywords(function: Callable[..., Any], *, after: int) -> set[str]:
    """Names of the parameters that can be given by keyword, without the first ones."""
    try:
        named = list(inspect.signature(function).parameters.values())[after:]
    except ValueError:  # what is written in C may have no signature
        return set()
    return {each.name for each in named if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)}
