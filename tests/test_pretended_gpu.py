"""The trainer, the checks and the worker on a pretended GPU: what would fail or wait on a real one.

Where a real GPU is found these are left out, and tests/test_gpu.py runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import LR_SPACE
from helpers.pretended_cuda import pretended_cuda
from helpers.pretended_trials import (
    BETWEEN_STEPS,
    IN_EACH_STEP,
    NOT_COMPARED,
    OF_THE_OPTIMIZER,
    configurations,
    make_objective,
    make_splits,
    train,
)
from torch import nn

from hpo.checks import checklist, learning, speed
from hpo.checks.checklist import whole_list
from hpo.checks.verdicts import Subject, Verdict
from hpo.config import TrainConfig
from hpo.data import batches
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, SealedSplit
from hpo.execution.messages import Assignment, Decision
from hpo.execution.worker import refit, run_trial
from hpo.models import networks, preprocessed
from hpo.models.preprocessed import build_model
from hpo.task import Task
from hpo.training.trained import TrialDescription

pytestmark = pytest.mark.pretended_gpu


@pytest.mark.parametrize("name", configurations())
def test_a_trial_runs_waits_between_epochs_alone_repeats_its_step_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    """What the host waits for in 2 steps per epoch and in 4 or 6 is the same, except for the permitted waits.

    Each step has the operations, the plain numbers and the addresses of the one before it, except for the
    optimizer's rates.
    """
    case = configurations()[name]
    addresses: list[tuple[int, ...]] = []
    few = train(case, tmp_path / "few", batch_size=24)
    # Of fewer steps than 6 the third would be the last one that is streamed, or of a fold, or of a size of the images.
    smaller = 8 if {"is_streamed", "folds", "progressive_start"} & case.keys() else 12
    many = train(case, tmp_path / "many", batch_size=smaller, addresses=addresses)
    assert many.without_cudnn == {}
    assert many.bytes_alive() == 0
    more = {wait for wait, count in many.waits.items() if count > few.waits[wait]} - NOT_COMPARED
    assert more == IN_EACH_STEP.get(name, set())
    assert many.waits.keys() <= BETWEEN_STEPS.keys() | more
    # A CUDA graph repeats a step with the numbers and addresses that it was captured with.
    # The first step makes the optimizer's state, and after the last ones there is less to stream, or an evaluation.
    one, other = many.operations[1:3]
    assert addresses[1] == addresses[2]
    assert [operation for operation, _, _ in one] == [operation for operation, _, _ in other]
    changing = {place for (_, before, place), (_, after, _) in zip(one, other, strict=True) if before != after}
    assert changing <= OF_THE_OPTIMIZER


def test_the_data_stay_on_the_device_from_trial_to_trial_and_their_statistics_are_kept() -> None:
    """As a worker places them: what the next trial moves, and computes again, does not grow with the data."""
    splits = make_splits()
    with pretended_cuda() as seen:
        placed = batches.place(splits, "cuda")
        assert placed.train.inputs.device.type == "cuda"
        assert batches.place(placed, "cuda") is placed
        seen.waits.clear()
        with pytest.MonkeyPatch.context() as patch:
            for _ in range(2):
                model = build_model(make_objective(networks.mlp), splits.spec, {"width": 8}, seed=0).to("cuda")
                model.fit_statistics(placed.train)
                patch.setattr(preprocessed, "_uint8_statistics", lambda inputs: pytest.fail("they are known"))
    assert torch.equal(model.cpu().input_mean, expected_mean(splits))  # type: ignore[arg-type]


def expected_mean(splits: Splits) -> torch.Tensor:
    assert isinstance(splits.train.inputs, torch.Tensor)
    return splits.train.inputs.double().mean((0, 2, 3)).float()[:, None, None]


class Recurrent(nn.Module):
    """A GRU over the rows of an image: cuDNN's has no backward pass in evaluation mode."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.gru = nn.GRU(spec.input_shape[-1], 8, batch_first=True)
        self.output = nn.Linear(8, spec.num_outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        cudnn_refuses = (
            images.is_cuda and torch.backends.cudnn.enabled and not self.training and torch.is_grad_enabled()
        )
        assert not cudnn_refuses, "cudnn RNN backward can only be called in training mode"
        outputs: torch.Tensor = self.output(self.gru(images.mean(1))[0][:, -1])
        return outputs


@pytest.fixture
def _without_collector() -> Iterator[None]:
    """What is alive only because Python has not looked for circles yet is memory that a trial does not get."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_collector")
@pytest.mark.parametrize("model", [networks.convnet, Recurrent])
def test_the_checks_run_and_leave_nothing_on_the_device(
    model: Callable[..., nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "BATCH_STEPS", 10)
    monkeypatch.setattr(learning, "TRAINING_S", 0.1)
    monkeypatch.setattr(learning, "RANGE_TEST_S", 0.1)
    monkeypatch.setattr(speed, "MEASURING_S", 0.05)
    # Its worker is another process, where nothing is pretended.
    monkeypatch.setattr(checklist, "check_rehearsal", lambda subject: Verdict(state="ok", text="not made"))
    task = Task(
        reference="pretended",
        objective=make_objective(model),
        space=LR_SPACE,
    )
    with pretended_cuda() as seen:
        subject = Subject.of(task, make_splits(), "cuda")
        verdicts = list(whole_list(subject, SealedSplit(lambda: make_splits().validation, 16)))
        assert [verdict.text for verdict in verdicts if "failed to run" in verdict.advice] == []
        assert seen.without_cudnn == {}
        del subject
        assert seen.bytes_alive() == 0


def test_the_winner_of_folds_is_trained_on_all_examples(tmp_path: Path) -> None:
    config = TrainConfig(max_epochs=2, batch_size=16, device="cuda")
    assignment = Assignment(number=0, model_parameters={"width": 8}, config=config, folder=tmp_path)
    with pretended_cuda() as seen:
        refit(assignment, make_objective(networks.mlp), make_splits(), num_epochs=1, value=0.5)
        assert seen.bytes_alive() == 0
    assert TrialDescription.read(tmp_path).best_epoch == 1


def test_a_training_there_equals_one_on_the_cpu(tmp_path: Path) -> None:
    """So what is seen of it is what a GPU would see."""
    curves = []
    for device in ("cuda", "cpu"):
        config = TrainConfig(
            max_epochs=2, batch_size=16, device=device, precision="fp32", compile="off", augment="crop+flip"
        )
        assignment = Assignment(number=0, model_parameters={"width": 8}, config=config, folder=tmp_path / device)
        curve: list[float] = []

        def report(result: Any, curve: list[float] = curve) -> Decision:
            curve.append(result.metrics["val/loss"])
            return Decision.CONTINUE

        with pretended_cuda() if device == "cuda" else pytest.MonkeyPatch.context():
            run_trial(assignment, make_objective(networks.convnet), make_splits(), report)
        curves.append(curve)
    assert curves[0] == curves[1]
