"""`hpo export`: a study's best model in a format for people who do not have hpo."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from torch import Tensor

from hpo import __version__
from hpo.deploy.code import copy_code
from hpo.deploy.exportable import make_exportable
from hpo.deploy.exported import LOADER, SIGNATURE, described
from hpo.deploy.exporters import find_exporter, write_weights
from hpo.deploy.load import choose_trial, download_trial, load_from_folder, saved_model
from hpo.deploy.results import Export
from hpo.deploy.verify import NUM_CHECKED, TOLERANCE, check_outputs, check_weights
from hpo.errors import ExportError, UsageError
from hpo.files import size_of, write_atomically
from hpo.provenance import sessions
from hpo.records import to_plain
from hpo.search.winner import find_winner
from hpo.session.card import model_card
from hpo.session.options import checked
from hpo.session.preparation import read_data, split
from hpo.session.request import agreed_tracking_uri, request_of_study, this_machine
from hpo.tracking.store import open_store
from hpo.training.trained import TrialDescription

if TYPE_CHECKING:
    import pandas as pd

    from hpo.data.datasets import Splits
    from hpo.data.examples import Dataset
    from hpo.data.preprocessing import Preprocessing
    from hpo.deploy.exportable import Exportable
    from hpo.deploy.exporters import Exporter
    from hpo.deploy.load import LoadedTrial
    from hpo.objective import Objective
    from hpo.records import Winner
    from hpo.search.study import Study
    from hpo.session.request import Request
    from hpo.tracking.store import TrackingStore

CARD = "MODEL_CARD.md"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A trial of a study, and what its model can be exported with."""

    request: Request
    study: Study
    store: TrackingStore
    trial: int
    is_refit: bool
    """Whether it is the model that was trained on training and validation examples together."""
    folder: Path
    """Its checkpoint."""

    @property
    def objective(self) -> Objective:
        return self.request.task.objective

    @property
    def winner(self) -> Winner | None:
        """The study's winner; None where the trial is another one, which has no test scores."""
        found = find_winner(self.study)
        return found if found and found.trial == self.trial else None

    def card(self) -> str:
        """The model card."""
        spec = TrialDescription.read(self.folder).spec
        kind = spec.kind if spec else None
        return model_card(self.study, self.objective, self.trial, winner=self.winner, kind=kind)


def export_best(
    study: str,
    *,
    format: str = "pt2",
    out: Path | None = None,
    trial: int | None = None,
    compress: str | None = None,
    force: bool = False,
    task: str | Objective | None = None,
    tell: Callable[[str], None] = lambda text: None,
    **machine_options: Any,
) -> Export:
    """Write the best model of a study, or of another `trial`, in a format that is used without hpo.

    `format` is pt2, onnx, mlflow, safetensors, or what an entry point or `module:factory` adds. `out` is the folder, by
    default one in the home. The model contains its preprocessing and takes batches of any size. `signature.json` beside
    it names inputs, outputs and classes. The export is run on 256 validation examples in a process that can import
    neither hpo nor the task, and must be equal to the checkpoint within 1e-5. `compress` is fp16 or int8, for onnx;
    outputs then differ, and are not judged. `task` says where the task is now, if it has moved. The other parameters
    are the options of `hpo export`.

    Raises UsageError if something given is wrong, ExportError for a model that has no such form, CheckpointError for
    damage.
    """
    exporter = find_exporter(format)
    if compress and compress not in exporter.compressions:
        allowed = ", ".join(exporter.compressions) or "none"
        raise UsageError(f"--compress {compress} is not possible with --format {format}; allowed: {allowed}.")
    chosen = choose(study, trial=trial, task=task, **machine_options)
    folder = Path(out) if out else chosen.request.machine.home.study(study).exported(_folder_name(exporter, compress))
    require_free(folder, force=force)
    tell("reading the data")
    if chosen.objective.train:
        return _export_weights(chosen, exporter, folder, force=force)
    _, splits, exportable = load_with_data(chosen)
    facts = describe(chosen, exportable, exporter.runtime, compress)
    tell(f"writing {format}")
    with whole_or_not_at_all(folder, force=force) as aside:
        write(exporter, exportable, aside, facts, chosen.card())
        tell("checking it without hpo")
        difference = check_export(exporter, aside, exportable, chosen.objective, compress)
    return Export(
        study=study,
        trial=chosen.trial,
        format=format,
        compression=compress,
        folder=folder,
        num_bytes=size_of(folder),
        difference=difference,
        num_checked=0 if exporter.is_of_weights else min(NUM_CHECKED, len(splits.validation)),
    )


