"""ONNX: the graph of a model without a trace of this machine, with weights in fp16, or computed in int8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpo.deploy.exportable import quietly
from hpo.errors import ExportError, in_one_line
from hpo.files import temporary_folder

if TYPE_CHECKING:
    from hpo.deploy.exportable import Exportable

NUM_CALIBRATION = 256
"""Training examples from which int8 learns the ranges of activations."""

_FP16_FROM = 256
"""Numbers that a weight must have before it is stored in fp16: norms and biases gain nothing."""

_MAX_BYTES = 2**31  # of a protobuf message


def onnx_model(exportable: Exportable) -> Any:
    """The model as an `onnx.ModelProto` whose inputs and outputs have the exportable's names."""
    program = exportable.export()
    try:
        with quietly():
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=[port.name for port in exportable.inputs],
                output_names=[port.name for port in exportable.outputs],
            )
    except Exception as error:  # an operator that ONNX lacks, for one
        cause = error.__cause__ or error
        raise ExportError(f"the model has no ONNX graph: {in_one_line(cause)[:300]}; use --format pt2.") from error
    assert exported is not None, "without a file it returns the program"
    state = exportable.model.state_dict().values()
    if sum(value.nbytes for value in state if isinstance(value, torch.Tensor)) > 0.95 * _MAX_BYTES:
        raise ExportError("the model has more than 2 GB of weights, which one ONNX file cannot hold; use --format pt2.")
    model = exported.model_proto
    _name_dimensions(model, exportable)
    _forget_this_machine(model)
    return model


def compress(model: Any, how: str | None, exportable: Exportable, path: Path) -> None:
    """Write the model to a file: as it is, with weights in `fp16`, or quantized to `int8` by onnxruntime."""
    if how == "int8":
        _write_int8(model, exportable, path)
        return
    if how == "fp16":
        _store_in_fp16(model)
    path.write_bytes(model.SerializeToString())


def _store_in_fp16(model: Any) -> None:
    """Halve the file: weights are stored in fp16, and computed with in fp32."""
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    casts = []
    for weight in graph.initializer:
        values = numpy_helper.to_array(weight)
        if values.dtype != np.float32 or values.size < _FP16_FROM:
            continue
        if np.abs(values).max() > np.finfo(np.float16).max:
            continue
        name, stored = weight.name, f"{weight.name}.fp16"
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), stored))
        casts.append(helper.make_node("Cast", [stored], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _write_int8(model: Any, exportable: Exportable, path: Path) -> None:
    """Static quantization of matrix products and convolutions, calibrated with training examples."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    names = [port.name for port in exportable.inputs]
    batches = exportable.batches(exportable.train, NUM_CALIBRATION, 32)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            batch = next(batches, None)
            return None if batch is None else {n: tensor.numpy() for n, tensor in zip(names, batch, strict=True)}

    with temporary_folder() as folder, quietly():
        whole, prepared = Path(folder) / "whole.onnx", Path(folder) / "prepared.onnx"
        whole.write_bytes(model.SerializeToString())
        quant_pre_process(str(whole), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(path),
            Reader(),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "MatMul", "Gemm"],
        )


def _name_dimensions(model: Any, exportable: Exportable) -> None:
    """`batch` and `length` in place of the exporter's own symbols."""
    for values, ports in ((model.graph.input, exportable.inputs), (model.graph.output, exportable.outputs)):
        for value, port in zip(values, ports, strict=True):
            for side, size in zip(value.type.tensor_type.shape.dim, port.shape, strict=True):
                if isinstance(size, str):
                    side.dim_param = size


def _forget_this_machine(model: Any) -> None:
    """Leave out where the code lay."""
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        del graph.metadata_props[:]
        graph.doc_string = ""
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        for value in (*graph.value_info, *(graph.initializer if hasattr(graph, "initializer") else ())):
            del value.metadata_props[:]
            value.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    del model.metadata_props[:]
