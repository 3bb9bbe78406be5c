"""Runs a model that `hpo export` wrote, without hpo: this file needs torch or onnxruntime, and numpy.

A copy of it is in each export for MLflow, as the code that MLflow loads the model with, and in those of models for
tables and texts, because it encodes them. The folder of an export holds the model and `signature.json`, which names its
inputs, its outputs and its classes.
"""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[[Mapping[str, Array]], list[Array]]

SIGNATURE = "signature.json"
LOADER = "hpo_exported"
"""Name of the copies. Not below `hpo`, which those who load it do not have."""

VALUES = "hpo_values"
"""Module beside this one that encodes tables, in an export of a model for them."""

BY_CLASS = ("classification", "multilabel")


class ExportedModel:
    """A model of an export's folder, `signature.json` beside it."""

    def __init__(self, folder: str | Path) -> None:
        self.signature: dict[str, Any] = json.loads((Path(folder) / SIGNATURE).read_text(encoding="utf-8"))
        self._run = RUNTIMES[self.signature["runtime"]](Path(folder))

    def raw(self, inputs: Mapping[str, Array]) -> list[Array]:
        """The network's outputs for a batch of examples, by the names of the inputs: logits, or numbers."""
        return self._run({each["name"]: checked(each, inputs) for each in self.signature["inputs"]})

    def answers(self, inputs: Mapping[str, Array]) -> list[dict[str, Any]]:
        """A dictionary for each example: `prediction`, and where there are classes `probabilities` by their names."""
        raw, kind, classes = self.raw(inputs), self.signature["kind"], self.signature["classes"]
        outputs = raw[0]
        if kind == "own":
            return [{"outputs": [part[row].tolist() for part in raw]} for row in range(len(outputs))]
        if kind not in BY_CLASS:
            return [{"prediction": each} for each in self._without_classes(kind, raw, inputs)]
        shares = softmax(outputs, 1) if kind == "classification" else sigmoid(outputs)
        if kind == "classification":
            found: list[Any] = [classes[index] for index in outputs.argmax(1)]
        else:
            found = [self._labels(row) for row in outputs > np.asarray(self.signature["thresholds"])]
        return [
            {"prediction": name, "probabilities": dict(zip(classes, row, strict=True))}
            for name, row in zip(found, shares.tolist(), strict=True)
        ]

    def _labels(self, has_label: Array) -> list[str]:
        return [name for name, has in zip(self.signature["classes"], has_label, strict=True) if has]

    def _without_classes(self, kind: str, raw: list[Array], inputs: Mapping[str, Array]) -> list[Any]:
        """What is said of each example where it is neither one class nor several labels."""
        outputs, classes = raw[0], self.signature["classes"]
        if kind == "segmentation":
            return list(outputs.argmax(1).tolist())
        if kind in ("tagging", "transcription"):
            lengths = raw[1] if len(raw) > 1 else self._lengths(inputs)
            ends = [outputs.shape[1]] * len(outputs) if lengths is None else lengths.tolist()
            best = [row[:end] for row, end in zip(outputs.argmax(-1).tolist(), ends, strict=True)]
            if kind == "transcription":  # repeats are one, and blanks are left out
                best = [[label for label, _ in itertools.groupby(row) if label != len(classes)] for row in best]
            return [[classes[index] for index in row] for row in best]
        return list(outputs.tolist())

    def _lengths(self, inputs: Mapping[str, Array]) -> Array | None:
        names = [each["name"] for each in self.signature["inputs"] if each["name"].endswith("lengths")]
        return inputs[names[0]] if names else None


