"""Whose fault it is that workers die: the trial's that they train, or that of something which kills one after another.

A crash or memory that ran out would come again, so its trial gets a few new attempts and then fails. SIGKILL without a
known cause may as well come from outside: a scheduler that wants the machine back, or somebody at a terminal. Then
other trials are killed too, and those that were killed come further in a later attempt.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.execution.pool import WorkerDied

MAX_RETRIES = 3
"""New attempts after a worker died and its trial had come no further than the time before."""

MAX_WITNESSES = 10
"""The latest kills that may speak for a trial; so that one that is to blame is known after 3 * 11 of its own."""


@dataclass
class _Kill:
    """A worker that was killed for no known reason."""

    trial: int
    epoch: int
    """The last one that the trial had finished."""
    is_survived: bool = False
    """Whether the trial has come further since."""
    is_its_fault: bool = False
    """Whether the trial has failed since."""


@dataclass
class _Row:
    """How often in a row the workers of a trial died without getting further than the one before."""

    epoch: int = 0
    num_deaths: int = 0


class Deaths:
    """The workers that died in a search, by the trials that they trained."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._kills: deque[_Kill] = deque(maxlen=MAX_WITNESSES)

    def came_to(self, trial: int, epoch: int) -> None:
        """A trial has finished an epoch: it was not the cause of earlier kills."""
        for kill in self._kills:
            kill.is_survived |= kill.trial == trial and kill.epoch < epoch

    def verdict(self, trial: int, epoch: int, death: WorkerDied) -> str | None:
        """Count the death of a trial's worker after `epoch` finished epochs; why the trial fails, or None to retry it.

        Each witness that something else kills workers gives a trial `MAX_RETRIES` more: another trial whose worker was
        killed lately, and a kill whose trial has come further since.
        """
        row = self._rows.setdefault(trial, _Row())
        row.num_deaths = 1 if epoch > row.epoch else row.num_deaths + 1
        row.epoch = max(epoch, row.epoch)
        if death.is_unexplained:
            self._kills.append(_Kill(trial, epoch))
        num_witnesses = self._num_witnesses(trial) if death.is_unexplained else 0
        if row.num_deaths <= MAX_RETRIES * (1 + num_witnesses):
            return None
        for kill in self._kills:
            kill.is_its_fault |= kill.trial == trial
        return f"{row.num_deaths} workers died in epoch {row.epoch + 1}"

    def _num_witnesses(self, trial: int) -> int:
        survived = [kill for kill in self._kills if kill.is_survived]
        others = {kill.trial for kill in self._kills if not (kill.is_survived or kill.is_its_fault)} - {trial}
        return len(survived) + len(others)
