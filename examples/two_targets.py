"""Two targets at once from two inputs: progression of diabetes, and blood sugar above its median (no download).

The loss weighs both by what it has learned of their noise (Kendall et al. 2018, arXiv:1705.07115).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.nn import functional

from hpo import Choice, Dataset, DataSpec, Float, Group, Int, Objective, Space, hold_out

SEX, GLUCOSE = 1, 9


def load(data_dir: Path) -> Dataset:
    patients = load_diabetes(scaled=False)
    features = torch.from_numpy(patients.data).float()
    progression = torch.from_numpy(patients.target).float()
    numbers = [column for column in range(features.shape[1]) if column not in (SEX, GLUCOSE)]
    inputs = {"numbers": features[:, numbers], "sex": features[:, SEX].long() - 1}
    is_high = features[:, GLUCOSE] > features[:, GLUCOSE].median()
    targets = {"progression": (progression - progression.mean()) / progression.std(), "is high": is_high.float()}
    return hold_out(inputs, targets)


class Network(nn.Module):
    def __init__(self, spec: DataSpec, *, width: int, dropout: float) -> None:
        super().__init__()
        self.sex = nn.Embedding(2, 2)
        self.hidden = nn.Sequential(nn.Linear(8 + 2, width), nn.ReLU(), nn.Dropout(dropout))
        self.output = nn.Linear(width, 2)

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        features = torch.cat((inputs["numbers"], self.sex(inputs["sex"])), dim=1)
        progression, is_high = self.output(self.hidden(features)).unbind(1)
        return {"progression": progression, "is high": is_high}


class Weighted(nn.Module):
    """Both losses, each divided by a variance that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variances = nn.Parameter(torch.zeros(2))

    def forward(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> Tensor:
        squared = functional.mse_loss(outputs["progression"], targets["progression"])
        crossed = functional.binary_cross_entropy_with_logits(outputs["is high"], targets["is high"])
        return (torch.stack((squared / 2, crossed)) * (-self.log_variances).exp() + self.log_variances / 2).sum()


class Error:
    """The mean of both errors: of the progression in its deviations, and the share of wrong answers."""

    higher_is_better = False

    def __init__(self) -> None:
        self.errors: list[Tensor] = []

    def update(self, outputs: dict[str, Any], targets: dict[str, Any]) -> None:
        distance = (outputs["progression"] - targets["progression"]).abs()
        self.errors.append((distance + ((outputs["is high"] > 0) != targets["is high"].bool())) / 2)

    def compute(self) -> Tensor:
        return torch.cat(self.errors).mean()


objective = Objective(
    name="two_targets",
    description="progression of diabetes and high blood sugar at once, with a loss that weighs them",
    load=load,
    model=Network,
    loss=Weighted,
    metrics={"error": Error},
    metric="error",
    settings={"max_epochs": 40, "patience": 10},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.03, log=True, default=3e-3), batch_size=Choice(16, 32, 64, default=32)),
        Group("architecture", width=Int(8, 128, log=True, default=32)),
        Group("regularization", dropout=Float(0.0, 0.5, default=0.1)),
    ),
)
