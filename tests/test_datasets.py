"""How examples are split, limited and held out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpo.data.datasets import hold_out, split_dataset
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.errors import UsageError


def classified(counts: list[int]) -> Dataset:
    """A data set with that many examples of each class; the only feature of an example is its position."""
    targets = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    train = Split(torch.arange(len(targets), dtype=torch.float32)[:, None], targets)
    classes = tuple(f"class {label}" for label in range(len(counts)))
    return Dataset(train, SealedSplit(lambda: pytest.fail("the test split was opened"), 5), classes)


def positions(split: Split) -> list[int]:
    return split.inputs[:, 0].int().tolist()  # type: ignore[call-overload]


@given(
    counts=st.lists(st.integers(10, 60), min_size=2, max_size=5),
    fraction=st.floats(0.2, 0.6),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_split_shares_out_every_example_once_and_each_class_in_proportion(
    counts: list[int], fraction: float, seed: int
) -> None:
    dataset = classified(counts)
    splits = split_dataset(dataset, validation_fraction=fraction, seed=seed)
    assert sorted(positions(splits.train) + positions(splits.validation)) == list(range(sum(counts)))
    assert len(splits.validation) == int(np.ceil(sum(counts) * fraction))
    share = len(splits.validation) / sum(counts)
    for label, count in enumerate(counts):
        assert abs((splits.validation.targets == label).sum().item() - count * share) <= 0.5 + len(counts) / 2


@given(limit=st.integers(40, 200), seed=st.integers(0, 2**63 - 1))
def test_balanced_classes_stay_balanced_to_within_one_example(limit: int, seed: int) -> None:
    splits = split_dataset(classified([20] * 10), validation_fraction=0.25, seed=seed, limit=limit)
    assert len(splits.train) + len(splits.validation) == limit
    validation, train = splits.validation.targets.bincount(), splits.train.targets.bincount()
    assert validation.max() - validation.min() <= 1
    assert (validation + train).max() - (validation + train).min() <= 1


def test_a_split_follows_from_its_seed_alone() -> None:
    dataset = classified([50, 50])
    first, again, other = (split_dataset(dataset, validation_fraction=0.2, seed=seed) for seed in (1, 1, 2))
    assert positions(first.train) == positions(again.train)
    assert positions(first.validation) == positions(again.validation)
    assert set(positions(first.validation)) != set(positions(other.validation))


def test_inputs_keep_their_targets_in_a_split() -> None:
    dataset = classified([30, 50, 20])
    splits = split_dataset(dataset, validation_fraction=0.3, seed=0)
    for split in (splits.train, splits.validation):
        assert torch.equal(split.targets, dataset.train.targets[positions(split)])  # type: ignore[arg-type, call-overload]


def test_a_larger_limit_keeps_the_examples_of_a_smaller_one() -> None:
    dataset = classified([50, 50])
    small, large = (split_dataset(dataset, validation_fraction=0.2, seed=3, limit=limit) for limit in (20, 60))
    kept = set(positions(large.train) + positions(large.validation))
    assert set(positions(small.train) + positions(small.validation)) < kept


def test_a_regression_is_split_at_random() -> None:
    values = torch.linspace(0, 1, 100)
    dataset = Dataset(Split(values[:, None] * 100, values), SealedSplit(lambda: pytest.fail("opened"), 1))
    splits = split_dataset(dataset, validation_fraction=0.2, seed=0)
    assert (len(splits.train), len(splits.validation)) == (80, 20)
    assert splits.validation.targets.diff().sign().unique().numel() > 1, "in order: it was not shuffled"


def test_splitting_does_not_open_the_test_split() -> None:
    dataset = classified([20, 20])
    split_dataset(dataset, validation_fraction=0.2, seed=0, limit=20)
    assert dataset.test.times_opened == 0


@pytest.mark.parametrize(
    ("limit", "fraction", "numbers"),
    [
        (0, 0.2, ("limit=0", "40")),
        (-3, 0.2, ("limit=-3", "40")),
        (41, 0.2, ("limit=41", "40")),
        (4, 0.5, ("4 examples", "4 classes")),
        (1, 0.2, ("1 examples", "none for training")),
        (None, 0.0, ("validation_fraction=0.0",)),
        (None, 1.0, ("validation_fraction=1.0",)),
        (None, float("nan"), ("validation_fraction=nan",)),
        (None, 0.99, ("40 examples", "training")),
    ],
)
def test_a_split_that_cannot_be_made_is_refused_with_its_numbers(
    limit: int | None, fraction: float, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as error:
        split_dataset(classified([10] * 4), validation_fraction=fraction, seed=0, limit=limit)
    for number in numbers:
        assert number in str(error.value)


def test_splits_move_to_a_device_as_a_whole() -> None:
    splits = split_dataset(classified([10, 10]), validation_fraction=0.5, seed=0)
    moved = splits.to("meta")
    devices = {t.device.type for s in (moved.train, moved.validation) for t in (s.inputs, s.targets)}
    assert devices == {"meta"}
    assert moved.spec == splits.spec


def test_what_is_held_out_is_stratified_and_sealed() -> None:
    whole = classified([40, 60])
    dataset = hold_out(whole.train.inputs, whole.train.targets, ["a", "b"], test_fraction=0.1)
    assert (len(dataset.train), len(dataset.test), dataset.classes) == (90, 10, ("a", "b"))
    assert dataset.test.times_opened == 0
    test = dataset.test.open()
    assert test.targets.bincount().tolist() == [4, 6]
    assert sorted(positions(dataset.train) + positions(test)) == list(range(100))
    assert dataset.test.times_opened == 1


def test_the_same_examples_are_held_out_for_ever() -> None:
    """Another choice would put test examples of earlier studies into the training of later ones."""
    whole = classified([8, 12])
    assert sorted(positions(hold_out(whole.train.inputs, whole.train.targets, "ab").test.open())) == [1, 6, 18, 19]


def test_a_rare_class_may_be_missing_in_the_validation_split_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    targets = torch.tensor([0] * 50 + [1] * 49 + [2])
    dataset = Dataset(Split(torch.rand(100, 3), targets), SealedSplit(lambda: pytest.fail("sealed"), 1), tuple("abc"))

    splits = split_dataset(dataset, seed=0)

    assert 2 in splits.train.targets
    assert 2 not in splits.validation.targets
    assert (
        "the validation split has no example of 'c' (1 for training), so nothing judges how well it is learned"
        in caplog.text
    )
