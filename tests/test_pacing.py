"""Accumulated gradients, curricula and growing examples: what each does to a training, and that it resumes exactly."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import ImageNet, assert_equal_weights, image_splits, quick_config, weights_of, without_time
from torch import Tensor, nn

from hpo.config import TrainConfig
from hpo.data.batches import TrainingBatches, build_batches
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, InputSpec, Split
from hpo.data.pacing import Pace
from hpo.data.parts import Padded, Ragged
from hpo.errors import DeviceMemoryError, UsageError
from hpo.models.preprocessed import PreprocessedModel
from hpo.objective import Own
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.evaluation import losses_of_examples
from hpo.training.losses import LOSSES_OF_KIND, loss_function
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit


class Plain(ImageNet):
    """Without a batch norm, which would see the size of a part."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = nn.Identity()  # type: ignore[assignment]


def batches_of(splits: Splits, config: TrainConfig, difficulty: Any = None) -> TrainingBatches:
    generators = torch.Generator(), torch.Generator()
    return build_batches(
        splits.train, config, splits.spec, order=generators[0], augmentation=generators[1], difficulty=difficulty
    )


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"optimizer": "sgd", "clip_norm": 0.5}, {"precision": "fp16"}])
def test_accumulated_batches_are_one_batch_of_the_same_size(changes: dict[str, Any]) -> None:
    whole, accumulated = (
        list(fit(model, image_splits(), quick_config(compile="off", **sizes, **changes)))
        for model, sizes in ((Plain(), {"batch_size": 48}), (Plain(), {"batch_size": 12, "accumulate": 4}))
    )
    for one, other in zip(whole, accumulated, strict=True):
        assert other.metrics["train/loss"] == pytest.approx(one.metrics["train/loss"], rel=1e-3)
        assert other.metrics["grad_norm"] == pytest.approx(one.metrics["grad_norm"], rel=1e-2)
        assert other.metrics["lr"] == one.metrics["lr"]
    few = list(fit(Plain(), image_splits(), quick_config(compile="off", batch_size=12, **changes)))
    assert few[-1].metrics["train/loss"] != pytest.approx(whole[-1].metrics["train/loss"], rel=1e-2)


def test_each_pass_of_an_accumulated_step_has_one_batch() -> None:
    sizes = []

    class Counting(Plain):
        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                sizes.append(len(images))
            return super().forward(images)

    list(fit(Counting(), image_splits(), quick_config(max_epochs=1, compile="off", batch_size=12, accumulate=4)))
    assert set(sizes) == {12}
    assert len(sizes) % 4 == 0


def test_an_accumulated_batch_that_does_not_fit_is_halved_once() -> None:
    class Limited(Plain):
        limit = 8

        def forward(self, images: Tensor) -> Tensor:
            if len(images) > self.limit:
                raise torch.OutOfMemoryError("out of memory")
            return super().forward(images)

    splits, config = image_splits(), quick_config()
    loss = loss_function(config, splits.spec)
    images, labels = splits.train.batch(slice(0, 24))
    model = Limited()
    step = TrainingStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), num_parts=2)
    assert step(images, labels).loss.isfinite()
    assert step.num_parts == 4
    model.limit = 3
    with pytest.raises(DeviceMemoryError, match="half of batch_size=12"):
        TrainingStep(model, loss, torch.optim.SGD(model.parameters(), lr=0.1), num_parts=2)(images, labels)


@pytest.mark.parametrize("mode", [pytest.param("step", marks=pytest.mark.compiled_step), "auto"])
def test_an_accumulated_step_is_not_compiled_and_says_so(mode: str) -> None:
    *_, last = fit(Plain(), image_splits(), quick_config(compile=mode, batch_size=12, accumulate=2))
    assert last.settled["compile"] == "off"


def test_more_accumulated_examples_than_there_are_are_refused() -> None:
    with pytest.raises(UsageError, match=r"batch_size=20 times accumulate=50 is larger than the training split"):
        batches_of(image_splits(), quick_config(batch_size=20, accumulate=50))


# --- curriculum -------------------------------------------------------------------------------------------------------


def test_the_share_grows_to_all_examples_and_by_the_root_faster() -> None:
    linear, root = Pace(0.2, 0.5, 20), Pace(0.2, 0.5, 20, "root")
    assert [round(linear.share(epoch), 2) for epoch in (1, 6, 11, 20)] == [0.2, 0.6, 1.0, 1.0]
    assert root.share(6) == pytest.approx(math.sqrt(0.04 + 0.96 * 0.5))
    assert (root.share(1), root.share(11)) == (0.2, 1.0)


