"""Batches of a training and of an evaluation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpo.data.batches import TrainingBatches, evaluation_batches
from hpo.data.examples import Split
from hpo.errors import UnknownNameError, UsageError


def batches_of(
    split: Split, batch_size: int = 4, *, augment: str = "none", seeds: tuple[int, int] = (0, 0)
) -> TrainingBatches:
    order, augmentation = (torch.Generator().manual_seed(seed) for seed in seeds)
    return TrainingBatches(split, batch_size, order=order, augmentation=augmentation, augment=augment)


def numbered(count: int) -> Split:
    return Split(torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count))


def epoch(batches: TrainingBatches) -> list[int]:
    return torch.cat([targets for _, targets in batches]).tolist()


@given(count=st.integers(1, 60), data=st.data())
def test_an_epoch_gives_full_batches_of_different_examples(count: int, data: st.DataObject) -> None:
    batch_size = data.draw(st.integers(1, count))
    batches = batches_of(numbered(count), batch_size)
    given_out = list(batches)
    assert len(given_out) == len(batches) == count // batch_size
    assert all(len(inputs) == len(targets) == batch_size for inputs, targets in given_out)
    assert all(torch.equal(inputs[:, 0].long(), targets) for inputs, targets in given_out)
    used = torch.cat([targets for _, targets in given_out])
    assert len(used.unique()) == len(used)


def test_each_epoch_has_an_order_of_its_own_that_follows_from_the_seed() -> None:
    batches, again = batches_of(numbered(40)), batches_of(numbered(40))
    first, second = epoch(batches), epoch(batches)
    assert sorted(first) == sorted(second) == list(range(40))
    assert first != second
    assert first != list(range(40))
    assert [epoch(again), epoch(again)] == [first, second]
    assert epoch(batches_of(numbered(40), seeds=(1, 0))) != first


def test_generators_restored_between_epochs_repeat_what_follows() -> None:
    split = Split(torch.randint(256, (12, 3, 16, 16), dtype=torch.uint8), torch.arange(12))
    order, augmentation = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    batches = TrainingBatches(split, 5, order=order, augmentation=augmentation, augment="crop+flip+cutout")
    list(batches)
    states = order.get_state(), augmentation.get_state()
    expected = list(batches)
    order.set_state(states[0])
    augmentation.set_state(states[1])
    for (inputs, targets), (same_inputs, same_targets) in zip(expected, batches, strict=True):
        assert torch.equal(inputs, same_inputs)
        assert torch.equal(targets, same_targets)


def test_order_and_augmentation_have_separate_seeds_and_leave_the_global_one_alone() -> None:
    split = Split(torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40))
    before = torch.get_rng_state()
    plain, flipped = (epoch(batches_of(split, augment=augment)) for augment in ("none", "flip"))
    assert plain == flipped, "the augmentation changed the order"
    first, other = (next(iter(batches_of(split, augment="flip", seeds=(0, seed))))[0] for seed in (1, 2))
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_is_larger_than_the_training_split_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size=11 .* 10 examples"):
        batches_of(numbered(10), 11)
    assert len(epoch(batches_of(numbered(10), 10))) == 10


def test_augmentation_is_for_images() -> None:
    with pytest.raises(UsageError, match="augment='flip' is for images"):
        batches_of(numbered(10), augment="flip")
    with pytest.raises(UnknownNameError, match="did you mean 'flip'"):
        batches_of(numbered(10), augment="flipp")


@given(count=st.integers(1, 30), batch_size=st.integers(1, 40))
def test_evaluation_sees_every_example_once_in_order(count: int, batch_size: int) -> None:
    batches = list(evaluation_batches(numbered(count), batch_size))
    assert torch.cat([targets for _, targets in batches]).tolist() == list(range(count))
    assert all(torch.equal(inputs[:, 0].long(), targets) for inputs, targets in batches)
    assert all(len(targets) == batch_size for _, targets in batches[:-1])
