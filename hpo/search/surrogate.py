"""A model of the learning curves over a space, and the configuration that it finds most promising.

A Gaussian process sees every trial at a few epochs of its curve, pruned trials too, with the epoch as one more input,
and is asked for the expected improvement at the last epoch. So a trial that was stopped early teaches what it has shown
and is not taken for one that ended there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from hpo.config import Direction
from hpo.parameters import Value
from hpo.search import stored
from hpo.search.acquisition import NUM_INCUMBENTS, log_expected_improvement, maximize, on_one_thread
from hpo.search.encoding import Encoding
from hpo.search.epoch_time import EpochTime
from hpo.search.gaussian_process import GaussianProcess, standardized
from hpo.search.internals import trial_id
from hpo.search.kernels import Array
from hpo.search.optimum import OptimumPrior
from hpo.search.prior import Prior
from hpo.space import Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_POINTS_OF_A_CURVE = 3
"""A curve is seen at its last epoch, at half of it, and at a quarter."""

_TRIALS_BEFORE_FADING = 10
"""What other studies expect has its whole weight up to this many trials, then less with the square of their number."""

_TIME_EXPONENT = 0.5
"""Power of the time per epoch that an improvement is divided by where time is limited.

With 1 (Snoek, Larochelle and Adams, 2012, arXiv:1206.2944) cheap configurations are tried for too long, as Lee et al.,
2020, arXiv:2003.10870, found too. docs/strategies.md has the figures.
"""

_CONFIDENCE = 10.0
"""The user's belief has this power, divided by the number of trials, as long as they agree with it."""

_MAX_OBSERVATIONS = 400


@dataclass(frozen=True)
class _Curve:
    """What a trial has shown."""

    units: Array
    """(p,) its configuration."""

    epochs: tuple[int, ...]
    """Epochs with a finite loss, rising."""

    losses: tuple[float, ...]
    """The lowest loss up to each of these epochs."""

    state: TrialState
    diverged: bool
    """Whether it was stopped with nothing to show, or with a last report that is not finite; the worst of all then."""

    epoch_s: float | None = None
    """Seconds per epoch of a trial that has ended; None if nobody measured them."""


@dataclass(frozen=True)
class _Guess:
    """The prior mean: what other studies expect, scaled by how well the observations agree with them.

    It fades with the number of trials: another task's details mislead where this one's are known.
    """

    priors: Sequence[Prior]
    scales: Array
    """(k,) from 0 to 1, one for each of the priors."""

    offsets: Array
    """(k,) their means over the observations."""

    @classmethod
    def scaled(cls, priors: Sequence[Prior], process: GaussianProcess, units: Array) -> _Guess:
        """The guess that fits the observations of a process, at configurations (n, p)."""
        expected = [prior.predict(units) for prior in priors]
        fading = min(1.0, _TRIALS_BEFORE_FADING / len(np.unique(units, axis=0))) ** 2
        scales = [fading * process.scale_of(means - means.mean(), share=1 / len(priors)) for means in expected]
        return cls(priors, np.array(scales), np.array([means.mean() for means in expected]))

    def at(self, units: Array) -> Array:
        """The prior mean at configurations (m, p); (m,)."""
        total = np.zeros(len(units))
        for prior, scale, offset in zip(self.priors, self.scales, self.offsets, strict=True):
            total += scale * (prior.predict(units) - offset) if scale else 0.0
        return total


_NO_GUESS = _Guess((), np.empty(0), np.empty(0))


@dataclass(frozen=True)
class _Belief:
    """What the observations tell about every configuration."""

    process: GaussianProcess
    lowest: float
    """The lowest of its targets."""

    incumbents: Array
    """(n, p) the configurations observed, the best first."""

    guess: _Guess
    """The prior mean."""

    epoch_time: EpochTime | None
    """What to divide an improvement by; None if only the epochs count."""

    confidence: float
    """The power of the user's belief about the optimum."""


