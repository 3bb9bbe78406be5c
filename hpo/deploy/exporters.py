"""The formats of `hpo export`: how each is written, and how it is loaded without hpo.

A format is an `Exporter`. More of them are found under entry points in the group `hpo.exporters`, or as
`module:factory`; the factory is called without arguments and returns an `Exporter`.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hpo.errors import ExportError, UsageError
from hpo.extensions import EXPORTERS, call, find_factory

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.deploy.exportable import Exportable

COMPRESSIONS = ("fp16", "int8")


@dataclass(frozen=True, kw_only=True)
class Exporter:
    """One format of exported models."""

    name: str

    write: Callable[[Exportable, Path, Mapping[str, Any]], None]
    """Writes a model into an empty folder. The last argument is the signature as plain data; it is written beside the
    model as `signature.json` afterwards."""

    load: str
    """How it is run without hpo, which it must not import: source code that defines `load(folder)`. That returns a
    function from the inputs, NumPy arrays by name, to a list with an array for each output."""

    packages: tuple[str, ...] = ()
    """Modules that must be importable here."""

    preload: tuple[str, ...] = ()
    """Modules that are imported before it is loaded: what their import does is not the export's doing."""

    is_of_weights: bool = False
    """Whether it holds weights and no network: `load(folder)` then returns the bytes of each weight by its name, as
    uint8 arrays."""

    takes_rows: bool = False
    """Whether models for tables and texts take a data frame of them; for others the code that encodes one comes along.
    """

    compressions: tuple[str, ...] = ()
    """What `--compress` may be."""

    runtime: str = ""
    """Which of the runtimes of `hpo.deploy.exported` runs the files in the folder; empty for none."""


def find_exporter(name: str) -> Exporter:
    """The format of that name. Raises UnknownNameError for an unknown one, UsageError if a package is missing."""
    if name in BUILT_IN:
        exporter = BUILT_IN[name]
    else:
        made = call(find_factory(EXPORTERS, name, list(BUILT_IN)), {})
        if not isinstance(made, Exporter):
            raise UsageError(f"{name} made a {type(made).__name__}, not an hpo.Exporter.")
        exporter = made
    for package in exporter.packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            advice = "pip install 'hpo-torch[export]'" if name in BUILT_IN else "install it"
            raise UsageError(f"--format {name} needs the package {package}: {advice}.") from error
    return exporter


# --- pt2 --------------------------------------------------------------------------------------------------------------


def write_pt2(exportable: Exportable, folder: Path, signature: Mapping[str, Any]) -> None:
    """PyTorch's own format: a graph, and weights as plain bytes."""
    torch.export.save(exportable.export(), folder / "model.pt2")


_LOAD_PT2 = """
def load(folder):
    import torch
    module = torch.export.load(f"{folder}/model.pt2").module()
    def run(inputs):
        with torch.inference_mode():
            return [each.numpy() for each in module(*map(torch.from_numpy, inputs.values()))]
    return run
"""

# --- ONNX -------------------------------------------------------------------------------------------------------------


def write_onnx(exportable: Exportable, folder: Path, signature: Mapping[str, Any]) -> None:
    """ONNX, for onnxruntime and others, with task and classes in its metadata; fp16 or int8 where that is asked for."""
    from hpo.deploy.onnx_format import compress, onnx_model

    model = onnx_model(exportable)
    for key in ("task", "study", "kind", "classes"):
        value = signature.get(key)
        if value:
            entry = model.metadata_props.add()
            entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
    compress(model, signature.get("compression"), exportable, folder / "model.onnx")


_LOAD_ONNX = """
def load(folder):
    import onnxruntime
    session = onnxruntime.InferenceSession(f"{folder}/model.onnx", providers=["CPUExecutionProvider"])
    return lambda inputs: session.run(None, inputs)
"""

# --- safetensors ------------------------------------------------------------------------------------------------------


def write_safetensors(exportable: Exportable, folder: Path, signature: Mapping[str, Any]) -> None:
    """The weights alone, by name: whoever loads them needs the network's code."""
    write_weights(exportable.model.state_dict(), folder, signature)


def write_weights(weights: Mapping[str, Tensor], folder: Path, signature: Mapping[str, Any]) -> None:
    """A state dict in the format of safetensors, with the signature in its metadata."""
    from safetensors.torch import save_file

    plain = [name for name, value in weights.items() if not isinstance(value, torch.Tensor)]
    if plain:
        raise ExportError(
            f"safetensors holds tensors alone, and {plain[0]} is a {type(weights[plain[0]]).__name__}; "
            "use --format pt2."
        )
    # Tensors that share their memory are written twice: the format has no place for that.
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(separate, folder / "model.safetensors", metadata={"signature": json.dumps(dict(signature))})


_LOAD_SAFETENSORS = """
def load(folder):
    import torch
    from safetensors.torch import load_file
    weights = load_file(f"{folder}/model.safetensors")
    return {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in weights.items()}
"""


# --- MLflow -----------------------------------------------------------------------------------------------------------


def write_mlflow(exportable: Exportable, folder: Path, signature: Mapping[str, Any]) -> None:
    """A folder that `mlflow.pyfunc` loads and MLflow serves."""
    from hpo.deploy.mlflow_format import save_mlflow_model

    save_mlflow_model(exportable, folder, signature)


_LOAD_MLFLOW = """
def load(folder):
    import mlflow.pyfunc
    model = mlflow.pyfunc.load_model(folder)
    raw = model.get_raw_model()
    if raw.signature.get("preprocessing"):  # it takes rows or texts, and these are tensors
        return raw.raw
    def run(inputs):
        given = inputs if len(inputs) > 1 else next(iter(inputs.values()))
        return model.predict(given, params={"raw": True})
    return run
"""

BUILT_IN = {
    each.name: each
    for each in (
        Exporter(name="pt2", write=write_pt2, load=_LOAD_PT2, preload=("torch",), runtime="pt2"),
        Exporter(
            name="onnx",
            write=write_onnx,
            load=_LOAD_ONNX,
            packages=("onnx", "onnxscript", "onnxruntime"),
            preload=("onnxruntime",),
            compressions=COMPRESSIONS,
            runtime="onnx",
        ),
        Exporter(
            name="mlflow",
            write=write_mlflow,
            load=_LOAD_MLFLOW,
            preload=("mlflow.pyfunc",),
            takes_rows=True,
            runtime="pt2",
        ),
        Exporter(
            name="safetensors",
            write=write_safetensors,
            load=_LOAD_SAFETENSORS,
            packages=("safetensors",),
            is_of_weights=True,
            preload=("torch",),
        ),
    )
}
