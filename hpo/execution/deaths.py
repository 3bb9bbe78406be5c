"""Decides whether a trial is to blame for the deaths of its workers, or something that kills one after another.

A crash or memory that ran out would come again, so its trial gets a few new attempts and then fails. SIGKILL without a
known cause may as well come from outside: a scheduler that wants the machine back, or somebody at a terminal. Then
other trials are killed too, those that were killed make progress in a later attempt, and the kills come at any moment,
while a trial that is to blame dies at the same point of its training each time.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpo.execution.pool import WorkerDied

MAX_RETRIES = 3
"""New attempts after a worker died and its trial had made no progress since the last death."""

MAX_IRREGULAR_RETRIES = 100
"""The same if the workers of other trials are killed too, and those of this one at irregular moments."""

NUM_REMEMBERED = 30
"""The latest kills that count as evidence of an external cause."""


@dataclass
class _Kill:
    """A worker that was killed for no known reason."""

    trial: int
    epoch: int
    """The last one that the trial had finished."""
    is_survived: bool = False
    """Whether the trial has made progress since."""
    is_its_fault: bool = False
    """Whether the trial has failed since."""


@dataclass
class _Row:
    """Deaths of a trial's workers in a row, without progress between them."""

    epoch: int = 0
    ages_s: list[float] = field(default_factory=list)
    """How long each had trained: since the attempt began, or since its last epoch."""

    @property
    def is_irregular(self) -> bool:
        """Whether they came at different moments of the training.

        Of four deaths at random moments, the earliest is rarely later than half of their median.
        """
        return len(self.ages_s) > MAX_RETRIES and min(self.ages_s) < statistics.median(self.ages_s) / 2


class Deaths:
    """The workers that died in a search, by the trials that they trained."""

    def __init__(self) -> None:
        self._rows: dict[int, _Row] = {}
        self._kills: deque[_Kill] = deque(maxlen=NUM_REMEMBERED)

    def on_epoch_done(self, trial: int, epoch: int) -> None:
        """A trial has made progress: it was not the cause of earlier kills."""
        for kill in self._kills:
            kill.is_survived |= kill.trial == trial and kill.epoch < epoch

    def on_worker_death(self, trial: int, epoch: int, death: WorkerDied, age_s: float) -> str | None:
        """Count the death of a trial's worker after `epoch` finished epochs; why the trial fails, or None to retry it.

        `age_s` are the seconds since the attempt began, or since its last epoch.

        Each piece of evidence that something else kills workers gives a trial `MAX_RETRIES` more: another trial whose
        worker was killed lately, and a kill whose trial has made progress since.
        """
        row = self._rows.setdefault(trial, _Row())
        if epoch > row.epoch:
            row = self._rows[trial] = _Row(epoch)
        row.ages_s.append(age_s)
        if death.is_unexplained:
            self._kills.append(_Kill(trial, epoch))
        if len(row.ages_s) <= self._num_retries(trial, row, death):
            return None
        for kill in self._kills:
            kill.is_its_fault |= kill.trial == trial
        return f"{len(row.ages_s)} workers died in epoch {row.epoch + 1}"

    def _num_retries(self, trial: int, row: _Row, death: WorkerDied) -> int:
        evidence = self._external_evidence(trial) if death.is_unexplained else 0
        if evidence and row.is_irregular:
            return MAX_IRREGULAR_RETRIES
        return MAX_RETRIES * (1 + evidence)

    def _external_evidence(self, trial: int) -> int:
        survived = [kill for kill in self._kills if kill.is_survived]
        others = {kill.trial for kill in self._kills if not (kill.is_survived or kill.is_its_fault)} - {trial}
        return len(survived) + len(others)
