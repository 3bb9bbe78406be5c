"""Fashion-MNIST (Xiao et al. 2017, arXiv:1708.07747): clothes of 28x28 pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, mlp

if TYPE_CHECKING:
    from pathlib import Path

    from hpo import Dataset


def load(data_dir: Path) -> Dataset:
    from hpo import load_fashion_mnist

    return load_fashion_mnist(data_dir)


objective = Objective(
    name="fashion_mnist",
    description="clothes, 28x28 pixels (70 000 images, 30 MB), with an MLP",
    load=load,
    model=mlp,
    settings={"max_epochs": 15, "patience": 5},
)
