"""Three numbers with a loss of its own: an ellipse's centre and width from a noisy picture of it (no download).

The loss forgives errors that are smaller than a pixel's noise explains, and its tolerance is searched with the rest.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hpo import Choice, Dataset, Float, Group, Objective, Space, hold_out, mlp

SIDE, NUM = 12, 2_000


def load(data_dir: Path) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    x, y = 2 + 8 * torch.rand(2, NUM, generator=draw)
    width = 0.8 + 1.7 * torch.rand(NUM, generator=draw)
    place = torch.arange(SIDE).float()
    along = ((place - x[:, None]) / width[:, None]).square()[:, None, :]
    across = (place - y[:, None]).square()[:, :, None]
    pictures = (-(along + across) / 2).exp() + 0.1 * torch.randn(NUM, SIDE, SIDE, generator=draw)
    return hold_out(pictures.unsqueeze(1), torch.stack((x, y, width), dim=1))


def tolerant(outputs: Tensor, numbers: Tensor, *, tolerance: float = 0.05) -> Tensor:
    """Squared errors beyond the tolerance; numbers (B, 3) are in pixels."""
    return ((outputs - numbers).abs() - tolerance).relu().square().mean()


objective = Objective(
    name="three_numbers",
    description="centre and width of an ellipse, with a loss that forgives small errors",
    load=load,
    model=mlp,
    loss=tolerant,
    metric="mae",
    settings={"max_epochs": 25, "patience": 8, "optimizer": "adamw"},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.03, log=True, default=3e-3), batch_size=Choice(32, 64, 128, default=32)),
        Group("architecture", width=Choice(64, 128, 256, default=128), depth=Choice(1, 2, 3, default=2)),
        Group("loss", tolerance=Float(0.0, 0.3, default=0.05)),
    ),
)
