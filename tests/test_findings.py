"""What a study says of itself: true where there is something to say, and silent where there is not."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import BaseStorage, InMemoryStorage
from rich.console import Console

from hpo.config import Direction
from hpo.records import EndState
from hpo.search.findings import (
    find_divergence,
    find_edges,
    find_savings,
    find_symptoms,
    find_training_length,
    findings,
    importances,
)
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study, Suggestion
from hpo.session.conclude import write_summary
from hpo.space import Choice, Float, Group, Int, Space, Value
from hpo.terminal.tables import print_study, study_facts
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


# --- the edge of a range ----------------------------------------------------------------------------------------------


def test_a_best_value_at_the_end_of_its_range_is_told_on_the_scale_of_the_range() -> None:
    study = a_study(60, rising_with(log_lr))

    (finding,) = find_edges(study)

    best = study.best()
    assert best is not None
    advice = "widen it in a file for --space, because -p only narrows."
    assert finding.text == f"lr's best is at {best.values['lr']:.3g}, the upper end of 0.0001:0.1 (log): {advice}"
    assert finding.data == {"parameter": "lr", "value": best.values["lr"], "end": "upper", "bound": 0.1}


def test_the_lower_end_is_told_too_and_where_smaller_is_better() -> None:
    study = a_study(60, rising_with(log_lr), direction=Direction.MINIMIZE, seed=1)

    assert [finding.data["end"] for finding in find_edges(study)] == ["lower"]


def test_the_ends_of_whole_numbers_are_told() -> None:
    study = a_study(60, rising_with(lambda values: float(values["depth"])))

    assert [finding.data["parameter"] for finding in find_edges(study)] == ["depth"]


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


def test_a_few_trials_have_no_edge() -> None:
    assert list(find_edges(a_study(9, rising_with(log_lr)))) == []


# --- divergence -------------------------------------------------------------------------------------------------------


def diverging_above(limit: float) -> Callable[[Suggestion], Ending]:
    return lambda suggestion: ("diverged", []) if suggestion.values["lr"] > limit else ("complete", [0.5])


def test_the_learning_rate_above_which_everything_diverged_is_told_with_an_override_that_can_be_typed() -> None:
    study = a_study(40, diverging_above(0.02))

    (finding,) = find_divergence(study)

    rates = sorted(record.values["lr"] for record in study.trials())
    survived = max(rate for rate in rates if rate <= 0.02)
    above = [rate for rate in rates if rate > 0.02]
    assert finding.data == {"parameter": "lr", "above": survived, "lowest": above[0], "trials": len(above)}
    assert finding.text.startswith(f"All {len(above)} trials with lr above {survived:.3g} diverged: -p lr=0.0001:")
    override = finding.text.split("-p ")[1].split()[0]
    assert SPACE.narrow([override]).parameters["lr"].extremes() == (0.0001, float(f"{survived:.3g}"))


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
def test_no_limit_of_the_learning_rate_is_told_where(ending: Callable[[Suggestion], Ending], why: str) -> None:
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
def test_a_best_epoch_near_an_end_of_the_training_is_told(epoch: int, advice: str) -> None:
    (finding,) = find_training_length(a_study(4, best_in(epoch)))

    assert finding.text.startswith(f"The best trials are at their best in epoch {epoch} of 20: {advice}")
    assert finding.data == {"epoch": epoch, "epochs": 20, "trials": 3}


@pytest.mark.parametrize("study", [a_study(4, best_in(3)), a_study(4, best_in(15)), a_study(2, best_in(20))])
def test_an_ordinary_best_epoch_or_that_of_few_trials_is_not_told(study: Study) -> None:
    assert list(find_training_length(study)) == []


def test_pruned_trials_say_nothing_of_the_length_of_training() -> None:
    assert list(find_training_length(a_study(4, best_in(20, "pruned")))) == []


def test_three_epochs_have_no_first_tenth_and_no_last_quarter() -> None:
    def ending(suggestion: Suggestion) -> Ending:
        return "complete", [0.1, 0.2, 0.3] if suggestion.number % 2 else [0.3, 0.2, 0.1]

    assert list(find_training_length(a_study(12, ending, max_epochs=3))) == []


# --- epochs saved -----------------------------------------------------------------------------------------------------


def test_the_share_of_epochs_that_pruning_saved_is_told_apart_from_other_savings() -> None:
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
        "saved": {"pruned": 32, "complete": 5, "diverged": 18},
    }
    assert finding.text == (
        "Pruning saved 32% of the 100 epochs that 5 trials of 20 might have run; "
        "early stopping and divergence saved 23%."
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


def test_what_goes_wrong_in_the_best_trial_is_told() -> None:
    study = with_symptoms([{"overfits_from": 6, "vanishing_layers": 3, "dead_units": 0.7}, {}, {}, {}])

    assert [text.partition(":")[0] for text in texts(find_symptoms(study))] == [
        "Trial 0, the best, overfits from epoch 6",
        "Trial 0, the best, has gradients that vanish up to layer 3",
        "Trial 0, the best, has 70% dead units (inactive for every example)",
    ]


def test_what_goes_wrong_in_many_other_trials_is_told_with_their_number() -> None:
    study = with_symptoms([{}, *({"vanishing_layers": depth} for depth in (2, 4, 9)), *[{"exploding": 50.0}] * 2])

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


def test_symptoms_of_a_few_trials_of_many_are_not_told() -> None:
    assert list(find_symptoms(with_symptoms([*[{}] * 10, *[{"stalls_from": 3}] * 3]))) == []
    assert list(find_symptoms(with_symptoms([{}, {"stalls_from": 3}]))) == []


# --- importances ------------------------------------------------------------------------------------------------------


def test_the_parameter_that_decides_is_the_most_important_one() -> None:
    def ending(suggestion: Suggestion) -> Ending:
        distance = abs(log_lr(suggestion.values) + 2)
        return "diverged" if distance > 1.5 else "pruned" if distance > 0.5 else "complete", [-distance]

    by_group = importances(a_study(40, ending, space=SPACE.narrow(["dropout=0.1", "momentum=0.9"])))

    assert list(by_group) == ["step size", "architecture"]
    assert list(by_group["architecture"].parameters) == ["depth", "optimizer"]
    parameters = {name: each for group in by_group.values() for name, each in group.parameters.items()}
    assert max(parameters, key=lambda name: parameters[name].share) == "lr"
    assert sum(each.share for each in parameters.values()) == pytest.approx(1)
    for group in by_group.values():
        assert group.share == pytest.approx(sum(each.share for each in group.parameters.values()))


def test_a_parameter_that_was_inactive_in_some_trials_has_no_importance() -> None:
    """Its values there were seen by no network: momentum once had 62 %, with values of trials without momentum."""
    study = a_study(40, rising_with(lambda values: -abs(log_lr(values) + 2)))
    assert {name for trial in study.trials() for name in trial.inactive} == {"momentum"}
    rated = {name for group in importances(study).values() for name in group.parameters}
    assert "momentum" in study.settings.space.parameters
    assert "momentum" not in rated
    assert {"lr", "optimizer"} <= rated
    assert importances(a_study(29, rising_with(lambda values: -abs(log_lr(values) + 2)))) == {}, "too few trials"


def test_the_standard_error_is_repeatable_and_falls_with_the_trials_beyond_the_size_of_a_resample() -> None:
    few, many = (a_study(count, rising_with(lambda values: -abs(log_lr(values) + 2.5))) for count in (30, 300))

    assert importances(few) == importances(few)
    assert 0 < importances(many)["step size"].error < importances(few)["step size"].error < 0.5


@pytest.mark.parametrize("values", [[], [0.5], [0.1 * n for n in range(9)], [0.5] * 30])
def test_importances_are_empty_where_nothing_can_be_told(values: list[float]) -> None:
    study = a_study(len(values), lambda suggestion: ("complete", [values[suggestion.number]]))

    assert importances(study) == {}


def test_a_space_in_which_everything_is_fixed_has_no_importances() -> None:
    study = a_study(
        12,
        lambda suggestion: ("complete", [0.1 * suggestion.number]),
        space=Space(Group("g", lr=Float(0.1, 0.1, default=0.1))),
    )

    assert importances(study) == {}


def test_importances_are_told_where_one_trial_differs_though_most_resamples_miss_it() -> None:
    study = a_study(31, lambda suggestion: ("complete", [0.1 if suggestion.number == 20 else 0.5]))

    assert sum(group.share for group in importances(study).values()) == pytest.approx(1)


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
    by_group = importances(study)
    for line in (f"- {sentence}" for sentence in sentences):
        assert line in shown
        assert line in written
    for group, importance in by_group.items():
        share = f"{importance.share:.0%} ± {100 * importance.error:.0f}"
        assert any(line.startswith(group) and share in line for line in shown)
        assert f"| {group} | {share} |" in written
    assert json.loads(json.dumps(facts))["importances"]["step size"]["parameters"].keys() == {"lr", "batch_size"}
