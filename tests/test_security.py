"""Hostile input, real of its kind: what docs/security.md promises of databases, servers and files is tried here."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from helpers.warm import WarmPopen
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna._transform import _SearchSpaceTransform
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage

from hpo.data.cache import cached_split
from hpo.data.examples import Split
from hpo.data.vision import load_cifar10
from hpo.errors import DataError, StoreError, UsageError
from hpo.home import check_study_name
from hpo.parameters import Float, Int
from hpo.search.strategies import CmaEsSampler, build_sampler
from hpo.space import Group, Space
from hpo.tracking.store import open_store, prepare_mlflow

HOSTILE_NAMES = [
    "../evil",
    "..",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "",
    ".hidden",
    "-rf",
    "a b",
    "a\n",
    "a\0",
    "ü",
    "x" * 65,
]


class Touch:
    """Touches a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """The file that hostile input makes when it is run; it works, and is not there yet."""
    path = tmp_path / "trap"
    pickle.loads(pickle.dumps(Touch(path)))
    path.unlink()
    return path


# --- the study's database ---------------------------------------------------------------------------------------------

SPACE = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=1e-2),
        depth=Int(2, 20, default=8),
        dropout=Float(0.0, 0.5, default=0.1),
    )
)


def bowl(trial: optuna.Trial) -> float:
    depth, dropout = trial.suggest_int("depth", 2, 20), trial.suggest_float("dropout", 0.0, 0.5)
    lr = trial.suggest_float("lr", 1e-4, 1.0, log=True)
    return (depth - 7) ** 2 / 10 + (dropout - 0.2) ** 2 + abs(lr - 0.01)


def optunas_cmaes() -> BaseSampler:
    return optuna.samplers.CmaEsSampler(seed=0, warn_independent_sampling=False)


def study_with_a_hostile_pickle(storage: RDBStorage, trap: Path) -> optuna.Study:
    """A study whose first trial has the attribute in which Optuna's CMA-ES keeps its pickled optimizer."""
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    storage.set_trial_system_attr(trial._trial_id, "cma:optimizer:0", pickle.dumps(Touch(trap)).hex())
    study.tell(trial, bowl(trial))
    return study


def test_a_pickle_in_the_database_is_not_run(tmp_path: Path, trap: Path) -> None:
    storage = RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")
    study = study_with_a_hostile_pickle(storage, trap)

    study.sampler = build_sampler("cmaes", SPACE, seed=0, num_trials=10)
    study.optimize(bowl, n_trials=10)
    assert not trap.exists()
    assert len(study.trials) == 11
    stored = [key for trial in study.trials[1:] for key in trial.system_attrs if key.startswith("cma:")]
    assert set(stored) == {"cma:generation"}

    # The trap was a real one.
    study.sampler = optunas_cmaes()
    bowl(study.ask())
    assert trap.exists()
    storage.engine.dispose()  # Optuna leaves its connections open, of which Python 3.13 warns


def test_cmaes_is_told_what_optunas_own_would_have_stored() -> None:
    study = optuna.create_study(sampler=optunas_cmaes())
    study.optimize(bowl, n_trials=60)

    ours = CmaEsSampler(seed=0)
    space = ours.infer_relative_search_space(study, study.trials[-1])
    restored = ours._optimizer(study, _SearchSpaceTransform(space, transform_0_1=True))
    stored = optunas_cmaes()._restore_optimizer(study.trials)  # type: ignore[attr-defined]
    assert restored.generation == stored.generation == 8
    for name in ("_mean", "_C", "_sigma", "_pc", "_p_sigma"):
        assert getattr(restored, name) == pytest.approx(getattr(stored, name), rel=1e-9, abs=1e-12), name


def test_cmaes_finds_the_bottom_of_a_bowl() -> None:
    study = optuna.create_study(sampler=CmaEsSampler(seed=0))
    study.optimize(bowl, n_trials=120)
    random = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    random.optimize(bowl, n_trials=120)
    last = [trial.value for trial in study.trials[-20:]]
    assert max(last) < sorted(trial.value for trial in random.trials)[20]
    assert len({trial.params["dropout"] for trial in study.trials}) == 120