class Surrogate:
    """Proposes configurations for a space, and judges trials, from the trials of one study.

    It remembers the trials that have ended. Without curves a trial's final value is all that counts. `priors` are what
    other studies expect, and `optimum` is where the user does.
    """

    def __init__(
        self,
        space: Space,
        *,
        has_curves: bool = True,
        priors: Sequence[Prior] = (),
        optimum: OptimumPrior | None = None,
    ) -> None:
        self._has_curves = has_curves
        self._priors = priors
        self._optimum = optimum
        self._encoding = Encoding(space)
        self._ended: dict[tuple[int, int], _Curve] = {}

    def propose(
        self,
        trials: Sequence[FrozenTrial],
        held: Mapping[str, Value],
        *,
        direction: Direction,
        rng: np.random.Generator,
        time_counts: bool = False,
    ) -> dict[str, Value] | None:
        """The configuration with the highest expected improvement; None while the trials cannot be distinguished.

        `held` fixes some of its values. What is running counts as if it would end as the model expects, so that trials
        asked for together differ. If `time_counts`, an improvement counts for less where an epoch takes longer.
        """
        curves = self._curves(trials, direction)
        last_epoch = max((epoch for curve in curves for epoch in curve.epochs), default=1)
        with on_one_thread():
            belief = self._belief(curves, last_epoch, time_counts=time_counts)
            if belief is None:
                return None
            return self._encoding.values(self._most_promising(belief, held, rng)[0]) | dict(held)

    def is_worth_continuing(
        self,
        trial: FrozenTrial,
        others: Sequence[FrozenTrial],
        held: Mapping[str, Value],
        *,
        last_epoch: int,
        direction: Direction,
        rng: np.random.Generator,
        time_counts: bool = False,
    ) -> bool:
        """Whether the epochs that a trial has left promise more than as many of a new configuration.

        The measure is the expected improvement an epoch, over `last_epoch` epochs for a new one, some of whose values
        are `held`; `time_counts` as in `propose`. True while the trials cannot be distinguished.
        """
        own = self._curve(trial, direction)
        with on_one_thread():
            belief = self._belief(self._curves(others, direction), last_epoch, own, time_counts=time_counts)
            if own is None or not own.epochs or belief is None:
                return True
            _, elsewhere = self._most_promising(belief, held, rng)
            here = float(self._merit(belief, own.units[None])[0])
        return here - math.log(last_epoch - own.epochs[-1]) >= elsewhere - math.log(last_epoch)

    def _belief(
        self, curves: Sequence[_Curve], last_epoch: int, judged: _Curve | None = None, *, time_counts: bool
    ) -> _Belief | None:
        """What the curves tell about all configurations at the last epoch; None while they are all the same.

        Running trials are believed to end as expected, except for the one that is `judged`, which comes on top.
        """
        units, epochs, losses = _observations([*curves, judged] if judged else curves, last_epoch)
        if len(losses) == 0 or losses.min() == losses.max():
            return None
        targets = standardized(losses)
        inputs = np.column_stack([self._encoding.columns(units), _epoch_axis(epochs, last_epoch)])
        owners = self._encoding.owners
        process = GaussianProcess.fit(inputs, targets, np.append(owners, owners.max() + 1))
        confidence = self._confidence(process, units, len(curves))
        guess = _NO_GUESS
        if self._priors:
            guess = _Guess.scaled(self._priors, process, units)
            process = process.observing(targets - guess.at(units))
        running = np.array([curve.units for curve in curves if curve.state == TrialState.RUNNING])
        if len(running):
            process = process.believing(self._at_the_end(running))
        epoch_time = self._epoch_time(curves) if time_counts else None
        return _Belief(process, float(targets.min()), units[np.argsort(targets)], guess, epoch_time, confidence)

    def _epoch_time(self, curves: Sequence[_Curve]) -> EpochTime | None:
        measured = [(curve.units, curve.epoch_s) for curve in curves if curve.epoch_s]
        if not measured:
            return None
        units, seconds = (np.array(column) for column in zip(*measured, strict=True))
        return EpochTime.fit(self._encoding.columns(units), seconds, self._encoding.owners)

    def _confidence(self, process: GaussianProcess, units: Array, num_trials: int) -> float:
        """The power of the user's belief, which falls to 0 if what is far from the defaults is no worse."""
        if not self._optimum:
            return 0.0
        expected = self._optimum.expected_loss(units)
        return _CONFIDENCE / num_trials * process.agreement_with(expected - expected.mean())

    def _curves(self, trials: Sequence[FrozenTrial], direction: Direction) -> list[_Curve]:
        return [curve for trial in trials if (curve := self._curve(trial, direction)) is not None]

    def _curve(self, trial: FrozenTrial, direction: Direction) -> _Curve | None:
        key = (trial.number, trial_id(trial))  # a pruned trial that is continued has a new id
        if key in self._ended:
            return self._ended[key]
        if trial.state in (TrialState.FAIL, TrialState.WAITING) or not self._encoding.contains(trial.params):
            return None
        reported = sorted(trial.intermediate_values.items())
        learnt_from = reported if self._has_curves else []
        finite = [(epoch, direction.loss(value)) for epoch, value in learnt_from if math.isfinite(value)]
        losses = np.minimum.accumulate([loss for _, loss in finite]) if finite else np.empty(0)
        epochs = [max(1, epoch) for epoch, _ in finite]
        has_result = trial.state == TrialState.COMPLETE and trial.value is not None and math.isfinite(trial.value)
        if has_result:
            epochs, losses = [*epochs, max(epochs, default=1)], np.append(losses, direction.loss(trial.values[0]))
        curve = _Curve(
            units=self._encoding.units(trial.params),
            epochs=tuple(epochs),
            losses=tuple(losses.tolist()),
            state=trial.state,
            diverged=trial.state.is_finished() and not has_result and _ends_undefined(reported),
            epoch_s=_epoch_s(trial),
        )
        if trial.state.is_finished():
            self._ended[key] = curve
        return curve

    def _at_the_end(self, units: Array) -> Array:
        return np.column_stack([self._encoding.columns(units), np.ones(len(units))])

    def _log_improvement(self, belief: _Belief, units: Array) -> Array:
        """Logarithm of the expected improvement of configurations (m, p) at the last epoch; (m,)."""
        mean, deviation = belief.process.predict(self._at_the_end(units))
        mean = mean + belief.guess.at(units)
        return log_expected_improvement((belief.lowest - mean) / deviation) + np.log(deviation)

    def _merit(self, belief: _Belief, units: Array) -> Array:
        """The same, divided by a power of the time per epoch where time counts."""
        improvement = self._log_improvement(belief, units)
        if belief.epoch_time is None:
            return improvement
        return improvement - _TIME_EXPONENT * belief.epoch_time.log_seconds(self._encoding.columns(units))

    def _promise(self, belief: _Belief, units: Array) -> Array:
        """The same, weighted by the user's belief, and minus infinity for configurations that the space forbids."""
        promise = self._merit(belief, units)
        if self._optimum:
            promise += belief.confidence * self._optimum.log_density(units)
        return np.where(self._encoding.allows(units), promise, -np.inf)

    def _most_promising(
        self, belief: _Belief, held: Mapping[str, Value], rng: np.random.Generator
    ) -> tuple[Array, float]:
        """The configuration (p,) with the highest promise, and that."""
        incumbents = belief.incumbents[:NUM_INCUMBENTS]
        return maximize(partial(self._promise, belief), self._encoding, incumbents, held, rng, optimum=self._optimum)


