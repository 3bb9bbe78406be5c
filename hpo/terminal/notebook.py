"""Live progress of a search in a notebook: one output that is replaced as the search continues."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import TYPE_CHECKING, Any

from hpo.execution.observer import Observer, Standing
from hpo.terminal.progress import Tally
from hpo.terminal.words import format_configuration

if TYPE_CHECKING:
    from hpo.records import EndState
    from hpo.search.study import Suggestion
    from hpo.training.trainer import EpochResult

_INTERVAL_S = 0.5
"""Seconds between two drawings at least: each is a message that the notebook keeps for a while."""


@contextmanager
def notebook_progress() -> Iterator[Observer]:
    """A display where this runs in a notebook; elsewhere an observer that ignores everything."""
    if not _is_notebook():
        yield Observer()
        return
    progress = NotebookProgress()
    try:
        yield progress
    finally:
        progress.draw()


def _is_notebook() -> bool:
    """Whether IPython runs as a kernel, which shows HTML, and not in a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return shell is not None and hasattr(shell, "kernel")


class NotebookProgress(Observer):
    """Counts, the best trial and the trials that run, under what was found before the first trial."""

    def __init__(self) -> None:
        from IPython.display import display

        self._found: list[str] = []
        self._note = ""
        self._running: dict[int, str] = {}
        self._best = ""
        self._tally: Tally | None = None
        self._drawn = time.monotonic()
        self._display: Any = display(self._as_bundle(), raw=True, display_id=True)

    def note(self, text: str) -> None:
        self._note = text
        self.draw()

    def found(self, line: str) -> None:
        self._found.append(line)
        self.draw()

    def search_started(self, start: Standing) -> None:
        self._tally, self._note = Tally(start), ""
        self.draw()

    def study_moved(self, standing: Standing) -> None:
        assert self._tally is not None, "a search starts before others are seen"
        self._tally.catch_up(standing)

    def trial_started(self, suggestion: Suggestion) -> None:
        self._running[suggestion.number] = f"trial {suggestion.number}: {suggestion.stage}"

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        running = f"trial {suggestion.number}: {suggestion.stage}, epoch {result.epoch}, {result.value:.4f}"
        self._running[suggestion.number] = running
        if time.monotonic() - self._drawn >= _INTERVAL_S:
            self.draw()

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        assert self._tally is not None, "a search starts before its trials end"
        self._running.pop(suggestion.number, None)
        if self._tally.add(suggestion, state, result):
            self._best = format_configuration(suggestion.active_values)
        if state == "failed":
            self._found.append(f"trial {suggestion.number} failed: {reason}")
        self.draw()

    def search_ended(self) -> None:
        self._note = ""
        self.draw()

    def draw(self) -> None:
        """Show how things stand now."""
        self._drawn = time.monotonic()
        self._display.update(self._as_bundle(), raw=True)

    def _as_bundle(self) -> dict[str, str]:
        """As HTML, and as text for whatever shows no HTML."""
        lines = self._lines()
        return {"text/html": "<br>".join(map(escape, lines)), "text/plain": "\n".join(lines)}

    def _lines(self) -> list[str]:
        lines = list(self._found)
        if self._tally:
            parts = self._tally.study, self._tally.describe_counts(), self._tally.describe_time_left()
            lines += [", ".join(filter(None, parts)), self._tally.describe_best()]
        return [line for line in [*lines, self._best, *self._running.values(), self._note] if line]
