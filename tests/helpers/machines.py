"""Several machines, one study: each promise with real processes, which are really killed, stopped and cut off.

All of them use the stack of docs/deployment.md as plain processes: PostgreSQL with the roles of deploy/postgres.sh, the
MLflow server of compose.yaml with accounts, and workers that have the worker's account. Artifacts go through the server
into a folder, for there is no object store.

Where the tests run as root, each machine is a network namespace with an address and a host name of its own; elsewhere
it is a process with a home of its own, and the first test is skipped, saying so.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from optuna.storages import BaseStorage

from helpers.postgres import Postgres
from helpers.warm import WarmPopen
from hpo.cli import main
from hpo.records import TrialRecord
from hpo.search.lease import living_sessions
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.search.winner import TEST_READINGS
from hpo.session.search import submit_study
from hpo.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow.entities import Run


ROOT = Path(__file__).parent.parent.parent
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
PATIENCE_S = 180.0  # until a condition that must come true counts as missed, on a busy machine


# The digits, with a model that leaves a footprint in each epoch and waits where it is held. In a package with entry
# points, for studies of several machines know registered tasks only.
TASK = """
import json
import os
import time
from pathlib import Path

import torch

from hpo.models.mlp import MLP
from hpo.objective import Objective
from hpo.parameters import Float
from hpo.space import Group, Space
from hpo.objectives.digits import load


class Paced(torch.nn.Module):
    def __init__(self, net, mark):
        super().__init__()
        self.net, self.mark = net, mark
        self.register_buffer("epoch", torch.tensor(0))  # in the checkpoint: a resumed trial counts on

    def train(self, mode=True):
        if mode:
            self.epoch += 1
            folder, machine, epoch = Path(os.environ["PACE"]), os.environ["MACHINE"], int(self.epoch)
            footprint = {"machine": machine, "mark": self.mark, "epoch": epoch}
            with (folder / "footprints.jsonl").open("ab", buffering=0) as file:
                file.write((json.dumps(footprint) + "\\n").encode())
            for what in (epoch, self.mark):
                while (folder / f"hold-{machine}-{what}").exists():
                    time.sleep(0.01)
        return super().train(mode)

    def forward(self, inputs):
        return self.net(inputs)


def model(spec, *, mark=0.5):
    return Paced(MLP(spec, depth=1, width=16, activation="relu", norm="none", dropout=0.1), mark)