def rows_drawn(batches: TrainingBatches, epoch: int) -> list[int]:
    """Each example is told by its first value."""
    batches.epoch = epoch
    return [int(value) for inputs, _ in batches for value in inputs[:, 0].tolist()]


def numbered(num: int = 100) -> Splits:
    inputs = torch.arange(num, dtype=torch.float32)[:, None].repeat(1, 3)
    split = Split(inputs, torch.arange(num) % 2)
    return Splits(split, split, DataSpec((3,), ("a", "b")))


def test_an_epoch_draws_from_the_easiest_examples_alone_and_has_as_many_steps_as_ever() -> None:
    config = TrainConfig(curriculum="given", curriculum_start=0.2, curriculum_until=0.5, max_epochs=10, batch_size=10)
    batches = batches_of(numbered(), config, lambda inputs, targets: -inputs[:, 0])  # the last are the easiest
    for epoch, easiest in ((1, 20), (3, 52), (6, 100), (9, 100)):
        drawn = Counter(rows_drawn(batches, epoch))
        assert min(drawn) == 100 - easiest
        assert sum(drawn.values()) == 100
        assert max(drawn.values()) - min(drawn.values()) <= 1, "each as often as the others"


def test_a_curriculum_goes_with_balanced_sampling() -> None:
    config = TrainConfig(curriculum="given", curriculum_start=0.3, max_epochs=10, batch_size=10, sampling="balanced")
    drawn = Counter(rows_drawn(batches_of(numbered(), config, lambda inputs, targets: inputs[:, 0]), 1))
    assert max(drawn) < 30
    assert 30 < sum(count for row, count in drawn.items() if row % 2) < 70


def test_a_curriculum_by_losses_draws_what_the_model_is_best_at() -> None:
    seen: dict[int, set[int]] = {}
    splits = image_splits()
    rows = {tuple(image.flatten().tolist()): row for row, image in enumerate(splits.train.inputs)}  # type: ignore[arg-type]
    losses: dict[int, Tensor] = {}
    config = quick_config(max_epochs=4, curriculum="loss", curriculum_start=0.25, curriculum_until=1.0, compile="off")

    class Watching(Plain):
        epoch = 0

        def train(self, mode: bool = True) -> Watching:
            if mode:
                self.epoch += 1
                loss = loss_function(config, splits.spec)
                losses[self.epoch] = losses_of_examples(self.eval(), splits.train, config, loss, "classification")
            return super().train(mode)

        def forward(self, images: Tensor) -> Tensor:
            if self.training:
                seen.setdefault(self.epoch, set()).update(rows[tuple(image.flatten().tolist())] for image in images)
            return super().forward(images)

    list(fit(Watching(), splits, config))
    num = len(splits.train)
    for epoch in (2, 3, 4):
        size = max(config.batch_size, math.ceil((0.25 + 0.75 * (epoch - 1) / 4) * num))
        easiest = set(losses[epoch].argsort()[:size].tolist())
        assert seen[epoch] <= easiest
    assert len(seen[1]) <= max(config.batch_size, math.ceil(0.25 * num))


def test_the_losses_of_examples_have_the_loss_as_their_mean() -> None:
    torch.manual_seed(0)
    kinds = {
        "classification": (torch.randn(12, 3), torch.arange(12) % 3),
        "soft_labels": (torch.randn(12, 3), torch.rand(12, 3).softmax(1)),
        "multilabel": (torch.randn(12, 3), torch.rand(12, 3) > 0.5),
        "regression": (torch.randn(12), torch.randn(12)),
        "segmentation": (torch.randn(12, 3, 4, 4), torch.randint(3, (12, 4, 4))),
        "box": (torch.rand(12, 4) + torch.tensor([0, 0, 1, 1]), torch.rand(12, 4) + torch.tensor([0, 0, 1, 1])),
    }
    for kind, (outputs, targets) in kinds.items():
        spec = DataSpec((2,), () if kind in ("regression", "box") else ("a", "b", "c"), kind)
        for loss in LOSSES_OF_KIND[kind]:
            if loss == "dice":
                continue
            config = TrainConfig(loss=loss, batch_size=4)
            split, function = Split(outputs, targets), loss_function(config, spec)
            found = losses_of_examples(nn.Identity(), split, config, function, kind)
            assert found.shape == (12,)
            assert found.mean().item() == pytest.approx(function(outputs, targets).item(), rel=1e-5), (kind, loss)


