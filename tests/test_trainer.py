"""The shared trainer: what `fit` promises, and the defects of the tutorial loop that must not come back."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import of_classes
from helpers.training import (
    NUM_CLASSES,
    Float,
    ImageNet,
    Line,
    Recorder,
    assert_equal_weights,
    image_splits,
    line_splits,
    quick_config,
    regression_config,
    scripted,
    weights_of,
    without_time,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.config import AUGMENTATIONS, TrainConfig
from hpo.data.datasets import split_dataset
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.errors import UnknownNameError, UsageError
from hpo.methods import OPTIMIZERS, SCHEDULES
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.evaluation import evaluate
from hpo.training.losses import target_scale
from hpo.training.metrics import HELD_EXAMPLES, METRICS_OF_KIND, EpochMetrics
from hpo.training.trainer import fit

# The defects of the tutorial loop.


def test_the_training_data_are_shuffled_anew_in_each_epoch() -> None:
    splits = image_splits()
    model = Recorder(ImageNet())
    list(fit(model, splits, quick_config(max_epochs=2)))
    first, second = torch.cat(model.batches[:3]), torch.cat(model.batches[3:])

    def as_set(images: Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in images}

    assert as_set(first) == as_set(second) == as_set(splits.train.inputs)  # type: ignore[arg-type]
    assert not torch.equal(first, second)
    assert not torch.equal(first, splits.train.inputs)  # type: ignore[arg-type]


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
    assert evaluate(model, image_splits().validation, config, of_classes(NUM_CLASSES))["loss"] == pytest.approx(
        min(values)
    )


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

    measured = evaluate(model, Split(inputs, targets), quick_config(), of_classes(NUM_CLASSES))["loss"]
    with torch.no_grad():
        assert measured == pytest.approx(functional.cross_entropy(model(inputs), targets).item(), rel=1e-5)


def test_the_mean_of_batches_of_different_size_is_the_mean_of_their_examples() -> None:
    metrics = EpochMetrics(of_classes(2), "cpu")
    for size, loss in ((3, 1.0), (1, 5.0)):
        metrics.update(torch.zeros(size, 2), torch.zeros(size, dtype=torch.int64), torch.tensor(loss))
    assert metrics.compute()["loss"].item() == 2.0


@pytest.mark.parametrize("sizes", [[3, 3, 3, 2], [2000, 30, 30], [1500, 1500]])
def test_batches_that_are_held_are_counted_like_those_that_are_not(
    sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    for most_held in (HELD_EXAMPLES, 1):
        monkeypatch.setattr("hpo.training.metrics.HELD_EXAMPLES", most_held)
        generator = torch.Generator().manual_seed(0)
        metrics = EpochMetrics(of_classes(NUM_CLASSES), "cpu", is_complete=True)
        for size in sizes:
            outputs = torch.randn(size, NUM_CLASSES, generator=generator)
            targets = torch.randint(NUM_CLASSES, (size,), generator=generator)
            metrics.update(outputs, targets, functional.cross_entropy(outputs, targets))
        measured.append({name: value.item() for name, value in metrics.compute().items()})
    loss, same_loss = (each.pop("loss") for each in measured)
    assert measured[0] == measured[1]
    assert loss == pytest.approx(same_loss)


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
        scale = target_scale(splits.train, splits.spec)
        results = list(fit(Line(3, mean, scale), splits, regression_config()))  # type: ignore[arg-type]
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


def test_a_training_without_a_reason_to_stop_has_max_epochs_epochs() -> None:
    _, results = scripted([0.1, 0.2, 0.3, 0.4])
    assert [result.epoch for result in results] == [1, 2, 3, 4]


def test_training_stops_early_and_the_model_has_the_best_weights() -> None:
    model, results = scripted([0.2, 0.6, 0.5, 0.6, 0.9], patience=2)
    results = list(results)  # type: ignore[assignment]
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
    config = quick_config(max_epochs=6, lr=0.3, metric="loss", compile="off")
    results = list(fit(model, image_splits(), config))
    assert not results[-1].is_best, "or the test shows nothing"
    measured = evaluate(model, image_splits().validation, config, of_classes(NUM_CLASSES))
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
    functional.cross_entropy(model(alike.inputs), alike.targets).backward()  # type: ignore[arg-type]
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()

    config = quick_config(max_epochs=1, clip_norm=clip_norm, optimizer="sgd", lr=1e-12)
    (result,) = fit(model, replace(splits, train=alike), config)
    assert result.metrics["grad_norm"] == pytest.approx(expected, rel=1e-4)


def test_evaluation_of_any_split_gives_the_metrics_without_prefix() -> None:
    splits = image_splits()
    measured = evaluate(ImageNet(), splits.validation, quick_config(), of_classes(NUM_CLASSES))
    assert measured.keys() == {"loss", *METRICS_OF_KIND["classification"]}
    splits = line_splits()
    measured = evaluate(Line(3), splits.validation, regression_config(), of_classes(0), target_scale=2.0)
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
