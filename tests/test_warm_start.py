"""Configurations of an earlier study, as another study of its task tries them first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import studies
from optuna.storages import InMemoryStorage

from hpo.config import Direction
from hpo.errors import UnknownNameError, UsageError
from hpo.parameters import Choice, Float, Int, Value
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.search.warm_start import MIN_DISTANCE, NUM_CONFIGURATIONS, best_configurations, translate
from hpo.session.options import checked
from hpo.session.request import Proposal, find_proposals, this_machine
from hpo.session.search import run_search
from hpo.space import Group, Space

SPACE = Space(
    Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), batch_size=Choice(64, 128, 256, default=128)),
    Group(
        "optimizer",
        optimizer=Choice("sgd", "adam", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        depth=Int(1, 8, default=4),
    ),
)
SETTINGS = replace(studies.SETTINGS, space=SPACE, strategy="random")


def a_study(configurations: list[dict[str, Value]], **changes: Any) -> Study:
    """An earlier study whose trials are these, the best first."""
    study = Study.open(InMemoryStorage(), "earlier", replace(SETTINGS, **changes))
    study.enqueue(configurations, "tried by hand")
    for _ in range(len(configurations) + 1):
        suggestion = study.ask()
        study.tell(suggestion.number, "complete", value=-float(suggestion.number or 100), best_epoch=1)
    return study


def given(**values: Value) -> dict[str, Value]:
    return SPACE.defaults() | values


@pytest.mark.parametrize(
    ("space", "values", "expected"),
    [
        (SPACE, given(lr=0.3, depth=2), given(lr=0.3, depth=2)),
        (SPACE.narrow(["lr=1e-3:0.1"]), given(lr=0.3), given(lr=0.1)),
        (SPACE.narrow(["batch_size=64,128"]), given(batch_size=256), given(batch_size=128)),
        (SPACE.narrow(["lr=0.01,0.1"]), given(lr=0.3), given(lr=0.1)),
        (SPACE.narrow(["optimizer=adam"]), given(lr=0.3), given(lr=0.3, optimizer="adam")),
        (
            Space(Group("g", lr=Int(1, 3, default=1), depth=Float(0, 4, default=1), width=Int(8, 64, default=16))),
            given(lr=0.3, depth=8),
            {"lr": 1, "depth": 4.0, "width": 16},
        ),
        (
            Space(Group("g", lr=Choice("low", "high", default="low"), optimizer=Float(0, 1, default=0.5))),
            given(),
            {"lr": "low", "optimizer": 0.5},
        ),
    ],
    ids=["same", "clipped", "nearest choice", "range to list", "unknown choice", "other types", "other meaning"],
)
def test_a_configuration_is_translated_to_another_space(
    space: Space, values: dict[str, Value], expected: dict[str, Value]
) -> None:
    record = a_study([values]).trials()[1]

    translated = translate(record, space)

    assert translated == {name: value for name, value in expected.items() if name in space.parameters}
    assert list(translated) == list(space.parameters)
    assert all(parameter.contains(translated[name]) for name, parameter in space.parameters.items())


def test_a_value_that_was_without_effect_is_not_taken_over() -> None:
    record = a_study([given(optimizer="adam", momentum=0.6)]).trials()[1]

    assert record.values["momentum"] == 0.6
    assert translate(record, SPACE)["momentum"] == 0.9


def test_the_best_configurations_that_differ_are_chosen() -> None:
    near, far = given(lr=0.3, depth=2), given(lr=0.3, depth=8)
    twin = near | {"lr": 0.25}
    study = a_study([near, twin, far, *[given(lr=0.001, depth=depth) for depth in range(1, 9)]])

    chosen = best_configurations(study, SPACE)

    assert chosen[:2] == [near, far]
    assert twin not in chosen
    assert len(chosen) <= NUM_CONFIGURATIONS


def test_no_more_than_a_few_are_chosen_however_many_differ() -> None:
    study = a_study(
        [
            given(batch_size=size, optimizer=optimizer, depth=depth)
            for size in (64, 128, 256)
            for optimizer in ("sgd", "adam")
            for depth in (1, 8)
        ]
    )

    assert len(best_configurations(study, SPACE)) == NUM_CONFIGURATIONS
    assert MIN_DISTANCE > 0


@pytest.mark.parametrize("direction", [*Direction])
def test_the_best_follow_the_direction_of_the_earlier_study(direction: Any) -> None:
    first, last = given(lr=0.3, depth=1), given(lr=0.001, depth=8)

    chosen = best_configurations(a_study([first, last], direction=direction), SPACE)

    assert chosen[0] == (first if direction == "maximize" else SPACE.defaults())


def test_a_study_without_results_or_with_nothing_in_common_is_refused() -> None:
    with pytest.raises(UsageError, match="--warm-start earlier: no trial of study 'earlier' has a result"):
        best_configurations(Study.open(InMemoryStorage(), "earlier", SETTINGS), SPACE)
    other = Space(Group("g", width=Int(8, 64, default=16)))
    with pytest.raises(UsageError, match=r"study 'earlier' searched lr, .*, none of which is searched here"):
        best_configurations(a_study([]), other)


# --- the option ------------------------------------------------------------------------------------------------------


@pytest.fixture
def propose(tmp_path: Path) -> Callable[..., list[Proposal]]:
    """What `hpo search --study now ... --warm-start ...` would try first, with an earlier study in the home."""
    storage = open_storage(tmp_path)
    for name, task in (("earlier", "digits"), ("alien", "cifar10")):
        study = Study.open(storage, name, replace(SETTINGS, task=task))
        study.tell(study.ask().number, "complete", value=0.5, best_epoch=1)

    def run(*sources: str, strategy: str = "priority") -> list[Proposal]:
        machine = this_machine(checked({"home": tmp_path, "device": "cpu"}))
        return find_proposals(machine, "now", replace(SETTINGS, strategy=strategy), ("lr=0.1",), sources)

    return run


def test_what_is_given_by_hand_comes_before_earlier_studies(propose: Callable[..., list[Proposal]]) -> None:
    assert [proposal.stage for proposal in propose("earlier")] == ["tried by hand", "from study earlier"]


def test_an_earlier_study_is_taken_over_once(propose: Callable[..., list[Proposal]], tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "now", SETTINGS)
    (proposal,) = propose("earlier")[1:]
    study.enqueue([*proposal.configurations, given(lr=0.5)], proposal.stage)

    assert [proposal.stage for proposal in propose("earlier")] == ["tried by hand"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("earlie", "no study 'earlie'; did you mean 'earlier'"),
        ("alien", "--warm-start alien: study 'alien' is of task 'cifar10', not 'digits'; name a study of 'digits'"),
        ("now", "--warm-start now is the study itself"),
    ],
)
def test_an_earlier_study_that_cannot_be_used_is_refused(
    propose: Callable[..., list[Proposal]], source: str, message: str
) -> None:
    with pytest.raises((UsageError, UnknownNameError), match=message):
        propose("earlier", source)


def test_a_search_tries_what_it_is_given_first_and_the_same_command_changes_nothing(home: Path) -> None:
    options: dict[str, Any] = {"home": home, "epochs": 1, "workers": 1, "limit": 400, "pruner": "none"}
    run_search("digits", trials=1, study="earlier", **options)
    options |= {"tries": ["lr=0.2,depth=1", "depth=3"], "warm_starts": ["earlier"], "overrides": ["lr=0.02:0.3"]}
    run_search("digits", trials=3, study="now", **options)

    outcome = run_search("digits", trials=5, study="now", **options)

    trials = Study.load(open_storage(home), "now").trials()
    stages = ["default configuration", "tried by hand", "tried by hand"]
    assert [trial.stage for trial in trials[:3]] == stages
    assert (trials[1].values["lr"], trials[1].values["depth"], trials[2].values["depth"]) == (0.2, 1, 3)
    assert outcome.counts["complete"] == len(trials) == 5
    assert sum(trial.stage == "tried by hand" for trial in trials) == 2
