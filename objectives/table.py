"""A table of your own, CSV or Parquet, with a column to predict: a class or a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpo import Objective, tabular

if TYPE_CHECKING:
    from pathlib import Path

    from hpo import Dataset


def load(
    data_dir: Path,
    *,
    label: str,
    kind: str = "auto",
    ignore: str = "",
    categories: str = "",
    rare: str = "refuse",
    group: str = "",
    order: str = "",
) -> Dataset:
    from hpo import load_table

    return load_table(
        data_dir, label=label, kind=kind, ignore=ignore, categories=categories, rare=rare, group=group, order=order
    )


objective = Objective(
    name="table",
    description="your own CSV or Parquet file, --data-dir FILE: a class or a number from the other columns",
    load=load,
    model=tabular,
    loss="auto",
    metric="auto",
    settings={"max_epochs": 60, "patience": 15},
)
