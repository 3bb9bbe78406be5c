"""Two objectives in the strategy `priority`: the front, what a point is expected to add to it, and what is proposed."""

from __future__ import annotations

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from hpo.parameters import Float
from hpo.search.encoding import distribution
from hpo.search.front import Front
from hpo.search.priority import PrioritySampler
from hpo.space import Group, Space

PLANE = Space(Group("plane", x=Float(0.0, 1.0, default=0.9), y=Float(0.0, 1.0, default=0.9)))
DISTRIBUTIONS = {name: distribution(parameter) for name, parameter in PLANE.parameters.items()}


def area(points: np.ndarray, reference: np.ndarray) -> float:
    """What the points (n, 2) beat up to the reference point: one column between two of them after the other."""
    xs = np.sort(np.append(np.minimum(points[:, 0], reference[0]), reference[0]))
    lowest = [points[points[:, 0] <= x, 1].min(initial=reference[1]) for x in xs[:-1]]
    return float(np.diff(xs) @ (reference[1] - np.array(lowest)))


def test_the_expected_gain_is_the_mean_over_draws() -> None:
    losses = np.array([[0.0, 2.0], [1.0, 1.0], [1.5, 1.5], [2.0, 0.2]])
    front = Front.of(losses)
    reference = np.array([front.ends[-1], front.heights[0]])
    mean, deviation = np.array([0.8, 0.9]), np.array([0.5, 0.7])
    draws = mean + deviation * np.random.default_rng(0).normal(size=(4000, 2))
    gains = [area(np.vstack([losses, draw]), reference) - area(losses, reference) for draw in draws]

    expected = front.log_expected_gain(*((mean[[i]], deviation[[i]]) for i in (0, 1)))

    assert front.members == [0, 1, 3]
    assert np.exp(expected[0]) == pytest.approx(np.mean(gains), abs=3 * np.std(gains) / 4000**0.5)


def test_what_cannot_add_anything_still_has_an_order() -> None:
    front = Front.of(np.array([[0.0, 1.0], [1.0, 0.0]]))
    means = np.array([30.0, 40.0])

    near, far = front.log_expected_gain((means, np.full(2, 0.1)), (means, np.full(2, 0.1)))

    assert np.isfinite([near, far]).all()
    assert near > far


def searched(num_trials: int, *, stops: bool = False) -> optuna.Study:
    """A search whose front is where y is 0; where x is above 0.7 a trial may be stopped."""
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=PrioritySampler(PLANE, num_trials=10))
    for _ in range(num_trials):
        trial = study.ask(DISTRIBUTIONS)
        x, y = trial.params["x"], trial.params["y"]
        if stops and x > 0.7:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, (x - y, 1.0 + x**2 + y))
    return study


def test_the_front_is_found_along_its_whole_length() -> None:
    study = searched(25)

    on_the_front = [trial.params["x"] for trial in study.trials if trial.params["y"] < 0.05]
    assert study.trials[0].params == PLANE.defaults()
    assert len(on_the_front) >= 12
    assert np.max(np.diff(np.sort([0.0, *on_the_front, 1.0]))) < 0.25


def test_it_keeps_away_from_where_trials_are_stopped() -> None:
    later = searched(25, stops=True).trials[10:]

    assert sum(trial.params["x"] > 0.7 for trial in later) <= 5


def test_trials_that_run_side_by_side_differ() -> None:
    study = searched(10)

    asked = [study.ask(DISTRIBUTIONS).params for _ in range(6)]

    assert len({round(params["x"], 2) for params in asked}) >= 5
