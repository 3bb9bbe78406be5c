"""Progression of diabetes after a year, from ten measurements (Efron et al. 2004): a regression, no download."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpo.objective import Dataset, DataSpec, Objective

if TYPE_CHECKING:
    from torch import nn


def load(data_dir: Path) -> Dataset:
    """The 442 patients that come with scikit-learn, (N, 10) float32 in their own units; a fifth is the test split."""
    import torch
    from sklearn.datasets import load_diabetes

    from hpo.data.datasets import hold_out

    patients = load_diabetes(scaled=False)
    features, targets = (torch.from_numpy(patients[part]).float() for part in ("data", "target"))
    return hold_out(features, targets, classes=())


def model(
    spec: DataSpec,
    *,
    depth: int = 2,
    width: int = 64,
    activation: str = "relu",
    init: str = "auto",
    norm: str = "none",
    norm_first: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    from hpo.models.mlp import MLP

    return MLP(
        spec,
        depth=depth,
        width=width,
        activation=activation,
        init=init,
        norm=norm,
        norm_first=norm_first,
        dropout=dropout,
    )


objective = Objective(
    name="diabetes",
    description="progression of diabetes from ten measurements (442 patients, no download): regression with an MLP",
    load=load,
    model=model,
    loss="mse",
    metric="r2",
    settings={"max_epochs": 60, "patience": 15},
)
