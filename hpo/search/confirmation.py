"""Confirmation: the best configurations are trained again with new seeds, and the best mean wins.

The best value of a search is partly luck: whoever takes the maximum of many noisy values takes the noise too. The
trainings that found a configuration therefore do not count here; only the new ones do. A configuration that falls
behind is dropped before it has all its seeds, as in a race (Maron and Moore, 1994; Birattari et al., 2002).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, stdev
from typing import Any

from hpo.config import Direction
from hpo.errors import UsageError
from hpo.records import Comparison, TrialRecord, TrialState, ranked

REPEATS = "repeats"
"""User attribute of an Optuna trial: the number of the trial whose configuration it trains again."""

_CONFIDENCE = 0.975
"""Quantile of Student's t that a configuration must be behind by before it is dropped: two-sided 5%."""

_ENDED: tuple[TrialState, ...] = ("complete", "diverged", "failed")


@dataclass(frozen=True)
class Plan:
    """How much is trained again when the search is over."""

    configurations: int
    """Best configurations of the search that are trained again."""
    seeds: int
    """New seeds for each of them."""

    @property
    def num_trainings(self) -> int:
        """At most; fewer if a configuration drops out."""
        return self.configurations * self.seeds


PLANS = {"none": Plan(0, 0), "quick": Plan(3, 3), "full": Plan(5, 5)}


def find_plan(written: str) -> Plan:
    """The plan of that name, or of that size: `4x10` is 4 configurations with 10 seeds each. Raises UsageError."""
    if written in PLANS:
        return PLANS[written]
    size = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,2})", written)
    if size is None:
        raise UsageError(
            f"the plan '{written}' of a confirmation is not allowed: use none, quick (3x3), full (5x5), or "
            "configurations x seeds, such as 4x10."
        )
    return Plan(int(size[1]), int(size[2]))


@dataclass(frozen=True)
class Contender:
    """One of the best configurations, and its new trainings."""

    trial: TrialRecord
    """The trial of the search that found it."""
    repeats: tuple[TrialRecord, ...]
    """Trainings with new seeds, by number, the running ones too."""

    @cached_property
    def values(self) -> list[float]:
        """The metric of each new training that is complete."""
        return [repeat.value for repeat in self.repeats if repeat.state == "complete" and repeat.value is not None]

    @property
    def mean(self) -> float | None:
        return fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Standard deviation over the seeds; None with fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def has_diverged(self) -> bool:
        """Whether a new training diverged: the configuration is not reliable, whatever its mean."""
        return any(repeat.state == "diverged" for repeat in self.repeats)

    @property
    def num_ended(self) -> int:
        return sum(repeat.state in _ENDED for repeat in self.repeats)


