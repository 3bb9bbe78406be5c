"""Torch Datasets with transforms and collate functions of their own: read by workers, and the same each time."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.searches import Searches, descendants, lives, wait_until
from helpers.warm import WarmPopen
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

from hpo import HpoError, Padded, Split, from_torch, load_best, run_search, split_dataset
from hpo.checks.compatibility import check_test_split
from hpo.config import TrainConfig
from hpo.data.batches import TrainingBatches, build_batches, evaluation_batches
from hpo.data.datasets import all_examples, load_splits, save_splits
from hpo.data.fingerprint import data_fingerprint
from hpo.data.loaded import Loaded
from hpo.plugins import load_task
from hpo.records import TrialRecord

NUM = 60
EXAMPLE = Path(__file__).parents[1] / "examples" / "own_dataset.py"


class Noisy(TorchDataset[Any]):
    """Features with noise of all three global generators, and the parity of the index."""

    def __init__(self, noise: float = 1.0) -> None:
        self.noise = noise

    def __len__(self) -> int:
        return NUM

    def __getitem__(self, index: int) -> Any:
        drawn = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])
        return torch.tensor([index, index % 2, 1.0]) + self.noise * drawn, index % 2


class Words(Noisy):
    """Sequences of 1 to 5 ids and their sum."""

    def __getitem__(self, index: int) -> Any:
        return torch.arange(1, 2 + index % 5), float(index % 5)


def padded(examples: list[Any]) -> Any:
    sequences, numbers = zip(*examples, strict=True)
    lengths = torch.tensor([len(each) for each in sequences])
    return Padded(torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True), lengths), torch.tensor(numbers)


def dataset(num_workers: int = 0, **changes: Any) -> Any:
    given: dict[str, Any] = {"evaluation": Noisy(0.0), "classes": ["even", "odd"]} | changes
    return from_torch(given.pop("train", Noisy()), num_workers=num_workers, **given)


def batches_of(split: Split) -> TrainingBatches:
    order, augmentation = (torch.Generator().manual_seed(number) for number in (1, 2))
    spec: Any = dataset().spec
    return build_batches(split, TrainConfig(batch_size=8), spec, order=order, augmentation=augmentation)


def values(batches: Any) -> Tensor:
    return torch.cat([inputs for inputs, _ in batches])


def test_batches_are_the_same_with_any_number_of_workers_and_new_in_each_epoch() -> None:
    epochs = {}
    for num_workers in (0, 1, 2):
        batches = batches_of(split_dataset(dataset(num_workers), seed=0).train)
        epochs[num_workers] = [values(batches), values(batches)]

    first, second = epochs[0]
    assert all(torch.equal(first, other[0]) and torch.equal(second, other[1]) for other in epochs.values())
    assert not torch.equal(first.sort(0).values, second.sort(0).values)  # new noise, not only a new order
    assert len(first.frac().unique()) == first.numel()  # of each generator, and of each example


def test_an_epoch_after_a_resume_has_the_batches_it_would_have_had() -> None:
    split = split_dataset(dataset(), seed=0).train
    batches = batches_of(split)
    values(batches)
    states = [generator.get_state() for generator in (batches._order, batches._augmentation)]
    expected = values(batches)

    resumed = batches_of(split)
    for generator, state in zip((resumed._order, resumed._augmentation), states, strict=True):
        generator.set_state(state)
    assert torch.equal(values(resumed), expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_global_generators_alone(num_workers: int) -> None:
    split = split_dataset(dataset(num_workers), seed=0).train
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    values(batches_of(split))

    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_evaluation_reads_the_examples_as_they_are_and_in_order() -> None:
    splits = split_dataset(dataset(2), seed=0)
    read = list(evaluation_batches(splits.validation, 4))

    inputs, targets = (torch.cat(parts) for parts in zip(*read, strict=True))
    assert torch.equal(inputs[:, 0].long() % 2, targets)
    assert torch.equal(targets, splits.validation.targets)  # type: ignore[arg-type]
    assert torch.equal(inputs, inputs.round())  # no noise
    assert len(all_examples(splits)) == len(splits.train) + len(splits.validation) == NUM * 4 // 5


def test_sequences_are_collated_as_the_task_does_it() -> None:
    data = from_torch(Words(), collate_fn=padded, vocabulary=6, num_workers=0)
    splits = split_dataset(data, seed=0)

    assert (data.spec.kind, data.spec.only_input.is_ragged, data.spec.only_input.vocabulary) == ("regression", True, 6)
    inputs, targets = splits.train.batch(slice(0, 5))
    assert isinstance(inputs, Padded)
    assert inputs.values.sum(1).tolist() == [(n + 1) * (n + 2) / 2 for n in targets.tolist()]
    assert len(splits.train.in_memory().inputs) == len(splits.train)  # type: ignore[arg-type]


def test_splits_reach_a_worker_through_their_file_and_a_change_of_the_data_is_noticed(tmp_path: Path) -> None:
    splits = split_dataset(dataset(), seed=0)
    save_splits(splits, tmp_path / "splits.pt")
    loaded = load_splits(tmp_path / "splits.pt")

    assert isinstance(loaded.train.inputs, Loaded)
    assert torch.equal(values(batches_of(loaded.train)), values(batches_of(splits.train)))
    assert data_fingerprint(dataset()) == data_fingerprint(dataset(2))
    assert data_fingerprint(dataset()) != data_fingerprint(dataset(evaluation=Noisy(0.5)))


def test_a_search_of_the_example_reads_with_workers_and_comes_out_the_same_without(home: Path) -> None:
    values = {}
    for workers in (0, 2):
        outcome = run_search(
            str(EXAMPLE), study=f"workers-{workers}", trials=1, epochs=3, workers=1, device="cpu", home=home,
            data_options={"workers": workers}, precision="fp32", compile="off",
        )  # fmt: skip
        assert outcome.winner is not None
        assert outcome.winner.test is not None
        values[workers] = outcome.trials[0].curve

    assert values[0] == values[2]
    assert max(values[0].values()) > 0.8
    data = load_task(str(EXAMPLE)).objective.load(Path())  # type: ignore[misc]
    images, targets = data.test.open().batch(slice(0, 40))
    predicted = load_best("workers-2", home=home).predict(images)
    assert np.mean([name == str(int(target)) for name, target in zip(predicted, targets, strict=True)]) > 0.7


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_torch_datasets as cases
from hpo import Float, Group, Objective, Space, mlp

class Slow(cases.Noisy):
    def __getitem__(self, index):
        time.sleep(0.05 * Path(__file__).with_name("hold-reading").exists())
        return super().__getitem__(index)

objective = Objective(
    name="slow", description="", load=lambda folder: cases.dataset(2, train=Slow()), model=mlp,
    settings={{"batch_size": 8, "compile": "off"}},
    space=Space(Group("step size", lr=Float(1e-4, 0.1, log=True, default=1e-2))),
)
"""


