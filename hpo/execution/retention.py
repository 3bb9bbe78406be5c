"""What stays on disk of a study's trials: the weights of the best in MLflow, checkpoints that a trial may yet read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from hpo.records import losses, pareto_front, ranked

if TYPE_CHECKING:
    from hpo.search.study import Study


class BestTrials:
    """The trials whose weights stay in MLflow: the best `keep`, the default, and with several objectives the front.

    Of the repeats that confirm a configuration the best one stays.
    """

    def __init__(self, study: Study, keep: int) -> None:
        direction = study.settings.direction
        self._keep = keep
        self._direction = direction
        # The winner is compared with the default configuration, trial 0, which a grid alone lacks.
        self._spared = {0} if study.settings.strategy != "grid" else set()
        self._losses = {trial.number: losses(trial, direction) for trial in ranked(study.trials(), direction)}
        self._repeats: dict[int, dict[int, float]] = defaultdict(dict)
        for repeat in ranked(study.repeats(), direction):
            assert repeat.repeats is not None, "it repeats a trial"
            self._repeats[repeat.repeats][repeat.number] = losses(repeat, direction)[0]
        self.outdone = self._drop_outdone()
        """The trials that have weights, or had, and were not among the best when this was made."""

    @property
    def kept(self) -> list[int]:
        """The trials, and repeats, whose weights stay, by number."""
        return sorted({*self._losses, *(number for own in self._repeats.values() for number in own)})

    def add(self, number: int, value: float, costs: Mapping[str, float], *, repeats: int | None = None) -> list[int]:
        """The numbers of trials that are no longer kept, this one perhaps; `repeats` is the trial that it confirms."""
        loss = self._direction.loss(value)
        if repeats is None:
            self._losses[number] = (loss, *costs.values())
        else:
            self._repeats[repeats][number] = loss
        return self._drop_outdone()

    def remove(self, number: int) -> None:
        """Forget a trial that can win no longer."""
        self._losses.pop(number, None)

    def _drop_outdone(self) -> list[int]:
        best = sorted(self._losses, key=lambda number: (self._losses[number][0], number))[: self._keep]
        outdone = sorted(set(self._losses) - {*best, *pareto_front(self._losses), *self._spared})
        for number in outdone:
            del self._losses[number]
        for own in self._repeats.values():
            for number in sorted(own, key=lambda number: (own[number], number))[1:]:
                del own[number]
                outdone.append(number)
        return outdone


def without_use_for_checkpoints(study: Study, numbers: Iterable[int]) -> set[int]:
    """Those of the trials that have ended for good: they will neither be resumed nor continued as finalists."""
    with study.seen_once():
        return study.ended(numbers) - {trial.number for trial in study.finalists()}
