"""Data that do not fit: images that stay in their file, batches that are streamed, and the same results bit by bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import of_classes
from torch import Tensor, nn

from hpo.config import TrainConfig
from hpo.data import batches as batches_module
from hpo.data.batches import TrainingBatches, evaluation_batch_size, evaluation_batches, place
from hpo.data.datasets import Splits, hold_out, load_splits, save_splits, split_dataset
from hpo.data.examples import Dataset, DataSpec, SealedSplit, Split
from hpo.data.mapped import MappedImages
from hpo.errors import DataError
from hpo.models.preprocessed import PreprocessedModel
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.evaluation import evaluate
from hpo.training.trainer import fit

SHAPE = (3, 8, 8)
CLASSES = ("dark", "grey", "bright")


@pytest.fixture
def images() -> Tensor:
    """90 noisy images, the brighter the higher their class."""
    noise = torch.randint(0, 120, (90, *SHAPE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return noise + (torch.arange(90) % 3 * 40).to(torch.uint8).view(-1, 1, 1, 1)


@pytest.fixture
def mapped(images: Tensor, tmp_path: Path) -> MappedImages:
    images.numpy().tofile(tmp_path / "images.bin")
    return MappedImages(tmp_path / "images.bin", len(images), SHAPE, torch.arange(len(images)))


def targets() -> Tensor:
    return torch.arange(90) % 3


def dataset(inputs: Tensor | MappedImages) -> Dataset:
    return Dataset(Split(inputs, targets()), SealedSplit(lambda: pytest.fail("opened"), 1), CLASSES)


@pytest.fixture
def resident(images: Tensor) -> Splits:
    return split_dataset(dataset(images), validation_fraction=0.2, seed=0)


@pytest.fixture
def in_file(mapped: MappedImages, monkeypatch: pytest.MonkeyPatch) -> Splits:
    """The same splits, left in their file for want of memory."""
    monkeypatch.setattr("hpo.data.datasets.MEMORY_SHARE", 0.0)
    return split_dataset(dataset(mapped), validation_fraction=0.2, seed=0)


def test_images_in_a_file_are_taken_as_from_a_tensor(images: Tensor, mapped: MappedImages) -> None:
    rows = torch.tensor([5, 80, 5, 0])
    assert torch.equal(mapped.index_select(0, rows), images[rows])
    assert torch.equal(mapped[3:7], images[3:7])
    some = mapped.select(rows)
    assert (len(some), some.shape, some.ndim, some.dtype, some.nbytes) == (4, (4, *SHAPE), 4, torch.uint8, 4 * 192)
    assert torch.equal(some.select(torch.tensor([1, 3]))[:], images[[80, 0]])


def test_a_file_that_was_cut_off_is_named(mapped: MappedImages) -> None:
    with mapped.file.open("rb+") as file:
        file.truncate(1000)
    with pytest.raises(DataError, match=r"images\.bin is missing or damaged"):
        mapped.select(torch.tensor([0]))


def test_a_file_may_be_larger_than_the_memory(tmp_path: Path) -> None:
    num_images = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 192
    with (tmp_path / "sparse.bin").open("wb") as file:
        file.truncate(num_images * 192)
    images = MappedImages(tmp_path / "sparse.bin", num_images, SHAPE, torch.tensor([0, num_images - 1]))
    assert images[:].sum() == 0


def test_images_from_a_file_are_read_where_they_fit_into_memory(resident: Splits, mapped: MappedImages) -> None:
    splits = split_dataset(dataset(mapped), validation_fraction=0.2, seed=0)
    for split, other in ((splits.train, resident.train), (splits.validation, resident.validation)):
        assert isinstance(split.inputs, Tensor)
        assert torch.equal(split.inputs, other.inputs)  # type: ignore[arg-type]


def test_splits_that_stay_in_their_file_are_saved_without_their_images(
    in_file: Splits, resident: Splits, tmp_path: Path
) -> None:
    save_splits(in_file, tmp_path / "splits.pt")
    assert (tmp_path / "splits.pt").stat().st_size < resident.num_bytes / 2
    loaded = load_splits(tmp_path / "splits.pt")
    assert isinstance(loaded.train.inputs, MappedImages)
    assert torch.equal(loaded.train.inputs[:], resident.train.inputs)  # type: ignore[arg-type]
    assert torch.equal(loaded.validation.targets, resident.validation.targets)  # type: ignore[arg-type]
    assert loaded.num_bytes == resident.train.targets.nbytes + resident.validation.targets.nbytes


def test_what_is_held_out_stays_in_its_file(images: Tensor, mapped: MappedImages) -> None:
    held, known = (hold_out(inputs, targets(), CLASSES) for inputs in (mapped, images))
    assert isinstance(held.train.inputs, MappedImages)
    assert torch.equal(held.train.inputs[:], known.train.inputs[:])  # type: ignore[arg-type]
    assert torch.equal(held.test.open().inputs[:], known.test.open().inputs[:])  # type: ignore[arg-type]


class Net(nn.Module):
    """A small conv net with everything that has a state, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(8 * 36, 3)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def trained(splits: Splits, *, device: str = "cpu", **settings: Any) -> tuple[list[float], dict[str, Tensor]]:
    """What a training measures, and its weights."""
    torch.manual_seed(0)
    model = PreprocessedModel(Net(), DataSpec(SHAPE, CLASSES))
    model.fit_statistics(splits.train)
    settings = {"max_epochs": 2, "batch_size": 12, "precision": "fp32", "device": device, **settings}
    results = list(fit(model, splits, TrainConfig(**settings)))
    numbers = [value for r in results for name, value in sorted(r.metrics.items()) if name != "time/epoch_s"]
    return numbers, {name: value.cpu() for name, value in model.state_dict().items()}


