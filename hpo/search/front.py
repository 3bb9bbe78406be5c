"""Two objectives: the Pareto front of what has been seen, and the configuration that is expected to add most to it.

Each objective has a Gaussian process of its own. A configuration is worth the hypervolume that it is expected to add:
the area that it beats and the front does not, up to a reference point (Emmerich, Deutz and Klinkenberg, 2011; in strips
along the front as in Yang et al., 2019, doi:10.1007/s10898-019-00798-7).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from optuna.trial import TrialState

from hpo.config import Direction
from hpo.parameters import Value
from hpo.search.acquisition import log_expected_improvement, maximize, on_one_thread
from hpo.search.encoding import Encoding
from hpo.search.gaussian_process import GaussianProcess, standardized
from hpo.search.kernels import Array
from hpo.space import Space

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

_BEYOND = 1.0
"""How far the reference point is beyond the ends of the front, as a share of its extent.

With 0.1 a short front is not extended: what lies farther from its ends than that adds nothing.
"""


@dataclass(frozen=True)
class Front:
    """The points that no other one beats, as strips: what lies left of an end and below a height is not beaten yet."""

    members: list[int]
    """Which of the points they are, from the left to the right."""

    ends: Array
    """(n + 1,) where each strip ends along the first objective; the last one at the reference point."""

    heights: Array
    """(n + 1,) how high each of them is along the second; the first one up to the reference point."""

    @classmethod
    def of(cls, losses: Array) -> Front:
        """The front of points (n, 2), of which lower is better."""
        members: list[int] = []
        for index in np.lexsort((losses[:, 1], losses[:, 0])):
            if not members or losses[index, 1] < losses[members[-1], 1]:
                members.append(int(index))
        front = losses[members]
        extent = np.ptp(front if len(front) > 1 else losses, axis=0)
        reference = front.max(axis=0) + _BEYOND * extent
        return cls(members, np.append(front[:, 0], reference[0]), np.append(reference[1], front[:, 1]))

    def log_expected_gain(self, first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
        """Logarithm of the area that independent normal losses are expected to add; (m,).

        Each objective is given as means (m,) and standard deviations (m,).
        """
        beyond_ends = _log_expected_excess(self.ends, *first)
        below_heights = _log_expected_excess(self.heights, *second)
        # The width of a strip is what is left of its end, less what is left of the end of the strip before.
        before = beyond_ends[:-1] - beyond_ends[1:]
        widths = beyond_ends.copy()
        widths[1:] += np.log1p(-np.exp(np.minimum(before, -1e-12)))
        total: Array = np.logaddexp.reduce(widths + below_heights, axis=0)
        return total


def _log_expected_excess(bounds: Array, means: Array, deviations: Array) -> Array:
    """log E[max(0, bound - loss)] for bounds (n,) and normal losses (m,); (n, m)."""
    return log_expected_improvement((bounds[:, None] - means) / deviations) + np.log(deviations)


class FrontSurrogate:
    """Proposes configurations for a space from the trials of a study with two objectives."""

    def __init__(self, space: Space) -> None:
        self._encoding = Encoding(space)

    def propose(
        self,
        trials: Sequence[FrozenTrial],
        held: Mapping[str, Value],
        *,
        directions: Sequence[Direction],
        rng: np.random.Generator,
    ) -> dict[str, Value] | None:
        """The configuration that is expected to add most to the front; None while trials cannot be distinguished.

        `held` fixes some of its values. Trials that are running count as if they would end as expected. One that was
        stopped, because it diverged or costs too much, counts as the worst by the first objective.
        """
        encoding = self._encoding
        known = [trial for trial in trials if encoding.contains(trial.params)]
        complete = [trial for trial in known if trial.state == TrialState.COMPLETE and np.isfinite(trial.values).all()]
        losses = _losses(complete, directions)
        if len(losses) == 0 or (losses.min(axis=0) == losses.max(axis=0)).any():
            return None
        with on_one_thread():
            targets = np.column_stack([standardized(column) for column in losses.T])
            units, running, stopped = (
                self._units(each)
                for each in (
                    complete,
                    [trial for trial in known if trial.state == TrialState.RUNNING],
                    [trial for trial in known if trial.state == TrialState.PRUNED],
                )
            )
            worst = np.full(len(stopped), targets[:, 0].max())
            first = self._process(np.concatenate([units, stopped]), np.append(targets[:, 0], worst), running)
            second = self._process(units, targets[:, 1], running)
            points = np.concatenate([units, running])
            front = Front.of(np.concatenate([targets, self._expected(running, first, second)]))

            def promise(candidates: Array) -> Array:
                columns = encoding.columns(candidates)
                gain = front.log_expected_gain(first.predict(columns), second.predict(columns))
                return np.where(encoding.allows(candidates), gain, -np.inf)

            best, _ = maximize(promise, encoding, points[front.members], held, rng)
        return encoding.values(best) | dict(held)

    def _units(self, trials: Sequence[FrozenTrial]) -> Array:
        return np.array([self._encoding.units(trial.params) for trial in trials]).reshape(-1, len(self._encoding.names))

    def _expected(self, running: Array, *processes: GaussianProcess) -> Array:
        """What the processes expect of configurations (m, p); (m, 2)."""
        if not len(running):
            return np.empty((0, len(processes)))
        return np.column_stack([process.predict(self._encoding.columns(running))[0] for process in processes])

    def _process(self, units: Array, targets: Array, running: Array) -> GaussianProcess:
        encoding = self._encoding
        process = GaussianProcess.fit(encoding.columns(units), targets, encoding.owners)
        return process.believing(encoding.columns(running)) if len(running) else process


def _losses(trials: Sequence[FrozenTrial], directions: Sequence[Direction]) -> Array:
    """(n, 2) of which lower is better. The second one is a cost: of positive ones the logarithm counts."""
    losses = np.array([[d.loss(v) for d, v in zip(directions, trial.values, strict=True)] for trial in trials])
    if len(losses) and (losses[:, 1] > 0).all():
        losses[:, 1] = np.log(losses[:, 1])
    return losses