def check_export(
    exporter: Exporter, folder: Path, exportable: Exportable, objective: Objective, compression: str | None
) -> float | None:
    """The largest difference from the checkpoint. Raises ExportError if it is more than may be."""
    forbidden = forbidden_modules(objective)
    if exporter.is_of_weights:
        check_weights(exporter, folder, exportable.model.state_dict(), forbidden)
        return None
    difference = check_outputs(exporter, folder, exportable, forbidden)
    if math.isnan(difference) or (difference > TOLERANCE and not compression):
        raise ExportError(
            f"the export of format {exporter.name} differs from the checkpoint by {difference:.1e} of its largest "
            f"output, and {TOLERANCE:.0e} is allowed; nothing was written."
        )
    return difference


def choose(study: str, *, trial: int | None, task: str | Objective | None = None, **machine_options: Any) -> Chosen:
    """The trial whose model is wanted. Raises UsageError if there is none."""
    machine = this_machine(checked({**machine_options, "study": study}))
    request, opened = request_of_study(machine, study, task)
    number, is_refit = choose_trial(opened, trial)
    store = open_store(machine.home.path, agreed_tracking_uri(machine, opened))
    folder = download_trial(store, opened, number, is_refit=is_refit)
    return Chosen(request=request, study=opened, store=store, trial=number, is_refit=is_refit, folder=folder)


def load_with_data(chosen: Chosen) -> tuple[LoadedTrial, Splits, Exportable]:
    """The model, on the CPU, the data that its study was searched with, and what an exporter takes."""
    loaded = load_from_folder(chosen.folder, chosen.study, chosen.trial, "cpu", chosen.objective)
    dataset = read_data(chosen.request)
    assert dataset is not None, "the task has no training loop of its own"
    splits = split(dataset, chosen.request)
    raw = _raw_examples(dataset, loaded.model.spec.preprocessing)
    return loaded, splits, make_exportable(loaded.model, splits.train, splits.validation, raw)


def _raw_examples(dataset: Dataset, preprocessing: Preprocessing | None) -> pd.DataFrame | None:
    """The first training examples as they came, in the columns that the model takes."""
    if preprocessing is None or dataset.raw is None or not isinstance(dataset.train.inputs, Tensor):
        return None
    return dataset.raw.frame.iloc[dataset.train.inputs[:2].numpy()][preprocessing.raw_columns]


def write(exporter: Exporter, exportable: Exportable, folder: Path, facts: Mapping[str, Any], card: str) -> None:
    """The model, its signature and its card in an empty folder."""
    exporter.write(exportable, folder, facts)
    if exportable.raw is not None and not exporter.takes_rows and not exporter.is_of_weights:
        copy_code(folder)
    _write_texts(folder, facts, card if exporter.is_of_weights else card + _how_to_run(exporter, exportable))


def _how_to_run(exporter: Exporter, exportable: Exportable) -> str:
    """The code with which an export is checked, for whoever has nothing but the folder."""
    if exportable.raw is not None and (exporter.takes_rows or exporter.runtime):
        return _how_to_run_with_rows(exporter, list(exportable.raw.columns))
    takes = ", ".join(f"`{each.name}` ({each.dtype} {described(each.shape)})" for each in exportable.inputs)
    returns = ", ".join(f"`{each.name}` ({each.dtype} {described(each.shape)})" for each in exportable.outputs)
    names = ", ".join(f'"{each.name}": {each.name}' for each in exportable.inputs)
    return (
        f"\n## How to run it\n\nIt takes NumPy arrays, {takes}, and returns {returns}; `signature.json` says the same, "
        "and names the classes if there are any. The export was checked with this code:\n\n"
        f'```python\n{exporter.load.strip()}\n\n\noutputs = load(".")({{{names}}})\n```\n'
    )


def _how_to_run_with_rows(exporter: Exporter, columns: Sequence[str]) -> str:
    example = f'# with the columns {", ".join(columns)}; sep=";" if that separates them\n'
    example += 'rows = pd.read_csv("new.csv", dtype=str, keep_default_na=False)'
    if exporter.takes_rows:
        code = f'import mlflow.pyfunc\nimport pandas as pd\n\nmodel = mlflow.pyfunc.load_model(".")\n{example}\n'
        code += "answers = model.predict(rows)"
    else:
        code = f"import pandas as pd\nfrom {LOADER} import ExportedModel, encode  # in this folder\n\n"
        code += f'model = ExportedModel(".")\n{example}\n'
        code += 'answers = model.answers(encode(model.signature["preprocessing"], rows))'
    return (
        "\n## How to run it\n\nIt takes rows as they are written in a file, and each answer has a `prediction`, "
        f"classifiers also `probabilities` by class:\n\n```python\n{code}\n```\n"
    )


