"""Search spaces: declaration, conditions, overrides and the errors that help."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpo.errors import SpaceError, UnknownNameError
from hpo.parameters import Choice, Float, Int, Setting
from hpo.space import Group, Space
from hpo.values import format_value


@pytest.fixture
def space() -> Space:
    return Space(
        Group(
            "step size",
            lr=Float(1e-4, 1.0, log=True, default=1e-2),
            batch_size=Choice(64, 128, 256, default=128),
        ),
        Group(
            "architecture and optimizer",
            depth=Int(2, 20, default=8),
            optimizer=Choice("sgd", "adam", "rmsprop", default="sgd"),
            momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": ("sgd", "rmsprop")}),
            nesterov=Choice(True, False, default=True, when={"optimizer": "sgd"}),
        ),
    )


def test_groups_keep_the_order_of_their_priority(space: Space) -> None:
    assert [group.name for group in space.groups] == ["step size", "architecture and optimizer"]
    assert list(space.parameters) == ["lr", "batch_size", "depth", "optimizer", "momentum", "nesterov"]
    assert space.group_of("depth") == "architecture and optimizer"


def test_every_parameter_has_a_default(space: Space) -> None:
    defaults = {"lr": 0.01, "batch_size": 128, "depth": 8, "optimizer": "sgd", "momentum": 0.9, "nesterov": True}
    assert space.defaults() == defaults


@pytest.mark.parametrize(
    ("optimizer", "active"),
    [("sgd", {"momentum", "nesterov"}), ("rmsprop", {"momentum"}), ("adam", set())],
)
def test_a_parameter_is_active_only_where_its_condition_holds(space: Space, optimizer: str, active: set[str]) -> None:
    values = space.defaults() | {"optimizer": optimizer}
    assert space.active(values).keys() == {"lr", "batch_size", "depth", "optimizer"} | active


@pytest.fixture
def half_closed(space: Space) -> Space:
    fine = Group(
        "fine tuning",
        closed=True,
        beta2=Float(0.9, 0.9999, default=0.999, when={"optimizer": "adam"}),
        eps=Float(1e-10, 1e-3, log=True, default=1e-8),
    )
    return Space(*space.groups, fine)


def test_a_closed_group_is_not_searched(space: Space, half_closed: Space) -> None:
    assert half_closed.parameters == space.parameters
    assert half_closed.defaults() == space.defaults()
    assert half_closed.narrow([]).to_dict() == half_closed.to_dict() == space.to_dict()


def test_an_override_opens_its_parameter_of_a_closed_group_at_the_last_priority(half_closed: Space) -> None:
    narrowed = half_closed.narrow(["eps=1e-9:1e-4", "optimizer=adam"])
    assert [group.name for group in narrowed.groups] == ["step size", "architecture and optimizer", "fine tuning"]
    assert list(narrowed.groups[-1].parameters) == ["eps"]
    assert narrowed.defaults()["eps"] == 1e-8
    assert Space.from_dict(narrowed.to_dict()).to_dict() == narrowed.to_dict()
    with pytest.raises(SpaceError, match=r"beta2.*is active only when optimizer is adam, which -p excludes"):
        half_closed.narrow(["beta2=0.95", "optimizer=sgd"])
    with pytest.raises(SpaceError, match=r"eps.*outside"):
        half_closed.narrow(["eps=1"])


def test_what_is_closed_is_checked_like_the_rest(space: Space) -> None:
    with pytest.raises(SpaceError, match=r"eps \(in 'fine tuning'\): has no default"):
        Space(*space.groups, Group("fine tuning", closed=True, eps=Float(1e-9, 1)))
    with pytest.raises(SpaceError, match=r"lr .* is already in 'step size'"):
        Space(*space.groups, Group("fine tuning", closed=True, lr=Float(1e-9, 1, default=1)))


def test_a_condition_on_an_inactive_choice_does_not_hold() -> None:
    space = Space(
        Group(
            "g",
            norm=Choice("none", "group", default="none"),
            grouping=Choice("few", "many", default="few", when={"norm": "group"}),
            groups=Int(1, 8, default=2, when={"grouping": "few"}),
        )
    )
    assert space.active(space.defaults()) == {"norm": "none"}


@pytest.mark.parametrize(
    ("override", "name", "description", "default"),
    [
        ("lr=1e-3:1e-1", "lr", "0.001:0.1 (log)", 0.01),
        ("lr=0.02:0.1", "lr", "0.02:0.1 (log)", 0.02),
        ("lr=0.1", "lr", "0.1 (fixed)", 0.1),
        ("lr=0.1,0.2", "lr", "0.1, 0.2", 0.1),
        ("depth=3:5", "depth", "3:5", 5),
        ("optimizer=adam, sgd", "optimizer", "adam, sgd", "sgd"),
        ("optimizer=adam", "optimizer", "adam (fixed)", "adam"),
        ("batch_size=256", "batch_size", "256 (fixed)", 256),
        ("nesterov=false", "nesterov", "false (fixed)", False),
    ],
)
def test_an_override_narrows_lists_or_fixes(
    space: Space, override: str, name: str, description: str, default: object
) -> None:
    parameter = space.narrow([override]).parameters[name]
    assert parameter.describe() == description
    assert parameter.default == default
    assert type(parameter.default) is type(default)


def test_narrowing_leaves_the_original_space_alone(space: Space) -> None:
    before = space.to_dict()
    space.narrow(["lr=0.1", "optimizer=adam"])
    assert space.to_dict() == before


def test_a_parameter_that_can_never_be_active_is_dropped(space: Space) -> None:
    assert space.narrow(["optimizer=rmsprop"]).parameters.keys() == space.parameters.keys() - {"nesterov"}
    assert space.narrow(["optimizer=adam"]).parameters.keys() == {"lr", "batch_size", "depth", "optimizer"}


def test_a_group_without_parameters_is_dropped() -> None:
    space = Space(
        Group("choice", optimizer=Choice("sgd", "adam", default="sgd")),
        Group("detail", momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"})),
    )
    assert [group.name for group in space.narrow(["optimizer=adam"]).groups] == ["choice"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["learning_rate=1"], "no parameter 'learning_rate'; did you mean 'lr'?"),
        (["detph=3"], "no parameter 'detph'; did you mean 'depth'?"),
        (["lr"], "-p 'lr' is not NAME=VALUE, NAME=LOW:HIGH or NAME=A,B,C."),
        (["lr="], "-p 'lr=' is not NAME=VALUE, NAME=LOW:HIGH or NAME=A,B,C."),
        (["=1"], "-p '=1' is not NAME=VALUE, NAME=LOW:HIGH or NAME=A,B,C."),
        (["lr=5"], "lr (in 'step size'): 5 is outside 0.0001:1 (-p lr=5)"),
        (["lr=nan"], "lr (in 'step size'): nan is outside 0.0001:1 (-p lr=nan)"),
        (["lr=fast"], "lr (in 'step size'): 'fast' is not a number; allowed is 0.0001:1 (-p lr=fast)"),
        (["lr=0.1:0.01"], "lr (in 'step size'): low 0.1 is above high 0.01 (-p lr=0.1:0.01)"),
        (["depth=2.5"], "depth (in 'architecture and optimizer'): '2.5' is not a whole number; allowed is 2:20"),
        (
            ["depth=1:30"],
            "depth (in 'architecture and optimizer'): 1:30 is wider than 2:20; add --extend to search all",
        ),
        (["depth=1:10"], "depth (in 'architecture and optimizer'): 1 is outside 2:20 (-p depth=1:10)"),
        (["batch_size=100"], "batch_size (in 'step size'): '100' is not one of 64, 128, 256 (-p batch_size=100)"),
        (["optimizer=sgd,lion"], "'lion' is not one of sgd, adam, rmsprop (-p optimizer=sgd,lion)"),
        (["lr=1", "lr=0.5"], "lr is given twice: -p lr=1 and -p lr=0.5."),
        (
            ["optimizer=adam", "momentum=0.9"],
            "momentum (in 'architecture and optimizer'): is active only when optimizer",
        ),
    ],
)
def test_a_wrong_override_says_what_is_allowed(space: Space, overrides: list[str], message: str) -> None:
    with pytest.raises((SpaceError, UnknownNameError)) as caught:
        space.narrow(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (Float(1.0, 0.0, default=0.5), "low 1 is above high 0"),
        (Float(0.0001, 0.1, default=0.5), "default 0.5 is outside 0.0001:0.1"),
        (Float(0.0, 1.0), "has no default; give it one with default="),
        (Float(0.0, 1.0, log=True, default=0.5), "low 0 must be above 0 for log=True"),
        (
            Float(9.0, 9.000000000000002, default=9.0),
            "low 9.0 and high 9.000000000000002 are too close for a search; give one value",
        ),
        (Float(0.0, 5e-324, default=0.0), "low 0.0 and high 5e-324 are too close for a search; give one value"),
        (Float(0.0, math.inf, default=0.5), "high inf is not a number"),
        (
            Float(0.0, "1", default=0.5),
            "high '1' is neither a number nor the name of one declared before it: lr, other",
        ),  # type: ignore[arg-type]
        (Int(1, 3, default=1.5), "default 1.5 is not a whole number"),
        (Int(True, 3, default=2), "low True is not a whole number"),
        (Choice(default="a"), "has no choices; give at least one"),
        (Choice("a", "b"), "has no default; give it one with default="),
        (Choice("a", "b", default="c"), "default c is not one of a, b"),
        (Choice("a", "a", default="a"), "has a choice twice: a, a"),
        (Choice(1, 2, default=True), "default true is not one of 1, 2"),
        (Choice(["a"], default="a"), "choice ['a'] is not a string, number, boolean, None or a tuple of them"),
        (Choice(1, "1", default=1), "choices 1 and '1' are both written 1"),
        (Choice(None, "none", default=None), "choices None and 'none' are both written none"),
        (Choice((1, 2), "(1,2)", default="(1,2)"), "choices (1, 2) and '(1,2)' are both written (1,2)"),
        (Choice(1, (True,), True, default=1), "choice (True,) is a tuple of other choices; change one of them"),
        (Choice(math.inf, 1, default=1), "choice inf is not finite"),
        (Choice("a\nb", default="a\nb"), "choice 'a\\nb' has control characters; give it a name instead"),
        (Choice(10**400, 1, default=1), f"a choice is beyond {2**53}, the largest whole number that is stored exactly"),
        (Int(1, 10**400, default=1), f"high is beyond {2**53}, the largest whole number that is stored exactly"),
        (Choice(None, 0.1), "has no default; give it one with default="),
        (Setting((1, 2)), "setting (1, 2) is not a string, number or boolean; use Choice"),  # type: ignore[arg-type]
        (
            Choice("a", default="a", when={"lr": ">1"}),
            "when={'lr': '>1'} can never hold; lr is in 0:1; write a number, or a text such as '>=2', '<0.5' or '2:8'",
        ),
        (
            Choice("a", default="a", when={"later": 1}),
            "when={'later': ...} must name a parameter declared before it: lr, other",
        ),
        (Choice("a", default="a", when={"other": 3}), "when={'other': 3} can never hold; other is one of 1, 2"),
        ("0:1", "'0:1' is not a Float, Int or Choice"),
    ],
)
def test_a_wrong_declaration_names_the_parameter_and_its_group(parameter: Choice, message: str) -> None:
    with pytest.raises(SpaceError) as caught:
        Space(
            Group("first", lr=Float(0, 1, default=0.5), other=Choice(1, 2, default=1)),
            Group("step size", x=parameter),
            Group("last", later=Choice(1, default=1)),
        )
    assert str(caught.value) == f"x (in 'step size'): {message}"


def test_a_parameter_belongs_to_one_group() -> None:
    with pytest.raises(SpaceError, match=r"lr \(in 'a'\): is already in 'a'"):
        Space(Group("a", lr=Float(0, 1, default=0.5)), Group("b", lr=Float(0, 1, default=0.5)))


def test_groups_have_names_of_their_own() -> None:
    with pytest.raises(SpaceError, match="two groups are named 'a'"):
        Space(Group("a", lr=Float(0, 1, default=0.5)), Group("a", width=Int(1, 2, default=1)))


@given(
    st.floats(1e-300, 1e300),
    st.floats(1e-300, 1e300),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_narrowed_range_lies_within_and_holds_its_default(a: float, b: float, u: float, v: float) -> None:
    low, high = sorted((a, b))
    inner = sorted(min(max(low + t * (high - low), low), high) for t in (u, v))
    for ends in ((low, high), inner):
        assume(ends[0] == ends[1] or not math.isclose(*ends, rel_tol=1e-9))  # those are refused
    space = Space(Group("g", x=Float(low, high, default=low)))
    narrowed = space.narrow([f"x={inner[0]!r}:{inner[1]!r}"]).parameters["x"]
    assert isinstance(narrowed, Float)
    assert (narrowed.low, narrowed.high) == tuple(inner)
    assert narrowed.contains(narrowed.default)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=10))
def test_a_list_of_whole_numbers_becomes_exactly_those_choices(values: list[int]) -> None:
    space = Space(Group("g", depth=Int(2, 20, default=8)))
    narrowed = space.narrow([f"depth={','.join(map(str, values))}"]).parameters["depth"]
    chosen = narrowed.choices if isinstance(narrowed, Choice) else (narrowed.low,)
    assert set(chosen) == set(values)
    assert narrowed.contains(narrowed.default)


@given(st.text(max_size=30))
def test_any_override_text_is_understood_or_refused_in_one_line(text: str) -> None:
    space = Space(
        Group("g", x=Float(0, 1, default=0.5), kind=Choice("a", "b", default="a"), on=Choice(True, default=True))
    )
    for override in (text, f"x={text}", f"kind={text}", f"on={text}"):
        try:
            narrowed = space.narrow([override])
        except (SpaceError, UnknownNameError):
            continue
        assert narrowed.active(narrowed.defaults())


@pytest.mark.parametrize(
    ("value", "text"), [(0.001, "0.001"), (1e-5, "1e-05"), (256, "256"), (True, "true"), ("sgd", "sgd"), (1.0, "1")]
)
def test_a_value_is_written_as_a_person_would(value: object, text: str) -> None:
    assert format_value(value) == text


def test_a_setting_is_fixed_until_an_override_gives_other_values_of_its_type() -> None:
    space = Space(Group("model", weights=Setting("default"), size=Setting(0)))
    assert all(parameter.is_fixed for parameter in space.parameters.values())
    narrowed = space.narrow(["weights=a/b.pth", "size=64, 128"])
    assert narrowed.defaults() == {"weights": "a/b.pth", "size": 64}
    assert narrowed.parameters["size"].extremes() == (64, 128)
    assert Space.from_dict(narrowed.to_dict()).to_dict() == narrowed.to_dict()
    with pytest.raises(SpaceError, match=r"size \(in 'model'\): 'large' is not of type int \(-p size=large\)"):
        space.narrow(["size=large"])
    with pytest.raises(SpaceError, match="'mine' is not one of default"):
        space.configure("weights=mine")


def test_choices_that_python_takes_for_one_are_told_apart() -> None:
    space = Space(
        Group(
            "all",
            flag=Choice(1, True, default=True),
            dropout=Choice(None, 0.1, default=None),
            kernel=Choice((3, 3), (5, 5), (3, None), default=(3, 3)),
            ones=Int(1, 3, default=1, when={"flag": 1}),
            plain=Int(1, 3, default=1, when={"dropout": None}),
            square=Int(1, 3, default=1, when={"kernel": (3, 3)}),
            odd=Int(1, 3, default=1, when={"kernel": ((5, 5), (3, None))}),
            below=Choice(None, 1, default=None, when={"flag": 1}),
            inner=Int(1, 3, default=1, when={"below": None}),
        )
    )
    assert [name for name, value in space.defaults().items() if value is None] == ["dropout", "below"]
    active = space.active(space.defaults())
    assert list(active) == ["flag", "dropout", "kernel", "plain", "square"], "an inactive choice is not None"
    tried = space.configure("flag=1,dropout=0.1,kernel=(3, none)")
    assert [*map(repr, space.active(tried).values())] == ["1", "0.1", "(3, None)", "1", "1", "None", "1"]
    narrowed = space.narrow(["flag=true,1", "kernel=(5,5),(3,3)", "dropout=none"])
    assert narrowed.parameters["kernel"].describe() == "(5,5), (3,3)"
    assert [*map(repr, narrowed.parameters["flag"].extremes())] == ["True", "1"]
    stored = Space.from_dict(json.loads(json.dumps(narrowed.to_dict())))
    assert stored.to_dict() == narrowed.to_dict()
    assert repr(stored.active(stored.defaults())) == repr(narrowed.active(narrowed.defaults()))
    assert space.narrow(["flag=1"]).defaults()["flag"] is not True


def test_a_choice_with_a_comma_can_be_named_and_numbers_of_numpy_are_numbers() -> None:
    lr = Choice(np.float64(0.1), np.int64(2), default=2)
    space = Space(Group("all", columns=Choice("a,b", "c", default="c"), lr=lr))
    assert space.narrow(["columns=a,b"]).parameters["columns"].extremes() == ("a,b",)
    assert [type(value) for value in space.parameters["lr"].extremes()] == [float, int]
    assert space.configure("lr=0.1")["lr"] == 0.1


def test_a_setting_that_is_true_or_false_is_read_as_such() -> None:
    space = Space(Group("model", bias=Setting(True)))
    assert space.narrow(["bias=false"]).defaults() == {"bias": False}
    with pytest.raises(SpaceError, match="'0' is not of type bool"):
        space.narrow(["bias=0"])


@pytest.mark.parametrize("name", ["", " a", "a=b", "a,b", "a\nb"])
def test_a_parameter_whose_name_an_override_could_not_say_is_refused(name: str) -> None:
    with pytest.raises(SpaceError, match="cannot be the name of a parameter"):
        Space(Group("all", closed=False, **{name: Int(1, 2, default=1)}))
