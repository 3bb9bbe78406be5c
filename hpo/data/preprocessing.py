"""What makes tensors of examples as they came: rows of a table, texts.

It is fitted on the training split alone, once the examples are divided, and is kept with each model as plain JSON (in
`DataSpec`), so that a loaded model takes raw rows or texts. Only the kinds that ship can be read from there: a file
must not choose what code is imported.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from hpo.errors import CheckpointError

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from hpo.data.parts import Examples

IGNORED = "named in ignore"
"""Why a column is left out that the user does not want."""

_KINDS = {"table": "hpo.data.tables:TablePreprocessing", "text": "hpo.data.texts:TextPreprocessing"}


class Preprocessing(ABC):
    """Turns raw examples into tensors, in the same way for training, for the test and for new data."""

    kind: ClassVar[str]

    @abstractmethod
    def encode(self, raw: Any) -> Examples:
        """The tensors of raw examples: a data frame, or what `is_raw` says. Raises UsageError for other ones."""

    @abstractmethod
    def is_raw(self, inputs: Any) -> bool:
        """Whether these are raw examples, not tensors of them."""

    @abstractmethod
    def read(self, paths: Sequence[Path]) -> Any:
        """The raw examples in files, one after the other. Raises DataError for a file that cannot be read."""

    @property
    @abstractmethod
    def vocabulary(self) -> Any:
        """How many different integers the tensors may hold, as `Dataset` takes it."""

    @property
    @abstractmethod
    def raw_columns(self) -> list[str]:
        """The columns of a data frame that it reads."""

    @abstractmethod
    def describe(self) -> str:
        """What was found, in one line."""

    @property
    def left_out(self) -> Mapping[str, str]:
        """What of the raw examples the model does not get, and why."""
        return {}

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """As plain data, with its `kind`."""

    @classmethod
    @abstractmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `to_dict` described, after JSON too."""


def preprocessing_from_dict(plain: Mapping[str, Any] | None) -> Preprocessing | None:
    """What `to_dict` of any kind described; None for None. Raises CheckpointError for a kind that is not there."""
    if plain is None:
        return None
    if plain.get("kind") not in _KINDS:
        raise CheckpointError(f"the preprocessing '{plain.get('kind')}' is unknown; a newer hpo may know it.")
    module, _, name = _KINDS[plain["kind"]].partition(":")
    return cast(Preprocessing, getattr(import_module(module), name).from_dict(plain))


@dataclass(frozen=True, eq=False)
class RawExamples:
    """The examples of a data set as they came; its inputs are then row numbers (N,) int64 of them."""

    frame: pd.DataFrame
    fit_to: Callable[[pd.DataFrame], Preprocessing]
    """Makes the preprocessing from the rows of the training split."""

    def fit(self, rows: Tensor) -> Preprocessing:
        return self.fit_to(self.frame.iloc[rows.numpy()])

    def encode(self, rows: Tensor, preprocessing: Preprocessing) -> Examples:
        return preprocessing.encode(self.frame.iloc[rows.numpy()])

    def texts(self, rows: Tensor, preprocessing: Preprocessing) -> list[str]:
        """Some examples for a person to read: a text as it is, a row as `column: value, ...`."""
        names = preprocessing.raw_columns
        some = self.frame.iloc[rows.numpy()][names].to_dict("records")
        if len(names) == 1:
            return [str(row[names[0]]) for row in some]
        return [", ".join(f"{name}: {value}" for name, value in row.items()) for row in some]

    def content(self, rows: Tensor) -> Iterable[bytes]:
        """What a checksum of these rows is made of."""
        import pandas as pd

        some = self.frame.iloc[rows.numpy()]
        yield repr(list(some.columns)).encode()
        for name in some.columns:
            yield pd.util.hash_pandas_object(some[name], index=False).to_numpy().tobytes()
