"""The shared trainer: what it promises, and the defects of the tutorial loop that must not come back."""

from __future__ import annotations

import gc
import math
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.config import AUGMENTATIONS, CLASS_WEIGHTS, OPTIMIZERS, SAMPLINGS, SCHEDULES, Direction, TrainConfig
from hpo.data.datasets import Splits, split_dataset
from hpo.data.examples import Dataset, DataSpec, SealedSplit, Split
from hpo.errors import CheckpointError, DeviceMemoryError, UnknownNameError, UsageError
from hpo.training import precision
from hpo.training import step as training_step
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.compiled import let_dropout_vary, settle_compile_mode
from hpo.training.losses import CLASSIFICATION_LOSSES, loss_function, target_scale
from hpo.training.metrics import CLASSIFICATION_METRICS, ConfusionMetrics, EpochMetrics, RegressionMetrics, auroc
from hpo.training.optimizers import FusedStep, build_optimizer
from hpo.training.precision import settle_precision
from hpo.training.schedules import build_schedule
from hpo.training.step import TrainingStep
from hpo.training.stopping import EarlyStopping
from hpo.training.trainer import NORM_EVERY, EpochResult, evaluate, evaluate_classes, fit

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
            self.epoch += 1
        return super().train(mode)

    def forward(self, images: Tensor) -> Tensor:
        zeros = self.weight.sum() * torch.ones(len(images), NUM_CLASSES)
        if self.training or len(images) != len(self.targets):
            return zeros
        accuracy = self.accuracies[int(self.epoch) - 1]
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
    settings = {"loss": "mse", "metric": "r2", "batch_size": 10, "lr": 0.05, "optimizer": "adam"}
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


# The defects of the tutorial loop.


