"""Whether the winner can be told from the default configuration: the intervals, and what is said of them."""

from __future__ import annotations

import math
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import pytest
import torch
from helpers.data import of_classes
from rich.console import Console
from scipy import stats

from hpo.config import TrainConfig
from hpo.data.examples import Split
from hpo.records import Comparison, SearchOutcome, TrialState, Winner
from hpo.search.winner import describe_baselines, describe_comparison
from hpo.terminal.tables import print_outcome
from hpo.training.comparison import Difference, compare_folds, compare_models


class Column(torch.nn.Module):
    """Answers what stands in one half of its inputs' columns."""

    def __init__(self, half: int) -> None:
        super().__init__()
        self.half = half  # type: ignore[assignment, method-assign]
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.chunk(2, dim=1)[self.half].squeeze(1) + self.weight  # type: ignore[call-overload]


def compare(split: Split, metric: str, *, num_classes: int, num_candidates: int = 1) -> Difference:
    config = TrainConfig(metric=metric, loss="cross_entropy" if num_classes else "mse")
    models = ((Column(0), config), (Column(1), config))
    return compare_models(
        *models, split, spec=of_classes(num_classes), target_scale=1.0, seed=0, num_candidates=num_candidates
    )


def answers(right: list[bool], right_too: list[bool]) -> Split:
    """Examples of class 1 of 2, which two models get right or not."""
    halves = [torch.tensor(each)[:, None] == torch.tensor([False, True]) for each in (right, right_too)]
    return Split(torch.cat(halves, dim=1).float(), torch.ones(len(right), dtype=torch.int64))


def test_accuracies_are_compared_by_the_examples_on_which_the_models_differ() -> None:
    # 70 both right, 15 only the one, 5 only the other, 10 both wrong: McNemar's table.
    split = answers([True] * 85 + [False] * 15, [True] * 70 + [False] * 15 + [True] * 5 + [False] * 10)

    found = compare(split, "accuracy", num_classes=2)

    centre = 10 / 102  # with half an example more of each kind
    error = math.sqrt((15.5 + 5.5) / 102 - centre**2) / math.sqrt(102)
    assert found.value == pytest.approx(0.1)
    assert (found.low, found.high) == pytest.approx((centre - 1.96 * error, centre + 1.96 * error))


def test_models_that_differ_on_four_examples_alone_cannot_be_told_apart() -> None:
    right = [True] * 190 + [False] * 10
    found = compare(answers(right, [False] * 4 + right[4:]), "accuracy", num_classes=2)
    assert found.low < 0 < found.value  # by an exact test, p is 0.125


def test_other_metrics_are_compared_by_a_bootstrap_over_pairs_of_answers() -> None:
    draw = torch.Generator().manual_seed(0)
    targets = torch.randn(400, generator=draw)
    shared = torch.randn(400, generator=draw)  # errors that both make: they must not widen the interval
    outputs = [targets + shared + scale * torch.randn(400, generator=draw) for scale in (0.1, 0.2)]
    split = Split(torch.stack(outputs, dim=1), targets)

    found = compare(split, "mae", num_classes=0)

    gains = (outputs[0] - targets).abs() - (outputs[1] - targets).abs()
    error = float(gains.std()) / 20
    assert found.value == pytest.approx(float(gains.mean()), abs=1e-6)
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.96 * error, found.value + 1.96 * error), abs=0.3 * error
    )
    assert compare(split, "mae", num_classes=0) == found, "the same seed draws the same examples"


def test_the_best_of_several_candidates_has_an_interval_that_holds_for_all_of_them() -> None:
    split = answers([True] * 36 + [False] * 4, [True] * 30 + [False] * 10)
    alone, among = (compare(split, "accuracy", num_classes=2, num_candidates=number) for number in (1, 20))
    assert among.value == alone.value == pytest.approx(0.15)
    wider = stats.norm.ppf(1 - 0.025 / 20) / stats.norm.ppf(0.975)
    assert among.high - among.value == pytest.approx(wider * (alone.high - alone.value), rel=1e-4)
    assert among.low < 0 < alone.low

    folds = [dict(enumerate(values, 1)) for values in ([0.52, 0.61, 0.55, 0.58], [0.5, 0.57, 0.56, 0.53])]
    of_folds = [compare_folds(*folds, num_folds=4, num_candidates=number) for number in (1, 20)]
    one, best = (each.high - each.value for each in of_folds if each)
    assert best == pytest.approx(wider * one, rel=1e-4)


def test_models_that_answer_alike_differ_by_nothing() -> None:
    split = answers([True, False] * 20, [True, False] * 20)

    assert compare(split, "f1", num_classes=2) == Difference(0.0, 0.0, 0.0)
    found = compare(split, "accuracy", num_classes=2)
    assert found.value == 0
    assert found.low == -found.high < 0, "40 examples do not show that there is no difference"


def test_folds_are_paired_and_their_interval_is_wide_because_they_share_examples() -> None:
    one, other = [0.52, 0.61, 0.55, 0.58], [0.5, 0.57, 0.56, 0.53]
    found = compare_folds(dict(enumerate(one, 1)), dict(enumerate(other, 1)), num_folds=4)
    # A trial that was pruned after 4 of 10 folds: each left a tenth of the examples out.
    part = compare_folds(dict(enumerate([*one, 0.7], 1)), dict(enumerate(other, 1)), num_folds=10)

    plain = stats.ttest_rel(one, other).confidence_interval(0.95)
    assert found is not None
    assert part is not None
    assert found.value == part.value == pytest.approx(0.025)
    assert found.high - found.value == pytest.approx((plain.high - found.value) * math.sqrt(1 + 4 / 3))
    assert part.high - part.value == pytest.approx((plain.high - found.value) * math.sqrt(1 + 4 / 9))
    assert compare_folds({1: 0.5, 2: 0.6}, {1: 0.4}, num_folds=5) is None, "one fold has no spread"


