"""What is predicted, read from columns: a class or a number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpo.data.values import category_texts, is_integral, numbers, texts
from hpo.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("auto", "class", "number")
MAX_CLASSES = 1000
FEW_NUMBERS = 10
"""Different whole numbers up to which they are taken for classes."""


@dataclass(frozen=True)
class Labels:
    """The targets of all examples."""

    targets: Tensor
    """(N,) int64 class indices, or (N,) float32 numbers."""
    classes: tuple[str, ...]
    """Names by index; empty for numbers."""
    described: str
    """What was found, and how to override it."""


def read_labels(values: pd.Series, what: str, kind: str, option: str) -> Labels:
    """The labels in a column without missing values; `kind` is one of KINDS.

    Texts are classes, and so are up to FEW_NUMBERS different whole numbers. Raises DataError for a single class, for
    more than MAX_CLASSES and for what is no number, UnknownNameError for another kind.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of label", kind, KINDS, "(--data-option kind=...)")
    told = texts(values)
    measured = numbers(told)
    is_measured = not np.isnan(measured).any()
    different = len(np.unique(measured)) if is_measured else told.nunique()
    looks_like_number = is_measured and not (is_integral(measured) and different <= FEW_NUMBERS)
    if different == 1:
        raise DataError(f"{what} has only the value '{told.iloc[0]}', so there is nothing to learn; name another.")
    if kind == "number" and not is_measured:
        strange = told[np.isnan(measured)].iloc[0]
        raise DataError(f"{what} holds '{strange}', which is not a number; leave such rows out, or use kind=class.")
    if kind == "number" or (kind == "auto" and looks_like_number):
        why = "" if kind == "number" else "; --data-option kind=class overrides this"
        return Labels(torch.from_numpy(measured.astype(np.float32)), (), f"a number{why}")
    names = category_texts(values)
    classes = sorted(names.unique(), key=lambda name: (len(name), name) if is_measured else (0, name))
    if len(classes) > MAX_CLASSES:
        advice = f"kind=number, or another column as {option}=..." if is_measured else f"another column as {option}=..."
        raise DataError(f"{what} has {len(classes)} classes, more than {MAX_CLASSES}; use --data-option {advice}.")
    rare, count = names.value_counts().index[-1], int(names.value_counts().iloc[-1])
    if count < 3:
        raise DataError(
            f"{what} has the class '{rare}' in {'one row' if count == 1 else 'two rows'} only, and each of the three "
            "splits needs one; leave it out or join it with another."
        )
    why = "; --data-option kind=number overrides this" if is_measured and kind == "auto" else ""
    index = {name: number for number, name in enumerate(classes)}
    return Labels(
        torch.tensor(names.map(index).to_numpy(dtype=np.int64)), tuple(classes), f"{len(classes)} classes{why}"
    )
