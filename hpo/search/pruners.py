"""Pruners by name. The steps that they see are epochs, counted from 1."""

from __future__ import annotations

import math

from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner

from hpo.errors import UnknownNameError, UsageError

PRUNERS = ("sha", "median", "hyperband", "none")


def build_pruner(name: str, max_epochs: int, *, first_rung: int | None = None) -> BasePruner:
    """The pruner of that name for trials of up to `max_epochs` epochs.

    sha        asynchronous successive halving (Li et al., 2020, arXiv:1810.05934): after `first_rung` epochs, and
               after 3, 9, ... times as many, a trial goes on if it is among the best third of those that came that far
    median     from the sixth complete trial on, after the first tenth of the epochs: a trial goes on while its best
               epoch is not worse than the median of the others at this epoch
    hyperband  successive halving in brackets with a first cut after 1, 3, 9, ... epochs (Li et al., 2018)
    none       every trial runs to its end

    `first_rung` is a fifth of the epochs unless given. Where the first epochs tell the good from the bad, as with some
    recurrent networks, 1 is better. Raises UsageError where it is below 1 or above `max_epochs`, or not for `sha`.
    """
    check_first_rung(name, max_epochs, first_rung)
    if name == "sha":
        return SuccessiveHalvingPruner(
            min_resource=first_rung or max(1, max_epochs // 5), reduction_factor=3, bootstrap_count=0
        )
    if name == "median":
        # The step is compared with the warm-up before anything else, and step n is here the end of epoch n.
        return MedianPruner(n_startup_trials=5, n_warmup_steps=math.ceil(max_epochs / 10) + 1)
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max_epochs, reduction_factor=3)
    if name == "none":
        return NopPruner()
    raise UnknownNameError("pruner", name, PRUNERS)


def check_first_rung(name: str, max_epochs: int, first_rung: int | None) -> None:
    """Raise UsageError where the first rung does not fit the pruner and the epochs; None always does."""
    if first_rung is None:
        return
    if name != "sha":
        raise UsageError(f"--first-rung {first_rung} is for --pruner sha, not {name}; leave it out.")
    if not 1 <= first_rung <= max_epochs:
        raise UsageError(f"--first-rung {first_rung} is not allowed: it must be from 1 to the {max_epochs} epochs.")
