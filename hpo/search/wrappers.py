"""Samplers that wrap another one: seeded for each trial, or with some of its parameters pinned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.samplers import BaseSampler

from hpo.config import derive_seed
from hpo.search.encoding import Encoding, distribution

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, TrialState

    from hpo.parameters import Value
    from hpo.space import Space


class TrialSeededSampler(BaseSampler):
    """Draws each trial from a fresh base sampler, seeded from (seed, trial number, parameter).

    A sampler with one seed for the whole study repeats its first draws after every restart. This one continues as if
    nothing had happened, and trials may be asked for in any order, in parallel, and from several processes.
    """

    def __init__(self, make_base: Callable[[int], BaseSampler], seed: int) -> None:
        """`make_base(seed)` builds the base; it gets seeds in [0, 2**32), as numpy's generators want them."""
        self._make_base = make_base
        self._seed = seed
        # Draws nothing: it lives on because it remembers which trials it has read the search space from.
        self._reader = make_base(0)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._reader.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._fresh_base(trial.number).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        base = self._fresh_base(trial.number, param_name)
        return base.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._fresh_base(trial.number).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._fresh_base(trial.number).after_trial(study, trial, state, values)

    def _fresh_base(self, *purpose: int | str) -> BaseSampler:
        return self._make_base(derive_seed(self._seed, *purpose, "sampler") % 2**32)


class WrappingSampler(BaseSampler):
    """Leaves everything to a base sampler."""

    def __init__(self, base: BaseSampler) -> None:
        self.base = base

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self.base.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self.base.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self.base.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.base.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self.base.after_trial(study, trial, state, values)


class PinningSampler(WrappingSampler, ABC):
    """Holds some parameters of a trial at values of its own choice, and leaves the others to a base sampler.

    As Optuna's PartialFixedSampler, but what is held may differ from trial to trial.
    """

    def __init__(self, base: BaseSampler) -> None:
        super().__init__(base)
        self._pinned: dict[int, Mapping[str, Value]] = {}

    @abstractmethod
    def pin(self, study: Study, trial: FrozenTrial) -> Mapping[str, Value]:
        """Values of the parameters that this trial does not search. Asked once for each attempt at a trial."""

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        # Here and not parameter by parameter: meanwhile another trial may end, and a mix of two would be pinned.
        self._pinned[trial.number] = self.pin(study, trial)
        self.base.before_trial(study, trial)

    def pinned(self, trial: FrozenTrial) -> Mapping[str, Value]:
        """What `pin` has said for this trial; nothing if the trial was not begun through `before_trial`."""
        return self._pinned.get(trial.number, {})

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        pinned = self.pinned(trial)
        search_space = self.base.infer_relative_search_space(study, trial)
        return {name: distribution for name, distribution in search_space.items() if name not in pinned}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        pinned = self.pinned(trial)
        if param_name in pinned:
            return pinned[param_name]
        return self.base.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._pinned.pop(trial.number, None)
        self.base.after_trial(study, trial, state, values)


class DefaultFirstSampler(PinningSampler):
    """Makes trial 0 the default configuration, and leaves every other trial to a base sampler."""

    def __init__(self, base: BaseSampler, space: Space) -> None:
        super().__init__(base)
        self._defaults = space.defaults()

    def pin(self, study: Study, trial: FrozenTrial) -> Mapping[str, Value]:
        return self._defaults if trial.number == 0 else {}


class AllowedSampler(WrappingSampler):
    """Moves a configuration that the space forbids to one nearby that it allows; any sampler may propose them.

    Configurations that were enqueued stay as they are.
    """

    def __init__(self, base: BaseSampler, space: Space, seed: int) -> None:
        super().__init__(base)
        self._encoding = Encoding(space)
        self._distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
        self._seed = seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(self._distributions)  # rules are about configurations, so that these are drawn as a whole

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        jointly = self.base.infer_relative_search_space(study, trial)
        drawn = self.base.sample_relative(study, trial, jointly)
        values = {
            name: drawn[name] if name in drawn else self.base.sample_independent(study, trial, name, declared)
            for name, declared in self._distributions.items()
        }
        units = self._encoding.units(values)
        if self._encoding.allows(units[None])[0]:
            return values
        pinned = self.base.pinned(trial) if isinstance(self.base, PinningSampler) else {}
        rng = np.random.default_rng(derive_seed(self._seed, trial.number, "allowed"))
        held = np.array([name in pinned for name in self._encoding.names])
        return self._encoding.values(self._encoding.nearest_allowed(units, rng, held=held))
