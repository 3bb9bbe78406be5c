"""An earlier study, whose configurations another study tries first, and whose trials its model learns from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import studies
from optuna.storages import InMemoryStorage

from hpo.config import Direction
from hpo.errors import UnknownNameError, UsageError
from hpo.parameters import Choice, Float, Int, Value
from hpo.search.encoding import Encoding
from hpo.search.gaussian_process import GaussianProcess, standardized
from hpo.search.prior import Prior
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.search.warm_start import (
    MIN_DISTANCE,
    NUM_CONFIGURATIONS,
    NUM_OF_ANOTHER_TASK,
    best_configurations,
    observations,
    translate,
)
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


# --- trials as data --------------------------------------------------------------------------------------------------

LINE = Space(Group("line", x=Float(0.0, 1.0, default=0.5), y=Float(0.0, 1.0, default=0.5)))


def loss_at(values: dict[str, Value]) -> float:
    return (float(values["x"]) - 0.7) ** 2 + (float(values["y"]) - 0.35) ** 2


def searched(study: Study, num_trials: int) -> Study:
    for _ in range(num_trials):
        suggestion = study.ask()
        study.tell(suggestion.number, "complete", value=loss_at(suggestion.values), best_epoch=1)
    return study


def a_line(name: str, **changes: Any) -> Study:
    chosen: dict[str, Any] = {"space": LINE, "direction": Direction.MINIMIZE, "strategy": "priority"} | changes
    return Study.open(InMemoryStorage(), name, replace(SETTINGS, **chosen))


def test_trials_become_data_over_the_parameters_that_both_have() -> None:
    earlier = a_study([given(optimizer="adam", momentum=0.6, lr=0.3), given(lr=0.5, depth=8)])
    space = Space(
        Group(
            "g",
            lr=Float(1e-4, 0.4, log=True, default=1e-2),
            momentum=Float(0.5, 0.99, default=0.8),
            new=Int(1, 9, default=2),
        )
    )

    seen = observations(earlier, space)

    # lr=0.5 is outside of this space, and momentum was without effect in the first.
    assert [each["values"] for each in seen] == [{"lr": 0.3, "momentum": 0.8}, {"lr": 0.01, "momentum": 0.9}]
    assert seen[0]["loss"] < seen[1]["loss"]


def test_a_prior_that_agrees_leads_and_one_that_contradicts_is_dropped() -> None:
    encoding = Encoding(LINE)
    (prior,) = Prior.read(encoding, {"earlier": observations(searched(a_line("earlier", strategy="qmc"), 20), LINE)})
    units = np.random.default_rng(0).uniform(size=(8, 2))
    losses = standardized(np.array([loss_at(encoding.values(point)) for point in units]))
    process, opposed = (GaussianProcess.fit(units, sign * losses, encoding.owners) for sign in (1.0, -1.0))
    expected = prior.predict(units) - prior.predict(units).mean()

    assert prior.predict(np.array([[0.7, 0.35]])) < prior.predict(np.array([[0.1, 0.9]])) - 1
    assert process.scale_of(expected) > 0.5
    assert opposed.scale_of(expected) == 0.0


def test_the_first_modelled_trial_is_where_another_study_was_best_also_after_a_restart() -> None:
    data = observations(searched(a_line("earlier", strategy="qmc"), 20), LINE)
    alone, led = searched(a_line("now"), 4), searched(a_line("now"), 4)
    led.learn_from("earlier", data)

    restarted = Study.load(led._storage, "now").ask().values

    assert loss_at(restarted) < 0.005 < loss_at(alone.ask().values)


def test_data_that_no_longer_fits_the_space_says_nothing() -> None:
    data = observations(searched(a_line("earlier", strategy="qmc"), 20), LINE)
    for each in data[4:]:
        each["values"]["x"] = 2.0

    assert Prior.read(Encoding(LINE), {"earlier": data}) == []


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


def test_of_another_task_fewer_configurations_are_tried_but_all_trials_are_data(
    propose: Callable[..., list[Proposal]], tmp_path: Path
) -> None:
    study = Study.open(open_storage(tmp_path), "many", replace(SETTINGS, task="cifar10"))
    study.enqueue([given(optimizer=name, depth=depth) for name in ("sgd", "adam") for depth in (1, 8)], "by hand")
    for _ in range(5):
        study.tell(study.ask().number, "complete", value=0.5, best_epoch=1)

    proposal = propose("many")[1]

    assert (len(proposal.configurations), len(proposal.observations)) == (NUM_OF_ANOTHER_TASK, 5)


def test_an_earlier_study_is_taken_over_once(propose: Callable[..., list[Proposal]], tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "now", SETTINGS)
    (proposal,) = propose("earlier")[1:]
    study.enqueue([*proposal.configurations, given(lr=0.5)], proposal.stage)

    assert [proposal.stage for proposal in propose("earlier")] == ["tried by hand"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("earlie", "no study 'earlie'; did you mean 'earlier'"),
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
