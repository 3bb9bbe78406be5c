"""Boxes: where a digit is on a noisy canvas (scikit-learn's digits; no download)."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from hpo import Choice, Dataset, Float, Group, Objective, Space, hold_out, mlp

NUM, SIDE = 1_200, 20


def load(data_dir: Path) -> Dataset:
    digits = torch.from_numpy(load_digits().images).float()
    draw = torch.Generator().manual_seed(0)
    images = 5 * torch.rand(NUM, SIDE, SIDE, generator=draw)
    boxes = torch.zeros(NUM, 4)
    corners = torch.randint(SIDE - 7, (NUM, 2), generator=draw)
    for image, box, digit, (y, x) in zip(images, boxes, digits, corners.tolist(), strict=False):
        rows, columns = (digit > 4).any(1).nonzero()[:, 0], (digit > 4).any(0).nonzero()[:, 0]
        image[y : y + 8, x : x + 8] += digit
        box.copy_(torch.tensor([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]))
    return hold_out((12 * images).to(torch.uint8).unsqueeze(1), boxes, kind="box")


objective = Objective(
    name="boxes",
    description="the box around a digit on a noisy canvas",
    load=load,
    model=mlp,
    loss="giou",
    metric="mean_iou",
    settings={"max_epochs": 25, "patience": 8, "augment": "crop"},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.03, log=True, default=2e-3), batch_size=Choice(16, 32, 64, default=32)),
        Group("architecture", width=Choice(128, 256, 512, default=256), depth=Choice(1, 2, 3, default=2)),
        Group("loss", loss=Choice("giou", "iou", "huber", default="giou")),
    ),
)
