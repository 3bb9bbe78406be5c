"""Trials on a pretended GPU whose memory does not hold both the trial and the data of the ones before."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pretended_cuda import Seen, pretended_cuda
from helpers.pretended_trials import make_splits
from torch import nn

from hpo.config import TrainConfig
from hpo.data.examples import DataSpec
from hpo.errors import DeviceMemoryError
from hpo.execution.messages import Assignment, Decision
from hpo.execution.worker import TrialData, run_with_data
from hpo.models.preprocessed import build_model
from hpo.objective import Objective

pytestmark = pytest.mark.pretended_gpu


class Large(nn.Module):
    """Its forward pass needs memory: what is on the device beside may take no more than `room` bytes."""

    room: int
    seen: Seen

    def __init__(self, spec: DataSpec, fails_in_evaluation: bool) -> None:
        super().__init__()
        self.output = nn.Linear(spec.input_shape[-1], spec.num_outputs)
        self.fails_in_evaluation = fails_in_evaluation

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training != self.fails_in_evaluation and self.seen.bytes_alive() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        outputs: torch.Tensor = self.output(images.mean((1, 2)))
        return outputs


OBJECTIVE = Objective(name="large", description="", load=lambda folder: pytest.fail("nothing is read"), model=Large)


def run(
    number: int,
    room: int,
    folder: Path,
    data: TrialData,
    *,
    fails_in_evaluation: bool = False,
    folds: int | None = None,
) -> list[float]:
    """Validation losses of a trial by epoch, each as often as it was reported."""
    Large.room = room
    config = TrainConfig(max_epochs=2, batch_size=32, lr=0.1, device="cuda", compile="off")
    parameters = {"fails_in_evaluation": fails_in_evaluation}
    assignment = Assignment(
        number=number,
        model_parameters=parameters,  # type: ignore[arg-type]
        config=config,
        folder=folder / str(number),
        costs=("params",),
        folds=folds,
    )
    curve: list[float] = []

    def report(result: Any) -> Decision:
        curve.append(result.metrics["val/loss"])
        return Decision.CONTINUE

    assert run_with_data(assignment, OBJECTIVE, data, report) == {"params": 51.0}
    return curve


NUM_EXAMPLES = 400
ROOMY, WITHOUT_DATA = 10**9, 300_000
"""Bytes; the data take 322 816, and what a streamed training has on the device less than 250 000."""


@pytest.mark.parametrize("fails_in_evaluation", [False, True])
def test_a_trial_streams_the_data_of_the_ones_before_if_it_needs_their_memory(
    fails_in_evaluation: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is bit-equal to one that found room, and the next trial places the data again."""
    data = TrialData(make_splits(num_examples=NUM_EXAMPLES))
    with pretended_cuda() as seen:
        Large.seen = seen
        before = run(0, ROOMY, tmp_path, data)
        assert data.splits.train.targets.is_cuda
        assert caplog.text == ""
        tight = run(1, WITHOUT_DATA, tmp_path, data, fails_in_evaluation=fails_in_evaluation)
        assert not data.splits.train.targets.is_cuda
        assert "cannot hold the trial and its data; this trial continues with streamed data" in caplog.text
        assert seen.bytes_alive() == 0
        assert tight == before
        assert run(2, ROOMY, tmp_path, data) == before
        assert data.splits.train.targets.is_cuda


def test_folds_are_streamed_as_well(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pretended_cuda() as seen:
        Large.seen = seen
        roomy = run(0, ROOMY, tmp_path, TrialData(make_splits(num_examples=NUM_EXAMPLES)), folds=2)
        assert caplog.text == ""
        assert run(1, WITHOUT_DATA, tmp_path, TrialData(make_splits(num_examples=NUM_EXAMPLES)), folds=2) == roomy
        assert "continues with streamed data" in caplog.text


def test_a_trial_that_does_not_fit_without_the_data_either_says_so(tmp_path: Path) -> None:
    with pretended_cuda() as seen:
        Large.seen = seen
        with pytest.raises(DeviceMemoryError, match="even with half of batch_size=32"):
            run(0, 0, tmp_path, TrialData(make_splits(num_examples=NUM_EXAMPLES)))


def test_statistics_keep_no_data_alive_and_notice_that_they_change() -> None:
    splits = make_splits()
    gc.disable()
    try:
        with pretended_cuda() as seen:
            Large.seen = seen
            placed = splits.to("cuda")
            model = build_model(OBJECTIVE, splits.spec, {"fails_in_evaluation": False}, seed=0)
            model.fit_statistics(placed.train)
            assert isinstance(placed.train.inputs, torch.Tensor)
            before = model.input_mean.clone()
            placed.train.inputs.fill_(7)
            model.fit_statistics(placed.train)
            assert model.input_mean.flatten().tolist() == [7.0, 7.0, 7.0] != before.flatten().tolist()
            del placed
            assert seen.bytes_alive() <= 2 * 3 * 8, "the statistics themselves"
    finally:
        gc.enable()
