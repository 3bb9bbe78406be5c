"""A torch Dataset that you have, with transforms in Python: digits as PIL images, rotated and shifted at random."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset as TorchDataset

from hpo import Choice, Dataset, Float, Group, Objective, Space, convnet, from_torch


class Digits(TorchDataset[Any]):
    """The digits of scikit-learn, read and transformed one by one."""

    def __init__(self, transform: Callable[[Any], torch.Tensor]) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.images, self.targets, self.transform = digits.images, digits.target, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        from PIL import Image

        image = Image.fromarray((self.images[index] * 15).astype("uint8")).resize((16, 16))
        return self.transform(image), int(self.targets[index])


def load(data_dir: Path, *, workers: int = 2) -> Dataset:
    from torchvision.transforms import v2

    to_tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    random = v2.Compose([v2.RandomAffine(10, translate=(0.1, 0.1)), *to_tensor])
    plain = Digits(v2.Compose(to_tensor))
    return from_torch(
        Digits(random),
        evaluation=plain,
        targets=plain.targets,  # or each example would be read once for its target
        classes=[str(digit) for digit in range(10)],
        num_workers=workers,
    )


objective = Objective(
    name="own_dataset",
    description="digits from a torch Dataset with random transforms in Python",
    load=load,
    model=convnet,
    settings={"max_epochs": 8, "patience": 4},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.1, log=True, default=1e-2), batch_size=Choice(32, 64, default=32)),
        Group("architecture", width=Choice(16, 32, default=16), norm=Choice("none", "batch", default="batch")),
    ),
)
