"""TrialRecord: what a study remembers of one trial, as plain data for tables, plots and decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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
    """The monitored metric at the best epoch, the mean over the folds where there are any; None where no epoch, or
    fold, was finished."""

    values: dict[str, Any]
    """Every parameter, the inactive ones too."""

    inactive: tuple[str, ...]
    """Names of parameters whose `when` does not hold in this trial."""

    curve: dict[int, float]
    """The monitored metric by epoch, or by fold where there are any; NaN where it was not finite."""

    best_epoch: int | None
    """Epoch that `value` was reached in, the mean over the folds where there are any."""

    stage: str
    """Group of parameters, or step of the strategy, that this trial searched."""

    reason: str | None
    """Why the trial was pruned, failed or interrupted, in words for the user."""

    attempts: int = 1
    """How often the trial was started."""

    duration_s: float | None = None
    """Seconds of the last attempt; None while it runs."""

    pruned_after: int | None = None
    """Epochs, or folds, after which the trial was pruned before it was continued to its end; None if it never was."""

    costs: dict[str, float] = field(default_factory=dict)
    """What else is minimised, by name; empty with one objective, and while the trial is not complete."""

    symptoms: dict[str, float] = field(default_factory=dict)
    """What went wrong in its training by its last epoch; see `hpo.training.symptoms`."""


def describe_pruning(num_steps: int, of: int, *, folds: bool) -> str:
    """`pruned after 3 of 20 epochs`."""
    return f"pruned after {num_steps} of {of} {'folds' if folds else 'epochs'}"


def ranked(records: Iterable[TrialRecord], direction: Direction) -> list[TrialRecord]:
    """The trials that can be the winner, the best first, the earlier of equals first."""
    candidates = [record for record in records if record.state in CROWNABLE and record.value is not None]
    sign = -1 if direction == "maximize" else 1
    return sorted(candidates, key=lambda record: (sign * (record.value or 0.0), record.number))


def losses(record: TrialRecord, direction: Direction) -> tuple[float, ...]:
    """The objectives of a trial with a value, each better when smaller."""
    assert record.value is not None, "the trial has a value"
    return -record.value if direction == "maximize" else record.value, *record.costs.values()


def pareto_front(points: Mapping[int, tuple[float, ...]]) -> list[int]:
    """The trials that no other one beats in an objective without losing in another; of equals the first.

    `points` are the losses of each trial by number. With one objective the front is the best trial. Sorted by the first
    objective, the best first.
    """
    front: list[int] = []
    # A trial can only be dominated by one that comes before it in this order.
    for number in sorted(points, key=lambda number: (points[number], number)):
        if not any(_is_as_good(points[other], points[number]) for other in front):
            front.append(number)
    return front


def _is_as_good(point: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(one <= another for one, another in zip(point, other, strict=True))


def to_plain(value: Any) -> Any:
    """The value as JSON can hold it: keys as strings, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
