"""What the learning curves of a study leave open about the metric at the last epoch, over a whole space.

The surrogate of the search asks where the metric is best, with the most probable length scales. Here the question is
how the metric varies everywhere, and the answer must be as uncertain as the trials leave it: the length scales are
drawn from their posterior, and so are the functions.

A loss after epoch t is modelled as `trend(t) + end(x) + gap(t) * lag(x) + noise`. `gap` falls from 1 at the first epoch
to 0 at the last, evenly on a logarithmic scale; `end` and `lag` are Gaussian processes with length scales of their own.
So a configuration may be slow without being bad, and a trial that was pruned early says little of its end until
complete trials show that slow ones stay behind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_solve, cholesky
from scipy.optimize import minimize

from hpo.search.kernels import Array, distances_between, inverse_of, matern, squared_distances

_JITTER = 1e-6
_TREND_VARIANCE = 25.0
"""Of each coefficient of the trend, for losses of variance 1: the mean over the space may be far from that of the
trials, which a search places where losses are low."""

# Log-normal priors (location, scale) and bounds, for losses of variance 1. That of the length scales is from Hvarfner,
# Hellsten and Nardi (2024, arXiv:2402.02229).
_LENGTH = (math.sqrt(2.0), math.sqrt(3.0))
_VARIANCE = (0.5, 1.5)
_TRIAL_NOISE = (-4.0, 2.0)
_EPOCH_NOISE = (-5.0, 2.0)
_LENGTH_BOUNDS = (math.log(0.05), math.log(1e3))
_VARIANCE_BOUNDS = (-6.0, 8.0)
_NOISE_BOUNDS = (-12.0, 1.0)

_MAX_STEPS = 60
_HESSIAN_STEP = 0.05
_WIDENING = 1.7
"""The length scales and variances are drawn this many times as wide as a normal approximation at their mode: it is too
narrow for a posterior with long tails, and no loss is exactly such a process. benchmarks/importances.py measures how
often the intervals that follow cover the truth."""

_NUM_FEATURES = 192


@dataclass(frozen=True)
class Observations:
    """Points of learning curves: each is the lowest loss of a trial up to an epoch."""

    inputs: Array
    """(n, d) the configuration, as columns of an encoding."""

    gaps: Array
    """(n,) 0 at the last epoch, 1 at the first."""

    losses: Array
    """(n,) of mean 0 and variance 1."""

    trials: NDArray[np.int64]
    """(n,) which trial each point belongs to: its noise is that of all its points."""


class EndPosterior:
    """Functions of the configuration that may be the loss at the last epoch, given the observations."""

    def __init__(self, observed: Observations, owners: NDArray[np.int64]) -> None:
        """`owners` (d,) numbers the parameter that each column belongs to; columns of one share a length scale."""
        self._observed = observed
        self._owners = owners
        self._num_parameters = int(owners.max()) + 1
        size = len(observed.losses)
        self._squared = squared_distances(observed.inputs, owners)
        gaps = observed.gaps
        self._trend = math.sqrt(_TREND_VARIANCE) * np.column_stack([np.ones(size), gaps, gaps**2])
        self._same_trial = (observed.trials[:, None] == observed.trials[None, :]).astype(float)
        priors = [_length_prior(self._num_parameters)] * (2 * self._num_parameters)
        self._location, self._scale = np.transpose([*priors, _VARIANCE, _VARIANCE, _TRIAL_NOISE, _EPOCH_NOISE])
        self._bounds = np.array(
            [_LENGTH_BOUNDS] * (2 * self._num_parameters) + [_VARIANCE_BOUNDS] * 2 + [_NOISE_BOUNDS] * 2
        )

    def draw_scales(self, number: int, rng: np.random.Generator) -> Array:
        """(number, 2 p + 4) logarithms of scales: around their mode, by the curvature there."""
        start = np.append(np.full(2 * self._num_parameters, 0.5), [0.5, 0.5, -3.0, -4.0])
        mode = minimize(
            self.negative_log_posterior,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=self._bounds,
            options={"maxiter": _MAX_STEPS},
        ).x
        curvature, axes = np.linalg.eigh(self._hessian(mode))
        # A flat direction is no wider than the widest prior.
        widths = 1.0 / np.sqrt(np.maximum(curvature, 1.0 / self._scale.max() ** 2))
        steps = (rng.normal(size=(number, len(mode))) * widths) @ axes.T
        drawn: Array = np.clip(mode + _WIDENING * steps, self._bounds[:, 0], self._bounds[:, 1])
        return drawn

    def draw_functions(self, scales: Array, inputs: Array, number: int, rng: np.random.Generator) -> Array:
        """(m, number) losses at the last epoch of configurations (m, d), up to a constant.

        A function drawn from the prior, by random Fourier features (Rahimi and Recht, 2007), is corrected by what the
        observations differ from it (Wilson et al., 2020, arXiv:2002.09309).
        """
        p, observed = self._num_parameters, self._observed
        end_variance, lag_variance, trial_noise, epoch_noise = np.exp(scales[2 * p :])
        end_lengths, lag_lengths = (np.exp(logs)[self._owners] for logs in (scales[:p], scales[p : 2 * p]))
        ends, prior = _draw_prior(end_lengths, end_variance, [observed.inputs, inputs], number, rng)
        (lags,) = _draw_prior(lag_lengths, lag_variance, [observed.inputs], number, rng)
        trends = self._trend @ rng.normal(size=(self._trend.shape[1], number))
        _, owner = np.unique(observed.trials, return_inverse=True)
        noise = math.sqrt(trial_noise) * rng.normal(size=(owner.max() + 1, number))[owner]
        noise += math.sqrt(epoch_noise + _JITTER) * rng.normal(size=ends.shape)
        simulated = ends + observed.gaps[:, None] * lags + trends + noise
        factor = cholesky(self._covariance(scales).total, lower=True, check_finite=False)
        correction = cho_solve((factor, True), observed.losses[:, None] - simulated, check_finite=False)
        across = end_variance * matern(distances_between(inputs / end_lengths, observed.inputs / end_lengths))[0]
        result: Array = prior + across @ correction
        return result

    def negative_log_posterior(self, scales: Array) -> tuple[float, Array]:
        """Up to a constant, and its gradient (Rasmussen and Williams, 2006, equations 5.8 and 5.9)."""
        p, covariance = self._num_parameters, self._covariance(scales)
        try:
            factor = cholesky(covariance.total, lower=True, check_finite=False)
        except LinAlgError:  # far outside of what the losses allow
            return 1e10, np.zeros_like(scales)
        weights = cho_solve((factor, True), self._observed.losses, check_finite=False)
        # Of the likelihood, for each entry of the covariance.
        slope = 0.5 * (np.outer(weights, weights) - inverse_of(factor))
        lag_slope = slope * covariance.gaps
        end_variance, lag_variance, trial_noise, epoch_noise = np.exp(scales[2 * p :])

        def of_lengths(logs: Array, variance: float, part: tuple[Array, Array], slope: Array) -> Array:
            result: Array = variance * (self._squared @ (slope * part[1]).ravel()) * np.exp(-2.0 * logs) * (5.0 / 3.0)
            return result

        gradient = np.concatenate(
            [
                of_lengths(scales[:p], end_variance, covariance.end, slope),
                of_lengths(scales[p : 2 * p], lag_variance, covariance.lag, lag_slope),
                [
                    end_variance * np.sum(slope * covariance.end[0]),
                    lag_variance * np.sum(lag_slope * covariance.lag[0]),
                    trial_noise * np.sum(slope * self._same_trial),
                    epoch_noise * np.trace(slope),
                ],
            ]
        )
        likelihood = -0.5 * self._observed.losses @ weights - np.log(np.diag(factor)).sum()
        deviation = (scales - self._location) / self._scale
        return float(0.5 * deviation @ deviation - likelihood), deviation / self._scale - gradient

    def _hessian(self, at: Array) -> Array:
        rows = [
            (self.negative_log_posterior(at + step)[1] - self.negative_log_posterior(at - step)[1])
            / (2.0 * _HESSIAN_STEP)
            for step in _HESSIAN_STEP * np.eye(len(at))
        ]
        hessian = np.array(rows)
        symmetric: Array = (hessian + hessian.T) / 2.0
        return symmetric

    def _covariance(self, scales: Array) -> _Covariance:
        p, size = self._num_parameters, len(self._observed.losses)
        end_variance, lag_variance, trial_noise, epoch_noise = np.exp(scales[2 * p :])
        end, lag = (
            matern(np.sqrt(np.exp(-2.0 * logs) @ self._squared).reshape(size, size))
            for logs in (scales[:p], scales[p : 2 * p])
        )
        gaps = np.outer(self._observed.gaps, self._observed.gaps)
        total = end_variance * end[0] + lag_variance * gaps * lag[0]
        total += self._trend @ self._trend.T + trial_noise * self._same_trial
        total[np.diag_indices(size)] += epoch_noise + _JITTER
        return _Covariance(total, end, lag, gaps)


@dataclass(frozen=True)
class _Covariance:
    """Of the observations, (n, n), and what it is made of."""

    total: Array
    end: tuple[Array, Array]
    """Correlation of `end`, and its slope."""
    lag: tuple[Array, Array]
    gaps: Array


def _length_prior(num_parameters: int) -> tuple[float, float]:
    return _LENGTH[0] + 0.5 * math.log(num_parameters), _LENGTH[1]


def _draw_prior(
    lengths: Array, variance: float, inputs: Sequence[Array], number: int, rng: np.random.Generator
) -> list[Array]:
    """The same (number) functions of a Matern-5/2 process at each of the inputs (m, d); (m, number) each."""
    # The spectral density is a multivariate t distribution with 5 degrees of freedom.
    frequencies = rng.normal(size=(len(lengths), _NUM_FEATURES)) / lengths[:, None]
    frequencies *= np.sqrt(5.0 / rng.chisquare(5.0, size=_NUM_FEATURES))
    weights = rng.normal(size=(2 * _NUM_FEATURES, number)) * math.sqrt(variance / _NUM_FEATURES)
    phases = [each @ frequencies for each in inputs]
    return [np.concatenate([np.cos(phase), np.sin(phase)], axis=1) @ weights for phase in phases]
