"""Each export is run in a process that can import neither hpo nor the task, and compared."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hpo.deploy import standalone
from hpo.errors import ExportError
from hpo.files import temporary_folder

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from hpo.deploy.exportable import Exportable
    from hpo.deploy.exporters import Exporter

NUM_CHECKED = 256
BATCH_SIZES = (1, 3, 64)
TOLERANCE = 1e-5
"""Largest difference from the checkpoint, as a share of the largest output where that is above 1."""

_TIMEOUT_S = 600.0


def check_outputs(exporter: Exporter, folder: Path, exportable: Exportable, forbidden: Iterable[str]) -> float:
    """The largest difference of the outputs from the checkpoint's, for 256 examples in batches of 1, 3 and 64.

    NaN if either has NaN. Raises ExportError if the export cannot be run, or returns other shapes.
    """
    batches = [batch for size in BATCH_SIZES for batch in exportable.batches(exportable.validation, NUM_CHECKED, size)]
    names = [port.name for port in exportable.inputs]
    arrays = {
        f"{number}/{name}": tensor.numpy()
        for number, batch in enumerate(batches)
        for name, tensor in zip(names, batch, strict=True)
    }
    with torch.inference_mode():
        expected = {
            f"{number}/{index}": output.numpy()
            for number, batch in enumerate(batches)
            for index, output in enumerate(exportable.module(*batch))
        }
    found = run_standalone(exporter, folder, arrays, forbidden)
    differences = []
    for key, right in expected.items():
        if key not in found or found[key].shape != right.shape:
            shape = found[key].shape if key in found else None
            raise ExportError(f"the export of format {exporter.name} returns {shape} in place of {right.shape}.")
        differences.append(_difference(found[key].astype(np.float64), right))
    return float(np.max(differences))


def _difference(found: NDArray[Any], right: NDArray[Any]) -> float:
    """The largest, as a share of the largest finite output if that is above 1; equal infinities do not differ."""
    scale = np.abs(right[np.isfinite(right)]).max(initial=1.0)
    differs = found != right
    return float(np.abs(found[differs] - right[differs]).max(initial=0.0) / scale)


def check_weights(
    exporter: Exporter, folder: Path, weights: Mapping[str, torch.Tensor], forbidden: Iterable[str]
) -> None:
    """Raise ExportError if a weight is not the checkpoint's, byte for byte."""
    found = run_standalone(exporter, folder, {}, forbidden)
    for name, tensor in weights.items():
        right = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if name not in found or not np.array_equal(found[name], right):
            raise ExportError(f"the export of format {exporter.name} does not have the checkpoint's {name}.")


def run_standalone(
    exporter: Exporter, folder: Path, batches: Mapping[str, NDArray[Any]], forbidden: Iterable[str]
) -> dict[str, NDArray[Any]]:
    """What an export makes of batches. Raises ExportError with the last line of what the process said."""
    with temporary_folder() as work:
        given, found = Path(work) / "batches.npz", Path(work) / "outputs.npz"
        job = {
            "folder": str(folder.absolute()),
            "load": exporter.load,
            "preload": exporter.preload,
            "forbidden": sorted(forbidden),
            "batches": str(given),
            "outputs": str(found),
        }
        (Path(work) / "job.json").write_text(json.dumps(job), encoding="utf-8")
        np.savez(given, **batches)  # type: ignore[arg-type]
        command: Sequence[str] = [sys.executable, "-IB", standalone.__file__, f"{work}/job.json"]
        try:
            done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ExportError(f"the export of format {exporter.name} did not answer in {_TIMEOUT_S:.0f} s.") from error
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise ExportError(f"the export of format {exporter.name} cannot be run without hpo: {lines[-1].strip()}")
        with np.load(found) as stored:
            return dict(stored)
