"""Options of a task's data: the keywords that its `load` declares, given as `--data-option NAME=VALUE`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import UnknownNameError, UsageError
from hpo.space import parse_assignments

FLAG = "--data-option"

REQUIRED = inspect.Parameter.empty
"""The default of an option that must be given."""

Given = Mapping[str, object] | Sequence[str]
"""Values by name, or as they are written: `label=price`."""

_TYPES: dict[Any, type] = {each: each for each in (str, int, float, bool)}
_TYPES |= {each.__name__: each for each in (str, int, float, bool)}  # annotations are texts in most modules
_WANTED = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


@dataclass(frozen=True)
class DataOption:
    """A keyword of `load` after the data directory."""

    name: str
    type: type
    """str, int, float or bool."""
    default: Any
    """REQUIRED if there is none."""

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    def describe(self) -> str:
        """`label=...` for one that must be given, else `kind=auto`."""
        return f"{self.name}=..." if self.is_required else f"{self.name}={_as_text(self.default)}"

    def read(self, value: object) -> Any:
        """The value, read from text if need be. Raises UsageError if it is of another type."""
        given = ",".join(map(str, value)) if isinstance(value, list | tuple) and self.type is str else value
        if isinstance(given, str) and self.type is not str:
            given = _read(given, self.type)
        if type(given) is int and self.type is float:
            given = float(given)
        if type(given) is not self.type:
            raise UsageError(
                f"{FLAG} {self.name}={_as_text(value)} is not allowed: {self.name} must be {_WANTED[self.type]}."
            )
        return given


def declared_options(load: Callable[..., Any] | None) -> dict[str, DataOption]:
    """The options of a task's `load`, by name: its keywords of type str, int, float or bool."""
    try:
        parameters = list(inspect.signature(load).parameters.values())[1:] if load else []
    except ValueError:  # what is written in C may have no signature
        return {}
    options = {}
    for each in parameters:
        kind = _type_of(each)
        if kind and each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY):
            options[each.name] = DataOption(each.name, kind, each.default)
    return options


def read_options(task: str, load: Callable[..., Any] | None, given: Given) -> dict[str, Any]:
    """The values that were given, by name, in the order in which `load` declares them.

    Raises UsageError for an option that `load` does not declare, for a value of another type, and if one that must be
    given is missing.
    """
    declared = declared_options(load)
    values = given if isinstance(given, Mapping) else parse_assignments(FLAG, given, "NAME=VALUE")
    for name in values:
        if not declared:
            raise UsageError(f"{FLAG} {name}={values[name]}: task '{task}' has no data options; omit it.")
        if name not in declared:
            raise UnknownNameError("data option", name, declared, f"Those of task '{task}': {_listed(declared)}.")
    missing = next((each.name for each in declared.values() if each.is_required and each.name not in values), None)
    if missing is not None:
        raise UsageError(f"task '{task}' needs {FLAG} {missing}=VALUE; its data options are {_listed(declared)}.")
    return {name: option.read(values[name]) for name, option in declared.items() if name in values}


def as_written(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The values as `--data-option` takes them."""
    return tuple(f"{name}={_as_text(value)}" for name, value in values.items())


def _type_of(parameter: inspect.Parameter) -> type | None:
    """The type of an option; None for a parameter that is none, such as one that holds an object."""
    if parameter.annotation is inspect.Parameter.empty:
        return _TYPES.get(type(parameter.default))
    if isinstance(parameter.annotation, str):
        return _TYPES.get(parameter.annotation.strip("\"'"))
    return _TYPES.get(parameter.annotation)


def _read(text: str, kind: type) -> Any:
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _as_text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _listed(options: Mapping[str, DataOption]) -> str:
    return ", ".join(each.describe() + (" (required)" if each.is_required else "") for each in options.values())
