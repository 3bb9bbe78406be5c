"""What a study says of itself: true where there is something to say, and silent where there is not."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from rich.console import Console

from hpo.config import Direction
from hpo.parameters import Choice, Float, Int, Value
from hpo.records import EndState
from hpo.search.encoding import Encoding
from hpo.search.findings import (
    find_divergence,
    find_edges,
    find_exhaustion,
    find_savings,
    find_symptoms,
    find_training_length,
    findings,
)
from hpo.search.importances import Design, Importance, Importances, describe_share, importances
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study, Suggestion
from hpo.session.conclude import write_summary
from hpo.space import Group, Space
from hpo.terminal.facts import study_facts
from hpo.terminal.tables import print_study
from hpo.tracking.runs import StudyRuns
from hpo.tracking.store import open_store

SPACE = Space(
    Group(
        "step size",
        lr=Float(1e-4, 0.1, log=True, default=1e-2),
        batch_size=Choice(64, 128, 256, default=128),
    ),
    Group(
        "architecture",
        depth=Int(1, 20, default=8),
        optimizer=Choice("sgd", "adam", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
    ),
    Group("regularization", dropout=Float(0.0, 0.5, default=0.1)),
)
SETTINGS = StudySettings(
    task="digits",
    space=SPACE,
    seed=0,
    strategy="random",
    pruner="none",
    max_epochs=20,
    metric="accuracy",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=30,
)

Ending = tuple[EndState, Sequence[float]]
"""How a trial ends, and its curve."""


def a_study(
    num_trials: int, ending: Callable[[Suggestion], Ending], storage: BaseStorage | None = None, **changes: Any
) -> Study:
    """A study whose trials were asked for, reported and told as a coordinator does."""
    study = Study.open(storage or InMemoryStorage(), "s", replace(SETTINGS, **changes))
    for _ in range(num_trials):
        suggestion = study.ask()
        state, curve = ending(suggestion)
        for epoch, value in enumerate(curve, start=1):
            study.report(suggestion.number, epoch, value)
        better = max if study.settings.direction == "maximize" else min
        best = better(curve, default=None)
        best_epoch = None if best is None else curve.index(best) + 1
        study.tell(suggestion.number, state, value=best, best_epoch=best_epoch)
    return study


def rising_with(score: Callable[[dict[str, Value]], float]) -> Callable[[Suggestion], Ending]:
    """Complete trials whose value is a score of their configuration."""
    return lambda suggestion: ("complete", [score(suggestion.values)])


def log_lr(values: dict[str, Value]) -> float:
    return math.log10(float(values["lr"]))


def texts(found: Any) -> list[str]:
    return [finding.text for finding in found]


# --- a space that is used up ------------------------------------------------------------------------------------------


def test_a_small_space_that_is_used_up_is_reported_and_not_before() -> None:
    depth, width = Int(1, 2, default=1), Choice(8, 16, default=8)
    space = Space(Group("g", depth=depth, width=width), forbid=[{"width": 16, "depth": 2}])
    studies = [a_study(num_trials, rising_with(lambda _: 0.5), space=space) for num_trials in range(3, 20)]
    for study in studies:
        num_tried = len({space.identity(record.values) for record in study.trials()})
        assert bool(list(find_exhaustion(study))) == (num_tried == 3)
    (finding,) = find_exhaustion(studies[-1])
    assert finding.text.startswith("All 3 configurations of this space have been tried: more trials repeat them with ")
    assert finding.data == {"configurations": 3, "trials": 19}


# --- the edge of a range ----------------------------------------------------------------------------------------------


def test_a_best_value_at_the_end_of_its_range_is_reported_on_the_scale_of_the_range() -> None:
    study = a_study(60, rising_with(log_lr))

    (finding,) = find_edges(study)

    best = study.best()
    assert best is not None
    advice = "widen it with -p lr=0.0001:1 --extend."
    assert finding.text == f"lr's best is at {best.values['lr']:.3g}, the upper end of 0.0001:0.1 (log): {advice}"
    assert finding.data == {"parameter": "lr", "value": best.values["lr"], "end": "upper", "bound": 0.1}


def test_the_lower_end_is_reported_too_and_where_smaller_is_better() -> None:
    study = a_study(60, rising_with(log_lr), direction=Direction.MINIMIZE, seed=1)

    assert [finding.data["end"] for finding in find_edges(study)] == ["lower"]


def test_the_ends_of_whole_numbers_are_reported() -> None:
    study = a_study(60, rising_with(lambda values: float(values["depth"])))

    assert [finding.data["parameter"] for finding in find_edges(study)] == ["depth"]


@pytest.mark.parametrize(
    ("parameter", "sign", "wider"),
    [
        (Int(64, 512, step=64, default=128), -1, None),  # a multiple of 64 that is lower is not above 0
        (Int(256, 512, step=64, default=512), -1, "128:512"),
        (Int(128, 1024, step=128, default=128), 1, "128:1408"),
        (Float(0.3, 0.9, step=0.1, default=0.5), -1, "0.1:0.9"),
        (Int(-8, 8, default=0), -1, "-16:8"),
        (Int(1000, 1235, default=1100), 1, "1000:1350"),
        (Int(8, 200_000, log=True, default=64), 1, "8:2000000"),
        (Float(1000.0, 1001.0, default=1000.5), 1, "1000:1002"),
        (Float(0.0, 0.999, default=0.0), 1, "0:0.9995"),
        (Float(0.9, 0.9999, default=0.9), 1, "0.9:0.99995"),
        (Float(0.0, 0.333333333, default=0.1), 1, "0:0.667"),
        (Float(0.000123456789, 0.1, log=True, default=0.01), 1, "0.000123456789:1"),
    ],
)
def test_what_is_advised_can_be_typed(parameter: Int | Float, sign: int, wider: str | None) -> None:
    space = Space(Group("g", size=parameter))
    found = list(find_edges(a_study(60, rising_with(lambda values: sign * float(values["size"])), space=space)))
    advised = [finding.text.partition("-p size=")[2].split()[0] for finding in found]
    assert advised == ([wider] if wider else [])
    for text in advised:
        assert parameter.extend(text).contains(parameter.low)


@pytest.mark.parametrize(
    ("score", "why"),
    [
        (lambda values: -abs(log_lr(values) + 2.5), "the best is in the middle"),
        (lambda values: -float(values["dropout"]), "no dropout is a natural end"),
        (lambda values: -float(values["depth"]), "one layer is a natural end"),
        (lambda values: float(values["momentum"]) if values["optimizer"] == "adam" else -1.0, "it is inactive"),
        (lambda values: float(values["batch_size"] == 64), "choices have no ends"),
    ],
)
def test_there_is_no_edge_where(score: Callable[[dict[str, Value]], float], why: str) -> None:
    assert texts(find_edges(a_study(60, rising_with(score)))) == [], why


def test_one_lucky_trial_at_the_end_of_a_range_is_no_edge() -> None:
    def score(values: dict[str, Value]) -> float:
        return 1.0 if float(values["lr"]) > 0.09 else -abs(log_lr(values) + 2.5)

    study = a_study(30, rising_with(score))

    best = study.best()
    assert best is not None
    assert best.values["lr"] > 0.09
    assert list(find_edges(study)) == []


def test_many_trials_at_the_end_of_a_range_that_are_no_better_there_are_no_edge() -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, space=Space(Group("g", lr=SPACE.parameters["lr"]))))
    draw = random.Random(8)
    # As a search proposes after one lucky trial at the end.
    rates = [0.1 - number / 1000 if number % 3 else 10 ** draw.uniform(-4, -1.5) for number in range(30)]
    study.enqueue([{"lr": rate} for rate in rates], "tried")
    for number in range(31):
        suggestion = study.ask()
        value = 0.95 if number == 2 else draw.gauss(0.9, 0.01)
        study.report(suggestion.number, 1, value)
        study.tell(suggestion.number, "complete", value=value, best_epoch=1)
    best = sorted(study.trials(), key=lambda trial: -trial.known_value)[:4]
    assert sum(trial.values["lr"] > 0.05 for trial in best) >= 3, "they would be an edge without the comparison"
    assert list(find_edges(study)) == []


def test_a_few_trials_have_no_edge() -> None:
    assert list(find_edges(a_study(9, rising_with(log_lr)))) == []


# --- divergence -------------------------------------------------------------------------------------------------------


def diverging_above(limit: float) -> Callable[[Suggestion], Ending]:
    return lambda suggestion: ("diverged", []) if suggestion.values["lr"] > limit else ("complete", [0.5])


def test_the_learning_rate_above_which_everything_diverged_is_reported_with_an_override_that_can_be_typed() -> None:
    study = a_study(40, diverging_above(0.02))

    (finding,) = find_divergence(study)

    rates = sorted(record.values["lr"] for record in study.trials())
    survived = max(rate for rate in rates if rate <= 0.02)
    above = [rate for rate in rates if rate > 0.02]
    assert finding.data == {"parameter": "lr", "above": survived, "lowest": above[0], "trials": len(above)}
    assert finding.text.startswith(f"All {len(above)} trials with lr above {survived:.3g}")
    override = finding.text.split("-p ")[1].split()[0]
    lowest, highest = SPACE.narrow([override]).parameters["lr"].extremes()
    assert lowest == 0.0001
    assert survived <= highest < above[0]


@pytest.mark.parametrize(
    ("ending", "why"),
    [
        (diverging_above(1.0), "nothing diverged"),
        (diverging_above(0.0), "everything did"),
        (diverging_above(0.095), "too few did"),
        (
            lambda suggestion: ("diverged", []) if suggestion.values["lr"] < 0.02 else ("complete", [0.5]),
            "the small rates did",
        ),
        (
            lambda suggestion: ("complete", [0.5]) if suggestion.number == 7 else ("diverged", []),
            "nearly all did, so the largest would have by accident",
        ),
        (
            lambda suggestion: ("failed", []) if suggestion.values["lr"] > 0.02 else ("complete", [0.5]),
            "a failure has another cause",
        ),
    ],
)
def test_no_limit_of_the_learning_rate_is_reported_where(ending: Callable[[Suggestion], Ending], why: str) -> None:
    assert texts(find_divergence(a_study(40, ending))) == [], why


@pytest.mark.parametrize(
    "space",
    [
        Space(Group("step size", rate=Float(1e-4, 0.1, log=True, default=1e-2))),
        Space(Group("step size", lr=Choice("low", "high", default="low"))),
        SPACE.narrow(["lr=0.01"]),
    ],
    ids=["none", "a choice", "fixed"],
)
def test_a_space_without_a_range_of_learning_rates_has_no_limit_of_it(space: Space) -> None:
    study = a_study(20, lambda suggestion: ("diverged" if suggestion.number % 2 else "complete", [0.5]), space=space)

    assert list(find_divergence(study)) == []


# --- the length of training -------------------------------------------------------------------------------------------


def best_in(epoch: int, state: EndState = "complete") -> Callable[[Suggestion], Ending]:
    return lambda suggestion: (state, [-abs(step - epoch) + suggestion.number / 100 for step in range(1, 21)])


@pytest.mark.parametrize(("epoch", "advice"), [(2, "fewer --epochs"), (16, "more --epochs"), (20, "more --epochs")])
def test_a_best_epoch_near_an_end_of_the_training_is_reported(epoch: int, advice: str) -> None:
    (finding,) = find_training_length(a_study(4, best_in(epoch)))

    assert finding.text.startswith(f"The best trials are at their best in epoch {epoch} of 20: {advice}")
    assert finding.data == {"epoch": epoch, "epochs": 20, "trials": 3}


@pytest.mark.parametrize("study", [a_study(4, best_in(3)), a_study(4, best_in(15)), a_study(2, best_in(20))])
def test_an_ordinary_best_epoch_or_that_of_few_trials_is_not_reported(study: Study) -> None:
    assert list(find_training_length(study)) == []


def test_pruned_trials_say_nothing_of_the_length_of_training() -> None:
    assert list(find_training_length(a_study(4, best_in(20, "pruned")))) == []


def test_complete_trials_that_are_weaker_than_pruned_ones_say_nothing_of_the_length_of_training() -> None:
    def ending(suggestion: Suggestion) -> Ending:
        is_pruned = suggestion.number < 5
        return ("pruned", [0.9]) if is_pruned else ("complete", [0.1, 0.5, *[0.4] * 18])

    assert list(find_training_length(a_study(12, ending))) == []


def test_trials_that_a_timeout_has_ended_say_nothing_of_the_length_of_training() -> None:
    study = a_study(0, best_in(2))
    for suggestion in [study.ask() for _ in range(4)]:
        for epoch in (1, 2):
            study.report(suggestion.number, epoch, 0.1 * epoch)
        study.tell(suggestion.number, "complete", value=0.2, best_epoch=2, reason="reached --trial-timeout in epoch 2")
    assert [trial.best_epoch for trial in study.trials()] == [2] * 4
    assert list(find_training_length(study)) == []


def test_three_epochs_have_no_first_tenth_and_no_last_quarter() -> None:
    def ending(suggestion: Suggestion) -> Ending:
        return "complete", [0.1, 0.2, 0.3] if suggestion.number % 2 else [0.3, 0.2, 0.1]

    assert list(find_training_length(a_study(12, ending, max_epochs=3))) == []


# --- epochs saved -----------------------------------------------------------------------------------------------------


def test_the_share_of_epochs_that_pruning_saved_is_reported_apart_from_other_savings() -> None:
    endings: list[Ending] = [
        ("complete", [0.5] * 20),
        ("complete", [0.5] * 15),  # stopped early
        ("pruned", [0.5] * 4),
        ("pruned", [0.5] * 4),
        ("diverged", [0.5]),  # in its second epoch
        ("failed", [0.5]),  # counts for nothing
    ]

    (finding,) = find_savings(a_study(6, lambda suggestion: endings[suggestion.number]))

    assert finding.data == {
        "planned": 100,
        "trained": 45,
        "saved": {"pruned": 32, "complete": 5, "diverged": 18, "out of time": 0},
    }
    assert finding.text == (
        "Pruning saved 32% of the 100 epochs that 5 trials of 20 might have run; "
        "early stopping and divergence saved 23%."
    )


def test_what_a_limit_of_time_cuts_off_is_not_saved_by_pruning_or_early_stopping() -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, max_epochs=10))
    endings: list[tuple[EndState, str | None]] = [
        ("pruned", None),
        ("pruned", "the study's --budget is used up"),
        ("complete", "reached --trial-timeout in epoch 2"),
        ("complete", None),
    ]
    for state, reason in endings:
        suggestion = study.ask()
        for epoch in (1, 2):
            study.report(suggestion.number, epoch, 0.1 * epoch)
        study.tell(suggestion.number, state, value=0.2, best_epoch=2, reason=reason)

    (finding,) = find_savings(study)

    assert finding.data["saved"] == {"pruned": 8, "complete": 8, "diverged": 0, "out of time": 16}
    assert finding.text == (
        "Pruning saved 20% of the 40 epochs that 4 trials of 10 might have run; early stopping and divergence saved "
        "20%; 40% had no time."
    )


def test_without_pruned_trials_pruning_saved_nothing() -> None:
    assert list(find_savings(a_study(3, lambda _: ("complete", [0.5] * 5)))) == []


# --- what goes wrong in trainings -------------------------------------------------------------------------------------


def with_symptoms(study_symptoms: Sequence[dict[str, float]]) -> Study:
    """Complete trials with these symptoms; the first one is the best."""
    study = Study.open(InMemoryStorage(), "s", SETTINGS)
    for number, symptoms in enumerate(study_symptoms):
        suggestion = study.ask()
        study.report(suggestion.number, 1, -float(number))
        study.tell(suggestion.number, "complete", value=-float(number), best_epoch=1, symptoms=symptoms)
    return study


def test_what_goes_wrong_in_the_best_trial_is_reported() -> None:
    study = with_symptoms([{"overfits_from": 6, "vanishing_layers": 3, "dead_units": 0.7}, {}, {}, {}])

    assert [text.partition(":")[0] for text in texts(find_symptoms(study))] == [
        "Trial 0, the best, overfits from epoch 6",
        "Trial 0, the best, has gradients that vanish up to layer 3",
        "Trial 0, the best, has 70% dead units (inactive for every example)",
    ]


def test_what_goes_wrong_in_many_other_trials_is_reported_with_their_number() -> None:
    study = with_symptoms([{}, *({"vanishing_layers": depth} for depth in (2, 4, 9)), *[{"exploding": 50.0}] * 2])  # type: ignore[list-item]

    (finding,) = find_symptoms(study)

    assert finding.text == (
        "3 of 6 trials have gradients that vanish, in the median up to layer 4: use a norm, another initialisation or "
        "fewer layers."
    )
    assert finding.data == {"value": 4, "trials": [1, 2, 3], "of": 6}


def test_every_symptom_has_its_sentence() -> None:
    every = dict.fromkeys(("overfits_from", "stalls_from", "vanishing_layers", "exploding", "dead_units"), 1.0)
    for study in (with_symptoms([every]), with_symptoms([{}, *[every] * 3])):
        topics = [finding.topic for finding in find_symptoms(study)]
        assert topics == ["overfitting", "plateau", "vanishing gradients", "exploding gradients", "dead units"]


def test_symptoms_of_a_few_trials_of_many_are_not_reported() -> None:
    assert list(find_symptoms(with_symptoms([*[{}] * 10, *[{"stalls_from": 3}] * 3]))) == []  # type: ignore[list-item]
    assert list(find_symptoms(with_symptoms([{}, {"stalls_from": 3}]))) == []


# --- importances ------------------------------------------------------------------------------------------------------

FEW = SPACE.narrow(["batch_size=128", "depth=8"])
"""Four parameters, of which momentum is conditional."""


def of_parameters(found: Importances) -> dict[str, Importance]:
    return {name: each for group in found.groups.values() for name, each in group.parameters.items()}


def test_the_parameter_that_decides_has_nearly_all_of_the_variance() -> None:
    study = a_study(40, rising_with(lambda values: -abs(log_lr(values) + 2)), space=FEW)

    found = importances(study)

    assert list(found.groups) == ["step size", "architecture", "regularization"]
    lr = of_parameters(found)["lr"]
    assert lr.low is not None
    assert lr.high is not None
    assert 0.7 < lr.low < lr.high <= 1
    assert found.groups["step size"].share == pytest.approx(lr.share, abs=0.05), "it is alone in its group"
    assert of_parameters(found)["dropout"].share == pytest.approx(0, abs=0.05)
    assert importances(study) == found, "it is repeatable"


@pytest.mark.parametrize("seed", [1, 2])
def test_other_values_of_inactive_parameters_change_nothing_at_all(seed: int) -> None:
    """Momentum once had 62%, with values of trials without momentum."""
    study = a_study(30, rising_with(lambda values: -abs(log_lr(values) + 2) - float(values["dropout"])))
    draw = random.Random(seed)
    redrawn = [
        replace(record, values=record.values | {name: draw.uniform(0.5, 0.99) for name in record.inactive})
        for record in study.trials()
    ]
    changed = SimpleNamespace(settings=study.settings, trials=lambda: redrawn)
    assert redrawn != study.trials()
    assert importances(study).groups
    assert importances(changed) == importances(study)  # type: ignore[arg-type]


def test_a_conditional_parameter_is_rated_where_it_is_active() -> None:
    """Over the whole space momentum explains little here, for it matters with one of two optimizers."""

    def score(values: dict[str, Value]) -> float:
        return 3 * float(values["momentum"]) if values["optimizer"] == "sgd" else 10.0

    momentum = of_parameters(importances(a_study(50, rising_with(score), space=FEW)))["momentum"]

    assert momentum.condition == "optimizer is sgd"
    assert momentum.share is not None
    assert momentum.share > 0.7


def test_a_conditional_parameter_needs_trials_in_which_it_is_active() -> None:
    def score(values: dict[str, Value]) -> float:
        return -abs(log_lr(values) + 2)

    study = a_study(80, rising_with(score), space=FEW)
    few = [r for r in study.trials() if r.inactive or r.number < 8]
    num_active = sum(not record.inactive for record in few)
    assert 0 < num_active < 10
    found = importances(SimpleNamespace(settings=study.settings, trials=lambda: few))  # type: ignore[arg-type]
    momentum = of_parameters(found)["momentum"]
    assert momentum.share is None
    assert momentum.missing_trials >= 10
    assert found.note is not None
    assert "momentum (about " in found.note


def test_a_pruned_trial_is_not_taken_for_one_that_ended_there() -> None:
    """Deep networks are slow here and no worse in the end; half of the trials are stopped while they are behind."""

    def ending(suggestion: Suggestion) -> Ending:
        last = 2 if suggestion.number % 2 else 20
        slowness = float(suggestion.values["depth"]) / 20
        curve = [-abs(log_lr(suggestion.values) + 2) - slowness * 4 / epoch**2 for epoch in range(1, last + 1)]
        return "pruned" if last == 2 else "complete", curve

    parameters = of_parameters(importances(a_study(60, ending, space=SPACE.narrow(["optimizer=adam", "dropout=0"]))))

    assert parameters["lr"].share is not None
    assert parameters["lr"].share > 0.6
    assert (parameters["depth"].share or 0) < 0.15


def test_folds_that_are_easier_are_not_taken_for_better_configurations() -> None:
    """Every second trial is stopped after the two folds that are the hardest."""

    def ending(suggestion: Suggestion) -> Ending:
        hardness = [1.0, 0.9, 0.1, 0.0, 0.0]
        values = [-abs(log_lr(suggestion.values) + 2) - hard for hard in hardness]
        return ("pruned", values[:2]) if suggestion.values["optimizer"] == "adam" else ("complete", values)

    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, space=FEW, folds=5, pruner="none"))
    for _ in range(40):
        suggestion = study.ask()
        state, curve = ending(suggestion)
        for fold, value in enumerate(curve, start=1):
            study.report(suggestion.number, fold, value)
        value = fmean(curve) if state == "complete" else study.estimated_mean(suggestion.number)
        study.tell(suggestion.number, state, value=value, best_epoch=1)
    assert study.counts()["pruned"] > 10

    parameters = of_parameters(importances(study))

    assert parameters["lr"].share is not None
    assert parameters["lr"].share > 0.7
    assert (parameters["optimizer"].share or 0) < 0.1


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ([], "Importances need about 30 more trials."),
        ([0.1 * n for n in range(15)], "Importances need about 20 more trials."),
        ([0.5] * 30, "Importances need trials whose values differ."),
    ],
)
def test_without_enough_trials_that_differ_there_are_no_numbers_and_it_is_said_how_many_more_are_needed(
    values: list[float], note: str
) -> None:
    study = a_study(len(values), lambda suggestion: ("complete", [values[suggestion.number]]))

    assert importances(study) == Importances(note=note)


def test_values_that_nothing_explains_are_too_uncertain_to_report() -> None:
    draw = random.Random(0)
    found = importances(a_study(30, rising_with(lambda values: draw.random())))

    unknown = [each for each in of_parameters(found).values() if each.share is None]
    assert all(each.low is None and each.missing_trials > 0 for each in unknown)
    assert found.note is not None
    assert "more trials" in found.note


def test_a_space_in_which_everything_is_fixed_has_no_importances() -> None:
    study = a_study(
        32,
        lambda suggestion: ("complete", [0.1 * suggestion.number]),
        space=Space(Group("g", lr=Float(0.1, 0.1, default=0.1))),
    )

    assert importances(study) == Importances()


def test_main_effects_of_a_known_function_come_out() -> None:
    """lr + 2 dropout has the shares 1/5 and 4/5, and 3 momentum, where it is active, as much more."""
    encoding = Encoding(FEW)
    design = Design(FEW, encoding, np.random.default_rng(0), 4096)
    units = dict(zip(encoding.names, np.concatenate(design.blocks).T, strict=True))
    is_sgd = units["optimizer"] < 0.5
    values = units["lr"] + 2 * units["dropout"] + 3 * units["momentum"] * is_sgd
    shares = design.shares(values.reshape(len(design.blocks), -1, 1))
    # The variance of a uniform variable is 1/12, and that of its product with one that is 0 or 1 is 1/6 - 1/16.
    variance = 5 / 12 + 9 * (1 / 6 - 1 / 16)
    assert shares["step size", "lr"] == pytest.approx(1 / 12 / variance, abs=0.01)
    assert shares["regularization", None] == pytest.approx(4 / 12 / variance, abs=0.01)
    assert shares["architecture", "optimizer"] == pytest.approx(9 / 16 / variance, abs=0.01)
    assert shares["architecture", "momentum"] == pytest.approx(9 / 14, abs=0.01)
    assert shares["architecture", None] == pytest.approx(9 * (1 / 6 - 1 / 16) / variance, abs=0.01)


# --- where they are told ----------------------------------------------------------------------------------------------


def test_show_and_the_summary_run_tell_the_same_each_in_a_line(home: Path) -> None:
    study = a_study(60, lambda suggestion: ("pruned", [log_lr(suggestion.values)]), open_storage(home))
    sentences = texts(findings(study))
    assert [finding.topic for finding in findings(study)] == ["edge of range", "epochs saved"]

    facts = study_facts("s", home)
    console = Console(record=True, width=200, file=io.StringIO())
    print_study(console, facts)
    with StudyRuns(open_store(home), "s", metric="accuracy", direction=Direction.MAXIMIZE, session="1") as runs:
        summary = runs.summary_run()
        write_summary(study, summary, None)
        path = runs.store.client.download_artifacts(summary.run_id, "findings.md")

    shown, written = console.export_text().splitlines(), Path(path).read_text().splitlines()
    found = importances(study)
    for line in (f"- {sentence}" for sentence in sentences):
        assert line in shown
        assert line in written
    for group, each in found.groups.items():
        share = describe_share(each.share, each.low, each.high)
        assert any(line.startswith(group) and share in line for line in shown)
        assert f"| {group} |  | {share} |" in written
    assert (found.note or "") in written
    assert json.loads(json.dumps(facts))["importances"]["step size"]["parameters"].keys() == {"lr", "batch_size"}
