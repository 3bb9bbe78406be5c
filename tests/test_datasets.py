"""How examples are split, limited and held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import LR_SPACE
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hpo
from hpo.data.datasets import all_examples, folds, hold_out, load_splits, save_splits, split_dataset
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.errors import DataError, UsageError


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


def grouped(groups: list[int] | list[str], labels: Tensor) -> Dataset:
    inputs = torch.arange(len(labels), dtype=torch.float32)[:, None]
    return hold_out(inputs, labels, ["a", "b"], groups=groups)


@given(sizes=st.lists(st.integers(1, 12), min_size=20, max_size=60), seed=st.integers(0, 2**31))
def test_groups_are_divided_between_no_two_splits_or_folds_and_keep_size_and_classes(
    sizes: list[int], seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    of_example = [number for number, size in enumerate(sizes) for _ in range(size)]
    labels = (torch.rand(len(of_example), generator=draw) < 0.4).long()
    labels[:2] = torch.tensor([0, 1])
    names = [f"patient {number}" for number in of_example]
    dataset = grouped(names, labels)
    splits = split_dataset(dataset, seed=seed)

    def group_of(split: Split) -> set[int]:
        return {of_example[position] for position in positions(split)}

    parts = [dataset.test.open(), splits.validation, splits.train]
    assert sorted(position for part in parts for position in positions(part)) == list(range(len(names)))
    assert sum(len(group_of(part)) for part in parts) == len(sizes), "no group is in two of them"
    for part, share in zip(parts[:2], (0.2, 0.16), strict=True):
        assert abs(len(part) - share * len(names)) <= max(sizes)

    each = list(folds(splits, 4))
    assert [len(group_of(fold.train) & group_of(fold.validation)) for fold in each] == [0] * 4
    assert sorted(n for fold in each for n in positions(fold.validation)) == sorted(positions(all_examples(splits)))
    ideal = len(all_examples(splits)) / 4
    assert max(abs(len(fold.validation) - ideal) for fold in each) <= max(sizes) + 1


def test_groups_survive_the_file_of_the_splits_and_balance_the_classes(tmp_path: Path) -> None:
    labels = torch.arange(200) // 100  # the first groups have one class, the others the other one
    splits = split_dataset(grouped([number // 5 for number in range(200)], labels), seed=0)
    assert splits.validation.targets.bincount().tolist() == [15, 15]
    save_splits(splits, tmp_path / "splits")
    kept = load_splits(tmp_path / "splits")
    assert kept.groups is not None
    assert torch.equal(kept.groups, splits.groups)
    assert [fold.validation.targets.bincount().tolist() for fold in folds(kept, 4)] == [[20, 20]] * 4


def test_of_ordered_examples_the_last_ones_are_tested_and_before_them_the_last_ones_validated() -> None:
    whole = classified([50, 50])
    dataset = hold_out(whole.train.inputs, torch.rand(100), is_ordered=True)
    splits, few = split_dataset(dataset, seed=7), split_dataset(dataset, seed=7, limit=20)
    assert positions(dataset.test.open()) == list(range(80, 100))
    assert (positions(splits.train), positions(splits.validation)) == (list(range(64)), list(range(64, 80)))
    assert (positions(few.train), positions(few.validation)) == (list(range(60, 76)), list(range(76, 80)))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"groups": [0, 1]}, r"groups must have one entry for each of the 100 examples, not \(2,\)"),
        ({"groups": [0] * 100, "is_ordered": True}, "omit groups or is_ordered"),
        ({"groups": [*["a"] * 99, None]}, "groups have no entry for example 99"),
        ({"groups": [0] * 100}, "the 100 examples are all of one group, which cannot be divided"),
    ],
)
def test_groups_that_divide_nothing_are_refused(options: dict[str, Any], told: str) -> None:
    whole = classified([50, 50]).train
    with pytest.raises((DataError, UsageError), match=told):
        hold_out(whole.inputs, whole.targets, ["a", "b"], **options)


def test_the_only_group_of_a_class_is_trained_on() -> None:
    labels = torch.arange(300) % 2
    labels[100:110] = 2
    inputs, groups = torch.arange(300.0)[:, None], [number // 10 for number in range(300)]
    for seed in range(4):
        splits = split_dataset(hold_out(inputs, labels, ["a", "b", "m"], groups=groups), seed=seed)
        assert (splits.train.targets == 2).sum() == 10
    with pytest.raises(UsageError, match="without some of them training would lack a class"):
        hold_out(inputs[:20], torch.arange(20) // 10, ["a", "b"], groups=groups[:20])


def test_folds_of_too_few_groups_and_of_ordered_examples_are_refused(home: Path) -> None:
    def search(**divided: Any) -> None:
        inputs, targets = torch.randn(60, 2), torch.arange(60) % 2

        def load(data_dir: Path | None) -> Dataset:
            return hold_out(inputs, targets, ["a", "b"], **divided)

        objective = hpo.Objective(name="x", description="", load=load, model=hpo.mlp, space=LR_SPACE)
        hpo.run_search(objective, trials=1, folds=4, home=home, device="cpu")

    with pytest.raises(UsageError, match="--folds 4 is not allowed: the examples are of only 3 groups"):
        search(groups=[number % 4 for number in range(60)])
    with pytest.raises(UsageError, match="--folds 4 is not possible: the examples are in the order of time"):
        search(is_ordered=True)


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
