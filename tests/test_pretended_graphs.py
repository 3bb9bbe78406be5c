"""Captured steps on a pretended GPU over the epochs of a training: after a thaw, and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pretended_cuda import Seen, pretended_cuda
from pretended_gpu_cases import make_objective, make_splits
from torch import nn

from hpo.config import TrainConfig
from hpo.models import networks, pretrained
from hpo.models.preprocessed import build_model
from hpo.training import captured
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.trainer import fit

pytestmark = pytest.mark.pretended_gpu

PRETRAINED = {"architecture": "resnet18", "weights": "none", "image_size": 16, "trainable_layers": 0}


def curve_of(
    compile_mode: str,
    *,
    model: str = "mlp",
    parameters: dict[str, Any] | None = None,
    checkpoint: CheckpointFolder | None = None,
    num_results: int = 100,
    **settings: Any,
) -> tuple[list[float], Seen, str]:
    """Validation losses, what was seen of the training, and how it was compiled in the end."""
    splits = make_splits()
    config = TrainConfig(
        **{"max_epochs": 3, "batch_size": 4, "lr": 1e-3, "device": "cuda", "precision": "fp32", **settings},
        compile=compile_mode,
    )
    results = []
    with pretended_cuda() as seen:
        built = build_model(make_objective(getattr(networks, model)), splits.spec, parameters or {"width": 8}, seed=0)
        built = built.to("cuda")
        built.fit_statistics(splits.train)
        training = fit(built, splits, config, checkpoint=checkpoint)
        for result in training:
            results.append(result)
            if len(results) == num_results:
                break
        training.close()
        del built, splits, training
        assert seen.bytes_alive() == 0
    return [result.metrics["val/loss"] for result in results], seen, results[-1].settled["compile"]


def small_backbone(architecture: str, num_outputs: int, *, uses_imagenet_inputs: bool) -> nn.Module:
    hidden = nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), hidden, nn.Linear(8, num_outputs))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_is_captured_again_when_layers_are_thawed(optimizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers that were frozen begin with Adam's first step, the others continue."""
    monkeypatch.setattr(pretrained, "_build", small_backbone)
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
    monkeypatch.setattr("pretended_cuda._Event.elapsed_time", lambda self, other: next(times))
    folder = CheckpointFolder(tmp_path / "run")
    assert curve_of("graph", checkpoint=folder, num_results=1)[2] == "off"
    _, seen, mode = curve_of("graph", checkpoint=folder)
    assert mode == "off"
    assert seen.num_captures == 0