def test_a_generation_counts_those_who_ended_first() -> None:
    """A straggler that ends when its generation has been told must not change what was told."""
    study = optuna.create_study(sampler=CmaEsSampler(seed=0))
    study.optimize(bowl, n_trials=1)
    straggler = study.ask()
    straggler_value = bowl(straggler)
    study.optimize(bowl, n_trials=10)
    sampler = CmaEsSampler(seed=0)
    space = sampler.infer_relative_search_space(study, study.trials[-1])
    transform = _SearchSpaceTransform(space, transform_0_1=True)
    before = sampler._optimizer(study, transform)
    assert before.generation == 1
    study.tell(straggler, straggler_value)
    after = sampler._optimizer(study, transform)
    assert after.generation == 1
    assert (after._C == before._C).all(), "the covariance follows from every trial that was told"


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.just(10**400),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
)


@settings(max_examples=30)
@given(generation=anything)
def test_cmaes_continues_whatever_the_database_says_of_generations(generation: Any) -> None:
    study = optuna.create_study(sampler=CmaEsSampler(seed=0))
    study.optimize(bowl, n_trials=3)
    for trial in study.trials:
        study._storage.get_trial(trial._trial_id).system_attrs["cma:generation"] = generation
    study.optimize(bowl, n_trials=2)
    assert len(study.trials) == 5


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_study_cannot_be_named_out_of_the_home(name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a study"):
        check_study_name(name)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["torch archive", "plain pickle"])
def test_a_converted_split_that_is_a_pickle_is_not_run(kind: str, tmp_path: Path, trap: Path) -> None:
    """Its name may hold the right SHA-256: whoever writes the file can write its name, too."""
    original = tmp_path / "original"
    original.touch()
    split = Split(torch.zeros(2, 3), torch.zeros(2))
    cached_split(tmp_path / "cache", "train", [original], lambda: split)
    (kept,) = (tmp_path / "cache").glob("train.*.pt")
    hostile = tmp_path / "hostile"
    torch.save({"inputs": Touch(trap)}, hostile)
    content = hostile.read_bytes() if kind == "torch archive" else pickle.dumps(Touch(trap), protocol=2)
    kept.with_name(f"{kept.name.rsplit('.', 2)[0]}.{hashlib.sha256(content).hexdigest()}.pt").write_bytes(content)
    kept.unlink()

    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        cached_split(tmp_path / "cache", "train", [original], lambda: split)
    assert not trap.exists()


def test_cifar_batches_of_strangers_are_refused_before_they_are_unpickled(tmp_path: Path, trap: Path) -> None:
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(pickle.dumps(Touch(trap)))
    with pytest.raises(DataError, match=r"damaged \(wrong MD5\)"):
        load_cifar10(tmp_path / "data")
    assert not trap.exists()


def test_an_image_that_is_postscript_does_not_start_ghostscript(tmp_path: Path, trap: Path) -> None:
    """In a process of its own: Pillow looks for Ghostscript once."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    image, ghostscript = tmp_path / "cat.png", tmp_path / "gs"
    image.write_bytes(postscript)
    ghostscript.write_text(f"#!/bin/sh\ntouch '{trap}'\n")
    ghostscript.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}

    def read(code: str) -> str:
        command = [sys.executable, "-c", code, str(image)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr

    ours = "import sys, pathlib, hpo.data.vision as v; v._read_image(pathlib.Path(sys.argv[1]), (32, 32))"
    assert "cat.png is damaged (cannot identify image file" in read(ours)
    assert not trap.exists()
    read("import sys, PIL.Image; PIL.Image.open(sys.argv[1]).convert('RGB')")
    assert trap.exists(), "the trap was a real one"


# --- MLflow -----------------------------------------------------------------------------------------------------------

PICKLED_MODEL = """
flavors:
  python_function:
    cloudpickle_version: 3.1.2
    env: {}
    loader_module: mlflow.pyfunc.model
    python_model: python_model.pkl
