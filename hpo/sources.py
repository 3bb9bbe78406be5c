"""The source files of a task, by which a study knows whether it is searched with the code that it began with."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import sys
import textwrap
import tokenize
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.objective import Objective

_MAX_KNOWN = 1000
"""Sources whose checksums and imports are kept: each trial of a worker asks for those of the same files."""


def source_checksums(objective: Objective) -> dict[str, str]:
    """SHA-256 of the files that define the task's functions, and of those that they import from their folder.

    The functions are `load` and `model`, or `train` and `test`. By path relative to the file's folder, or for a module
    of a package to the folder that its top-level package is in. What is installed elsewhere does not count, hpo
    included: its version is recorded instead. Comments and blank lines do not change a checksum, docstrings do.
    """
    files = {name: path for module in _own_modules(objective) for name, path in _imported_files(module).items()}
    return {name: _checksum(path.read_text(encoding="utf-8")) for name, path in sorted(files.items())} | _typed(
        objective
    )


def source_folder(objective: Objective) -> Path | None:
    """The folder of the file that defines the task; None for one that was typed into an interpreter."""
    return next((Path(module.__file__ or "").parent for module in _own_modules(objective)), None)


def changed_sources(before: dict[str, str], now: dict[str, str]) -> list[str]:
    """The files whose checksums differ, or that only one of the two has, sorted by name."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def _own_modules(objective: Objective) -> list[ModuleType]:
    """The modules that define the task's functions; those of hpo and those without a file are left out."""
    modules = [sys.modules.get(_module_name(function)) for function in _functions(objective)]
    return [each for each in modules if each and each.__name__.partition(".")[0] != "hpo" and hasattr(each, "__file__")]


def _functions(objective: Objective) -> list[Any]:
    functions = (objective.load, objective.model, objective.train, objective.test)
    own = [function for function in functions if function]
    # The loops of hpo.integrations are made of functions of the task's own.
    return [*own, *(inner for function in own for inner in getattr(function, "functions", ()))]


def _module_name(function: Any) -> str:
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__module__", ""))


def _typed(objective: Objective) -> dict[str, str]:
    """The same of functions that were typed into a notebook, `train()` for one, but not of what they call."""
    found = {}
    for function in _functions(objective):
        if _module_name(function) != "__main__" or hasattr(sys.modules["__main__"], "__file__"):
            continue
        with suppress(OSError, TypeError):  # an interpreter without a notebook does not keep what was typed
            found[f"{getattr(function, '__name__', 'function')}()"] = _checksum(
                textwrap.dedent(inspect.getsource(function))
            )
    return found


@lru_cache(_MAX_KNOWN)
def _checksum(source: str) -> str:
    return hashlib.sha256(_without_comments(source).encode()).hexdigest()


def _imported_files(module: ModuleType) -> dict[str, Path]:
    """The module's own source files, by path relative to its folder or to that of its top-level package."""
    package = sys.modules.get(module.__name__.partition(".")[0]) if "." in module.__name__ else None
    top = Path((package and package.__file__) or module.__file__ or "").resolve().parent
    root = top.parent if package else top
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        path = Path(getattr(current, "__file__", None) or "").resolve()  # a built-in module has none
        name = path.relative_to(root).as_posix() if path.is_relative_to(top) else ""
        if path.suffix != ".py" or not name or name in found or "site-packages" in path.relative_to(top).parts:
            continue
        found[name] = path
        names = _imported_names(path.read_text(encoding="utf-8"), current.__package__ or "")
        waiting += [sys.modules[each] for each in names if each in sys.modules]
    return found


@lru_cache(_MAX_KNOWN)
def _imported_names(source: str, package: str) -> tuple[str, ...]:
    """Every module that a source may mean by its imports; of `from a import b` both a and a.b."""
    return tuple(_read_imports(source, package))


def _read_imports(source: str, package: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _with_parents(alias.name)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from _with_parents(base)
            for alias in node.names:
                yield f"{base}.{alias.name}"


def _with_parents(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _without_comments(source: str) -> str:
    """The source without comments, blank lines and spaces at the ends of lines."""
    lines = source.split("\n")  # as tokenize counts them
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(stripped for line in lines if (stripped := line.rstrip()))
