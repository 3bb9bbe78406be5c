"""What a model promises of a configuration, and the search for the configuration that promises most."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import numpy as np
from scipy.special import erfcx, ndtr
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]

from hpo.parameters import Value
from hpo.search.encoding import Encoding
from hpo.search.kernels import Array
from hpo.search.optimum import OptimumPrior

NUM_INCUMBENTS = 10
"""Observations that are searched around."""

_BLAS = ThreadpoolController().select(user_api="blas")

_NUM_CANDIDATES = 512
_REFINEMENTS = (0.1, 0.03, 0.01)
_OFFSPRING = 20


def on_one_thread() -> AbstractContextManager[None]:
    """Keep linear algebra to one thread: on small matrices two take five times the CPU time, which the trials need."""
    limited: AbstractContextManager[None] = _BLAS.limit(limits=1)
    return limited


def log_expected_improvement(z: Array) -> Array:
    """log E[max(0, z + e)] for a standard normal e, exact where the improvement itself underflows.

    Ament et al., 2023, arXiv:2310.20708.
    """
    log_density = -0.5 * z * z - 0.5 * math.log(2 * math.pi)
    tail = np.minimum(z, -1.0)
    likely = np.maximum(z, -1.0)
    far = log_density + np.log1p(np.maximum(math.sqrt(math.pi / 2) * tail * erfcx(-tail / math.sqrt(2)), -1 + 1e-16))
    near = np.log(np.exp(-0.5 * likely * likely) / math.sqrt(2 * math.pi) + likely * ndtr(likely))
    result: Array = np.where(z < -1.0, far, near)
    return result


def maximize(
    promise: Callable[[Array], Array],
    encoding: Encoding,
    incumbents: Array,
    held: Mapping[str, Value],
    rng: np.random.Generator,
    *,
    optimum: OptimumPrior | None = None,
) -> tuple[Array, float]:
    """The configuration (p,) with the highest promise that was found, and that.

    Searches the cube at random and around the incumbents (n, p), then refines what is best. `held` fixes some values,
    and `optimum` is where the user believes the best ones to be. A promise of (m, p) configurations is (m,).
    """
    is_held = np.array([name in held for name in encoding.names])
    base = encoding.units(encoding.space.defaults() | dict(held))

    def allowed(units: Array) -> Array:
        return np.where(is_held, base, encoding.snap(units))

    anywhere = rng.uniform(size=(_NUM_CANDIDATES, len(base)))
    if optimum:
        anywhere = np.concatenate([anywhere, optimum.drawn(anywhere)])
    nearby = incumbents[rng.integers(len(incumbents), size=_NUM_CANDIDATES)]
    candidates = allowed(np.concatenate([anywhere, encoding.mutated(nearby, rng)]))
    scores = promise(candidates)
    for step in _REFINEMENTS:
        elite = np.argsort(-scores)[:NUM_INCUMBENTS]
        offspring = np.repeat(candidates[elite], _OFFSPRING, axis=0)
        offspring += step * rng.normal(size=offspring.shape) * (rng.uniform(size=offspring.shape) < 0.5)
        offspring = allowed(offspring)
        candidates = np.concatenate([candidates[elite], offspring])
        scores = np.concatenate([scores[elite], promise(offspring)])
    best = int(np.argmax(scores))
    return candidates[best], float(scores[best])
