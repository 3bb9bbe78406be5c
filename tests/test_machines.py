"""Several machines, one study: each promise with real processes, which are really killed, stopped and cut off."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from helpers.machines import (
    ROOT,
    Footprint,
    Process,
    Servers,
    Team,
    Tracking,
    machines_and_servers,
    service_environment,
    wait_until,
)
from helpers.postgres import PASSWORD, Postgres, running_postgres
from helpers.warm import WarmPopen

import hpo

pytestmark = pytest.mark.xdist_group("machines")  # one PostgreSQL and one MLflow server for all
SHORT_LEASE_S = 5.0
HOUR_S = 3600.0


# Stands for the object store, in which the bucket is there already.
BOTO3 = """
class client:
    def __init__(self, name): pass
    def list_buckets(self): return {"Buckets": [{"Name": "mlflow"}]}
"""


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("servers")
    names = set(re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yaml").read_text()))
    secrets = {name: f"{name.lower()}-%{{}}@-secret" for name in names}
    with ExitStack() as running:
        network = running.enter_context(machines_and_servers("anna", "bert", "cleo"))
        listen = ",".join({"127.0.0.1", network.address})
        postgres = running.enter_context(running_postgres("fsync=off", f"listen_addresses={listen}"))
        postgres.let_in(f"{network.address}/24")
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
    answers = []
    for machine in servers.network.machines.values():
        with machine.start(command, env=servers.environment, text=True, stdout=subprocess.PIPE) as process:
            answers.append(process.communicate()[0])
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
    assert team.now() == "queued"
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
    third: dict[str, Any] = {"storage": team.servers.storage, "tracking_uri": team.servers.tracking.uri}
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


def test_outages_of_postgresql_and_of_mlflow_lose_nothing_and_a_machine_leaves_when_asked(team: Team) -> None:
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
            wait_until(lambda worker=worker: "the study's database does not answer" in worker.said, *workers)  # type: ignore[misc]
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
            wait_until(lambda worker=worker: "until MLflow accepts it" in worker.said, *workers)  # type: ignore[misc]

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
    assert team.now() == "queued"
    command = [sys.executable, "-c", PRESENCE, team.servers.storage, team.study_name]
    with WarmPopen(command, env=team.servers.environment, stdin=subprocess.PIPE) as process:
        wait_until(lambda: team.now() == f"searched by {socket.gethostname()}:{process.pid}")
        process.kill()
        wait_until(lambda: team.now() == "queued")


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
