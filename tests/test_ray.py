"""Ray as the executor, on a cluster of real processes, one node of which is really killed.

Its nodes are 127.0.0.2, .3 and so on: a search must not take another node of the same machine for its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, wait
from pathlib import Path
from typing import Any

import pytest
from helpers.loops import LOOP, footprints
from helpers.warm import WarmPopen
from hpo.objectives.digits import load

from hpo.data.datasets import save_splits, split_dataset
from hpo.errors import SearchError, UsageError
from hpo.execution import pool
from hpo.execution import ray as ray_workers
from hpo.execution.messages import Assignment, Decision, EpochDone, Setup, TrialDone
from hpo.execution.pool import WorkerDied
from hpo.execution.ray import RayWorkers
from hpo.plugins import load_task
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session.preparation import SILENCE_S
from hpo.tracking.store import open_store
from hpo.training.device import ranks_of_trial

pytestmark = pytest.mark.xdist_group("ray")  # one cluster for all

os.environ.update(ray_workers._READ_AT_IMPORT)  # below `uv run` each worker would install an environment of its own
ray = import_module("ray")

START_S = 120  # seconds that anything may take to begin on a busy machine

# The digits; an epoch that is trained is written down, and none after the second begins while the file `hold` exists.
TASK = """
import os
import time
from pathlib import Path
import torch
from hpo.models.mlp import MLP
from hpo.objective import Objective
from hpo.parameters import Float
from hpo.space import Group, Space
from hpo.objectives.digits import load

here = Path(__file__).parent


