"""CIFAR-10 (Krizhevsky 2009): colour photographs of 32x32 pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, convnet

if TYPE_CHECKING:
    from pathlib import Path

    from hpo import Dataset


def load(data_dir: Path) -> Dataset:
    from hpo import load_cifar10

    return load_cifar10(data_dir)


objective = Objective(
    name="cifar10",
    description="photographs of ten kinds, 32x32 pixels (60 000 images, 170 MB), with a small residual conv net",
    load=load,
    model=convnet,
    settings={"max_epochs": 20, "patience": 6},
)
