"""`hpo export --compare`: what each format of a model costs and what it scores, measured here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpo.data.parts import Padded, tensors_of
from hpo.deploy.exported import ExportedModel
from hpo.deploy.exporters import COMPRESSIONS, find_exporter
from hpo.deploy.results import FormatRow, Formats
from hpo.errors import ExportError, UsageError
from hpo.files import size_of, temporary_folder
from hpo.session.export import choose, describe, load_with_data, write
from hpo.training.evaluation import evaluate
from hpo.training.losses import target_scale
from hpo.training.trained import BEST_WEIGHTS

if TYPE_CHECKING:
    from hpo.deploy.exportable import Exportable

LATENCY_SIZES = (1, 64)

_WARM_UP_CALLS = 3
_MIN_CALLS = 10
_TIME_S = 1.0  # for each latency

_COMPARED = (("pt2", None), ("onnx", None), *(("onnx", each) for each in COMPRESSIONS))


def compare_formats(
    study: str, *, trial: int | None = None, tell: Callable[[str], None] = lambda text: None, **machine_options: Any
) -> Formats:
    """Score, size and latency on the CPU of the checkpoint and of each format. Nothing is kept."""
    chosen = choose(study, trial=trial, **machine_options)
    if chosen.objective.train:
        raise UsageError(f"task '{chosen.objective.name}' has a training loop of its own, which saved no network.")
    loaded, splits, exportable = load_with_data(chosen)
    metric, scale = chosen.study.settings.metric, target_scale(splits.train, splits.spec)
    card = chosen.card()

    def measured(name: str, model: nn.Module, num_bytes: int) -> FormatRow:
        scores = evaluate(model, splits.validation, loaded.config, splits.spec, target_scale=scale)
        return FormatRow(name=name, score=scores[metric], num_bytes=num_bytes, latency_ms=_latencies(model, exportable))

    def of_format(name: str, compression: str | None) -> FormatRow:
        title = f"{name} {compression}" if compression else name
        tell(f"measuring {title}")
        with temporary_folder() as folder:
            try:
                exporter = find_exporter(name)
                facts = describe(chosen, exportable, exporter.runtime, compression)
                write(exporter, exportable, Path(folder), facts, card)
            except (ExportError, UsageError) as error:
                return FormatRow(name=title, score=None, num_bytes=0, latency_ms={}, problem=str(error))
            return measured(title, ExportedNetwork(Path(folder), exportable), size_of(Path(folder)))

    tell("measuring the checkpoint")
    checkpoint = measured("checkpoint", loaded.model, (chosen.folder / BEST_WEIGHTS).stat().st_size)
    return Formats(
        study=study,
        trial=chosen.trial,
        metric=metric,
        num_examples=len(splits.validation),
        num_threads=torch.get_num_threads(),
        rows=(checkpoint, *(of_format(*each) for each in _COMPARED)),
    )


class ExportedNetwork(nn.Module):
    """An export in place of the model that it was made of, so that it is judged as that is."""

    def __init__(self, folder: Path, exportable: Exportable) -> None:
        super().__init__()
        self.exported = ExportedModel(folder)
        self.names = [port.name for port in exportable.inputs]
        self.own = exportable.model.own
        self.returns_lengths = [port.name for port in exportable.outputs] == ["logits", "output_lengths"]
        if exportable.model.spec.kind == "multilabel":
            self.register_buffer("thresholds", exportable.model.thresholds)

    def forward(self, inputs: Any) -> Any:
        arrays = [tensor.numpy() for tensor in tensors_of(inputs)]
        outputs = [torch.from_numpy(each) for each in self.exported.raw(dict(zip(self.names, arrays, strict=True)))]
        if self.returns_lengths:
            return Padded(*outputs)
        return outputs[0]


def _latencies(model: nn.Module, exportable: Exportable) -> dict[int, float]:
    return {size: _latency(model, exportable, size) for size in LATENCY_SIZES}


@torch.no_grad()
def _latency(model: nn.Module, exportable: Exportable, size: int) -> float:
    """Median time of a call in ms."""
    batch, _ = exportable.validation.select(slice(0, size)).in_memory().batch(slice(None))
    for _ in range(_WARM_UP_CALLS):
        model(batch)
    times: list[float] = []
    end = time.perf_counter() + _TIME_S
    while len(times) < _MIN_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        model(batch)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
