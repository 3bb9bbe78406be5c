"""A task as it is searched: an objective with its space, checked against each other, and its data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.config import AUTO, USUAL, TrainConfig, config_fields
from hpo.data_options import Given, as_written, read_options
from hpo.errors import DataError, HpoError, SpaceError, UnknownNameError, UsageError
from hpo.objective import Objective
from hpo.parameters import Value
from hpo.space import Space, parse_assignments

if TYPE_CHECKING:
    from hpo.data.examples import Dataset

# A study has one budget, one metric and one kind of machine: a search may not choose between them.
NOT_TUNABLE = frozenset(
    {"max_epochs", "metric", "metric_direction", "seed", "device", "precision", "compile", "deterministic"}
)
NOT_TUNABLE_BY_LOOPS = frozenset({"max_epochs", "seed", "device"})
"""The same for a task with a training loop of its own, which has these as attributes of its trial."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """An objective with the space to search, checked against each other."""

    reference: str
    """What finds the objective again: a registered name, an absolute FILE.py, or module:attribute."""

    objective: Objective
    space: Space

    data_options: Mapping[str, Any] = field(default_factory=dict)
    """What was given of the options that the objective's `load` declares."""

    dataset: Dataset | None = None
    """The data, if they had to be read to know the loss or the metric."""

    def train_config(self, values: Mapping[str, Value], **settings: Any) -> TrainConfig:
        """Settings of the trainer for one configuration: the task's own, those given, then the searched ones.

        A training loop of the task's own has its budget, seed and device from them, and nothing else.
        """
        if self.objective.train:
            return TrainConfig(**{**self.objective.settings, **settings})
        searched = {name: value for name, value in values.items() if self.is_setting(name)}
        return TrainConfig(**{**self.objective.judged_by, **self.objective.settings, **settings, **searched})

    def model_parameters(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The part of a configuration that builds the model or the task's own loss, or all of it for a training loop of
        the task's own."""
        if self.objective.train:
            return dict(values)
        return {name: value for name, value in values.items() if not self.is_setting(name)}

    def is_setting(self, name: str) -> bool:
        """Whether a parameter is a setting of the trainer. A keyword of the task's model or of its own loss is not,
        whatever settings there are: such as `temperature`, or `margin`."""
        return name in config_fields() and name not in self._keywords

    @cached_property
    def _keywords(self) -> set[str]:
        return self.objective.model_parameters() | self.objective.loss_parameters()

    @property
    def has_test(self) -> bool:
        """Whether a winner can be tested."""
        return self.objective.train is None or self.objective.test is not None

    @property
    def not_tunable(self) -> frozenset[str]:
        """What a search may not choose."""
        return NOT_TUNABLE_BY_LOOPS if self.objective.train else NOT_TUNABLE

    def narrow(self, overrides: tuple[str, ...]) -> Task:
        """The task with its space narrowed, as `-p` does. Raises SpaceError, or UnknownNameError."""
        for name in (override.partition("=")[0].strip() for override in overrides):
            if name in self.not_tunable:
                raise SpaceError(f"{name} cannot be searched; give {_own_option(name)} instead of -p {name}=...")
        return replace(self, space=self.space.narrow(overrides))

    def extend(self, overrides: tuple[str, ...]) -> Task:
        """The task with a wider space, as `-p` with `--extend` makes it. Raises SpaceError, or UnknownNameError."""
        return replace(self, space=self.space.extend(overrides))

    def fix(self, assignments: Iterable[str]) -> Task:
        """The task with settings of the trainer fixed, as `patience=20` does; a searched one then has this value alone.

        Raises UsageError for a name that is not a setting or cannot be fixed, and for a value that is not allowed.
        """
        values = {
            name: _parse_setting(name, text)
            for name, text in parse_assignments("--set", assignments, "NAME=VALUE").items()
        }
        searched = {name: value for name, value in values.items() if name in self.space.parameters}
        objective = replace(self.objective, settings={**self.objective.settings, **values})
        fixed = replace(self, objective=objective, space=self.space.fix(searched))
        fixed.train_config(fixed.space.defaults())
        return fixed

    def with_data_options(self, given: Given) -> Task:
        """The task with options of its data. Raises UsageError for one that is unknown, missing or of another type."""
        return replace(self, data_options=read_options(self.objective.name, self.objective.load, given))

    @property
    def written_data_options(self) -> tuple[str, ...]:
        """The options of the data that were given, as `--data-option` takes them."""
        return as_written(self.data_options)

    def suited_to_data(self, data_dir: Path) -> Task:
        """The task with the loss and the metric that are usual for its kind of target, if it leaves them to the data.

        The data are read only if the kind decides. Raises DataError if that fails or the kind has no usual loss.
        """
        if not self.objective.is_for_any_kind:
            return self
        dataset = load_dataset(self, data_dir)
        kind = dataset.spec.kind
        if kind not in USUAL:
            raise DataError(
                f"the data of task '{self.objective.name}' have targets of the kind {kind}, which has no usual loss; "
                "give the Objective a loss and a metric."
            )
        usual = dict(zip(("loss", "metric"), USUAL[kind], strict=True))
        changes: dict[str, Any] = {n: value for n, value in usual.items() if getattr(self.objective, n) == AUTO}
        return replace(self, objective=replace(self.objective, **changes), dataset=dataset)

    def judged_by(self, metric: str) -> Task:
        """The task with another metric that decides; a training loop of its own has one only."""
        if metric == self.objective.metric:
            return self
        return replace(self, objective=replace(self.objective, metric=metric, direction=None))


def _own_option(name: str) -> str:
    return "--epochs" if name == "max_epochs" else f"--{name}"


def _parse_setting(name: str, text: str) -> Value:
    """The value of a setting of the trainer, read as the type of its default."""
    defaults = config_fields()
    if name in NOT_TUNABLE:
        raise UsageError(f"--set {name}={text}: {name} has a command-line option of its own, {_own_option(name)}.")
    if name not in defaults:
        raise UnknownNameError("setting of the trainer", name, sorted(defaults.keys() - NOT_TUNABLE), "(--set)")
    kind = type(defaults[name])
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        if kind is not bool:
            return kind(text)
    except ValueError:
        pass
    wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
    raise UsageError(f"--set {name}={text} is not allowed: {name} must be {wanted}.")


def load_dataset(task: Task, data_dir: Path) -> Dataset:
    """The task's data, read with its data options unless they have been; what goes wrong is raised as a DataError."""
    from hpo.data.examples import Dataset, SealedSplit  # they import torch, which `hpo tasks` can do without

    if task.dataset is not None:
        return task.dataset
    name = task.objective.name
    assert task.objective.load is not None, "a training loop of the task's own reads its data itself"
    try:
        dataset = task.objective.load(data_dir, **task.data_options)
    except HpoError:
        raise
    except (Exception, SystemExit) as error:  # reading is user code and may raise anything
        raise DataError(f"the data of task '{name}' cannot be loaded: {type(error).__name__}: {error}") from error
    if not isinstance(dataset, Dataset):
        raise DataError(f"load of task '{name}' must return a Dataset, but returned a {type(dataset).__name__}.")
    if not isinstance(dataset.test, SealedSplit):
        raise DataError(
            f"the data of task '{name}' have a {type(dataset.test).__name__} as test; it must be a SealedSplit, which "
            "hpo.hold_out makes."
        )
    if len(dataset.train) == 0:
        raise DataError(f"the data of task '{name}' have no training examples.")
    if len(dataset.test) == 0:
        raise DataError(
            f"the data of task '{name}' have an empty test split; hpo.hold_out takes one out of the examples."
        )
    return dataset


def check_parameters(task: Task) -> None:
    """Every parameter must set the trainer or build the model: one that does neither would be searched in vain."""
    for name in task.space.declared:
        if name in task.not_tunable:
            raise SpaceError(
                f"{name} (in '{task.space.group_of(name)}') cannot be searched; use its command-line option."
            )
    if task.objective.train:
        return
    settings = config_fields().keys() - NOT_TUNABLE
    accepted = settings | task.objective.model_parameters() | task.objective.loss_parameters()
    for name in task.space.declared:
        if name not in accepted:
            raise UnknownNameError(
                "setting of the trainer or keyword of the model",
                name,
                sorted(accepted),
                "A searched parameter must be one; model must name its keywords, and **keywords does not count.",
            )
    unknown = next((name for name in task.objective.settings if name not in config_fields()), None)
    if unknown is not None:
        raise UnknownNameError("setting of the trainer", unknown, config_fields(), "(settings of the objective)")


def check_ranges(task: Task) -> None:
    """Both ends of every range must be accepted by the trainer, before a trial finds out."""
    task.train_config(task.space.defaults())
    for name, parameter in task.space.declared.items():
        if task.objective.train or not task.is_setting(name):
            continue
        for value in parameter.extremes():
            try:
                task.train_config({name: value})
            except UsageError as error:
                raise SpaceError(f"{name} (in '{task.space.group_of(name)}'): {error}") from None
