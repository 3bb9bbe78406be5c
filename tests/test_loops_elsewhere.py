"""Training loops of one's own on several machines, in a notebook, and in what the commands say of them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from helpers.loops import LOOP, footprints
from helpers.postgres import Postgres
from helpers.searches import lives, wait_until
from helpers.warm import WarmPopen
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

import hpo
from hpo.cli import cli
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session.search import submit_study
from hpo.tracking.store import open_store

PATIENCE_S = 240  # seconds that a cell may take on a busy machine


def register(site: Path) -> None:
    """Install the loop as a registered task, as studies of several machines need it."""
    package, info = site / "looped_tasks", site / "looped_tasks-1.dist-info"
    for path in (package, info):
        path.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "looped.py").write_text(LOOP)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: looped-tasks\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[hpo.objectives]\nlooped = looped_tasks\n")


@pytest.mark.usefixtures("home")
def test_two_machines_run_a_loop_and_a_killed_trial_resumes_from_its_save(
    tmp_path: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tmp_path / "site")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("LOOPS", str(tmp_path))
    storage, tracking_uri = postgres.new_database(), postgres.new_database()
    monkeypatch.setenv("HPO_STORAGE", storage)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking_uri)
    open_store(tmp_path / "desk", tracking_uri)  # or both machines would make its tables at once
    submit_study("looped", home=tmp_path / "desk", trials=4, strategy="random", pruner="none")
    (tmp_path / "hold").touch()
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    command = [sys.executable, "-m", "hpo", "worker", "looped", "--workers", "1", "--home"]
    with (
        WarmPopen([*command, tmp_path / "anna"], env=os.environ | {"PYTHONPATH": path}) as anna,
        WarmPopen([*command, tmp_path / "bert"], env=os.environ | {"PYTHONPATH": path}) as bert,
    ):
        machines = (anna, bert)

        def held(number: int) -> bool:
            assert [machine.poll() for machine in machines] == [None, None]
            return len(footprints(tmp_path, 3)) == number

        wait_until(lambda: held(2))
        victim, bystander = footprints(tmp_path, 3)
        os.kill(victim.pid, signal.SIGKILL)
        wait_until(lambda: held(3))
        again = footprints(tmp_path, 3)[2]
        (tmp_path / "hold").unlink()
        assert [machine.wait() for machine in machines] == [0, 0]
    assert again.trial == victim.trial
    assert again.pid not in (victim.pid, bystander.pid)
    assert again.resumed_after == 2
    trials = Study.load(open_storage(tmp_path / "desk", storage), "looped").trials()
    assert [trial.state for trial in trials] == ["complete"] * 4
    assert sorted(trial.attempts for trial in trials) == [1, 1, 1, 2]
    assert all(list(trial.curve) == [1, 2, 3, 4] for trial in trials)
    assert hpo.load_best("looped", home=tmp_path / "third", storage=storage) == {"epoch": 4}


def test_best_says_how_to_load_what_a_loop_has_saved(home: Path, tmp_path: Path) -> None:
    (tmp_path / "looped.py").write_text(LOOP)
    hpo.run_search(str(tmp_path / "looped.py"), home=home, trials=1, workers=1)
    said = CliRunner().invoke(cli, ["best", "looped", "--home", str(home)]).stdout
    assert 'Load it: state = hpo.load_best("looped"' in said
    assert "model.load_state_dict(state)" in said


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    manager, client = start_new_kernel(cwd=str(tmp_path))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupting_a_kernel_twice_stops_in_the_middle_of_an_epoch_as_ctrl_c_twice_does(
    kernel: tuple[KernelManager, BlockingKernelClient], home: Path, tmp_path: Path
) -> None:
    manager, client = kernel
    (tmp_path / "hold").touch()
    (tmp_path / "looped.py").write_text(LOOP)
    client.execute_interactive("import hpo", timeout=PATIENCE_S)
    request = client.execute(f"hpo.run_search('looped.py', home={str(home)!r}, trials=1, workers=1)")
    wait_until(lambda: bool(footprints(tmp_path, 3)), within_s=PATIENCE_S)
    [held] = footprints(tmp_path, 3)
    manager.interrupt_kernel()
    wait_until(lambda: notes_that_it_stops(client))
    manager.interrupt_kernel()
    reply = client.get_shell_msg(timeout=PATIENCE_S)
    while reply["parent_header"]["msg_id"] != request:
        reply = client.get_shell_msg(timeout=PATIENCE_S)
    assert (reply["content"]["status"], reply["content"]["ename"]) == ("error", "KeyboardInterrupt")
    wait_until(lambda: not lives(held.pid))

    (tmp_path / "hold").unlink()
    study = Study.load(open_storage(home), "looped")
    assert study.counts()["running"] == 0
    outcome = hpo.run_search(str(tmp_path / "looped.py"), home=home, trials=1, workers=1)
    assert outcome.is_done
    assert footprints(tmp_path)[-1].resumed_after == 2, "it continues from its last save"


def notes_that_it_stops(client: BlockingKernelClient) -> bool:
    while client.iopub_channel.msg_ready():
        if "press Ctrl-C again" in str(client.get_iopub_msg(timeout=1)["content"]):
            return True
    return False
