"""Models leave the house: every format holds what the checkpoint does, and is run where hpo cannot be imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import partial
from importlib.metadata import files, requires, version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.homes import copy_database
from hpo.objectives.digits import load as load_digits
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.parts import Padded, Ragged
from hpo.deploy.exportable import FlatModel, make_exportable
from hpo.deploy.exported import ExportedModel
from hpo.deploy.exporters import Exporter, find_exporter
from hpo.deploy.load import load_best
from hpo.deploy.recurrences import as_loops
from hpo.deploy.results import Export
from hpo.deploy.verify import check_outputs
from hpo.errors import ExportError, UnknownNameError, UsageError
from hpo.models.networks import convnet, convnet1d, mlp, recurrent, tabular, transformer
from hpo.models.preprocessed import PreprocessedModel
from hpo.plugins import load_objective
from hpo.session import formats
from hpo.session.export import check_export, export_best
from hpo.session.formats import compare_formats
from hpo.session.search import run_search

pytestmark = pytest.mark.xdist_group("export")  # the exports are made once

EXAMPLES = Path(__file__).parent.parent / "examples" / "deploy"
FORMATS = ("pt2", "onnx", "mlflow", "safetensors")
NOT_OURS = "/".join(("", "(?:work|home|root|tmp|usr)", ""))  # an absolute path of a machine


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Path:
    """A home with one small search of the digits."""
    home = tmp_path_factory.mktemp("searched")
    copy_database(mlflow_template, home / "mlflow.db")
    run_search("digits", trials=1, epochs=2, workers=1, home=home)
    return home


@pytest.fixture(scope="module")
def exports(searched: Path) -> dict[str, Export]:
    """That search's model in each format."""
    return {name: export_best("digits", format=name, home=searched) for name in FORMATS}


# --- a search's model -------------------------------------------------------------------------------------------------


def test_each_format_equals_the_checkpoint_in_a_process_without_hpo(exports: dict[str, Export]) -> None:
    for name in ("pt2", "onnx", "mlflow"):
        assert exports[name].difference is not None
        assert exports[name].difference <= 1e-5
        assert exports[name].num_checked == 256
    assert exports["safetensors"].difference is None


STRANGER = """
import importlib.util, json, sys
assert importlib.util.find_spec("hpo") is None and importlib.util.find_spec("objectives") is None
sys.addaudithook(lambda event, _: sys.exit(f"it uses {event}") if event == "socket.connect" else None)
import numpy as np, onnxruntime, torch, mlflow.pyfunc
from safetensors.torch import load_file
folders, images = json.loads(sys.argv[1]), np.load(sys.argv[2])
classes = json.load(open(folders["pt2"] + "/signature.json"))["classes"]
def named(logits): return [classes[index] for index in np.asarray(logits).argmax(1)]
print(json.dumps({
    "pt2": named(torch.export.load(folders["pt2"] + "/model.pt2").module()(torch.from_numpy(images))[0].detach()),
    "onnx": named(onnxruntime.InferenceSession(folders["onnx"] + "/model.onnx").run(None, {"inputs": images})[0]),
    "mlflow": [each["prediction"] for each in mlflow.pyfunc.load_model(folders["mlflow"]).predict(images)],
    "safetensors": sorted(load_file(folders["safetensors"] + "/model.safetensors")),
}))
"""


def make_environment(folder: Path) -> Path:
    """The Python of a new virtual environment with MLflow's small package, onnxruntime and PyTorch; without hpo.

    PyTorch is not installed again, which would take gigabytes: what it consists of and needs is linked.
    """
    uv = shutil.which("uv")
    assert uv, "these tests need uv: pip install uv"
    python = folder / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)], check=True)
    pinned = [f"{name}=={version(name)}" for name in ("mlflow-skinny", "pandas", "onnxruntime", "safetensors")]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *pinned], check=True)
    site, ours = next((folder / "lib").glob("python*/site-packages")), Path(torch.__file__).parent.parent
    for name in {path.parts[0] for package in needed_by("torch") for path in files(package)} - {"..", "__pycache__"}:
        if not (site / name).exists():
            (site / name).symlink_to(ours / name)
    return python


