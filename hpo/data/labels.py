"""What is predicted, read from columns: a class or a number."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.data.values import category_texts, is_integral, numbers, texts
from hpo.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd

KINDS = ("auto", "class", "number")
RARE = ("refuse", "train", "drop")
"""What becomes of classes with fewer than MIN_ROWS rows."""

MIN_ROWS = 3
"""Of a class, so that each split can have one."""

MAX_CLASSES = 1000
_NUM_NAMED = 5  # rare classes that a message names
_logger = logging.getLogger(__name__)

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
    kept: NDArray[np.bool_]
    """Which rows of the column the targets are of."""


def read_labels(values: pd.Series, what: str, kind: str, option: str, rare: str) -> Labels:
    """The labels in a column without missing values; `kind` is one of KINDS, and `rare` one of RARE.

    Texts are classes, and so are up to FEW_NUMBERS different whole numbers. Raises DataError for a single class, for
    more than MAX_CLASSES, for rare classes and for values that are not numbers, UnknownNameError for another kind.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of label", kind, KINDS, "(--data-option kind=...)")
    if rare not in RARE:
        raise UnknownNameError("way with rare classes", rare, RARE, "(--data-option rare=...)")
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
        targets = torch.from_numpy(measured.astype(np.float32))
        if len(np.unique(targets.numpy())) < different / 2:
            raise DataError(
                f"{what} holds numbers such as {measured.min():.17g} and {measured.max():.17g}; with seven digits, as "
                "networks compute, most of them are equal: subtract a number from all of them first."
            )
        return Labels(targets, (), f"a number{why}", np.ones(len(targets), dtype=bool))
    names = category_texts(values)
    classes = sorted(names.unique(), key=lambda name: (len(name), name) if is_measured else (0, name))
    if len(classes) > MAX_CLASSES:
        advice = f"kind=number, or another column as {option}=..." if is_measured else f"another column as {option}=..."
        raise DataError(f"{what} has {len(classes)} classes, more than {MAX_CLASSES}; use --data-option {advice}.")
    kept = _without_rare(names, what, rare)
    names = names[kept]
    there = set(names)
    classes = [name for name in classes if name in there]
    why = "; --data-option kind=number overrides this" if is_measured and kind == "auto" else ""
    index = {name: number for number, name in enumerate(classes)}
    targets = torch.tensor(names.map(index).to_numpy(dtype=np.int64))
    return Labels(targets, tuple(classes), f"{len(classes)} classes{why}", kept)


def _without_rare(names: pd.Series, what: str, rare: str) -> NDArray[np.bool_]:
    """Which rows are used (N,). Raises DataError for classes with fewer than MIN_ROWS rows, if nothing is said of them.

    Divided in proportion, a class with one or two examples has all of them in the training split.
    """
    counts = names.value_counts()
    few = counts[counts < MIN_ROWS].sort_index()
    kept = np.ones(len(names), dtype=bool)
    if not len(few):
        return kept
    listed = ", ".join(f"'{name}' ({count})" for name, count in few.head(_NUM_NAMED).items())
    listed += f" and {len(few) - _NUM_NAMED} more" if len(few) > _NUM_NAMED else ""
    if rare == "refuse":
        raise DataError(
            f"{what} has classes with one or two rows, too few for three splits: {listed}. Join them with others, or "
            "say --data-option rare=drop to leave them out, or rare=train to only train on them."
        )
    _logger.warning(
        "%s has classes with one or two rows, which are %s: %s.",
        what, "left out" if rare == "drop" else "in the training split alone", listed,
    )  # fmt: skip
    if rare == "train":
        return kept
    if len(counts) - len(few) < 2:
        raise DataError(f"{what} has fewer than two classes without those of one or two rows ({listed}).")
    kept[names.isin(few.index).to_numpy(dtype=bool)] = False
    return kept
