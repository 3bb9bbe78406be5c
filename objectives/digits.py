"""Handwritten digits of 8x8 pixels: the quick start, which needs no download."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, mlp

if TYPE_CHECKING:
    from pathlib import Path

    from hpo import Dataset


def load(data_dir: Path) -> Dataset:
    """The 1 797 images that come with scikit-learn, (N, 1, 8, 8) uint8 from 0 to 16; a fifth is the test split."""
    import torch
    from sklearn.datasets import load_digits

    from hpo import hold_out

    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    return hold_out(images, torch.from_numpy(digits.target), classes=[str(name) for name in digits.target_names])


objective = Objective(
    name="digits",
    description="handwritten digits, 8x8 pixels (1 797 images, no download), with an MLP",
    load=load,
    model=mlp,
    settings={"max_epochs": 20, "patience": 6},
)
