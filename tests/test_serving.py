"""The winner in use: in MLflow's registry, asked for files, and behind a server; all from one small search."""

from __future__ import annotations

import ast
import csv
import http.client
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers.homes import copy_database
from helpers.searches import wait_until
from hpo.objectives.digits import load as load_digits
from PIL import Image
from rich.console import Console

from hpo.cli import cli
from hpo.config import Direction
from hpo.data.examples import DataSpec, InputSpec
from hpo.deploy.load import load_best
from hpo.deploy.predict import predict_files
from hpo.deploy.registry import Score, add_version, enter
from hpo.deploy.results import Registration
from hpo.errors import DataError, UsageError
from hpo.models.networks import mlp, transformer
from hpo.models.preprocessed import PreprocessedModel
from hpo.session.register import register_best
from hpo.session.search import run_search
from hpo.terminal.tables import print_registration
from hpo.tracking.store import TrackingStore, open_store

pytestmark = pytest.mark.xdist_group("serving")  # one search and one server for all

NUM_ASKED = 5


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Path:
    """A home with one small search of the digits, registered."""
    home = tmp_path_factory.mktemp("searched")
    copy_database(mlflow_template, home / "mlflow.db")
    run_search("digits", trials=1, epochs=2, workers=1, home=home)
    registered = register_best("digits", home=home)
    assert (registered.name, registered.version, registered.is_champion) == ("hpo-digits", 1, True)
    assert registered.tracking_uri == f"sqlite:///{home}/mlflow.db"
    return home


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return load_digits(Path()).train.inputs[:NUM_ASKED]


# --- MLflow's registry ------------------------------------------------------------------------------------------------

STRANGER = """
import json, sys
sys.path.append(sys.argv[1])
try:
    import hpo.space
except ImportError:
    import mlflow.pyfunc, numpy as np
    mlflow.set_tracking_uri(sys.argv[2])
    model = mlflow.pyfunc.load_model("models:/hpo-digits@champion")
    print(json.dumps([each["prediction"] for each in model.predict(np.load(sys.argv[3]))]))
"""


def test_the_champion_is_loaded_without_hpo_and_after_the_home_has_moved(
    searched: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    expected = load_best("digits", home=searched).predict(images)
    moved = tmp_path / "moved"
    shutil.copytree(searched, moved)
    store = open_store(moved)
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if "hpo" not in entry.name and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    np.save(tmp_path / "images.npy", images.numpy())
    kept = searched.rename(searched.with_name("away"))  # nothing is read from where it was
    try:
        command = [sys.executable, "-ISB", "-c", STRANGER, str(site), store.uri, str(tmp_path / "images.npy")]
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False, timeout=200
        )
    finally:
        kept.rename(searched)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_logged_model_is_its_runs_with_signature_example_requirements_and_card(searched: Path) -> None:
    client = open_store(searched).client
    version = client.get_model_version_by_alias("hpo-digits", "champion")
    logged = client.get_logged_model(version.source.removeprefix("models:/"))
    run = client.get_run(version.run_id)
    assert logged.source_run_id == run.info.run_id
    assert [output.model_id for output in run.outputs.model_outputs] == [logged.model_id]
    assert version.tags["hpo.protocol"].startswith("accuracy on the test split of ")
    assert "# digits: trial 0 of study digits" in version.description
    folder = Path(logged.artifact_location.removeprefix("file://"))
    assert np.array(json.loads((folder / "input_example.json").read_text())).shape == (2, 1, 8, 8)
    assert {"MLmodel", "MODEL_CARD.md", "requirements.txt", "signature.json"} <= {
        path.name for path in folder.iterdir()
    }


@pytest.mark.parametrize(
    ("promote", "value", "protocol", "is_champion", "why"),
    [
        ("if-better", 0.90, "accuracy of A", True, "there was no champion"),
        ("if-better", 0.85, "accuracy of A", False, "test score 0.8500, the champion (version 1) has 0.9000"),
        ("if-better", 0.99, "accuracy of B", False, "tested in another way"),
        ("if-better", None, None, False, "it has no test score"),
        ("never", 0.99, "accuracy of A", False, "--promote never"),
        ("always", 0.10, "accuracy of B", True, "--promote always"),
        ("if-better", 0.11, "accuracy of B", True, "test score 0.1100, the champion (version 6) has 0.1000"),
    ],
)
def test_the_champion_is_the_best_by_one_protocol(
    contest: Contest, promote: Any, value: float | None, protocol: str | None, is_champion: bool, why: str
) -> None:
    score = None if value is None or protocol is None else Score(value=value, protocol=protocol)
    entered = contest.enter(score, promote)
    assert entered.is_champion == is_champion
    assert why in entered.reason
    alias = contest.store.client.get_model_version_by_alias("contest", "champion")
    assert (int(alias.version) == entered.version) == is_champion