# --- growing examples -------------------------------------------------------------------------------------------------


class Pooled(nn.Module):
    """Takes images of any size, and notes which."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.output = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)
        self.seen: list[tuple[int, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append((images.shape[-1], self.training))
        return self.output(self.layer(images / 255).relu().mean((2, 3)))


def test_images_grow_in_stages_and_are_evaluated_in_full() -> None:
    config = quick_config(max_epochs=10, progressive_start=0.5, progressive_until=0.8, patience=10, precision="fp32")
    model = Pooled()
    *_, last = fit(model, image_splits(), config)
    trained = [side for side, is_training in model.seen if is_training]
    steps = len(trained) // 10
    assert [trained[epoch * steps] for epoch in range(10)] == [4, 4, 5, 5, 6, 6, 7, 7, 8, 8]
    assert {side for side, is_training in model.seen if not is_training} == {8}
    assert last.settled["compile"] == "off"


def test_a_smaller_image_is_a_smaller_image_and_its_mask_is_too() -> None:
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    image[..., :4, :] = 200
    mask = (image[:, 0] > 0).long()
    config = TrainConfig(progressive_start=0.5, batch_size=1)
    split = Split(image, mask)
    batches = batches_of(Splits(split, split, DataSpec((1, 8, 8), ("a", "b"), "segmentation")), config)
    ((smaller, of_smaller),) = batches
    assert smaller.shape == (1, 1, 4, 4)
    assert torch.equal((smaller[:, 0] > 100).long(), of_smaller)
    assert of_smaller.sum() == 8


def test_sequences_end_earlier_and_so_do_the_labels_of_their_elements() -> None:
    sequences = [torch.arange(1, length + 1) for length in range(1, 11)]
    split = Split(Ragged.of(sequences), Ragged.of([each % 2 for each in sequences]))
    spec = DataSpec(InputSpec((), "int64", is_ragged=True, vocabulary=12), ("even", "odd"), "tagging")
    batches = batches_of(Splits(split, split, spec), TrainConfig(progressive_start=0.4, batch_size=10))
    ((inputs, targets),) = batches
    assert isinstance(inputs, Padded)
    assert sorted(inputs.lengths.tolist()) == [1, 2, 3, 4, 4, 4, 4, 4, 4, 4]
    assert inputs.values.shape == targets.values.shape == (10, 4)
    assert torch.equal(targets.lengths, inputs.lengths)
    assert torch.equal(targets.values[targets.mask], inputs.values[inputs.mask] % 2)
    batches.epoch = 20
    ((inputs, _),) = batches
    assert int(inputs.lengths.max()) == 10


# --- resuming ---------------------------------------------------------------------------------------------------------

STRATEGIES: dict[str, dict[str, Any]] = {
    "accumulate": {"batch_size": 12, "accumulate": 3},
    "curriculum by losses": {"curriculum": "loss", "curriculum_until": 1.0, "curriculum_pacing": "root"},
    "curriculum that is given": {"curriculum": "given", "curriculum_until": 1.0},
    "progressive": {"progressive_start": 0.5, "progressive_until": 1.0, "augment": "crop+flip"},
    "all": {"accumulate": 2, "curriculum": "loss", "progressive_start": 0.5, "batch_size": 12, "ema_decay": 0.9},
}


class Whole(PreprocessedModel):
    """With dropout and a batch norm, for images of any size."""

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                nn.Dropout(0.2), nn.Linear(6, 4),
            )  # fmt: skip
        own = Own(difficulty=lambda images, labels: images.flatten(1).float().std(1))
        super().__init__(network, image_splits().spec, own)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_training_that_was_stopped_after_each_epoch_is_bit_equal(name: str, tmp_path: Path) -> None:
    config = quick_config(max_epochs=4, patience=4, compile="off", **STRATEGIES[name])
    expected_model = Whole()
    expected = [without_time(result) for result in fit(expected_model, image_splits(), config)]
    results: list[dict[str, Any]] = []
    for stop in range(1, 5):
        model = Whole(seed=len(results))
        for result in fit(model, image_splits(), config, checkpoint=CheckpointFolder(tmp_path)):
            if not results or result.epoch > results[-1]["epoch"]:
                results.append(without_time(result))
            if result.epoch >= stop:
                break
    assert results == expected
    assert_equal_weights(weights_of(model), weights_of(expected_model))
