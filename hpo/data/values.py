"""Values of columns as they are written: texts, numbers, dates, what counts as missing, and how they are encoded.

This file imports nothing of hpo: exports of models for tables take a copy of it along.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

Numbers = NDArray[np.float64]

MISSING_WORDS = ("", "na", "n/a", "nan", "null", "none", "nat", "?")
"""Words that stand for a missing value, in any case."""

OTHER, MISSING = 0, 1
"""The categories of what training rows do not have, or once only, and of missing values."""

_logger = logging.getLogger(__name__)


def texts(values: pd.Series) -> pd.Series:
    """The values as texts without spaces around them; missing ones are NA."""
    told = values.astype("string").str.strip()
    return told.mask(told.str.lower().isin(MISSING_WORDS))


def numbers(told: pd.Series, *, warn: str = "") -> Numbers:
    """Texts as numbers, NaN for what is none. With a column's name in `warn`, a warning names what is no number."""
    import pandas as pd

    found: Numbers = pd.to_numeric(told, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    found[~np.isfinite(found)] = np.nan
    if warn:
        _warn_of(told[np.isnan(found)], warn, "a number")
    return found


def _warn_of(unread: pd.Series, column: str, wanted: str) -> None:
    strange = unread.dropna()
    if len(strange):
        _logger.warning(
            "column '%s' holds '%s', which is not %s; %d such values count as missing.",
            column, strange.iloc[0], wanted, len(strange),
        )  # fmt: skip


def days(told: pd.Series, *, strict: bool = True, warn: str = "") -> Numbers | None:
    """Texts that are dates (2026-01-31, with a time or without) in days since 1970; None if `strict` and one is not.

    With a column's name in `warn`, a warning names what is no date.
    """
    import pandas as pd

    dates = pd.to_datetime(told, format="ISO8601", errors="coerce", utc=True)
    if strict and (dates.isna().any() or not told.str.match(r"\d{4}-\d\d").all()):
        return None
    if warn:
        _warn_of(told[dates.isna()], warn, "a date such as 2026-01-31")
    found: Numbers = ((dates - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(days=1)).to_numpy(dtype=np.float64)
    return found


def category_texts(values: pd.Series) -> pd.Series:
    """The values as names of categories: 3, 3.0 and "3" are the same one, and so are 0.5 and "0.50", true and True."""
    told = texts(values)
    measured = numbers(told)
    is_number = np.isfinite(measured) & (np.abs(measured) < 2**53)
    written = [
        np.format_float_positional(each + 0.0, trim="-") if found else ""
        for each, found in zip(measured, is_number, strict=True)
    ]
    told = told.mask(is_number, np.array(written, dtype=object))
    lowered = told.str.lower()
    is_truth = lowered.isin(("true", "false")).fillna(False)
    return told.mask(is_truth, lowered)


def is_integral(measured: Any) -> bool:
    """Whether all are whole numbers."""
    return bool((measured == np.round(measured)).all())


def encode_table(columns: Sequence[Any], frame: pd.DataFrame) -> dict[str, NDArray[Any]]:
    """Numbers (N, F) float32 and categories (N, K) int64 of rows; each column has `name`, `kind` and so on.

    Raises ValueError if a column is missing, and if there are no rows.
    """
    missing = [each.name for each in columns if each.name not in frame.columns]
    if missing:
        names = ", ".join(each.name for each in columns)
        raise ValueError(f"the rows lack the column '{missing[0]}'; the model takes {names}.")
    if not len(frame):
        raise ValueError("there are no rows; give at least one.")
    parts: dict[str, NDArray[Any]] = {}
    if measured := [each for each in columns if each.kind != "category"]:
        values = [value for column in measured for value in _encoded_numbers(column, frame[column.name])]
        parts["numbers"] = np.stack(values, axis=1).astype(np.float32)
    if named := [each for each in columns if each.kind == "category"]:
        parts["categories"] = np.stack([_encoded_categories(each, frame[each.name]) for each in named], axis=1)
    return parts


def _encoded_numbers(column: Any, values: pd.Series) -> list[Numbers]:
    told = texts(values)
    measured = days(told, strict=False, warn=column.name) if column.kind == "date" else numbers(told, warn=column.name)
    assert measured is not None, "only strict reading finds none"
    centred = measured - column.center
    is_missing = ~np.isfinite(centred)
    filled = np.where(is_missing, 0.0, centred)
    return [filled, is_missing.astype(np.float64)] if column.has_missing else [filled]


def _encoded_categories(column: Any, values: pd.Series) -> Any:
    index = {category: number for number, category in enumerate(column.categories, start=2)}
    told = category_texts(values)
    encoded = told.map(index).fillna(OTHER).to_numpy(dtype=np.int64)
    return np.where(told.isna().to_numpy(), MISSING, encoded)