def test_a_search_killed_while_its_readers_read_continues_with_the_batches_it_would_have_had(
    searches: Searches,
) -> None:
    def search(study: str) -> TrialRecord:
        run_search(str(searches.task), study=study, trials=1, epochs=4, workers=1, device="cpu", home=searches.home)
        return searches.trials(study)[0]

    searches.task.write_text(SLOW.format(tests=str(Path(__file__).parent)))
    searches.hold("reading")
    command = [sys.executable, "-m", "hpo", "search", searches.task, "--study", "killed", "--trials=1", "--epochs=4"]
    options = ["--workers=1", "--device=cpu", "--home", searches.home]
    with WarmPopen([*map(str, [*command, *options])], start_new_session=True) as process:
        try:
            # The server of the workers, its tracker, the worker, and two readers in the middle of an epoch.
            wait_until(lambda: searches.num_saved(1) == 1 and len(descendants(process.pid)) >= 5)
            family = descendants(process.pid)
        finally:
            process.kill()
    wait_until(lambda: not any(map(lives, family)))  # readers look every 5 s whether their parent is there
    searches.release()
    killed, whole = search("killed"), search("whole")

    assert (killed.attempts, whole.attempts) == (2, 1)
    assert killed.curve == whole.curve


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([])


class Broken(Noisy):
    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise OSError("truncated file")
        return super().__getitem__(index)


class Triple(Noisy):
    def __getitem__(self, index: int) -> Any:
        return (*super().__getitem__(index), 1)


class Large(Noisy):
    def __getitem__(self, index: int) -> Any:
        inputs, parity = super().__getitem__(index)
        return inputs, 5 + parity


class Uneven(Noisy):
    def __getitem__(self, index: int) -> Any:
        return torch.zeros(1 + index % 3), index % 2


class Short(Noisy):
    def __len__(self) -> int:
        return NUM - 1


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a stream": ({"train": Stream()}, "train is a Stream without __getitem__ or __len__; it must be a map-style"),
    "a list of nothing": ({"train": 3}, "train is a int without __getitem__"),
    "an example that cannot be read": (
        {"train": Broken(), "evaluation": None},
        "example 7 of the Dataset cannot be read: OSError: truncated file",
    ),
    "three parts": (
        {"train": Triple(), "evaluation": None},
        r"example 0 of the Dataset must be \(inputs, target\), not",
    ),
    "examples of several shapes": (
        {"train": Uneven(), "evaluation": None},
        r"examples .* of the Dataset do not make a batch: .*; give a collate_fn",
    ),
    "a collate function that gives one part": (
        {"collate_fn": lambda examples: torch.zeros(3)},
        r"a batch of the Dataset must be \(inputs, targets\), but has a Tensor; give a collate_fn",
    ),
    "ids without a vocabulary": (
        {"train": Words(), "evaluation": None, "collate_fn": padded, "classes": ()},
        "inputs of the Dataset are int64, which are ids; give from_torch a vocabulary=, or give floats",
    ),
    "another length": ({"evaluation": Short()}, "evaluation has 59 examples, but train 60: they must be the same"),
    "too few targets": ({"targets": [0, 1, 1]}, "there are 3 targets for 60 examples"),
    "a negative number of workers": ({"num_workers": -1}, "num_workers=-1 is not allowed: it must be at least 0"),
    "targets of several shapes": (
        {"targets": [[0], *[[0, 1]] * 59], "kind": "regression", "classes": ()},
        "the targets of the Dataset must be numbers of one shape, as the kind regression needs: ",
    ),
    "targets that are names": ({"targets": ["odd"] * NUM}, "numbers of one shape, as classes need, whose indices they"),
    "targets of another order": (
        {"targets": [index % 2 for index in range(1, NUM + 1)]},
        r"targets\[0\] is \[1\], but example 0 of the Dataset has \[0\]: give the targets in the order of the examples",
    ),
    "a target that is no class": (
        {"train": Large(), "evaluation": None},
        "are from 5 to 6; 2 classes have the indices",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_dataset_that_cannot_be_used_is_told_in_one_line(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(HpoError, match=message) as told:
        split_dataset(dataset(**changes), seed=0)
    assert "\n" not in str(told.value)


def test_a_test_dataset_with_nan_is_refused_before_the_first_trial() -> None:
    with pytest.raises(HpoError, match="in the test split, the data's inputs hold NaN"):
        check_test_split(dataset(test=Noisy(float("nan"))).test, dataset().spec)
