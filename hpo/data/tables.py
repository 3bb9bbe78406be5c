"""Tables with a column to predict, from CSV or Parquet files: what each column holds, and how it becomes tensors.

numbers      their distance from the median; where one is missing the median, and 1 in a column of its own
dates        the same, in days
categories   0 what training rows do not have or once only, 1 missing, 2 ... the categories in order
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch

from hpo.data.datasets import hold_out
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.labels import read_labels
from hpo.data.preprocessing import IGNORED, Preprocessing, RawExamples
from hpo.data.rows import find_tables, kept_rows, read_rows, require_columns, split_names, without_empty
from hpo.data.values import category_texts, days, encode_table, is_integral, numbers, texts
from hpo.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd

    from hpo.data.parts import Examples
    from hpo.data.values import Numbers

MAX_CATEGORIES = 1000
"""Different texts in a column up to which each is a category."""

ID_SHARE = 0.5
"""Share of different texts above which a column is taken for an ID or a free text."""

_FEW = 20  # different values that are no sign of an ID
_IDS = ("id", "index", "key", "uuid")
_WRITTEN_NUMBER = r"-?[€$£]?\s?-?(\d{1,3}([.,' ]\d{3})+|\d+)([.,]\d+)?\s?([€$£%]|EUR|USD)?"  # as people write them


@dataclass(frozen=True)
class Column:
    """A column that the model gets, as the training rows show it."""

    name: str
    kind: str
    """number, date or category."""
    center: float = 0.0
    """The median, which is subtracted; of dates in days since 1970."""
    has_missing: bool = False
    """Whether training rows lack a value."""
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class TablePreprocessing(Preprocessing):
    """Makes numbers (N, F) float32 and categories (N, K) int64 of the rows of a table; see this module."""

    kind: ClassVar[str] = "table"

    columns: tuple[Column, ...]
    not_used: tuple[tuple[str, str], ...] = ()
    """Columns that are left out, and why."""
    label: str = ""
    """What is predicted, in words."""

    @classmethod
    def fit(
        cls, frame: pd.DataFrame, *, label: str, ignore: Sequence[str], categories: Sequence[str], described: str
    ) -> Self:
        """What the columns of the training rows hold. Raises DataError if none of them is of use."""
        columns, not_used = [], {}
        for name in frame.columns:
            if name == label:
                continue
            found = IGNORED if name in ignore else _find_column(name, frame[name], name in categories)
            if isinstance(found, Column):
                columns.append(found)
            else:
                not_used[name] = found
        if not columns:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in not_used.items())
            raise DataError(f"the table has no column to learn from ({reasons or 'it has no other'}).")
        return cls(tuple(columns), tuple(not_used.items()), described)

    def encode(self, raw: Any) -> Examples:
        frame = _as_frame(raw)
        try:
            parts = encode_table(self.columns, frame)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return {name: torch.from_numpy(part) for name, part in parts.items()}

    def is_raw(self, inputs: Any) -> bool:
        """A data frame, or rows as mappings from column to value, such as those of `csv.DictReader`."""
        if isinstance(inputs, list):
            return bool(inputs) and isinstance(inputs[0], Mapping)
        return hasattr(inputs, "columns") and hasattr(inputs, "iloc")

    def read(self, paths: Sequence[Path]) -> Any:
        import pandas as pd

        return pd.concat([read_rows(path) for path in paths], ignore_index=True)

    @property
    def raw_columns(self) -> list[str]:
        return [column.name for column in self.columns]

    @property
    def vocabulary(self) -> dict[str, tuple[int, ...]]:
        sizes = tuple(len(each.categories) + 2 for each in self.columns if each.kind == "category")
        return {"categories": sizes} if sizes else {}

    @property
    def left_out(self) -> Mapping[str, str]:
        return dict(self.not_used)

    def describe(self) -> str:
        """`price: a number; 3 numbers; 1 category (city 12); 1 date (sold); missing: age`."""
        kinds = {kind: [c for c in self.columns if c.kind == kind] for kind in ("number", "category", "date")}
        names = {"number": "numbers", "category": "categories", "date": "dates"}
        told = [self.label]
        for kind, columns in kinds.items():
            if columns:
                shown = ", ".join(f"{c.name} {len(c.categories)}" if c.categories else c.name for c in columns[:12])
                more = f" and {len(columns) - 12} more" if len(columns) > 12 else ""
                told.append(f"{len(columns)} {kind if len(columns) == 1 else names[kind]} ({shown}{more})")
        if missing := [c.name for c in self.columns if c.has_missing]:
            told.append(f"missing values in {', '.join(missing)} (the median and a column that says so, or a category)")
        return "; ".join(told)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kind": self.kind}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        columns = tuple(Column(**each | {"categories": tuple(each["categories"])}) for each in plain["columns"])
        return cls(columns, tuple((name, why) for name, why in plain["not_used"]), plain["label"])


def load_table(
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
    """The rows of a CSV or Parquet file, or of `train` and `test` in a folder; without a test file a fifth is held out.

    `label` names the column to predict: a class, or a number; `kind` ("class", "number") overrides what its values look
    like. `ignore` and `categories` name columns, separated by commas, that are left out and that are categories
    although they look like numbers. Rows with the same value in the column `group`, such as those of a patient, are
    not divided, and the network does not get that column. By the column `order`, of numbers or dates, rows are sorted,
    and the last ones are validated on and tested. `rare` says what becomes of classes with one or two rows: "refuse",
    "train" (only train on them) or "drop". Raises DataError or UnknownNameError for what cannot be learned.
    """
    file, test_file = find_tables(data_dir, "table")
    ignored, named = split_names(ignore), split_names(categories)
    frame = _labelled(read_rows(file), file, label)
    for names, option in ((ignored, "ignore"), (named, "categories"), ([group], "group"), ([order], "order")):
        require_columns(frame, [name for name in names if name], option, file)
    if order:
        frame = _sorted_by(order, frame, file)
    test = _labelled(read_rows(test_file), test_file, label) if test_file else None
    together = frame if test is None else _joined(frame, test, file)
    labels = read_labels(together[label], f"column '{label}'", kind, "label", rare)
    together, num_train = kept_rows(together, labels.kept, len(frame))
    fit = partial(
        TablePreprocessing.fit,
        label=label,
        ignore=[*ignored, group],
        categories=named,
        described=f"{label}: {labels.described}",
    )
    raw, rows = RawExamples(together, fit), torch.arange(len(together))
    divided: dict[str, Any] = {"raw": raw, "is_ordered": bool(order)}
    if group:
        divided["groups"] = _groups(together[group])[:num_train]
    if test is None:
        return hold_out(rows, labels.targets, labels.classes, **divided)
    train, tested = (Split(rows[part], labels.targets[part]) for part in (slice(num_train), slice(num_train, None)))
    return Dataset(train, SealedSplit(lambda: tested, len(tested)), labels.classes, **divided)


def _groups(values: pd.Series) -> list[str]:
    """The name of each row's group; a row without one is a group of its own."""
    import pandas as pd

    names = category_texts(values)
    alone = pd.Series([f"row {row}" for row in range(len(names))], index=names.index)
    found: list[str] = names.where(names.notna(), alone).tolist()
    return found