def describe(chosen: Chosen, exportable: Exportable, runtime: str, compression: str | None) -> dict[str, Any]:
    """The signature: what goes in, what comes out, what it means and where it comes from."""
    spec, winner = exportable.model.spec, chosen.winner
    return _origin(chosen) | {
        "runtime": runtime,
        "compression": compression,
        "kind": spec.kind,
        "classes": list(spec.classes),
        "preprocessing": spec.preprocessing.to_dict() if spec.preprocessing else None,
        "thresholds": exportable.model.thresholds.tolist() if spec.kind == "multilabel" else None,
        "inputs": [asdict(port) for port in exportable.inputs],
        "outputs": [asdict(port) for port in exportable.outputs],
        "test": winner.test if winner else None,
    }


def forbidden_modules(objective: Objective) -> set[str]:
    """What a user of the export does not have: hpo, and the packages of the task."""
    modules = {"hpo", "objectives", "search_spaces"}
    functions = (objective.load, objective.model, objective.train)
    of_task = {str(getattr(function, "__module__", "")).partition(".")[0] for function in functions if function}
    return modules | of_task - sys.stdlib_module_names - _LIBRARIES - {"", "__main__"}


_LIBRARIES = {"torch", "torchvision", "numpy", "transformers", "lightning"}
"""Packages that a task's functions may come from and a user of the export may have."""


def require_free(folder: Path, *, force: bool) -> None:
    """Raise UsageError if something is in the way that may not be replaced."""
    if not folder.resolve().name:
        raise UsageError(f"{folder} cannot be replaced; choose another folder with --out.")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / SIGNATURE).exists() or not folder.is_dir():
        raise UsageError(f"{folder} exists and is not an export; choose another folder with --out.")
    if not force:
        raise UsageError(f"{folder} holds an export already; replace it with --force, or choose another with --out.")


@contextmanager
def whole_or_not_at_all(folder: Path, *, force: bool) -> Iterator[Path]:
    """A folder aside, which takes its place when all is well; what was there before then stays as it is until then.

    Raises UsageError if another process has put something there meanwhile that may not be replaced.
    """
    folder = folder.resolve()  # of a link, what it leads to
    aside = folder.with_name(f".{folder.name}.{uuid4().hex}.tmp")
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}; choose another folder with --out.") from error
    try:
        yield aside
        _fsync_all(aside)
        require_free(folder, force=force)
        old = folder.with_name(f"{aside.name}.old")
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _export_weights(chosen: Chosen, exporter: Exporter, folder: Path, *, force: bool) -> Export:
    """The state dict that a training loop of the task's own has saved."""
    name = chosen.objective.name
    if not exporter.is_of_weights:
        raise ExportError(
            f"task '{name}' has a training loop of its own (train=), which saved a state dict and no network; "
            "use --format safetensors."
        )
    weights = saved_model(chosen.folder)
    wrong = [key for key, value in weights.items() if not hasattr(value, "untyped_storage")]
    if wrong:
        raise ExportError(
            f"what task '{name}' gave to trial.save_model holds '{wrong[0]}', a {type(weights[wrong[0]]).__name__}; "
            "safetensors hold tensors alone."
        )
    facts = _origin(chosen) | {"runtime": "", "compression": None}
    with whole_or_not_at_all(folder, force=force) as aside:
        write_weights(weights, aside, facts)
        _write_texts(aside, facts, chosen.card())
        check_weights(exporter, aside, weights, forbidden_modules(chosen.objective))
    return Export(
        study=chosen.study.name,
        trial=chosen.trial,
        format=exporter.name,
        compression=None,
        folder=folder,
        num_bytes=size_of(folder),
        difference=None,
        num_checked=0,
    )


def _origin(chosen: Chosen) -> dict[str, Any]:
    study, description = chosen.study, TrialDescription.read(chosen.folder)
    found = sessions(study)
    record = study.trial(chosen.trial)
    return {
        "hpo": __version__,
        "task": chosen.objective.name,
        "study": study.name,
        "trial": chosen.trial,
        "is_refit": chosen.is_refit,
        "metric": study.settings.metric,
        "validation": to_plain(record.value),
        "parameters": description.model_parameters,
        "data": found[-1].data if found else "",
        "versions": found[-1].versions if found else {},
        "weights_sha256": description.weights_sha256,
    }


def _write_texts(folder: Path, facts: Mapping[str, Any], card: str) -> None:
    write_atomically(folder / SIGNATURE, json.dumps(dict(facts), indent=2).encode())
    write_atomically(folder / CARD, card.encode())


def _folder_name(exporter: Exporter, compression: str | None) -> str:
    name = exporter.name.replace(":", ".")
    return f"{name}-{compression}" if compression else name


def _fsync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
