"""Small networks and data for tests of the trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.config import TrainConfig
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.training.distributed import Ranks
from hpo.training.trainer import EpochResult, fit

NUM_CLASSES = 4
IMAGE_SHAPE = (1, 8, 8)


class ImageNet(nn.Module):
    """A small net for raw uint8 images with everything that has a state: a norm, dropout, biases."""

    def __init__(self, *, dropout: float = 0.0, num_classes: int = NUM_CLASSES, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.hidden = nn.Linear(math.prod(IMAGE_SHAPE), width)
            self.output = nn.Linear(width, num_classes)
        self.norm = nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, images: Tensor) -> Tensor:
        hidden = functional.relu(self.norm(self.hidden(images.flatten(1) / 255.0)))
        return self.output(self.dropout(hidden))


class Line(nn.Module):
    """A linear model of float features whose outputs are in the target's units."""

    def __init__(self, num_features: int, mean: float = 0.0, deviation: float = 1.0) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mean, self.deviation = mean, deviation

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features) * self.deviation + self.mean


class Recorder(nn.Module):
    """Wraps a model and keeps a copy of every batch that it was trained on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.batches: list[Tensor] = []

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.batches.append(inputs.clone())
        return self.model(inputs)


class Scripted(nn.Module):
    """Answers so that the accuracy on `targets` of the n-th evaluation is the n-th of `accuracies`."""

    def __init__(self, accuracies: list[float], targets: Tensor) -> None:
        super().__init__()
        self.accuracies, self.targets = accuracies, targets
        self.weight = nn.Parameter(torch.zeros(NUM_CLASSES, 1))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def train(self, mode: bool = True) -> Scripted:
        if mode:
            self.epoch += 1  # type: ignore[assignment]
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        zeros = self.weight.sum() * torch.ones(len(images), NUM_CLASSES)
        if self.training or len(images) != len(self.targets):
            return zeros
        accuracy = self.accuracies[int(self.epoch) - 1]  # type: ignore[arg-type]
        if math.isnan(accuracy):
            return zeros * math.nan
        num_right = round(accuracy * len(images))
        answers = torch.where(torch.arange(len(images)) < num_right, self.targets, (self.targets + 1) % NUM_CLASSES)
        return zeros + functional.one_hot(answers, NUM_CLASSES)


def image_splits(num_train: int = 96, num_validation: int = 40) -> Splits:
    """Four classes that differ in which quarter of the image is bright, under noise."""
    generator = torch.Generator().manual_seed(0)
    number = num_train + num_validation
    targets = torch.randint(NUM_CLASSES, (number,), generator=generator)
    images = torch.randint(0, 180, (number, *IMAGE_SHAPE), generator=generator, dtype=torch.uint8)
    for index, target in enumerate(targets.tolist()):
        images[index, :, 2 * target : 2 * target + 2] += 60
    spec = DataSpec(IMAGE_SHAPE, classes=("a", "b", "c", "d"))
    train, validation = (Split(images[part], targets[part]) for part in (slice(num_train), slice(num_train, None)))
    return Splits(train, validation, spec)


def line_splits(num_examples: int = 200, mean: float = 0.0, deviation: float = 1.0) -> Splits:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(num_examples, 3, generator=generator)
    noise = 0.1 * torch.randn(num_examples, generator=generator)
    targets = mean + deviation * (features @ torch.tensor([0.8, -0.5, 0.2]) + noise)
    half = num_examples // 2
    return Splits(Split(features[:half], targets[:half]), Split(features[half:], targets[half:]), DataSpec((3,)))


def regression_config(**changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {"loss": "mse", "metric": "r2", "batch_size": 10, "lr": 0.05, "optimizer": "adam"}
    return TrainConfig(**(settings | changes))


def quick_config(**changes: Any) -> TrainConfig:
    return TrainConfig(**({"max_epochs": 3, "batch_size": 32, "lr": 0.01} | changes))


def without_time(result: EpochResult) -> dict[str, Any]:
    """All that must be equal when a training is repeated; the text form makes NaN equal to NaN."""
    metrics = {name: repr(value) for name, value in result.metrics.items() if name != "time/epoch_s"}
    return vars(result) | {"metrics": metrics, "value": repr(result.value)}


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


class Float(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.float() / 255


def scripted(accuracies: list[float], **changes: Any) -> tuple[Scripted, Iterator[EpochResult]]:
    splits = image_splits()
    model = Scripted(accuracies, splits.validation.targets)  # type: ignore[arg-type]
    return model, fit(model, splits, quick_config(max_epochs=len(accuracies), **changes))


def trained(ranks: Ranks, changes: dict[str, Any]) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The metrics of each epoch, and the weights, of 97 examples; an odd number of 41 is evaluated."""
    model = ImageNet()
    config = quick_config(**{"compile": "off", "optimizer": "sgd", "lr": 0.1} | changes)
    results = list(fit(model, image_splits(97, 41), config, ranks=ranks))
    return [result.metrics for result in results], {name: each.tolist() for name, each in model.state_dict().items()}
