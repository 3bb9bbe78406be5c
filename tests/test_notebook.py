"""Objectives made in scripts and notebooks: searched, interrupted, shown and loaded without a file of their own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from nbclient import NotebookClient

import hpo
from hpo.records import SearchOutcome, TrialRecord, Winner
from hpo.search.storage import open_storage
from hpo.search.study import Study

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
PATIENCE_S = 240  # seconds that a cell may take on a busy machine

# A zmq socket of a client that has stopped is closed when it is collected.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


def test_the_notebook_runs_and_shows_progress_outcome_and_trials(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=PATIENCE_S, resources={"metadata": {"path": str(tmp_path)}}).execute()
    task, search, frame, predicted = (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    assert task == []
    progress, outcome = (output["data"] for output in search if "data" in output)
    assert "6/6 trials" in progress["text/html"]
    assert "best accuracy" in progress["text/plain"]
    assert all(text in outcome["text/html"] for text in ("validation accuracy", "<svg", "load_best"))
    assert "params_lr" in frame[0]["data"]["text/html"]
    assert len(eval(predicted[0]["data"]["text/plain"])) == 5
    assert [trial.number for trial in Study.load(open_storage(home), "wine").trials()] == list(range(6))


SCRIPT = """
import sys
from pathlib import Path

import hpo
import neighbour
import torch

with Path(__file__).with_name("runs").open("a") as runs:
    runs.write("x")


def train(trial):
    for epoch in range(1, trial.max_epochs + 1):
        trial.save_model({"lr": trial.parameters["lr"]})
        if not trial.report(epoch, {"accuracy": neighbour.value(trial.parameters["lr"], epoch)}):
            return


objective = hpo.Objective(
    name="scripted", description="", train=train, direction="maximize", settings={"max_epochs": 3},
    space=hpo.Space(hpo.Group("all", lr=hpo.Float(0.1, 1.0, default=0.2))),
)
outcome = hpo.run_search(objective, trials=4, workers=2, home=sys.argv[1])
assert outcome.is_done
assert hpo.load_best("scripted", task=objective, home=sys.argv[1]) == {"lr": outcome.winner.configuration["lr"]}


def load(data_dir):
    inputs = torch.arange(80.0)[:, None]
    return hpo.hold_out(inputs, (inputs[:, 0] > 40).long(), ["low", "high"])


def build(spec):
    return torch.nn.Linear(1, spec.num_outputs)


built = hpo.Objective(
    name="built", description="", load=load, model=build,
    settings={"max_epochs": 1, "batch_size": 16, "compile": "off"},
    space=hpo.Space(hpo.Group("all", lr=hpo.Float(0.1, 1.0, default=0.2))),
)
hpo.run_search(built, trials=1, workers=1, home=sys.argv[1], device="cpu")
assert hpo.load_best("built", task=built, home=sys.argv[1]).predict(torch.zeros(1, 1))
"""


def test_a_script_without_a_main_guard_searches_once_with_the_modules_beside_it(home: Path, tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("def value(lr, epoch):\n    return lr * epoch / 10\n")
    (tmp_path / "script.py").write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, tmp_path / "script.py", home],
        check=True, timeout=PATIENCE_S, cwd=home, capture_output=True, text=True,
    )  # fmt: skip
    assert "another version" not in ran.stdout + ran.stderr, "nothing was edited since"
    assert (tmp_path / "runs").read_text() == "x"
    assert len(Study.load(open_storage(home), "scripted").trials()) == 4
    with pytest.raises(hpo.UsageError, match=r"made in a script or notebook.*load_best\(\.\.\., task=objective\)"):
        hpo.run_search("<object>", home=home)


def test_an_objective_that_cannot_be_sent_is_refused_before_a_trial(home: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:

        def train(trial: hpo.Trial) -> None:
            log.write("")

        objective = hpo.Objective(
            name="x",
            description="",
            train=train,
            direction="maximize",
            space=hpo.Space(hpo.Group("all", lr=hpo.Float(0.1, 1.0, default=0.2))),
        )
        with pytest.raises(
            hpo.UsageError, match=r"task 'x' cannot be sent to the workers: .*; make such objects inside"
        ):
            hpo.run_search(objective, home=home, trials=1)
    assert not (home / "optuna.db").exists()


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


SLOW = """
import time, hpo

def train(trial):
    start = (trial.resume() or {"epoch": 0})["epoch"]
    for epoch in range(start + 1, trial.max_epochs + 1):
        time.sleep(0.2)
        trial.save({"epoch": epoch})
        if not trial.report(epoch, {"accuracy": epoch / 1000}):
            return

objective = hpo.Objective(
    name="slow", description="", train=train, direction="maximize", settings={"max_epochs": 900},
    space=hpo.Space(hpo.Group("all", lr=hpo.Float(0.1, 1.0, default=0.2))),
)
"""


def test_interrupting_a_kernel_once_keeps_the_trial_and_returns_the_outcome(
    kernel: tuple[KernelManager, BlockingKernelClient], home: Path
) -> None:
    manager, client = kernel
    client.execute_interactive(SLOW, timeout=PATIENCE_S)
    request = client.execute(f"outcome = hpo.run_search(objective, home={str(home)!r}, trials=1, workers=1)")
    wait_until(lambda: (home / "optuna.db").exists() and bool(curve(home)))
    manager.interrupt_kernel()
    assert reply_to(request, client)["status"] == "ok"
    shown = client.execute_interactive("assert outcome.interrupted and outcome.counts['interrupted'] == 1")
    assert shown["content"]["status"] == "ok"
    assert len(curve(home)) < 900


def curve(home: Path) -> dict[int, float]:
    try:
        trials = Study.load(open_storage(home), "slow").trials()
    except hpo.UnknownNameError:
        return {}
    return trials[0].curve if trials else {}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.1)


def reply_to(request: str, client: BlockingKernelClient) -> Any:
    while True:
        reply = client.get_shell_msg(timeout=PATIENCE_S)
        if reply["parent_header"]["msg_id"] == request:
            return reply["content"]


def test_an_outcome_without_a_result_is_shown_and_a_hostile_name_is_escaped() -> None:
    trial = TrialRecord(
        number=0,
        state="complete",
        value=0.5,
        values={"<b>": 1, "hidden": 2},
        inactive=("hidden",),
        curve={1: 0.5},
        best_epoch=1,
        stage="x",
        reason=None,
    )
    empty = SearchOutcome(
        study="s", home=Path(), counts={}, num_trials=1, is_done=False, interrupted=True, winner=None, trials=(trial,)
    )
    assert "No trial has a result yet" in empty._repr_html_()
    assert list(empty.trials_dataframe().columns)[-1] == "params_<b>"
    assert "trials" not in empty.to_dict()
    winner = Winner(
        trial=0,
        searched=0,
        configuration={"<b>": 1},
        metric="accuracy",
        validation=0.5,
        best_epoch=1,
        folds=None,
        pruned=None,
        test=None,
        confusion=None,
        comparison=None,
        num_test_readings=0,
    )
    assert "&lt;b&gt;" in replace(empty, winner=winner)._repr_html_()
