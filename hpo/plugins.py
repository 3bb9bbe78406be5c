"""Tasks and search spaces: found through entry points, in a FILE.py, or as module:attribute; imported on demand.

An entry point in the group `hpo.objectives` (or `hpo.search_spaces`) names a package; every public module in it is a
task with an `objective` (or a search space with a `space`), known by the module's name.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from hpo.errors import UnknownNameError, UsageError, in_one_line
from hpo.imports import import_module, make_importable, warn_once
from hpo.objective import Objective
from hpo.space import Space
from hpo.task import Task, check_parameters, check_ranges

OBJECTIVES = "hpo.objectives"
SEARCH_SPACES = "hpo.search_spaces"

OBJECT = "<object>"
"""Stands for the reference of a task that is an Objective of a script or notebook: nothing finds it again."""


def load_task(task: str | Objective, space_reference: str | None = None) -> Task:
    """The task of that name, FILE.py or module:attribute, or of an Objective, with its own or another search space.

    Raises UnknownNameError or UsageError, in one line, for anything that cannot be found, imported or used.
    """
    found = _Found(task, OBJECT) if isinstance(task, Objective) else _load(OBJECTIVES, task, Objective)
    objective: Objective = found.value
    space = _load(SEARCH_SPACES, space_reference, Space).value if space_reference else _own_space(objective)
    found_task = Task(reference=found.reference, objective=objective, space=space)
    check_parameters(found_task)
    check_ranges(found_task)
    return found_task


def load_objective(reference: str) -> Objective:
    """The objective of that name, FILE.py or module:attribute, without a space."""
    objective: Objective = _load(OBJECTIVES, reference, Objective).value
    return objective


def registered(group: str) -> dict[str, str]:
    """Module path of every registered task or space, by its name; a broken plugin is reported and left out."""
    modules: dict[str, str] = {}
    for entry_point in entry_points(group=group):
        try:
            package = importlib.import_module(entry_point.value)
        except Exception as error:  # user code may raise anything, and must not stop the others
            warn_once(f"plugin '{entry_point.name}' ({entry_point.value}) is broken: {in_one_line(error)}")
            continue
        for module in pkgutil.iter_modules(getattr(package, "__path__", ())):
            if not module.name.startswith("_"):
                modules.setdefault(module.name, f"{entry_point.value}.{module.name}")
    return dict(sorted(modules.items()))


def require_registered(group: str, name: str) -> None:
    """Raise UnknownNameError unless the name is that of a registered task, or space, on this machine."""
    modules = registered(group)
    if name not in modules:
        kind = "registered task" if group == OBJECTIVES else "registered search space"
        raise UnknownNameError(
            kind,
            name,
            modules,
            "Studies for several machines know names, not files: register yours as an entry point (docs/tasks.md).",
        )


@dataclass(frozen=True)
class _Found:
    value: Any
    reference: str


def _load(group: str, reference: str, wanted: type) -> _Found:
    attribute = wanted.__name__.lower()
    if reference == OBJECT:
        raise UsageError(
            "the task is an Objective that was made in a script or notebook, and only there: give it to hpo.run_search "
            "or hpo.load_best(..., task=objective), or move it to a FILE.py."
        )
    if reference.endswith(".py"):
        path = Path(reference).resolve()
        return _Found(_attribute(_import_file(path), attribute, wanted, reference), str(path))
    if ":" in reference:
        module_name, _, attribute = reference.partition(":")
        if not module_name or not attribute:
            raise UsageError(f"'{reference}' is not module:attribute, such as my_package.tasks:objective.")
        # A console script does not look into the current folder, where people keep their own modules.
        make_importable(Path.cwd())
        return _Found(_attribute(import_module(module_name), attribute, wanted, reference), reference)
    modules = registered(group)
    kind = "task" if wanted is Objective else "search space"
    if reference not in modules:
        own = "FILE.py" if "/" in reference else f"./{reference}.py"
        raise UnknownNameError(kind, reference, modules, f"Or give a file of your own: {own}, or module:attribute.")
    return _Found(_attribute(import_module(modules[reference]), attribute, wanted, reference), reference)


def _own_space(objective: Objective) -> Space:
    if objective.space is not None:
        return objective.space
    if objective.name not in registered(SEARCH_SPACES):
        raise UsageError(
            f"task '{objective.name}' has no search space; add space= to its Objective, or select one with --space."
        )
    space: Space = _load(SEARCH_SPACES, objective.name, Space).value
    return space


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"there is no file {path}; use a registered task (see `hpo tasks`) or a FILE.py.")
    make_importable(path.parent)  # its neighbours, as `python FILE.py` would find them
    spec = importlib.util.spec_from_file_location(f"hpo_task_{path.stem}", path)
    assert spec is not None, "a .py file always has a loader"
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise UsageError(f"{path} cannot be imported: {in_one_line(error)}") from error
    return module


def _attribute(module: ModuleType, name: str, wanted: type, reference: str) -> Any:
    value = getattr(module, name, None)
    if isinstance(value, wanted):
        return value
    held = "nothing of that name" if value is None else f"a {type(value).__name__}"
    raise UsageError(f"{reference} must define `{name} = {wanted.__name__}(...)`, but has {held}.")
