"""One step of the trainer: eager, compiled, and where memory runs short."""

from __future__ import annotations

import gc
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import (
    IMAGE_SHAPE,
    ImageNet,
    assert_equal_weights,
    image_splits,
    quick_config,
    weights_of,
    without_time,
)
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional
from torch.torch_version import TorchVersion

from hpo.errors import DeviceMemoryError, UsageError
from hpo.training import compiled
from hpo.training import step as training_step
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.compiled import can_trace, let_dropout_vary, settle_compile_mode
from hpo.training.optimizers import build_optimizer
from hpo.training.step import TrainingStep
from hpo.training.trainer import NORM_EVERY, fit


@pytest.mark.parametrize("clip_norm", [0.0, 0.01, 1e9])
def test_a_step_scales_gradients_down_to_the_global_norm(clip_norm: float) -> None:
    splits, model = image_splits(), ImageNet()
    optimizer = build_optimizer(model, quick_config(optimizer="sgd", momentum=0.0, lr=1.0))
    before = weights_of(model)
    assert isinstance(splits.train.inputs, Tensor)
    training_step = TrainingStep(model, functional.cross_entropy, optimizer, clip_norm=clip_norm)
    step = training_step(splits.train.inputs, splits.train.targets)
    moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in model.named_parameters()]).norm().item()
    grad_norm = step.grad_norm.item()
    assert grad_norm > 0.01
    assert moved == pytest.approx(0.01 if clip_norm == 0.01 else grad_norm, rel=1e-3)
    assert not step.loss.requires_grad
    assert not step.outputs.requires_grad


# What is compiled.


def compiled_graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.compiled_step
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "momentum": 0.0, "clip_norm": 0.5, "ema_decay": 0.9},
        {"optimizer": "sgd", "label_smoothing": 0.1, "loss": "binary_cross_entropy", "class_weights": "balanced"},
        {"optimizer": "adam", "label_smoothing": 0.1, "loss": "focal", "class_weights": "balanced"},
        {"optimizer": "adamw", "clip_norm": 0.5, "mixup": 0.3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_a_compiled_step_trains_as_the_eager_one_does(changes: dict[str, Any]) -> None:
    config = quick_config(max_epochs=4, weight_decay=0.01, **changes)
    weights, curves = [], []
    for mode in ("off", "step"):
        model = ImageNet()
        model.dropout = nn.Dropout(1e-9)  # which a compiled step replaces by a module with a buffer
        model.hidden.bias = None  # in front of a norm it has no gradient but rounding, which Adam would magnify
        results = list(fit(model, image_splits(), replace(config, compile=mode)))
        assert [result.settled["compile"] for result in results] == ["off", *[mode] * 3]
        weights.append(weights_of(model))
        curves.append([result.metrics["train/loss"] for result in results])
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)
    for name, eager in weights[0].items():
        torch.testing.assert_close(weights[1][name], eager, rtol=1e-3, atol=1e-4)


@pytest.mark.compiled_step
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


@pytest.mark.compiled_step
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


@pytest.mark.compiled_step
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


@pytest.mark.compiled_step
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
        pytest.param(
            {"compile": "step", "precision": "fp16"},
            "--compile step does not work with --precision fp16",
            marks=pytest.mark.compiled_step,
        ),
    ],
)
def test_a_compile_mode_that_cannot_be_had_is_refused_before_any_work(changes: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        next(iter(fit(ImageNet(), image_splits(), quick_config(**changes))))


def test_a_torch_that_cannot_trace_a_step_refuses_to_compile_it_and_auto_does_without(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if can_trace():  # else it is such a torch
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.10.1"))
    needs = f"--compile step needs torch 2.11 or later, not {torch.__version__}; use --compile auto"
    with pytest.raises(UsageError, match=re.escape(needs)):
        next(iter(fit(ImageNet(), image_splits(), quick_config(compile="step"))))
    step = TrainingStep(ImageNet(), functional.cross_entropy, torch.optim.SGD(ImageNet().parameters(), lr=0.1))
    shape, plenty = (17, *IMAGE_SHAPE), 1_000_000
    assert settle_compile_mode("auto", step, batch_shape=shape, seconds_a_step=1e-3, steps_left=plenty) == "off"


# Memory.


class Hungry(ImageNet):
    """Runs out of memory above a number of examples at a time."""

    error: RuntimeError = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    def __init__(self, most: int) -> None:
        super().__init__()
        self.norm = nn.Identity()  # type: ignore[assignment]
        self.most = most

    def forward(self, images: Tensor) -> Tensor:
        if self.training and len(images) > self.most:
            raise self.error
        return super().forward(images)


@pytest.mark.parametrize(
    "error",
    [Hungry.error, RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")],
    ids=["torch", "cuBLAS"],
)
def test_a_batch_that_does_not_fit_is_taken_in_two_halves_with_the_same_result(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Hungry, "error", error)
    config = quick_config(batch_size=31, clip_norm=0.1, weight_decay=0.01)
    roomy, cramped = Hungry(31), Hungry(16)
    expected, results = (list(fit(model, image_splits(), config)) for model in (roomy, cramped))
    assert [r.metrics["train/loss"] for r in results] == pytest.approx([r.metrics["train/loss"] for r in expected])
    assert [r.metrics["grad_norm"] for r in results] == pytest.approx([r.metrics["grad_norm"] for r in expected], 1e-4)
    for name, weight in weights_of(roomy).items():
        torch.testing.assert_close(weights_of(cramped)[name], weight)
    assert caplog.text.count("does not hold a batch of 31; it is processed in two halves") == 1


def test_an_error_that_is_not_about_memory_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hungry, "error", RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        next(iter(fit(Hungry(16), image_splits(), quick_config())))


def test_a_graph_is_refused_with_a_torch_that_cannot_give_up_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "OLDEST_CAPTURING", "99.0")
    with pytest.raises(UsageError, match=r"--compile graph needs torch 99.0 or later, not"):
        compiled.check_compile_mode("graph", "fp32", "cuda")


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


@pytest.mark.parametrize("mode", ["off", pytest.param("step", marks=pytest.mark.compiled_step)])
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
