"""Observer: who hears what happens in a search, such as the progress display."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpo.config import Direction
    from hpo.records import EndState, SearchOutcome, TrialState
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
    num_repeats: int = 0
    """Trainings that confirm the best configurations when all trials have run, at most."""
    num_repeated: int = 0
    """Those that have ended."""
    budget_s: float | None = None
    """Training time of all trials together, in seconds; None without a limit."""
    trained_s: float = 0.0
    """How much of it is used."""


class Observer:
    """Hears of everything that happens in a search, and ignores it: override what you need.

    `run_search(..., observer=...)` takes one. Its methods are called in the thread of the search, between the results
    of trials, so they must return soon. What they raise ends the search: the trials are kept.
    """

    def note(self, text: str) -> None:
        """Something takes a moment, or is worth knowing."""

    def found(self, line: str) -> None:
        """Something that was found before the first trial, and that should stay in sight."""

    def search_started(self, start: Standing) -> None:
        """Trials are about to run."""

    def study_moved(self, standing: Standing) -> None:
        """Other machines have moved the study on, or pruned trials are continued; where it stands now."""

    def trial_started(self, suggestion: Suggestion) -> None:
        """A trial begins, or continues after an interruption."""

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        """A running trial has finished an epoch."""

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        """A trial has ended; `result` is its last epoch's, if it finished one."""

    def search_ended(self) -> None:
        """No further trial runs."""

    def search_failed(self, error: Exception) -> None:
        """The search ends with an error, which is raised next."""

    def search_concluded(self, outcome: SearchOutcome) -> None:
        """The search is complete, interrupted, or its time is up; it returns this next."""


class Observers(Observer):
    """Several observers as one; they hear in their order."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def note(self, text: str) -> None:
        for observer in self._observers:
            observer.note(text)

    def found(self, line: str) -> None:
        for observer in self._observers:
            observer.found(line)

    def search_started(self, start: Standing) -> None:
        for observer in self._observers:
            observer.search_started(start)

    def study_moved(self, standing: Standing) -> None:
        for observer in self._observers:
            observer.study_moved(standing)

    def trial_started(self, suggestion: Suggestion) -> None:
        for observer in self._observers:
            observer.trial_started(suggestion)

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        for observer in self._observers:
            observer.epoch_done(suggestion, result)

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        for observer in self._observers:
            observer.trial_ended(suggestion, state, result, reason)

    def search_ended(self) -> None:
        for observer in self._observers:
            observer.search_ended()

    def search_failed(self, error: Exception) -> None:
        for observer in self._observers:
            observer.search_failed(error)

    def search_concluded(self, outcome: SearchOutcome) -> None:
        for observer in self._observers:
            observer.search_concluded(outcome)
