"""Clothes (Fashion-MNIST) pasted on photographs (CIFAR-10): what does each pixel show?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, unet

if TYPE_CHECKING:
    from pathlib import Path

    from hpo import Dataset


def load(data_dir: Path, *, num_images: int = 10_000) -> Dataset:
    from hpo import load_pasted_clothes

    return load_pasted_clothes(data_dir, num_images=num_images)


objective = Objective(
    name="pasted_clothes",
    description="clothes (Fashion-MNIST) pasted on photographs (CIFAR-10): a class for each pixel, with a U-Net",
    load=load,
    model=unet,
    loss="cross_entropy",
    metric="mean_iou",
    settings={"max_epochs": 15, "patience": 5},
)
