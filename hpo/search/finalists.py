"""Two rules about pruning: who is never pruned, and who runs to its end after all before a winner is named.

They hold for every pruner, and a search that is simulated (`benchmarks/search_quality.py`) follows them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING

from hpo.records import TrialRecord, TrialState, ranked
from hpo.search.priority import DEFAULT_CONFIGURATION, TRIED_BY_HAND

if TYPE_CHECKING:
    from hpo.search.settings import StudySettings

MAX_FINALISTS = 3
"""Pruned trials that are continued at the end of a search at most, unless the best of all is still a pruned one."""

_RIVALS: tuple[TrialState, ...] = ("complete", "pruned", "running", "interrupted")


def is_spared(trial: TrialRecord, trials: Sequence[TrialRecord], settings: StudySettings) -> bool:
    """Whether a running trial continues, whatever the pruner says.

    The default configuration and those of `--try` continue until another trial was better by the same epoch. Any other
    continues while no trial has been better in any epoch. With folds, means over the same folds are compared.
    """
    step = max(trial.curve, default=0)
    own = _loss_by(step, trial, settings)
    if own is None:
        return False
    is_requested = trial.stage in (DEFAULT_CONFIGURATION, TRIED_BY_HAND)
    horizon = step if is_requested or settings.folds else settings.num_steps
    rivals = [other for other in trials if other.number != trial.number and other.state in _RIVALS]
    losses = (_loss_by(horizon, rival, settings) for rival in rivals)
    return all(own <= loss for loss in losses if loss is not None)


def finalists(trials: Sequence[TrialRecord], settings: StudySettings, *, num_continued: int = 0) -> list[TrialRecord]:
    """The pruned trials that may yet win, the best first: they are continued when a search has its trials.

    Those are the best trial, if it was pruned, and the trials that would beat the best complete one if they gained from
    the epoch they were pruned in as much as any complete trial has gained from there; MAX_FINALISTS at most, less the
    `num_continued` that were continued before. With folds the gain is that of the best complete trial.
    """
    order = ranked(trials, settings.direction)
    complete = [trial for trial in order if trial.state == "complete"]
    pruned = [trial for trial in order if trial.state == "pruned"]
    if not complete:
        return pruned[: max(1, MAX_FINALISTS - num_continued)]
    gain_from = cache(lambda step: _gain_from(step, complete[:1] if settings.folds else complete, settings))
    hopeful = (trial for trial in pruned if trial is order[0] or _may_win(trial, complete[0], gain_from, settings))
    chosen = list(islice(hopeful, max(0, MAX_FINALISTS - num_continued)))
    return chosen or [trial for trial in order[:1] if trial.state == "pruned"]


def _may_win(trial: TrialRecord, best: TrialRecord, gain_from: Callable[[int], float], settings: StudySettings) -> bool:
    """Whether a pruned trial would beat the best complete one with what others gained from the epoch it came to."""
    step = max(trial.curve, default=0)
    own, end = _loss_by(step, trial, settings), _loss_by(settings.num_steps, best, settings)
    return own is not None and end is not None and own - gain_from(step) < end


def _gain_from(step: int, complete: Sequence[TrialRecord], settings: StudySettings) -> float:
    """How much lower than after this epoch, or fold, the loss of a complete trial became at most."""
    losses = [tuple(_loss_by(until, trial, settings) for until in (step, settings.num_steps)) for trial in complete]
    return max((start - end for start, end in losses if start is not None and end is not None), default=-math.inf)


def _loss_by(step: int, trial: TrialRecord, settings: StudySettings) -> float | None:
    """The best value up to an epoch, or the mean up to a fold, with the sign that makes lower better."""
    losses = [
        settings.direction.loss(value) for at, value in trial.curve.items() if at <= step and math.isfinite(value)
    ]
    if not losses:
        return None
    return fmean(losses) if settings.folds else min(losses)
