"""How sure a user is of a default: what a space keeps of it, and what the strategy `priority` makes of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers import studies
from optuna.storages import InMemoryStorage
from rich.console import Console

from hpo.config import Direction
from hpo.errors import SpaceError, StudyMismatchError
from hpo.parameters import Choice, Float, Int
from hpo.search.encoding import Encoding
from hpo.search.optimum import OptimumPrior
from hpo.search.study import Study
from hpo.space import Group, Space
from hpo.terminal.tables import print_space

SPACE = Space(
    Group(
        "g",
        lr=Float(1e-4, 1.0, log=True, default=1e-2, confidence="high"),
        depth=Int(1, 20, default=8, confidence="medium"),
        norm=Choice(None, "batch", ("layer", 2), default="batch", confidence="low", when={"depth": ">=2"}),
        width=Int(8, 64, default=16),
    )
)
SETTINGS = replace(studies.SETTINGS, space=SPACE, strategy="priority", direction=Direction.MINIMIZE)


# --- the space --------------------------------------------------------------------------------------------------------


def test_a_space_keeps_how_sure_the_user_is_of_a_default() -> None:
    stated = {"lr": "high", "depth": "medium", "norm": "low"}
    kept = [
        SPACE,
        Space.from_dict(SPACE.to_dict()),
        SPACE.narrow(["lr=1e-3:1e-1", "depth=2:10", "norm=batch,none"]),
        SPACE.extend(["lr=1e-5:3", "depth=1:30", "norm=group"]),
    ]
    assert [space.confidences() for space in kept] == [stated] * 4


@pytest.mark.parametrize(
    ("override", "left"),
    [
        ("lr=0.1:1", {"depth", "norm"}),
        ("lr=0.1,1", {"depth", "norm"}),
        ("lr=0.01,1", {"lr", "depth", "norm"}),
        ("lr=0.01", {"depth", "norm"}),
        ("norm=none,(layer,2)", {"lr", "depth"}),
        ("norm=batch", {"lr", "depth"}),
    ],
)
def test_it_is_about_a_value_and_ends_where_an_override_takes_that_away(override: str, left: set[str]) -> None:
    assert SPACE.narrow([override]).confidences().keys() == left


def test_a_space_without_a_statement_is_declared_as_before() -> None:
    plain = Space(Group("g", lr=Float(0.1, 1.0, default=0.5), norm=Choice("a", "b", default="a")))

    assert "confidence" not in str(plain.to_dict())
    assert plain.confidences() == {}


@pytest.mark.parametrize("confidence", ["High", 0.9, ["low"]])
def test_an_unknown_level_is_refused_with_the_levels_that_there_are(confidence: Any) -> None:
    for parameter in (Float(0, 1, default=0.5, confidence=confidence), Choice(1, 2, default=1, confidence=confidence)):
        with pytest.raises(SpaceError, match=r"x \(in 'g'\): confidence .* is not one of low, medium, high"):
            Space(Group("g", x=parameter))


def test_a_space_is_shown_with_it() -> None:
    console = Console(record=True, width=100)

    print_space(console, SPACE.narrow(["depth=3"]), ())

    assert "0.01 (high confidence)" in (text := console.export_text())
    assert "medium" not in text


def test_a_study_keeps_it_and_another_level_is_another_study() -> None:
    storage = InMemoryStorage()
    Study.open(storage, "s", SETTINGS)
    surer = Space.from_dict(SPACE.to_dict() | {"g": SPACE.to_dict()["g"] | {"depth": DEPTH_WITHOUT}})

    assert Study.load(storage, "s").settings.space.confidences() == SPACE.confidences()
    with pytest.raises(StudyMismatchError, match=r"depth \(in 'g'\) confidence medium, not none"):
        Study.open(storage, "s", replace(SETTINGS, space=surer))


DEPTH_WITHOUT = {name: value for name, value in SPACE.to_dict()["g"]["depth"].items() if name != "confidence"}


# --- the strategy -----------------------------------------------------------------------------------------------------


def test_points_are_drawn_with_the_density_around_the_defaults() -> None:
    encoding = Encoding(SPACE)
    prior = OptimumPrior(encoding)
    uniform = np.random.default_rng(0).uniform(size=(4000, 4))
    defaults = encoding.units(SPACE.defaults())

    drawn = prior.drawn(uniform)

    assert np.std(drawn[:, 0] - defaults[0]) == pytest.approx(0.125, rel=0.05)
    assert np.std(drawn[:, 1] - defaults[1]) < np.std(uniform[:, 1])
    assert np.mean(drawn[:, 2] == defaults[2]) == pytest.approx(2 / 4, abs=0.03)
    assert (drawn[:, 3] == uniform[:, 3]).all()
    assert prior.log_density(defaults[None]) == 0.0
    shares = [np.mean(drawn[:, 2] == unit) for unit in (1 / 6, 3 / 6)]
    away = np.where(np.arange(4) == 2, 1 / 6, defaults)
    assert prior.log_density(away[None])[0] == pytest.approx(np.log(shares[0] / shares[1]), abs=0.1)


def line(confidence: str | None) -> Space:
    sure = Float(0.0, 1.0, default=0.3, confidence=confidence)
    return Space(Group("line", x=sure, y=sure))


def xs(space: Space, num_trials: int, best: float) -> np.ndarray:
    """Values of x that a search tries after the default, if the optimum has these x and y."""
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, space=space))
    tried = []
    for _ in range(num_trials):
        suggestion = study.ask()
        x, y = float(suggestion.values["x"]), float(suggestion.values["y"])
        study.tell(suggestion.number, "complete", value=(x - best) ** 2 + (y - best) ** 2, best_epoch=1)
        tried.append(x)
    return np.array(tried[1:])


def test_what_the_model_proposes_first_is_near_a_default_that_the_user_is_sure_of() -> None:
    unsure, sure = (np.abs(xs(line(confidence), 9, best=0.35)[3:] - 0.3) for confidence in (None, "high"))

    assert sure.max() < 0.2 < unsure.max()


def test_a_wrong_belief_is_overcome() -> None:
    assert np.abs(xs(line("high"), 20, best=0.95) - 0.95).min() < 0.03


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, None),
        ({"strategy": "tpe"}, "the confidence in the default of lr, depth, norm changes nothing with --strategy tpe"),
        ({"objectives": ("val/accuracy", "params")}, "of lr, depth, norm changes nothing with several objectives"),
        ({"strategy": "tpe", "space": line(None)}, None),
    ],
)
def test_where_it_changes_nothing_the_search_says_so(changes: dict[str, Any], note: str | None) -> None:
    found = replace(SETTINGS, **changes).unused_confidence

    assert found is None if note is None else note in str(found)
