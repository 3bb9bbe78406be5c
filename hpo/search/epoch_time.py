"""How long an epoch takes, as a function of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpo.search.gaussian_process import GaussianProcess
from hpo.search.kernels import Array

_LEAST_TRIALS = 3


@dataclass(frozen=True)
class EpochTime:
    """A Gaussian process for the logarithm of the seconds per epoch, because a larger network multiplies them."""

    process: GaussianProcess
    mean: float
    deviation: float
    """Mean and standard deviation of the logarithms observed."""

    @classmethod
    def fit(cls, inputs: Array, seconds: Array, owners: NDArray[np.int64]) -> EpochTime | None:
        """What trials at inputs (n, d) have taken (n,); None while there are too few, or all are the same.

        `owners` are those of GaussianProcess.fit.
        """
        logs = np.log(seconds)
        if len(logs) < _LEAST_TRIALS or logs.min() == logs.max():
            return None
        mean, deviation = float(logs.mean()), float(logs.std())
        return cls(GaussianProcess.fit(inputs, (logs - mean) / deviation, owners), mean, deviation)

    def log_seconds(self, inputs: Array) -> Array:
        """The expected logarithm of the seconds per epoch at inputs (m, d); (m,)."""
        return self.mean + self.deviation * self.process.predict(inputs)[0]
