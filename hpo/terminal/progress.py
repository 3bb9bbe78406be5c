"""Live progress of a search: a calm status in a terminal, plain lines when piped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hpo.execution.observer import Observer, Standing
from hpo.records import ELIGIBLE, count_finished
from hpo.terminal.tables import STYLES
from hpo.terminal.words import ESTIMATED, format_configuration, format_duration

if TYPE_CHECKING:
    from hpo.records import EndState
    from hpo.search.study import Suggestion
    from hpo.training.trainer import EpochResult

REFRESHES_PER_SECOND = 4
MAX_TRIALS_SHOWN = 8


@contextmanager
def search_progress(console: Console) -> Iterator[Observer]:
    """The display that fits where the output goes; it leaves the terminal clean however the search ends."""
    if not console.is_terminal:
        yield ProgressLines(console)
        return
    status = ProgressStatus(console)
    try:
        yield status
    finally:
        status.search_ended()


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int], None]]:
    """A line that counts what is done, in a terminal; nothing where the output is piped."""
    if not console.is_terminal:
        yield lambda count: None
        return
    with console.status(what) as status:
        yield lambda count: status.update(f"{count} {what}")


class Tally:
    """What both displays count: trials by state, the best so far, the time that is left."""

    def __init__(self, start: Standing) -> None:
        self.study = start.study
        self.metric = start.metric
        self.num_trials = start.num_trials
        self.counts = Counter(start.counts)
        self.best = start.best
        self.num_repeats = start.num_repeats
        self.num_repeated = start.num_repeated
        self.budget_s = start.budget_s
        self.trained_s = start.trained_s
        self._trained_before_s = start.trained_s
        self._direction = start.direction
        self._started = time.monotonic()
        self._ended_before = self._num_ended

    def catch_up(self, standing: Standing) -> None:
        """Take over where the study stands: other machines have moved it, or pruned trials are continued."""
        self.counts = Counter(standing.counts)
        self.best = standing.best
        self.num_trials = standing.num_trials
        self.num_repeated = standing.num_repeated
        self.budget_s = standing.budget_s
        self.trained_s = standing.trained_s

    def add(self, suggestion: Suggestion, state: EndState, result: EpochResult | None) -> bool:
        """Count a trial that ended; True when it is the best so far. A repeat is counted apart."""
        if suggestion.repeats is not None:
            self.num_repeated += state != "interrupted"
            return False
        self.counts[state] += 1
        value = result.best_value if result else None
        if state not in ELIGIBLE or value is None:
            return False
        if self.best is not None and self._direction.gain(value, over=self.best[1]) <= 0:
            return False
        self.best = suggestion.number, value
        return True

    @property
    def num_finished(self) -> int:
        return count_finished(self.counts)

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the trials of this session, on all machines; None before the first one has ended."""
        num_ended = self._num_ended - self._ended_before
        if num_ended <= 0:
            return None
        elapsed_s = time.monotonic() - self._started
        by_trials = elapsed_s / num_ended * max(0, self.num_trials + self.num_repeats - self._num_ended)
        trained_s = self.trained_s - self._trained_before_s
        if self.budget_s is None or trained_s <= 0:
            return by_trials
        return min(by_trials, elapsed_s / trained_s * max(0.0, self.budget_s - self.trained_s))

    @property
    def _num_ended(self) -> int:
        return self.num_finished + self.num_repeated

    def describe_counts(self) -> str:
        parts = [f"{self.num_finished}/{self.num_trials} trials"]
        parts += [
            f"{self.counts[state]} {state}"
            for state in ("pruned", "diverged", "infeasible", "failed")
            if self.counts[state]
        ]
        if self.budget_s is not None:
            parts.append(f"{format_duration(self.trained_s)} of {format_duration(self.budget_s)} training")
        parts += [f"{self.num_repeated} of at most {self.num_repeats} repeats"] if self.num_repeated else []
        return ", ".join(parts)

    def describe_best(self) -> str:
        if self.best is None:
            return "no result yet"
        return f"best {self.metric} {self.best[1]:.4f} (trial {self.best[0]})"

    def describe_time_left(self) -> str:
        return "" if self.seconds_left is None else f"about {format_duration(self.seconds_left)} left"


