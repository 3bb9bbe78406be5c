"""What stays on disk of a study's trials: the weights of the best in MLflow, checkpoints that a trial may yet read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hpo.records import losses, pareto_front, ranked

if TYPE_CHECKING:
    from hpo.search.study import Study


class BestTrials:
    """The trials whose weights stay in MLflow: the best `keep`, the default, and with several objectives the front."""

    def __init__(self, study: Study, keep: int) -> None:
        direction = study.settings.direction
        self._keep = keep
        self._direction = direction
        # The winner is compared with the default configuration, trial 0, which a grid alone lacks.
        self._spared = {0} if study.settings.strategy != "grid" else set()
        self._losses = {trial.number: losses(trial, direction) for trial in ranked(study.trials(), direction)}
        self.outdone = self._drop_outdone()
        """The trials that have weights, or had, and were not among the best when this was made."""

    def add(self, number: int, value: float, costs: Mapping[str, float]) -> list[int]:
        """The numbers of trials that are no longer kept, this one perhaps."""
        self._losses[number] = (self._direction.loss(value), *costs.values())
        return self._drop_outdone()

    def remove(self, number: int) -> None:
        """Forget a trial that can win no longer."""
        self._losses.pop(number, None)

    def _drop_outdone(self) -> list[int]:
        best = sorted(self._losses, key=lambda number: (self._losses[number][0], number))[: self._keep]
        outdone = sorted(set(self._losses) - {*best, *pareto_front(self._losses), *self._spared})
        for number in outdone:
            del self._losses[number]
        return outdone


def without_use_for_checkpoints(study: Study, numbers: Iterable[int]) -> set[int]:
    """Those of the trials that have ended for good: they will neither be resumed nor continued as finalists."""
    may_continue = {trial.number for trial in study.finalists()}
    return {number for number in numbers if number not in may_continue and study.has_ended(number)}
