"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): clothes of 28x28 pixels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hpo.objective import Dataset, DataSpec, Objective

if TYPE_CHECKING:
    from torch import nn


def load(data_dir: Path) -> Dataset:
    from hpo.data.vision import load_fashion_mnist

    return load_fashion_mnist(data_dir)


def model(
    spec: DataSpec,
    *,
    depth: int = 2,
    width: int = 256,
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
    name="fashion_mnist",
    description="clothes, 28x28 pixels (70 000 images, 30 MB), with an MLP",
    load=load,
    model=model,
    settings={"max_epochs": 15, "patience": 5},
)