def checked(expected: Mapping[str, Any], inputs: Mapping[str, Array]) -> Array:
    """An input as the model takes it. Raises ValueError if it has another shape or type."""
    name, shape, dtype = expected["name"], expected["shape"], np.dtype(expected["dtype"])
    if name not in inputs:
        raise ValueError(f"the input '{name}' is missing.")
    try:
        given = np.asarray(inputs[name])
    except ValueError:  # lists of different lengths
        raise ValueError(f"the input '{name}' must have the shape {described(shape)}, not lists that differ.") from None
    sizes = [own if isinstance(own, int) else size for own, size in zip(shape, given.shape, strict=False)]
    if given.ndim != len(shape) or sizes != list(given.shape) or not len(given):
        raise ValueError(f"the input '{name}' must have the shape {described(shape)}, not {described(given.shape)}.")
    if given.dtype == dtype:
        return given
    if given.dtype.kind not in "biuf":
        raise ValueError(f"the input '{name}' must be numbers ({dtype}).")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if not (given == np.floor(given)).all() or given.min() < limits.min or given.max() > limits.max:
            raise ValueError(f"the input '{name}' must be integers from {limits.min} to {limits.max} ({dtype}).")
    return given.astype(dtype)


def softmax(logits: Array, axis: int) -> Array:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis, keepdims=True))
    shares: Array = exponentials / exponentials.sum(axis, keepdims=True)
    return shares


def sigmoid(logits: Array) -> Array:
    return 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))


def described(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"


def _run_pt2(folder: Path) -> Run:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.9 has one of its own way to read the file
        module = torch.export.load(folder / "model.pt2").module()

    def run(inputs: Mapping[str, Array]) -> list[Array]:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(np.array(array)) for array in inputs.values()))
        return [output.numpy() for output in outputs]

    return run


def _run_onnx(folder: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])

    def run(inputs: Mapping[str, Array]) -> list[Array]:
        return list(session.run(None, dict(inputs)))

    return run


RUNTIMES: dict[str, Callable[[Path], Run]] = {"pt2": _run_pt2, "onnx": _run_onnx}


class MlflowModel:
    """What MLflow calls. `params={"raw": True}` returns the network's outputs in place of names and probabilities."""

    def __init__(self, model: ExportedModel) -> None:
        self.model = model

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        from mlflow.exceptions import MlflowException

        answer = self.model.raw if (params or {}).get("raw") else self.model.answers
        try:
            return answer(self._inputs(model_input))
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def get_raw_model(self) -> ExportedModel:
        """What MLflow returns under this name: it takes tensors, not rows or texts."""
        return self.model

    def _inputs(self, given: Any) -> Mapping[str, Array]:
        signature = self.model.signature
        if signature.get("preprocessing"):
            return encode(signature["preprocessing"], given)
        if isinstance(given, Mapping):
            return given
        return {signature["inputs"][0]["name"]: np.asarray(given)}


def encode(preprocessing: Mapping[str, Any], frame: Any) -> dict[str, Array]:
    """The tensors of rows or texts, given as a data frame. Raises ValueError for a column that is missing."""
    if preprocessing["kind"] == "table":
        columns = [SimpleNamespace(**column) for column in preprocessing["columns"]]
        return dict(import_module(VALUES).encode_table(columns, frame))
    from tokenizers import Tokenizer

    name = preprocessing["column"]
    if name not in frame:
        raise ValueError(f"the rows lack the column '{name}', which holds the texts.")
    if not all(isinstance(text, str) for text in frame[name]):
        raise ValueError(f"a row has no text in '{name}'; leave it out.")
    tokenizer = Tokenizer.from_str(json.dumps(preprocessing["tokenizer"]))
    texts = [each.ids[: preprocessing["max_length"]] for each in tokenizer.encode_batch(frame[name].tolist())]
    lengths = np.array([len(each) for each in texts], dtype=np.int64)
    if not len(texts) or not lengths.all():
        raise ValueError("a text is empty; leave it out." if len(texts) else "there are no texts; give at least one.")
    values = np.zeros((len(texts), lengths.max()), dtype=np.int64)
    for row, each in enumerate(texts):
        values[row, : len(each)] = each
    return {"values": values, "lengths": lengths}


def _load_pyfunc(data_path: str) -> MlflowModel:
    """MLflow's loader."""
    return MlflowModel(ExportedModel(data_path))
