"""The room hpo/search: strategies, pruners, the storage, and a study that survives whatever happens to its process."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.samplers._tpe.sampler import _split_trials
from optuna.storages import BaseStorage, InMemoryStorage

from hpo.config import Direction
from hpo.errors import StoreError, StudyMismatchError, UnknownNameError
from hpo.plugins import SEARCH_SPACES, load_task, registered
from hpo.records import EndState, TrialState
from hpo.search.encoding import distribution
from hpo.search.priority import (
    DEFAULT_CONFIGURATION,
    EVERYTHING,
    SCOUT,
    PrioritySampler,
    open_groups,
    stage_length,
    stage_name,
)
from hpo.search.pruners import PRUNERS, build_pruner
from hpo.search.settings import FORMAT, StudySettings
from hpo.search.storage import open_storage, read_storage
from hpo.search.strategies import STRATEGIES, GridSampler, build_sampler, grid_points, grid_size
from hpo.search.study import Study, Suggestion, list_studies, read_settings
from hpo.space import Choice, Float, Group, Int, Space, Value

SPACE = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=1e-2),
        batch_size=Choice(64, 128, 256, default=128),
    ),
    Group(
        "architecture and optimizer",
        depth=Int(2, 20, default=8),
        optimizer=Choice("sgd", "adam", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.0),
        weight_decay=Float(1e-6, 1e-2, log=True, default=1e-4),
    ),
)
SETTINGS = StudySettings(
    task="digits",
    space=SPACE,
    seed=0,
    strategy="priority",
    pruner="none",
    max_epochs=3,
    metric="accuracy",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=20,
)
DISTRIBUTIONS = {name: distribution(parameter) for name, parameter in SPACE.parameters.items()}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> BaseStorage:
    """One sqlite file for the tests of this module; each makes studies of its own in it."""
    return open_storage(tmp_path_factory.mktemp("home"))


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return request.node.name


def accuracy(values: dict[str, Value], epoch: int) -> float:
    """Rises epoch by epoch to what the values are worth; best at lr=0.03, depth=10."""
    lr, depth = float(values["lr"]), int(values["depth"])
    return 1 - (math.log10(lr) + 1.5) ** 2 / 10 - (depth - 10) ** 2 / 500 - 0.1 / epoch


def run_trials(study: Study, total: int, at_most: int | None = None) -> list[Suggestion]:
    """Run what is missing to `total`, or only the next `at_most` trials, as a coordinator would."""
    return list(islice(_run_trials(study, total), at_most))


def _run_trials(study: Study, total: int) -> Iterator[Suggestion]:
    while study.remaining(total) > 0:
        suggestion = study.ask()
        state: EndState = "complete"
        for epoch in range(1, study.settings.max_epochs + 1):
            value = accuracy(suggestion.values, epoch)
            if study.report(suggestion.number, epoch, value):
                state = "pruned"
                break
        study.tell(suggestion.number, state, value=value, best_epoch=epoch)
        yield suggestion


def values_of(suggestions: list[Suggestion]) -> list[dict[str, Value]]:
    return [suggestion.values for suggestion in suggestions]


# --- strategies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_study_reopened_every_few_trials_asks_what_an_uninterrupted_one_asks(
    strategy: str, storage: BaseStorage, name: str
) -> None:
    chosen = replace(SETTINGS, strategy=strategy, max_epochs=1)
    at_once = run_trials(Study.open(storage, name, chosen), 12)

    piecewise = []
    for total in (2, 7, 11, 12):
        piecewise += run_trials(Study.open(storage, f"{name} again", chosen), total)

    assert [suggestion.number for suggestion in piecewise] == list(range(12))
    assert values_of(piecewise) == values_of(at_once)
    assert len({str(values) for values in values_of(at_once)}) > 10


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_seed_asks_other_values(strategy: str) -> None:
    first, second = (
        values_of(run_trials(Study.open(InMemoryStorage(), "s", replace(SETTINGS, strategy=strategy, seed=seed)), 4))
        for seed in (0, 1)
    )

    assert first[1:] != second[1:]


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "grid"])
def test_trial_0_is_the_default_configuration(strategy: str) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, strategy=strategy))

    suggestion = study.ask()

    assert suggestion.values == SPACE.defaults()
    assert suggestion.stage == DEFAULT_CONFIGURATION


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_draws_of_one_trial_do_not_repeat_each_other(strategy: str) -> None:
    twins = Space(Group("twins", **{f"x{i}": Float(0.0, 1.0, default=0.5) for i in range(4)}))
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, space=twins, strategy=strategy))
    study.ask()

    assert len(set(study.ask().values.values())) > 1


@pytest.mark.parametrize("strategy", ["priority", "tpe"])
def test_the_joint_model_keeps_every_parameter_whatever_becomes_of_the_trials(strategy: str) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, strategy=strategy, pruner="sha"))
    for state in ("complete", "pruned", "diverged", "failed", "interrupted") * 3:
        suggestion = study.ask()
        study.report(suggestion.number, 1, 0.5)
        study.tell(suggestion.number, state, value=0.5)

    trial = study._optuna.ask()

    assert set(study._optuna.sampler.infer_relative_search_space(study._optuna, trial)) == set(SPACE.parameters)


parameters = st.one_of(
    st.tuples(st.floats(-1e3, 1e3), st.floats(0, 1e3)).map(lambda t: Float(t[0], t[0] + t[1], default=t[0])),
    st.tuples(st.floats(1e-6, 1e3), st.floats(1, 1e6)).map(lambda t: Float(t[0], t[0] * t[1], log=True, default=t[0])),
    st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(lambda t: Int(t[0], t[0] + t[1], default=t[0])),
    st.tuples(st.integers(1, 50), st.integers(0, 500)).map(
        lambda t: Int(t[0], t[0] + t[1], log=True, default=t[0] + t[1])
    ),
    st.lists(st.sampled_from(["a", "b", "c", 1, 2, 0.5, True]), min_size=1, max_size=4, unique_by=str)
    .filter(lambda choices: not (1 in choices and any(choice is True for choice in choices)))
    .map(lambda choices: Choice(*choices, default=choices[-1])),
)
spaces = st.lists(parameters, min_size=1, max_size=6).map(
    lambda drawn: Space(*(Group(f"group {i}", **{f"p{i}": parameter}) for i, parameter in enumerate(drawn)))
)


@settings(max_examples=25)
@given(space=spaces, strategy=st.sampled_from(["priority", "tpe", "random", "grid", "qmc", "cmaes"]))
def test_every_trial_of_any_space_has_every_parameter_within_its_range(space: Space, strategy: str) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, space=space, strategy=strategy, max_epochs=1))
    for number in range(14):
        suggestion = study.ask()
        study.tell(suggestion.number, "complete", value=float(number % 5))
        assert list(suggestion.values) == list(space.parameters)
        for name, value in suggestion.values.items():
            assert space.parameters[name].contains(value), (name, value)


@pytest.mark.parametrize("name", sorted(registered(SEARCH_SPACES)))
def test_every_draw_from_a_shipped_space_has_every_parameter_and_suits_the_trainer(name: str) -> None:
    task = load_task(name)
    sampler = build_sampler("priority", task.space, seed=0, num_trials=100)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    distributions = {parameter: distribution(declared) for parameter, declared in task.space.parameters.items()}
    drawn: dict[str, set[object]] = {parameter: set() for parameter in distributions}
    for number in range(100):
        trial = study.ask(distributions)
        assert list(trial.params) == list(task.space.parameters)
        task.train_config(task.space.active(trial.params))
        for parameter, value in trial.params.items():
            drawn[parameter].add(value)
        study.tell(trial, math.sin(number))
    assert [parameter for parameter, values in drawn.items() if len(values) < 2] == []


@pytest.mark.parametrize("strategy", ["priority", "random", "grid", "qmc"])
def test_200_draws_reach_both_ends_and_every_choice(strategy: str) -> None:
    study = optuna.create_study(sampler=build_sampler(strategy, SPACE, seed=0, num_trials=200))
    drawn: dict[str, list[Any]] = {name: [] for name in SPACE.parameters}
    for _ in range(200):
        trial = study.ask(DISTRIBUTIONS)
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        for name, value in trial.params.items():
            drawn[name].append(value)

    assert {name: len(values) for name, values in drawn.items()} == dict.fromkeys(SPACE.parameters, 200)
    assert set(drawn["batch_size"]) == {64, 128, 256}
    assert set(drawn["optimizer"]) == {"sgd", "adam"}
    assert {min(drawn["depth"]), max(drawn["depth"])} == {2, 20}
    assert min(drawn["lr"]) < 2e-4
    assert max(drawn["lr"]) > 0.5


def test_an_unknown_strategy_is_refused_with_the_near_miss() -> None:
    with pytest.raises(UnknownNameError, match=r"no strategy 'tpee'; did you mean 'tpe'\?"):
        build_sampler("tpee", SPACE, seed=0, num_trials=10)


# --- the strategy `priority` ------------------------------------------------------------------------------------------


@given(number=st.integers(0, 500), num_groups=st.integers(1, 8), num_trials=st.integers(1, 500))
def test_stages_open_one_group_then_two_then_all_while_odd_trials_search_everything(
    number: int, num_groups: int, num_trials: int
) -> None:
    opened = open_groups(number, num_groups, num_trials)

    length = stage_length(num_trials)
    if number == 0:
        assert opened == 0
    elif number % 2 == 1 or number >= 2 * length:
        assert opened == num_groups
    else:
        assert opened == min(num_groups, number // length + 1)


@pytest.mark.parametrize(("num_trials", "length"), [(1, 0), (10, 2), (20, 3), (67, 10), (100, 10), (10_000, 10)])
def test_a_stage_lasts_15_percent_of_the_trials_and_10_at_the_most(num_trials: int, length: int) -> None:
    assert stage_length(num_trials) == length


@given(number=st.integers(0, 60), num_groups=st.integers(1, 5), num_trials=st.integers(1, 200))
def test_a_stage_is_named_after_what_is_open(number: int, num_groups: int, num_trials: int) -> None:
    groups = [f"g{i}" for i in range(num_groups)]

    name = stage_name(number, groups, num_trials)

    num_open = open_groups(number, num_groups, num_trials)
    if num_open == 0:
        assert name == DEFAULT_CONFIGURATION
    elif num_open < num_groups:
        assert name == " + ".join(groups[:num_open])
    else:
        assert name in (EVERYTHING, SCOUT)


def test_stages_of_a_study_read_as_a_plan(storage: BaseStorage, name: str) -> None:
    stages = [suggestion.stage for suggestion in run_trials(Study.open(storage, name, SETTINGS), 8)]

    assert stages == [
        "default configuration",
        "everything (scout)",
        "step size",
        "everything (scout)",
        "step size + architecture and optimizer",
        "everything (scout)",
        "everything",
        "everything",
    ]


def test_more_trials_later_do_not_move_the_stages(storage: BaseStorage, name: str) -> None:
    run_trials(Study.open(storage, name, SETTINGS), 4)

    grown = Study.open(storage, name, replace(SETTINGS, planned_trials=100))

    assert grown.settings.planned_trials == 20
    assert run_trials(grown, 7)[-1].stage == "everything"


def test_closed_groups_are_held_at_the_best_complete_trial_and_at_the_defaults_before_there_is_one() -> None:
    study = optuna.create_study(direction="maximize", sampler=PrioritySampler(SPACE, num_trials=100))
    weak, best, diverging = (study.ask(DISTRIBUTIONS) for _ in range(3))
    assert diverging.params.items() >= {"depth": 8, "optimizer": "sgd", "dropout": 0.0}.items()
    study.tell(weak, 0.1)
    study.tell(best, 0.9)
    diverging.report(99.0, 1)
    study.tell(diverging, state=optuna.trial.TrialState.PRUNED)

    study.ask(DISTRIBUTIONS)
    staged = study.ask(DISTRIBUTIONS)

    closed = [name for group in SPACE.groups[1:] for name in group.parameters]
    assert {name: staged.params[name] for name in closed} == {name: best.params[name] for name in closed}
    assert staged.params["lr"] not in (weak.params["lr"], best.params["lr"])


def test_what_is_held_does_not_change_within_a_trial() -> None:
    study = optuna.create_study(sampler=PrioritySampler(SPACE, num_trials=100))
    first = study.ask(DISTRIBUTIONS)
    second = study.ask(DISTRIBUTIONS)
    study.tell(first, 2.0)
    staged = study.ask()
    staged._suggest("depth", DISTRIBUTIONS["depth"])

    study.tell(second, 1.0)
    staged._suggest("dropout", DISTRIBUTIONS["dropout"])

    assert (staged.params["depth"], staged.params["dropout"]) == (first.params["depth"], first.params["dropout"])


def test_the_incumbent_is_found_across_the_brackets_of_hyperband() -> None:
    study = optuna.create_study(
        study_name="brackets",  # a trial's bracket follows from this name and its number
        sampler=PrioritySampler(SPACE, num_trials=100),
        pruner=build_pruner("hyperband", max_epochs=27, space=SPACE),
    )
    for loss in (5.0, 1.0):
        trial = study.ask(DISTRIBUTIONS)
        trial.report(loss, 1)
        trial.should_prune()  # lays out the brackets
        study.tell(trial, loss)

    for _ in range(6):
        trial = study.ask(DISTRIBUTIONS)
        if trial.number % 2 == 0:
            assert trial.params["dropout"] == study.best_trial.params["dropout"]


def test_groups_in_which_everything_is_fixed_do_not_take_up_a_stage(storage: BaseStorage, name: str) -> None:
    fixed = replace(SETTINGS, space=SPACE.narrow(["lr=0.1", "batch_size=64"]))

    suggestions = run_trials(Study.open(storage, name, fixed), 6)

    assert [s.stage for s in suggestions[2::2]] == ["architecture and optimizer", EVERYTHING]
    assert len({str(s.values) for s in suggestions}) == 6


def test_the_priority_sampler_serves_a_plain_optuna_study() -> None:
    def loss(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
        trial.suggest_float("dropout", 0.0, 0.5)
        return abs(math.log10(lr) + 2.5)

    space = Space(
        Group("first", lr=Float(1e-4, 1.0, log=True, default=0.5)),
        Group("second", dropout=Float(0.0, 0.5, default=0.25)),
    )
    study = optuna.create_study(sampler=PrioritySampler(space, num_trials=30))
    study.optimize(loss, n_trials=30)

    assert study.trials[0].params == space.defaults()
    assert study.trials[2].params["dropout"] in {trial.params["dropout"] for trial in study.trials[:2]}
    assert study.best_value < 0.2


def test_trials_asked_for_in_parallel_differ_and_do_not_depend_on_who_ends_first() -> None:
    def sixteen(order: list[int]) -> list[dict[str, Any]]:
        study = optuna.create_study(sampler=PrioritySampler(SPACE, num_trials=100))
        for _ in range(4):
            batch = [study.ask(DISTRIBUTIONS) for _ in range(4)]
            for i in order:
                study.tell(batch[i], accuracy(batch[i].params, 1))
        return [trial.params for trial in study.trials]

    forwards, backwards = sixteen([0, 1, 2, 3]), sixteen([3, 2, 1, 0])

    assert len({str(params) for params in forwards}) == 16
    assert forwards == backwards


# --- grid -------------------------------------------------------------------------------------------------------------


@given(space=spaces)
@settings(max_examples=50)
def test_a_grid_visits_each_of_its_points_once(space: Space) -> None:
    sampler = GridSampler(space, seed=3)
    size = grid_size(space)
    visited = {tuple(sampler._point(number).values()) for number in range(min(size, 2_000))}

    assert len(visited) == min(size, 2_000)
    assert all(space.parameters[name].contains(v) for name, v in sampler._point(size - 1).items())


@given(parameter=parameters)
def test_grid_points_rise_from_end_to_end(parameter: Float | Int | Choice) -> None:
    points = grid_points(parameter)

    if isinstance(parameter, Choice):
        assert points == list(parameter.choices)
    else:
        assert (points[0], points[-1]) == (parameter.low, parameter.high)
        assert points == sorted(set(points))
        assert len(points) <= 5


def test_grid_points_lie_evenly_on_the_scale() -> None:
    assert grid_points(Int(3, 7, default=3)) == [3, 4, 5, 6, 7]
    assert grid_points(Int(1, 256, log=True, default=1)) == [1, 4, 16, 64, 256]
    assert grid_points(Float(0.0, 1.0, default=0.0)) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert grid_points(Float(1e-4, 1.0, log=True, default=1.0)) == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_a_grid_study_ends_with_its_last_point_even_if_one_failed(storage: BaseStorage, name: str) -> None:
    small = Space(Group("g", lr=Choice(0.01, 0.1, default=0.1), depth=Int(1, 3, default=2)))
    study = Study.open(storage, name, replace(SETTINGS, space=small, strategy="grid"))
    failing = study.ask()
    study.tell(failing.number, "failed", reason="out of memory")
    interrupted = study.ask()
    study.tell(interrupted.number, "interrupted")
    assert study.remaining(100) == 5

    run_trials(Study.open(storage, name, study.settings), 100)

    points = [tuple(trial.values.values()) for trial in study.trials()]
    assert len(points) == len(set(points)) == grid_size(small) == 6
    assert study.num_finished == 5


def test_a_grid_too_large_to_be_listed_is_searched_all_the_same() -> None:
    large = Space(Group("g", **{f"x{i}": Float(0.0, 1.0, default=0.5) for i in range(40)}))
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, space=large, strategy="grid"))

    first = [study.ask().values["x0"] for _ in range(10)]

    assert set(first) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert study.remaining(1000) == 990


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
    return ends


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
    assert study.num_finished == total == counts["complete"] + counts["pruned"] + counts["diverged"]
    assert counts["running"] == 0
    assert len(study.trials()) == sum(counts.values())


def test_running_trials_are_not_asked_for_twice(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, SETTINGS)

    remaining = []
    for _ in range(4):
        remaining.append(study.remaining(4))
        study.ask()

    assert remaining == [4, 3, 2, 1]
    assert (study.remaining(4), study.remaining(6)) == (0, 2)
    assert study.num_finished == 0


def test_an_interrupted_trial_comes_back_with_its_number_values_and_curve(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, SETTINGS)
    run_trials(study, 1)
    first = study.ask()
    study.report(first.number, 1, 0.25)
    study.tell(first.number, "interrupted", reason="stopped by hand", best_epoch=1)
    assert study.trials()[1].state == "interrupted"
    assert study.trials()[1].reason == "stopped by hand"

    study = Study.open(storage, name, SETTINGS)
    again = study.ask()

    assert again == replace(first, attempt=2)
    assert study.report(again.number, 1, 0.99) is False
    study.report(again.number, 2, 0.5)
    study.tell(again.number, "complete", value=0.5, best_epoch=2)
    record = study.trials()[1]
    assert (record.state, record.attempts, record.reason, record.best_epoch) == ("complete", 2, None, 2)
    assert record.curve == {1: 0.25, 2: 0.5}
    assert study.ask().number == 2


def test_a_diverged_trial_counts_as_worse_than_any_other(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, SETTINGS)
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


def test_a_trial_that_diverges_in_its_first_epoch_has_no_value(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, replace(SETTINGS, strategy="cmaes"))
    for _ in range(3):
        study.tell(study.ask().number, "diverged")

    assert [(record.state, record.value, record.best_epoch) for record in study.trials()] == [
        ("diverged", None, None)
    ] * 3


def test_a_failed_trial_keeps_its_reason_and_does_not_count(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, SETTINGS)

    study.tell(study.ask().number, "failed", reason="RuntimeError: out of memory")

    assert study.remaining(3) == 3
    assert (study.trials()[0].state, study.trials()[0].reason) == ("failed", "RuntimeError: out of memory")


@pytest.mark.parametrize(("direction", "best"), [(Direction.MAXIMIZE, 2), (Direction.MINIMIZE, 1)])
def test_the_best_trial_and_its_best_epoch_follow_the_direction(
    direction: Any, best: int, storage: BaseStorage, name: str
) -> None:
    study = Study.open(storage, name, replace(SETTINGS, direction=direction))
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


def test_inactive_parameters_are_recorded_as_inactive(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, replace(SETTINGS, space=SPACE.narrow(["optimizer=adam,sgd"])))
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
    strategy: str, storage: BaseStorage, name: str
) -> None:
    study = Study.open(storage, name, replace(SETTINGS, strategy=strategy))

    study.enqueue(BY_HAND, "tried by hand")
    suggestions = run_trials(study, 5)

    assert values_of(suggestions)[:3] == [SPACE.defaults(), *BY_HAND]
    assert [suggestion.stage for suggestion in suggestions[:3]] == [DEFAULT_CONFIGURATION] + ["tried by hand"] * 2
    assert [trial.stage for trial in study.trials()] == [suggestion.stage for suggestion in suggestions]
    assert "tried by hand" not in [suggestion.stage for suggestion in suggestions[3:]]
    assert study.trials()[1].inactive == ("momentum",)
    assert study.counts()["complete"] == 5


def test_given_configurations_are_queued_once_whatever_became_of_them(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, SETTINGS)
    for total in (0, 2, 4):
        run_trials(study, total)
        study = Study.open(storage, name, SETTINGS)
        study.enqueue([SPACE.defaults() | {"lr": 0.01}, *BY_HAND], "tried by hand")
    run_trials(study, 5)

    assert values_of(run_trials(study, 6)) != []
    assert [trial.values for trial in study.trials()].count(BY_HAND[0]) == 1
    assert [trial.stage for trial in study.trials()].count("tried by hand") == 2
    assert len(study.trials()) == 6


def test_configurations_that_are_given_later_take_the_next_numbers(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, SETTINGS)
    run_trials(study, 3)
    under_way = study.ask()

    study.enqueue(BY_HAND, "tried by hand")

    assert [(suggestion.number, suggestion.values) for suggestion in (study.ask(), study.ask())] == [
        (4, BY_HAND[0]),
        (5, BY_HAND[1]),
    ]
    assert study.trials()[under_way.number].stage != "tried by hand"


def test_what_waits_to_be_tried_is_queued_and_not_interrupted(storage: BaseStorage, name: str) -> None:
    study = Study.open(storage, name, SETTINGS)
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


def test_a_given_whole_number_is_the_real_number_that_the_study_has(storage: BaseStorage, name: str) -> None:
    space = Space(Group("g", lr=Float(0, 10, default=1), depth=Int(1, 3, default=2)))
    study = Study.open(storage, name, replace(SETTINGS, space=space))

    study.enqueue([space.configure("lr=1"), {"lr": 1, "depth": 2}, {"lr": 1, "depth": 3}], "tried by hand")

    assert [trial.values for trial in study.trials()] == [{"lr": 1.0, "depth": 2}, {"lr": 1.0, "depth": 3}]


# --- death of the coordinator -----------------------------------------------------------------------------------------


def run_python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )


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
    coordinator = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(tmp_path)],
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
    num_suggested: int, storage: BaseStorage, name: str
) -> None:
    uninterrupted = run_trials(Study.open(storage, f"{name} at once", SETTINGS), 3)[-1]
    study = Study.open(storage, name, SETTINGS)
    run_trials(study, 2)
    cut_off = study._optuna.ask(dict(islice(DISTRIBUTIONS.items(), num_suggested)))

    study = Study.open(storage, name, SETTINGS)
    assert study.trials()[-1].state == "running"
    assert study.owners() == {cut_off.number: ""}
    study.requeue([cut_off.number])
    again = study.ask()

    assert again == uninterrupted
    assert len(study.trials()) == 3


# --- settings ---------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> StudySettings:
    return replace(SETTINGS, **changes)


def with_group(**parameters: Any) -> StudySettings:
    """The settings with some parameters of 'step size' declared otherwise; None drops one."""
    first = SPACE.groups[0].parameters | parameters
    return changed(
        space=Space(Group("step size", **{n: p for n, p in first.items() if p is not None}), *SPACE.groups[1:])
    )


@pytest.mark.parametrize(
    ("asked", "difference"),
    [
        (changed(seed=1), "--seed 0, not 1"),
        (changed(task="cifar10"), "task digits, not cifar10"),
        (changed(strategy="tpe"), "--strategy priority, not tpe"),
        (changed(pruner="sha"), "--pruner none, not sha"),
        (changed(max_epochs=30), "--epochs 3, not 30"),
        (changed(metric="loss", direction=Direction.MINIMIZE), "--metric accuracy, not loss"),
        (changed(limit=500), "no --limit, not 500"),
        (changed(space=SPACE.narrow(["lr=1e-3:0.1"])), "lr (in 'step size') 0.0001:1 (log), not 0.001:0.1 (log)"),
        (changed(space=SPACE.narrow(["optimizer=sgd"]), seed=2), "--seed 0, not 2; optimizer (in 'archi"),
        (with_group(lr=Float(1e-4, 1.0, log=True, default=0.1)), "lr (in 'step size') default 0.01, not 0.1"),
        (with_group(batch_size=None), "batch_size (in 'step size'), which is gone"),
        (with_group(clip=Float(0.0, 1.0, default=0.0)), "no clip (in 'step size')"),
        (
            changed(space=Space(*reversed(SPACE.groups))),
            "the groups step size, architecture and optimizer, regularization, not regularization, architecture",
        ),
    ],
)
def test_a_study_made_with_other_settings_is_refused_and_every_difference_named(
    asked: StudySettings, difference: str, storage: BaseStorage
) -> None:
    Study.open(storage, "made", SETTINGS)
    before = written(storage)

    with pytest.raises(StudyMismatchError) as refusal:
        Study.open(storage, "made", asked)

    assert str(refusal.value).startswith(f"study 'made' was made with {difference}")
    assert str(refusal.value).endswith(". Use the same settings, or another name with --study.")
    assert written(storage) == before


def written(storage: BaseStorage) -> list[str]:
    with storage.engine.connect() as connection:
        return list(connection.connection.driver_connection.iterdump())


def test_a_limit_that_is_dropped_or_a_seed_of_0_is_named_too(storage: BaseStorage, name: str) -> None:
    Study.open(storage, name, replace(SETTINGS, limit=500, seed=1))

    with pytest.raises(StudyMismatchError, match="--seed 1, not 0; --limit 500, not none"):
        Study.open(storage, name, SETTINGS)


def test_other_overrides_that_leave_the_same_space_and_conditions_written_otherwise_are_no_difference(
    storage: BaseStorage, name: str
) -> None:
    made = replace(SETTINGS, space=SPACE.narrow(["lr=0.1:1"]), overrides=("lr=0.1:1",))
    Study.open(storage, name, made)

    Study.open(storage, name, replace(made, overrides=("lr=1e-1:1.0",)))
    study = Study.open(storage, name, replace(made, space=Space(*made.space.groups)))

    assert study.settings.overrides == ("lr=0.1:1",)


@pytest.mark.parametrize("wrong", [{"strategy": "best"}, {"pruner": "best"}])
def test_an_unknown_name_is_refused_before_the_study_is_made(
    wrong: dict[str, Any], storage: BaseStorage, name: str
) -> None:
    with pytest.raises(UnknownNameError):
        Study.open(storage, name, replace(SETTINGS, **wrong))

    assert read_settings(storage, name) is None


@settings(max_examples=30)
@given(space=spaces)
def test_settings_are_read_back_as_they_were_written(space: Space) -> None:
    made = replace(SETTINGS, space=space, overrides=("lr=1",), limit=7)

    again = StudySettings.from_dict(json.loads(json.dumps(made.to_dict())))

    assert again.to_dict() == made.to_dict()
    assert replace(again, space=space) == made
    assert again.space.parameters == space.parameters


def test_conditions_are_read_back(storage: BaseStorage, name: str) -> None:
    Study.open(storage, name, SETTINGS)

    space = Study.load(storage, name).settings.space

    assert space.to_dict() == SPACE.to_dict()
    assert "momentum" not in space.active(SPACE.defaults() | {"optimizer": "adam"})


def test_an_unknown_study_is_refused_with_the_near_miss(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    Study.open(storage, "digits", SETTINGS)

    with pytest.raises(UnknownNameError, match=r"no study 'digit'; did you mean 'digits'\? Available: digits\."):
        Study.load(storage, "digit")


def test_studies_that_hpo_did_not_make_are_left_alone(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    optuna.create_study(study_name="foreign", storage=storage).add_trial(optuna.trial.create_trial(value=1.0))
    Study.open(storage, "ours", SETTINGS)

    assert [study.name for study in list_studies(storage)] == ["ours"]
    with pytest.raises(StoreError, match="study 'foreign' was not made by hpo"):
        Study.open(storage, "foreign", SETTINGS)


def test_a_study_whose_making_was_cut_off_is_made_by_the_next_command(storage: BaseStorage, name: str) -> None:
    optuna.create_study(study_name=name, storage=storage, direction=SETTINGS.direction)

    Study.open(storage, name, SETTINGS)

    assert Study.load(storage, name).settings.task == "digits"


def test_a_study_of_a_newer_hpo_is_refused(storage: BaseStorage, name: str) -> None:
    study = optuna.create_study(study_name=name, storage=storage)
    study.set_user_attr("hpo:settings", {"format": FORMAT + 1})

    with pytest.raises(StoreError, match="newer version of hpo; upgrade"):
        Study.load(storage, name)


def test_facts_about_a_study_are_kept(storage: BaseStorage, name: str) -> None:
    Study.open(storage, name, SETTINGS).record("winner", {"trial": 3, "scores": [0.5, None]})

    study = Study.load(storage, name)

    assert study.recorded("winner") == {"trial": 3, "scores": [0.5, None]}
    assert study.recorded("settings") is None


# --- storage ----------------------------------------------------------------------------------------------------------

OPEN_AND_ASK = """
import sys
from pathlib import Path
from hpo.config import Direction
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.search.settings import StudySettings
from hpo.space import Float, Group, Space
study = Study.open(open_storage(Path(sys.argv[1])), sys.argv[2], StudySettings(
    task="t", space=Space(Group("g", x=Float(0.0, 1.0, default=0.5))), seed=0, strategy="priority", pruner="sha",
    max_epochs=3, metric="m", direction=Direction.MINIMIZE, limit=None, planned_trials=3))