def needed_by(package: str, known: frozenset[str] = frozenset()) -> frozenset[str]:
    """An installed package and what it requires here, directly or not."""
    known |= {package}
    for line in requires(package) or []:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        if name not in known and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            known |= needed_by(name, known)
    return known


def test_a_stranger_loads_every_format_and_predicts(exports: dict[str, Export], searched: Path, tmp_path: Path) -> None:
    model, images = load_best("digits", home=searched), load_digits(Path()).train.inputs[:5]
    np.save(tmp_path / "images.npy", images.numpy())
    folders = json.dumps({name: str(done.folder) for name, done in exports.items()})
    python = make_environment(tmp_path / "venv")
    command = [str(python), "-IB", "-c", STRANGER, folders, str(tmp_path / "images.npy")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    predicted = json.loads(done.stdout.splitlines()[-1])
    for name in ("pt2", "onnx", "mlflow"):
        assert predicted[name] == model.predict(images), name
    assert predicted["safetensors"] == sorted(model.state_dict())


def test_an_export_holds_no_pickle_and_no_path_of_this_machine(exports: dict[str, Export]) -> None:
    contents: dict[str, bytes] = {}
    for done in exports.values():
        for path in done.folder.rglob("*"):
            if path.is_file() and not zipfile.is_zipfile(path):
                contents[str(path)] = path.read_bytes()
            elif path.is_file():
                with zipfile.ZipFile(path) as archive:
                    contents |= {f"{path}/{name}": archive.read(name) for name in archive.namelist()}
    assert any(name.endswith("models/model.json") for name in contents), "the archive was opened"
    for name, content in contents.items():
        assert not name.endswith((".pkl", ".pyc")), name
        assert not content.startswith(b"\x80\x02"), name
        assert not content.startswith(b"PK"), f"{name} is an archive in an archive, as torch.save writes"
        assert not re.search(NOT_OURS.encode(), content), name


def test_the_signature_and_the_card_say_what_the_model_is(exports: dict[str, Export]) -> None:
    for done in exports.values():
        signature = json.loads((done.folder / "signature.json").read_text())
        assert signature["classes"] == [str(digit) for digit in range(10)]
        assert signature["inputs"] == [{"name": "inputs", "dtype": "uint8", "shape": ["batch", 1, 8, 8]}]
        assert signature["outputs"] == [{"name": "logits", "dtype": "float32", "shape": ["batch", 10]}]
        card = (done.folder / "MODEL_CARD.md").read_text()
        assert signature["data"] in card
        assert "Test split: accuracy" in card
    mlmodel = (exports["mlflow"].folder / "MLmodel").read_text()
    assert '"dtype": "uint8", "shape": [-1, 1' in mlmodel
    requirements = (exports["mlflow"].folder / "requirements.txt").read_text().split()
    assert [line.partition("==")[0] for line in requirements] == ["mlflow", "torch", "numpy"]


@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_the_code_in_the_card_runs_the_model(
    exports: dict[str, Export], searched: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = load_digits(Path()).train.inputs[:7]
    monkeypatch.chdir(exports[form].folder)
    (code,) = re.findall(r"```python\n(.*?)```", Path("MODEL_CARD.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"inputs": images.numpy()}
    exec(code, names)
    expected = load_best("digits", home=searched)(images)
    torch.testing.assert_close(torch.from_numpy(names["outputs"][0]), expected, atol=1e-5, rtol=1e-5)


def test_names_and_probabilities_are_those_of_the_checkpoint(exports: dict[str, Export], searched: Path) -> None:
    from hpo.deploy.load import load_best

    model, images = load_best("digits", home=searched), load_digits(Path()).train.inputs[:7]
    answers = ExportedModel(exports["onnx"].folder).answers({"inputs": images.numpy()})
    assert [each["prediction"] for each in answers] == model.predict(images)
    shares = torch.tensor([list(each["probabilities"].values()) for each in answers])
    assert torch.allclose(shares.float(), model.probabilities(images), atol=1e-5)


def test_a_folder_is_replaced_only_by_force_and_only_if_it_is_an_export(searched: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_best("digits", format="safetensors", home=searched, out=out)
    before = (out / "model.safetensors").stat().st_ino
    with pytest.raises(UsageError, match="--force"):
        export_best("digits", format="safetensors", home=searched, out=out)
    assert (out / "model.safetensors").stat().st_ino == before
    (link := tmp_path / "link").symlink_to(out)
    export_best("digits", format="safetensors", home=searched, out=link, force=True)
    assert link.is_symlink()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    link.unlink()
    with pytest.raises(UsageError, match=r"^/ cannot be replaced; choose another folder"):
        export_best("digits", format="safetensors", home=searched, out=Path("/"))
    assert (out / "model.safetensors").stat().st_ino != before
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "to_mother.txt").write_text("Dear mother")
    with pytest.raises(UsageError, match="is not an export"):
        export_best("digits", format="safetensors", home=searched, out=tmp_path / "letters", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["letters", "out"], "nothing is left aside"


def test_an_export_that_differs_is_not_written(searched: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"differs from the checkpoint by 1\.0e\+00"):
        export_best("digits", format="test_export:wrong_format", home=searched, out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def wrong_format() -> Exporter:
    """One of a stranger's own, whose outputs are all zero."""
    load = "import numpy as np\ndef load(folder): return lambda inputs: [np.zeros((len(inputs['inputs']), 10))]"
    return Exporter(name="wrong", write=lambda exportable, folder, signature: None, load=load)


def test_what_cannot_be_asked_for_is_told_before_anything_is_read(searched: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'onnx'"):
        export_best("digits", format="onxx", home=searched)
    with pytest.raises(UsageError, match="--compress int8 is not possible with --format pt2"):
        export_best("digits", format="pt2", compress="int8", home=searched)
    with pytest.raises(UsageError, match="has no trial 7"):
        export_best("digits", trial=7, home=searched)


@pytest.mark.parametrize("how", ["fp16", "int8"])
def test_a_compressed_model_is_smaller_and_nearly_as_good(exports: dict[str, Export], searched: Path, how: str) -> None:
    done = export_best("digits", format="onnx", compress=how, home=searched)
    assert done.num_bytes < 0.8 * exports["onnx"].num_bytes
    assert done.difference is not None
    assert 0 < done.difference < 0.3  # processors round int8 differently: 0.21 with AVX2 alone


def test_formats_are_compared_with_score_size_and_latency(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_TIME_S", 0.01)
    found = compare_formats("digits", home=searched)
    assert [row.name for row in found.rows] == ["checkpoint", "pt2", "onnx", "onnx fp16", "onnx int8"]
    assert [row.problem for row in found.rows] == [None] * 5
    scores = [row.score for row in found.rows]
    assert scores[0] == scores[1] == scores[2]
    assert scores[4] == pytest.approx(scores[0], abs=0.05)
    assert all(set(row.latency_ms) == {1, 64} for row in found.rows)


def test_the_examples_of_deployment_answer(exports: dict[str, Export], searched: Path, tmp_path: Path) -> None:
    from hpo.deploy.load import load_best

    model, images = load_best("digits", home=searched), load_digits(Path()).train.inputs[:5]
    np.save(tmp_path / "images.npy", images.numpy())
    script = [EXAMPLES / "predict.py", exports["pt2"].folder, tmp_path / "images.npy"]
    done = subprocess.run([sys.executable, "-I", *script], capture_output=True, text=True, check=False, timeout=200)
    assert [line.split()[0] for line in done.stdout.splitlines()] == model.predict(images), done.stderr
    code = (
        "import sys; sys.path.append(sys.argv[1]); import app, json\n"
        "print(json.dumps(app.predict(json.loads(sys.argv[2]))))\n"
        "try: app.predict([[1]])\n"
        "except app.HTTPException as error: print(error.status_code, error.detail)"
    )
    done = subprocess.run(
        [sys.executable, "-Ic", code, EXAMPLES, json.dumps(images.tolist())],
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
        env={**os.environ, "EXPORT": str(exports["onnx"].folder)},
    )
    answered, refused = done.stdout.splitlines()
    assert json.loads(answered) == model.predict(images), done.stderr
    assert refused == "400 give uint8 of shape ['batch', 1, 8, 8]"


# --- kinds of data ----------------------------------------------------------------------------------------------------

LENGTHS = [3, 1, 5, 2, 4, 2, 1, 3]
TOKENS = Ragged.of([list(range(1, length + 1)) for length in LENGTHS])
LETTERS = ("a", "b", "c")


def trained(inputs: Any, targets: Any, network: Callable[..., nn.Module], **about: Any) -> PreprocessedModel:
    """A network of random weights, with the statistics of its data."""
    split = Split(inputs, targets)
    spec = Dataset(split, SealedSplit(lambda: split, len(split)), **about).spec
    torch.manual_seed(0)
    model = PreprocessedModel(network(spec), spec).eval()
    model.fit_statistics(split)
    return model


class OfTwo(nn.Module):
    """A network for a picture and numbers."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.output = nn.Linear(12 + 3, 3)

    def forward(self, inputs: Any) -> torch.Tensor:
        return self.output(torch.cat((inputs["picture"].flatten(1), inputs["numbers"]), dim=1))


class Pixels(nn.Module):
    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.output = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.output(images)


class Reads(nn.Module):
    """Answers for each element, as a transcription does, and says how long its answers are."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)

    def forward(self, inputs: Padded) -> Padded:
        return Padded(self.embedding(inputs.values), inputs.lengths)


def pictures(side: int = 8) -> torch.Tensor:
    return torch.randint(0, 256, (8, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


ONE_OF_THREE = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])


def kind(inputs: Any, targets: Any, network: Callable[..., nn.Module], **about: Any) -> Any:
    return inputs, targets, network, about


CASES = {
    "images": kind(pictures(), ONE_OF_THREE, convnet, classes=LETTERS),
    "vectors": kind(torch.randn(8, 4), torch.randn(8, 2), mlp),
    "tables": kind(torch.arange(16).view(8, 2) % 3, ONE_OF_THREE, tabular, classes=LETTERS),
    "tokens": kind(TOKENS, ONE_OF_THREE, transformer, classes=LETTERS),
    "several labels": kind(torch.randn(8, 4), (torch.arange(24).view(8, 3) % 2), mlp, classes=LETTERS),
    "masks": kind(pictures(), torch.zeros(8, 8, 8, dtype=torch.int64), Pixels, classes=LETTERS),
    "elements": kind(TOKENS, Ragged.of([[0] * n for n in LENGTHS]), transformer, classes=LETTERS),
    "an LSTM": kind(TOKENS, ONE_OF_THREE, recurrent, classes=LETTERS),
    "a GRU of elements": kind(
        TOKENS, Ragged.of([[0] * n for n in LENGTHS]), partial(recurrent, cell="gru", depth=2), classes=LETTERS
    ),
    "sequences of one length": kind(torch.randn(8, 6, 3), ONE_OF_THREE, convnet1d, classes=LETTERS),
    "transcriptions": kind(TOKENS, Ragged.of([[0]] * 8), Reads, classes=LETTERS, kind="transcription"),
    "several inputs": kind(
        {"picture": pictures(2), "numbers": torch.randn(8, 3)}, ONE_OF_THREE, OfTwo, classes=LETTERS
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_every_kind_of_data_is_exported(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs, targets, network, about = CASES[name]
    model, split = trained(inputs, targets, network, **about), Split(inputs, targets)
    exportable = make_exportable(model, split, split)
    ports = {
        "runtime": form,
        "kind": model.spec.kind,
        "classes": list(model.classes),
        "thresholds": model.thresholds.tolist() if model.spec.kind == "multilabel" else None,
        "inputs": [vars(port) for port in exportable.inputs],
    }
    find_exporter(form).write(exportable, tmp_path, {})
    assert capsys.readouterr() == ("", "")
    (tmp_path / "signature.json").write_text(json.dumps(ports))
    exported = ExportedModel(tmp_path)
    names = [port.name for port in exportable.inputs]
    for size in (1, 3, 8):
        for batch in exportable.batches(split, 8, size):
            arrays = {name: tensor.numpy() for name, tensor in zip(names, batch, strict=True)}
            with torch.no_grad():
                expected = FlatModel(model)(*batch)
            for one, other in zip(exported.raw(arrays), expected, strict=True):
                assert np.allclose(one, other.numpy(), atol=1e-5, rtol=1e-5)
    answers = [each["prediction"] for each in exported.answers(arrays)]
    said = model.predict(split.batch(slice(None))[0])
    first = said[0] or [""] if isinstance(said[0], list) else [said[0]]  # there may be no label
    if isinstance(first[0], float | torch.Tensor):
        assert np.allclose(np.array(answers), np.array([np.asarray(each) for each in said]), atol=1e-4)
    else:
        assert answers == said


# --- what has no graph ------------------------------------------------------------------------------------------------


class LooksAtItsData(nn.Module):
    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.output = nn.Linear(4, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if inputs.sum() > 0:
            return self.output(inputs)
        return -self.output(inputs)


def test_python_that_depends_on_the_data_is_named_with_its_line() -> None:
    inputs, targets = torch.randn(8, 4), torch.randn(8, 2)
    exportable = make_exportable(
        trained(inputs, targets, LooksAtItsData), Split(inputs, targets), Split(inputs, targets)
    )
    with pytest.raises(ExportError, match=r"test_export\.py:\d+ in forward: `if inputs\.sum\(\) > 0:`"):
        exportable.export()


@torch.no_grad()
@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_is_the_same_as_a_loop(make: Any) -> None:
    layer, values = make(5, 7, num_layers=2, bidirectional=True, bias=False).eval(), torch.randn(4, 6, 5)
    state = torch.randn(4, 6, 7)
    given = (values, (state, -state) if make is nn.LSTM else state)
    expected = layer(*given)
    with as_loops(layer):
        found = layer(*given)
    torch.testing.assert_close(found, expected)
    assert "forward" not in vars(layer)


class Plain(nn.Module):
    """A layer that has no loop."""

    def __init__(self, spec: Any) -> None:
        super().__init__()
        self.layer = nn.RNN(1, 3, batch_first=True)

    def forward(self, inputs: Padded) -> torch.Tensor:
        return self.layer(inputs.values[..., None].float())[0][:, 0]


def test_a_recurrent_layer_that_has_no_loop_is_named() -> None:
    split = Split(TOKENS, ONE_OF_THREE)
    exportable = make_exportable(trained(TOKENS, ONE_OF_THREE, Plain, classes=LETTERS), split, split)
    with pytest.raises(ExportError, match=r"model\.network\.layer is an RNN, .* safetensors, or an nn\.GRU"):
        exportable.export()


def test_an_export_that_needs_the_task_is_refused(tmp_path: Path) -> None:
    inputs, targets = torch.randn(8, 4), torch.randn(8, 2)
    exportable = make_exportable(trained(inputs, targets, mlp), Split(inputs, targets), Split(inputs, targets))
    for line, what in (
        ("import hpo.space", "must not need hpo"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "must not use the network"),
        ("import pickle, io; pickle.loads(pickle.dumps(io.BytesIO))", "must not hold a pickle"),
    ):
        exporter = Exporter(name="own", write=lambda *_: None, load=f"def load(folder):\n    {line}")
        with pytest.raises(ExportError, match=what):
            check_outputs(exporter, tmp_path, exportable, {"hpo"})


@pytest.mark.parametrize("compression", [None, "int8"])
def test_an_export_that_returns_nan_is_refused(tmp_path: Path, compression: str | None) -> None:
    inputs, targets = torch.randn(8, 4), torch.randn(8, 2)
    model = trained(inputs, targets, mlp)
    exportable = make_exportable(model, Split(inputs, targets), Split(inputs, targets))
    broken = "def load(folder):\n    return lambda inputs: [0 * next(iter(inputs.values()))[:, :2] / 0]"
    exporter = Exporter(name="own", write=lambda *_: None, load=broken)
    with pytest.raises(ExportError, match="differs from the checkpoint by nan"):
        check_export(exporter, tmp_path, exportable, load_objective("digits"), compression)
