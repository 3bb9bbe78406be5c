"""Progression of diabetes after a year, from ten measurements (Efron et al. 2004): a regression, no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, mlp

if TYPE_CHECKING:
    from pathlib import Path

    from hpo import Dataset


def load(data_dir: Path) -> Dataset:
    """The 442 patients that come with scikit-learn, (N, 10) float32 in their own units; a fifth is the test split."""
    import torch
    from sklearn.datasets import load_diabetes

    from hpo import hold_out

    patients = load_diabetes(scaled=False)
    features, targets = (torch.from_numpy(patients[part]).float() for part in ("data", "target"))
    return hold_out(features, targets, classes=())


objective = Objective(
    name="diabetes",
    description="progression of diabetes from ten measurements (442 patients, no download): regression with an MLP",
    load=load,
    model=mlp,
    loss="mse",
    metric="r2",
    settings={"max_epochs": 60, "patience": 15},
)
