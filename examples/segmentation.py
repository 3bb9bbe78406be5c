"""Segmentation: which pixels are the digit, on a background of other digits' pieces (scikit-learn's; no download)."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hpo import Choice, Dataset, DataSpec, Float, Group, Objective, Space, hold_out

NUM, SIDE = 600, 16


def load(data_dir: Path) -> Dataset:
    """A digit somewhere on a canvas that is strewn with 2x2 pieces of digits; the mask is where the digit has ink."""
    digits = torch.from_numpy(load_digits().images).float()
    draw = torch.Generator().manual_seed(0)
    pieces = digits.unfold(1, 2, 2).unfold(2, 2, 2).reshape(-1, 2, 2)
    chosen = pieces[torch.randint(len(pieces), (NUM, SIDE // 2, SIDE // 2), generator=draw)]
    images = chosen.permute(0, 1, 3, 2, 4).reshape(NUM, SIDE, SIDE).clone()
    masks = torch.zeros(NUM, SIDE, SIDE, dtype=torch.uint8)
    corners = torch.randint(SIDE - 7, (NUM, 2), generator=draw)
    for image, mask, digit, (y, x) in zip(images, masks, digits, corners.tolist(), strict=False):
        image[y : y + 8, x : x + 8] = digit
        mask[y : y + 8, x : x + 8] = digit > 4
    return hold_out((15 * images).to(torch.uint8).unsqueeze(1), masks, ["background", "digit"])


class Network(nn.Module):
    """Convolutions on the full size and on half of it, added up: a U-Net of one step."""

    def __init__(self, spec: DataSpec, *, width: int) -> None:
        super().__init__()
        channels = spec.input_shape[0]
        self.fine = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU())
        self.coarse = nn.Sequential(
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(2 * width, 2 * width, 5, padding=2), nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 2, stride=2),
        )  # fmt: skip
        self.output = nn.Conv2d(width, spec.num_outputs, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        fine = self.fine(images)
        return self.output((fine + self.coarse(fine)).relu())


objective = Objective(
    name="segmentation",
    description="the pixels of a digit on a strewn background",
    load=load,
    model=Network,
    metric="mean_iou",
    settings={"max_epochs": 20, "patience": 6, "augment": "crop"},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.03, log=True, default=5e-3), batch_size=Choice(16, 32, 64, default=16)),
        Group("architecture", width=Choice(8, 16, 32, default=16)),
        Group("loss", loss=Choice("cross_entropy", "dice", "focal", default="cross_entropy")),
    ),
)
