"""What a study was made with, and how two such settings differ, in the words of the command line."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

from hpo.config import COSTS, Direction
from hpo.errors import UnknownNameError, UsageError
from hpo.space import Space
from hpo.values import format_value

FORMAT = 2
"""Version of what a study stores of its settings; raised when an older hpo could misread it."""


_LISTS = ("overrides", "extensions", "objectives", "constraints", "fixed", "data_options")


def _written(as_: str) -> dict[str, str]:
    """Of a field that tells studies apart: how a user writes it."""
    return {"written": as_}


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What a study was made with. The space, and the fields with a `written`, tell studies apart."""

    task: str = field(metadata=_written("task"))
    """Name of the task."""

    space: Space
    """The space that is searched, after overrides."""

    seed: int = field(metadata=_written("--seed"))
    """Seed that every random draw of the study follows from."""

    strategy: str = field(metadata=_written("--strategy"))
    """One of hpo.search.strategies.STRATEGIES, or what finds another one; see hpo.extensions."""

    pruner: str = field(metadata=_written("--pruner"))
    """One of hpo.search.pruners.PRUNERS, or what finds another one; see hpo.extensions."""

    max_epochs: int = field(metadata=_written("--epochs"))
    """Maximum number of epochs per trial."""

    metric: str = field(metadata=_written("--metric"))
    """What is optimised, measured on the validation split."""

    direction: Direction
    """Whether a larger or a smaller metric is better."""

    limit: int | None = field(metadata=_written("--limit"))
    """Training examples used; None for all."""

    planned_trials: int
    """Trials that the study was first asked for. The stages follow from it, so more trials later do not move them."""

    space_reference: str | None = None
    """The space that was named in place of the task's own."""

    first_rung: int | None = field(default=None, metadata=_written("--first-rung"))
    """Epochs before the pruner stops a trial for the first time; None for its own choice."""

    overrides: tuple[str, ...] = ()
    """The overrides that narrowed the space, as they were written."""

    extensions: tuple[str, ...] = ()
    """The overrides that then widened it, as they were written, the first one first."""

    fixed: tuple[str, ...] = field(default=(), metadata=_written("--set"))
    """The settings of the trainer that were fixed, as they were written: `patience=20`."""

    data_options: tuple[str, ...] = field(default=(), metadata=_written("--data-option"))
    """What was given of the options of the task's data: `label=price`."""

    objectives: tuple[str, ...] = field(default=(), metadata=_written("--objective"))
    """Where there are several: the metric as `val/METRIC`, then some of hpo.config.COSTS. Empty for just the metric."""

    constraints: tuple[str, ...] = field(default=(), metadata=_written("--constraint"))
    """What a model may cost at most: `params<=5e6`, by some of hpo.config.COSTS."""

    folds: int | None = field(default=None, metadata=_written("--folds"))
    """Folds of the cross-validation whose mean is a trial's value; None where a validation split gives it."""

    @property
    def num_steps(self) -> int:
        """How many values a trial can report: its folds, or else its epochs."""
        return self.folds or self.max_epochs

    @property
    def limits(self) -> dict[str, float]:
        """The most that a model may cost, by names of hpo.config.COSTS."""
        return dict(map(read_constraint, self.constraints))

    @property
    def costs(self) -> tuple[str, ...]:
        """What is minimised beside the metric."""
        return self.objectives[1:]

    @property
    def unused_confidence(self) -> str | None:
        """That what was said about defaults changes nothing, in words; None where it does, or where nothing was."""
        names = ", ".join(self.space.confidences())
        if not names or (self.strategy == "priority" and not self.costs):
            return None
        reason = "with several objectives" if self.strategy == "priority" else f"with --strategy {self.strategy}"
        return f"the confidence in the default of {names} changes nothing {reason}"

    def extend(self, overrides: tuple[str, ...]) -> Self:
        """The settings with a wider space. Raises SpaceError, or UnknownNameError."""
        return replace(self, space=self.space.extend(overrides), extensions=self.extensions + overrides)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain data."""
        rules = {"rules": self.space.rules()} if self.space.has_rules else {}
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return plain | {"space": self.space.to_dict()} | rules

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Self:
        """The settings that `to_dict` described."""
        plain = {name: value for name, value in stored.items() if name != "rules"}
        tuples = {name: tuple(stored.get(name, ())) for name in _LISTS}
        space = Space.from_dict(stored["space"], stored.get("rules"))
        return cls(**plain | tuples | {"space": space, "direction": Direction(stored["direction"])})


def read_constraint(text: str) -> tuple[str, float]:
    """Name and highest value in `params<=5e6`. Raises UsageError if it is none."""
    name, _, most = (part.strip() for part in text.partition("<="))
    try:
        number = float(most)
    except ValueError:
        number = math.nan
    if not number > 0:  # not a number either
        raise UsageError(f"--constraint must be NAME<=NUMBER with a number above 0, such as params<=5e6; not '{text}'.")
    if name not in COSTS:
        raise UnknownNameError("cost", name, COSTS, f"(--constraint {text})")
    return name, number


def differences(made: StudySettings, asked: StudySettings) -> Iterator[str]:
    """How the settings differ, as a user wrote them: "--seed 0, not 1"."""
    for setting in fields(made):
        written = setting.metadata.get("written")
        if written is None:
            continue
        before, now = (_as_written(getattr(settings, setting.name)) for settings in (made, asked))
        if before != now:
            yield (
                f"no {written}, not {now}"
                if before is None
                else f"{written} {before}, not {'none' if now is None else now}"
            )
    yield from _space_differences(made.space, asked.space)


def _as_written(setting: Any) -> Any:
    return (" ".join(setting) or None) if isinstance(setting, tuple) else setting


def _space_differences(made: Space, asked: Space) -> Iterator[str]:
    for name in dict.fromkeys([*made.parameters, *asked.parameters]):
        if name not in asked.parameters:
            yield f"{_placed(name, made)}, which is gone"
        elif name not in made.parameters:
            yield f"no {_placed(name, asked)}"
        else:
            yield from _parameter_differences(name, made, asked)
    if made.rules() != asked.rules():
        yield "other forbidden configurations"
    order_before, order_now = ([group.name for group in space.groups] for space in (made, asked))
    if order_before != order_now:
        yield f"the groups {', '.join(order_before)}, not {', '.join(order_now)}"


def _parameter_differences(name: str, made: Space, asked: Space) -> Iterator[str]:
    before, now = made.parameters[name], asked.parameters[name]
    placed = _placed(name, made)
    if made.group_of(name) != asked.group_of(name):
        yield f"{placed}, not in '{asked.group_of(name)}'"
    if before.describe() != now.describe():
        yield f"{placed} {before.describe()}, not {now.describe()}"
    elif before.default != now.default:
        yield f"{placed} default {format_value(before.default)}, not {format_value(now.default)}"
    elif before.confidence != now.confidence:
        yield f"{placed} confidence {before.confidence or 'none'}, not {now.confidence or 'none'}"
    elif _declaration(name, made) != _declaration(name, asked):
        yield f"{placed} declared otherwise"


def _declaration(name: str, space: Space) -> dict[str, Any]:
    return space.to_dict()[space.group_of(name)][name]


def _placed(name: str, space: Space) -> str:
    return f"{name} (in '{space.group_of(name)}')"