"""


def pickled_model(folder: Path, trap: Path) -> Path:
    folder.mkdir()
    (folder / "MLmodel").write_text(PICKLED_MODEL)
    (folder / "python_model.pkl").write_bytes(pickle.dumps(Touch(trap)))
    return folder


@pytest.mark.filterwarnings("ignore:.*Any type hint is inferred as AnyType:UserWarning")  # importing mlflow.pyfunc
def test_a_pickled_model_in_mlflow_is_not_run(tmp_path: Path, trap: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    model = pickled_model(tmp_path / "model", trap)
    monkeypatch.delenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", raising=False)
    prepare_mlflow()
    with pytest.raises(mlflow.MlflowException, match="pickle is disallowed"):
        mlflow.pyfunc.load_model(str(model))
    assert not trap.exists()
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")  # the trap was a real one
    with pytest.raises(AttributeError):
        mlflow.pyfunc.load_model(str(model))
    assert trap.exists()


class HostileMlflow(http.server.BaseHTTPRequestHandler):
    """Answers as an MLflow server does, and lists an artifact that lies outside of where it is downloaded to."""

    def __init__(self, listed: str, *connection: Any) -> None:
        self.listed = listed
        super().__init__(*connection)

    def do_GET(self) -> None:
        if "/runs/get" in self.path:
            info = {
                "run_id": "0" * 32,
                "run_uuid": "0" * 32,
                "artifact_uri": "mlflow-artifacts:/0",
                "status": "FINISHED",
            }
            self._answer({"run": {"info": info, "data": {}}})
        elif "mlflow-artifacts/artifacts?" in self.path:
            self._answer({"files": [{"path": self.listed, "is_dir": False, "file_size": 4}]})
        else:
            self._answer({})

    def do_POST(self) -> None:
        self._answer({})

    def _answer(self, answer: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output free of requests."""


@contextmanager
def hostile_mlflow(listed: str) -> Iterator[str]:
    handler = functools.partial(HostileMlflow, listed)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_cannot_have_files_written_outside_of_the_download(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    up = "../" * 30 + str(outside).lstrip("/")
    for listed in (up, str(outside), up.replace("..", "%2e%2e"), up.replace("/", "%2f")):
        with hostile_mlflow(listed) as uri:
            store = open_store(tmp_path / "home", uri)
            with pytest.raises(StoreError, match="has no file 'checkpoint'"):
                store.download("0" * 32, "checkpoint")
        assert not outside.exists()
    with hostile_mlflow("best.pt") as uri:  # the server's answers are otherwise good ones
        assert (open_store(tmp_path / "home", uri).download("0" * 32, "checkpoint") / "best.pt").is_file()


# --- the UI's server --------------------------------------------------------------------------------------------------

HEALTHY_WITH_A_CHILD = """
import http.server, os, sys
os.fork()
print("Uvicorn running on this port", flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer.allow_reuse_port = True
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""

UI = f"""
import sys
from pathlib import Path
from hpo.tracking import server
from hpo.tracking.store import TrackingStore

server._command = lambda store, host, port: [sys.executable, "-c", {HEALTHY_WITH_A_CHILD!r}, str(port)]
home = Path(sys.argv[1])
store = TrackingStore(home=home, uri=f"sqlite:///{{home / 'mlflow.db'}}", client=None)
with server.running_server(store, host="127.0.0.1", port=int(sys.argv[2])) as running:
    print(running.pid, flush=True)
    running.wait()
"""


def test_every_line_of_the_table_of_threats_names_tests_that_exist() -> None:
    folder = Path(__file__).parent
    text = (folder.parent / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .*\|$", text.partition("## Threats")[2].partition("\n## ")[0], re.MULTILINE)[2:]
    defined = {
        name for file in folder.glob("test_*.py") for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    assert len(rows) == 8
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= defined, set(named) - defined


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_killing_the_ui_with_minus_9_takes_its_server_and_its_children_along(home: Path, free_port: int) -> None:
    with WarmPopen([sys.executable, "-c", UI, home, free_port], text=True, stdout=subprocess.PIPE) as ui:
        assert ui.stdout is not None
        group = int(ui.stdout.readline())
        assert not group_is_gone(group)
        ui.kill()
    assert ui.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while not group_is_gone(group):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with socket.socket() as again:
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", free_port))
