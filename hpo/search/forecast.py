"""What more trials of a search promise: a forecast from its own trials, which says how much 30 more of them may gain.

Were trials independent draws, the best of n would stay the best through m more with probability n / (n + m), and would
be beaten by more than a gain g with odds of r m : n, where r is how much thinner the tail is there. The spacings of
the best trials say how thin it is (Weissman, 1978). Trials of a search are not independent, because it learns: so the
odds are those of a logistic model of the same quantities, fitted to searches with `--strategy priority`. A best value
that several trials share says that there may be no better one, as in a small space. `benchmarks/forecast.py` fits the
weights, to metrics of validation splits of several sizes, and measures how often the forecasts come true.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hpo.config import METRICS, Direction
from hpo.records import ELIGIBLE

if TYPE_CHECKING:
    from hpo.records import TrialRecord
    from hpo.search.settings import StudySettings

NUM_MORE = 30
"""Trials that a forecast looks ahead."""

CHANCE = 0.8
"""Of a forecast's statement."""

MIN_TRIALS = 20
"""Below this many trials with a result nothing is forecast; it was not measured there."""

_NUM_BEST = 11
"""The best different values, whose spacings describe the tail."""

WEIGHTS = np.array([-0.92, 1.17, -2.82, 0.63])
"""Of `features`, in the log-odds of gaining less."""

_SMALLEST_RATIO = 1e-6


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """With probability `chance`, the next `trials` trials gain less than `gain` over the best so far."""

    trials: int
    chance: float
    gain: float

    def describe(self, metric: str) -> str:
        """The forecast as a sentence."""
        gain = f"less than {self.gain:.2g}" if self.gain else "nothing"
        return f"Forecast: {self.chance:.0%} chance of gaining {gain} in {metric} in the next {self.trials} trials."


def forecast(settings: StudySettings, trials: Iterable[TrialRecord]) -> Forecast | None:
    """What the next trials of a study promise; None if that says nothing.

    It has too few trials, is not one that forecasts are made for, or could gain more than the metric can.
    """
    values = [trial.value for trial in trials if trial.state in ELIGIBLE and trial.value is not None]
    if len(values) < MIN_TRIALS or not can_forecast(settings):
        return None
    losses = [settings.direction.loss(value) for value in values]
    gain = gain_at(losses, NUM_MORE, CHANCE)
    says_something = gain == 0 or gain < _room(settings, min(losses))
    return Forecast(trials=NUM_MORE, chance=CHANCE, gain=gain) if says_something else None


def _room(settings: StudySettings, lowest: float) -> float:
    """How much a metric can still gain: those of hpo that are maximised end at 1, the others at 0."""
    if settings.metric not in METRICS:
        return math.inf
    return lowest - settings.direction.loss(1.0 if settings.direction is Direction.MAXIMIZE else 0.0)


def can_forecast(settings: StudySettings) -> bool:
    """Whether forecasts are made for searches of this kind: those that they were measured for."""
    return settings.strategy == "priority" and not settings.costs and not settings.folds


def features(losses: Sequence[float], num_more: int, gain: float) -> NDArray[np.float64]:
    """What the chance that `num_more` trials gain less than `gain` follows from; losses in the order of the trials."""
    scale, num_gaps = _tail(losses)
    ratio = (1 + gain / (scale * num_gaps)) ** -num_gaps if scale > 0 else float(gain <= 0)
    return np.array(
        [1.0, math.log(len(losses) / num_more), math.log(max(ratio, _SMALLEST_RATIO)), _log_num_best(losses)]
    )


def gain_at(losses: Sequence[float], num_more: int, chance: float, weights: NDArray[np.float64] = WEIGHTS) -> float:
    """The gain that `num_more` trials stay below with this chance; 0 if they are likelier than that to gain nothing."""
    scale, num_gaps = _tail(losses)
    constant, per_trials, per_ratio, per_best = map(float, weights)
    known = constant + per_trials * math.log(len(losses) / num_more) + per_best * _log_num_best(losses)
    log_ratio = (math.log(chance / (1 - chance)) - known) / per_ratio
    if log_ratio >= 0 or scale == 0:
        return 0.0
    return scale * num_gaps * (math.exp(-log_ratio / num_gaps) - 1)


def _log_num_best(losses: Sequence[float]) -> float:
    """Of the number of trials that share the best value. Ties of others only say how coarse the metric is."""
    return math.log(losses.count(min(losses)))


def _tail(losses: Sequence[float]) -> tuple[float, int]:
    """Scale of an exponential tail, and from how many spacings of the best losses it is estimated.

    With such a tail, the spacing behind the i-th best has the mean scale / i.
    """
    gaps = np.diff(np.unique(losses)[:_NUM_BEST])
    return (float(np.mean(gaps * np.arange(1, len(gaps) + 1))), len(gaps)) if len(gaps) else (0.0, 1)
