"""The strategy `priority`: the default configuration first, then group after group opens in the order of the space.

Two short stages tune the first group, then the first two, while the closed groups are held at the best trial so far;
every second trial is a scout that searches everything, and no group is ever frozen. Priority order helps to reach the
good region, not to finish there. What is searched is proposed by a model of the learning curves (hpo.search.surrogate)
for the first 250 trials, or by one of the Pareto front if there are two objectives (hpo.search.front), and by TPE after
them and for more objectives. docs/strategies.md says what this is worth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.trial import TrialState

from hpo.config import Direction, derive_seed
from hpo.search import stored
from hpo.search.encoding import Encoding, distribution
from hpo.search.front import FrontSurrogate
from hpo.search.internals import all_trials, direction_of, identity
from hpo.search.optimum import OptimumPrior
from hpo.search.prior import Prior
from hpo.search.surrogate import Surrogate
from hpo.search.wrappers import PinningSampler, TrialSeededSampler

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

    from hpo.parameters import Value
    from hpo.space import Space

NUM_STARTUP_TRIALS = 4
"""Trials before the model of the learning curves proposes any: the default configuration, then points of a sequence."""

NUM_MODELLED_TRIALS = 250
"""Trials before TPE takes over: the model weighs at most 400 observations, and would forget the others."""

DEFAULT_CONFIGURATION = "default configuration"
TRIED_BY_HAND = "tried by hand"
EVERYTHING = "everything"
SCOUT = "everything (scout)"


def stage_length(num_trials: int) -> int:
    """Trials in each of the two stages of a study that was planned with `num_trials`."""
    return min(10, round(0.15 * num_trials))


def open_groups(number: int, num_groups: int, num_trials: int) -> int:
    """How many of the groups, counted from the first, trial `number` tunes; 0 for the default configuration.

    It depends on nothing but the number, so it is the same after a restart and for every worker.
    """
    if number == 0:
        return 0
    if number % 2 == 1:
        return num_groups
    return _groups_of_stage(number, num_groups, num_trials)


def stage_name(number: int, groups: Sequence[str], num_trials: int) -> str:
    """What trial `number` searches, for people: "step size", "step size + optimizer", "everything", ..."""
    if number == 0:
        return DEFAULT_CONFIGURATION
    num_in_stage = _groups_of_stage(number, len(groups), num_trials)
    if num_in_stage == len(groups):
        return EVERYTHING
    if number % 2 == 1:
        return SCOUT
    return " + ".join(groups[:num_in_stage])


def _groups_of_stage(number: int, num_groups: int, num_trials: int) -> int:
    length = stage_length(num_trials)
    if number < length:
        return min(1, num_groups)
    if number < 2 * length:
        return min(2, num_groups)
    return num_groups


def tunable_groups(space: Space) -> dict[str, tuple[str, ...]]:
    """The parameters that can vary, by group; without the groups in which everything is fixed."""
    varying = {
        group.name: tuple(name for name, parameter in group.parameters.items() if not parameter.is_fixed)
        for group in space.groups
    }
    return {group: names for group, names in varying.items() if names}


class PrioritySampler(PinningSampler):
    """The strategy `priority` as an ordinary Optuna sampler: `optuna.create_study(sampler=PrioritySampler(space))`.

    Every trial must suggest every parameter of the space; what else it suggests is drawn by the base. `num_trials` is
    the number of trials that the study was planned with; the stages follow from it, so it must not change when more are
    added later. `base` draws what the model of the learning curves does not propose; without one it is TPE. Without
    curves, as where trials report folds, the model learns from final values alone.

    A trial depends on the seed, its number and the trials before it alone: any number of workers may ask, and a restart
    changes nothing.
    """

    def __init__(
        self,
        space: Space,
        *,
        seed: int = 0,
        num_trials: int = 100,
        base: BaseSampler | None = None,
        has_curves: bool = True,
    ) -> None:
        super().__init__(base or TrialSeededSampler(lambda trial_seed: TPESampler(seed=trial_seed), seed))
        self._groups = list(tunable_groups(space).values())
        self._defaults = space.defaults()
        self._distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
        self._num_trials = num_trials
        self._seed = seed
        self._encoding = Encoding(space)
        self._space = space
        self._has_curves = has_curves
        self._optimum = OptimumPrior(self._encoding) if space.confidences() else None
        self._front = FrontSurrogate(space)
        self._surrogate = self._new_surrogate()
        self._surrogate_study: tuple[BaseStorage, int] | None = None

    def pin(self, study: Study, trial: FrozenTrial) -> Mapping[str, Value]:
        return self.held(study, trial.number)

    def held(self, study: Study, number: int) -> Mapping[str, Value]:
        """Values that trial `number` would not search, if it were asked for now."""
        num_open = open_groups(number, len(self._groups), self._num_trials)
        closed = [name for group in self._groups[num_open:] for name in group]
        if number == 0:
            return self._defaults
        if not closed:
            return {}
        held = self._defaults | _best_values(study)
        return {name: held[name] for name in closed}

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        others = super().infer_relative_search_space(study, trial)
        return self._distributions | others if self._is_modelled(study, trial) else others

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not self._is_modelled(study, trial):
            return super().sample_relative(study, trial, search_space)
        proposed = self._proposal(study, trial)
        others = {name: declared for name, declared in search_space.items() if name not in proposed}
        drawn = super().sample_relative(study, trial, others) if others else {}
        return drawn | {name: value for name, value in proposed.items() if name in search_space}

    def _is_modelled(self, study: Study, trial: FrozenTrial) -> bool:
        return 0 < trial.number < NUM_MODELLED_TRIALS and len(study.directions) <= 2

    def _proposal(self, study: Study, trial: FrozenTrial) -> dict[str, Value]:
        held = self.pinned(trial)
        if trial.number >= NUM_STARTUP_TRIALS and (proposed := self._most_promising(study, trial, held)) is not None:
            return proposed
        optimum = self._optimum if len(study.directions) == 1 else None
        return self._sequence_point(trial.number, optimum) | dict(held)

    def _most_promising(self, study: Study, trial: FrozenTrial, held: Mapping[str, Value]) -> dict[str, Value] | None:
        rng = np.random.default_rng(derive_seed(self._seed, trial.number, "surrogate"))
        others = other_trials(study, trial)
        if len(study.directions) == 2:
            directions = [Direction(direction.name.lower()) for direction in study.directions]
            return self._front.propose(others, held, directions=directions, rng=rng)
        return self._surrogate_of(study).propose(
            others, held, direction=direction_of(study), rng=rng, time_counts=is_time_limited(study)
        )

    def _surrogate_of(self, study: Study) -> Surrogate:
        # It remembers the trials of one study; a sampler may serve several.
        key = identity(study)
        if self._surrogate_study != key:
            storage, study_id = key  # Hyperband shows a study without its attributes
            kept = storage.get_study_user_attrs(study_id).get(stored.RECORD + stored.PRIORS, {})
            priors = Prior.read(self._encoding, kept)
            self._surrogate = self._new_surrogate(priors)
            self._surrogate_study = key
        return self._surrogate

    def _new_surrogate(self, priors: Sequence[Prior] = ()) -> Surrogate:
        return Surrogate(self._space, has_curves=self._has_curves, priors=priors, optimum=self._optimum)

    def _sequence_point(self, number: int, optimum: OptimumPrior | None) -> dict[str, Value]:
        """The point that belongs to the trial; scouts and other trials have a scrambled Sobol sequence each.

        In a single sequence the second value of every second point is in the same half of its range. Scouts disregard
        what the user believes of the optimum, which shows whether it is right.
        """
        from scipy.stats import qmc  # a second, which hpo studies and hpo best can do without

        sequence = qmc.Sobol(len(self._defaults), rng=derive_seed(self._seed, number % 2, "sobol") % 2**32)
        sequence.fast_forward((number + 1) // 2)  # at least 1: scipy cannot skip 0 points
        point = sequence.random(1)
        if optimum and number % 2 == 0:
            point = optimum.drawn(point)
        return self._encoding.values(self._encoding.snap(point)[0])


def other_trials(study: Study, trial: FrozenTrial) -> list[FrozenTrial]:
    """All trials of the study but this one, by number; not copies."""
    return [other for other in all_trials(study) if other.number != trial.number]


def is_time_limited(study: Study) -> bool:
    """Whether a search is to spend its training time well, because `--budget` limits it.

    Without a budget proposals must not depend on how long anything took, or the same search could not be repeated.
    """
    storage, study_id = identity(study)
    return storage.get_study_user_attrs(study_id).get(stored.RECORD + stored.BUDGET) is not None


def _best_values(study: Study) -> dict[str, Value]:
    """The values of the best complete trial; empty while there is none, and with several objectives."""
    if len(study.directions) > 1:
        return {}
    trials = all_trials(study, states=(TrialState.COMPLETE,))
    if not trials:
        return {}
    return min(trials, key=lambda trial: direction_of(study).loss(_value(trial))).params


def _value(trial: FrozenTrial) -> float:
    assert trial.value is not None, "a complete trial has a value"
    return trial.value
