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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from mlflow.entities import Run
from optuna.storages import BaseStorage
from postgres import PASSWORD, Postgres, running_postgres

import hpo
from hpo.cli import main
from hpo.records import TrialRecord
from hpo.search.lease import living_sessions
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.search.winner import TEST_READINGS
from hpo.session.search import submit_study
from hpo.tracking.store import open_store

pytestmark = pytest.mark.xdist_group("machines")  # one PostgreSQL and one MLflow server for all

ROOT = Path(__file__).parent.parent
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]

PATIENCE_S = 180.0  # until a condition that must come true counts as missed, on a busy machine
SHORT_LEASE_S = 5.0
HOUR_S = 3600.0

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
from hpo.space import Float, Group, Space
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

# Stands for the object store, in which the bucket is there already.
BOTO3 = """
class client:
    def __init__(self, name): pass
    def list_buckets(self): return {"Buckets": [{"Name": "mlflow"}]}
"""


# --- machines ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where a process can be started, with an address and a host name of its own where that is possible."""

    name: str
    prefix: tuple[str, ...] = ()
    """Words before a command that run it there."""

    @property
    def hostname(self) -> str:
        return self.name if self.prefix else socket.gethostname()


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
                named = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', name)
                machines[name] = Machine(name, ("ip", "netns", "exec", namespace, *named))
        except (OSError, subprocess.CalledProcessError) as error:
            network = Network("127.0.0.1", {name: Machine(name) for name in names}, str(error))
        else:
            network = Network(f"{subnet}.1", machines, None)
        yield network


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


# --- servers ----------------------------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    names = set(re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yaml").read_text()))
    secrets = {name: f"{name.lower()}-%{{}}@-secret" for name in names}
    with ExitStack() as running:
        network = running.enter_context(machines_and_servers("anna", "bert", "cleo"))
        listen = ",".join({"127.0.0.1", network.address})
        postgres = running.enter_context(running_postgres("fsync=off", f"listen_addresses={listen}"))
        _let_machines_in(postgres, network)
        environment = {
            **service_environment("postgres", secrets),
            "PATH": f"{postgres._binaries}{os.pathsep}{os.environ['PATH']}",
            "PGHOST": "127.0.0.1",
            "PGPORT": str(postgres.port),
            "PGPASSWORD": PASSWORD,
            "POSTGRES_USER": "hpo",
        }
        subprocess.run(["sh", ROOT / "deploy" / "postgres.sh"], env=environment, check=True)
        tracking = Tracking(folder, network.address, postgres, secrets)
        running.callback(tracking.kill)
        _make_account(folder, service_environment("setup", secrets) | {"MLFLOW_TRACKING_URI": tracking.uri})
        storage = f"postgresql+psycopg://studies@{network.address}:{postgres.port}/studies"
        worker = service_environment("worker", secrets)
        worker |= {"HPO_STORAGE": storage, "MLFLOW_TRACKING_URI": tracking.uri}
        yield Servers(network, postgres, tracking, storage, worker)


def _let_machines_in(postgres: Postgres, network: Network) -> None:
    with postgres.connect() as connection:
        (path,) = connection.execute("SHOW hba_file").fetchone() or ()
        with Path(path).open("a") as rules:
            rules.write(f"host all all {network.address}/24 scram-sha-256\n")
        connection.execute("SELECT pg_reload_conf()")


