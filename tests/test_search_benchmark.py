"""benchmarks/search_quality.py and real_networks.py: what a search may spend, and the arithmetic of the tables."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import optuna
import pytest

from hpo.data.datasets import split_dataset
from hpo.parameters import Float
from hpo.plugins import load_task
from hpo.space import Group, Space

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the module sets it where it is missing
    verbosity = optuna.logging.get_verbosity()
    import search_quality

    yield search_quality
    optuna.logging.set_verbosity(verbosity)
    for module in ("search_quality", "bench_tasks", "real_networks"):
        sys.modules.pop(module, None)


class Line:
    """Regret |x - 0.3| after the last of 9 epochs, and more before."""

    name, num_epochs = "line", 9

    def space(self, default: str) -> Space:
        return Space(Group("line", x=Float(0.0, 1.0, default={"good": 0.5, "poor": 1.0}[default])))

    def curves(self, values: dict, rng: np.random.Generator) -> tuple:  # type: ignore[type-arg]
        losses = abs(values["x"] - 0.3) + np.linspace(0.8, 0.0, 9)
        return losses, losses

    def regret(self, loss: np.ndarray) -> np.ndarray:
        return loss


def outcome(bench: ModuleType, contender: str, workers: int) -> object:
    setting = bench.Setting(task=Line(), contender=contender, seed=0, default="good", workers=workers, runs=12)
    return bench.simulate(setting)


@pytest.mark.parametrize("contender", ["priority", "optuna", "tpe+default+sha", "tpe+hyperband", "random"])
def test_every_contender_spends_the_same_epochs_and_regret_never_rises(bench: ModuleType, contender: str) -> None:
    reached = outcome(bench, contender, workers=1)

    assert len(reached.by_cost) == 12  # type: ignore[attr-defined]
    assert np.all(np.diff(reached.by_cost) <= 0)  # type: ignore[attr-defined]
    assert np.all(np.diff(reached.by_trials) <= 0)  # type: ignore[attr-defined]
    if contender in ("priority", "tpe+default+sha"):
        assert reached.by_trials[0] == pytest.approx(0.2)  # type: ignore[attr-defined]
    if contender == "random":
        assert len(reached.by_trials) == 12  # type: ignore[attr-defined]
        assert reached.by_cost == pytest.approx(reached.by_trials)  # type: ignore[attr-defined]


def test_parallel_workers_share_the_epochs(bench: ModuleType) -> None:
    alone, together = (outcome(bench, "random", workers) for workers in (1, 4))

    # Of four that train side by side, all end together: nothing has reached its last epoch after one run's worth.
    assert together.by_cost[0] > alone.by_cost[0]  # type: ignore[attr-defined]
    assert len(together.by_trials) == len(alone.by_trials)  # type: ignore[attr-defined]
    assert together.by_cost[3] == pytest.approx(alone.by_cost[3])  # type: ignore[attr-defined]


def test_the_ratio_of_means_comes_with_an_interval_over_tasks(bench: ModuleType) -> None:
    theirs = np.array([[1.0, 3.0], [2.0, 2.0], [4.0, 4.0]])

    assert bench.ratio_of_means(theirs / 2, theirs) == pytest.approx((0.5, 0.5, 0.5))
    ratio, low, high = bench.ratio_of_means(theirs * [[0.1], [0.5], [0.9]], theirs)
    assert ratio == pytest.approx((0.1 * 2 + 0.5 * 2 + 0.9 * 4) / 8)
    assert (low, high) == pytest.approx((0.1, 0.9))


@pytest.mark.parametrize(("strategy", "num_trials"), [("random", 3), ("priority", 4)])
def test_real_networks_are_trained_for_the_epochs_that_a_search_may_spend(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, strategy: str, num_trials: int
) -> None:
    import real_networks

    monkeypatch.setattr(real_networks, "NUM_FULL_TRIALS", 3)
    problem = real_networks.Problem(name="digits", limit=400, max_epochs=5)
    task = load_task("digits")
    splits = split_dataset(task.objective.load(FOLDER), validation_fraction=0.2, seed=0, limit=problem.limit)

    course = real_networks.search(problem, task, splits, strategy, seed=0, seconds=None)

    assert list(course.spent) == list(range(16))
    assert np.all(np.diff(course.best) >= 0)
    assert course.best[-1] > 0.5
    assert course.num_trials >= num_trials


def test_the_cost_of_a_target_is_all_that_was_spent_if_it_is_never_reached(bench: ModuleType) -> None:
    import real_networks

    course = real_networks.Course(np.array([0.0, 2.0, 3.0]), np.array([0.0, 0.5, 0.9]), 1)

    assert [real_networks.cost_to_reach(course, target) for target in (0.5, 0.6, 0.95)] == [2.0, 3.0, 3.0]
