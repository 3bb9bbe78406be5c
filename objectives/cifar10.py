"""CIFAR-10 (Krizhevsky 2009): colour photographs of 32x32 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpo.objective import Dataset, DataSpec, Objective

if TYPE_CHECKING:
    from torch import nn


def load(data_dir: Path) -> Dataset:
    from hpo.data.vision import load_cifar10

    return load_cifar10(data_dir)


def model(
    spec: DataSpec,
    *,
    width: int = 64,
    blocks: int = 1,
    activation: str = "relu",
    init: str = "auto",
    norm: str = "batch",
    norm_first: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    from hpo.models.convnet import ConvNet

    return ConvNet(
        spec,
        width=width,
        blocks=blocks,
        activation=activation,
        init=init,
        norm=norm,
        norm_first=norm_first,
        dropout=dropout,
    )


objective = Objective(
    name="cifar10",
    description="photographs of ten kinds, 32x32 pixels (60 000 images, 170 MB), with a small residual conv net",
    load=load,
    model=model,
    settings={"max_epochs": 20, "patience": 6},
)