objective = Objective(
    name="paced", description="digits at a pace that is set", load=load, model=model,
    settings={"max_epochs": 3, "batch_size": 256, "optimizer": "sgd"},
    space=Space(
        Group("step size", lr=Float(1e-3, 1.0, log=True, default=0.1)),
        Group("which trial it is", mark=Float(0.0, 1.0, default=0.5)),
    ),
)
"""


# The command `hpo`, with another lease than 30 s.
HPO_WITH_LEASE = """
import sys
from functools import partial
from hpo.session import opening
from hpo.cli import main
opening.Session = partial(opening.Session, lease_s=float(sys.argv.pop(1)))
main()
"""


@dataclass(frozen=True)
class Machine:
    """Where a process can be started, with an address and a host name of its own where that is possible."""

    name: str
    namespace: str | None = None
    """A network namespace, in which a process that is started there runs."""

    @property
    def hostname(self) -> str:
        return self.name if self.namespace else socket.gethostname()

    def start(self, command: Sequence[object], **options: Any) -> WarmPopen:
        return WarmPopen(command, machine=(self.namespace, self.name) if self.namespace else None, **options)


@dataclass(frozen=True)
class Network:
    """Machines, and the address at which they find the servers."""

    address: str
    machines: dict[str, Machine]
    refusal: str | None
    """Why the machines are no network namespaces."""


@contextmanager
def machines_and_servers(*names: str) -> Iterator[Network]:
    """Namespaces linked to a bridge on which the servers listen; mere processes where they cannot be made."""
    bridge = f"hpo{os.getpid()}"
    subnet = f"198.18.{os.getpid() % 256}"  # set aside for tests of networks (RFC 2544)
    with ExitStack() as made:
        try:
            if os.geteuid() != 0:
                raise PermissionError("network namespaces need root")
            _ip(f"link add {bridge} type bridge")
            made.callback(_ip, f"link delete {bridge}")
            _ip(f"address add {subnet}.1/24 dev {bridge}")
            _ip(f"link set {bridge} up")
            machines = {}
            for number, name in enumerate(names, start=2):
                namespace, link = f"{bridge}-{name}", f"{bridge}{number}"
                _ip(f"netns add {namespace}")
                made.callback(_ip, f"netns delete {namespace}")
                _ip(f"link add {link} type veth peer name eth0 netns {namespace}")
                _ip(f"link set {link} master {bridge} up")
                _ip(f"-n {namespace} address add {subnet}.{number}/24 dev eth0")
                for own in ("eth0", "lo"):
                    _ip(f"-n {namespace} link set {own} up")
                machines[name] = Machine(name, namespace)
        except (OSError, subprocess.CalledProcessError) as error:
            network = Network("127.0.0.1", {name: Machine(name) for name in names}, str(error))
        else:
            network = Network(f"{subnet}.1", machines, None)
        yield network


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


class Tracking:
    """The MLflow server of compose.yaml, as a process."""

    def __init__(self, folder: Path, address: str, postgres: Postgres, secrets: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind((address, 0))
            port = probe.getsockname()[1]
        self.uri = f"http://{address}:{port}"
        database = f"@{address}:{postgres.port}/"
        accounts = folder / "basic_auth.ini"
        settings = (ROOT / "deploy" / "basic_auth.ini").read_text().replace("@postgres/", database)
        # Else each request costs a tenth of a second of CPU to check the password.
        accounts.write_text(f"{settings}auth_cache_ttl_seconds = 60\n")
        options = {
            "--backend-store-uri": f"postgresql+psycopg://mlflow{database}mlflow",
            "--artifacts-destination": str(folder / "artifacts"),
            "--host": address,
            "--port": str(port),
            "--workers": "1",
            "--allowed-hosts": f"{address}:{port}",
        }
        given = dict(word.partition("=")[::2] for word in SERVICES["mlflow"]["command"][2:])
        assert set(options) <= set(given), "these are its options, with other places"
        self._command = [f"{option}={value}" for option, value in (given | options).items()]
        self._environment = service_environment("mlflow", secrets) | {"MLFLOW_AUTH_CONFIG_PATH": str(accounts)}
        self._log = folder / "mlflow.log"
        self._folder = folder
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *self._command],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._is_healthy, or_else=self._log.read_text)

    def kill(self) -> None:
        for process in processes(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Kill the server, and start it again at the end of the block."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    def _is_healthy(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5):
                return True
        except OSError:
            return False


def service_environment(service: str, secrets: dict[str, str]) -> dict[str, str]:
    """The environment that compose.yaml gives a service, with nothing else of MLflow, PostgreSQL or hpo."""
    given = SERVICES[service]["environment"].items()
    own = {name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: secrets[found[1]], value) for name, value in given}
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "PG", "HPO", "AWS"))}
    return {**others, **own, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Servers:
    """What the machines share."""

    network: Network
    postgres: Postgres
    tracking: Tracking
    storage: str
    environment: dict[str, str]
    """What a worker is given, as in compose.yaml."""


class Process:
    """A command on a machine, that leads a group of its own, as in a terminal."""

    def __init__(self, machine: Machine, command: Sequence[object], environment: dict[str, str], log: Path) -> None:
        self.machine = machine
        self._log = log
        with log.open("wb") as file:
            self._process = machine.start(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.name = f"{machine.hostname}:{self._process.pid}"

    @property
    def said(self) -> str:
        return self._log.read_text()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all that it has started: kill -9 is as the loss of the machine."""
        for process in processes(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, number)
        if number == signal.SIGKILL:
            self._process.wait()
            wait_until(lambda: not processes(self._process.pid))

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self) -> int:
        """Wait for its end; its exit code."""
        wait_until(self.has_ended, or_else=lambda: self.said)
        return self._process.returncode


def processes(session: int) -> list[int]:
    """Those of a session that live."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError, FileNotFoundError):
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if os.getsid(int(folder.name)) == session and state != "Z":
                found.append(int(folder.name))
    return found


def wait_until(condition: Callable[[], Any], *running: Process, or_else: Callable[[], str] = str) -> None:
    """Wait for a condition, which will not come true any more when a process that it depends on has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        for process in running:
            assert not process.has_ended(), process.said
        assert time.monotonic() < deadline, or_else() or [process.said for process in running]
        time.sleep(0.05)


@dataclass(frozen=True)
class Footprint:
    """What a model wrote down when one of its epochs began."""

    machine: str
    mark: float
    epoch: int


@dataclass(frozen=True)
class Answer:
    exit_code: int
    out: str
    err: str