study.tell(study.ask().number, "complete", value=1.0)
print("torch" in sys.modules)
"""


def test_processes_may_make_the_same_storage_at_once_and_none_loads_torch(tmp_path: Path) -> None:
    processes = [run_python(OPEN_AND_ASK, tmp_path / "home", f"study-{i}") for i in range(3)]

    printed = [process.communicate()[0].strip() for process in processes]

    assert [process.returncode for process in processes] == [0] * 3
    assert printed == ["False"] * 3
    studies = list_studies(open_storage(tmp_path / "home"))
    assert sorted(study.name for study in studies) == [f"study-{i}" for i in range(3)]
    assert [study.num_finished for study in studies] == [1] * 3


def test_the_storage_is_a_write_ahead_log_below_any_path(tmp_path: Path) -> None:
    home = tmp_path / "odd {name} ?a=b#c %20"

    Study.open(open_storage(home), "study", SETTINGS)

    with sqlite3.connect(home / "optuna.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT study_name FROM studies").fetchall() == [("study",)]


@pytest.mark.parametrize("damage", ["not a database", "page overwritten", "cut short"])
def test_a_damaged_file_is_named_with_what_helps(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "optuna.db"
    run_trials(Study.open(open_storage(tmp_path), "study", SETTINGS), 3)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for log in tmp_path.glob("optuna.db-*"):
        log.unlink()
    content = path.read_bytes()
    middle = len(content) // 2
    match damage:
        case "not a database":
            path.write_bytes(b"PK\x03\x04" * 2000)
        case "page overwritten":
            path.write_bytes(content[:8192] + b"\xff" * 40960 + content[49152:])
        case "cut short":
            path.write_bytes(content[:middle])

    with pytest.raises(StoreError, match=r"optuna\.db is damaged .*move it away") as refusal:
        open_storage(tmp_path)

    assert "\n" not in str(refusal.value)


def test_a_home_that_is_a_file_is_named_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")

    with pytest.raises(StoreError, match=r"home/optuna\.db cannot be opened: .*--home"):
        open_storage(tmp_path / "home")


def test_tables_of_another_optuna_are_refused(tmp_path: Path) -> None:
    open_storage(tmp_path)
    with sqlite3.connect(tmp_path / "optuna.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.9.9.a'")

    with pytest.raises(StoreError, match=r"optuna\.db is of another version of Optuna"):
        open_storage(tmp_path)


def test_reading_a_home_without_studies_writes_nothing(tmp_path: Path) -> None:
    storage = read_storage(tmp_path / "home")

    assert list_studies(storage) == []
    with pytest.raises(UnknownNameError, match="There is no study yet"):
        Study.load(storage, "digits")
    assert not (tmp_path / "home").exists()


def test_reading_a_home_shows_what_a_search_wrote(tmp_path: Path) -> None:
    run_trials(Study.open(open_storage(tmp_path), "study", SETTINGS), 2)

    assert [record.number for record in Study.load(read_storage(tmp_path), "study").trials()] == [0, 1]
