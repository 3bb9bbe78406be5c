"""Limits on training time that a study keeps: one for all trials together, and one for each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from hpo.search.study import Study

_SUM_EVERY_S = 1.0
"""Seconds between two sums over all trials of a study."""


class Limits:
    """The limits of a study as a coordinator applies them to the trials that it runs."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self.read_again()

    def read_again(self) -> None:
        """Look at the study again: a trial has begun or ended, and another session may have changed the limits."""
        with self._study.seen_once():
            self._budget_s, self._trial_timeout_s = self._study.budget_s, self._study.trial_timeout_s
        self._sum_expires = 0.0

    @property
    def has_budget(self) -> bool:
        """Whether there is a limit on the training time of all trials together."""
        return self._budget_s is not None

    def is_trial_over(self, trained_s: float) -> bool:
        """Whether a trial has trained for as long as it may."""
        return self._trial_timeout_s is not None and trained_s >= self._trial_timeout_s

    def is_budget_spent(self, running: Mapping[int, float]) -> bool:
        """Whether all trials together have trained for as long as they may.

        `running` are the caller's own trials, with the seconds that each has trained; of other running trials the
        study knows all but the last few seconds.
        """
        if self._budget_s is None:
            return False
        if time.monotonic() >= self._sum_expires:
            self._others_s = self._study.trained_s(besides=running)
            self._sum_expires = time.monotonic() + _SUM_EVERY_S
        return self._others_s + sum(running.values()) >= self._budget_s
