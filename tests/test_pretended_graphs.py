"""Steps captured as CUDA graphs, on a pretended GPU: equal to eager ones, given up with a reason, and resumed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pretended_cuda import Seen, pretended_cuda
from helpers.pretended_trials import make_objective, make_splits, small_backbone
from torch import nn

from hpo.config import TrainConfig
from hpo.data.examples import DataSpec
from hpo.models import networks
from hpo.models.architectures import TorchvisionArchitecture
from hpo.models.preprocessed import build_model
from hpo.training import captured, trainer
from hpo.training.checkpoint import CheckpointFolder

pytestmark = pytest.mark.pretended_gpu

PRETRAINED = {"architecture": "resnet18", "weights": "none", "image_size": 16, "trainable_layers": 0}

GRAPHS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "schedule": "one_cycle", "weight_decay": 0.01},
    "sgd without nesterov": {"optimizer": "sgd", "nesterov": False, "schedule": "cosine"},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0, "schedule": "cosine"},
    "adam": {"optimizer": "adam", "schedule": "one_cycle", "weight_decay": 0.01, "clip_norm": 0.1},
    "adamw": {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1, "ema_decay": 0.9},
    "images": {"model": "convnet", "augment": "crop+flip+cutout", "mixup": 0.2, "precision": "bf16"},
    "dropout": {"parameters": {"width": 16, "norm": "batch", "dropout": 0.2}, "label_smoothing": 0.1},
    "regression": {"loss": "huber", "metric": "r2"},
    "frozen layers": {"model": "airnet", "parameters": {"width": 4}, "augment": "alternating_flip+crop"},
}


def curve_of(
    compile_mode: str,
    *,
    model: str | Callable[..., nn.Module] = "mlp",
    parameters: dict[str, Any] | None = None,
    checkpoint: CheckpointFolder | None = None,
    num_results: int = 100,
    **settings: Any,
) -> tuple[list[float], Seen, str]:
    """Validation losses of a training with 12 steps per epoch, what was seen, and how it was compiled in the end."""
    network = getattr(networks, model) if isinstance(model, str) else model
    if parameters is None:
        parameters = {"width": 8} if isinstance(model, str) else {}
    splits = make_splits(is_regression=settings.get("metric") == "r2")
    config = TrainConfig(
        **{"max_epochs": 2, "batch_size": 4, "lr": 1e-3, "device": "cuda", "precision": "fp32", **settings},
        compile=compile_mode,
    )
    with pretended_cuda() as seen:
        built = build_model(make_objective(network), splits.spec, parameters, seed=0).to("cuda")
        built.fit_statistics(splits.train)
        training = trainer.fit(built, splits, config, checkpoint=checkpoint)
        results = list(islice(training, num_results))
        training.close()
        del built, splits, training
        assert seen.bytes_alive() == 0
    return [result.metrics["val/loss"] for result in results], seen, results[-1].settled["compile"]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_captured_training_equals_an_eager_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rate, count or random draw stays what it was in the capture; eager steps come between for comparison."""
    monkeypatch.setattr(captured, "RACE_STEPS", 2)
    eager, _, _ = curve_of("off", **GRAPHS[name])
    graph, seen, mode = curve_of("graph", **GRAPHS[name])
    assert mode == "graph"
    assert seen.num_captures == 1
    assert seen.num_replays > 15
    rough = GRAPHS[name].get("precision") == "bf16"
    assert graph == pytest.approx(eager, rel=1e-2 if rough else 1e-4)


def test_a_captured_step_lets_the_host_wait_once_a_trial() -> None:
    waits = []
    for max_epochs in (1, 3):
        _, seen, _ = curve_of("graph", max_epochs=max_epochs)
        waits.append({kind: count for kind, count in seen.waits.items() if "captured.py" in kind[1]})
    assert waits[0] == waits[1]
    assert {place for _, place in waits[0]} == {"training/captured.py:_capture", "training/captured.py:_check"}


