"""What more trials promise: a forecast from the trials so far, and a search that ends when they promise too little."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.studies import SETTINGS
from optuna.storages import BaseStorage, InMemoryStorage

from hpo.cli import cli
from hpo.search.forecast import MIN_TRIALS, WEIGHTS, Forecast, features, forecast, gain_at
from hpo.search.storage import open_storage
from hpo.search.study import Kept, Study

LOSSES = list(np.random.default_rng(0).exponential(0.1, size=40))


@pytest.mark.parametrize("chance", [0.5, 0.8, 0.9])
def test_the_gain_at_a_chance_is_the_one_whose_chance_the_model_gives(chance: float) -> None:
    gain = gain_at(LOSSES, 30, chance)

    assert gain > 0
    assert 1 / (1 + math.exp(-features(LOSSES, 30, gain) @ WEIGHTS)) == pytest.approx(chance)


def test_a_forecast_is_on_the_scale_of_the_metric_and_grows_with_the_chance_and_the_trials() -> None:
    gain = gain_at(LOSSES, 30, 0.8)

    assert gain_at([100 * loss + 7 for loss in LOSSES], 30, 0.8) == pytest.approx(100 * gain)
    assert gain_at(LOSSES, 10, 0.8) < gain < gain_at(LOSSES, 30, 0.9)


def test_trials_that_are_all_equal_promise_nothing() -> None:
    gain = gain_at([0.25] * 30, 30, 0.8)

    assert gain == 0
    assert "80% chance of gaining nothing in f1" in Forecast(trials=30, chance=0.8, gain=gain).describe("f1")


def study_of(losses: list[float], storage: BaseStorage | None = None, strategy: str = "priority") -> Study:
    study = Study.open(storage or InMemoryStorage(), "s", replace(SETTINGS, strategy=strategy))
    for loss in losses:
        number = study.ask().number
        study.report(number, 1, 0.5 - loss)
        study.tell(number, "complete", value=0.5 - loss)
    return study


def test_a_study_is_over_once_more_trials_promise_less_than_was_asked_for() -> None:
    study = study_of(LOSSES[:MIN_TRIALS])
    found = study.forecast
    assert found is not None
    cases: list[tuple[Kept, int]] = [(found.gain * 1.01, 0), (found.gain * 0.99, 5), ("none", 5)]
    for wanted, missing in cases:
        study.remember_session(num_trials=25, task_reference="digits", tracking_uri=None, stop_when_flat=wanted)
        assert study.remaining(25) == missing, wanted
    assert forecast(study.settings, study.trials()[1:]) is None, "too few trials"


def test_nothing_is_forecast_for_searches_that_it_was_not_measured_for() -> None:
    assert study_of(LOSSES[:MIN_TRIALS], strategy="random").forecast is None


def test_nothing_is_forecast_that_a_metric_cannot_gain() -> None:
    losses = LOSSES[:MIN_TRIALS]
    assert study_of(losses).forecast is not None
    assert study_of([loss - min(losses) - 0.5 for loss in losses]).forecast is None, "one trial has reached 1"


def test_hpo_show_says_what_more_trials_promise(tmp_path: Path) -> None:
    study = study_of(LOSSES[:MIN_TRIALS], open_storage(tmp_path))
    found = study.forecast
    assert found is not None

    shown = CliRunner().invoke(cli, ["show", "s", "--home", str(tmp_path)], catch_exceptions=False).output

    sentence = f"80% chance of gaining less than {found.gain:.2g} in accuracy in the next 30 trials."
    assert shown.splitlines()[-1] == f"Forecast: {sentence}"
