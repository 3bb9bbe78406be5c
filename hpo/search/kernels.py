"""The Matern-5/2 kernel of both models of `priority` (Rasmussen and Williams, 2006, equation 4.17)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

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
