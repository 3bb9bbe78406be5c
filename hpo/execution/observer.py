"""Observer: who is told how a search goes on, such as the progress display."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpo.config import Direction
    from hpo.records import EndState, TrialState
    from hpo.search.study import Suggestion
    from hpo.training.trainer import EpochResult


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a study stands: a search that is resumed has trials already."""

    study: str
    metric: str
    direction: Direction
    num_trials: int
    counts: Mapping[TrialState, int]
    """Its trials, by state."""
    best: tuple[int, float] | None
    """Number and value of the best of them."""


class Observer:
    """Hears of everything that happens in a search, and ignores it; a display overrides what it shows."""

    def note(self, text: str) -> None:
        """Something takes a moment, or is worth knowing."""

    def found(self, line: str) -> None:
        """Something that was found before the first trial, and that should stay in sight."""

    def search_started(self, start: Standing) -> None:
        """Trials are about to run."""

    def study_moved(self, standing: Standing) -> None:
        """Other machines have moved the study on, or pruned trials are continued; where it stands now."""

    def trial_started(self, suggestion: Suggestion) -> None:
        """A trial begins, or goes on after an interruption."""

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        """A running trial has finished an epoch."""

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        """A trial has ended; `result` is its last epoch's, if it finished one."""

    def search_ended(self) -> None:
        """No further trial runs."""