@dataclass(frozen=True)
class Race:
    """How the confirmation of a study stands."""

    plan: Plan
    direction: Direction
    contenders: tuple[Contender, ...]
    """In the order of the search, the best first."""

    @classmethod
    def of(
        cls, plan: Plan, trials: Sequence[TrialRecord], repeats: Sequence[TrialRecord], direction: Direction
    ) -> Race:
        """The race between the best configurations among `trials`; each counts once."""
        found: dict[str, Contender] = {}
        for trial in ranked(trials, direction):
            if len(found) == plan.configurations:
                break
            own = tuple(repeat for repeat in repeats if repeat.repeats == trial.number)
            found.setdefault(_configuration(trial), Contender(trial, own))
        return cls(plan, direction, tuple(found.values()))

    @cached_property
    def leader(self) -> Contender | None:
        """The contender with the best mean so far, one that has never diverged if there is any."""
        judged = [contender for contender in self.contenders if contender.values]
        return min(judged, key=lambda each: (each.has_diverged, self._loss(each)), default=None)

    def _loss(self, contender: Contender) -> float:
        assert contender.mean is not None, "the contender has a mean"
        return self.direction.loss(contender.mean)

    def is_behind(self, contender: Contender) -> bool:
        """Whether more seeds would not make this one the winner.

        That is taken to be so if it diverged and the leader did not, or if Student's t with the variance pooled over
        all contenders tells the means apart; the latter needs two seeds of both. It saves trainings and proves nothing:
        the race looks again after each of them.
        """
        if self.leader is None or contender is self.leader:
            return False
        if contender.has_diverged and not self.leader.has_diverged:
            return True
        if min(len(contender.values), len(self.leader.values)) < 2:
            return False
        return self._loss(contender) - self._loss(self.leader) > self._least_difference(
            len(contender.values), len(self.leader.values)
        )

    def _least_difference(self, num_one: int, num_other: int) -> float:
        """How far apart the means of that many trainings must be to differ significantly."""
        from scipy.stats import t  # a second, which a search without confirmation can do without

        groups = [each.values for each in self.contenders if len(each.values) > 1]
        freedom = sum(len(values) - 1 for values in groups)
        variance = sum((len(values) - 1) * stdev(values) ** 2 for values in groups) / freedom
        error = math.sqrt(variance * (1 / num_one + 1 / num_other))
        return float(t.ppf(_CONFIDENCE, freedom)) * error

    def compared(self, default: TrialRecord) -> Comparison | None:
        """What the winner's mean gains over the default configuration's, with the interval of Student's t.

        The default was not chosen for its value, so its own training counts where it has no new ones. None for a
        default that was not trained to its end or is the winner itself, and where no two seeds tell the variance.
        """
        winner, same = self.winner, _configuration(default)
        if winner is None or winner.mean is None or default.state != "complete" or _configuration(winner.trial) == same:
            return None
        if not any(len(each.values) > 1 for each in self.contenders):
            return None
        repeated = next((each for each in self.contenders if _configuration(each.trial) == same), None)
        if repeated and repeated.has_diverged and not repeated.values:
            return _without_gain(default, len(winner.values))
        values = repeated.values if repeated and repeated.values else [default.known_value]
        mean, num_seeds = fmean(values), (len(winner.values), len(values))
        gain, margin = self.direction.gain(winner.mean, over=mean), self._least_difference(*num_seeds)
        return Comparison(
            trial=default.number,
            state=default.state,
            value=mean,
            pruned=None,
            gain=gain,
            low=gain - margin,
            high=gain + margin,
            num_examples=0,
            num_seeds=num_seeds,
        )

    @property
    def running(self) -> tuple[Contender, ...]:
        """The contenders that may still win."""
        return tuple(contender for contender in self.contenders if not self.is_behind(contender))

    @property
    def next(self) -> Contender | None:
        """Whose configuration to train again next: the one with the fewest trainings, the running ones counted."""
        missing = [contender for contender in self.running if len(contender.repeats) < self.plan.seeds]
        return min(missing, key=lambda each: len(each.repeats), default=None)

    @property
    def is_done(self) -> bool:
        return all(contender.num_ended >= self.plan.seeds for contender in self.running)

    @property
    def winner(self) -> Contender | None:
        """The contender that is confirmed as the best; None before the race is over, and without a result."""
        return self.leader if self.is_done else None

    def to_dict(self) -> dict[str, Any]:
        """The race as JSON can hold it."""
        return {
            "seeds": self.plan.seeds,
            "is_done": self.is_done,
            "configurations": [
                {
                    "trial": contender.trial.number,
                    "searched": contender.trial.value,
                    "mean": contender.mean,
                    "std": contender.std,
                    "values": contender.values,
                    "repeats": [repeat.number for repeat in contender.repeats],
                    "num_diverged": sum(repeat.state == "diverged" for repeat in contender.repeats),
                    "is_behind": self.is_behind(contender),
                }
                for contender in self.contenders
            ],
        }


def _without_gain(default: TrialRecord, num_seeds: int) -> Comparison:
    """Of a default that no new seed could train."""
    return Comparison(
        trial=default.number, state="diverged", value=None, pruned=None, gain=None, low=None, high=None,
        num_examples=0, num_seeds=(num_seeds, 0),
    )  # fmt: skip


def _configuration(trial: TrialRecord) -> str:
    return repr(trial.configuration)


def best_repeat(contender: Contender, direction: Direction) -> TrialRecord:
    """The training of a configuration whose model is used: the best of the new ones, by the validation split."""
    return ranked(contender.repeats, direction)[0]
