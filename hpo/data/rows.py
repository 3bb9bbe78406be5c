"""CSV and Parquet files as data frames, with every value as it is written."""

from __future__ import annotations

import codecs
import logging
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import DataError, UnknownNameError, in_one_line

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from numpy.typing import NDArray

SUFFIXES = (".csv", ".tsv", ".parquet")
DELIMITERS = (",", ";", "\t", "|")

_logger = logging.getLogger(__name__)


def find_tables(data_dir: Path, task: str) -> tuple[Path, Path | None]:
    """The file with the examples, and the one with the test split if there is one: `train.csv` and `test.csv`.

    `data_dir` is the file itself, or a folder that holds the two or just one file. Raises DataError.
    """
    if data_dir.is_file():
        return data_dir, None
    if not data_dir.is_dir():
        raise DataError(f"there is no file {data_dir}; name a {_listed(SUFFIXES)} file with --data-dir FILE.")
    found = sorted(path for path in data_dir.iterdir() if path.suffix.lower() in SUFFIXES)
    named = {path.stem.lower(): path for path in found}
    if {"train", "test"} <= named.keys():
        return named["train"], named["test"]
    if len(found) != 1:
        raise DataError(
            f"{data_dir} holds {len(found) or 'no'} {_listed(SUFFIXES)} file{'s' if found else ''}; name the one for "
            f"task '{task}' with --data-dir FILE, or give a folder with train.csv and test.csv."
        )
    return found[0], None


def read_rows(path: Path, *, names: Sequence[str] | None = None) -> pd.DataFrame:
    """The rows of a CSV or Parquet file; in a CSV all values are texts, and what is empty is "".

    Fields of a CSV are separated by the commonest of DELIMITERS in its first line, those of a .tsv by tabs. With
    `names` the first line is a row, and the columns have these names. Raises DataError for a file that is missing,
    damaged or empty, or whose library is missing.
    """
    import pandas as pd

    try:
        frame = pd.read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path, names)
    except ImportError as error:
        raise DataError(f"{path} needs the library pyarrow: pip install pyarrow, or save it as a CSV.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not a text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8."
        ) from error
    except pd.errors.EmptyDataError as error:
        raise DataError(f"{path} is empty; it must have a line with the names of the columns, and rows.") from error
    except DataError:
        raise
    except Exception as error:  # a user's file: its reader may raise anything
        uneven = re.search(r"Expected (\d+) fields in line (\d+), saw (\d+)", str(error))
        if uneven:
            expected, line, found = uneven.groups()
            raise DataError(
                f"{path}: line {line} has {found} fields, and those before it {expected}; is a text with a "
                f"{_delimiter(path)!r} in it not in quotes?"
            ) from error
        raise DataError(f"{path} cannot be read ({in_one_line(error)}); it must be {_listed(SUFFIXES)}.") from error
    if not len(frame):
        raise DataError(f"{path} holds no rows; it must have a line with the names of the columns, and rows.")
    return frame.set_axis([str(name) for name in frame.columns], axis=1)


def _read_csv(path: Path, names: Sequence[str] | None) -> pd.DataFrame:
    import pandas as pd

    read = partial(
        pd.read_csv,
        path,
        sep=_delimiter(path),
        dtype=str,
        keep_default_na=False,
        header=0 if names is None else None,
        names=None if names is None else list(names),
        encoding=encoding_of(path),
        quoting=3 if path.suffix.lower() == ".tsv" else 0,  # tabs need no quotes, and texts have some
    )
    frame: pd.DataFrame = read()
    if isinstance(frame.index, pd.RangeIndex):
        return frame
    # The rows have more fields than the header has names; pandas takes the first ones for names of the rows.
    num_more = frame.index.nlevels
    if num_more > 1 or frame.iloc[:, -1].ne("").any():
        num = len(frame.columns)
        raise DataError(f"{path}: rows have {num + num_more} fields, and the first line {num}; name every column.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pd.errors.ParserWarning)  # each row ends with a delimiter
        return read(index_col=False)


def encoding_of(path: Path) -> str:
    """The encoding that a file's first bytes tell, UTF-8 without them: Excel's "Unicode text" is UTF-16."""
    with path.open("rb") as file:
        first = file.read(4)
    if first.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"


def require_columns(frame: pd.DataFrame, names: Sequence[str], option: str, source: object) -> None:
    """Raise UnknownNameError for a name in a data option that is not a column."""
    for name in names:
        if name not in frame.columns:
            raise UnknownNameError("column", name, list(frame.columns), f"(--data-option {option}=..., {source})")


def split_names(written: str) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in written.split(",") if name.strip()]


def without_empty(frame: pd.DataFrame, is_empty: Sequence[bool], what: str, source: object) -> pd.DataFrame:
    """The frame without rows that have no label; a warning says how many. Raises DataError if none has one."""
    import numpy as np

    empty = np.asarray(is_empty, dtype=bool)
    if empty.all():
        raise DataError(f"{source}: all rows lack a {what}; name another column.")
    if empty.any():
        _logger.warning("%s: %d of %d rows have no %s and are left out.", source, empty.sum(), len(frame), what)
    return frame[~empty]


def kept_rows(frame: pd.DataFrame, kept: NDArray[np.bool_], num_train: int | None) -> tuple[pd.DataFrame, int | None]:
    """The rows that are kept, and how many of them are among the first `num_train`."""
    return frame[kept].reset_index(drop=True), None if num_train is None else int(kept[:num_train].sum())


def _delimiter(path: Path) -> str:
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open(encoding=encoding_of(path)) as file:
        first = file.readline()
    return max(DELIMITERS, key=first.count)  # the first of them where there is none


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
