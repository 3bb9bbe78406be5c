"""A task of your own: breast cancer, benign or malignant, from 30 measurements (scikit-learn's; no download)."""

from pathlib import Path

import torch
from sklearn.datasets import load_breast_cancer
from torch import nn

from hpo import Choice, Dataset, DataSpec, Float, Group, Int, Objective, Space, hold_out


def load(data_dir: Path) -> Dataset:
    """Read the data: a fifth of it becomes the test split, which stays sealed until the search is done."""
    data = load_breast_cancer()
    features = torch.from_numpy(data.data).float()
    return hold_out(features, torch.from_numpy(data.target), classes=["malignant", "benign"])


def model(spec: DataSpec, *, depth: int, width: int, dropout: float) -> nn.Module:
    """A network from normalised features (B, 30) to logits (B, 2); its keywords are what can be searched."""
    layers: list[nn.Module] = []
    size = spec.input_shape[0]
    for _ in range(depth):
        layers += [nn.Linear(size, width), nn.SiLU(), nn.Dropout(dropout)]
        size = width
    return nn.Sequential(*layers, nn.Linear(size, spec.num_outputs))


objective = Objective(
    name="my_task",
    description="breast cancer from 30 measurements, with a network of our own",
    load=load,
    model=model,
    metric="f1",
    settings={"max_epochs": 30, "patience": 8},
    space=Space(
        Group(
            "step size",
            lr=Float(1e-4, 0.1, log=True, default=3e-3),
            batch_size=Choice(16, 32, 64, default=32),
        ),
        Group(
            "architecture",
            depth=Int(1, 3, default=1),
            width=Int(8, 128, log=True, default=32),
        ),
        Group(
            "regularization",
            dropout=Float(0.0, 0.5, default=0.1),
            weight_decay=Float(1e-6, 1e-2, log=True, default=1e-4),
        ),
    ),
)