def assert_same(training: tuple[list[float], dict[str, Tensor]], other: tuple[list[float], dict[str, Tensor]]) -> None:
    assert training[0] == other[0]
    assert all(torch.equal(training[1][name], other[1][name]) for name in training[1])


@pytest.mark.parametrize(
    "settings",
    [{"augment": "crop+flip+cutout", "ema_decay": 0.5}, {"sampling": "balanced", "optimizer": "sgd"}],
    ids=str,
)
def test_a_training_from_a_file_is_bit_equal_to_one_from_memory(
    settings: dict[str, Any], in_file: Splits, resident: Splits
) -> None:
    assert isinstance(in_file.train.inputs, MappedImages)
    assert_same(trained(in_file, **settings), trained(resident, **settings))


def test_a_training_from_a_file_continues_bit_equal(in_file: Splits, resident: Splits, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    settings: dict[str, Any] = {"augment": "crop+flip", "max_epochs": 3}
    whole = trained(resident, **settings)
    torch.manual_seed(0)
    model = PreprocessedModel(Net(), in_file.spec)
    model.fit_statistics(in_file.train)
    config = TrainConfig(batch_size=12, precision="fp32", **settings)
    first = fit(model, in_file, config, checkpoint=folder)
    next(first)
    first.close()
    again = PreprocessedModel(Net(), in_file.spec)
    results = list(fit(again, in_file, config, checkpoint=folder))
    assert [result.epoch for result in results] == [1, 2, 3]
    assert all(torch.equal(whole[1][name], value) for name, value in again.state_dict().items())


def test_a_test_split_in_a_file_is_evaluated(in_file: Splits, resident: Splits) -> None:
    torch.manual_seed(0)
    model = PreprocessedModel(Net(), in_file.spec).eval()
    scores = [
        evaluate(model, splits.validation, TrainConfig(batch_size=5), of_classes(len(CLASSES)))
        for splits in (in_file, resident)
    ]
    assert scores[0] == scores[1]


def test_large_examples_are_evaluated_in_batches_of_the_training() -> None:
    def split(*shape: int) -> Split:
        return Split(torch.zeros(2, *shape), torch.zeros(2))

    sizes = [
        evaluation_batch_size(split(*shape), 64, convolves_on_cpu=convolves)
        for shape in ((3, 32, 32), (10,), (3, 224, 224))
        for convolves in (False, True)
    ]
    assert sizes == [2048, 256, 2048, 256, 64, 64]


def test_splits_that_would_fill_the_device_are_left_where_they_are(
    resident: Splits, in_file: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place(resident, "meta").train.inputs.device.type == "meta"
    monkeypatch.setattr(batches_module, "_free_memory", lambda device: 1.9 * resident.num_bytes)
    assert place(resident, "meta") is resident
    monkeypatch.undo()
    assert place(in_file, "meta") is in_file


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_streamed_to_a_gpu_a_training_is_bit_equal_to_one_on_it(
    kind: str, resident: Splits, in_file: Splits, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"augment": "crop+flip+cutout", "ema_decay": 0.5, "deterministic": True}
    settings |= {"device": "cuda"}
    on_device = trained(resident, **settings)
    monkeypatch.setattr(batches_module, "DEVICE_SHARE", 0.0)
    assert place(resident, "cuda") is resident
    assert_same(trained(resident if kind == "memory" else in_file, **settings), on_device)


@pytest.mark.gpu
def test_batches_stay_right_while_later_ones_are_on_their_way() -> None:
    """A kernel that is still at work on a batch must not find the next one in its memory."""
    inputs = torch.arange(64 * 3 * 64 * 64, dtype=torch.int64).view(64, 3, 64, 64).remainder(251).to(torch.uint8)
    split = Split(inputs, torch.arange(64))
    sums = []
    for batch, _ in evaluation_batches(split, 4, "cuda"):
        torch.cuda._sleep(10_000_000)  # type: ignore[no-untyped-call]
        sums.append(batch.long().sum((1, 2, 3)))
    assert torch.equal(torch.cat(sums).cpu(), inputs.long().sum((1, 2, 3)))
    batches = TrainingBatches(
        split, 8, order=torch.Generator(), augmentation=torch.Generator(), augment="flip", device="cuda"
    )
    assert all(inputs.is_cuda and targets.is_cuda for inputs, targets in batches)