def test_the_training_data_are_shuffled_anew_in_each_epoch() -> None:
    splits = image_splits()
    model = Recorder(ImageNet())
    list(fit(model, splits, quick_config(max_epochs=2)))
    first, second = torch.cat(model.batches[:3]), torch.cat(model.batches[3:])

    def as_set(images: Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    assert as_set(first) == as_set(second) == as_set(splits.train.inputs)
    assert not torch.equal(first, second)
    assert not torch.equal(first, splits.train.inputs)


def test_the_test_split_is_never_opened_by_a_training() -> None:
    whole = image_splits().train
    sealed = SealedSplit(lambda: whole, len(whole))
    dataset = Dataset(whole, sealed, classes=("a", "b", "c", "d"))
    list(fit(ImageNet(), split_dataset(dataset, validation_fraction=0.25, seed=0), quick_config()))
    assert sealed.times_opened == 0


@pytest.mark.parametrize("max_epochs", [1, 4])
@pytest.mark.parametrize("batch_size", [16, 96])
def test_a_one_cycle_spans_exactly_the_steps_of_the_training_and_reaches_its_end(
    max_epochs: int, batch_size: int
) -> None:
    config = quick_config(schedule="one_cycle", max_epochs=max_epochs, batch_size=batch_size, lr=0.1)
    rates = [result.metrics["lr"] for result in fit(ImageNet(), image_splits(), config)]
    end = 0.1 / 25 / 1e4
    assert rates[-1] == pytest.approx(end)
    assert all(rate > 100 * end for rate in rates[:-1])


def test_a_schedule_is_stepped_once_a_step() -> None:
    config = quick_config(schedule="cosine", warmup_fraction=0.0, max_epochs=2, lr=0.1)
    rates = [result.metrics["lr"] for result in fit(ImageNet(), image_splits(), config)]
    assert rates == pytest.approx([0.05, 0.0])


def test_the_checkpoints_of_two_trials_do_not_collide(tmp_path: Path) -> None:
    configs = [quick_config(max_epochs=2, lr=lr) for lr in (0.001, 0.1)]
    alone, interleaved = [ImageNet() for _ in configs], [ImageNet() for _ in configs]
    for model, config in zip(alone, configs, strict=True):
        list(fit(model, image_splits(), config))

    folders = [CheckpointFolder(tmp_path / "checkpoints" / str(trial)) for trial in range(2)]
    for last_epoch, trials in ((1, [0, 1]), (2, [1, 0])):  # one epoch of each, then the other, from the folders
        for trial in trials:
            for result in fit(interleaved[trial], image_splits(), configs[trial], checkpoint=folders[trial]):
                if result.epoch == last_epoch:
                    break
    for trial, folder in enumerate(folders):
        assert len(list(folder.path.iterdir())) == 2
        list(fit(interleaved[trial], image_splits(), configs[trial], checkpoint=folder))
        assert_equal_weights(weights_of(interleaved[trial]), weights_of(alone[trial]))


def test_a_run_without_a_finite_epoch_has_no_best_and_loads_nothing_stale(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    model = ImageNet()
    with torch.no_grad():
        model.output.bias.fill_(math.nan)
    results = list(fit(model, image_splits(), quick_config(), checkpoint=folder))
    (result,) = results
    assert result.diverged
    assert math.isnan(result.value)
    assert (result.best_value, result.best_epoch, result.is_best) == (None, None, False)
    assert model.output.bias.isnan().all()


def test_a_metric_to_be_minimised_has_its_best_at_the_minimum() -> None:
    config = quick_config(metric="loss", max_epochs=12, lr=0.3, optimizer="sgd", patience=12)
    model = ImageNet()
    results = list(fit(model, image_splits(), config))
    values = [result.value for result in results]
    assert values[0] > min(values) < values[-1], "the minimum must lie inside, or the test shows nothing"
    assert results[-1].best_value == min(values)
    assert results[-1].best_epoch == values.index(min(values)) + 1
    assert evaluate(model, image_splits().validation, config, NUM_CLASSES)["loss"] == pytest.approx(min(values))


@pytest.mark.parametrize("batch_size", [1, 7, 96])
def test_the_batch_size_is_honoured(batch_size: int) -> None:
    model = Recorder(nn.Sequential(nn.Flatten(), Float(), nn.Linear(64, NUM_CLASSES)))
    list(fit(model, image_splits(), quick_config(batch_size=batch_size, max_epochs=2)))
    assert {len(batch) for batch in model.batches} == {batch_size}
    assert len(model.batches) == 2 * (96 // batch_size)


def test_the_epoch_loss_weighs_every_example_alike() -> None:
    splits = image_splits()
    inputs = splits.validation.inputs.repeat(52, 1, 1, 1)[:2049]  # one more than an evaluation batch holds
    targets = splits.validation.targets.repeat(52)[:2049]
    model = ImageNet().eval()
    targets[-1] = model(inputs[-1:]).argmin()  # a last batch of one, with a loss unlike the others'

    measured = evaluate(model, Split(inputs, targets), quick_config(), NUM_CLASSES)["loss"]
    with torch.no_grad():
        assert measured == pytest.approx(functional.cross_entropy(model(inputs), targets).item(), rel=1e-5)


def test_the_mean_of_batches_of_different_size_is_the_mean_of_their_examples() -> None:
    metrics = EpochMetrics(2, "cpu")
    for size, loss in ((3, 1.0), (1, 5.0)):
        metrics.update(torch.zeros(size, 2), torch.zeros(size, dtype=torch.int64), torch.tensor(loss))
    assert metrics.compute()["loss"].item() == 2.0


@pytest.mark.parametrize("sizes", [[3, 3, 3, 2], [2000, 30, 30], [1500, 1500]])
def test_batches_that_are_held_are_counted_like_those_that_are_not(sizes: list[int]) -> None:
    measured = []
    for holds_batches in (True, False):
        generator = torch.Generator().manual_seed(0)
        metrics = EpochMetrics(NUM_CLASSES, "cpu", holds_batches=holds_batches, with_auroc=True)
        for size in sizes:
            outputs = torch.randn(size, NUM_CLASSES, generator=generator)
            targets = torch.randint(NUM_CLASSES, (size,), generator=generator)
            metrics.update(outputs, targets, functional.cross_entropy(outputs, targets))
        measured.append({name: value.item() for name, value in metrics.compute().items()})
    loss, same_loss = (each.pop("loss") for each in measured)
    assert measured[0] == measured[1]
    assert loss == pytest.approx(same_loss)


# What fit promises.


class Float(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.float() / 255


def test_the_digits_are_learnt() -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    whole = Split(
        torch.tensor(digits.images * 15, dtype=torch.uint8).unsqueeze(1), torch.tensor(digits.target, dtype=torch.int64)
    )
    dataset = Dataset(whole, SealedSplit(lambda: whole, 0), classes=tuple("0123456789"))
    splits = split_dataset(dataset, validation_fraction=0.2, seed=0)
    results = list(fit(ImageNet(num_classes=10, width=64), splits, TrainConfig(max_epochs=8, lr=0.01)))
    assert results[-1].best_value is not None
    assert results[-1].best_value >= 0.95
    assert results[-1].metrics["train/accuracy"] > results[0].metrics["train/accuracy"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_optimizer_learns_under_every_schedule(optimizer: str, schedule: str) -> None:
    momentum = 0.5 if optimizer == "rmsprop" else 0.9
    lr = 0.05 if optimizer in ("sgd", "adagrad", "lamb") else 0.01
    config = quick_config(optimizer=optimizer, schedule=schedule, momentum=momentum, lr=lr, max_epochs=8, batch_size=16)
    results = list(fit(ImageNet(), image_splits(), config))
    assert results[-1].metrics["train/loss"] < 0.5 * results[0].metrics["train/loss"]
    assert results[-1].best_value is not None
    assert results[-1].best_value > 0.5


def test_a_regression_does_not_depend_on_the_units_of_its_target() -> None:
    curves = []
    for mean, deviation in ((0.0, 1.0), (5e3, 1e4)):
        splits = line_splits(mean=mean, deviation=deviation)
        scale = target_scale(splits.train)
        results = list(fit(Line(3, mean, scale), splits, regression_config()))
        curves.append([(result.value, result.metrics["val/loss"]) for result in results])
        assert results[-1].metrics["val/rmse"] == pytest.approx(0.1 * deviation, rel=0.2)
    for (r2, loss), (r2_scaled, loss_scaled) in zip(*curves, strict=True):
        assert r2 == pytest.approx(r2_scaled, abs=5e-3)
        assert loss == pytest.approx(loss_scaled, abs=5e-3)
    assert curves[0][-1][0] > 0.95


def test_outputs_of_shape_b_and_b_1_train_alike() -> None:
    class Flat(Line):
        def forward(self, features: Tensor) -> Tensor:
            return super().forward(features).squeeze(1)

    curves = [[without_time(r) for r in fit(kind(3), line_splits(), regression_config())] for kind in (Line, Flat)]
    assert curves[0] == curves[1]


def test_a_result_holds_exactly_the_documented_metrics_as_plain_values_that_pickle() -> None:
    def names_for(*metrics: str) -> set[str]:
        measured = {f"{split}/{metric}" for split in ("train", "val") for metric in ("loss", *metrics)}
        watched = {"gap", "epochs_without_progress", "vanishing_layers"}
        watched |= {f"gradient_{place}" for place in ("first", "middle", "last")}
        return measured | {"lr", "grad_norm", "time/epoch_s"} | {f"watch/{name}" for name in watched}

    result = next(iter(fit(ImageNet(), image_splits(), quick_config())))
    averages = ("accuracy", "precision", "recall", "f1", "precision_weighted", "f1_weighted")
    assert result.metrics.keys() == {*names_for(*averages), "val/auroc"}
    assert result.value == result.metrics["val/accuracy"]
    assert {type(value) for value in result.metrics.values()} == {float}
    assert {type(value) for value in vars(result).values()} <= {int, float, bool, dict, type(None)}
    assert pickle.loads(pickle.dumps(result)) == result

    result = next(iter(fit(Line(3), line_splits(), regression_config())))
    assert result.metrics.keys() == names_for("mse", "rmse", "mae", "r2")


def test_two_trainings_with_one_seed_are_bit_equal_whatever_the_caller_draws_in_between() -> None:
    config = quick_config(augment="crop+flip+cutout", seed=5)
    quiet, disturbed = ImageNet(dropout=0.3), ImageNet(dropout=0.3)
    expected = [without_time(result) for result in fit(quiet, image_splits(), config)]
    actual = []
    for result in fit(disturbed, image_splits(), config):
        torch.rand(7)
        actual.append(without_time(result))
    assert actual == expected
    assert_equal_weights(weights_of(disturbed), weights_of(quiet))


def test_another_seed_gives_another_training() -> None:
    first, second = (next(iter(fit(ImageNet(), image_splits(), quick_config(seed=seed)))) for seed in (0, 1))
    assert first.metrics["train/loss"] != second.metrics["train/loss"]


def test_dropout_differs_from_epoch_to_epoch() -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.linear, self.masks = nn.Dropout(0.5), nn.Linear(64, NUM_CLASSES), list[Tensor]()

        def forward(self, images: Tensor) -> Tensor:
            mask = self.dropout(torch.ones(len(images), 64))
            self.masks.append(mask)
            return self.linear(mask)

    model = Masks()
    list(fit(model, image_splits(), quick_config(max_epochs=2, batch_size=96)))
    first, _validated, _probed, second, *_ = model.masks
    assert not torch.equal(first, second)


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "is_nonzero", "unique")
        self.count += operator._schema.name.removeprefix("aten::").startswith(waits)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
@pytest.mark.parametrize("augment", ["none", "+".join(AUGMENTATIONS)])
def test_the_number_of_syncs_does_not_grow_with_the_number_of_steps(augment: str, cutmix: float) -> None:
    counts = []
    for batch_size in (96, 4):
        config = quick_config(
            batch_size=batch_size, max_epochs=1, augment=augment, mixup=cutmix, cutmix=cutmix, clip_norm=1.0
        )
        with Syncs() as syncs:
            list(fit(ImageNet(), image_splits(), config))
        counts.append(syncs.count)
    assert counts[0] == counts[1]


def test_a_regression_does_not_sync_in_its_steps() -> None:
    counts = []
    for batch_size in (100, 5):
        with Syncs() as syncs:
            list(fit(Line(3), line_splits(), regression_config(batch_size=batch_size, max_epochs=1)))
        counts.append(syncs.count)
    assert counts[0] == counts[1]


def scripted(accuracies: list[float], **changes: Any) -> tuple[Scripted, Iterator[EpochResult]]:
    splits = image_splits()
    model = Scripted(accuracies, splits.validation.targets)
    return model, fit(model, splits, quick_config(max_epochs=len(accuracies), **changes))


def test_a_training_without_a_reason_to_stop_has_max_epochs_epochs() -> None:
    _, results = scripted([0.1, 0.2, 0.3, 0.4])
    assert [result.epoch for result in results] == [1, 2, 3, 4]


def test_training_stops_early_and_the_model_has_the_best_weights() -> None:
    model, results = scripted([0.2, 0.6, 0.5, 0.6, 0.9], patience=2)
    results = list(results)
    assert [result.value for result in results] == pytest.approx([0.2, 0.6, 0.5, 0.6])
    assert [result.is_best for result in results] == [True, True, False, False]
    assert [result.best_epoch for result in results] == [1, 2, 2, 2]
    assert model.epoch == 2
    assert not model.training


def test_closing_the_generator_early_leaves_the_best_weights() -> None:
    model, results = scripted([0.2, 0.6, 0.5, 0.4])
    for result in results:
        if result.epoch == 3:
            break
    del results
    assert model.epoch == 2


def test_an_exception_in_the_loop_of_the_caller_leaves_the_best_weights() -> None:
    model, results = scripted([0.6, 0.5, 0.4])

    def interrupted() -> None:
        for result in results:
            if result.epoch == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    results.close()  # type: ignore[attr-defined]
    assert model.epoch == 1


def test_the_best_weights_are_those_that_were_measured() -> None:
    model = ImageNet(dropout=0.2)
    config = quick_config(max_epochs=6, lr=0.3, metric="loss")
    results = list(fit(model, image_splits(), config))
    assert not results[-1].is_best, "or the test shows nothing"
    measured = evaluate(model, image_splits().validation, config, NUM_CLASSES)
    assert results[-1].best_epoch is not None
    best = results[results[-1].best_epoch - 1]
    assert measured == {name: best.metrics[f"val/{name}"] for name in measured}


def test_a_diverged_epoch_is_yielded_and_is_the_last() -> None:
    model, results = scripted([0.6, math.nan, 0.9])
    first, second = results
    assert (first.diverged, second.diverged) == (False, True)
    assert math.isnan(second.value)
    assert (second.best_value, second.best_epoch) == (first.value, 1)
    assert model.epoch == 1


def test_a_loss_that_is_infinite_for_one_batch_only_is_a_divergence() -> None:
    class Spike(ImageNet):
        steps = 0

        def forward(self, images: Tensor) -> Tensor:
            outputs = super().forward(images)
            self.steps += self.training
            return torch.where(torch.tensor(self.training and self.steps == 2), outputs.detach() * math.inf, outputs)

    (result,) = fit(Spike(), image_splits(), quick_config())
    assert result.diverged


def test_a_learning_rate_that_is_far_too_high_diverges() -> None:
    results = list(fit(Line(3), line_splits(), regression_config(lr=1e20, optimizer="sgd", schedule="constant")))
    assert results[-1].diverged
    assert len(results) == 1


@pytest.mark.parametrize("clip_norm", [0.0, 1e-3])
def test_the_gradient_norm_is_measured_before_clipping_and_averaged_over_the_steps(clip_norm: float) -> None:
    splits = image_splits()
    alike = Split(splits.train.inputs[:1].repeat(96, 1, 1, 1), splits.train.targets[:1].repeat(96))
    model = nn.Sequential(Float(), nn.Flatten(), nn.Linear(64, NUM_CLASSES))
    functional.cross_entropy(model(alike.inputs), alike.targets).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()

    config = quick_config(max_epochs=1, clip_norm=clip_norm, optimizer="sgd", lr=1e-12)
    (result,) = fit(model, replace(splits, train=alike), config)
    assert result.metrics["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_evaluation_of_any_split_gives_the_metrics_without_prefix() -> None:
    splits = image_splits()
    measured = evaluate(ImageNet(), splits.validation, quick_config(), NUM_CLASSES)
    assert measured.keys() == {"loss", *CLASSIFICATION_METRICS}
    splits = line_splits()
    measured = evaluate(Line(3), splits.validation, regression_config(), 0, target_scale=2.0)
    assert measured["loss"] == pytest.approx(measured["mse"] / 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"batch_size": 97}, UsageError, r"97.*96"),
        ({"metric": "acuracy"}, UnknownNameError, "no metric 'acuracy'; did you mean 'accuracy'"),
        ({"metric": "r2"}, UnknownNameError, "Available: loss, accuracy, precision, recall, f1"),
        ({"loss": "mse"}, UsageError, "loss 'mse' does not fit data with 4 classes; use cross_entropy"),
    ],
)
def test_a_config_that_does_not_fit_the_data_is_refused_before_any_work(
    changes: dict[str, Any], error: type[UsageError], message: str
) -> None:
    model = ImageNet()
    before = weights_of(model)
    with pytest.raises(error, match=message):
        next(iter(fit(model, image_splits(), quick_config(**changes))))
    assert_equal_weights(weights_of(model), before)


@pytest.mark.parametrize("changes", [{"metric": "accuracy"}, {"loss": "cross_entropy"}])
def test_a_regression_refuses_what_is_for_classes(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"no regression metric 'accuracy'|no classes \(a regression\); use mse"):
        next(iter(fit(Line(3), line_splits(), regression_config(**changes))))


# Exact resume.

averages: list[dict[str, Any]] = [{}, {"ema_decay": 0.9}, {"swa_start": 0.5}]
resumable_configs = st.builds(
    quick_config,
    max_epochs=st.just(4),
    batch_size=st.sampled_from([20, 48]),
    optimizer=st.sampled_from(OPTIMIZERS),
    beta1=st.sampled_from([0.9, 0.5]),
    schedule=st.sampled_from(SCHEDULES),
    warmup_fraction=st.sampled_from([0.05, 0.4]),
    plateau_patience=st.just(1),
    augment=st.lists(st.sampled_from(AUGMENTATIONS), max_size=3).map(lambda names: "+".join(names) or "none"),
    mixup=st.sampled_from([0.0, 0.3]),
    cutmix=st.sampled_from([0.0, 1.0]),
    sampling=st.sampled_from(SAMPLINGS),
    class_weights=st.sampled_from(CLASS_WEIGHTS),
    loss=st.sampled_from(CLASSIFICATION_LOSSES),
    weight_decay=st.sampled_from([0.0, 0.01]),
    clip_norm=st.sampled_from([0.0, 0.5]),
    clip_value=st.sampled_from([0.0, 0.1]),
    l1=st.sampled_from([0.0, 0.001]),
    max_norm=st.sampled_from([0.0, 1.0]),
    patience=st.sampled_from([1, 4]),
    precision=st.sampled_from(["auto", "bf16", "fp16"]),
    seed=st.integers(0, 3),
)


@settings(max_examples=25, phases=[Phase.generate])  # shrinking would train for minutes
@given(
    config=st.builds(lambda config, average: replace(config, **average), resumable_configs, st.sampled_from(averages)),
    dropout=st.sampled_from([0.0, 0.4]),
    stops=st.sets(st.integers(1, 4), min_size=1),
)
def test_a_training_stopped_after_any_epoch_and_resumed_is_bit_equal(
    tmp_path_factory: pytest.TempPathFactory, config: TrainConfig, dropout: float, stops: set[int]
) -> None:
    expected_model = ImageNet(dropout=dropout)
    expected = [without_time(result) for result in fit(expected_model, image_splits(), config)]

    folder = CheckpointFolder(tmp_path_factory.mktemp("run"))
    results: list[dict[str, Any]] = []
    for stop in [*sorted(stops), math.inf]:
        # Whatever a resumed run starts with is replaced by what was saved.
        model = ImageNet(dropout=dropout, seed=len(results))
        torch.rand(3)
        for result in fit(model, image_splits(), config, checkpoint=folder):
            if not results or result.epoch > results[-1]["epoch"]:
                results.append(without_time(result))
            if result.epoch >= stop:
                break
    assert results == expected
    assert_equal_weights(weights_of(model), weights_of(expected_model))


def test_a_resumed_training_begins_with_the_saved_result_and_does_not_repeat_its_epoch(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    first = next(iter(fit(ImageNet(), image_splits(), quick_config(), checkpoint=folder)))
    resumed = list(fit(ImageNet(), image_splits(), quick_config(), checkpoint=folder))
    assert [result.epoch for result in resumed] == [1, 2, 3]
    assert resumed[0] == first, "the time too: nothing was trained again"


@pytest.mark.parametrize(
    ("accuracies", "patience"), [([0.2, 0.6, 0.5], 9), ([0.2, 0.6, 0.5, 0.9], 1), ([0.2, 0.6, math.nan, 0.9], 9)]
)
def test_a_run_that_was_over_yields_its_last_result_again_and_restores_the_best_weights(
    tmp_path: Path, accuracies: list[float], patience: int
) -> None:
    splits, folder = image_splits(), CheckpointFolder(tmp_path)
    config = quick_config(max_epochs=len(accuracies), patience=patience)
    *_, last = fit(Scripted(accuracies, splits.validation.targets), splits, config, checkpoint=folder)
    assert last.epoch == 3

    model = Scripted(accuracies, splits.validation.targets)
    (again,) = fit(model, splits, config, checkpoint=folder)
    assert without_time(again) == without_time(last)
    assert model.epoch == 2
    assert not model.training


def test_a_damaged_checkpoint_costs_one_epoch_and_nothing_else(tmp_path: Path) -> None:
    expected_model = ImageNet(dropout=0.2)
    expected = [without_time(result) for result in fit(expected_model, image_splits(), quick_config())]

    folder = CheckpointFolder(tmp_path)
    for result in fit(ImageNet(dropout=0.2), image_splits(), quick_config(), checkpoint=folder):
        if result.epoch == 2:
            break
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    model = ImageNet(dropout=0.2)
    resumed = [without_time(result) for result in fit(model, image_splits(), quick_config(), checkpoint=folder)]
    assert resumed == expected, "what is left is the first epoch"
    assert_equal_weights(weights_of(model), weights_of(expected_model))


def test_a_folder_with_a_run_of_another_config_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    next(iter(fit(ImageNet(), image_splits(), quick_config(), checkpoint=folder)))
    other = replace(quick_config(), lr=0.5, seed=3)
    with pytest.raises(CheckpointError, match=r"lr 0\.01 -> 0\.5, seed 0 -> 3"):
        next(iter(fit(ImageNet(), image_splits(), other, checkpoint=folder)))


# This module is imported by the process to be killed, so imports that take as long as torch's stay in their tests.
KILLED_IN_ITS_THIRD_EPOCH = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_training import *

class Killed(ImageNet):
    def train(self, mode=True):
        begun.extend([mode] * mode)
        if len(begun) == 3:
            while not list(folder.path.glob("epoch-0002.*")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(mode)

begun, folder = [], CheckpointFolder(Path(sys.argv[2]))
list(fit(Killed(dropout=0.3), image_splits(), quick_config(max_epochs=5), checkpoint=folder))
"""


def test_a_killed_process_is_continued_bit_equal_by_another(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED_IN_ITS_THIRD_EPOCH, str(Path(__file__).parent), str(tmp_path)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    config, model, expected_model = quick_config(max_epochs=5), ImageNet(dropout=0.3), ImageNet(dropout=0.3)
    resumed = [without_time(r) for r in fit(model, image_splits(), config, checkpoint=CheckpointFolder(tmp_path))]
    expected = [without_time(result) for result in fit(expected_model, image_splits(), config)]
    assert resumed == expected[1:]
    assert_equal_weights(weights_of(model), weights_of(expected_model))


# Early stopping.


def stopped_at(values: list[float], **changes: Any) -> int | None:
    stopping = EarlyStopping(Direction.MAXIMIZE, **({"patience": 2} | changes))
    for epoch, value in enumerate(values, start=1):
        stopping.update(epoch, value)
        if stopping.should_stop:
            return epoch
    return None


@pytest.mark.parametrize(
    ("values", "changes", "stop"),
    [
        ([1, 2, 3, 4], {}, None),
        ([1, 1, 1], {}, 3),
        ([3, 2, 1], {"patience": 1}, 2),
        ([3, 2, 3, 4, 3, 3], {}, 3),
        ([3, 1, 1, 1, 1], {"stop_after": 4}, 5),
        ([3, 1, 1, 4, 1, 1, 1], {"stop_after": 4}, 6),
        ([1, 1.25, 1.5, 1.75, 2], {"min_delta": 0.5}, None),
        ([1, 1.125, 1.25, 1.375, 1.5], {"min_delta": 0.5}, 3),
        ([1, 1.5, 2], {"min_delta": 0.5, "patience": 1}, None),
        ([math.nan, math.nan, 1], {}, 2),
        ([math.inf, 1, 2, 3], {}, None),
        ([1, math.inf, math.inf], {}, 3),
    ],
)
def test_patience_counts_epochs_without_improvement(
    values: list[float], changes: dict[str, Any], stop: int | None
) -> None:
    assert stopped_at(values, **changes) == stop


def test_the_best_epoch_is_any_strict_improvement_even_below_min_delta() -> None:
    stopping = EarlyStopping(Direction.MAXIMIZE, patience=9, min_delta=1.0)
    assert [stopping.update(epoch, value) for epoch, value in enumerate([1.0, 1.1, 1.1, 0.9], 1)] == [
        True,
        True,
        False,
        False,
    ]
    assert (stopping.best_value, stopping.best_epoch) == (1.1, 2)


any_values = st.lists(st.floats(width=16), max_size=12)


@given(values=any_values, direction=st.sampled_from([*Direction]))
def test_the_best_is_the_first_of_the_best_finite_values(values: list[float], direction: Any) -> None:
    stopping = EarlyStopping(direction, patience=1)
    for epoch, value in enumerate(values, start=1):
        stopping.update(epoch, value)
    finite = [value for value in values if math.isfinite(value)]
    best = (max if direction == "maximize" else min)(finite, default=None)
    assert stopping.best_value == best
    assert stopping.best_epoch == (None if best is None else values.index(best) + 1)


@given(values=any_values, at=st.integers(0, 12), stop_after=st.integers(0, 5), min_delta=st.sampled_from([0.0, 0.5]))
def test_early_stopping_goes_on_from_its_saved_state(
    values: list[float], at: int, stop_after: int, min_delta: float
) -> None:
    def new() -> EarlyStopping:
        return EarlyStopping(Direction.MINIMIZE, patience=2, min_delta=min_delta, stop_after=stop_after)

    whole, first, second = new(), new(), new()
    for epoch, value in enumerate(values, start=1):
        if epoch == at + 1:
            second.load_state_dict(first.state_dict())
        resumed = second if epoch > at else first
        assert resumed.update(epoch, value) == whole.update(epoch, value)
        assert resumed.should_stop == whole.should_stop


# Optimizers.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms_alone(optimizer: str) -> None:
    model = ImageNet()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.data.fill_(1.0)
    build_optimizer(model, quick_config(optimizer=optimizer, weight_decay=0.5, lr=0.1)).step()
    for name, parameter in model.named_parameters():
        assert torch.all(parameter < 1) if parameter.ndim > 1 else torch.all(parameter == 1), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_without_biases_can_be_optimised(optimizer: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.ones(2, 2)
    before = model.weight.clone()
    build_optimizer(model, quick_config(optimizer=optimizer)).step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", lambda p, c: torch.optim.SGD(p, c.lr, momentum=c.momentum, nesterov=True)),
        ("adam", lambda p, c: torch.optim.Adam(p, c.lr)),
        ("adamw", lambda p, c: torch.optim.AdamW(p, c.lr, weight_decay=0)),
        ("nadam", lambda p, c: torch.optim.NAdam(p, c.lr)),
        ("adamax", lambda p, c: torch.optim.Adamax(p, c.lr)),
        ("adagrad", lambda p, c: torch.optim.Adagrad(p, c.lr)),
        ("rmsprop", lambda p, c: torch.optim.RMSprop(p, c.lr, momentum=c.momentum)),
    ],
)
def test_each_name_is_the_optimizer_of_torch_with_the_given_momentum(optimizer: str, expected: Any) -> None:
    config = quick_config(optimizer=optimizer, momentum=0.7, lr=0.1)
    ours, theirs = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(3, 1))
    model = nn.Module()
    model.register_parameter("weight", ours)
    for optimizer_, parameter in ((build_optimizer(model, config), ours), (expected([theirs], config), theirs)):
        for step in range(1, 4):
            parameter.grad = torch.full((3, 1), 1.0 / step)
            optimizer_.step()
    assert torch.allclose(ours, theirs)


def test_nesterov_changes_the_step_and_does_not_matter_without_momentum() -> None:
    def after(**changes: Any) -> Tensor:
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = build_optimizer(model, quick_config(optimizer="sgd", **changes))
        for _ in range(2):
            model.weight.grad = torch.ones(1, 2)
            optimizer.step()
        return model.weight.detach()

    assert not torch.equal(after(nesterov=True), after(nesterov=False))
    assert torch.equal(after(nesterov=True, momentum=0.0), after(nesterov=False, momentum=0.0))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_fused_kernel_is_used_where_torch_has_one(optimizer: str) -> None:
    assert build_optimizer(ImageNet(), quick_config(optimizer=optimizer)).defaults["fused"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_fused_step_equals_torchs_bit_by_bit(optimizer: str, momentum: float) -> None:
    config = quick_config(optimizer=optimizer, momentum=momentum, weight_decay=0.01)
    gradients = [[torch.randn_like(p) for p in ImageNet().parameters()] for _ in range(6)]
    after = []
    for is_ours in (True, False):
        model = ImageNet()
        stepper = build_optimizer(model, config)
        own: Callable[[], Any] = stepper.step
        for number, of_step in enumerate(gradients):
            for group in stepper.param_groups:
                group["lr"] = 0.01 * (number + 1)  # as a schedule sets it
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient.clone()
            own()
            if is_ours and number == 0:
                assert FusedStep.suits(stepper)
                own = FusedStep(stepper)
        after.append((weights_of(model), stepper.state_dict()["state"]))
    assert_equal_weights(after[0][0], after[1][0])
    for number, state in after[0][1].items():
        assert_equal_weights(
            {k: v for k, v in state.items() if v is not None},
            {k: v for k, v in after[1][1][number].items() if v is not None},
        )


def test_a_parameter_that_trains_later_is_left_to_torch() -> None:
    """It has no state until then."""
    model = ImageNet()
    model.hidden.weight.requires_grad_(False)
    step = TrainingStep(model, functional.cross_entropy, build_optimizer(model, quick_config(optimizer="adamw")))
    inputs, targets = image_splits().train.inputs[:8], image_splits().train.targets[:8]
    step(inputs, targets)
    frozen = model.hidden.weight.clone()
    step(inputs, targets)
    assert torch.equal(model.hidden.weight, frozen)
    model.hidden.weight.requires_grad_(True)
    step(inputs, targets)
    assert not torch.equal(model.hidden.weight, frozen)


# Schedules.


def rates(config: TrainConfig, num_steps: int) -> tuple[list[float], list[float]]:
    """Rate and momentum (or beta1) of each step, and, last, what they would be after it."""
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    schedule = build_schedule(optimizer, config, num_steps)
    lrs, momenta = [], []
    for step in range(num_steps + 1):
        group = optimizer.param_groups[0]
        lrs.append(group["lr"])
        momenta.append(group["momentum"] if "momentum" in group else group.get("betas", [0.0])[0])
        if step < num_steps:
            optimizer.step()
            schedule.step()
    return lrs, momenta


@given(
    schedule=st.sampled_from(SCHEDULES),
    optimizer=st.sampled_from(OPTIMIZERS),
    num_steps=st.integers(1, 60),
    warmup_fraction=st.floats(0, 1, exclude_max=True),
    momentum=st.floats(0, 0.99),
)
def test_every_step_is_taken_at_a_rate_above_0_and_at_most_the_peak(
    schedule: str, optimizer: str, num_steps: int, warmup_fraction: float, momentum: float
) -> None:
    config = quick_config(
        schedule=schedule, optimizer=optimizer, warmup_fraction=warmup_fraction, momentum=momentum, lr=0.1
    )
    lrs, momenta = rates(config, num_steps)
    assert all(0 < lr <= 0.1 * (1 + 1e-9) for lr in lrs[:-1])
    assert all(0 <= value <= max(momentum, 0.95) for value in momenta)
    if schedule == "cosine_restarts":
        return
    peak = lrs.index(max(lrs))
    assert lrs[: peak + 1] == sorted(lrs[: peak + 1])
    assert lrs[peak:] == sorted(lrs[peak:], reverse=True)


@pytest.mark.parametrize(("schedule", "end"), [("constant", 0.1), ("cosine", 0.0), ("one_cycle", 0.1 / 25 / 1e4)])
def test_a_schedule_rises_to_the_peak_and_ends_where_it_should(schedule: str, end: float) -> None:
    lrs, _ = rates(quick_config(schedule=schedule, warmup_fraction=0.1, lr=0.1), 100)
    assert lrs[0] < 0.02
    assert max(lrs) == pytest.approx(0.1, rel=1e-3)
    assert lrs[-1] == pytest.approx(end)


def test_the_warm_up_is_linear_over_its_share_of_the_steps() -> None:
    lrs, _ = rates(quick_config(schedule="constant", warmup_fraction=0.1, lr=0.1), 40)
    assert lrs == pytest.approx([0.02, 0.04, 0.06, 0.08] + [0.1] * 37)


def test_a_cosine_falls_to_half_in_the_middle() -> None:
    lrs, _ = rates(quick_config(schedule="cosine", warmup_fraction=0.2, lr=0.1), 50)
    assert lrs[10] == pytest.approx(0.1)
    assert lrs[30] == pytest.approx(0.05)


@given(num_steps=st.integers(1, 60), optimizer=st.sampled_from(["sgd", "adamw"]))
def test_one_cycle_is_torchs(num_steps: int, optimizer: str) -> None:
    config = quick_config(schedule="one_cycle", optimizer=optimizer, momentum=0.8, beta1=0.9, lr=0.1)
    highest = 0.8 if optimizer == "sgd" else 0.95
    other = build_optimizer(nn.Linear(2, 2), config)
    theirs = OneCycleLR(
        other, 0.1, total_steps=num_steps + 1, max_momentum=highest, base_momentum=highest * 0.85 / 0.95
    )
    points = []
    for step in range(num_steps + 1):
        group = other.param_groups[0]
        points.append((group["lr"], group["momentum"] if optimizer == "sgd" else group["betas"][0]))
        if step < num_steps:
            other.step()
            theirs.step()
    assert list(zip(*rates(config, num_steps), strict=True)) == points


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_points_that_were_computed_ahead_are_those_of_the_steps(schedule: str) -> None:
    config = quick_config(schedule=schedule, optimizer="sgd", warmup_fraction=0.3, lr=0.1)
    optimizer = build_optimizer(nn.Linear(2, 2), config)
    curve = build_schedule(optimizer, config, 12)
    ahead, alone = [], rates(config, 12)[0]
    for _ in range(3):
        for point in curve.compute_ahead(4):
            assert list(point.rates) == [group["lr"] for group in optimizer.param_groups]
            ahead.append(point.rates[0])
            curve.step()
    assert [*ahead, optimizer.param_groups[0]["lr"]] == alone


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop"])
def test_one_cycle_cycles_the_momentum_below_the_chosen_one(optimizer: str) -> None:
    config = quick_config(schedule="one_cycle", optimizer=optimizer, momentum=0.8)
    lrs, momenta = rates(config, 100)
    assert momenta[0] == momenta[-1] == pytest.approx(0.8)
    assert min(momenta) == pytest.approx(0.8 * 0.85 / 0.95, rel=1e-3)
    assert momenta.index(min(momenta)) == lrs.index(max(lrs))


# Losses.


@given(smoothing=st.floats(0, 0.9), seed=st.integers(0, 100))
def test_cross_entropy_is_torchs_with_the_label_smoothing_of_the_config(smoothing: float, seed: int) -> None:
    torch.manual_seed(seed)
    outputs, targets = torch.randn(8, 3), torch.randint(3, (8,))
    loss = loss_function(quick_config(label_smoothing=smoothing), 3, 1.0)(outputs, targets)
    torch.testing.assert_close(loss, functional.cross_entropy(outputs, targets, label_smoothing=smoothing))


@given(scale=st.floats(1e-3, 1e6), seed=st.integers(0, 100))
def test_the_mse_is_one_for_predicting_the_mean_in_any_units(scale: float, seed: int) -> None:
    targets = scale * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    split = Split(torch.zeros(50, 1), targets)
    loss = loss_function(regression_config(), 0, target_scale(split))
    assert loss(targets.mean().expand(50, 1), targets).item() == pytest.approx(1.0, rel=1e-3)
    assert loss(targets.unsqueeze(1), targets).item() == 0.0


def test_the_scale_of_equal_targets_and_of_class_indices_is_one() -> None:
    assert target_scale(Split(torch.zeros(3, 1), torch.full((3,), 7.0))) == 1.0
    assert target_scale(Split(torch.zeros(3, 1), torch.tensor([0, 5, 9]))) == 1.0


# Metrics equal torchmetrics.


def measured(metrics: Any, outputs: Tensor, targets: Tensor, batch_size: int) -> dict[str, float]:
    for batch in zip(outputs.split(batch_size), targets.split(batch_size), strict=True):
        metrics.update(*batch)
    return {name: value.item() for name, value in metrics.compute().items()}


@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(2, 12),
    num_examples=st.integers(1, 60),
    batch_size=st.integers(1, 60),
)
def test_classification_metrics_equal_torchmetrics(
    seed: int, num_classes: int, num_examples: int, batch_size: int
) -> None:
    from torchmetrics import functional as reference

    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(num_examples, num_classes, generator=generator)
    # Classes that are missing in targets, predictions or both are frequent with so few examples.
    num_targets = int(torch.randint(1, num_classes + 1, (), generator=generator))
    targets = torch.randint(num_targets, (num_examples,), generator=generator)
    ours = measured(ConfusionMetrics(num_classes, "cpu"), outputs, targets, batch_size)
    theirs = {
        "accuracy": reference.accuracy(outputs, targets, "multiclass", num_classes=num_classes, average="micro"),
        "precision": reference.precision(outputs, targets, "multiclass", num_classes=num_classes, average="macro"),
        "recall": reference.recall(outputs, targets, "multiclass", num_classes=num_classes, average="macro"),
        "f1": reference.f1_score(outputs, targets, "multiclass", num_classes=num_classes, average="macro"),
        "precision_weighted": reference.precision(
            outputs, targets, "multiclass", num_classes=num_classes, average="weighted"
        ),
        "f1_weighted": reference.f1_score(outputs, targets, "multiclass", num_classes=num_classes, average="weighted"),
    }
    assert ours == pytest.approx({name: value.item() for name, value in theirs.items()}, abs=1e-6)


@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(2, 12),
    num_examples=st.integers(2, 60),
    num_ties=st.integers(0, 30),
)
@pytest.mark.filterwarnings("ignore:(No|Average precision) .*:UserWarning")
def test_auroc_equals_torchmetrics_with_ties_and_missing_classes(
    seed: int, num_classes: int, num_examples: int, num_ties: int
) -> None:
    from torchmetrics import functional as reference

    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(num_examples, num_classes, generator=generator)
    outputs[:num_ties] = outputs[0]
    targets = torch.randint(num_classes, (num_examples,), generator=generator)
    targets[:2] = torch.tensor([0, 1])
    theirs = reference.auroc(outputs.double().softmax(1), targets, "multiclass", num_classes=num_classes, average=None)
    assert theirs is not None
    counts = targets.bincount(minlength=num_classes)
    is_defined = (counts > 0) & (counts < num_examples)  # torchmetrics says 0 for the others
    assert auroc(outputs, targets).item() == pytest.approx(theirs[is_defined].mean().item(), abs=1e-6)


def test_auroc_tells_sure_answers_apart() -> None:
    outputs = torch.tensor([[0.0, 20.0], [0.0, 25.0], [0.0, 30.0], [0.0, 35.0]])
    assert outputs.softmax(1)[:, 1].unique().item() == 1.0
    assert auroc(outputs, torch.tensor([0, 0, 1, 1])) == 1.0


def test_the_confusion_matrix_has_a_row_for_each_class_and_a_column_for_what_it_is_taken_for() -> None:
    splits, model = image_splits(), ImageNet().eval()
    counts = torch.tensor(evaluate_classes(model, splits.validation, quick_config(), NUM_CLASSES)[1])
    assert counts.sum(1).equal(splits.validation.targets.bincount(minlength=NUM_CLASSES))
    by_hand = torch.zeros_like(counts)
    for target, prediction in zip(splits.validation.targets, model(splits.validation.inputs).argmax(1), strict=True):
        by_hand[target, prediction] += 1
    assert counts.equal(by_hand)


@given(
    seed=st.integers(0, 10**6),
    num_examples=st.integers(2, 60),
    batch_size=st.integers(1, 60),
    mean=st.sampled_from([0.0, -5.0, 1e3]),
    column=st.booleans(),
)
def test_regression_metrics_equal_torchmetrics(
    seed: int, num_examples: int, batch_size: int, mean: float, column: bool
) -> None:
    from torchmetrics import functional as reference

    generator = torch.Generator().manual_seed(seed)
    targets = mean + torch.randn(num_examples, generator=generator)
    targets[:2] = torch.tensor([mean - 1, mean + 1])  # torchmetrics takes a variance near 0 for 0, and loses digits
    outputs = targets + torch.randn(num_examples, generator=generator)
    ours = measured(RegressionMetrics("cpu"), outputs.unsqueeze(1) if column else outputs, targets, batch_size)
    exact = outputs.double(), targets.double()
    theirs = {
        "mse": reference.mean_squared_error(*exact),
        "rmse": reference.mean_squared_error(*exact, squared=False),
        "mae": reference.mean_absolute_error(*exact),
        "r2": reference.r2_score(*exact),
    }
    assert ours == pytest.approx({name: value.item() for name, value in theirs.items()}, rel=1e-6, abs=1e-6)


def test_r2_keeps_its_digits_far_from_zero() -> None:
    """Sums of squares of targets around 1e6 would leave no digit of a deviation of 0.1 even in float64."""
    targets = 1e6 + torch.tensor([0.0, 0.125, 0.25, 0.375]) * 1.0
    ours = measured(RegressionMetrics("cpu"), targets + 0.0625, targets, 2)
    assert ours["r2"] == pytest.approx(1 - 4 * 0.0625**2 / (0.125**2 * 5), rel=1e-9)


def test_r2_of_equal_targets_is_one_for_exact_predictions_and_zero_otherwise() -> None:
    targets = torch.full((5,), 0.1)
    assert measured(RegressionMetrics("cpu"), targets.clone(), targets, 2)["r2"] == 1.0
    assert measured(RegressionMetrics("cpu"), targets + 1, targets, 2)["r2"] == 0.0


# The step.


@pytest.mark.parametrize("clip_norm", [0.0, 0.01, 1e9])
def test_a_step_scales_gradients_down_to_the_global_norm(clip_norm: float) -> None:
    splits, model = image_splits(), ImageNet()
    optimizer = build_optimizer(model, quick_config(optimizer="sgd", momentum=0.0, lr=1.0))
    before = weights_of(model)
    step = TrainingStep(model, functional.cross_entropy, optimizer, clip_norm=clip_norm)(
        splits.train.inputs, splits.train.targets
    )
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()]).norm().item()
    grad_norm = step.grad_norm.item()
    assert grad_norm > 0.01
    assert moved == pytest.approx(0.01 if clip_norm == 0.01 else grad_norm, rel=1e-3)
    assert not step.loss.requires_grad
    assert not step.outputs.requires_grad


# What is compiled.


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sgd", "momentum": 0.0, "clip_norm": 0.5},
        {"optimizer": "adam", "label_smoothing": 0.1, "loss": "focal", "class_weights": "balanced"},
        {"optimizer": "adam", "label_smoothing": 0.1, "loss": "binary_cross_entropy", "class_weights": "balanced"},
        {"optimizer": "adamw", "clip_norm": 0.5, "label_smoothing": 0.1, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_compiled_step_trains_as_the_eager_one_does(changes: dict[str, Any]) -> None:
    config = quick_config(max_epochs=4, weight_decay=0.01, **changes)
    weights, curves = [], []
    for mode in ("off", "step"):
        model = ImageNet()
        model.hidden.bias = None  # in front of a norm it has no gradient but rounding, which Adam would magnify
        results = list(fit(model, image_splits(), replace(config, compile=mode)))
        assert [result.settled["compile"] for result in results] == ["off", *[mode] * 3]
        weights.append(weights_of(model))
        curves.append([result.metrics["train/loss"] for result in results])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    for name, eager in weights[0].items():
        torch.testing.assert_close(weights[1][name], eager, rtol=1e-3, atol=1e-4)


def test_the_next_trial_of_an_architecture_batch_and_optimizer_is_not_compiled_again() -> None:
    config = quick_config(compile="step", label_smoothing=0.1, weight_decay=0.01)
    list(fit(ImageNet(dropout=0.3), image_splits(), config))
    before = compiled_graphs()
    another = replace(config, lr=0.003, weight_decay=0.2, label_smoothing=0.05, schedule="one_cycle", seed=3)
    list(fit(ImageNet(dropout=0.1, seed=5), image_splits(), another))
    assert before > 0
    assert compiled_graphs() == before
    list(fit(ImageNet(dropout=0.1, width=24), image_splits(), another))
    assert compiled_graphs() == before + 1  # it does count


def test_a_compiled_training_is_resumed_bit_equal(tmp_path: Path) -> None:
    config = quick_config(compile="step", max_epochs=4)
    expected_model = ImageNet(dropout=0.2)
    expected = [without_time(result) for result in fit(expected_model, image_splits(), config)]
    folder = CheckpointFolder(tmp_path / "run")
    for result in fit(ImageNet(dropout=0.2), image_splits(), config, checkpoint=folder):
        if result.epoch == 2:
            break
    model = ImageNet(dropout=0.2, seed=1)
    resumed = [without_time(result) for result in fit(model, image_splits(), config, checkpoint=folder)]
    assert resumed == expected[1:]
    assert_equal_weights(weights_of(model), weights_of(expected_model))


class Untraceable(ImageNet):
    """Looks at its activations to decide what to do, which no graph can hold."""

    def forward(self, images: Tensor) -> Tensor:
        outputs = super().forward(images)
        return outputs if outputs.sum().item() > 0 else 2 * outputs


def test_a_model_that_cannot_be_compiled_is_trained_as_it_is_and_the_user_reads_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = quick_config(optimizer="adam", compile="step")
    expected = [without_time(result) for result in fit(Untraceable(), image_splits(), replace(config, compile="off"))]
    assert [without_time(result) for result in fit(Untraceable(), image_splits(), config)] == expected
    assert "the step cannot be compiled and continues without: " in caplog.text


def test_dropout_in_a_compiled_step_keeps_its_rate_and_its_mean() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.25))
    let_dropout_vary(model)
    inputs = torch.ones(100, 1000)
    outputs = model[1](inputs)
    assert outputs.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (outputs == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(model.eval()[1](inputs), inputs)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_auto_compiles_where_the_remaining_steps_save_more_than_it_costs() -> None:
    step = TrainingStep(ImageNet(), functional.cross_entropy, torch.optim.SGD(ImageNet().parameters(), lr=0.1))
    shape = (16, *IMAGE_SHAPE)

    def mode(wanted: str, steps_left: int) -> str:
        return settle_compile_mode(wanted, step, batch_shape=shape, seconds_a_step=1e-3, steps_left=steps_left)

    assert mode("auto", steps_left=1_000) == "off"
    assert mode("off", steps_left=1_000_000) == "off"
    assert mode("auto", steps_left=1_000_000) == "step"
    assert mode("auto", steps_left=1_000) == "step"  # it is compiled by now
    step.num_parts = 2
    assert mode("step", steps_left=1_000_000) == "off"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": "graph"}, "--compile graph needs a CUDA device, not cpu"),
        ({"compile": "step", "precision": "fp16"}, "--compile step does not go with --precision fp16"),
    ],
)
def test_a_compile_mode_that_cannot_be_had_is_refused_before_any_work(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        next(iter(fit(ImageNet(), image_splits(), quick_config(**changes))))


# Precision.


class Convolution(nn.Module):
    """A small convolutional net."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(1, 8, 3)
            self.output = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.seen_type = self.convolution(images / 255.0).dtype
        return self.output(functional.relu(self.convolution(images / 255.0)).mean((2, 3)))


def settled(wanted: str, model: nn.Module) -> str:
    train = image_splits().train
    assert isinstance(train.inputs, Tensor)
    batch = train.inputs[:8], train.targets[:8]
    return settle_precision(wanted, model, functional.cross_entropy, lambda: batch)


@pytest.mark.parametrize(
    ("has_bf16", "seconds", "expected"),
    [
        (True, {"fp32": 1.0, "bf16": 0.5}, "bf16"),
        (True, {"fp32": 1.0, "bf16": 0.99}, "fp32"),
        (True, {"fp32": 1.0, "bf16": 1.3}, "fp32"),
        (False, {}, "fp32"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, seconds: dict[str, float], expected: str
) -> None:
    """Once for an architecture, a batch and a device; without convolutions, or instructions for bf16, it is fp32."""
    measured: list[str] = []

    def measure(model: nn.Module, loss: Any, inputs: Tensor, targets: Tensor, precision: str) -> float:
        measured.append(precision)
        return seconds[precision]

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(precision, "_fastest", {})
    monkeypatch.setattr(precision, "_seconds_a_pass", measure)
    assert [settled("auto", Convolution()) for _ in range(2)] == [expected] * 2
    num_passes = len(measured)
    assert measured == [*seconds] * 3, "once"
    assert settled("auto", ImageNet()) == "fp32"
    assert settled("fp32", Convolution()) == "fp32"
    assert settled("fp16", ImageNet()) == "fp16"
    assert len(measured) == num_passes


def test_measuring_what_is_faster_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that settled on a precision is bit-equal to one that was asked for it."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(precision, "_fastest", {})
    curves = []
    for wanted in ("auto", None):
        model = nn.Sequential(Convolution(), nn.BatchNorm1d(NUM_CLASSES), nn.Dropout(0.3))
        wanted = wanted or curves[0][0].settled["precision"]
        curves.append(list(fit(model, image_splits(), quick_config(precision=wanted, max_epochs=2))))
    first, second = ([without_time(result) for result in curve] for curve in curves)
    assert first == second


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_products_are_made_in_the_precision_that_was_asked_for_and_weights_stay_in_fp32(
    precision: str, dtype: torch.dtype
) -> None:
    model, curves = Convolution(), []
    for result in fit(model, image_splits(), quick_config(precision=precision, max_epochs=5, lr=0.01)):
        assert model.seen_type == dtype
        assert result.settled["precision"] == precision
        assert math.isfinite(result.metrics["grad_norm"])
        curves.append(result.metrics["train/loss"])
    assert curves[-1] < curves[0]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.convolution.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_resumed_training_keeps_the_precision_that_it_began_with(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "run")
    next(iter(fit(Convolution(), image_splits(), quick_config(precision="bf16"), checkpoint=folder)))
    resumed = list(fit(Convolution(), image_splits(), quick_config(precision="fp32"), checkpoint=folder))
    assert [result.settled["precision"] for result in resumed] == ["bf16"] * 3


def test_deterministic_algorithms_are_asked_for_during_an_epoch_only() -> None:
    class Watched(ImageNet):
        def forward(self, images: Tensor) -> Tensor:
            self.is_deterministic = torch.are_deterministic_algorithms_enabled()
            return super().forward(images)

    model = Watched()
    for deterministic in (True, False):
        next(iter(fit(model, image_splits(), quick_config(deterministic=deterministic))))
        assert model.is_deterministic == deterministic
        assert not torch.are_deterministic_algorithms_enabled()


# Memory.


class Hungry(ImageNet):
    """Runs out of memory above a number of examples at a time."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.norm = nn.Identity()
        self.most = most

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return super().forward(images)


def test_a_batch_that_does_not_fit_is_taken_in_two_halves_with_the_same_result(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = quick_config(batch_size=31, clip_norm=0.1, weight_decay=0.01)
    roomy, cramped = Hungry(31), Hungry(16)
    expected, results = (list(fit(model, image_splits(), config)) for model in (roomy, cramped))
    assert [r.metrics["train/loss"] for r in results] == pytest.approx([r.metrics["train/loss"] for r in expected])
    assert [r.metrics["grad_norm"] for r in results] == pytest.approx([r.metrics["grad_norm"] for r in expected], 1e-4)
    for name, weight in weights_of(roomy).items():
        torch.testing.assert_close(weights_of(cramped)[name], weight)
    assert caplog.text.count("does not hold a batch of 31; it is taken in two halves") == 1


def test_a_training_gives_up_when_half_a_batch_does_not_fit_either() -> None:
    with pytest.raises(DeviceMemoryError, match=r"out of memory \(oom\) even with half of batch_size=32 at a time"):
        next(iter(fit(Hungry(8), image_splits(), quick_config(batch_size=32))))


def test_a_resumed_training_takes_batches_in_as_many_parts_as_before(tmp_path: Path) -> None:
    config = quick_config(batch_size=32)
    expected_model, model = Hungry(16), Hungry(16)
    list(fit(expected_model, image_splits(), config))
    folder = CheckpointFolder(tmp_path / "run")
    next(iter(fit(Hungry(16), image_splits(), config, checkpoint=folder)))
    list(fit(model, image_splits(), config, checkpoint=folder))
    assert_equal_weights(weights_of(model), weights_of(expected_model))


@pytest.mark.parametrize("mode", ["off", "step"])
def test_nothing_of_a_training_is_alive_after_it(mode: str) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    splits = image_splits()
    counts = []
    for seed in range(4):
        list(fit(ImageNet(dropout=0.1), splits, quick_config(seed=seed, compile=mode)))
        counts.append(tensors())
    assert counts[3] == counts[2] == counts[1]  # the first one may fill caches


@pytest.mark.parametrize(("clip_norm", "share"), [(0.0, 1 / NORM_EVERY), (1.0, 1.0)])
def test_the_norm_of_the_gradients_is_measured_now_and_then_unless_it_clips_them(
    clip_norm: float, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    norms: list[float] = []

    def watched(*arguments: Any) -> Tensor:
        norms.append(float(clip := clip_gradients(*arguments)))
        return clip

    clip_gradients = training_step._clip_gradients
    monkeypatch.setattr(training_step, "_clip_gradients", watched)
    splits, config = image_splits(), quick_config(batch_size=4, max_epochs=1, clip_norm=clip_norm)
    [result] = fit(ImageNet(), splits, config)
    assert len(norms) == math.ceil(share * (len(splits.train) // 4))
    assert result.metrics["grad_norm"] == pytest.approx(sum(norms) / len(norms))
