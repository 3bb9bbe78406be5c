"""How a worker finds the code of a task."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import cloudpickle

from hpo.errors import UsageError, in_one_line
from hpo.plugins import OBJECT
from hpo.sources import source_checksums

if TYPE_CHECKING:
    from hpo.task import Task


def task_code(task: Task) -> dict[str, Any]:
    """How a worker finds the task's code, as fields of Setup: by its reference, or as a pickle of the object itself.

    Raises UsageError if the object cannot be pickled: an open file or a database in one of its functions.
    """
    if task.reference != OBJECT:
        return {"task_reference": task.reference}
    try:
        pickled = cloudpickle.dumps(task.objective)
    except Exception as error:  # whatever is in it may raise anything
        raise UsageError(
            f"task '{task.objective.name}' cannot be sent to the workers: {in_one_line(error)}; make such objects "
            "inside its functions, or move it to a FILE.py."
        ) from error
    sources = source_checksums(task.objective)
    return {"task_reference": OBJECT, "objective": pickled, "import_path": tuple(sys.path), "sources": sources}
