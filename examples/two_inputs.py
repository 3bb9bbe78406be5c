"""A model with two inputs: an image and the number it is to be compared with (scikit-learn's digits; no download).

The question is whether the digit is larger than the number. Neither input alone says so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hpo import Choice, Dataset, DataSpec, Float, Group, Int, Objective, Space, hold_out


def load(data_dir: Path) -> Dataset:
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target)
    numbers = torch.randint(10, labels.shape, generator=torch.Generator().manual_seed(0))
    return hold_out({"image": images, "number": numbers}, (labels > numbers).long(), ["no", "yes"])


class Network(nn.Module):
    def __init__(self, spec: DataSpec, *, width: int, embedding: int, dropout: float) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout))
        self.number = nn.Embedding(spec.input_specs["number"].vocabulary or 0, embedding)
        self.output = nn.Sequential(nn.Linear(width + embedding, width), nn.ReLU(), nn.Linear(width, spec.num_outputs))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.output(torch.cat((self.image(inputs["image"]), self.number(inputs["number"])), dim=1))


objective = Objective(
    name="two_inputs",
    description="whether a handwritten digit is larger than a number",
    load=load,
    model=Network,
    settings={"max_epochs": 25, "patience": 8},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.03, log=True, default=3e-3), batch_size=Choice(16, 32, 64, default=32)),
        Group("architecture", width=Choice(32, 64, 128, default=64), embedding=Int(2, 32, default=8)),
        Group("regularization", dropout=Float(0.0, 0.5, default=0.1)),
    ),
)
