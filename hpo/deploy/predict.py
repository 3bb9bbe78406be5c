"""`hpo predict`: files in, what the model says of each example out."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import ImageOps

from hpo.data.examples import InputSpec
from hpo.data.folders import files_below
from hpo.data.kinds import OF_CLASSES
from hpo.data.parts import Ragged
from hpo.data.photo_files import SUFFIXES, open_photo
from hpo.data.photos import read_photos
from hpo.data.rows import SUFFIXES as TABLES
from hpo.data.rows import encoding_of, read_rows
from hpo.errors import DataError, UsageError, in_one_line

if TYPE_CHECKING:
    from hpo.data.examples import DataSpec
    from hpo.data.preprocessing import Preprocessing
    from hpo.models.preprocessed import PreprocessedModel

BATCH_SIZE = 64


@dataclass(frozen=True)
class Prediction:
    """What a model says of one example."""

    file: str
    row: int | None
    """Of a file with several examples, from 0; None of a photo."""
    prediction: Any
    probabilities: dict[str, float] | None
    """Of each class; None where there are none, or one for each pixel or element."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"file": self.file, "row": self.row, "prediction": _plain(self.prediction)} | (
            {"probabilities": self.probabilities} if self.probabilities else {}
        )


def find_files(given: Sequence[Path], spec: DataSpec) -> list[Path]:
    """The files, and those in folders that a model can take, by name.

    Raises UsageError if one is missing or is of no kind that the model takes.
    """
    readable = _readable(spec)
    found: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = [file for file in files_below(path).found if file.suffix.lower() in readable]
            if not inside:
                raise UsageError(f"{path} holds nothing that the model takes; it takes {', '.join(readable)}.")
            found += inside
            continue
        if not path.is_file():
            raise UsageError(f"there is no file {path}.")
        if path.suffix.lower() not in readable:
            raise UsageError(f"{path} is not a file that the model takes; it takes {', '.join(readable)}.")
        found.append(path)
    return found


def _readable(spec: DataSpec) -> tuple[str, ...]:
    """Endings of the files that hold examples of a model."""
    if spec.preprocessing is not None:
        return (*TABLES, ".jsonl") if spec.preprocessing.kind == "table" else (*TABLES, ".jsonl", ".txt")
    if not isinstance(spec.inputs, InputSpec):
        return ".npz", ".jsonl"
    if spec.inputs.is_ragged:
        return (".jsonl",)
    if spec.inputs.dtype == "uint8" and len(spec.inputs.shape) == 3:
        return *SUFFIXES, ".npy", ".npz", ".jsonl"
    return *(TABLES if len(spec.inputs.shape) == 1 else ()), ".npy", ".npz", ".jsonl"


def predict_files(
    model: PreprocessedModel, files: Sequence[Path], *, batch_size: int = BATCH_SIZE
) -> Iterator[list[Prediction]]:
    """What the model says of each example of each file, batch by batch. Raises DataError for what does not fit it."""
    for examples in _examples(model.spec, files):
        for first in range(0, len(examples), batch_size):
            rows = slice(first, min(first + batch_size, len(examples)))
            yield _predict(model, examples, rows)


@dataclass(frozen=True)
class _Examples:
    """Inputs of a model, and where each comes from."""

    inputs: Any
    origins: list[tuple[str, int | None]]

    def __len__(self) -> int:
        return len(self.origins)


def _predict(model: PreprocessedModel, examples: _Examples, rows: slice) -> list[Prediction]:
    batch = _select(examples.inputs, rows)
    origins = examples.origins[rows]
    try:
        said = model.predict(batch)
        shares = _probabilities(model, batch)
    except UsageError as error:
        raise DataError(f"{origins[0][0]}: {error}") from error
    return [Prediction(file, row, each, share) for (file, row), each, share in zip(origins, said, shares, strict=True)]


def _probabilities(model: PreprocessedModel, batch: Any) -> Sequence[dict[str, float] | None]:
    if model.spec.kind not in OF_CLASSES[:2]:
        return [None] * len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)
    return [dict(zip(model.classes, row, strict=True)) for row in model.probabilities(batch).tolist()]


def _select(inputs: Any, rows: slice) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _select(each, rows) for name, each in inputs.items()}
    if isinstance(inputs, Ragged):
        return inputs.select(rows)
    return inputs.iloc[rows] if hasattr(inputs, "iloc") else inputs[rows]


def _examples(spec: DataSpec, files: Sequence[Path]) -> Iterator[_Examples]:
    """Photos, which have one example each, in batches; other files one by one."""
    photos = [file for file in files if file.suffix.lower() in SUFFIXES]
    for first in range(0, len(photos), BATCH_SIZE):
        some = photos[first : first + BATCH_SIZE]
        yield _Examples(_read_photos(spec, some), [(str(file), None) for file in some])
    for file in files:
        if file.suffix.lower() not in SUFFIXES:
            yield _read_file(spec, file)


def _read_file(spec: DataSpec, file: Path) -> _Examples:
    if spec.preprocessing is not None:
        return _read_raw(spec.preprocessing, file)
    read: dict[str, Callable[[DataSpec, Path], Any]] = {
        ".npy": _read_npy,
        ".npz": _read_npz,
        ".jsonl": _read_jsonl,
    } | dict.fromkeys(TABLES, _read_table)
    try:
        inputs = read[file.suffix.lower()](spec, file)
    except DataError:  # which names the file
        raise
    except UsageError as error:
        raise DataError(f"{file}: {error}") from error
    except Exception as error:  # a user's file: its reader may raise anything
        raise DataError(f"{file} cannot be read: {in_one_line(error)}") from error
    size = len(next(iter(inputs.values()))) if isinstance(inputs, Mapping) else len(inputs)
    return _Examples(inputs, [(str(file), row) for row in range(size)])


