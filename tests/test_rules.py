"""What a space may demand: steps, conditions on numbers, ranges that end at another value, forbidden configurations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from click.testing import CliRunner

from hpo.cli import cli
from hpo.errors import HpoError, SpaceError, StudyMismatchError, UsageError
from hpo.parameters import Choice, Float, Int, Value
from hpo.search.encoding import Encoding, OptunaSpace, distribution
from hpo.search.strategies import STRATEGIES, build_sampler, grid_points
from hpo.session.search import run_search
from hpo.space import Group, Space


def ruled() -> Space:
    return Space(
        Group(
            "architecture",
            depth=Int(1, 4, default=2),
            width=Int(16, 128, step=16, default=64),
            bottleneck=Int(8, "width", default=32, when={"depth": ">=3"}),
        ),
        Group(
            "optimizer",
            optimizer=Choice("sgd", "adamw", default="sgd"),
            lr=Float(1e-4, 1.0, log=True, default=0.1),
            betas=Choice((0.9, 0.99), (0.9, 0.999), None, default=None, when={"optimizer": "adamw"}),
            dropout=Float(0.0, 0.5, step=0.1, default=0.0, when={"width": (16, ">=96")}),
        ),
        forbid=[{"optimizer": "adamw", "lr": ">0.01"}, {"depth": 4, "width": "96:128"}],
    )


def is_right(values: dict[str, Value]) -> bool:
    """The same rules once more, in Python."""
    active = ruled().active(values)
    assert ("bottleneck" in active) == (values["depth"] >= 3)
    assert ("dropout" in active) == (values["width"] == 16 or values["width"] >= 96)
    assert values["width"] % 16 == 0
    assert values["dropout"] in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    return (
        not (values["optimizer"] == "adamw" and values["lr"] > 0.01)
        and not (values["depth"] == 4 and values["width"] >= 96)
        and not ("bottleneck" in active and values["bottleneck"] > values["width"])
    )


@pytest.mark.parametrize("strategy", sorted({*STRATEGIES} - {"grid"}))
def test_every_strategy_keeps_the_rules_of_a_space(strategy: str) -> None:
    """The best configurations lie where none is allowed."""
    as_optuna = OptunaSpace(ruled())
    declared = {name: distribution(parameter) for name, parameter in as_optuna.space.parameters.items()}
    study = optuna.create_study(sampler=build_sampler(strategy, as_optuna.space, seed=1, num_trials=24))
    tried = []
    for _ in range(24):
        trial = study.ask(declared)
        values = as_optuna.decode(trial.params)
        tried.append(values)
        loss = abs(math.log10(values["lr"])) + (values["optimizer"] == "sgd") - values["depth"] - values["width"] / 128
        study.tell(trial, loss)
    assert tried[0] == ruled().defaults()
    assert all(map(is_right, tried))
    assert len({tuple(sorted(values.items(), key=str)) for values in tried}) > 12, "it keeps searching"


def large() -> Space:
    """Thirty parameters, conditions three deep, and a choice of twenty."""
    numbers: dict[str, Any] = {f"x{index}": Float(0.0, 1.0, default=0.5) for index in range(25)}
    return Space(
        Group("numbers", **numbers),
        Group(
            "choices",
            kind=Choice(*(f"kind-{index}" for index in range(20)), default="kind-0"),
            one=Choice(True, False, default=True, when={"kind": ("kind-0", "kind-7")}),
            two=Int(1, 9, default=5, when={"one": True}),
            three=Choice(None, (1, 2), (1, (2, "a")), default=None, when={"two": ">=4", "x0": ">0.1"}),
            four=Float(1e-3, 1.0, log=True, default=0.1, when={"three": ((1, 2), None)}),
        ),
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_large_space_with_deep_conditions_is_searched_by_every_strategy(strategy: str) -> None:
    as_optuna = OptunaSpace(large())
    declared = {name: distribution(parameter) for name, parameter in as_optuna.space.parameters.items()}
    study = optuna.create_study(sampler=build_sampler(strategy, as_optuna.space, seed=1, num_trials=14))
    activity = set()
    for _ in range(14):
        trial = study.ask(declared)
        values = as_optuna.decode(trial.params)
        assert all(large().parameters[name].contains(value) for name, value in values.items())
        activity.add(tuple(large().active(values)))
        study.tell(trial, values["x0"] + (values["kind"] != "kind-7"))
    assert len(activity) > 1, "not always the same parameters are active"


def test_the_grid_refuses_a_space_with_rules() -> None:
    with pytest.raises(UsageError, match=r"^--strategy grid visits every point, and this space forbids some; "):
        build_sampler("grid", ruled(), seed=0, num_trials=3)


def test_an_encoding_sees_the_same_rules() -> None:
    encoding = Encoding(ruled())
    units = encoding.snap(np.random.default_rng(0).uniform(size=(2000, len(encoding.names))))
    values = [encoding.values(point) for point in units]
    assert encoding.allows(units).tolist() == [is_right(each) for each in values]
    assert 500 < encoding.allows(units).sum() < 1900, "both are there"
    inactive = encoding.columns(units)[:, encoding.owners == encoding.names.index("bottleneck")]
    assert (len(np.unique(inactive[[each["depth"] < 3 for each in values]]))) == 1


def test_a_step_gives_the_values_that_are_written() -> None:
    parameter = Float(0.0, 0.5, step=0.1, default=0.3)
    assert grid_points(parameter)[-1] == 0.5
    assert parameter.contains(0.1 + 0.2)
    assert parameter.nearest(0.34) == 0.3
    assert Int(16, 128, step=16, default=16).describe() == "16:128 (step 16)"
    assert grid_points(Int(16, 64, step=16, default=16)) == [16, 32, 48, 64]
    narrowed = Space(Group("g", x=parameter)).narrow(["x=0.1:0.3"])
    assert narrowed.parameters["x"].describe() == "0.1:0.3 (step 0.1)"
    with pytest.raises(SpaceError, match=r"x \(in 'g'\): 0.25 is outside 0:0.5 \(step 0.1\) \(-p x=0.25\)"):
        Space(Group("g", x=parameter)).narrow(["x=0.25"])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Float(0.0, 0.55, step=0.1, default=0.0),
            "is not a whole number of steps of 0.1 above low 0; end at 0.5",
        ),
        (lambda: Float(0.0, 1.0, step=1 / 3, default=0.0), "its steps do not end at 1; take Int(0, 3) and divide"),
        (lambda: Float(0.1, 0.5, step=0.1, log=True, default=0.1), "has step= and log=True; leave one out"),
        (lambda: Float(0.0, 0.5, step=-1, default=0.0), "step -1 is not a number above 0"),
        (lambda: Int(0, 8, step=0.5, default=0), "step 0.5 is not a whole number above 0"),
        (lambda: Float(0.0, 0.5, step=0.1, default=0.25), "default 0.25 is outside 0:0.5 (step 0.1)"),
        (lambda: Int(1, "nothing", default=1), "high 'nothing' is neither a number nor the name of one declared"),
    ],
)
def test_a_wrong_step_or_limit_is_refused(build: Any, message: str) -> None:
    with pytest.raises(SpaceError) as caught:
        Space(Group("g", x=build()))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("forbid", "message"),
    [
        ([{"lr": ">5"}], "forbid has {'lr': '>5'}, which can never hold: lr is in 0:1"),
        ([{}], "forbid has {}; an entry is conditions by name"),
        (["lr"], "forbid has 'lr'; an entry is conditions by name"),
        ([{"rate": 1}], "no parameter 'rate'. Available: lr. (forbid)"),
        ([{"lr": "<0.6"}], "the default configuration is forbidden: lr is <0.6; change a default"),
    ],
)
def test_a_wrong_rule_is_refused(forbid: Any, message: str) -> None:
    with pytest.raises(HpoError) as caught:
        Space(Group("g", lr=Float(0.0, 1.0, default=0.5)), forbid=forbid)
    assert message in str(caught.value)


def test_a_rule_about_a_closed_group_waits_until_it_is_opened() -> None:
    x, beta = Float(0.0, 1.0, default=0.1), Float(0.0, "x", default=0.05)
    space = Space(Group("g", x=x), Group("rare", closed=True, beta=beta), forbid=[{"beta": ">0.5", "x": ">0.5"}])
    ends = np.array([[0.0], [1.0]])
    assert Encoding(space).allows(ends).all()
    assert Encoding(space.narrow([])).allows(ends).all()
    opened = space.narrow(["beta=0:1"])
    assert not opened.allows({"x": 0.9, "beta": 0.6})
    assert Encoding(opened).allows(np.array([[0.9, 0.6], [0.4, 0.45], [0.9, 0.4]])).tolist() == [False, False, True]


def test_rules_outlive_overrides_and_storage() -> None:
    space = ruled()
    again = Space.from_dict(space.to_dict(), space.rules())
    assert (again.to_dict(), again.rules()) == (space.to_dict(), space.rules())
    narrowed = space.narrow(["width=16:64", "optimizer=sgd"])
    assert narrowed.rules() == {"forbid": [], "limits": {"bottleneck": "width"}}, "what can no longer hold is dropped"
    assert not narrowed.allows(narrowed.defaults() | {"depth": 3, "width": 16, "bottleneck": 32})
    with pytest.raises(SpaceError, match=r"the default configuration is forbidden: optimizer is adamw and lr is >0.01"):
        space.narrow(["optimizer=adamw", "lr=0.1:1"])
    with pytest.raises(SpaceError, match=r"--try depth=4,width=128 is forbidden in this space: depth is 4 and width"):
        space.configure("depth=4,width=128")


def test_the_configurations_of_a_small_space_are_counted() -> None:
    space = Space(
        Group("g", optimizer=Choice("sgd", "adamw", default="sgd"), depth=Int(1, 3, default=1)),
        Group("h", betas=Choice(0.9, 0.99, default=0.9, when={"optimizer": "adamw"})),
        forbid=[{"optimizer": "adamw", "depth": 3}],
    )
    assert space.num_configurations(most=100) == 3 + 2 * 2
    assert space.num_configurations(most=11) is None
    assert ruled().num_configurations(most=10**9) is None, "a rate is a real number"


def test_a_search_keeps_the_rules_and_asks_for_the_same_ones_again(tmp_path: Path, home: Path) -> None:
    declared = """
from hpo import Choice, Float, Group, Int, Space

space = Space(
    Group("step size", lr=Float(0.01, 0.5, log=True, default=0.1), batch_size=Choice(64, 256, default=256)),
    Group("architecture", width=Int(8, 32, step=8, default=16), depth=Int(1, 3, default=1)),
    forbid=[{"depth": ">=2", "width": RULE}, {"batch_size": 64, "lr": ">0.2"}],
)
"""
    path = tmp_path / "ruled_space.py"
    path.write_text(declared.replace("RULE", '">=16"'))
    options: dict[str, Any] = {"space": str(path), "epochs": 1, "workers": 1, "home": home, "study": "ruled"}
    assert run_search("digits", trials=6, **options).is_done
    shown = CliRunner().invoke(cli, ["space", "digits", "--space", str(path)]).output
    assert "never: depth is >=2 and width is >=16\n" in shown
    path.write_text(declared.replace("RULE", '">=24"'))
    with pytest.raises(StudyMismatchError, match="other forbidden configurations"):
        run_search("digits", trials=7, **options)