def _sorted_by(name: str, frame: pd.DataFrame, file: Path) -> pd.DataFrame:
    """The rows in the order of a column of numbers or dates. Raises DataError for one of something else."""
    known = texts(frame[name])
    if known.isna().any():
        raise DataError(f"{file}: {int(known.isna().sum())} rows have no value in '{name}', by which they are ordered.")
    values = numbers(known)
    if np.isnan(values).any():
        of_dates = days(known)
        if of_dates is None:
            other = known[np.isnan(values)].iloc[0]
            raise DataError(
                f"{file}: column '{name}' has values that are neither numbers nor dates, such as '{other}'; write "
                "dates as 2026-01-31."
            )
        values = of_dates
    return frame.iloc[np.argsort(values, kind="stable")].reset_index(drop=True)


def _labelled(frame: pd.DataFrame, file: Path, label: str) -> pd.DataFrame:
    """The rows that have a label."""
    require_columns(frame, [label], "label", file)
    return without_empty(frame, texts(frame[label]).isna().tolist(), f"value in '{label}'", file)


def _joined(train: pd.DataFrame, test: pd.DataFrame, file: Path) -> pd.DataFrame:
    import pandas as pd

    if missing := [name for name in train.columns if name not in test.columns]:
        raise DataError(f"the test table beside {file} lacks the column '{missing[0]}'.")
    return pd.concat([train, test[list(train.columns)]], ignore_index=True)


def _as_frame(raw: Any) -> pd.DataFrame:
    import pandas as pd

    return raw if isinstance(raw, pd.DataFrame) else pd.DataFrame(list(raw))


def _find_column(name: str, values: pd.Series, is_category: bool) -> Column | str:
    """The column, or why it is left out. Raises DataError for more categories than MAX_CATEGORIES."""
    told = texts(values)
    known = told.dropna()
    has_missing = len(known) < len(told)
    if not len(known):
        return "it has no values"
    if known.nunique() == 1 and not has_missing:
        return "it is constant"
    measured = numbers(known)
    if not is_category and not np.isnan(measured).any():
        return _id_of_numbers(name, measured) or Column(name, "number", float(np.median(measured)), has_missing)
    if not is_category and (dates := days(known)) is not None:
        return Column(name, "date", float(np.median(dates)), has_missing)
    counts = category_texts(values).dropna().value_counts()
    if not is_category and len(counts) > _FEW and len(counts) > ID_SHARE * len(known):
        if known.str.match(r"\d{1,2}[./-]\d{1,2}[./-]\d{2,4}\b").all():
            return f"it looks like dates such as {known.iloc[0]}; write them as 2026-01-31 and they are used"
        if known.str.fullmatch(_WRITTEN_NUMBER).mean() > 0.9:
            return f"its texts look like numbers such as {known.iloc[0]}; write them as 1234.56 and they are used"
        return f"{len(counts)} different texts in {len(known)} rows look like an ID or a free text"
    if len(counts) > MAX_CATEGORIES:
        raise DataError(
            f"column '{name}' has {len(counts)} categories, more than {MAX_CATEGORIES}; group them, or leave it out "
            f"with --data-option ignore={name}."
        )
    return Column(name, "category", 0.0, has_missing, tuple(sorted(counts[counts > 1].index)))


def _id_of_numbers(name: str, measured: Numbers) -> str | None:
    """Why whole numbers that are all different look like an ID; None if they do not."""
    num = len(measured)
    if num <= _FEW or not is_integral(measured) or len(np.unique(measured)) < num:
        return None
    words = name.lower().replace("-", "_").replace(" ", "_").split("_")
    is_counted = measured.max() - measured.min() < 2 * num
    if is_counted or any(word in _IDS for word in words):
        return "its whole numbers are all different, like an ID or a row number"
    return None
