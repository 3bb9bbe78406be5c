"""No targets: a variational autoencoder of handwritten digits (scikit-learn's 1 797; no download).

Kingma and Welling 2014, arXiv:1312.6114. What is minimised is the negative of their bound, in nats for each image.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from hpo import Choice, Dataset, DataSpec, Float, Group, Int, Objective, Space, hold_out


def load(data_dir: Path) -> Dataset:
    images = torch.from_numpy(load_digits().images).float().flatten(1) / 16
    return hold_out(images, None, normalise=False)


@dataclass
class Answer:
    logits: Tensor  # (B, 64) of pixels
    mean: Tensor  # (B, size)
    log_variance: Tensor


class Autoencoder(nn.Module):
    def __init__(self, spec: DataSpec, *, width: int, size: int) -> None:
        super().__init__()
        (pixels,) = spec.input_shape
        self.encoder = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, 2 * size))
        self.decoder = nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, pixels))

    def forward(self, images: Tensor) -> Answer:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return Answer(self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance)


def negative_bound(outputs: Answer, images: Tensor) -> Tensor:
    """A loss without targets gets the inputs."""
    pixels = functional.binary_cross_entropy_with_logits(outputs.logits, images, reduction="none").sum(1)
    divergence = (outputs.mean**2 + outputs.log_variance.exp() - outputs.log_variance - 1).sum(1) / 2
    return (pixels + divergence).mean()


objective = Objective(
    name="autoencoder",
    description="a variational autoencoder of digits, with a loss of its own",
    load=load,
    model=Autoencoder,
    loss=negative_bound,
    metric="loss",
    settings={"max_epochs": 30, "patience": 8},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.03, log=True, default=3e-3), batch_size=Choice(32, 64, 128, default=64)),
        Group("architecture", width=Int(32, 256, log=True, default=128), size=Int(2, 16, default=8)),
    ),
)