class Counting(nn.Module):
    """Its outputs depend on how often it was called, by a number that Python holds."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.output = nn.Linear(spec.input_shape[-1], spec.num_outputs)
        self.num_calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_calls += self.training
        outputs: torch.Tensor = self.output(images.mean((1, 2))) * (self.num_calls % 7)
        return outputs


class Waiting(Counting):
    """Reads a number from the device in each step."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.output(images.mean((1, 2)) / (1 + abs(images.mean().item())))
        return outputs


class Full(Counting):
    """Runs out of memory in a capture."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        outputs: torch.Tensor = self.output(images.mean((1, 2)))
        return outputs


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Counting, "differs from an eager one"),
        (Waiting, "operation not permitted when stream is capturing"),
        (Full, "CUDA out of memory"),
    ],
)
def test_what_cannot_be_captured_is_trained_as_it_is_and_the_user_reads_why(
    model: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    eager, _, _ = curve_of("off", model=model, optimizer="adamw")
    graph, seen, mode = curve_of("graph", model=model, optimizer="adamw")
    assert mode == "off"
    assert "steps are not captured as a CUDA graph" in caplog.text
    assert reason in caplog.text
    assert seen.num_captures == 1
    if model is not Counting:  # which was called twice more, for the check
        assert graph == pytest.approx(eager, rel=1e-4)


def test_auto_will_capture_models_of_known_modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert curve_of("auto", max_epochs=1)[2] == "off", "until it has run on a real GPU"
    monkeypatch.setattr(captured, "CAPTURED_BY_AUTO", True)
    assert curve_of("auto", max_epochs=1)[2] == "graph"
    assert curve_of("auto", max_epochs=1, model=Full)[1].num_captures == 0


def test_a_slower_captured_step_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(captured, "RACE_STEPS", 2)
    times = iter([2.0, 1.0])
    monkeypatch.setattr("helpers.pretended_cuda._Event.elapsed_time", lambda self, other: next(times))
    _, _, mode = curve_of("graph")
    assert mode == "off"
    assert "not captured as a CUDA graph: it is not faster" in caplog.text


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_is_captured_again_when_layers_are_thawed(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that were frozen begin with Adam's first step, the others continue."""
    monkeypatch.setattr(TorchvisionArchitecture, "build", small_backbone)
    settings: dict[str, Any] = {
        "model": "pretrained",
        "parameters": PRETRAINED,
        "thaw_epoch": 2,
        "max_epochs": 2,
        "lr": 1e-2,
        "optimizer": optimizer,
        "schedule": "constant",
    }
    eager, _, _ = curve_of("off", **settings)
    graph, seen, mode = curve_of("graph", **settings)
    assert mode == "graph"
    assert seen.num_captures == 2
    assert graph == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize("race_steps", [2, 20], ids=["timed in the first epoch", "epochs too short for it"])
def test_a_resumed_graph_training_is_bit_equal(
    race_steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captured, "RACE_STEPS", race_steps)
    settings: dict[str, Any] = {
        "optimizer": "adamw",
        "schedule": "one_cycle",
        "ema_decay": 0.9,
        "augment": "crop",
        "parameters": {"width": 16, "dropout": 0.2},
    }
    whole, _, mode = curve_of("graph", **settings)
    assert mode == "graph"
    folder = CheckpointFolder(tmp_path / "run")
    first, _, _ = curve_of("graph", checkpoint=folder, num_results=1, **settings)
    rest, seen, _ = curve_of("graph", checkpoint=folder, **settings)
    assert [*first, *rest[1:]] == whole
    assert rest[0] == first[0], "the saved result comes once more"
    assert seen.num_captures == 1


def test_what_was_given_up_stays_so_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured, "RACE_STEPS", 2)
    times = iter([2.0, 1.0])
    monkeypatch.setattr("helpers.pretended_cuda._Event.elapsed_time", lambda self, other: next(times))
    folder = CheckpointFolder(tmp_path / "run")
    assert curve_of("graph", checkpoint=folder, num_results=1)[2] == "off"
    _, seen, mode = curve_of("graph", checkpoint=folder)
    assert mode == "off"
    assert seen.num_captures == 0