class Contest:
    """Versions of one logged model, entered with scores that a test makes up."""

    def __init__(self, store: TrackingStore) -> None:
        self.store = store
        self.version = store.client.get_model_version_by_alias("hpo-digits", "champion")

    def enter(self, score: Score | None, promote: Any) -> Any:
        model_id = self.version.source.removeprefix("models:/")
        version = add_version(self.store, "contest", model_id, self.version.run_id, card="", tags={})
        return enter(self.store, version, score=score, direction=Direction.MAXIMIZE, promote=promote)


@pytest.fixture(scope="module")
def contest(searched: Path) -> Contest:
    return Contest(open_store(searched))


def test_a_model_that_is_a_version_already_gets_no_second_one(searched: Path) -> None:
    again = register_best("digits", home=searched)
    assert (again.version, again.is_champion, again.reason) == (1, True, "it was the champion already")
    client = open_store(searched).client
    assert len(client.search_model_versions("name = 'hpo-digits'")) == 1
    version = client.get_model_version("hpo-digits", "1")
    logged = client.get_run(version.run_id).outputs.model_outputs
    assert [output.model_id for output in logged] == [again.model_id]


def test_what_register_cannot_do_is_told_first(searched: Path) -> None:
    with pytest.raises(UsageError, match="--promote sometimes is not allowed: use one of always, if-better, never"):
        register_best("digits", promote="sometimes", home=searched)
    with pytest.raises(UsageError, match="--name 'mine/2' is not allowed: a registered model has a name without"):
        register_best("digits", name="mine/2", home=searched)


def test_the_lines_to_load_a_registered_model_are_python_whatever_its_home_is_called(tmp_path: Path) -> None:
    uri = f'sqlite:///{tmp_path}/it\'s "mine"/mlflow.db'
    registered = Registration(name="m", version=1, model_id="m-1", tracking_uri=uri, is_champion=True, reason="why")
    print_registration(Console(file=(said := io.StringIO()), width=200), registered)
    _, _, first, second = said.getvalue().splitlines()
    for line, given in ((first, uri), (second, "models:/m@champion")):
        assert ast.literal_eval(line[line.index("(") :]) == given


# --- files ------------------------------------------------------------------------------------------------------------


def asked(searched: Path, *arguments: object) -> str:
    done = CliRunner().invoke(cli, ["predict", "digits", *map(str, arguments), "--home", str(searched)])
    assert done.exception is None, done.exception
    return done.stdout


def test_photos_and_arrays_are_read_and_answered_in_three_forms(
    searched: Path, images: torch.Tensor, tmp_path: Path
) -> None:
    model = load_best("digits", home=searched)
    expected = model.predict(images)
    np.save(tmp_path / "images.npy", images.numpy())
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(photos / f"{number}.png")
    (photos / "notes.txt").write_text("not a photo")
    found = json.loads(asked(searched, tmp_path / "images.npy", photos, "--json", "--batch-size", 2))
    assert [each["prediction"] for each in found] == expected + expected
    assert sorted(each["row"] for each in found if each["row"] is not None) == list(range(NUM_ASKED))
    shares = torch.tensor([list(each["probabilities"].values()) for each in found[:NUM_ASKED]])
    assert torch.allclose(shares, model.probabilities(images))
    rows = list(csv.DictReader(io.StringIO(asked(searched, tmp_path / "images.npy", "--csv"))))
    assert [row["prediction"] for row in rows] == expected
    assert [float(row["3"]) for row in rows] == pytest.approx(model.probabilities(images)[:, 3].tolist(), abs=1e-5)
    assert expected[0] in asked(searched, photos / "0.png")


def test_files_that_do_not_fit_are_named_in_one_line(searched: Path, tmp_path: Path) -> None:
    def told(name: str, array: Any) -> str:
        np.save(tmp_path / name, array)
        done = CliRunner().invoke(cli, ["predict", "digits", str(tmp_path / name), "--home", str(searched)])
        return str(done.exception)

    assert "has the shape (2, 3, 8, 8), but the model takes (B, 1, 8, 8)" in told("a.npy", np.zeros((2, 3, 8, 8)))
    assert "takes integers from 0 to 255 (uint8)" in told("b.npy", np.full((1, 1, 8, 8), 300))
    assert "takes integers from 0 to 255 (uint8)" in told("c.npy", np.full((1, 1, 8, 8), 0.5))
    (tmp_path / "d.npy").write_bytes(b"nonsense")
    done = CliRunner().invoke(cli, ["predict", "digits", str(tmp_path / "d.npy"), "--home", str(searched)])
    assert f"{tmp_path / 'd.npy'} cannot be read" in str(done.exception)
    (tmp_path / "f.csv").write_text("a,b\n1,2\n")
    done = CliRunner().invoke(cli, ["predict", "digits", str(tmp_path / "f.csv"), "--home", str(searched)])
    assert "f.csv is not a file that the model takes; it takes .jpg" in str(done.exception)
    done = CliRunner().invoke(cli, ["predict", "digits", str(tmp_path / "e.npy"), "--home", str(searched)])
    assert f"there is no file {tmp_path / 'e.npy'}" in str(done.exception)


