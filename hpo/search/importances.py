"""How much each parameter of a space matters, with the interval that the trials leave open.

The importance of a parameter is its main effect of functional ANOVA (Hutter, Hoos and Leyton-Brown, 2014), which is the
first-order index of Sobol (2001): the share of the variance of the metric at the last epoch that the parameter
explains alone, while all others take all their values. That is over the whole space, not only near the best trials,
with every value equally likely on the scale of its range. Interactions belong to no parameter, so the shares may sum to
less than 1. The importance of a group is what its parameters explain together. A conditional parameter is rated where
it is active.

The metric over the space is not known. Each function that the learning curves leave possible (hpo.search.posterior)
has importances of its own, and their spread is the interval (Le Gratiet, Cannamela and Iooss, 2014, arXiv:1307.2223).
Two things follow. A pruned trial counts with what it has shown by its epoch, not as if it had ended there. And a search
that stays near its best trials does not bias the result: what it has not visited is uncertain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from hpo.config import derive_seed
from hpo.records import ELIGIBLE, TrialRecord
from hpo.search.acquisition import on_one_thread
from hpo.search.encoding import Encoding
from hpo.search.gaussian_process import standardized
from hpo.search.posterior import EndPosterior, Observations
from hpo.search.priority import tunable_groups
from hpo.values import as_tuple, describe_conditions

if TYPE_CHECKING:
    from hpo.search.kernels import Array
    from hpo.search.study import Study
    from hpo.space import Space

MIN_TRIALS = 30
"""With 20 trials, one in four of the intervals that were narrow enough to report missed a share of 5% or more."""

MIN_ACTIVE_TRIALS = 10
"""The fewest trials that a conditional parameter must have been active in."""

WIDEST = 0.5
"""A wider interval says nothing, and is not reported."""

_TAIL = 0.01
"""Probability of the posterior that an interval leaves out on either side. The posterior is surer than it should be, so
what is reported as a 90% interval is one of 98%; benchmarks/importances.py has the coverage."""

_SHRINKING = 0.4
"""An interval is as wide as the number of trials to the power of minus this, by benchmarks/importances.py."""

_NUM_SCALES = 16
_NUM_FUNCTIONS = 16
"""Functions drawn for each draw of the scales."""
_NUM_POINTS = 256
_MAX_OBSERVATIONS = 400
_POINTS_OF_A_CURVE = 3
"""A curve is seen at its last epoch, at half of it, and at a quarter."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """A share of the variance of the metric, from 0 to 1, with a 90% interval; all None where trials are missing."""

    share: float | None
    low: float | None
    high: float | None
    missing_trials: int = 0
    """About how many more trials would narrow the interval enough to report it."""
    condition: str | None = None
    """Where a conditional parameter is active, such as `optimizer is sgd`: the share is of the variance there."""


@dataclass(frozen=True, kw_only=True)
class GroupImportance(Importance):
    """The importance of a group, and of each parameter in it."""

    parameters: dict[str, Importance]


@dataclass(frozen=True)
class Importances:
    """Of the groups, in the order of the space, with a sentence on what is missing."""

    groups: dict[str, GroupImportance] = field(default_factory=dict)
    """Empty if nothing can be said, not even of one parameter."""

    note: str | None = None
    """Which importances need more trials, and how many; None where all are known or nothing varies."""

    def rows(self) -> list[tuple[str, str, Importance]]:
        """Group, parameter and importance; that of the group itself comes first, with "" for the parameter."""
        return [
            (group, name, each)
            for group, importance in self.groups.items()
            for name, each in {"": importance, **importance.parameters}.items()
        ]

    def known(self) -> dict[str, dict[str, tuple[float, float, float]]]:
        """The share and interval of each parameter that has them, by group; a conditional one with its condition."""
        return {
            group: {
                f"{name}, if {each.condition}" if each.condition else name: (each.share, each.low, each.high)
                for name, each in importance.parameters.items()
                if each.share is not None and each.low is not None and each.high is not None
            }
            for group, importance in self.groups.items()
        }


def importances(study: Study) -> Importances:
    """Importance of each parameter that can vary, by group; see the head of this module for what it means.

    Diverged trials count as the worst of the others. With several objectives it is about the first one. The same trials
    have the same importances, whatever the values of inactive parameters.
    """
    space = study.settings.space
    groups = tunable_groups(space)
    records = [record for record in study.trials() if _has_result(record)]
    if not groups:
        return Importances()
    if len(records) < MIN_TRIALS:
        return Importances(note=_needs(MIN_TRIALS - len(records)))
    curves = _curves(study, records)
    if len({loss for curve in curves for loss in curve.values()}) < 2:
        return Importances(note="Importances need trials whose values differ.")
    with on_one_thread():
        draws = _draw_shares(
            space, records, curves, study.settings.num_steps, derive_seed(study.settings.seed, "importances")
        )
    rated = {
        group: GroupImportance(
            **vars(_importance(draws[group, None], len(records))),
            parameters={name: _of_parameter(space, name, draws[group, name], records) for name in names},
        )
        for group, names in groups.items()
    }
    return _with_note(rated)


def describe_share(share: float | None, low: float | None, high: float | None, condition: str | None = None) -> str:
    """`34% (21 to 48)`, with the condition if there is one; `-` where trials are missing."""
    if share is None or low is None or high is None:
        return "-"
    return f"{share:.0%} ({100 * low:.0f} to {100 * high:.0f}{f', where {condition}' if condition else ''})"


def _has_result(record: TrialRecord) -> bool:
    return (record.state in ELIGIBLE and record.value is not None) or record.state == "diverged"


def _of_parameter(space: Space, name: str, draws: Array, records: Sequence[TrialRecord]) -> Importance:
    condition = describe_conditions(space.parameters[name].when) or None
    num_active = sum(name not in record.inactive for record in records)
    if condition and num_active < MIN_ACTIVE_TRIALS:
        # As many of the trials to come will be active as of those that ran, or of one more, where none was.
        missing = math.ceil((MIN_ACTIVE_TRIALS - num_active) * len(records) / max(1, num_active))
        return Importance(share=None, low=None, high=None, missing_trials=missing, condition=condition)
    return _importance(draws, len(records), condition)


def _importance(draws: Array, num_trials: int, condition: str | None = None) -> Importance:
    low, high = (float(end) for end in np.quantile(draws, [_TAIL, 1.0 - _TAIL]))
    if high - low > WIDEST:
        enough = num_trials * ((high - low) / WIDEST) ** (1.0 / _SHRINKING)
        return Importance(
            share=None, low=None, high=None, missing_trials=math.ceil(enough - num_trials), condition=condition
        )
    return Importance(share=float(draws.mean()), low=low, high=high, condition=condition)


def _with_note(groups: dict[str, GroupImportance]) -> Importances:
    parameters = {name: each for group in groups.values() for name, each in group.parameters.items()}
    rated = [*groups.items(), *parameters.items()]  # a group and a parameter may have the same name
    missing = [(name, each.missing_trials) for name, each in rated if each.share is None]
    if len(missing) == len(rated):
        return Importances(note=_needs(min(count for _, count in missing)))
    listed = ", ".join(f"{name} (about {_rounded(count)} more trials)" for name, count in missing)
    return Importances(groups, f"Too uncertain to report: {listed}." if missing else None)


def _needs(num_trials: int) -> str:
    return f"Importances need about {_rounded(num_trials)} more trials."


def _rounded(num_trials: int) -> int:
    """To one digit, upwards: it is an estimate."""
    unit = int(10 ** math.floor(math.log10(num_trials)))
    return math.ceil(num_trials / unit) * unit


def _curves(study: Study, records: Sequence[TrialRecord]) -> list[dict[int, float]]:
    """A few points of each trial: its lowest loss up to an epoch; with folds, its mean alone, at the last."""
    direction, last = study.settings.direction, study.settings.num_steps
    results = {r.number: direction.loss(r.value) for r in records if r.state in ELIGIBLE and r.value is not None}
    worst = max(results.values(), default=0.0)
    num_points = min(_POINTS_OF_A_CURVE, max(1, _MAX_OBSERVATIONS // len(records)))
    curves = []
    for record in records:
        if record.state == "diverged":
            curves.append({last: worst})
        elif study.settings.folds:
            curves.append({last: results[record.number]})  # of a pruned one the mean that is estimated for all folds
        else:
            # A complete trial that stopped early would not have become better.
            end = last if record.state == "complete" else max(record.curve, default=last)
            losses = {epoch: direction.loss(v) for epoch, v in sorted(record.curve.items()) if math.isfinite(v)}
            curves.append(_earlier_points(losses, end, num_points) | {end: results[record.number]})
    return curves


def _earlier_points(losses: Mapping[int, float], end: int, num_points: int) -> dict[int, float]:
    """The lowest loss by the first epoch from half of the epochs on, from a quarter on, ..."""
    points = {}
    for halvings in range(1, num_points):
        epoch = next((epoch for epoch in losses if epoch >= end / 2**halvings), end)
        if epoch < min(end, max(losses)):
            points[epoch] = min(loss for other, loss in losses.items() if other <= epoch)
    return points


def _draw_shares(
    space: Space, records: Sequence[TrialRecord], curves: Sequence[Mapping[int, float]], last: int, seed: int
) -> dict[tuple[str, str | None], Array]:
    """(draws,) importances of each group and each parameter, by `(group, None)` and `(group, name)`."""
    encoding, rng = Encoding(space), np.random.default_rng(seed)
    is_searched = np.array([not list(space.parameters.values())[owner].is_fixed for owner in encoding.owners])

    def columns(units: Array) -> Array:
        return encoding.columns(units)[:, is_searched]

    # With more trials than fit, evenly spaced ones.
    seen = np.unique(np.linspace(0, len(records) - 1, min(len(records), _MAX_OBSERVATIONS)).round().astype(int))
    points = [(index, epoch, loss) for index in seen for epoch, loss in curves[index].items()]
    trials, epochs, losses = (np.array(column) for column in zip(*points, strict=True))
    observed = Observations(
        inputs=columns(np.array([encoding.units(records[index].values) for index in trials])),
        gaps=1.0 - np.log(np.maximum(epochs, 1)) / math.log(last) if last > 1 else np.zeros(len(epochs)),
        losses=standardized(losses),
        trials=trials,
    )
    posterior = EndPosterior(observed, np.unique(encoding.owners[is_searched], return_inverse=True)[1])
    draws: dict[tuple[str, str | None], list[Array]] = {}
    for scales in posterior.draw_scales(_NUM_SCALES, rng):
        # New points for each draw, so that what they miss shows as spread and not as bias.
        design = Design(space, encoding, rng)
        functions = posterior.draw_functions(scales, columns(np.concatenate(design.blocks)), _NUM_FUNCTIONS, rng)
        for key, shares in design.shares(functions.reshape(len(design.blocks), _NUM_POINTS, -1)).items():
            draws.setdefault(key, []).append(shares)
    return {key: np.concatenate(shares) for key, shares in draws.items()}


class Design:
    """Where to evaluate a function to estimate its main effects.

    There are two independent samples of the space, and for each parameter, or group, the second one with its values
    from the first (Saltelli et al., 2010, https://doi.org/10.1016/j.cpc.2009.09.018). A conditional parameter has two
    samples of its own, in which it is active.
    """

    def __init__(
        self, space: Space, encoding: Encoding, rng: np.random.Generator, num_points: int = _NUM_POINTS
    ) -> None:
        from scipy.stats import qmc  # it takes a second to import

        self._space, self._encoding = space, encoding
        both = qmc.Sobol(2 * len(encoding.names), rng=rng).random(num_points)
        one, other = (encoding.snap(half) for half in np.split(both, 2, axis=1))
        self.blocks = [one, other]
        self._places: dict[tuple[str, str | None], tuple[int, int, int]] = {}
        for group, names in tunable_groups(space).items():
            self._add((group, None), self._mixed(one, other, names), samples=0)
            for name in names:
                if space.parameters[name].when:
                    first, second = (self._activated(sample, name) for sample in (one, other))
                    self.blocks += [first, second]
                    self._add((group, name), self._mixed(first, second, [name]), samples=len(self.blocks) - 2)
                else:
                    self._add((group, name), self._mixed(one, other, [name]), samples=0)

    def shares(self, values: Array) -> dict[tuple[str, str | None], Array]:
        """Values (blocks, points, m) of m functions -> (m,) importances."""
        shares = {}
        for key, (one, other, mixed) in self._places.items():
            sampled = np.concatenate([values[one], values[other]])
            explained = np.mean((values[one] - sampled.mean(axis=0)) * (values[mixed] - values[other]), axis=0)
            shares[key] = np.clip(explained / np.maximum(sampled.var(axis=0), 1e-12), 0.0, 1.0)
        return shares

    def _add(self, key: tuple[str, str | None], mixed: Array, samples: int) -> None:
        self._places[key] = (samples, samples + 1, len(self.blocks))
        self.blocks.append(mixed)

    def _mixed(self, one: Array, other: Array, names: Sequence[str]) -> Array:
        axes = [self._encoding.names.index(name) for name in names]
        mixed = other.copy()
        mixed[:, axes] = one[:, axes]
        return mixed

    def _activated(self, units: Array, name: str) -> Array:
        """The points moved to where the parameter is active, with the values that allow it equally likely."""
        for parent, wanted in self._space.parameters[name].when.items():
            units = self._activated(units, parent)
            axis = self._encoding.names.index(parent)
            lows, highs = np.transpose(self._encoding.intervals(parent, as_tuple(wanted)))
            ends = np.cumsum(highs - lows)
            along = units[:, axis] * ends[-1]  # the intervals one after the other
            each = np.minimum(np.searchsorted(ends, along), len(ends) - 1)
            units = units.copy()
            units[:, axis] = highs[each] - (ends[each] - along)
        return units
