"""Training loops of other frameworks as `Objective(train=...)`: each module needs the extra of its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.trial import Trial


def checkpoint_of(trial: Trial) -> Path | None:
    """The checkpoint that an earlier attempt at the trial has left; None if it begins."""
    state = trial.resume()
    return trial.folder / state["checkpoint"] if state else None
