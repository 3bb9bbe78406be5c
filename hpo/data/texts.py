"""Texts with a class or a number: a folder of text files for each class, or a table with a column of texts.

    texts/<class>/**/*.txt                       a fifth is held out as the test split
    texts/{train,test}/<class>/**/*.txt          test/ is the test split
    a CSV, TSV or Parquet file, or train.* and test.* in a folder

A tokenizer of the `tokenizers` library (byte-pair encoding, Sennrich et al. 2016, arXiv:1508.07909) is trained on the
training split alone, and kept with the model as its own JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from hpo.data.datasets import hold_out
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.folders import files_below, folders_in
from hpo.data.labels import read_labels
from hpo.data.parts import Ragged
from hpo.data.preprocessing import Preprocessing, RawExamples
from hpo.data.rows import encoding_of, find_tables, kept_rows, read_rows, require_columns, split_names, without_empty
from hpo.data.values import texts
from hpo.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd
    from tokenizers import Tokenizer

PADDING, UNKNOWN = "[PAD]", "[UNK]"
"""Tokens 0 and 1: what fills a batch up, and a character that no training text has."""

TEXT, LABEL = "text", "label"


@dataclass(frozen=True)
class TextPreprocessing(Preprocessing):
    """Makes sequences of token ids, `Ragged` int64, of texts."""

    kind: ClassVar[str] = "text"

    tokenizer: str
    """JSON of the `tokenizers` library."""
    max_length: int
    """Tokens after which a text is cut."""
    column: str = TEXT
    """Name of the column that holds the texts in a data frame."""
    described: str = ""
    """What was found, in words."""

    @classmethod
    def fit(cls, frame: pd.DataFrame, *, column: str, vocabulary: int, max_length: int, label: str) -> Self:
        """Train a tokenizer on the texts of the training rows."""
        told = frame[column].tolist()
        tokenizer = _train_tokenizer(told, vocabulary)
        lengths = torch.tensor([len(each.ids) for each in tokenizer.encode_batch(told)]).double()
        num_cut = int((lengths > max_length).sum())
        described = (
            f"{label}; {tokenizer.get_vocab_size()} different tokens, {lengths.median():.0f} in half of the texts, "
            f"{lengths.max():.0f} at most; {num_cut} of {len(told)} texts are cut after {max_length}"
        )
        return cls(tokenizer.to_str(), max_length, column, described)

    def encode(self, raw: Any) -> Ragged:
        told = self._texts_of(raw)
        if not told:
            raise UsageError("there are no texts; give at least one.")
        ids = [each.ids[: self.max_length] for each in self._tokenizer.encode_batch(told)]
        empty = next((number for number, each in enumerate(ids) if not each), None)
        if empty is not None:
            raise UsageError(f"text {empty} is empty; leave it out.")
        return Ragged.of(ids)

    def is_raw(self, inputs: Any) -> bool:
        """A text, a list of texts, or a data frame with a column of them."""
        if isinstance(inputs, list | tuple):
            return bool(inputs) and isinstance(inputs[0], str)
        return isinstance(inputs, str) or hasattr(inputs, "iloc")

    def read(self, paths: Sequence[Path]) -> list[str]:
        return [_read_text(path) for path in paths]

    @property
    def raw_columns(self) -> list[str]:
        return [self.column]

    @property
    def vocabulary(self) -> int:
        return int(self._tokenizer.get_vocab_size())

    def describe(self) -> str:
        return self.described

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "tokenizer": json.loads(self.tokenizer),
            "max_length": self.max_length,
            "column": self.column,
            "described": self.described,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        tokenizer = json.dumps(plain["tokenizer"], ensure_ascii=False, separators=(",", ":"))
        return cls(tokenizer, plain["max_length"], plain["column"], plain["described"])

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        _require_library()
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.tokenizer)

    def _texts_of(self, raw: Any) -> list[str]:
        if isinstance(raw, str):
            return [raw]
        if not hasattr(raw, "iloc"):
            return list(raw)
        if self.column not in raw:
            raise UsageError(f"the rows lack the column '{self.column}', which holds the texts.")
        found: list[str] = raw[self.column].tolist()
        return found


def load_texts(
    data_dir: Path,
    *,
    text: str = TEXT,
    label: str = LABEL,
    columns: str = "",
    kind: str = "auto",
    vocabulary: int = 8000,
    max_length: int = 256,
    rare: str = "refuse",
) -> Dataset:
    """Texts in a folder for each class, or in the columns `text` and `label` of a table.

    `columns` names the columns of a table that has no line with their names, separated by commas. `kind` is "class" or
    "number" if the label is not what it looks like; `vocabulary` is the largest number of tokens, and a text is cut
    after `max_length` of them. `rare` says what becomes of classes with one or two texts: "refuse", "train" (only train
    on them) or "drop". Raises DataError for what cannot be learned, UnknownNameError for a column that is not there,
    UsageError for a `vocabulary` or `max_length` below 1.
    """
    _require_library()
    for name, value in (("vocabulary", vocabulary), ("max_length", max_length)):
        if value < 1:
            raise UsageError(f"--data-option {name}={value} is not allowed: it must be at least 1.")
    frame, num_train = _read_folder(data_dir) if _has_folders(data_dir) else _read_table(data_dir, text, label, columns)
    column, label = (TEXT, LABEL) if _has_folders(data_dir) else (text, label)
    labels = read_labels(frame[label], f"column '{label}'", kind, "label", rare)
    frame, num_train = kept_rows(frame, labels.kept, num_train)
    fit = partial(
        TextPreprocessing.fit,
        column=column,
        vocabulary=vocabulary,
        max_length=max_length,
        label=f"{label}: {labels.described}",
    )
    raw, rows = RawExamples(frame[[column]], fit), torch.arange(len(frame))
    if num_train is None:
        return hold_out(rows, labels.targets, labels.classes, raw=raw)
    train, test = (Split(rows[part], labels.targets[part]) for part in (slice(num_train), slice(num_train, None)))
    return Dataset(train, SealedSplit(lambda: test, len(test)), labels.classes, raw=raw)


def _train_tokenizer(told: list[str], vocabulary: int) -> Tokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # words and punctuation marks
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=2, special_tokens=[PADDING, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(told, trainer)
    return tokenizer


def _require_library() -> None:
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise UsageError("texts need the library tokenizers: pip install 'hpo-torch[text]'.") from error


def _has_folders(data_dir: Path) -> bool:
    return data_dir.is_dir() and any(folders_in(data_dir))


def _read_folder(data_dir: Path) -> tuple[pd.DataFrame, int | None]:
    """The texts of all classes with their labels, and how many are for training if there is a test folder."""
    import pandas as pd

    names = {path.name for path in folders_in(data_dir)}
    if names != {"train", "test"}:
        return pd.DataFrame(_texts_in(data_dir), columns=[TEXT, LABEL]), None
    train, test = _texts_in(data_dir / "train"), _texts_in(data_dir / "test")
    if unknown := {label for _, label in test} - {label for _, label in train}:
        raise DataError(f"{data_dir / 'test' / min(unknown)} is not a class of the training texts.")
    return pd.DataFrame(train + test, columns=[TEXT, LABEL]), len(train)


def _texts_in(parent: Path) -> list[tuple[str, str]]:
    """Each text with its class, by name. Raises DataError for a class without texts, and for an empty text."""
    found = []
    for folder in folders_in(parent):
        files = [path for path in files_below(folder).found if path.suffix.lower() == ".txt"]
        if not files:
            raise DataError(f"class '{folder.name}' in {parent} has no texts (*.txt); put some there.")
        found += [(_read_text(file), folder.name) for file in files]
    return found


def _read_text(path: Path) -> str:
    try:
        told = path.read_text(encoding=encoding_of(path))
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); it must be a text in UTF-8.") from error
    if not told.strip():
        raise DataError(f"{path} is empty; leave it out.")
    return told


def _read_table(data_dir: Path, text: str, label: str, columns: str) -> tuple[pd.DataFrame, int | None]:
    """The rows with a label, and how many are for training if there is a test file."""
    import pandas as pd

    file, test_file = find_tables(data_dir, "text_folder")
    frames = []
    for each in filter(None, (file, test_file)):
        frame = read_rows(each, names=split_names(columns) or None)
        require_columns(frame, [text], "text", each)
        require_columns(frame, [label], "label", each)
        frame = without_empty(frame, texts(frame[label]).isna().tolist(), f"value in '{label}'", each)
        is_empty = frame[text].astype("string").str.strip().fillna("").eq("").to_numpy()
        if is_empty.any():
            row = int(is_empty.argmax()) + 1
            raise DataError(f"{each}: the text of row {row} is empty, as {is_empty.sum()} in all are; leave them out.")
        frames.append(frame[[text, label]].astype({text: str}))
    return pd.concat(frames, ignore_index=True), len(frames[0]) if test_file else None
