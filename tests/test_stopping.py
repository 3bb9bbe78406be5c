"""Early stopping, and which epoch is the best."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpo.config import Direction
from hpo.training.stopping import EarlyStopping


def stopped_at(values: list[float], **changes: Any) -> int | None:
    stopping = EarlyStopping(Direction.MAXIMIZE, **({"patience": 2} | changes))
    for epoch, value in enumerate(values, start=1):
        stopping.update(epoch, value)
        if stopping.should_stop:
            return epoch
    return None


@pytest.mark.parametrize(
    ("values", "changes", "stop"),
    [
        ([1, 2, 3, 4], {}, None),
        ([1, 1, 1], {}, 3),
        ([3, 2, 1], {"patience": 1}, 2),
        ([3, 2, 3, 4, 3, 3], {}, 3),
        ([3, 1, 1, 1, 1], {"stop_after": 4}, 5),
        ([3, 1, 1, 4, 1, 1, 1], {"stop_after": 4}, 6),
        ([1, 1.25, 1.5, 1.75, 2], {"min_delta": 0.5}, None),
        ([1, 1.125, 1.25, 1.375, 1.5], {"min_delta": 0.5}, 3),
        ([1, 1.5, 2], {"min_delta": 0.5, "patience": 1}, None),
        ([math.nan, math.nan, 1], {}, 2),
        ([math.inf, 1, 2, 3], {}, None),
        ([1, math.inf, math.inf], {}, 3),
    ],
)
def test_patience_counts_epochs_without_improvement(
    values: list[float], changes: dict[str, Any], stop: int | None
) -> None:
    assert stopped_at(values, **changes) == stop


def test_the_best_epoch_is_any_strict_improvement_even_below_min_delta() -> None:
    stopping = EarlyStopping(Direction.MAXIMIZE, patience=9, min_delta=1.0)
    assert [stopping.update(epoch, value) for epoch, value in enumerate([1.0, 1.1, 1.1, 0.9], 1)] == [
        True,
        True,
        False,
        False,
    ]
    assert (stopping.best_value, stopping.best_epoch) == (1.1, 2)


any_values = st.lists(st.floats(width=16), max_size=12)


@given(values=any_values, direction=st.sampled_from([*Direction]))
def test_the_best_is_the_first_of_the_best_finite_values(values: list[float], direction: Any) -> None:
    stopping = EarlyStopping(direction, patience=1)
    for epoch, value in enumerate(values, start=1):
        stopping.update(epoch, value)
    finite = [value for value in values if math.isfinite(value)]
    best = (max if direction == "maximize" else min)(finite, default=None)
    assert stopping.best_value == best
    assert stopping.best_epoch == (None if best is None else values.index(best) + 1)


@given(values=any_values, at=st.integers(0, 12), stop_after=st.integers(0, 5), min_delta=st.sampled_from([0.0, 0.5]))
def test_early_stopping_continues_from_its_saved_state(
    values: list[float], at: int, stop_after: int, min_delta: float
) -> None:
    def new() -> EarlyStopping:
        return EarlyStopping(Direction.MINIMIZE, patience=2, min_delta=min_delta, stop_after=stop_after)

    whole, first, second = new(), new(), new()
    for epoch, value in enumerate(values, start=1):
        if epoch == at + 1:
            second.load_state_dict(first.state_dict())
        resumed = second if epoch > at else first
        assert resumed.update(epoch, value) == whole.update(epoch, value)
        assert resumed.should_stop == whole.should_stop
