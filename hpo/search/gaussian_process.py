"""Gaussian process regression in numpy: small, stateless, and fast enough to be fitted again for each trial.

Optuna's own Gaussian process takes neither the epoch as an input nor a pruned trial as an observation, and needs 0.66 s
at 100 trials; this one needs a tenth of that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.optimize import minimize
from scipy.special import ndtr

from hpo.search.kernels import Array, distances_between, inverse_of, matern, squared_distances

_JITTER = 1e-6

# Log-normal priors. That of the length scales grows with the square root of the number of inputs, as distances do
# (Hvarfner, Hellsten and Nardi, 2024, arXiv:2402.02229). Their location is sqrt(2); with 0 the median is a quarter of
# theirs, which makes no difference that can be measured (docs/strategies.md has the figures). The prior of the noise
# variance is for targets of variance 1.
_LENGTH_LOCATION, _LENGTH_SCALE = 0.0, np.sqrt(3.0)
_NOISE_LOCATION, _NOISE_SCALE = -5.0, 1.5
_LOG_LENGTH_BOUNDS = (np.log(0.02), np.log(1e3))
_LOG_NOISE_BOUNDS = (np.log(1e-6), 0.0)
_MAX_STEPS = 40

_MAX_FITTED = 150
"""Observations that the scales are fitted to: the last ones."""

_SCALE_DEVIATION = 1.0
"""How far the factor of a mean function may be from what is believed of it."""

_HOPELESS = 10.0
"""Losses count as equal where they are this many times as far above the median as the best is below it."""


@dataclass(frozen=True)
class GaussianProcess:
    """A Matern-5/2 process with a length scale for each parameter, conditioned on observations."""

    inputs: Array
    """(n, d) in [0, 1]."""

    lengths: Array
    """(d,) length scales of the columns."""

    noise: float
    """Variance of the noise, where the process itself has variance 1."""

    targets: Array
    """(n,) of mean 0."""

    _factor: Array
    _weights: Array

    @classmethod
    def fit(cls, inputs: Array, targets: Array, owners: NDArray[np.int64]) -> GaussianProcess:
        """The process with the most probable length scales and noise.

        `owners` (d,) numbers the parameter that each column belongs to; columns of one parameter share a length scale.
        `targets` have mean 0 and variance 1.
        """
        fitted = _most_probable(inputs[-_MAX_FITTED:], targets[-_MAX_FITTED:], owners)
        lengths = np.exp(fitted[:-1])[owners]
        return cls.given(inputs, targets, lengths, float(np.exp(fitted[-1])))

    @classmethod
    def given(cls, inputs: Array, targets: Array, lengths: Array, noise: float) -> GaussianProcess:
        """The process with these length scales and this noise."""
        covariance = matern(distances_between(inputs / lengths, inputs / lengths))[0]
        covariance[np.diag_indices_from(covariance)] += noise + _JITTER
        factor: Array = cholesky(covariance, lower=True, check_finite=False)
        return cls(inputs, lengths, noise, targets, factor, cho_solve((factor, True), targets, check_finite=False))

    def predict(self, inputs: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the noiseless function at inputs (m, d): two arrays (m,)."""
        across = matern(distances_between(self.inputs / self.lengths, inputs / self.lengths))[0]
        explained = solve_triangular(self._factor, across, lower=True, check_finite=False)
        variance = 1.0 - np.einsum("nm,nm->m", explained, explained)
        return across.T @ self._weights, np.sqrt(np.maximum(variance, 1e-12))

    def observing(self, targets: Array) -> GaussianProcess:
        """The process with other targets (n,) at the same inputs."""
        return replace(self, targets=targets, _weights=cho_solve((self._factor, True), targets, check_finite=False))

    def scale_of(self, means: Array, *, share: float = 1.0) -> float:
        """How much of a mean function the targets ask for, from 0 to 1; `means` (n,) are its values at the inputs.

        Targets that contradict `means` soon bring it to 0.
        """
        scale, _ = self._factor_of(means, share)
        return float(np.clip(scale, 0.0, 1.0))

    def agreement_with(self, means: Array) -> float:
        """How surely the targets rise with `means` (n,), values at the inputs: 1 for certain, 0 if they may fall."""
        factor, deviation = self._factor_of(means, share=1.0)
        return max(0.0, 2.0 * float(ndtr(factor / deviation)) - 1.0)

    def _factor_of(self, means: Array, share: float) -> tuple[float, float]:
        """The most probable factor of a basis function, and its standard deviation.

        It is believed to be `share`, with a standard deviation of 1 (Rasmussen and Williams, 2006, section 2.7).
        """
        prior_precision = _SCALE_DEVIATION**-2
        solved = cho_solve((self._factor, True), means, check_finite=False)
        precision = float(solved @ means) + prior_precision
        return (float(solved @ self.targets) + prior_precision * share) / precision, precision**-0.5

    def believing(self, inputs: Array) -> GaussianProcess:
        """The process as if its own mean had been observed at these inputs (m, d)."""
        if not len(inputs):
            return self
        means, _ = self.predict(inputs)
        return self.given(
            np.concatenate([self.inputs, inputs]), np.concatenate([self.targets, means]), self.lengths, self.noise
        )


