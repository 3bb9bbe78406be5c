"""Several labels for each example: what handwritten digits look like (scikit-learn's 1 797; no download)."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from hpo import Choice, Dataset, Float, Group, Objective, Space, hold_out, mlp

LABELS = {"even": {0, 2, 4, 6, 8}, "closed loop": {0, 6, 8, 9}, "straight lines alone": {1, 4, 7}}


def load(data_dir: Path) -> Dataset:
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    has_label = torch.tensor([[int(digit) in members for members in LABELS.values()] for digit in digits.target])
    return hold_out(images, has_label, classes=list(LABELS))


objective = Objective(
    name="several_labels",
    description="digits with any number of three labels, with an MLP",
    load=load,
    model=mlp,
    loss="binary_cross_entropy",
    metric="f1",
    settings={"max_epochs": 15, "patience": 5},
    space=Space(
        Group(
            "step size",
            lr=Float(1e-4, 0.1, log=True, default=3e-3),
            batch_size=Choice(32, 64, 128, default=64),
        ),
        Group("architecture", width=Choice(64, 128, 256, default=128), depth=Choice(1, 2, 3, default=2)),
        Group("loss", loss=Choice("binary_cross_entropy", "focal", default="binary_cross_entropy")),
    ),
)