class ProgressLines(Observer):
    """A line for each trial that ends: for pipes, files and CI logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally: Tally | None = None

    def note(self, text: str) -> None:
        self._print(text)

    def found(self, line: str) -> None:
        self._print(line)

    def search_started(self, start: Standing) -> None:
        self._tally = Tally(start)
        if self._tally.num_finished:
            so_far = f"{self._tally.describe_counts()}, {self._tally.describe_best()}"
            self._print(f"resuming study '{start.study}': {so_far}")
        if start.num_repeats and not start.num_repeated:
            self._print(_describe_repeats(start))

    def study_moved(self, standing: Standing) -> None:
        assert self._tally is not None, "a search starts before others are seen"
        self._tally.catch_up(standing)

    def trial_started(self, suggestion: Suggestion) -> None:
        if suggestion.pruned:
            self._print(_describe_continuation(suggestion))

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        assert self._tally is not None, "a search starts before its trials end"
        self._tally.add(suggestion, state, result)
        score = _score(self._tally.metric, state, result, reason)
        repeats = "" if suggestion.repeats is None else f"repeats trial {suggestion.repeats}: "
        self._print(
            f"trial {suggestion.number:<4} {state:<11} {repeats + score:<28}"
            f" {self._tally.describe_best()}, {self._tally.describe_counts()}, {self._tally.describe_time_left()}"
        )

    def _print(self, line: str) -> None:
        self._console.print(line.rstrip(", "), soft_wrap=True)


class ProgressStatus(Observer):
    """Status lines at the foot of a terminal; above them a line for each new best trial and each failure."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tally: Tally | None = None
        self._note = ""
        self._running: dict[int, str] = {}
        self._live = Live(
            get_renderable=self._render, console=console, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )
        self._live.start()

    def note(self, text: str) -> None:
        self._note = text

    def found(self, line: str) -> None:
        style = next((style for state, style in STYLES.items() if line.startswith(f"{state}: ")), "dim")
        self._say(line, style)

    def search_started(self, start: Standing) -> None:
        self._tally = Tally(start)
        self._note = ""
        if start.num_repeats and not start.num_repeated:
            self._say(_describe_repeats(start), "dim")

    def trial_started(self, suggestion: Suggestion) -> None:
        if suggestion.pruned:
            self._say(_describe_continuation(suggestion), "dim")
        self._running[suggestion.number] = f"trial {suggestion.number}: {suggestion.stage}"

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        self._running[suggestion.number] = (
            f"trial {suggestion.number}: {suggestion.stage}, epoch {result.epoch}, {result.value:.4f}"
        )

    def study_moved(self, standing: Standing) -> None:
        assert self._tally is not None, "a search starts before others are seen"
        self._tally.catch_up(standing)

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        assert self._tally is not None, "a search starts before its trials end"
        self._running.pop(suggestion.number, None)
        if self._tally.add(suggestion, state, result):
            score = _score(self._tally.metric, state, result, reason)
            self._say(f"trial {suggestion.number}: {score}, the best so far", "green")
            self._say(f"  {format_configuration(suggestion.active_values)}", "dim")
        if state == "failed":
            self._say(f"trial {suggestion.number} failed: {reason}", "red")
        if state == "interrupted":
            self._say(f"trial {suggestion.number} interrupted: {reason}", "yellow")

    def search_ended(self) -> None:
        self._live.stop()

    def _say(self, line: str, style: str) -> None:
        self._live.console.print(line, style=style)

    def _render(self) -> RenderableType:
        lines = []
        if self._tally is not None:
            head = Table.grid(padding=(0, 2))
            bar = ProgressBar(total=self._tally.num_trials, completed=self._tally.num_finished, width=30)
            head.add_row(self._tally.study, bar, self._tally.describe_counts(), self._tally.describe_time_left())
            lines = [self._tally.describe_best(), *list(self._running.values())[:MAX_TRIALS_SHOWN]]
            if len(self._running) > MAX_TRIALS_SHOWN:
                lines.append(f"and {len(self._running) - MAX_TRIALS_SHOWN} more")
        lines += [self._note] if self._note else []
        status = [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in lines]
        return Group(head, *status) if self._tally is not None else Group(*status)


def _describe_continuation(suggestion: Suggestion) -> str:
    return f"continuing trial {suggestion.number}, {suggestion.pruned}, to its end"


def _describe_repeats(start: Standing) -> str:
    return f"when all trials have run, at most {start.num_repeats} trainings with new seeds confirm the best of them"


def _score(metric: str, state: EndState, result: EpochResult | None, reason: str | None) -> str:
    """What a trial has reached; why it ended where that has no meaning."""
    if state in ("failed", "interrupted") or result is None or result.best_value is None:
        return reason or ""
    if state == "pruned" and result.fold:
        return f"{metric} {ESTIMATED}{result.best_value:.4f} estimated from {result.fold} folds"
    return f"{metric} {result.best_value:.4f} at epoch {result.best_epoch}"
