"""Strategies by name: the samplers that Optuna has, made repeatable, beside our own `priority` and `grid`."""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.search_space import IntersectionSearchSpace
from optuna.trial import TrialState

from hpo import extensions
from hpo.config import derive_seed
from hpo.errors import UsageError
from hpo.extensions import accepts, call, find_factory
from hpo.parameters import Choice, Float, Int
from hpo.search.confirmation import REPEATS
from hpo.search.internals import SearchSpaceTransform, all_trials, direction_of, set_system_attr
from hpo.search.priority import PrioritySampler
from hpo.search.wrappers import AllowedSampler, DefaultFirstSampler, TrialSeededSampler

if TYPE_CHECKING:
    from cmaes import CMA  # type: ignore[import-untyped]
    from optuna import Study
    from optuna.trial import FrozenTrial

    from hpo.parameters import Parameter, Value
    from hpo.space import Space

STRATEGIES = ("priority", "tpe", "gp", "random", "grid", "qmc", "cmaes")
GRID_STEPS = 5


def build_sampler(strategy: str, space: Space, *, seed: int, num_trials: int, has_curves: bool = True) -> BaseSampler:
    """The sampler of that name, or of a factory (hpo.extensions); all but `grid` begin with the default configuration.

    `has_curves` says whether what trials report are learning curves, and matters to `priority` alone.

    priority  see hpo.search.priority; `num_trials` is what the study was planned with, and matters here alone
    tpe       tree-structured Parzen estimators (Watanabe, 2023, arXiv:2304.11127) after 10 random trials
    gp        a Gaussian process after 10 random trials; learns from complete trials only
    random    independent draws
    grid      see GridSampler
    qmc       a scrambled Sobol sequence
    cmaes     CMA-ES (Hansen, 2016, arXiv:1604.00772) for numbers, random for choices; learns from complete trials only

    Each but `grid` keeps the rules of the space; UsageError if they are not kept.
    """
    if not space.has_rules:
        return _sampler(strategy, space, seed, num_trials, has_curves=has_curves)
    if strategy == "grid":
        raise UsageError(
            "--strategy grid visits every point, and this space forbids some; choose another, such as --strategy qmc."
        )
    return AllowedSampler(_sampler(strategy, space, seed, num_trials, has_curves=has_curves), space, seed)


def _sampler(strategy: str, space: Space, seed: int, num_trials: int, *, has_curves: bool) -> BaseSampler:
    if strategy == "priority":
        return PrioritySampler(space, seed=seed, num_trials=num_trials, has_curves=has_curves)
    if strategy == "grid":
        return GridSampler(space, seed=seed)
    if strategy == "qmc":
        return DefaultFirstSampler(_qmc_sampler(seed), space)
    if strategy in _SEEDED:
        return DefaultFirstSampler(TrialSeededSampler(_SEEDED[strategy], seed), space)
    return _made_by_others(strategy, space, seed, num_trials)


def _made_by_others(reference: str, space: Space, seed: int, num_trials: int) -> BaseSampler:
    """Any Optuna sampler, repeatable after a restart if its factory accepts a `seed`."""
    factory = find_factory(extensions.STRATEGIES, reference, STRATEGIES)

    def make(seed: int) -> BaseSampler:
        sampler = call(factory, {"seed": seed, "space": space, "num_trials": num_trials})
        if not isinstance(sampler, BaseSampler):
            raise UsageError(f"--strategy {reference} made a {type(sampler).__name__}, not an Optuna sampler.")
        return sampler

    sampler = TrialSeededSampler(make, seed) if accepts(factory, "seed") else make(seed)
    return DefaultFirstSampler(sampler, space)


_SEEDED: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: TPESampler(seed=seed),
    "gp": lambda seed: GPSampler(seed=seed, warn_independent_sampling=False),
    "random": lambda seed: RandomSampler(seed=seed),
    "cmaes": lambda seed: CmaEsSampler(seed=seed),
}


def _qmc_sampler(seed: int) -> QMCSampler:
    # One seed for the study: it picks the sequence, and the position in the sequence is kept in the storage.
    with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
        return QMCSampler(
            seed=derive_seed(seed, "qmc") % 2**32,
            scramble=True,
            independent_sampler=TrialSeededSampler(_SEEDED["random"], seed),
            warn_independent_sampling=False,
        )


