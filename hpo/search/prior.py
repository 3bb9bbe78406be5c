"""What another study has found, as a guess at this one: trials kept as plain data, and a model of them.

The guess is the prior mean of the model of the learning curves (hpo.search.surrogate), which scales it by how well the
study's own trials agree with it, down to nothing. So the other study may be of another task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hpo.search.encoding import Encoding
from hpo.search.gaussian_process import GaussianProcess, standardized
from hpo.search.kernels import Array

_MIN_OBSERVATIONS = 5
"""A model of fewer trials than this says nothing."""

Observation = dict[str, Any]
"""`values` of the parameters that both studies have, and the `loss`: plain data."""


class Prior:
    """A Gaussian process of the trials of another study, over the parameters that both have."""

    def __init__(self, encoding: Encoding, seen: Sequence[Observation]) -> None:
        shared = [name in seen[0]["values"] for name in encoding.names]
        defaults = encoding.space.defaults()
        units = np.array([encoding.units(defaults | each["values"]) for each in seen])
        self._encoding = encoding
        self._columns = np.array(shared)[encoding.owners]
        _, owners = np.unique(encoding.owners[self._columns], return_inverse=True)
        targets = standardized(np.array([each["loss"] for each in seen]))
        self._process = GaussianProcess.fit(self._inputs(units), targets, owners)

    @classmethod
    def read(cls, encoding: Encoding, stored: Mapping[str, Sequence[Observation]]) -> list[Prior]:
        """A prior for each of the studies whose trials are kept, except those of which too little fits the space."""
        priors = []
        for seen in stored.values():
            fitting = [each for each in seen if encoding.contains(encoding.space.defaults() | each["values"])]
            if len(fitting) >= _MIN_OBSERVATIONS and len({each["loss"] for each in fitting}) > 1:
                priors.append(cls(encoding, fitting))
        return priors

    def predict(self, units: Array) -> Array:
        """The loss that the other study expects of configurations (m, p), with mean 0 and variance 1 there; (m,)."""
        return self._process.predict(self._inputs(units))[0]

    def _inputs(self, units: Array) -> Array:
        return self._encoding.columns(units)[:, self._columns]
