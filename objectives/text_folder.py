"""Texts of your own, in a folder for each class or in a column of a table: a recurrent, attention or conv network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, convnet1d, recurrent, transformer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from hpo import Dataset, DataSpec


def load(
    data_dir: Path,
    *,
    text: str = "text",
    label: str = "label",
    columns: str = "",
    kind: str = "auto",
    vocabulary: int = 8000,
    max_length: int = 256,
    rare: str = "refuse",
) -> Dataset:
    from hpo import load_texts

    return load_texts(
        data_dir,
        text=text,
        label=label,
        columns=columns,
        kind=kind,
        vocabulary=vocabulary,
        max_length=max_length,
        rare=rare,
    )


def model(
    spec: DataSpec, *, network: str = "recurrent", width: int = 64, depth: int = 1, dropout: float = 0.0
) -> nn.Module:
    if network == "convnet1d":
        return convnet1d(spec, width=width, blocks=depth, dropout=dropout)
    build = {"recurrent": recurrent, "transformer": transformer}[network]
    return build(spec, width=width, depth=depth, dropout=dropout)


objective = Objective(
    name="text_folder",
    description="your own texts, a folder of .txt files for each class or a table with a column of texts (--data-dir)",
    load=load,
    model=model,
    loss="auto",
    metric="auto",
    settings={"max_epochs": 12, "patience": 4},
)