def standardized(losses: Array) -> Array:
    """Losses with mean 0 and variance 1; hopeless ones are cut off, so that one absurd loss does not hide the rest.

    Ranks are indifferent to such a loss too, and were worse: regret .176 / .080 at epochs worth 10 / 30 full
    runs in place of .151 / .059 (LCBench, 8 tasks x 6 seeds).
    """
    lowest, median = float(losses.min()), float(np.median(losses))
    kept = np.minimum(losses, median + _HOPELESS * (median - lowest)) if median > lowest else losses
    result: Array = (kept - kept.mean()) / kept.std()
    return result


def _most_probable(inputs: Array, targets: Array, owners: NDArray[np.int64]) -> Array:
    """Logarithms of the length scale of each parameter, and of the noise."""
    num_parameters = int(owners.max()) + 1
    start = np.append(np.full(num_parameters, np.log(0.5)), _NOISE_LOCATION)
    bounds = [_LOG_LENGTH_BOUNDS] * num_parameters + [_LOG_NOISE_BOUNDS]
    found = minimize(
        negative_log_posterior(inputs, targets, owners),
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options={"maxiter": _MAX_STEPS},
    )
    result: Array = found.x
    return result


def negative_log_posterior(
    inputs: Array, targets: Array, owners: NDArray[np.int64]
) -> Callable[[Array], tuple[float, Array]]:
    """A function of the logarithms of the length scales (p,) and of the noise: (p + 1,) -> its value and its gradient.

    Up to a constant, Rasmussen and Williams, 2006, equations 5.8 and 5.9, with the log-normal priors above.
    """
    num_parameters = int(owners.max()) + 1
    squared = squared_distances(inputs, owners)
    location = np.append(np.full(num_parameters, _LENGTH_LOCATION + 0.5 * np.log(num_parameters)), _NOISE_LOCATION)
    scale = np.append(np.full(num_parameters, _LENGTH_SCALE), _NOISE_SCALE)
    diagonal = np.diag_indices(len(inputs))

    def value_and_gradient(logs: Array) -> tuple[float, Array]:
        precisions = np.exp(-2.0 * logs[:-1])
        noise = np.exp(logs[-1])
        covariance, slopes = matern(np.sqrt(precisions @ squared).reshape(len(inputs), -1))
        covariance[diagonal] += noise + _JITTER
        factor = cholesky(covariance, lower=True, check_finite=False)
        weights = cho_solve((factor, True), targets, check_finite=False)
        # Of the likelihood, for each entry of the covariance.
        slope = 0.5 * (np.outer(weights, weights) - inverse_of(factor))
        of_lengths = (squared @ (slope * slopes).ravel()) * precisions * (5.0 / 3.0)
        of_noise = noise * np.trace(slope)
        likelihood = -0.5 * targets @ weights - np.log(np.diag(factor)).sum()
        deviation = (logs - location) / scale
        return (
            float(0.5 * deviation @ deviation - likelihood),
            deviation / scale - np.append(of_lengths, of_noise),
        )

    return value_and_gradient