class Team:
    """The machines that work on one study, and what they have done."""

    def __init__(self, folder: Path, servers: Servers, study: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.servers = servers
        self.study_name = study
        self._capsys = capsys
        self._processes: list[Process] = []
        self.site = folder / "site"
        package, info = self.site / "paced_tasks", self.site / "paced_tasks-1.dist-info"
        for path in (package, info):
            path.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "paced.py").write_text(TASK)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: paced-tasks\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[hpo.objectives]\npaced = paced_tasks\n")

    def submit(self, **options: Any) -> Study:
        """Queue the study. By default at random, with nothing pruned."""
        chosen: dict[str, Any] = {
            "study": self.study_name,
            "strategy": "random",
            "pruner": "none",
            "home": self.folder / "desk",
        }
        return submit_study("paced", **chosen | options)

    def start(self, machine: str, *arguments: object, lease_s: float | None = None, home: str = "") -> Process:
        """Start `hpo` on a machine, with a home of its own unless another is named."""
        there = self.servers.network.machines[machine]
        command = ["-m", "hpo"] if lease_s is None else ["-c", HPO_WITH_LEASE, lease_s]
        environment = self.servers.environment | {
            "PYTHONPATH": os.pathsep.join([str(self.site), *sys.path]),
            "PACE": str(self.folder),
            "MACHINE": machine,
            "HPO_HOME": str(self.home(home or machine)),
        }
        log = self.folder / f"log-{len(self._processes)}"
        self._processes.append(Process(there, [sys.executable, *command, *arguments], environment, log))
        return self._processes[-1]

    def start_worker(self, machine: str, *, lease_s: float | None = None, home: str = "") -> Process:
        return self.start(machine, "worker", self.study_name, "--workers", 1, lease_s=lease_s, home=home)

    def run(self, line: str) -> Answer:
        """Run `hpo` here, as somebody who only looks."""
        self._capsys.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["hpo", *line.split()])
            with pytest.raises(SystemExit) as exited:
                main()
        captured = self._capsys.readouterr()
        return Answer(int(exited.value.code or 0), captured.out, captured.err)

    def now(self) -> str:
        """What `hpo studies` says of the study."""
        answer = self.run("studies --json")
        (row,) = (row for row in json.loads(answer.out) if row["study"] == self.study_name)
        return str(row["now"])

    def gc(self, home: str, *, keep: int = 5) -> list[str]:
        """What `hpo gc` removes."""
        answer = self.run(f"gc {self.study_name} --keep {keep} --home {self.home(home)} --json")
        return [removed["what"] for removed in json.loads(answer.out)["removed"]]

    def home(self, name: str) -> Path:
        return self.folder / f"home-{name}"

    def hold(self, machine: str, what: float) -> None:
        """Make trials on a machine wait at the beginning of this epoch, or one of them by its mark."""
        (self.folder / f"hold-{machine}-{what}").touch()

    def release(self, machine: str, what: float) -> None:
        (self.folder / f"hold-{machine}-{what}").unlink()

    def footprints(self, machine: str | None = None, epoch: int | None = None) -> list[Footprint]:
        path = self.folder / "footprints.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [Footprint(**json.loads(line)) for line in lines]
        return [print_ for print_ in found if machine in (None, print_.machine) and epoch in (None, print_.epoch)]

    def reached(self, machine: str, epoch: int, *running: Process, times: int = 1) -> Footprint:
        """Wait until this many trials have begun the epoch on a machine; the last one's footprint."""
        wait_until(lambda: len(self.footprints(machine, epoch)) >= times, *running)
        return self.footprints(machine, epoch)[times - 1]

    @cached_property
    def _storage(self) -> BaseStorage:
        return open_storage(self.folder, self.servers.storage)

    def study(self) -> Study:
        return Study.load(self._storage, self.study_name)

    def trials(self) -> list[TrialRecord]:
        return self.study().trials()

    def trial(self, mark: float) -> TrialRecord:
        (trial,) = (trial for trial in self.trials() if trial.values["mark"] == mark)
        return trial

    def searchers(self) -> set[str]:
        """Names of the sessions that work on the study."""
        return {session.name for session in living_sessions(self._storage, self.study_name)}

    def runs(self, kind: str = "trial") -> list[Run]:
        """The study's runs in MLflow, by trial."""
        client = open_store(self.home("desk")).client
        experiment = client.get_experiment_by_name(f"hpo/{self.study_name}")
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id], f"tags.`hpo.kind` = '{kind}'")
        return sorted(found, key=lambda run: int(run.data.tags.get("hpo.trial", -1)))

    def recorded_epochs(self, run: Run) -> list[int]:
        history = open_store(self.home("desk")).client.get_metric_history(run.info.run_id, "val/accuracy")
        return [metric.step for metric in history]

    def assert_all_is_there(self, num_trials: int, *homes: str) -> None:
        """The study has exactly its trials, both stores have every epoch once, nothing runs, nothing waits."""
        study, trials = self.study(), self.trials()
        assert len(trials) == num_trials
        assert {trial.state for trial in trials} <= {"complete", "pruned"}
        assert all(list(trial.curve) == list(range(1, len(trial.curve) + 1)) for trial in trials), "no hole in a curve"
        assert [len(trial.curve) for trial in trials if trial.state == "complete"] == [
            study.settings.max_epochs
        ] * study.counts()["complete"]
        runs = self.runs()
        assert [int(run.data.tags["hpo.trial"]) for run in runs] == list(range(num_trials))
        assert {run.info.status for run in runs} == {"FINISHED"}
        assert [self.recorded_epochs(run) for run in runs] == [list(trial.curve) for trial in trials]
        assert [run.info.status for run in self.runs("study")] == ["FINISHED"]
        assert len(study.recorded(TEST_READINGS)) == 1
        assert self.now() == "done"
        for home in homes:
            for folder in ("spool", "splits", "checkpoints"):
                left = {path.name for path in (self.home(home) / folder).glob(f"{self.study_name}/**/*")}
                assert left <= {"database"}, "nothing but the note whose files they were"

    def end(self) -> None:
        for process in self._processes:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGKILL)