def _epoch_s(trial: FrozenTrial) -> float | None:
    """Seconds per epoch, or per fold, of a trial that has ended; while it runs its time is written now and then."""
    trained_s = trial.user_attrs.get(stored.TRAINED)
    if not trained_s or not trial.state.is_finished() or not trial.intermediate_values:
        return None
    return float(trained_s / len(trial.intermediate_values))


def _ends_undefined(reported: Sequence[tuple[int, float]]) -> bool:
    return not reported or not math.isfinite(reported[-1][1])


def _observations(curves: Sequence[_Curve], last_epoch: int) -> tuple[Array, Array, Array]:
    """Configurations (n, p), epochs (n,) and losses (n,), thinned out to the best and the latest ones."""
    worst = max((max(curve.losses) for curve in curves if curve.losses), default=0.0)
    seen: list[tuple[Array, int, float]] = []
    for curve in curves:
        if curve.diverged:
            seen.append((curve.units, last_epoch, worst))
        elif curve.state == TrialState.COMPLETE and curve.losses:
            # It would not have become better: it has reached the last epoch, or stopped improving.
            seen.append((curve.units, last_epoch, curve.losses[-1]))
            seen += _earlier_points(curve, last_epoch)
        elif curve.losses:
            seen.append((curve.units, curve.epochs[-1], curve.losses[-1]))
            seen += _earlier_points(curve, curve.epochs[-1])
    if not seen:
        return np.empty((0, 0)), np.empty(0), np.empty(0)
    units, epochs, losses = (np.array(column) for column in zip(*seen, strict=True))
    if len(losses) > _MAX_OBSERVATIONS:
        half = _MAX_OBSERVATIONS // 2
        kept = np.union1d(np.argsort(losses)[:half], np.arange(len(losses) - half, len(losses)))
        units, epochs, losses = units[kept], epochs[kept], losses[kept]
    return units, epochs, losses


def _earlier_points(curve: _Curve, end: int) -> list[tuple[Array, int, float]]:
    """The curve at half of its epochs, at a quarter, ..."""
    points = {}
    for halvings in range(1, _POINTS_OF_A_CURVE):
        index = int(np.searchsorted(curve.epochs, end / 2**halvings))
        if index < len(curve.epochs) and curve.epochs[index] < min(end, curve.epochs[-1]):
            points[curve.epochs[index]] = (curve.units, curve.epochs[index], curve.losses[index])
    return list(points.values())


def _epoch_axis(epochs: Array, last_epoch: int) -> Array:
    """1 at the last epoch, 0 at the first; curves bend evenly on a logarithmic scale."""
    return np.log(epochs) / math.log(last_epoch) if last_epoch > 1 else np.ones(len(epochs))
