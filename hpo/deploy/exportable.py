"""A trained model as every export format takes it: named tensors in, named tensors out, and what they mean."""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hpo.data.kinds import OF_CLASSES
from hpo.data.parts import Padded, map_parts, tensors_of
from hpo.deploy.recurrences import as_loops
from hpo.errors import ExportError

if TYPE_CHECKING:
    import pandas as pd

    from hpo.data.examples import DataSpec, Split
    from hpo.models.preprocessed import PreprocessedModel

NUM_TRACED = 3
"""Examples that a model is traced with: a batch of one would make its size a constant."""


@dataclass(frozen=True)
class Port:
    """One tensor that a model takes or returns."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    """`batch`, and of sequences `length`, stand for any size."""


class FlatModel(nn.Module):
    """A model whose inputs are tensors alone: those of sequences are values and lengths."""

    def __init__(self, model: PreprocessedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(tensors)

        def take(spec: Any) -> Tensor | Padded:
            return Padded(next(remaining), next(remaining)) if spec.is_ragged else next(remaining)

        outputs = tensors_of(self.model(map_parts(take, self.model.spec.inputs)))
        # Lengths may be returned as they came; in ONNX, torch 2.9 names such an input after the output.
        return tuple(output.clone() if any(output is given for given in tensors) else output for output in outputs)


@dataclass(frozen=True, kw_only=True)
class Exportable:
    """A model, and examples to trace, check and calibrate an export with."""

    model: PreprocessedModel
    module: FlatModel
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    validation: Split
    train: Split
    raw: pd.DataFrame | None = None
    """Examples as they came, rows of a table or texts, where the model has a preprocessing for them."""

    def batches(self, split: Split, num_examples: int, batch_size: int) -> Iterator[tuple[Tensor, ...]]:
        """Tensors of the first examples of a split, in batches."""
        for first in range(0, min(num_examples, len(split)), batch_size):
            rows = slice(first, min(first + batch_size, num_examples, len(split)))
            yield tuple(tensors_of(split.select(rows).in_memory().batch(slice(None))[0]))

    @property
    def traced(self) -> tuple[Tensor, ...]:
        """The batch that the model is traced with."""
        return next(self.batches(self.validation, NUM_TRACED, NUM_TRACED))

    def export(self) -> torch.export.ExportedProgram:
        """The model's graph, with a batch and lengths of any size, and no trace of this machine in it.

        Raises ExportError if it has none, and names the place.
        """
        dimensions: dict[str, Any] = {}

        def dimension(name: str) -> Any:
            return dimensions.setdefault(name, torch.export.Dim(name, min=1))

        shapes = tuple(
            {at: dimension(side) for at, side in enumerate(port.shape) if isinstance(side, str)} for port in self.inputs
        )
        try:
            with torch.no_grad(), quietly(), as_loops(self.module):
                program = torch.export.export(self.module, self.traced, dynamic_shapes=(shapes,), strict=False)
        except Exception as error:  # a user's network may raise anything
            raise ExportError(f"the model cannot be exported: {_place(error, self.module)}") from error
        _forget_this_machine(program)
        return program


def make_exportable(
    model: PreprocessedModel, train: Split, validation: Split, raw: pd.DataFrame | None = None
) -> Exportable:
    """What an exporter takes. `validation` is what the export is checked with, `train` what it is calibrated with."""
    module = FlatModel(model).eval()
    inputs = tuple(_input_ports(model.spec))
    exportable = Exportable(model=model, module=module, inputs=inputs, outputs=(), validation=validation, train=train)
    outputs = _output_ports(module, exportable.traced, inputs, model.spec.kind)
    return replace(exportable, outputs=outputs, raw=raw)


def _input_ports(spec: DataSpec) -> Iterator[Port]:
    for name, each in spec.input_specs.items():
        stem = name.replace(".", "_")
        if each.is_ragged:
            length = f"{stem}_length" if stem else "length"
            yield Port(f"{stem}_values" if stem else "values", each.dtype, ("batch", length, *each.shape))
            yield Port(f"{stem}_lengths" if stem else "lengths", "int64", ("batch",))
        else:
            yield Port(f"input_{stem}" if stem.isdigit() else stem or "inputs", each.dtype, ("batch", *each.shape))


@torch.no_grad()
def _output_ports(module: nn.Module, examples: Sequence[Tensor], inputs: Sequence[Port], kind: str) -> tuple[Port, ...]:
    """What a smaller batch of longer sequences changes in the outputs' shapes is of any size."""
    smaller = [_lengthened(tensor[:-1], port) for tensor, port in zip(examples, inputs, strict=True)]
    several = module(*examples)
    others = (
        ["output_lengths"] if kind in ("tagging", "transcription") else [f"outputs_{i}" for i in range(1, len(several))]
    )
    names = ["logits" if kind in OF_CLASSES else "outputs", *others][: len(several)]
    return tuple(
        Port(
            name,
            str(one.dtype).removeprefix("torch."),
            tuple(
                a if a == b else ("length" if at else "batch")
                for at, (a, b) in enumerate(zip(one.shape, two.shape, strict=True))
            ),
        )
        for name, one, two in zip(names, several, module(*smaller), strict=True)
    )


def _lengthened(tensor: Tensor, port: Port) -> Tensor:
    if len(port.shape) < 2 or not isinstance(port.shape[1], str):
        return tensor
    return torch.cat((tensor, tensor[:, -1:]), dim=1)


def _place(error: Exception, module: nn.Module) -> str:
    """What a graph cannot hold, and where: the last line of the network's own code, or the layer."""
    reason = " ".join(str(error).split()).split("For more information")[0].rstrip("! ")
    frames = [
        frame
        for cause in (error, error.__cause__)
        if cause is not None
        for frame in traceback.extract_tb(cause.__traceback__)
        if not frame.filename.startswith((str(_TORCH), str(Path(__file__).parent)))
    ]
    if frames:
        last = frames[-1]
        where = f"{Path(last.filename).name}:{last.lineno} in {last.name}: `{last.line}`"
        return f"{where} ({type(error).__name__}: {reason[:200]}). Python that depends on the data has no graph."
    recurrent = [name for name, layer in module.named_modules() if isinstance(layer, nn.RNNBase)]
    if recurrent:
        kind = type(module.get_submodule(recurrent[0])).__name__
        return (
            f"{recurrent[0]} is an {kind}, of which torch.export makes a graph of one length alone; use --format "
            "safetensors, or an nn.GRU or nn.LSTM without proj_size."
        )
    return f"{reason[:300]}."


_TORCH = Path(torch.__file__).parent


def _forget_this_machine(program: torch.export.ExportedProgram) -> None:
    """Leave out where the code lay and the examples that were traced, which torch would store as a pickle."""
    program.example_inputs = None
    for graph in program.graph_module.modules():
        if isinstance(graph, torch.fx.GraphModule):
            for node in graph.graph.nodes:
                for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node"):
                    node.meta.pop(key, None)


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings, log lines and prints of what writes a format, which are for its authors."""
    root = logging.getLogger()
    before = root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
