"""The strategies: what they ask for, `priority` and its stages, grids."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import optuna
import pytest
from helpers.studies import (
    DISTRIBUTIONS,
    SETTINGS,
    SPACE,
    accuracy,
    parameters,
    run_trials,
    spaces,
    values_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import BaseStorage, InMemoryStorage

from hpo.errors import UnknownNameError
from hpo.parameters import Choice, Float, Int
from hpo.plugins import SEARCH_SPACES, load_task, registered
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
from hpo.search.pruners import build_pruner
from hpo.search.strategies import STRATEGIES, GridSampler, build_sampler, grid_points, grid_size
from hpo.search.study import Study
from hpo.space import Group, Space

# --- strategies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_study_reopened_every_few_trials_asks_what_an_uninterrupted_one_asks(
    strategy: str, storage: BaseStorage, study_name: str
) -> None:
    chosen = replace(SETTINGS, strategy=strategy, max_epochs=1)
    at_once = run_trials(Study.open(storage, study_name, chosen), 12)

    piecewise = []
    for total in (2, 7, 11, 12):
        piecewise += run_trials(Study.open(storage, f"{study_name} again", chosen), total)

    assert [suggestion.number for suggestion in piecewise] == list(range(12))
    assert values_of(piecewise) == values_of(at_once)
    assert len({str(values) for values in values_of(at_once)}) > 10


AWKWARD = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=1e-2),
        flag=Choice(1, True, default=True),
        depth=Choice(None, 0, 10, default=None),
        kernel=Choice((3, 3), (5, None), default=(5, None)),
        padding=Int(0, 2, default=0, when={"kernel": (3, 3), "flag": True}),
        words=Choice("a" * 3000, "b" * 3000, default="a" * 3000),
    )
)
"""Choices that are one for Python, None, tuples, and more text than Optuna keeps of a declaration."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_choices_that_optuna_cannot_store_are_searched_and_come_back_as_they_are(
    strategy: str, storage: BaseStorage, study_name: str
) -> None:
    chosen = replace(SETTINGS, space=AWKWARD, strategy=strategy, max_epochs=1)

    def worth(values: dict[str, Any]) -> float:
        return (values["depth"] or 0) - (values["flag"] is True) - (values["kernel"] == (3, 3))

    asked = []
    for _ in range(2):  # and resumed
        study = Study.open(storage, study_name, chosen)
        study.enqueue([AWKWARD.configure("flag=1,kernel=(3,3),depth=0")], "by hand")
        for _ in range(6):
            suggestion = study.ask()
            asked.append(suggestion)
            study.report(suggestion.number, 1, worth(suggestion.values))
            study.tell(suggestion.number, "complete", value=worth(suggestion.values), best_epoch=1)

    assert repr(asked[0].values) == repr(AWKWARD.defaults())
    by_hand = next(each for each in asked if each.stage == "by hand")
    assert repr({**by_hand.active_values, "words": ""}) == (
        "{'lr': 0.01, 'flag': 1, 'depth': 0, 'kernel': (3, 3), 'words': ''}"
    )
    records = Study.load(storage, study_name).trials()
    assert [repr(record.values) for record in records] == [repr(each.values) for each in asked]
    assert [record.inactive for record in records] == [
        () if repr((values["flag"], values["kernel"])) == "(True, (3, 3))" else ("padding",)
        for values in values_of(asked)
    ]
    if strategy != "grid":  # whose first points vary the last parameter alone
        assert len({repr((each.values["flag"], each.values["kernel"])) for each in asked}) > 2
    assert {*map(type, (record.values["flag"] for record in records))} <= {int, bool}
    assert Study.load(storage, study_name).settings.space.to_dict() == AWKWARD.to_dict()


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
    twins = Space(Group("twins", **{f"x{i}": Float(0.0, 1.0, default=0.5) for i in range(4)}))  # type: ignore[arg-type]
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

    assert set(study._optuna.sampler.infer_relative_search_space(study._optuna, trial)) == set(SPACE.parameters)  # type: ignore[arg-type]


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
    sampler = build_sampler("priority", task.space, seed=0, num_trials=40)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    distributions = {parameter: distribution(declared) for parameter, declared in task.space.parameters.items()}
    drawn: dict[str, set[object]] = {parameter: set() for parameter in distributions}
    for number in range(40):
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


def test_stages_of_a_study_read_as_a_plan(storage: BaseStorage, study_name: str) -> None:
    stages = [suggestion.stage for suggestion in run_trials(Study.open(storage, study_name, SETTINGS), 8)]

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


def test_more_trials_later_do_not_move_the_stages(storage: BaseStorage, study_name: str) -> None:
    run_trials(Study.open(storage, study_name, SETTINGS), 4)

    grown = Study.open(storage, study_name, replace(SETTINGS, planned_trials=100))

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


def test_groups_in_which_everything_is_fixed_do_not_take_up_a_stage(storage: BaseStorage, study_name: str) -> None:
    fixed = replace(SETTINGS, space=SPACE.narrow(["lr=0.1", "batch_size=64"]))

    suggestions = run_trials(Study.open(storage, study_name, fixed), 6)

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


def test_scouts_asked_for_before_anything_is_known_reach_every_quarter_of_each_range() -> None:
    space = Space(*(Group(name, closed=False, **{name: Float(0.0, 1.0, default=0.5)}) for name in "abcd"))
    distributions = {name: distribution(parameter) for name, parameter in space.parameters.items()}
    study = optuna.create_study(sampler=PrioritySampler(space, seed=3))
    trials = [study.ask(distributions) for _ in range(16)]

    for name in space.parameters:
        assert {int(4 * scout.params[name]) for scout in trials[1::2]} == {0, 1, 2, 3}


# --- grid -------------------------------------------------------------------------------------------------------------


@given(space=spaces)
@settings(max_examples=50)
def test_a_grid_visits_each_of_its_points_once(space: Space) -> None:
    sampler = GridSampler(space, seed=3)
    size = grid_size(space)
    visited = {repr(sampler._point(number)) for number in range(min(size, 2_000))}

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


def test_a_grid_study_ends_with_its_last_point_even_if_one_failed(storage: BaseStorage, study_name: str) -> None:
    small = Space(Group("g", lr=Choice(0.01, 0.1, default=0.1), depth=Int(1, 3, default=2)))
    study = Study.open(storage, study_name, replace(SETTINGS, space=small, strategy="grid"))
    failing = study.ask()
    study.tell(failing.number, "failed", reason="out of memory")
    interrupted = study.ask()
    study.tell(interrupted.number, "interrupted")
    assert study.remaining(100) == 5

    run_trials(Study.open(storage, study_name, study.settings), 100)

    points = [tuple(trial.values.values()) for trial in study.trials()]
    assert len(points) == len(set(points)) == grid_size(small) == 6
    assert study.num_finished == 5


def test_a_grid_too_large_to_be_listed_is_searched_all_the_same() -> None:
    large = Space(Group("g", **{f"x{i}": Float(0.0, 1.0, default=0.5) for i in range(40)}))  # type: ignore[arg-type]
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, space=large, strategy="grid"))

    first = [study.ask().values["x0"] for _ in range(10)]

    assert set(first) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert study.remaining(1000) == 990
