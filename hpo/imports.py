"""Code of others, imported on demand: what goes wrong is reported in one line."""

from __future__ import annotations

import importlib
import logging
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType

from hpo.errors import UsageError, in_one_line

_LIBRARY_PATH = tuple(sys.path)  # as it is before the folder of any task is added

_logger = logging.getLogger(__name__)


def import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise UsageError(f"{name} cannot be imported: {in_one_line(error)}") from error


def make_importable(folder: Path) -> None:
    """Add the folder to the path: last, so that nothing in it replaces an installed package."""
    if str(folder) in sys.path:
        return
    for file in sorted(folder.glob("*.py")):
        library = PathFinder.find_spec(file.stem, _LIBRARY_PATH)
        if file.stem in sys.builtin_module_names or (library and library.origin not in (None, str(file))):
            warn_once(f"{file} has the name of a library: `import {file.stem}` finds the library. Rename the file.")
    sys.path.append(str(folder))


@cache
def warn_once(message: str) -> None:
    _logger.warning(message)
