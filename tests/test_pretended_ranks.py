"""One of two ranks on a pretended GPU: what it would wait for, or have on the wrong device.

torch's collective operations do not know a pretended GPU: here they find the same on the other rank. What they and
DistributedDataParallel do is shown by tests/test_several_gpus.py, with processes on the CPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pretended_cuda import Seen, pretended_cuda
from helpers.pretended_trials import BETWEEN_STEPS
from torch import Tensor, nn

from hpo import Objective, TrainConfig, convnet, hold_out, split_dataset
from hpo.execution.messages import Assignment, Decision
from hpo.execution.worker import TrialData, run_with_data
from hpo.training import distributed
from hpo.training.distributed import Ranks

pytestmark = pytest.mark.pretended_gpu

MORE = {
    ("copy from pageable memory", "data/batches.py:__init__"): "the rows that are not only there for mixing",
    ("copy from pageable memory", "data/batches.py:_in_batches"): "the rows of this rank, once an epoch",
}
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(256, (125, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)


class Averaging(nn.Module):
    """Stands for DistributedDataParallel, where the other rank has the same gradients."""

    def __init__(self, module: nn.Module, **_: object) -> None:
        super().__init__()
        self.module = module

    def forward(self, *batch: Any) -> Any:
        return self.module(*batch)


@pytest.fixture(autouse=True)
def _the_other_rank_has_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def all_gather(parts: list[Tensor], own: Tensor) -> None:
        for part in parts:
            part.copy_(own)

    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(2))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, _: None)
    monkeypatch.setattr(torch.distributed, "all_gather", all_gather)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "DistributedDataParallel", Averaging)


def trained(folder: Path, *, batch_size: int) -> Seen:
    data = hold_out(IMAGES, torch.arange(125) % 3, ("a", "b", "c"))
    objective = Objective(name="pretended", description="", load=lambda _: data, model=convnet)
    config = TrainConfig(
        max_epochs=2, batch_size=batch_size, lr=1e-3, device="cuda", augment="crop+flip", mixup=0.3, ema_decay=0.9,
        precision="fp32",
    )  # fmt: skip
    assignment = Assignment(number=0, model_parameters={"width": 8}, config=config, folder=folder)
    with pretended_cuda() as seen:
        splits = TrialData(split_dataset(data, seed=0))
        run_with_data(assignment, objective, splits, lambda result: Decision.CONTINUE, ranks=Ranks(0, 2))
    return seen


def test_a_rank_waits_between_epochs_alone(tmp_path: Path) -> None:
    few = trained(tmp_path / "few", batch_size=40)
    many = trained(tmp_path / "many", batch_size=10)
    assert {wait for wait, count in many.waits.items() if count > few.waits[wait]} == set()
    assert many.waits.keys() <= BETWEEN_STEPS.keys() | MORE.keys()
