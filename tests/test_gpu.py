"""The trainer on a GPU: these tests run wherever a CUDA device is found."""

from __future__ import annotations

import gc
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import ImageNet, image_splits, quick_config, weights_of
from torch.profiler import ProfilerActivity, profile

from hpo.training.checkpoint import CheckpointFolder, load_weights, save_weights
from hpo.training.device import prepare_deterministic_products
from hpo.training.trainer import fit

pytestmark = pytest.mark.gpu
prepare_deterministic_products()  # a worker does so before it computes anything

STEP = pytest.param("step", marks=pytest.mark.compiled_step)
GRAPH = pytest.param("graph", marks=pytest.mark.captured_step)

WAITS = {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"}
"""What the host does when it waits for the device, in a profile."""


@pytest.mark.parametrize("augment", ["none", "crop+flip+cutout"])
def test_a_training_on_a_gpu_is_resumed_there_and_its_weights_load_on_a_cpu(tmp_path: Path, augment: str) -> None:
    config = quick_config(device="cuda", augment=augment)
    folder = CheckpointFolder(tmp_path / "run")
    next(iter(fit(ImageNet(dropout=0.2), image_splits(), config, checkpoint=folder)))
    model = ImageNet(dropout=0.2)
    results = list(fit(model, image_splits(), config, checkpoint=folder))
    assert [result.epoch for result in results] == [1, 2, 3]
    assert all(math.isfinite(value) for result in results for value in result.metrics.values())
    assert next(model.parameters()).is_cuda
    digest = save_weights(model.state_dict(), tmp_path / "best.pt")
    ImageNet(dropout=0.2).load_state_dict(load_weights(tmp_path / "best.pt", digest))


def waits_in(batch_size: int, **changes: Any) -> int:
    """How often the host waits for the device in a training of two epochs."""
    config = quick_config(device="cuda", batch_size=batch_size, max_epochs=2, clip_norm=1.0, **changes)
    *_, last = fit(ImageNet(), image_splits(), config)  # what is done once for each shape is done here
    assert last.settled["compile"] == config.compile
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        list(fit(ImageNet(), image_splits(), config))
    return sum(event.count for event in recorded.key_averages() if event.key in WAITS)


@pytest.mark.parametrize("mode", ["off", STEP, GRAPH])
@pytest.mark.parametrize("changes", [{}, {"augment": "crop+flip+rotation+colour_jitter+cutout", "mixup": 0.2}], ids=str)
def test_the_host_waits_for_the_device_at_the_ends_of_epochs_only(changes: dict[str, Any], mode: str) -> None:
    batch_sizes = (12, 4) if mode == "graph" else (96, 8)  # a graph's capture waits, and takes four steps
    few_steps, many_steps = (waits_in(batch_size, compile=mode, **changes) for batch_size in batch_sizes)
    assert few_steps > 0, "the profile sees them"
    # A capture waits for each event that is still under way. Waiting in each step would be dozens more.
    assert abs(many_steps - few_steps) <= (2 if mode == "graph" else 0)


@pytest.mark.parametrize("mode", ["off", STEP, GRAPH])
def test_twenty_trials_leave_no_more_bytes_allocated_than_two(mode: str) -> None:
    splits, allocated = image_splits(), []
    for seed in range(20):
        *_, last = fit(ImageNet(dropout=0.1), splits, quick_config(device="cuda", seed=seed, compile=mode))
        assert last.settled["compile"] == mode
        gc.collect()
        allocated.append(torch.cuda.memory_allocated())
    assert allocated[-1] <= allocated[1]


@pytest.mark.captured_step
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_cuda_graph_trains_as_the_eager_step_does(optimizer: str) -> None:
    config = quick_config(
        device="cuda", max_epochs=4, batch_size=8, optimizer=optimizer, weight_decay=0.01, clip_norm=0.5
    )
    weights, curves = [], []
    for mode in ("off", "graph"):
        model = ImageNet()
        model.hidden.bias = None  # in front of a norm it has no gradient but rounding, which Adam would magnify
        results = list(fit(model, image_splits(), replace(config, compile=mode)))
        assert results[-1].settled["compile"] == mode
        weights.append(weights_of(model))
        curves.append([result.metrics["train/loss"] for result in results])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    for name, eager in weights[0].items():
        torch.testing.assert_close(weights[1][name], eager, rtol=1e-2, atol=1e-3)


class Reading(ImageNet):
    """Reads a number from the device in its forward pass, which no capture allows."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs) + inputs.float().mean().item() * 0


@pytest.mark.captured_step
def test_a_training_whose_capture_is_refused_continues_as_if_none_had_been_tried() -> None:
    config = quick_config(device="cuda", batch_size=8, compile="graph", max_epochs=6)
    results = list(fit(Reading(dropout=0.2), image_splits(), config))
    assert results[-1].settled["compile"] == "off"
    losses = [result.metrics["val/loss"] for result in results]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_streamed_data_train_as_those_on_the_device() -> None:
    config = quick_config(device="cuda", augment="crop+flip", deterministic=True)
    curves = [
        [result.metrics["val/loss"] for result in fit(ImageNet(), image_splits(), config, is_streamed=is_streamed)]
        for is_streamed in (False, True)
    ]
    assert curves[0] == curves[1]


def test_a_deterministic_training_is_bit_equal_on_the_same_gpu() -> None:
    config = quick_config(device="cuda", augment="crop+flip", deterministic=True)
    curves = [[result.metrics["val/loss"] for result in fit(ImageNet(), image_splits(), config)] for _ in range(2)]
    assert curves[0] == curves[1]
