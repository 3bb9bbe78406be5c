"""What other packages add to hpo: strategies, pruners, executors and export formats, each made by a factory.

A factory is found by the name of an entry point in its group, or as `module:factory`. It is called with those of the
offered keywords that it accepts, so `optuna.samplers:TPESampler` and a function of no arguments are both factories.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from hpo.errors import UnknownNameError, UsageError, in_one_line
from hpo.imports import import_module, make_importable

STRATEGIES = "hpo.strategies"
PRUNERS = "hpo.pruners"
EXECUTORS = "hpo.executors"
EXPORTERS = "hpo.exporters"

_KINDS = {STRATEGIES: "strategy", PRUNERS: "pruner", EXECUTORS: "executor", EXPORTERS: "export format"}

Factory = Callable[..., Any]


def find_factory(group: str, name: str, built_in: Sequence[str]) -> Factory:
    """The factory that is registered under a name, or at `module:factory`.

    Raises UnknownNameError for a name that is neither `built_in` nor registered, UsageError if the module cannot be
    imported or has no such function.
    """
    factory = _attribute(name) if ":" in name else _registered(group, name, built_in)
    if not callable(factory):
        raise UsageError(f"{name} is not a factory: give a function or a class, as module:factory.")
    return factory  # type: ignore[no-any-return]


def call(factory: Factory, offered: Mapping[str, Any]) -> Any:
    """What a factory makes of those of the offered keywords that it accepts. Raises UsageError if it raises."""
    try:
        return factory(**{name: value for name, value in offered.items() if accepts(factory, name)})
    except Exception as error:  # user code may raise anything
        raise UsageError(f"{getattr(factory, '__name__', factory)} failed: {in_one_line(error)}") from error


def accepts(factory: Factory, keyword: str) -> bool:
    """Whether a factory has a parameter of that name."""
    try:
        return keyword in inspect.signature(factory).parameters
    except ValueError:  # some classes written in C have no signature
        return False


def _attribute(reference: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    make_importable(Path.cwd())  # a console script does not look into the current folder
    return getattr(import_module(module_name), attribute, None)


def _registered(group: str, name: str, built_in: Sequence[str]) -> Any:
    points = {point.name: point for point in entry_points(group=group)}
    if name not in points:
        raise UnknownNameError(_KINDS[group], name, [*built_in, *sorted(points)], "Or give your own as module:factory.")
    try:
        return points[name].load()
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise UsageError(f"{name} ({points[name].value}) cannot be imported: {in_one_line(error)}") from error