class Diary(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.num_epochs, self.in_epoch = net, 0, False

    def forward(self, inputs):
        while self.training and self.num_epochs >= 2 and (here / "hold").exists():
            time.sleep(0.05)
        if self.in_epoch and not self.training:
            self.num_epochs += 1
            with (here / "diary").open("a") as diary:
                diary.write(f"{os.getpid()}\\n")
        self.in_epoch = self.training
        return self.net(inputs)


def model(spec):
    return Diary(MLP(spec, depth=1, width=16, activation="relu", norm="none", dropout=0.0))


objective = Objective(
    name="held", description="digits that can be held up", load=load, model=model,
    settings={"max_epochs": 4, "batch_size": 512, "optimizer": "sgd", "lr": 0.1},
    space=Space(Group("step size", lr=Float(1e-3, 1.0, log=True, default=0.1))),
)
"""


class Cluster:
    """A head without CPUs, a node of two CPUs, and one of five and a GPU that joins when it is asked to.

    Ray only counts GPUs: there need be none.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = _free_port()
        self.address = f"127.0.0.2:{self._port}"
        self._nodes: list[subprocess.Popen[str]] = []

    def start(self) -> None:
        self._start("--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=false")
        self._start(f"--address={self.address}", "--num-cpus=2")

    def let_late_node_join(self) -> None:
        """Start it, unless it is there."""
        if len(self._nodes) == 2:
            self._start(f"--address={self.address}", "--num-cpus=5", "--num-gpus=1")

    def _start(self, *options: str) -> None:
        index = len(self._nodes) + 2
        command = [str(Path(sys.executable).with_name("ray")), "start", *options]
        command += [f"--node-ip-address=127.0.0.{index}", f"--temp-dir={self._folder / str(index)}"]
        command += ["--object-store-memory=80000000", "--include-log-monitor=false", "--disable-usage-stats"]
        # No processes in reserve, for each of our workers takes a fresh one; and no waiting behind other tests.
        settings = {"prestart_worker_first_driver": 0, "enable_worker_prestart": 0, "worker_niceness": 0}
        environment = os.environ | {f"RAY_{name}": str(value) for name, value in settings.items()}
        # To a file: a pipe would be held open by the node's processes.
        with (self._folder / f"{index}.log").open("w+") as log:
            pipes: dict[str, Any] = {"stdout": log, "stderr": log}
            process = subprocess.Popen(command, text=True, start_new_session=True, env=environment, **pipes)
            self._nodes.append(process)
            assert process.wait(START_S) == 0, log.seek(0) or log.read()

    def kill_first_node(self) -> None:
        """As a power failure does."""
        self._kill(self._nodes[1].pid)

    def _kill(self, session: int) -> None:
        while processes := _processes(session):
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def workers(self) -> list[int]:
        """The processes of all nodes that run our task."""
        return [process for node in self._nodes for process in _processes(node.pid) if _runs_our_task(process)]

    def close(self) -> None:
        for node in self._nodes:
            self._kill(node.pid)


def _processes(session: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == session and _state(folder) != "Z":
                found.append(int(folder.name))
    return found


def _state(folder: Path) -> str:
    try:
        return (folder / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def _runs_our_task(process: int) -> bool:
    try:
        return b"ray::_work" in Path(f"/proc/{process}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], search: subprocess.Popen[str] | None = None) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert search is None or search.poll() is None, search and search.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not below pytest's own folder: the path of a socket may have 107 bytes only.
    folder = Path(tempfile.mkdtemp(prefix="hpo-ray-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()
        shutil.rmtree(folder)


@pytest.fixture
def connected(cluster: Cluster) -> Iterator[None]:
    """Ray as somebody has it who connected before; a pool neither connects again nor disconnects."""
    cluster.let_late_node_join()
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")  # type: ignore[arg-type]
    yield
    assert ray.is_initialized()
    wait_until(lambda: not cluster.workers())
    ray.shutdown()


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    splits = split_dataset(load(tmp_path), validation_fraction=0.2, seed=0)
    save_splits(splits, tmp_path / "splits.pt")
    return Setup(task_reference="digits", splits=tmp_path / "splits.pt", num_threads=1, silence_s=SILENCE_S)


@pytest.fixture
def search(cluster: Cluster, home: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A search in a process of its own; none outlives the test."""
    (tmp_path / "held.py").write_text(TASK)
    processes = []

    def start(*options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "hpo", "search", str(tmp_path / "held.py"), "--home", str(home)]
        command += ["--pruner", "none", "--executor", "ray", "--address", cluster.address, *options]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        processes.append(WarmPopen(command, text=True, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def idle_worker() -> Callable[..., None]:
    """What Ray runs instead of our worker: it arrives and waits. A closure, which travels to the nodes by value."""

    def arrive(address: tuple[str, int], key: bytes, number: int, _: Setup) -> None:
        with Client(address, authkey=key) as connection:
            connection.send_bytes(str(number).encode())
            connection.recv_bytes()

    return arrive


def assert_nothing_is_left_running(home: Path, cluster: Cluster) -> None:
    assert Study.load(open_storage(home), "held").counts()["running"] == 0
    client = open_store(home).client
    experiment = client.get_experiment_by_name("hpo/held")
    assert experiment is not None
    assert client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'") == []
    wait_until(lambda: not cluster.workers())


def trials_with_checkpoint(home: Path, epoch: int) -> int:
    return len({path.parent for path in home.glob(f"checkpoints/held/trial-*/epoch-{epoch:04d}.*.pt")})


def test_a_search_continues_as_nodes_join_and_are_lost(
    search: Callable[..., subprocess.Popen[str]], cluster: Cluster, home: Path, tmp_path: Path
) -> None:
    (tmp_path / "hold").touch()
    process = search("--workers", "4", "--trials", "5")
    assert process.stderr is not None
    assert process.stderr.readline() == (
        "asked Ray for --workers 4; it has room for 2, the others wait for nodes to join\n"
    )
    cluster.let_late_node_join()
    wait_until(lambda: trials_with_checkpoint(home, 2) == 4, process)
    cluster.kill_first_node()
    (tmp_path / "hold").unlink()
    output, errors = process.communicate(timeout=START_S)

    assert process.returncode == 0, errors
    assert errors == ""
    assert "raylet" not in output
    assert output.count("interrupted") == 2
    trials = Study.load(open_storage(home), "held").trials()
    assert [trial.state for trial in trials] == ["complete"] * 5
    assert sorted(trial.attempts for trial in trials) == [1, 1, 1, 2, 2]
    # Those of the lost node went on from their checkpoints: no epoch was trained twice.
    assert len((tmp_path / "diary").read_text().splitlines()) == 5 * 4
    assert_nothing_is_left_running(home, cluster)


def test_ctrl_c_leaves_no_task_and_the_cluster_as_it_was(
    search: Callable[..., subprocess.Popen[str]], cluster: Cluster, home: Path, tmp_path: Path
) -> None:
    cluster.let_late_node_join()
    (tmp_path / "hold").touch()
    process = search("--workers", "1", "--trials", "2")
    wait_until(lambda: trials_with_checkpoint(home, 2) == 1, process)
    process.send_signal(signal.SIGINT)
    (tmp_path / "hold").unlink()
    output, errors = process.communicate(timeout=START_S)
    assert process.returncode == 130, errors
    assert errors == "asked Ray for --workers 1\n"
    assert "raylet" not in output
    assert_nothing_is_left_running(home, cluster)


def test_a_loop_of_ones_own_resumes_from_its_save_when_its_task_is_killed(
    search: Callable[..., subprocess.Popen[str]], cluster: Cluster, home: Path, tmp_path: Path
) -> None:
    cluster.let_late_node_join()
    (tmp_path / "held.py").write_text(LOOP)
    (tmp_path / "hold").touch()
    process = search("--workers", "1", "--trials", "1")
    wait_until(lambda: bool(footprints(tmp_path, 3)), process)
    os.kill(footprints(tmp_path, 3)[0].pid, signal.SIGKILL)
    wait_until(lambda: len(footprints(tmp_path, 3)) == 2, process)
    (tmp_path / "hold").unlink()
    _, errors = process.communicate(timeout=START_S)
    assert process.returncode == 0, errors
    (trial,) = Study.load(open_storage(home), "looped").trials()
    assert (trial.state, trial.attempts, list(trial.curve)) == ("complete", 2, [1, 2, 3, 4])
    assert [each.resumed_after for each in footprints(tmp_path)] == [0, 0, 0, 2, 2]


@pytest.mark.usefixtures("connected")
def test_a_worker_of_two_processes_trains_a_trial_in_both(setup: Setup, tmp_path: Path) -> None:
    """As with --gpus-per-trial 2, but on CPUs: Ray gives one task two of them, which starts the other process."""
    config = load_task("digits").train_config({}, max_epochs=2, seed=0, device="cpu")
    pair = replace(setup, num_ranks=2)
    with RayWorkers(pair, num_workers=1, address="auto", gpus_per_trial=0) as workers:
        wait_until(lambda: not list(workers.events(0.1)) and workers.has_room())
        workers.run(Assignment(number=0, model_parameters={}, config=config, folder=tmp_path))
        settled = []
        done: list[object] = []
        while not done:
            for _, event in workers.events(0.1):
                if isinstance(event, EpochDone):
                    settled.append(event.result.settled["processes"])
                    workers.answer(0, Decision.CONTINUE)
                else:
                    done.append(event)
    assert done == [TrialDone()]
    assert settled == ["2", "2"]


@pytest.mark.usefixtures("connected")
def test_a_worker_that_falls_silent_is_replaced(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the network is gone: the connection stays, and nothing comes."""
    monkeypatch.setattr(ray_workers, "_work", idle_worker())
    config = load_task("digits").train_config({}, max_epochs=1, seed=0, device="cpu")
    with RayWorkers(replace(setup, silence_s=1), num_workers=1, address="auto", gpus_per_trial=0) as workers:
        wait_until(lambda: not list(workers.events(0.1)) and workers.has_room())
        (silent,) = workers._workers
        silent.connection.send_bytes = lambda _: None  # type: ignore[assignment, method-assign, misc]
        workers.run(Assignment(number=7, model_parameters={}, config=config, folder=tmp_path))
        events: list[object] = []
        wait_until(lambda: bool(events.extend(workers.events(0.1)) or events))
        assert events == [(7, WorkerDied("its worker was silent for 1 s", is_unexplained=False))]
        wait_until(lambda: not list(workers.events(0.1)) and workers.has_room())
        assert silent not in workers._workers


@pytest.mark.usefixtures("connected")
def test_a_worker_that_finds_no_task_says_so(setup: Setup) -> None:
    unfit = replace(setup, task_reference="gone.py")
    with (
        RayWorkers(unfit, num_workers=1, address="auto", gpus_per_trial=0) as workers,
        pytest.raises(SearchError, match=r"a worker cannot start: .*gone\.py"),
    ):
        wait_until(lambda: bool(list(workers.events(0.1))))


@pytest.mark.usefixtures("connected")
def test_workers_that_cannot_begin_are_not_asked_for_without_end(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'hpo'")

    monkeypatch.setattr(ray_workers, "_work", fail)
    monkeypatch.setattr(pool, "MAX_FAILED_STARTS", 2)
    with (
        RayWorkers(setup, num_workers=2, address="auto", gpus_per_trial=0) as workers,
        pytest.raises(SearchError, match=r"2 workers in a row died .* ModuleNotFoundError: No module named 'hpo'"),
    ):
        wait_until(lambda: bool(list(workers.events(0.1))))


@pytest.mark.usefixtures("connected")
def test_a_gpu_is_shared_by_as_many_workers_as_it_has_shares(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "_work", idle_worker())
    with pytest.raises(UsageError, match=r"no node .* has room for a trial, .* --gpus-per-trial 2; with --workers N"):
        ray_workers.ray_workers(setup, num_workers=None, address="auto", gpus_per_trial=2)
    assert RayWorkers(setup, num_workers=None, address="auto", gpus_per_trial=0.25).num_workers == 4
    with RayWorkers(setup, num_workers=5, address="auto", gpus_per_trial=0.25) as workers:
        assert workers.device == "cuda"
        wait_until(lambda: not list(workers.events(0.1)) and len(workers._workers) == 4)
        assert len(workers._asked) == 1
        assert ray.available_resources().get("GPU", 0) == 0
        first = workers._workers[0]
        workers._remove(first)
        wait_until(lambda: not list(workers.events(0.1)) and len(workers._workers) == 4)
        assert first not in workers._workers


@pytest.mark.parametrize(
    ("cpus", "gpus", "given", "num_workers"),
    [
        (8, 1, 0.1, 8),
        (16, 1, 0.1, 10),
        (16, 2, 0.3, 6),
        (8, 0, 0.5, 0),
        (8, 4, 0, 8),
        (0.5, 1, 1, 0),
        (8, 5, 2, 2),
        (3, 4, 2, 1),
    ],
)
def test_the_room_on_a_node(cpus: float, gpus: float, given: float, num_workers: int) -> None:
    """A share lies within one GPU: three shares of 0.3 to each of two, not six and two thirds. A trial on two GPUs is
    two processes, which have a CPU each."""
    assert ray_workers._room_on_node(cpus, gpus, ranks_of_trial(given), given) == num_workers


def test_only_a_worker_is_let_in_and_a_stranger_holds_up_nobody(caplog: pytest.LogCaptureFixture) -> None:
    listener = ray_workers._Listener("127.0.0.1")
    try:
        with socket.create_connection(listener.address), socket.create_connection(listener.address) as babbler:
            babbler.sendall(b"GET / HTTP/1.1\r\n\r\n")
            with pytest.raises(AuthenticationError):
                Client(listener.address, authkey=b"a guess")
            with Client(listener.address, authkey=listener.key) as worker:
                worker.send_bytes(b"3")
                assert wait([listener.wakeup_socket], START_S)
                number, connection = listener.accept()
                assert number == 3
                connection.send_bytes(b"welcome")
                assert worker.recv_bytes() == b"welcome"
                connection.close()
            wait_until(lambda: len(caplog.messages) == 2)
            assert not wait([listener.wakeup_socket], 0)
    finally:
        listener.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(listener.address)


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "local", "head", "127.0.0.1:"])
def test_an_address_that_is_none(setup: Setup, address: str) -> None:
    with pytest.raises(UsageError, match=f"--address {address} is not allowed: it must be auto or HOST:PORT"):
        RayWorkers(setup, num_workers=1, address=address, gpus_per_trial=0)


def test_no_cluster_at_the_address(setup: Setup) -> None:
    with pytest.raises(UsageError, match=r"no Ray cluster at --address 127\.0\.0\.2:.* refused.*; start one with"):
        RayWorkers(setup, num_workers=1, address=f"127.0.0.2:{_free_port()}", gpus_per_trial=0)


def test_something_else_at_the_address(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_workers, "_CONNECT_S", 1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UsageError, match=f"no Ray cluster at --address {address}: no answer in 1 s"):
            RayWorkers(setup, num_workers=1, address=address, gpus_per_trial=0)


def test_ray_is_not_installed(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="--executor ray needs Ray: pip install"):
        RayWorkers(setup, num_workers=1, address="auto", gpus_per_trial=0)


@pytest.mark.parametrize("share", [-1.0, 0.00001, 1.5, float("nan"), float("inf")])
def test_a_share_that_ray_cannot_give(setup: Setup, share: float) -> None:
    with pytest.raises(UsageError, match=r"--gpus-per-trial .* is not allowed"):
        RayWorkers(setup, num_workers=1, address="auto", gpus_per_trial=share)