def _make_account(folder: Path, environment: dict[str, str]) -> None:
    stand_in = folder / "stand-in"
    stand_in.mkdir()
    (stand_in / "boto3.py").write_text(BOTO3)
    made = subprocess.run(
        [sys.executable, ROOT / "deploy" / "setup.py"],
        env=environment | {"PYTHONPATH": str(stand_in)},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr


# --- processes --------------------------------------------------------------------------------------------------------


class Process:
    """A command on a machine, that leads a group of its own, as in a terminal."""

    def __init__(self, machine: Machine, command: Sequence[object], environment: dict[str, str], log: Path) -> None:
        self.machine = machine
        self._log = log
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                [*machine.prefix, *map(str, command)],
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
        chosen = {"study": self.study_name, "strategy": "random", "pruner": "none", "home": self.folder / "desk"}
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


@pytest.fixture
def team(
    tmp_path: Path,
    servers: Servers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Team]:
    """None of its processes outlives the test. Here, too, the environment is that of a worker."""
    for name in set(os.environ) | set(servers.environment):
        if name.startswith(("MLFLOW", "PG", "HPO")):
            monkeypatch.delenv(name, raising=False)
            if name in servers.environment:
                monkeypatch.setenv(name, servers.environment[name])
    found = Team(tmp_path, servers, f"study-{uuid4().hex[:6]}", capsys)
    monkeypatch.syspath_prepend(str(found.site))
    found.home("desk").mkdir()
    monkeypatch.setenv("HPO_HOME", str(found.home("desk")))
    yield found
    found.end()


# --- what they promise ------------------------------------------------------------------------------------------------


def test_each_machine_has_an_address_and_a_host_name_of_its_own(servers: Servers) -> None:
    """Whether the other tests show what they show with machines, or with processes."""
    if servers.network.refusal:
        pytest.skip(
            "NOT SHOWN: the machines of these tests were processes of one machine with homes of their own, "
            f"for network namespaces cannot be made here ({servers.network.refusal}); run the tests as root"
        )
    code = "import os, psycopg, socket; connection = psycopg.connect(os.environ['HPO_STORAGE'].replace('+psycopg', ''))"
    code += "; print(socket.gethostname(), connection.execute('SELECT inet_client_addr()').fetchone()[0])"
    command = [sys.executable, "-c", code]
    answers = [
        subprocess.run([*machine.prefix, *command], env=servers.environment, text=True, capture_output=True).stdout
        for machine in servers.network.machines.values()
    ]
    subnet = servers.network.address.rpartition(".")[0]
    assert [answer.split() for answer in answers] == [
        ["anna", f"{subnet}.2"],
        ["bert", f"{subnet}.3"],
        ["cleo", f"{subnet}.4"],
    ]


def test_two_machines_share_a_study(team: Team, tmp_path: Path) -> None:
    settings = ["--trials", 7, "--epochs", 5, "--strategy", "random"]
    queued = team.start("cleo", "submit", "paced", "--study", team.study_name, *settings)
    assert queued.finish() == 0, queued.said
    assert team.now() == "stopped"
    for machine in ("anna", "bert"):
        team.hold(machine, 1)
    workers = [team.start_worker(machine) for machine in ("anna", "bert")]
    for machine in ("anna", "bert"):
        team.reached(machine, 1, *workers)
    assert {*team.now().removeprefix("searched by ").split(", ")} == {worker.name for worker in workers}
    second = team.run(f"search paced --study {team.study_name}")
    assert second.exit_code == 2
    assert all(worker.name in second.err for worker in workers)
    assert second.err.endswith("; join in with --join, or choose another name with --study.\n")
    assert second.err.count("\n") == 1
    for machine in ("anna", "bert"):
        team.release(machine, 1)
    assert [worker.finish() for worker in workers] == [0, 0], [worker.said for worker in workers]

    team.assert_all_is_there(7, "anna", "bert", "desk")
    assert [trial.attempts for trial in team.trials()] == [1] * 7
    by_trial = Counter((footprint.machine, footprint.mark) for footprint in team.footprints())
    assert len(by_trial) == 7, "each trial on one machine"
    assert {machine for machine, _ in by_trial} == {"anna", "bert"}
    told = {re.search(r"^Best +(trial \d+)", worker.said, re.MULTILINE)[1] for worker in workers}  # type: ignore[index]
    assert len(told) == 1, "one winner"

    winner = json.loads(team.run(f"best {team.study_name} --json").out)["winner"]
    assert {f"trial {winner['trial']}"} == told
    assert winner["num_test_readings"] == 1
    assert len(json.loads(team.run(f"show {team.study_name} --json").out)["trials"]) == 7
    third = {"storage": team.servers.storage, "tracking_uri": team.servers.tracking.uri}
    assert hpo.load_best(team.study_name, home=tmp_path / "third", **third).classes == tuple("0123456789")
    assert {what.partition(" of ")[0] for what in team.gc("desk", keep=1)} == {"weights"}
    assert team.gc("desk", keep=1) == []
    assert hpo.load_best(team.study_name, home=tmp_path / "third", **third).classes


def test_of_three_machines_one_is_lost_and_one_sleeps_past_its_lease(team: Team) -> None:
    """The survivor shares the home of the lost one, and goes on from its checkpoint."""
    team.submit(trials=5, epochs=4)
    team.hold("anna", 3)
    for machine in ("bert", "cleo"):
        team.hold(machine, 2)
    anna = team.start_worker("anna", lease_s=SHORT_LEASE_S, home="shared")
    lost = team.reached("anna", 3, anna)
    bert = team.start_worker("bert", lease_s=SHORT_LEASE_S, home="shared")
    cleo = team.start_worker("cleo", lease_s=SHORT_LEASE_S)
    slept = team.reached("cleo", 2, anna, bert, cleo)
    team.reached("bert", 2, anna, bert, cleo)

    anna.signal(signal.SIGKILL)
    _stop_without_the_lock(cleo, team.servers.postgres)
    wait_until(lambda: team.searchers() == {bert.name}, bert)
    assert team.now() == f"searched by {bert.name}"
    wait_until(lambda: team.study().counts()["interrupted"] == 2, bert)
    team.hold("bert", slept.mark)
    team.release("bert", 2)
    wait_until(lambda: Footprint("bert", slept.mark, 1) in team.footprints(), bert)

    team.release("cleo", 2)  # its worker ends the epoch, and the coordinator must not write that down
    cleo.signal(signal.SIGCONT)
    wait_until(lambda: "taken over by another machine" in cleo.said, bert, cleo)
    wait_until(lambda: {slept.mark} < {footprint.mark for footprint in team.footprints("cleo")}, bert, cleo)
    team.release("bert", slept.mark)
    assert [bert.finish(), cleo.finish()] == [0, 0], [bert.said, cleo.said]

    assert team.gc("shared") == ["data of a search that died"]
    team.assert_all_is_there(5, "shared", "cleo")
    path = [(step.machine, step.epoch) for step in team.footprints() if step.mark == lost.mark]
    assert path == [*(("anna", epoch) for epoch in (1, 2, 3)), ("bert", 3), ("bert", 4)]
    path = [(step.machine, step.epoch) for step in team.footprints() if step.mark == slept.mark]
    assert path == [("cleo", 1), ("cleo", 2), *(("bert", epoch) for epoch in (1, 2, 3, 4))]
    assert (team.trial(lost.mark).attempts, team.trial(slept.mark).attempts) == (2, 2)
    assert Counter(trial.attempts for trial in team.trials()) == {1: 3, 2: 2}
    assert "Traceback" not in cleo.said + bert.said


def _stop_without_the_lock(process: Process, postgres: Postgres) -> None:
    """Stop a process at a moment at which it keeps nobody from asking; else the others would wait for 5 minutes."""
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted"
    while True:
        process.signal(signal.SIGSTOP)
        with postgres.connect() as connection:
            if connection.execute(held).fetchone() == (0,):
                return
        process.signal(signal.SIGCONT)


def test_a_machine_leaves_and_one_comes_back_and_nobody_waits_for_a_lease(team: Team) -> None:
    """With leases of an hour."""
    team.submit(trials=3)
    for machine in ("anna", "bert"):
        team.hold(machine, 2)
    anna, bert = (team.start_worker(machine, lease_s=HOUR_S) for machine in ("anna", "bert"))
    left = team.reached("anna", 2, anna, bert)
    team.reached("bert", 2, anna, bert)

    anna.signal(signal.SIGINT)
    wait_until(lambda: "stopping after the current epoch; press Ctrl-C again to stop now" in anna.said, bert)
    team.release("anna", 2)
    assert anna.finish() == 130, anna.said
    assert "Interrupted" in anna.said
    assert team.now() == f"searched by {bert.name}"
    assert team.trial(left.mark).state == "interrupted"

    team.hold("bert", 1)
    team.release("bert", 2)
    wait_until(lambda: Footprint("bert", left.mark, 1) in team.footprints(), bert)
    bert.signal(signal.SIGKILL)
    assert team.now() == f"searched by {bert.name}"

    team.release("bert", 1)
    again = team.start("bert", "search", "paced", "--study", team.study_name, "--join", lease_s=HOUR_S)
    assert again.finish() == 0, again.said
    assert team.gc("anna") == [f"checkpoints of trial {team.trial(left.mark).number}"]
    team.assert_all_is_there(3, "anna", "bert")
    assert team.trial(left.mark).attempts == 3


def test_outages_of_postgresql_and_of_mlflow_lose_nothing_and_a_machine_that_is_told_to_leaves(team: Team) -> None:
    team.submit(trials=6)
    both = ("anna", "bert")
    for machine in both:
        team.hold(machine, 2)
    workers = [team.start_worker(machine) for machine in both]
    for machine in both:
        team.reached(machine, 2, *workers)
        team.hold(machine, 1)
    with team.servers.postgres.outage():  # MLflow's runs are in it, too
        for machine in both:
            team.release(machine, 2)
        for worker in workers:
            wait_until(lambda worker=worker: "the study's database does not answer" in worker.said, *workers)
        time.sleep(5)
        assert [len(team.footprints(machine)) for machine in both] == [2, 2]
    for machine in both:
        team.reached(machine, 1, *workers, times=2)
        team.hold(machine, 2)

    with team.servers.tracking.outage():
        for machine in both:
            team.release(machine, 1)
            team.reached(machine, 2, *workers, times=2)
            team.hold(machine, 1)
            team.release(machine, 2)
            team.reached(machine, 1, *workers, times=3)
            team.hold(machine, 2)
        for worker in workers:
            wait_until(lambda worker=worker: "until MLflow takes it" in worker.said, *workers)

    anna, bert = workers
    for machine in both:
        team.release(machine, 1)
        team.reached(machine, 2, *workers, times=3)
    anna.signal(signal.SIGTERM)
    wait_until(lambda: "stopping after the current epoch" in anna.said, bert)
    team.release("anna", 2)
    assert anna.finish() == 130, anna.said
    assert bert.name == team.now().removeprefix("searched by ")
    assert team.study().counts()["interrupted"] == 1
    team.release("bert", 2)
    assert bert.finish() == 0, bert.said

    team.assert_all_is_there(6, "bert")
    assert Counter(trial.attempts for trial in team.trials()) == {1: 5, 2: 1}
    for folder in ("spool", "splits"):
        assert list((team.home("anna") / folder).glob("**/*.*")) == []


# --- what is looked at, and what is refused ---------------------------------------------------------------------------

PRESENCE = """
import sys
from pathlib import Path
from hpo.search.lease import Session
from hpo.search.storage import open_storage
with Session(open_storage(Path(), sys.argv[1]), sys.argv[2], lease_s=1):
    sys.stdin.read()
"""


def test_studies_tell_the_living_from_the_dead(team: Team) -> None:
    team.submit(trials=2)
    assert team.now() == "stopped"
    command = [sys.executable, "-c", PRESENCE, team.servers.storage, team.study_name]
    with subprocess.Popen(command, env=team.servers.environment, stdin=subprocess.PIPE) as process:
        wait_until(lambda: team.now() == f"searched by {socket.gethostname()}:{process.pid}")
        process.kill()
        wait_until(lambda: team.now() == "stopped")


REFUSED: list[tuple[str, dict[str, str], str]] = [
    (
        "worker {study}",
        {"HPO_STORAGE": ""},
        r"several machines need one database: give --storage postgresql\+psycopg://USER@HOST/DATABASE",
    ),
    (
        "worker {study} --storage sqlite:///x.db",
        {},
        r"the storage 'sqlite:///x.db' is sqlite, whose locks and write-ahead log do not work between machines; give ",
    ),
    (
        "submit {file} --study {study}",
        {},
        r"no registered task '.*/paced\.py'\. Available: .*digits.* Studies for several machines know names, not files",
    ),
    (
        "submit paced_tasks.paced:objective --study {study}",
        {},
        r"no registered task 'paced_tasks\.paced:objective'.*know names, not files",
    ),
    (
        "submit paced --study {study} -p lr=0.01:0.1",
        {},
        r"study '.*' was made with lr \(in 'step size'\) .*0\.001.*, not .*0\.01.*another name with --study",
    ),
    (
        "submit paced --study {study} --space /tmp/mine.py",
        {},
        r"no registered search space '/tmp/mine\.py'",
    ),
    (
        "worker nothing",
        {},
        r"no study 'nothing'",
    ),
    (
        "worker {study} --workers 0",
        {},
        r"--workers 0 is not allowed: it must be at least 1",
    ),
    (
        "studies",
        {"PGPASSWORD": "wrong-s3cret"},
        r"PostgreSQL at postgresql\+psycopg://studies@.* refuses: .*password authentication failed.*check the user",
    ),
    (
        "studies --storage postgresql://studies:wrong-s3cret@{address}/studies",
        {},
        r"PostgreSQL at postgresql://studies:\*\*\*@.* refuses: .*password authentication failed",
    ),
    (
        "studies --storage postgresql://studies@{address}/mlflow",
        {},
        r"refuses: .*permission denied for database",
    ),
    (
        "submit paced --study {study} --tracking-uri sqlite:///m.db",
        {},
        r"need one MLflow store, and sqlite:///m\.db is a file of this machine; give --tracking-uri http://HOST:PORT",
    ),
    (
        "worker {study}",
        {"MLFLOW_TRACKING_URI": ""},
        r"the one in the home is a file of this machine",
    ),
    (
        "worker {study}",
        {"MLFLOW_TRACKING_PASSWORD": "wrong-s3cret"},
        r"cannot use the MLflow store at http://.*",
    ),
]


@pytest.mark.parametrize(("line", "environment", "reason"), REFUSED, ids=[line for line, *_ in REFUSED])
def test_what_cannot_work_is_refused_in_one_line(
    line: str, environment: dict[str, str], reason: str, team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    team.submit(trials=2)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names = {"study": team.study_name, "file": team.site / "paced_tasks" / "paced.py"}
    answer = team.run(line.format(**names, address=f"{team.servers.network.address}:{team.servers.postgres.port}"))
    assert (answer.exit_code, answer.out.count("Traceback")) == (2, 0), answer
    assert re.match(rf"Error: .*{reason}", answer.err), answer.err
    assert answer.err.count("\n") == 1, answer.err
    assert "s3cret" not in answer.err


def test_a_task_that_is_not_installed_on_a_machine_is_refused_there(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    team.submit(trials=2)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(team.site)])
    answer = team.run(f"worker {team.study_name}")
    assert answer.exit_code == 2
    assert re.fullmatch(r"Error: no registered task 'paced'\. Available: .*digits.*\n", answer.err)