def test_tables_sequences_and_several_inputs_are_read(tmp_path: Path) -> None:
    numbers = PreprocessedModel(mlp(DataSpec((2,))), DataSpec((2,)))
    (tmp_path / "a.csv").write_text("height,width\n1.5,2\n3,4\n")
    found = [each for batch in predict_files(numbers, [tmp_path / "a.csv"]) for each in batch]
    assert [each.prediction for each in found] == pytest.approx(numbers.predict([[1.5, 2.0], [3.0, 4.0]]))
    (tmp_path / "b.csv").write_text("height\n1.5\n")
    with pytest.raises(DataError, match=r"b\.csv: it has 1 columns, but the model takes 2 numbers"):
        list(predict_files(numbers, [tmp_path / "b.csv"]))

    tokens = DataSpec(InputSpec((), "int64", is_ragged=True, vocabulary=9, is_normalised=False), ("a", "b"))
    text = PreprocessedModel(transformer(tokens), tokens)
    (tmp_path / "c.jsonl").write_text("[1, 2, 3]\n[4]\n")
    (said,) = predict_files(text.eval(), [tmp_path / "c.jsonl"])
    assert [each.prediction for each in said] == text.predict([[1, 2, 3], [4]])
    (tmp_path / "d.jsonl").write_text("[1, 20]\n")
    with pytest.raises(DataError, match=r"d\.jsonl: the model takes integers from 0 to 8, not 1 to 20"):
        list(predict_files(text, [tmp_path / "d.jsonl"]))


# --- the server -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(searched: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "hpo", "serve", "digits", "--home", str(searched), "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def answers() -> bool:
        assert process.poll() is None, process.communicate()
        try:
            return ask(port, "GET", "/ping")[0] == 200
        except OSError:
            return False

    try:
        wait_until(answers)
        yield process
    finally:
        process.kill()
        process.communicate()


def ask(port: int, method: str, path: str, body: str = "", kind: str | None = "application/json") -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, body, {"Content-Type": kind} if kind else {})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, json.loads(content) if content.strip() else None


def test_the_server_answers_raw_inputs_with_names_and_probabilities(
    server: subprocess.Popen[str], searched: Path, port: int, images: torch.Tensor
) -> None:
    status, answer = ask(port, "POST", "/invocations", json.dumps({"inputs": images.tolist()}))
    assert status == 200
    model = load_best("digits", home=searched)
    assert [each["prediction"] for each in answer["predictions"]] == model.predict(images)
    shares = torch.tensor([list(each["probabilities"].values()) for each in answer["predictions"]])
    assert torch.allclose(shares, model.probabilities(images), atol=1e-5)
    raw = json.dumps({"inputs": images.tolist(), "params": {"raw": True}})
    (logits,) = ask(port, "POST", "/invocations", raw)[1]["predictions"]
    assert torch.allclose(torch.tensor(logits).softmax(1), shares, atol=1e-5)
    assert server.stdout is not None
    advice = next(line for line in server.stdout if line.startswith("Try it: curl"))
    example = Path(shlex.split(advice)[-1].removeprefix("@"))
    status, answer = ask(port, "POST", "/invocations", example.read_text())
    assert (status, len(answer["predictions"])) == (200, 2)


@pytest.mark.parametrize(
    ("body", "kind", "what"),
    [
        ({"inputs": [[1, 2, 3]]}, "application/json", "shape"),
        (
            {"inputs": np.zeros((1, 1, 8, 9)).tolist()},
            "application/json",
            "must have the shape (batch, 1, 8, 8), not (1, 1, 8, 9)",
        ),
        ({"inputs": np.full((1, 1, 8, 8), "seven").tolist()}, "application/json", "uint8"),
        ({"inputs": np.full((1, 1, 8, 8), 0.5).tolist()}, "application/json", "uint8"),
        ({"inputs": np.full((1, 1, 8, 8), 300).tolist()}, "application/json", "uint8"),
        ({"pictures": [1]}, "application/json", "inputs"),
        ("nonsense", "application/json", "JSON"),
        ({"inputs": []}, "application/json", "shape"),
        ({"inputs": [1]}, None, "Content-Type"),
        ({"inputs": [1]}, "application/x-www-form-urlencoded", "needs the header Content-Type: application/json"),
        ("[" * 100_000, "application/json", "JSON"),
        ({"inputs": np.zeros((1, 1, 8, 8)).tolist(), "params": {"raw": "x"}}, "application/json", "raw"),
    ],
    ids=[
        *("rank", "size", "words", "fractions", "too large", "other key"),
        *("no JSON", "nothing", "no type", "type of a form", "too deep", "other parameter"),
    ],
)
def test_a_wrong_request_gets_400_and_one_line(
    server: subprocess.Popen[str], port: int, body: Any, kind: str | None, what: str
) -> None:
    sent = body if isinstance(body, str) else json.dumps(body)
    status, answer = ask(port, "POST", "/invocations", sent, kind)
    assert status == 400, answer
    assert set(answer) == {"error_code", "message"}
    assert what in answer["message"], answer
    assert "\n" not in answer["message"]
    assert len(answer["message"]) < 400


def test_the_server_ends_with_sigterm(server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGTERM)
    server.wait(60)
