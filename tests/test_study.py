"""A study: how its trials end, configurations that are given, and what survives the death of its process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers.studies import DISTRIBUTIONS, SETTINGS, SPACE, run_trials, values_of
from helpers.warm import WarmPopen
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers._tpe.sampler import _split_trials
from optuna.search_space import IntersectionSearchSpace
from optuna.storages import BaseStorage, InMemoryStorage

from hpo.config import Direction
from hpo.errors import StudyMismatchError
from hpo.parameters import Choice, Float, Int
from hpo.records import EndState, TrialState
from hpo.search.priority import (
    DEFAULT_CONFIGURATION,
)
from hpo.search.storage import open_storage
from hpo.search.strategies import STRATEGIES
from hpo.search.study import Study
from hpo.space import Group, Space

# --- how trials end ---------------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(ends=st.lists(st.sampled_from(get_args(EndState)), max_size=25), total=st.integers(1, 12))
def test_whatever_becomes_of_the_trials_exactly_the_total_is_finished(ends: list[EndState], total: int) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, strategy="random"))
    fate = iter(ends)
    while study.remaining(total) > 0:
        suggestion = study.ask()
        study.tell(suggestion.number, next(fate, "complete"), value=0.5)

    counts = study.counts()
    assert study.num_finished == total
    assert total == counts["complete"] + counts["pruned"] + counts["diverged"] + counts["infeasible"]
    assert counts["running"] == 0
    assert len(study.trials()) == sum(counts.values())


@pytest.mark.parametrize("direction", list(Direction))
def test_no_new_trial_is_missing_once_one_has_reached_the_value_to_stop_at(direction: Direction) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, strategy="random", direction=direction))
    low, high = sorted((0.5, 0.7), key=direction.loss, reverse=True)
    study.remember_session(num_trials=5, task_reference="digits", tracking_uri=None, stop_at=high)
    for value in (low, high):
        assert study.remaining(5) == 5 - study.num_finished
        running = study.ask().number
        study.report(running, 1, value)
        if value == low:
            study.tell(running, "complete", value=value)

    assert study.remaining(5) == 0
    assert not study.has_searched, "the trial that has reached it still runs"
    study.tell(running, "diverged")
    assert study.remaining(5) == 3, "it has not reached it after all"
    study.remember_session(num_trials=5, task_reference="digits", tracking_uri=None, stop_at="none")
    assert study.stop_at is None


def test_a_trial_that_was_interrupted_is_resumed_before_what_is_queued_even_if_no_new_one_is_missing() -> None:
    storage = InMemoryStorage()
    study = Study.open(storage, "s", replace(SETTINGS, strategy="random"))
    study.remember_session(num_trials=5, task_reference="digits", tracking_uri=None, stop_at=0.7)
    begun = [study.ask(), study.ask()]
    study.enqueue([begun[0].values | {"lr": 0.123}], "tried by hand")
    study.report(begun[1].number, 1, 0.9)
    study.requeue([begun[1].number])
    study.tell(begun[0].number, "complete", value=0.1, best_epoch=1)

    assert (study.remaining(5), study.has_searched) == (1, False)
    assert study.to_resume(is_budget_spent=True) == [begun[1].number]
    again = study.resume(begun[1].number)
    assert (again.values, again.attempt) == (begun[1].values, 2)
    study.tell(again.number, "complete", value=0.9, best_epoch=1)
    assert study.has_searched
    of_folds = Study.open(storage, "folds", replace(SETTINGS, strategy="random", folds=3))
    of_folds.requeue([of_folds.ask().number])
    assert of_folds.to_resume(is_budget_spent=True) == [], "a part of the folds is no result"
    assert of_folds.to_resume(is_budget_spent=False) == [0]


def test_no_new_trial_is_missing_once_the_budget_is_used_up_and_repeats_use_none_of_it() -> None:
    storage = InMemoryStorage()
    study = Study.open(storage, "s", replace(SETTINGS, strategy="random"))
    study.remember_session(num_trials=2, task_reference="digits", tracking_uri=None, budget_s=60.0, confirm="1x1")
    first = study.ask()
    study.report(first.number, 1, 0.5, trained_s=50.0)
    assert Study.load(storage, "s").trained_s() == 50.0, "other sessions see what a running trial has used"
    study.tell(first.number, "interrupted", trained_s=55.0)
    again = study.ask()
    assert again.trained_s == 55.0
    study.tell(again.number, "complete", value=0.5, trained_s=61.0)

    assert (study.trained_s(), study.has_spent_budget, study.remaining(2), study.has_searched) == (61.0, True, 0, True)
    repeat = study.ask_repeat()
    assert repeat is not None
    study.tell(repeat.number, "complete", value=0.5, trained_s=30.0)
    study.remember_session(num_trials=2, task_reference="digits", tracking_uri=None, budget_s=62.0)
    assert study.remaining(2) == 1


TUPLED = Space(
    Group(
        "all",
        lr=Float(1e-4, 1.0, log=True, default=1e-2),
        width=Int(8, 64, default=16),
        kernels=Choice((3, 3), (5, 5), default=(3, 3)),  # a label for Optuna
        optimizer=Choice("sgd", "adam", default="sgd"),
    )
)
WIDER = ("lr=1e-4:100", "width=8:4000", "optimizer=lamb")


@pytest.mark.parametrize(
    ("strategy", "database"),
    [("priority", "sqlite"), ("tpe", "sqlite"), ("cmaes", "sqlite"), ("qmc", "sqlite"), ("priority", "postgresql")],
)
def test_a_wider_space_keeps_every_trial_and_is_searched_jointly(
    study_name: str, strategy: str, database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres").new_database() if database == "postgresql" else None
    storage = open_storage(tmp_path, url)
    narrow = replace(SETTINGS, space=TUPLED, strategy=strategy)
    study = Study.open(storage, study_name, narrow)
    for suggestion in islice(iter(study.ask, None), 14):
        study.report(suggestion.number, 1, suggestion.values["lr"])
        study.tell(suggestion.number, "complete", value=suggestion.values["lr"])
    interrupted = study.ask()
    study.tell(interrupted.number, "interrupted")
    study.enqueue([TUPLED.configure("kernels=(5, 5),optimizer=adam,lr=0.5")], "tried by hand")
    before = [(trial.state, trial.values, trial.value) for trial in study.trials()]

    study = Study.open(storage, study_name, narrow.extend(WIDER), extensions=WIDER)
    assert [(trial.state, trial.values, trial.value) for trial in study.trials()] == before
    assert study.ask().values == interrupted.values
    assert study.ask().values == before[-1][1]
    joint = IntersectionSearchSpace().calculate(study._optuna)
    assert set(joint) == set(TUPLED.parameters), "none has left the joint space"
    tried = [study.ask().values for _ in range(12)]
    assert any(values["lr"] > 1 or values["width"] > 64 for values in tried)

    assert Study.load(storage, study_name).settings.to_dict() == narrow.extend(WIDER).to_dict()
    with pytest.raises(StudyMismatchError, match=r"lr \(in 'all'\) 0.0001:100 \(log\), not 0.0001:1"):
        Study.open(storage, study_name, narrow)


def test_running_trials_are_not_asked_for_twice(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, SETTINGS)

    remaining = []
    for _ in range(4):
        remaining.append(study.remaining(4))
        study.ask()

    assert remaining == [4, 3, 2, 1]
    assert (study.remaining(4), study.remaining(6)) == (0, 2)
    assert study.num_finished == 0


def test_an_interrupted_trial_comes_back_with_its_number_values_and_curve(
    storage: BaseStorage, study_name: str
) -> None:
    study = Study.open(storage, study_name, SETTINGS)
    run_trials(study, 1)
    first = study.ask()
    study.report(first.number, 1, 0.25)
    study.tell(first.number, "interrupted", reason="stopped by hand", best_epoch=1)
    assert study.trials()[1].state == "interrupted"
    assert study.trials()[1].reason == "stopped by hand"

    study = Study.open(storage, study_name, SETTINGS)
    again = study.ask()

    assert again == replace(first, attempt=2)
    assert study.report(again.number, 1, 0.99) is False
    study.report(again.number, 2, 0.5)
    study.tell(again.number, "complete", value=0.5, best_epoch=2)
    record = study.trials()[1]
    assert (record.state, record.attempts, record.reason, record.best_epoch) == ("complete", 2, None, 2)
    assert record.curve == {1: 0.25, 2: 0.5}
    assert study.ask().number == 2


def test_a_diverged_trial_counts_as_worse_than_any_other(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, SETTINGS)
    diverged = study.ask()
    for epoch in (1, 2):
        study.report(diverged.number, epoch, 0.999)
    study.tell(diverged.number, "diverged", value=0.999, best_epoch=2, reason="the loss was not finite in epoch 3")
    assert study.best() is None
    pruned = study.ask()
    study.report(pruned.number, 1, 0.01)
    study.tell(pruned.number, "pruned")
    complete = study.ask()
    study.tell(complete.number, "complete", value=0.001)

    good, bad = _split_trials(study._optuna, study._optuna.get_trials(), 2)

    assert [trial.number for trial in good] == [pruned.number, complete.number]
    assert [trial.number for trial in bad] == [diverged.number]
    assert study.best().number == pruned.number
    record = study.trials()[diverged.number]
    assert (record.state, record.value, record.best_epoch) == ("diverged", 0.999, 2)
    assert study._optuna.get_trials()[diverged.number].value is None
    assert study.counts()["pruned"] == study.counts()["diverged"] == 1


def test_a_trial_that_diverges_in_its_first_epoch_has_no_value(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, replace(SETTINGS, strategy="cmaes"))
    for _ in range(3):
        study.tell(study.ask().number, "diverged")

    assert [(record.state, record.value, record.best_epoch) for record in study.trials()] == [
        ("diverged", None, None)
    ] * 3


def test_a_failed_trial_keeps_its_reason_and_does_not_count(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, SETTINGS)

    study.tell(study.ask().number, "failed", reason="RuntimeError: out of memory")

    assert study.remaining(3) == 3
    assert (study.trials()[0].state, study.trials()[0].reason) == ("failed", "RuntimeError: out of memory")


@pytest.mark.parametrize(("direction", "best"), [(Direction.MAXIMIZE, 2), (Direction.MINIMIZE, 1)])
def test_the_best_trial_and_its_best_epoch_follow_the_direction(
    direction: Any, best: int, storage: BaseStorage, study_name: str
) -> None:
    study = Study.open(storage, study_name, replace(SETTINGS, direction=direction))
    for value in (0.5, 0.1, 0.9, 0.9, 0.1):
        suggestion = study.ask()
        for epoch, step in enumerate((0.0, 0.02, math.nan, -0.02), start=1):
            study.report(suggestion.number, epoch, value + step)
        study.tell(suggestion.number, "complete", value=value, best_epoch=1)
    pruned = study.ask()
    study.report(pruned.number, 1, 0.5)
    study.report(pruned.number, 2, 0.6)
    study.tell(pruned.number, "pruned")

    assert study.best().number == best
    last = study.trials()[-1]
    assert (last.best_epoch, last.value) == ((2, 0.6) if direction == "maximize" else (1, 0.5))


def test_inactive_parameters_are_recorded_as_inactive(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, replace(SETTINGS, space=SPACE.narrow(["optimizer=adam,sgd"])))
    suggestions = run_trials(study, 12)

    for suggestion, record in zip(suggestions, study.trials(), strict=True):
        assert record.values == suggestion.values
        assert set(suggestion.active_values) == set(suggestion.values) - set(record.inactive)
        assert record.inactive == (("momentum",) if suggestion.values["optimizer"] == "adam" else ())
    assert {record.inactive for record in study.trials()} == {(), ("momentum",)}


# --- given configurations ---------------------------------------------------------------------------------------------

BY_HAND = [SPACE.configure(text) for text in ("lr=0.1,optimizer=adam", "depth=3")]


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "grid"])
def test_given_configurations_are_tried_after_the_default_one_and_before_all_others(
    strategy: str, storage: BaseStorage, study_name: str
) -> None:
    study = Study.open(storage, study_name, replace(SETTINGS, strategy=strategy))

    study.enqueue(BY_HAND, "tried by hand")
    suggestions = run_trials(study, 5)

    assert values_of(suggestions)[:3] == [SPACE.defaults(), *BY_HAND]
    assert [suggestion.stage for suggestion in suggestions[:3]] == [DEFAULT_CONFIGURATION] + ["tried by hand"] * 2
    assert [trial.stage for trial in study.trials()] == [suggestion.stage for suggestion in suggestions]
    assert "tried by hand" not in [suggestion.stage for suggestion in suggestions[3:]]
    assert study.trials()[1].inactive == ("momentum",)
    assert study.counts()["complete"] == 5


def test_given_configurations_are_queued_once_whatever_became_of_them(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, SETTINGS)
    for total in (0, 2, 4):
        run_trials(study, total)
        study = Study.open(storage, study_name, SETTINGS)
        study.enqueue([SPACE.defaults() | {"lr": 0.01}, *BY_HAND], "tried by hand")
    run_trials(study, 5)

    assert values_of(run_trials(study, 6)) != []
    assert [trial.values for trial in study.trials()].count(BY_HAND[0]) == 1
    assert [trial.stage for trial in study.trials()].count("tried by hand") == 2
    assert len(study.trials()) == 6


def test_configurations_that_are_given_later_take_the_next_numbers(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, SETTINGS)
    run_trials(study, 3)
    under_way = study.ask()

    study.enqueue(BY_HAND, "tried by hand")

    assert [(suggestion.number, suggestion.values) for suggestion in (study.ask(), study.ask())] == [
        (4, BY_HAND[0]),
        (5, BY_HAND[1]),
    ]
    assert study.trials()[under_way.number].stage != "tried by hand"


def test_what_waits_to_be_tried_is_queued_and_not_interrupted(storage: BaseStorage, study_name: str) -> None:
    study = Study.open(storage, study_name, SETTINGS)
    study.enqueue(BY_HAND, "tried by hand")
    run_trials(study, 2)

    waiting = study.trials()[2]

    assert (waiting.state, waiting.values, waiting.inactive) == ("queued", BY_HAND[1], ())
    assert {state: count for state, count in study.counts().items() if count} == {"complete": 2, "queued": 1}
    assert (study.remaining(2), study.remaining(3), study.remaining(4)) == (0, 1, 2)
    again = study.ask()
    study.tell(again.number, "interrupted")
    assert study.trials()[2].state == "interrupted"
    assert study.ask().values == BY_HAND[1]


def test_a_given_whole_number_is_the_real_number_that_the_study_has(storage: BaseStorage, study_name: str) -> None:
    space = Space(Group("g", lr=Float(0, 10, default=1), depth=Int(1, 3, default=2)))
    study = Study.open(storage, study_name, replace(SETTINGS, space=space))

    study.enqueue([space.configure("lr=1"), {"lr": 1, "depth": 2}, {"lr": 1, "depth": 3}], "tried by hand")

    assert [trial.values for trial in study.trials()] == [{"lr": 1.0, "depth": 2}, {"lr": 1.0, "depth": 3}]


COORDINATOR = """
import json, sys
from pathlib import Path
from hpo.search.storage import open_storage
from hpo.search.study import Study, read_settings
storage = open_storage(Path(sys.argv[1]))
study = Study.open(storage, "study", read_settings(storage, "study"))
suggestion = study.ask()
study.report(suggestion.number, 1, 0.5)
print(json.dumps(suggestion.values), flush=True)
sys.stdin.read()
"""


def test_the_trial_of_a_killed_coordinator_is_adopted_and_given_again(tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "study", SETTINGS)
    run_trials(study, 2)
    coordinator = WarmPopen(
        [sys.executable, "-c", COORDINATOR, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with coordinator:
        values = json.loads(coordinator.stdout.readline())
        coordinator.send_signal(signal.SIGKILL)
        coordinator.wait()
    assert study.counts()["running"] == 1

    study = Study.open(open_storage(tmp_path), "study", SETTINGS)
    assert list(study.owners()) == [2]
    study.requeue([2])
    again = study.ask()

    assert (again.number, again.attempt, again.values) == (2, 2, values)
    assert study.trials()[2].curve == {1: 0.5}
    study.tell(again.number, "complete", value=0.5, best_epoch=1)
    run_trials(study, 5)
    assert study.counts() == dict.fromkeys(get_args(TrialState), 0) | {"complete": 5}


@pytest.mark.parametrize("num_suggested", [0, 1, 4])
def test_a_trial_cut_off_while_it_was_asked_for_is_asked_for_to_the_end(
    num_suggested: int, storage: BaseStorage, study_name: str
) -> None:
    uninterrupted = run_trials(Study.open(storage, f"{study_name} at once", SETTINGS), 3)[-1]
    study = Study.open(storage, study_name, SETTINGS)
    run_trials(study, 2)
    cut_off = study._optuna.ask(dict(islice(DISTRIBUTIONS.items(), num_suggested)))

    study = Study.open(storage, study_name, SETTINGS)
    assert study.trials()[-1].state == "running"
    assert study.owners() == {cut_off.number: ""}
    study.requeue([cut_off.number])
    again = study.ask()

    assert again == uninterrupted
    assert len(study.trials()) == 3
