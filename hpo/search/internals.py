"""Private names of Optuna that samplers need, each behind one function. Read in Optuna 5.0.0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from optuna._transform import _SearchSpaceTransform as SearchSpaceTransform

from hpo.config import Direction

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, Trial, TrialState

__all__ = ["ENQUEUED", "SearchSpaceTransform", "all_trials", "direction_of", "identity", "set_system_attr", "trial_id"]

ENQUEUED = "fixed_params"
"""The attribute of a trial that holds what was enqueued, until it is asked for."""


def all_trials(study: Study, states: Sequence[TrialState] | None = None) -> list[FrozenTrial]:
    """The trials of the study, not copied. `study.get_trials()` shows one bracket only with the Hyperband pruner."""
    return study._storage.get_all_trials(study._study_id, deepcopy=False, states=states)


def identity(study: Study) -> tuple[BaseStorage, int]:
    """What tells the study apart from every other, also in another storage."""
    return study._storage, study._study_id


def direction_of(study: Study) -> Direction:
    """The direction of a study with one objective."""
    return Direction(study.direction.name.lower())


def trial_id(trial: Trial | FrozenTrial) -> int:
    """The trial's number in the database. A pruned trial that is continued keeps its number and gets a new id."""
    return trial._trial_id


def set_system_attr(study: Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Store a value with a running trial, as Optuna's own samplers do."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)