def winner(folds: int | None = None, **about: Any) -> Winner:
    told: dict[str, Any] = {
        "trial": 0,
        "state": "complete",
        "value": 0.9514,
        "pruned": None,
        "num_examples": 288,
    } | about
    compared = Comparison(**{"gain": None, "low": None, "high": None} | told)
    return Winner(
        trial=6, searched=6, configuration={}, metric="accuracy", validation=0.9722, best_epoch=9, folds=folds,
        pruned=None, test=None, confusion=None, comparison=vars(compared), num_test_readings=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("about", "said"),
    [
        (
            {"gain": 0.0208, "low": 0.0035, "high": 0.0382},
            "has accuracy 0.9514; the winner gains 0.0208, 95% interval 0.0035 to 0.0382 over 288 validation examples",
        ),
        (
            {"gain": 0.0035, "low": -0.0104, "high": 0.0173},
            "to 0.0173: cannot be distinguished from the default with 288 validation examples",
        ),
        (
            {"gain": 0.0208, "low": -0.007, "high": 0.0486, "num_candidates": 29},
            "interval -0.0070 to 0.0486 (as the best of 29 trials): cannot be distinguished from the default with 288",
        ),
        ({"pruned": "pruned after 3 of 20 epochs"}, "(trial 0, pruned after 3 of 20 epochs) has accuracy 0.9514"),
        ({"state": "diverged", "value": None}, "The default configuration (trial 0) diverged"),
        (
            {"state": "diverged", "value": None, "num_seeds": (3, 0)},
            "The default configuration (trial 0) diverged with each new seed",
        ),
        ({"trial": 6}, "The winner is the default configuration"),
        ({"is_same": True}, "The winner is the default configuration"),
        (
            {"gain": 0.02, "low": 0.01, "high": 0.03, "num_examples": 0, "folds": 5, "num_folds": 2},
            "the winner gains 0.0200, 95% interval 0.0100 to 0.0300 over 2 of 5 folds",
        ),
        (
            {"num_examples": 0, "folds": 5, "num_folds": 1},
            "has accuracy 0.9514; too few folds of both are known for an interval of the difference",
        ),
        (
            {"gain": 0.03, "low": 0.005, "high": 0.055, "num_examples": 0, "num_seeds": (3, 3)},
            "has accuracy 0.9514, the mean of 3 trainings; the mean of the winner gains 0.0300, 95% interval 0.0050 "
            "to 0.0550 over 3 trainings of the winner and 3 of the default",
        ),
    ],
)
def test_what_the_winner_gains_over_the_default_is_said_with_how_sure_that_is(about: dict[str, Any], said: str) -> None:
    assert said in describe_comparison(winner(**about))


def test_what_the_model_gains_on_the_test_split_is_said_beside_what_it_gains_on_the_examples_that_chose_it() -> None:
    told = winner(gain=0.03, low=-0.01, high=0.07, num_candidates=19)
    tested = replace(told, test_gain={"gain": 0.02, "low": 0.004, "high": 0.04, "num_examples": 360})
    assert describe_comparison(tested) == (
        f"{describe_comparison(told)}; on the 360 test examples its model gains 0.0200, 95% interval 0.0040 to 0.0400"
    )


@pytest.mark.parametrize(
    ("test", "said"),
    [
        ((0.01, 0.03), "; the network beats gradient boosting on the 60 test examples: gain 0.0200, 95% interval 0.01"),
        ((-0.01, 0.05), "; the network cannot be distinguished from gradient boosting on the 60 test examples: gain"),
        (
            (-0.07, -0.01),
            "; the network is worse than gradient boosting on the 60 test examples (gain -0.0400, 95%",
        ),
        (None, "gradient boosting 0.9000"),
    ],
)
def test_whether_a_network_beats_other_models_is_said_by_the_test_split_alone(
    test: tuple[float, float] | None, said: str
) -> None:
    names = ("model", "gain", "low", "high", "num_examples")
    of_test = test and dict(zip(names, ("gradient boosting", fmean(test), *test, 60), strict=True))
    baselines = {"metric": "accuracy", "scores": {"a linear model": 0.8, "gradient boosting": 0.9}, "test": of_test}

    assert said in describe_baselines(replace(winner(), baselines=baselines))
    better = {**baselines, "scores": {"a linear model": 0.98}, "test": None}
    assert describe_baselines(replace(winner(), baselines=better)).endswith(
        "; the network does not beat a linear model, though it was chosen on these examples"
    )


@pytest.mark.parametrize(
    ("pruned", "said"),
    [("pruned after 2 of 5 folds", "≈0.9722, estimated for 5 folds"), (None, "accuracy 0.9722, mean of 5 folds")],
)
def test_the_mean_of_a_winner_whose_folds_are_not_all_known_is_said_to_be_estimated(
    pruned: str | None, said: str
) -> None:
    console = Console(record=True, width=200, file=StringIO())
    counts: dict[TrialState, int] = dict.fromkeys(get_args(TrialState), 0) | {"complete": 2, "pruned": 1}
    outcome = SearchOutcome(
        study="s", home=Path("h"), counts=counts, num_trials=3, is_done=False, interrupted=True,
        winner=replace(winner(folds=5), pruned=pruned),
    )  # fmt: skip
    print_outcome(console, outcome)
    assert said in console.export_text()
