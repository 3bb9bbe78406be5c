"""A folder of your own photos, with a folder for each class: transfer learning from ImageNet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, pretrained

if TYPE_CHECKING:
    from pathlib import Path

    from hpo import Dataset


def load(data_dir: Path, *, label: str = "", kind: str = "auto", rare: str = "refuse") -> Dataset:
    from hpo import load_image_folder

    return load_image_folder(data_dir, label=label, kind=kind, rare=rare)


objective = Objective(
    name="image_folder",
    description="your own photos, a folder for each class below --data-dir, with a pretrained model",
    load=load,
    model=pretrained,
    loss="auto",
    metric="auto",
    settings={"max_epochs": 12, "patience": 4},
)
