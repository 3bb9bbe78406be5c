"""What the Gaussian processes of a search share: those of the strategy `priority`, and that of the importances.

The kernel is Matern-5/2 (Rasmussen and Williams, 2006, equation 4.17).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

Array = NDArray[np.float64]

_SQRT5 = np.sqrt(5.0)


def matern(distances: Array) -> tuple[Array, Array]:
    """The correlation at these distances, and the factor of its slope by the logarithm of a length scale."""
    scaled = _SQRT5 * distances
    decay = np.exp(-scaled)
    return (1.0 + scaled + scaled * scaled / 3.0) * decay, (1.0 + scaled) * decay


def distances_between(a: Array, b: Array) -> Array:
    """Those of the rows of `a` (n, d) from the rows of `b` (m, d): (n, m)."""
    squared = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)[None, :] - 2.0 * (a @ b.T)
    distances: Array = np.sqrt(np.maximum(squared, 0.0))
    return distances


def squared_distances(inputs: Array, owners: NDArray[np.int64]) -> Array:
    """Between the rows of `inputs` (n, d), for each of the p parameters that own its columns: (p, n * n)."""
    squared = np.zeros((int(owners.max()) + 1, len(inputs), len(inputs)))
    for column, owner in enumerate(owners):
        squared[owner] += (inputs[:, column, None] - inputs[None, :, column]) ** 2
    return squared.reshape(len(squared), -1)


def inverse_of(factor: Array) -> Array:
    """The inverse of a matrix (n, n), from its lower Cholesky factor."""
    triangle, _ = lapack.dpotri(factor, lower=1)
    inverse: Array = np.tril(triangle) + np.tril(triangle, -1).T
    return inverse
