"""TrialRecord: what a study remembers of one trial, as plain data for tables, plots and decisions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hpo.config import Direction

EndState = Literal["complete", "pruned", "diverged", "failed", "interrupted"]
TrialState = Literal["complete", "pruned", "diverged", "failed", "interrupted", "running", "queued"]

CROWNABLE: tuple[TrialState, ...] = ("complete", "pruned")
"""How a trial may end to be the winner: the best epoch of one that was stopped later is as good a model as any."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study; trial 0 is the default configuration."""

    number: int
    """Position in the study, from 0."""

    state: TrialState
    """How the trial ended, or `running`, or `queued` where a configuration was given and has yet to be tried."""

    value: float | None
    """The monitored metric at the best epoch; None where no epoch was finished."""

    values: dict[str, Any]
    """Every parameter, the inactive ones too."""

    inactive: tuple[str, ...]
    """Names of parameters whose `when` does not hold in this trial."""

    curve: dict[int, float]
    """The monitored metric by epoch; NaN where it was not finite."""

    best_epoch: int | None
    """Epoch that `value` was reached in."""

    stage: str
    """Group of parameters, or step of the strategy, that this trial searched."""

    reason: str | None
    """Why the trial was pruned, failed or interrupted, in words for the user."""

    attempts: int = 1
    """How often the trial was started."""

    duration_s: float | None = None
    """Seconds of the last attempt; None while it runs."""


def ranked(records: Iterable[TrialRecord], direction: Direction) -> list[TrialRecord]:
    """The trials that can be the winner, the best first, the earlier of equals first."""
    candidates = [record for record in records if record.state in CROWNABLE and record.value is not None]
    sign = -1 if direction == "maximize" else 1
    return sorted(candidates, key=lambda record: (sign * (record.value or 0.0), record.number))