def _read_raw(preprocessing: Preprocessing, file: Path) -> _Examples:
    """Rows and texts as they come, which the model's preprocessing encodes."""
    suffix = file.suffix.lower()
    if suffix in TABLES:
        raw: Any = read_rows(file)
    elif suffix == ".jsonl":
        raw = _lines(file)
    else:
        raw = preprocessing.read([file])
    if not preprocessing.is_raw(raw):
        raise DataError(f"{file} does not hold what the model takes: {preprocessing.describe()}.")
    return _Examples(raw, [(str(file), row) for row in range(len(raw))])


def _lines(file: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in file.read_text(encoding=encoding_of(file)).split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read: {in_one_line(error)}") from error


def _read_photos(spec: DataSpec, files: Sequence[Path]) -> torch.Tensor:
    """Photos as the model takes images: those of a folder as in training, and else fitted to its size."""
    image = spec.only_input
    if image.dtype != "uint8" or len(image.shape) != 3 or image.shape[0] not in (1, 3):
        raise DataError(f"{files[0]} is a photo, but the model takes {image.dtype} {image.describe()}.")
    channels, height, width = image.shape
    if channels == 3 and height == width:
        return read_photos(files, side=height)
    images = []
    for file in files:
        try:
            upright, _ = open_photo(file, "L" if channels == 1 else "RGB")
            fitted = np.asarray(ImageOps.fit(upright, (width, height)))
        except Exception as error:  # a user's file: its decoder may raise anything
            raise DataError(f"{file} cannot be read ({in_one_line(error)}); choose another photo.") from error
        images.append(torch.from_numpy(np.array(fitted)).view(height, width, channels).permute(2, 0, 1))
    return torch.stack(images)


def _read_npy(spec: DataSpec, file: Path) -> Any:
    return _fitting(spec.only_input, np.load(file, allow_pickle=False))


def _read_npz(spec: DataSpec, file: Path) -> Any:
    with np.load(file, allow_pickle=False) as stored:
        arrays = dict(stored)
    if isinstance(spec.inputs, InputSpec):
        if len(arrays) != 1:
            raise UsageError(f"it holds {', '.join(arrays)}, but the model takes one input.")
        return _fitting(spec.inputs, next(iter(arrays.values())))
    if arrays.keys() != spec.input_specs.keys():
        raise UsageError(f"it holds {', '.join(arrays)}, but the model takes {', '.join(spec.input_specs)}.")
    return {name: _fitting(each, arrays[name]) for name, each in spec.input_specs.items()}


def _read_table(spec: DataSpec, file: Path) -> Any:
    """The rows of a table of numbers, in the order of its columns."""
    frame = read_rows(file)
    wanted = spec.only_input
    if len(wanted.shape) != 1 or wanted.is_ragged:
        raise UsageError(f"it is a table, but the model takes {wanted.dtype} {wanted.describe()}.")
    if len(frame.columns) != wanted.shape[0]:
        raise UsageError(
            f"it has {len(frame.columns)} columns, but the model takes {wanted.shape[0]} numbers; leave out the target."
        )
    try:
        values = frame.to_numpy().astype(np.float64)
    except ValueError as error:
        raise UsageError(f"it holds what is not a number: {error}.") from error
    return _fitting(wanted, values)


def _read_jsonl(spec: DataSpec, file: Path) -> Any:
    """A line of JSON for each example: a list, or an object with the model's inputs by name."""
    lines = _lines(file)
    if isinstance(spec.inputs, InputSpec):
        return _of_lines(spec.inputs, lines)
    return {name: _of_lines(each, [line[name] for line in lines]) for name, each in spec.input_specs.items()}


def _of_lines(spec: InputSpec, lines: list[Any]) -> Any:
    if spec.is_ragged:
        return Ragged.of([torch.tensor(line, dtype=getattr(torch, spec.dtype)) for line in lines])
    return _fitting(spec, np.array(lines))


def _fitting(spec: InputSpec, array: Any) -> torch.Tensor:
    """The array as a batch of the model's type; a single example becomes a batch of one."""
    if spec.is_ragged:
        raise UsageError("the model takes sequences of different lengths; give a .jsonl file with a list in each line.")
    if array.dtype.kind not in "biuf":
        raise UsageError(f"it holds {array.dtype}, but the model takes numbers.")
    batch = array[None] if array.shape == spec.shape else array
    if batch.shape[1:] != spec.shape:
        raise UsageError(f"it has the shape {array.shape}, but the model takes {spec.describe()}.")
    wanted = np.dtype(spec.dtype)
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        if not (batch == np.floor(batch)).all() or batch.min() < limits.min or batch.max() > limits.max:
            raise UsageError(f"the model takes integers from {limits.min} to {limits.max} ({spec.dtype}).")
    elif not np.isfinite(batch).all():
        raise UsageError("it holds NaN or infinite values; fill them first.")
    return torch.from_numpy(batch.astype(wanted))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value
