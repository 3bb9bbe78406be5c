"""The pruners."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from helpers.studies import SETTINGS, SPACE, run_trials
from optuna.storages import InMemoryStorage

from hpo.errors import UnknownNameError
from hpo.records import EndState
from hpo.search.pruners import PRUNERS, build_pruner
from hpo.search.study import Study

# --- pruners ----------------------------------------------------------------------------------------------------------


def run_curves(pruner: str, curves: list[list[float]]) -> list[tuple[str, int]]:
    """Run trials with the given learning curves one after the other: how each ended, and in which epoch."""
    study = Study.open(
        InMemoryStorage(), "s", replace(SETTINGS, strategy="random", pruner=pruner, max_epochs=len(curves[0]))
    )
    ends = []
    for curve in curves:
        suggestion = study.ask()
        state: EndState = "complete"
        for epoch, value in enumerate(curve, start=1):
            if study.report(suggestion.number, epoch, value):
                state = "pruned"
                break
        study.tell(suggestion.number, state, value=max(curve[:epoch]))
        ends.append((study.trials()[-1].state, epoch))
    return ends  # type: ignore[return-value]


def test_sha_cuts_a_weak_trial_after_a_fifth_of_the_epochs_and_lets_the_best_run() -> None:
    strong, weak, best = [0.8] * 20, [0.1] * 20, [0.9] * 20

    assert run_curves("sha", [strong, weak, best]) == [("complete", 20), ("pruned", 4), ("complete", 20)]


def test_sha_keeps_a_trial_that_falls_behind_until_the_next_rung() -> None:
    rising, fading = [0.8] * 4 + [0.95] * 16, [0.9] * 4 + [0.0] * 16

    assert run_curves("sha", [rising, rising, fading])[-1] == ("pruned", 12)


def test_median_waits_for_five_complete_trials_and_for_a_tenth_of_the_epochs() -> None:
    strong, weak = [0.8] * 20, [0.1] * 20

    ends = run_curves("median", [strong] * 3 + [weak] + [strong] + [weak, strong])

    assert ends == [("complete", 20)] * 5 + [("pruned", 3), ("complete", 20)]


def test_hyperband_cuts_weak_trials() -> None:
    ends = run_curves("hyperband", [[0.9] * 27] * 20 + [[0.1] * 27] * 20)

    assert {epoch for state, epoch in ends[20:] if state == "pruned"} == {1, 3, 9}


def test_the_pruner_none_lets_everything_run() -> None:
    assert run_curves("none", [[0.9] * 5, [0.0] * 5, [0.5, *[math.nan] * 4]]) == [("complete", 5)] * 3


@pytest.mark.parametrize("pruner", PRUNERS)
def test_a_metric_that_is_not_finite_is_stored_and_left_to_the_trainer_to_judge(pruner: str) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, strategy="random", pruner=pruner, max_epochs=10))
    run_trials(study, 6)
    suggestion = study.ask()

    assert not any(study.report(suggestion.number, epoch, math.nan) for epoch in range(1, 11))

    record = study.trials()[-1]
    assert all(math.isnan(value) for value in record.curve.values())
    assert (len(record.curve), record.value, record.best_epoch) == (10, None, None)


@pytest.mark.parametrize("pruner", PRUNERS)
def test_no_trial_is_pruned_in_its_last_epoch(pruner: str) -> None:
    falling = [[0.9 - trial / 10] * 3 for trial in range(8)]

    assert all(epoch < 3 for state, epoch in run_curves(pruner, falling) if state == "pruned")
    assert run_curves(pruner, [[0.9 - trial / 10] for trial in range(8)]) == [("complete", 1)] * 8


def test_an_unknown_pruner_is_refused_with_the_near_miss() -> None:
    with pytest.raises(UnknownNameError, match=r"no pruner 'medain'; did you mean 'median'\?"):
        build_pruner("medain", 10, space=SPACE)
