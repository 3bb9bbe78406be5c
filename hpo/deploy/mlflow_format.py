"""An export as MLflow takes it: a folder with the graph, a loader that needs no hpo, signature and requirements."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpo.deploy.code import copy_code
from hpo.deploy.exportable import quietly
from hpo.deploy.exported import BY_CLASS, LOADER, SIGNATURE
from hpo.files import temporary_folder
from hpo.tracking.store import prepare_mlflow

if TYPE_CHECKING:
    from hpo.deploy.exportable import Exportable

NUM_IN_EXAMPLE = 2
EXAMPLE = "serving_input_example.json"
"""MLflow's name for a request with these examples."""


@quietly()
def save_mlflow_model(exportable: Exportable, folder: Path, signature: Mapping[str, Any], **identity: Any) -> None:
    """Write the folder. `identity` are the `model_id` and the `run_id` of a model that MLflow has logged."""
    prepare_mlflow()
    import mlflow.pyfunc
    from mlflow.models import Model

    inputs = exportable.batches(exportable.validation, NUM_IN_EXAMPLE, NUM_IN_EXAMPLE)
    arrays = [tensor.numpy() for tensor in next(iter(inputs))]
    names = [port.name for port in exportable.inputs]
    example: Any = dict(zip(names, arrays, strict=True)) if len(arrays) > 1 else arrays[0]
    if exportable.raw is not None:
        example = exportable.raw.head(NUM_IN_EXAMPLE)
    is_text = (signature.get("preprocessing") or {}).get("kind") == "text"
    packages = ["mlflow", "torch", "numpy", *(["tokenizers"] if is_text else [])]
    with temporary_folder() as workshop:
        data = Path(workshop) / "data"
        data.mkdir()
        code = copy_code(Path(workshop))
        torch.export.save(exportable.export(), data / "model.pt2")
        (data / SIGNATURE).write_text(json.dumps(dict(signature), indent=2), encoding="utf-8")
        mlflow.pyfunc.save_model(
            folder,
            loader_module=LOADER,
            data_path=str(data),
            code_paths=[str(each) for each in code],
            mlflow_model=Model(**identity),
            signature=_signature(exportable),
            input_example=example,
            pip_requirements=[f"{name}=={_release(name)}" for name in packages],
            metadata={key: signature[key] for key in ("task", "study", "trial", "kind") if key in signature},
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache)


def _signature(exportable: Exportable) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import AnyType, Array, Map

    ports, kind = exportable.inputs, exportable.model.spec.kind
    inputs: list[TensorSpec | ColSpec] = [
        TensorSpec(
            np.dtype(port.dtype),
            tuple(-1 if isinstance(side, str) else side for side in port.shape),
            port.name if len(ports) > 1 else None,
        )
        for port in ports
    ]
    if exportable.raw is not None:
        anything = AnyType()  # type: ignore[no-untyped-call]
        inputs = [ColSpec(anything, name, required=False) for name in exportable.raw.columns]
    prediction: Any = {"classification": DataType.string, "multilabel": Array(DataType.string)}.get(kind)
    prediction = prediction or AnyType()  # type: ignore[no-untyped-call]
    name = "outputs" if kind == "own" else "prediction"
    outputs: list[TensorSpec | ColSpec] = [ColSpec(prediction, name)]
    if kind in BY_CLASS:
        outputs.append(ColSpec(Map(DataType.double), "probabilities"))
    params = ParamSchema([ParamSpec("raw", DataType.boolean, False)])
    return ModelSignature(inputs=Schema(inputs), outputs=Schema(outputs), params=params)


def _release(package: str) -> str:
    """The version without the part that names a build, which no index has under `==` (2.15.0+cpu)."""
    return re.sub(r"\+.*", "", version(package))
