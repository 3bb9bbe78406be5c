"""Where the user believes the optimum to be: near the defaults, as closely as the `confidence` in each of them says.

It multiplies the expected improvement with a power that falls with the number of trials, as in pi-BO (Hvarfner et al.,
2022, arXiv:2204.11051), and with what the trials say against it (hpo.search.surrogate). pi-BO alone stays where a wrong
belief leads: docs/tasks.md has the figures.
"""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr, ndtri

from hpo.parameters import Choice
from hpo.search.encoding import Encoding, positions
from hpo.search.kernels import Array

_DEVIATIONS = {"low": 0.5, "medium": 0.25, "high": 0.125}
"""Standard deviation of the optimum around the default of a number, as a share of its range."""

_ODDS = {"low": 2.0, "medium": 4.0, "high": 16.0}
"""How many times as likely the default of a choice is as each of the others."""


class OptimumPrior:
    """A density over configurations: a product of one for each parameter whose default has a confidence.

    Numbers have a normal density around the default, on the scale of their range and within it.
    """

    def __init__(self, encoding: Encoding) -> None:
        space = encoding.space
        centers = dict(zip(encoding.names, encoding.units(space.defaults()), strict=True))
        self._numbers: list[tuple[int, float, float]] = []  # axis, center, standard deviation
        self._choices: list[tuple[int, Array]] = []  # axis, probabilities
        for name, level in space.confidences().items():
            parameter, axis = space.parameters[name], encoding.names.index(name)
            if isinstance(parameter, Choice):
                odds = np.ones(len(parameter.choices))
                odds[int(centers[name] * len(odds))] = _ODDS[level]
                self._choices.append((axis, odds / odds.sum()))
            else:
                self._numbers.append((axis, float(centers[name]), _DEVIATIONS[level]))
        uniform = np.random.default_rng(0).uniform(size=(1000, len(encoding.names)))
        self._typical = float(-self.log_density(uniform).mean())

    def log_density(self, units: Array) -> Array:
        """Logarithm of the density at configurations (m, p) in the unit cube, 0 at the defaults; (m,)."""
        total = np.zeros(len(units))
        for axis, center, deviation in self._numbers:
            total -= 0.5 * ((units[:, axis] - center) / deviation) ** 2
        for axis, shares in self._choices:
            total += np.log(shares / shares.max())[positions(units[:, axis], len(shares))]
        return total

    def expected_loss(self, units: Array) -> Array:
        """A loss that rises as the density falls, at configurations (m, p): 0 at the defaults, 1 on average; (m,)."""
        return -self.log_density(units) / self._typical

    def drawn(self, units: Array) -> Array:
        """Points (m, p) that are uniform in the unit cube -> points with this density, by its quantiles."""
        drawn = units.copy()
        for axis, center, deviation in self._numbers:
            low, high = ndtr(-center / deviation), ndtr((1.0 - center) / deviation)
            drawn[:, axis] = center + deviation * ndtri(low + units[:, axis] * (high - low))
        for axis, shares in self._choices:
            chosen = np.searchsorted(np.cumsum(shares)[:-1], units[:, axis], side="right")
            drawn[:, axis] = (chosen + 0.5) / len(shares)
        return np.clip(drawn, 0.0, 1.0)