class CmaEsSampler(BaseSampler):
    """CMA-ES (Hansen, 2016, arXiv:1604.00772) for what is a number, independent random draws for choices.

    Optuna's sampler of this name keeps its optimizer in the database, pickled: whoever may write there runs code on
    every machine that asks. Of this one the database holds only the generation that each trial was drawn in, under the
    same name, and the optimizer gets all complete trials again, generation after generation, in the order in which
    they ended. That leaves it in the state that Optuna would have stored; pickles that lie there are not read. Telling
    it 5 000 trials of 8 parameters takes 0.15 s (cmaes 0.13.1, one core).
    """

    _GENERATION = "cma:generation"

    def __init__(self, *, seed: int) -> None:
        self._seed = seed
        self._independent = RandomSampler(seed=seed)
        self._search_space = IntersectionSearchSpace()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {
            name: distribution
            for name, distribution in self._search_space.calculate(study).items()
            if isinstance(distribution, FloatDistribution | IntDistribution) and not distribution.single()
        }

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        # Each parameter on its own scale, from 0 to 1.
        transform = SearchSpaceTransform(search_space, transform_0_1=True)
        optimizer = self._optimizer(study, transform)
        optimizer.reseed_rng(derive_seed(self._seed, trial.number) % 2**32)
        set_system_attr(study, trial, self._GENERATION, optimizer.generation)
        return transform.untransform(optimizer.ask())

    def _optimizer(self, study: Study, transform: SearchSpaceTransform) -> CMA:
        """The optimizer as the study's complete trials have made it; of a generation the first ones to end count."""
        from cmaes import CMA  # it imports scipy, which takes a second

        num_dimensions = len(transform.bounds)
        optimizer = CMA(
            mean=np.full(num_dimensions, 0.5),
            sigma=1 / 6,
            bounds=transform.bounds,
            n_max_resampling=10 * num_dimensions,
        )
        direction = direction_of(study)
        generations = self._generations(study)
        while len(ended := generations[optimizer.generation]) >= optimizer.population_size:
            told = ended[: optimizer.population_size]
            optimizer.tell([(transform.transform(trial.params), direction.loss(trial.values[0])) for trial in told])
        return optimizer

    def _generations(self, study: Study) -> defaultdict[int, list[FrozenTrial]]:
        """The complete trials by the generation that they were drawn in, the first to end first."""
        generations: defaultdict[int, list[FrozenTrial]] = defaultdict(list)
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        for trial in sorted(complete, key=lambda trial: (trial.datetime_complete, trial.number)):
            generation = trial.system_attrs.get(self._GENERATION)
            if isinstance(generation, int):  # a trial that was drawn independently has none
                generations[generation].append(trial)
        return generations

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._independent.sample_independent(study, trial, param_name, param_distribution)


class GridSampler(BaseSampler):
    """Visits every point of a grid once: all choices, all of up to 5 whole numbers, else 5 points evenly on the scale.

    The point follows from the trial's number alone, so a restart neither skips nor repeats one, and a grid of any size
    costs nothing. Trial k takes the point (offset + k * stride) mod size: a stride that shares no divisor with the size
    reaches every point, and one near size / golden ratio spreads the first ones evenly over the grid. (Optuna's own
    GridSampler lists all points in memory and stops the study from within, which only `Study.optimize` allows.)
    """

    def __init__(self, space: Space, *, seed: int) -> None:
        self._points = {name: grid_points(parameter) for name, parameter in space.parameters.items()}
        self._size = grid_size(space)
        self._offset = derive_seed(seed, "grid") % self._size
        self._stride = _even_stride(self._size)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Value:
        return self._point(trial.number - _num_repeats_before(study, trial))[param_name]

    def _point(self, number: int) -> dict[str, Value]:
        index = (self._offset + number * self._stride) % self._size
        point = {}
        for name, values in reversed(self._points.items()):
            index, digit = divmod(index, len(values))
            point[name] = values[digit]
        return point


def _num_repeats_before(study: Study, trial: FrozenTrial) -> int:
    """Numbers that confirmations have taken: they are no points of the grid."""
    return sum(REPEATS in other.user_attrs for other in all_trials(study) if other.number < trial.number)


def grid_size(space: Space) -> int:
    """Number of points in the grid over the space."""
    return math.prod(len(grid_points(parameter)) for parameter in space.parameters.values())


def grid_points(parameter: Parameter) -> list[Value]:
    """The parameter's values in a grid, in rising order, or in the order of the choices."""
    if isinstance(parameter, Choice) or parameter.num_values <= GRID_STEPS:
        return list(parameter.every_value())
    return list(dict.fromkeys(parameter.nearest(value) for value in _spaced(parameter)))


def _spaced(parameter: Float | Int) -> list[float]:
    low, high = parameter.low, parameter.high
    shares = [step / (GRID_STEPS - 1) for step in range(1, GRID_STEPS - 1)]
    inner = [low * (high / low) ** share if parameter.log else low + (high - low) * share for share in shares]
    return [low, *inner, high]


def _even_stride(size: int) -> int:
    golden_ratio = (1 + math.sqrt(5)) / 2
    stride = max(1, round(size / golden_ratio))
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
