"""Data in which a class is rare: metrics, class weights, balanced sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.training import Line, line_splits, quick_config, regression_config
from torch import nn

from hpo.data.batches import TrainingBatches
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.errors import UsageError
from hpo.training.trainer import fit


def rare_class_splits() -> Splits:
    """Two overlapping clouds of points; one in 25 is of the second."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(4000) % 25 == 0).long()
    points = torch.randn(4000, 2, generator=generator) + 1.5 * targets[:, None]
    train, validation = (Split(points[part], targets[part]) for part in (slice(2000), slice(2000, None)))
    return Splits(train, validation, DataSpec((2,), ("usual", "rare")))


def test_accuracy_misleads_where_a_class_is_rare_and_macro_recall_shows_it() -> None:
    def trained(**changes: Any) -> dict[str, float]:
        torch.manual_seed(0)
        config = quick_config(max_epochs=6, batch_size=50, lr=0.03, metric="recall", **changes)
        *_, last = fit(nn.Linear(2, 2), rare_class_splits(), config)
        return last.metrics

    plain = trained()
    assert plain["val/accuracy"] > 0.95
    assert plain["val/recall"] < 0.65, "it hardly ever finds the rare class"
    for remedy in ({"class_weights": "balanced"}, {"sampling": "balanced"}):
        balanced = trained(**remedy)
        assert balanced["val/recall"] > 0.8, remedy
        assert balanced["val/accuracy"] < plain["val/accuracy"], remedy


def batches_of(split: Split, sampling: str, seed: int = 0) -> TrainingBatches:
    generators: dict[str, Any] = {name: torch.Generator().manual_seed(seed) for name in ("order", "augmentation")}
    return TrainingBatches(split, 50, augment="none", sampling=sampling, **generators)


def test_balanced_sampling_draws_every_class_equally_often_and_uniform_every_example_once() -> None:
    train = rare_class_splits().train
    numbered = Split(torch.arange(2000)[:, None], train.targets)
    drawn = {name: list(batches_of(numbered, name)) for name in ("uniform", "balanced")}
    shares = {name: torch.cat([targets for _, targets in batches]).float().mean() for name, batches in drawn.items()}
    assert shares["uniform"].item() == pytest.approx(0.04)
    assert shares["balanced"].item() == pytest.approx(0.5, abs=0.05)
    assert len(drawn["balanced"]) == len(drawn["uniform"]) == 40
    seen = torch.cat([inputs[:, 0] for inputs, _ in drawn["balanced"]])
    assert train.targets[seen].equal(torch.cat([targets for _, targets in drawn["balanced"]]))
    rare = seen[train.targets[seen] == 1].unique()
    assert len(rare) == 80, "all of the rare examples are used"


def test_balanced_sampling_follows_from_the_seed_of_the_order() -> None:
    train = rare_class_splits().train
    first, again, other = (next(iter(batches_of(train, "balanced", seed)))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("setting", ["class_weights", "sampling"])
def test_a_regression_has_no_classes_to_balance(setting: str) -> None:
    with pytest.raises(
        UsageError, match=f"{setting}='balanced' is for class.* this task (has a regression|does not have)"
    ):
        next(iter(fit(Line(3), line_splits(), regression_config(**{setting: "balanced"}))))
