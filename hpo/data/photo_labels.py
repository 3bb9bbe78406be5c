"""Labels of photos from a CSV beside them: one class, several labels, or numbers.

photos/labels.csv             file,tree,house,car        the photo's path in photos/, and a column for each label
photos/**/*.jpg|png|...       a fifth is held out as the test split
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpo.data.labels import MIN_ROWS, read_labels
from hpo.data.rows import read_rows, require_columns, split_names
from hpo.data.values import numbers, texts
from hpo.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

LABELS = "labels.csv"


@dataclass(frozen=True)
class LabelledPhotos:
    """The photos that a table names, with what is to be learned of each."""

    paths: list[Path]
    targets: Tensor
    """(N,) int64 class indices, (N, labels) 0 or 1, or (N,) or (N, values) floats."""
    classes: tuple[str, ...]


def read_photo_labels(data_dir: Path, label: str, kind: str, rare: str) -> LabelledPhotos:
    """The photos in the first column of `labels.csv`, and the columns that `label` names; empty for all others.

    Several columns of 0 and 1 are labels that a photo can have at once, and several other ones numbers; a single column
    is a class or a number, as `kind` says or else as it looks; `rare` is what `read_labels` takes. Raises DataError or
    UnknownNameError.
    """
    file = data_dir / LABELS
    frame = read_rows(file)
    first, *others = frame.columns
    chosen = split_names(label) or others
    if not chosen:
        raise DataError(f"{file} must have a column of file names and one or more of labels, but has {first} alone.")
    require_columns(frame, chosen, "label", file)
    paths = [data_dir / str(name) for name in frame[first]]
    if missing := [path for path in paths if not _is_file(path)]:
        raise DataError(
            f"{file} names {missing[0].name[:100]!r}, which is not in {data_dir}; {len(missing)} photos are missing."
        )
    if repeated := [path for path, count in Counter(map(Path.resolve, paths)).items() if count > 1]:
        raise DataError(
            f"{file} names {repeated[0].name[:100]!r} more than once, as it does {len(repeated)} of its photos; leave "
            "one row for each, or the test split would hold what was trained on."
        )
    if len(chosen) == 1:
        _require_values(frame, chosen, file)
        labels = read_labels(frame[chosen[0]], f"column '{chosen[0]}' of {file}", kind, "label", rare)
        paths = [path for path, is_kept in zip(paths, labels.kept, strict=True) if is_kept]
        return LabelledPhotos(paths, labels.targets, labels.classes)
    if kind != "auto":
        raise DataError(
            f"--data-option kind={kind} is for one column, but {file} has {len(chosen)}: name it with label=."
        )
    values = _numbers_in(frame, chosen, file)
    is_binary = bool(np.isin(values, (0, 1)).all())
    targets = torch.tensor(values, dtype=torch.int64 if is_binary else torch.float32)
    if is_binary and (few := [(name, int(n)) for name, n in zip(chosen, values.sum(0), strict=True) if n < MIN_ROWS]):
        listed = ", ".join(f"'{name}' ({count})" for name, count in few)
        raise DataError(
            f"{file}: fewer than three photos have the label{'s' * (len(few) > 1)} {listed}; leave it out of label=."
        )
    return LabelledPhotos(paths, targets, tuple(chosen) if is_binary else ())


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or no name at all
        return False


def _numbers_in(frame: pd.DataFrame, names: list[str], file: Path) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """All columns as numbers (N, names)."""
    _require_values(frame, names, file)
    columns = {name: numbers(texts(frame[name])) for name in names}
    for name, values in columns.items():
        if np.isnan(values).any():
            strange = frame[name].iloc[int(np.isnan(values).argmax())]
            raise DataError(
                f"column '{name}' of {file} holds '{strange}': several columns must be numbers, or 0 and 1; name one "
                "column of classes with --data-option label=..."
            )
    return np.stack(list(columns.values()), axis=1)


def _require_values(frame: pd.DataFrame, names: list[str], file: Path) -> None:
    for name in names:
        is_missing = texts(frame[name]).isna().to_numpy(dtype=bool)
        if is_missing.any():
            raise DataError(f"{file}: row {int(is_missing.argmax()) + 1} has no value in '{name}'; leave it out.")
