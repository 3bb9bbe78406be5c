"""Schedules of the learning rate."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from helpers.training import ImageNet, image_splits, quick_config, scripted
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from hpo.config import TrainConfig
from hpo.errors import UsageError
from hpo.methods import OPTIMIZERS, SCHEDULES
from hpo.training.optimizers import build_optimizer
from hpo.training.schedules import build_schedule
from hpo.training.trainer import fit


def rates(config: TrainConfig, num_steps: int) -> tuple[list[float], list[float]]:
    """Rate and momentum (or beta1) of each step, and, last, what they would be after it."""
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, num_steps)
    lrs, momenta = [], []
    for step in range(num_steps + 1):
        group = optimizer.param_groups[0]
        lrs.append(group["lr"])
        momenta.append(group["momentum"] if "momentum" in group else group.get("betas", [0.0])[0])
        if step < num_steps:
            optimizer.step()
            schedule.step()
    return lrs, momenta


@given(
    schedule=st.sampled_from([*SCHEDULES]),
    optimizer=st.sampled_from([*OPTIMIZERS]),
    num_steps=st.integers(1, 60),
    warmup_fraction=st.floats(0, 1, exclude_max=True),
    momentum=st.floats(0, 0.99),
)
def test_every_step_is_taken_at_a_rate_above_0_and_at_most_the_peak(
    schedule: str, optimizer: str, num_steps: int, warmup_fraction: float, momentum: float
) -> None:
    config = quick_config(
        schedule=schedule, optimizer=optimizer, warmup_fraction=warmup_fraction, momentum=momentum, lr=0.1
    )
    lrs, momenta = rates(config, num_steps)
    assert all(0 < lr <= 0.1 * (1 + 1e-9) for lr in lrs[:-1])
    assert all(0 <= value <= max(momentum, 0.95) for value in momenta)
    if schedule == "cosine_restarts":
        return
    peak = lrs.index(max(lrs))
    assert lrs[: peak + 1] == sorted(lrs[: peak + 1])
    assert lrs[peak:] == sorted(lrs[peak:], reverse=True)


@pytest.mark.parametrize(("schedule", "end"), [("constant", 0.1), ("cosine", 0.0), ("one_cycle", 0.1 / 25 / 1e4)])
def test_a_schedule_rises_to_the_peak_and_ends_where_it_should(schedule: str, end: float) -> None:
    lrs, _ = rates(quick_config(schedule=schedule, warmup_fraction=0.1, lr=0.1), 100)
    assert lrs[0] < 0.02
    assert max(lrs) == pytest.approx(0.1, rel=1e-3)
    assert lrs[-1] == pytest.approx(end)


def test_the_warm_up_is_linear_over_its_share_of_the_steps() -> None:
    lrs, _ = rates(quick_config(schedule="constant", warmup_fraction=0.1, lr=0.1), 40)
    assert lrs == pytest.approx([0.02, 0.04, 0.06, 0.08] + [0.1] * 37)


def test_a_cosine_falls_to_half_in_the_middle() -> None:
    lrs, _ = rates(quick_config(schedule="cosine", warmup_fraction=0.2, lr=0.1), 50)
    assert lrs[10] == pytest.approx(0.1)
    assert lrs[30] == pytest.approx(0.05)


@given(num_steps=st.integers(1, 60), optimizer=st.sampled_from(["sgd", "adamw"]))
def test_one_cycle_is_torchs(num_steps: int, optimizer: str) -> None:
    config = quick_config(schedule="one_cycle", optimizer=optimizer, momentum=0.8, beta1=0.9, lr=0.1)
    highest = 0.8 if optimizer == "sgd" else 0.95
    other = build_optimizer(nn.Linear(2, 2), config)
    theirs = OneCycleLR(
        other, 0.1, total_steps=num_steps + 1, max_momentum=highest, base_momentum=highest * 0.85 / 0.95
    )
    points = []
    for step in range(num_steps + 1):
        group = other.param_groups[0]
        points.append((group["lr"], group["momentum"] if optimizer == "sgd" else group["betas"][0]))
        if step < num_steps:
            other.step()
            theirs.step()
    assert list(zip(*rates(config, num_steps), strict=True)) == points


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_points_that_were_computed_ahead_are_those_of_the_steps(schedule: str) -> None:
    config = quick_config(schedule=schedule, optimizer="sgd", warmup_fraction=0.3, lr=0.1)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    curve = build_schedule(optimizer, config, 12)
    ahead, alone = [], rates(config, 12)[0]
    for _ in range(3):
        for point in curve.compute_ahead(4):
            assert list(point.rates) == [group["lr"] for group in optimizer.param_groups]
            ahead.append(point.rates[0])
            curve.step()
    assert [*ahead, optimizer.param_groups[0]["lr"]] == alone


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_one_cycle_cycles_the_momentum_below_the_chosen_one(optimizer: str) -> None:
    config = quick_config(schedule="one_cycle", optimizer=optimizer, momentum=0.8)
    lrs, momenta = rates(config, 100)
    assert momenta[0] == momenta[-1] == pytest.approx(0.8)
    assert min(momenta) == pytest.approx(0.8 * 0.85 / 0.95, rel=1e-3)
    assert momenta.index(min(momenta)) == lrs.index(max(lrs))


def steps_at(**changes: Any) -> list[float]:
    """The rate of each of 40 steps at a peak of 0.1, and the one after them."""
    return rates(quick_config(lr=0.1, **({"warmup_fraction": 0.0} | changes)), 40)[0]


def test_step_lowers_the_rate_at_one_half_and_at_three_quarters() -> None:
    assert steps_at(schedule="step", decay_factor=0.2) == pytest.approx([0.1] * 20 + [0.02] * 10 + [0.004] * 11)


def test_exponential_loses_the_same_share_in_each_step_and_ends_at_its_factor() -> None:
    lrs = steps_at(schedule="exponential", decay_factor=0.01)
    shares = [after / before for before, after in pairwise(lrs)]
    assert shares == pytest.approx([shares[0]] * 40)
    assert lrs[-1] == pytest.approx(0.1 * 0.01)


def test_cosine_restarts_begins_again_at_the_peak_in_cycles_that_double() -> None:
    lrs = rates(quick_config(schedule="cosine_restarts", num_cycles=3, warmup_fraction=0.0, lr=0.1), 70)[0]
    peaks = [step for step, lr in enumerate(lrs) if lr == pytest.approx(0.1, rel=1e-9)]
    assert peaks == [0, 10, 30]
    assert lrs[20] == lrs[50] == pytest.approx(0.05)
    assert lrs[-1] == 0.0


def test_one_cycle_of_cosine_restarts_is_cosine() -> None:
    assert steps_at(schedule="cosine_restarts", num_cycles=1) == pytest.approx(steps_at(schedule="cosine"))


@pytest.mark.parametrize("num_steps", [1, 2, 7, 41, 1000])
@pytest.mark.parametrize("num_cycles", [2, 3, 6])
def test_cosine_restarts_takes_no_step_at_a_rate_of_zero(num_steps: int, num_cycles: int) -> None:
    config = quick_config(schedule="cosine_restarts", num_cycles=num_cycles, warmup_fraction=0.0, lr=0.1)
    assert all(lr > 1e-9 for lr in rates(config, num_steps)[0][:-1])


@pytest.mark.parametrize("schedule", ["step", "exponential", "cosine", "cosine_restarts", "plateau"])
def test_a_warm_up_comes_before_the_curve_which_then_begins_at_the_peak(schedule: str) -> None:
    lrs = steps_at(schedule=schedule, warmup_fraction=0.1)
    assert lrs[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_plateau_lowers_the_rate_after_its_patience_without_improvement() -> None:
    _, results = scripted(
        [0.2, 0.4, 0.4, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6], schedule="plateau", plateau_patience=2, decay_factor=0.5, lr=0.1
    )
    # `lr` is the rate of an epoch's last step: the epoch after the patience is over is the first at the lower rate.
    expected = [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025]
    assert [result.metrics["lr"] for result in results] == pytest.approx(expected)


def test_plateau_knows_a_metric_to_be_minimised_and_the_least_change_that_counts() -> None:
    def rates_of(**changes: Any) -> list[float]:
        config = quick_config(schedule="plateau", plateau_patience=1, max_epochs=5, warmup_fraction=0.0, **changes)
        return [result.metrics["lr"] for result in fit(ImageNet(), image_splits(), config)]

    falls = rates_of(metric="loss")  # it falls in all five epochs
    assert falls == [0.01] * 5
    assert rates_of(metric="loss", min_delta=10.0) == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5])


def test_plateau_does_not_count_the_epochs_of_the_warm_up() -> None:
    _, results = scripted([0.5] * 6, schedule="plateau", plateau_patience=1, warmup_fraction=0.5, lr=0.1)
    # Three epochs of warm-up; the third ends it and is the first that counts.
    assert [result.metrics["lr"] for result in results][3:] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"decay_factor": 1.0}, r"in \(0, 1\)"),
        ({"num_cycles": 0}, "at least 1"),
        ({"plateau_patience": 0}, "at least 1"),
    ],
)
def test_settings_of_a_schedule_out_of_range_are_refused(change: dict[str, Any], allowed: str) -> None:
    (name,) = change
    with pytest.raises(UsageError, match=rf"{name}={change[name]} is not allowed: it must be {allowed}"):
        quick_config(**change)
