"""What `--precision` chooses, and what stays in fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import NUM_CLASSES, ImageNet, image_splits, quick_config, without_time
from torch import Tensor, nn
from torch.nn import functional

from hpo.training import precision
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.precision import settle_precision
from hpo.training.trainer import fit


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
