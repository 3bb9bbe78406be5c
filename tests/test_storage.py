"""The study's database: sqlite and a real PostgreSQL, which is really killed, and the sessions that share it."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import optuna
import pytest
from helpers.postgres import PASSWORD, Postgres
from helpers.warm import WarmPopen
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from hpo.config import Direction
from hpo.database import without_password
from hpo.errors import StoreError
from hpo.machine import process_host
from hpo.parameters import Float, Int
from hpo.records import TrialState as StateName
from hpo.search import lease, optuna_tables
from hpo.search.lease import Session, SessionInfo, living_sessions
from hpo.search.optuna_tables import DirectStorage
from hpo.search.settings import StudySettings
from hpo.search.storage import OutageError, StudyStorage, open_storage, read_storage
from hpo.search.stored import OWNER
from hpo.search.study import Study, list_studies
from hpo.space import Group, Space

SECRETS = (PASSWORD, "s3cret")
TIMEOUT_S = 60
SETTINGS = StudySettings(
    task="digits",
    space=Space(Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), depth=Int(2, 20, default=8))),
    seed=0,
    strategy="priority",
    pruner="none",
    max_epochs=5,
    metric="accuracy",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=20,
)


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> str:
    """The address of the database that these tests use, one after the other."""
    return postgres.new_database()


@pytest.fixture
def url(database: str, postgres: Postgres) -> str:
    """The address of a database, which is empty now: making one for each test costs a thousand files."""
    with postgres.connect(database.rpartition("/")[2]) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return database


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> StudyStorage:
    """An empty storage, of either kind."""
    return open_storage(tmp_path, request.getfixturevalue("url") if request.param == "postgresql" else None)  # type: ignore[return-value]


@pytest.fixture
def shared(tmp_path: Path, url: str) -> StudyStorage:
    """An empty storage in PostgreSQL."""
    return open_storage(tmp_path, url)  # type: ignore[return-value]


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


class Process:
    """Another coordinator's process: Python code with a `storage`, that reads lines and prints answers."""

    def __init__(self, url: str, code: str, *args: object) -> None:
        opening = "import sys\nfrom pathlib import Path\nfrom hpo.search.lease import Session\n"
        opening += "from hpo.search.storage import open_storage\nstorage = open_storage(Path(), sys.argv[1])\n"
        self.process = WarmPopen(
            [sys.executable, "-c", opening + code, url, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def answer(self, line: str | None = None) -> str:
        """The next line that it prints, after it was sent one."""
        if line is not None:
            print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def finish(self) -> str:
        """Wait for its end, which must be without an error; what it wrote to stderr."""
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, err
        return err


@pytest.fixture
def start(url: str) -> Iterator[Callable[..., Process]]:
    """Start processes over the database; none outlives the test."""
    processes = []

    def start_one(code: str, *args: object) -> Process:
        processes.append(Process(url, code, *args))
        return processes[-1]

    yield start_one
    for process in processes:
        process.process.kill()
        process.process.communicate()


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("sqlite:///optuna.db", "sqlite, whose locks and write-ahead log do not work between machines"),
        ("mysql://me:s3cret@host/db", "not PostgreSQL with psycopg"),
        ("postgresql+psycopg2://me:s3cret@host/db", "not PostgreSQL with psycopg"),
        ("studies.db", "not a database URL"),
        ("postgresql://me:s3cret@host:port/db", "not a database URL"),
    ],
)
def test_an_address_that_is_not_postgresql_is_refused_with_what_to_give(
    address: str, reason: str, tmp_path: Path
) -> None:
    for opened in (open_storage, read_storage):
        with pytest.raises(StoreError, match=rf"'.*' is {reason}.*postgresql\+psycopg://USER@") as refusal:
            opened(tmp_path / "home", address)
        assert_one_line_without_secrets(refusal.value)
    assert not (tmp_path / "home").exists()


def test_a_server_that_does_not_answer_a_wrong_password_and_an_unknown_database_are_distinguished(
    postgres: Postgres, tmp_path: Path
) -> None:
    refused = {
        postgres.url("nowhere"): 'refuses: .*database "nowhere" does not exist',
        postgres.url("postgres", password="wrong-s3cret"): 'refuses: .*password .*failed for user "hpo"; check',
        "postgresql://hpo:s3cret@127.0.0.1:1/db": "no PostgreSQL answers at .*127.0.0.1:1/db: .*refused.*start it",
        "postgresql://hpo:s3cret@nowhere.invalid/db": "no PostgreSQL answers at .*nowhere.invalid.*check the host",
    }
    for address, told in refused.items():
        with pytest.raises(StoreError, match=told) as refusal:
            open_storage(tmp_path, address)
        assert_one_line_without_secrets(refusal.value)


def test_a_driver_that_is_missing_is_named_with_the_command_that_helps(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(StoreError, match=re.escape("run `pip install 'hpo-torch[postgres]'`")):
        open_storage(tmp_path, url)


def test_the_driver_need_not_be_named_and_any_password_goes_through(url: str, tmp_path: Path) -> None:
    assert open_storage(tmp_path, url.replace("+psycopg", "")).get_all_studies() == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg://me:s3@c/ret@host:5432/db?a=b", "postgresql+psycopg://me:***@host:5432/db?a=b"),
        ("postgresql://:s3cret@host", "postgresql://:***@host"),
        ("postgresql://host/db?user=me&password=s3cret&b=c", "postgresql://host/db?user=me&password=***&b=c"),
        ("postgresql://host/db?sslpassword=s3cret", "postgresql://host/db?sslpassword=***"),
        ("https://me:s3cret@host:5000/path", "https://me:***@host:5000/path"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_a_password_is_not_shown(address: str, shown: str) -> None:
    assert without_password(address) == shown


def assert_one_line_without_secrets(error: Exception) -> None:
    assert "\n" not in str(error)
    assert not any(secret in str(error) for secret in SECRETS)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_reading_an_empty_database_writes_nothing(url: str, tmp_path: Path, postgres: Postgres) -> None:
    assert list_studies(read_storage(tmp_path, url)) == []
    with postgres.connect(url.rpartition("/")[2]) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


def test_a_home_of_an_earlier_version_has_no_sessions_and_gets_them(tmp_path: Path) -> None:
    optunas = closed_at_the_end(RDBStorage(f"sqlite:///{tmp_path}/optuna.db"))
    optunas.create_new_study([StudyDirection.MINIMIZE], "study")
    storage = open_storage(tmp_path)

    assert living_sessions(storage, "study") == []
    with Session(storage, "study") as session:
        assert [found.id for found in living_sessions(storage, "study")] == [session.id]
    assert [study.study_name for study in optunas.get_all_studies()] == ["study"]


def test_what_is_written_is_what_optuna_reads_and_the_other_way_round(
    storage: StudyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_tables, "_MAX_IDS", 2)
    optunas = plain(storage)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    fill(storage, study_id)
    fill(optunas, study_id)
    fresh = StudyStorage(storage._direct)

    trials = fresh.get_all_trials(study_id)

    assert len(trials) == 10
    assert repr(trials) == repr(optunas._backend.get_all_trials(study_id))  # repr, for NaN is not equal to itself
    for trial in trials:
        assert repr(fresh._direct.get_trial(trial._trial_id)) == repr(trial)
        assert fresh.get_trial_system_attrs(trial._trial_id) == trial.system_attrs
        assert fresh.get_trial_user_attrs(trial._trial_id) == trial.user_attrs
    # What was read before, and has changed since, is read again.
    running = trials[1]._trial_id
    optunas.set_trial_intermediate_value(running, 9, 0.9)
    assert fresh.get_all_trials(study_id)[1].intermediate_values[9] == 0.9


@pytest.mark.parametrize("writes_itself", [False, True])
def test_of_many_running_trials_those_that_have_changed_are_read_again_and_no_other(
    storage: StudyStorage, writes_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_tables, "_MANY", 2)
    monkeypatch.setattr(optuna_tables, "_MAX_IDS", 3)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    for _ in range(8):
        storage.set_trial_user_attr(storage.create_new_trial(study_id), OWNER, "Anna")
    others = plain(storage)
    writer: Any = storage if writes_itself else others
    waiting, reporting, ending, owned = (trial._trial_id for trial in storage.get_all_trials(study_id)[1:5])
    before = storage.get_all_trials(study_id, deepcopy=False)

    for change in (
        lambda: writer.set_trial_intermediate_value(reporting, 1, 0.5),
        lambda: writer.set_trial_system_attr(reporting, "completed_rung_0", 0.5),
        lambda: writer.set_trial_param(reporting, "lr", 0.125, FloatDistribution(1e-4, 1.0, log=True)),
        lambda: writer.set_trial_user_attr(reporting, "reason", "new"),
        lambda: writer.set_trial_user_attr(owned, OWNER, "Bert"),
        lambda: writer.set_trial_state_values(waiting, TrialState.WAITING),
        lambda: writer.set_trial_state_values(ending, TrialState.COMPLETE, [1.0]),
        lambda: writer.set_trial_state_values(waiting, TrialState.RUNNING),
        lambda: writer.create_new_trial(study_id),
    ):
        change()
        assert repr(storage.get_all_trials(study_id)) == repr(others.get_all_trials(study_id))
    unchanged = [trial for trial in storage.get_all_trials(study_id, deepcopy=False) if trial in before]
    assert [trial.number for trial in unchanged if trial is before[trial.number]] == [0, 5, 6, 7]

    # Replaced in place by another process: seen after a while, and at once what this one has replaced.
    writer.set_trial_user_attr(reporting, "reason", "replaced")
    assert storage.get_all_trials(study_id)[2].user_attrs["reason"] == ("replaced" if writes_itself else "new")
    monkeypatch.setattr(storage._direct._unfinished, "_expires", 0.0)
    assert repr(storage.get_all_trials(study_id)) == repr(others.get_all_trials(study_id))


def plain(storage: StudyStorage) -> Any:
    """Optuna's own storage over the same tables."""
    url = storage.engine.url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    creator = {"creator": storage._direct.engine_kwargs["creator"]} if storage.engine.name == "sqlite" else {}
    return optuna.storages.get_storage(closed_at_the_end(RDBStorage(url, creator)))


def closed_at_the_end(storage: RDBStorage) -> RDBStorage:
    """Optuna leaves connections open when nobody uses a storage any more, of which Python 3.13 warns."""
    weakref.finalize(storage, storage.engine.dispose)
    return storage


def fill(storage: Any, study_id: int) -> None:
    """Five trials, in every state, with every kind of value."""
    ends = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED, TrialState.WAITING, TrialState.FAIL)
    for end in ends:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "lr", 0.125, FloatDistribution(1e-4, 1.0, log=True))
        storage.set_trial_param(trial_id, "optimizer", 1, CategoricalDistribution(("sgd", "adam")))
        for epoch, value in enumerate((0.25, math.inf, -math.inf, math.nan, 1e-300), start=1):
            storage.set_trial_intermediate_value(trial_id, epoch, value)
        storage.set_trial_intermediate_value(trial_id, 1, 0.5)
        storage.set_trial_user_attr(trial_id, "reason", "first")
        storage.set_trial_user_attr(trial_id, "reason", {"ä": [None, "\n"]})
        storage.set_trial_system_attr(trial_id, "completed_rung_0", 0.5)
        if end != TrialState.RUNNING:
            storage.set_trial_state_values(trial_id, end, [math.inf] if end == TrialState.COMPLETE else None)


def test_a_trial_that_has_ended_or_is_not_there_is_refused_as_optuna_does(storage: StudyStorage) -> None:
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    fill(storage, study_id)
    ended, unknown = storage.get_all_trials(study_id)[0]._trial_id, 999
    for trial_id, refusal in ((ended, UpdateFinishedTrialError), (unknown, KeyError)):
        with pytest.raises(refusal):
            storage.set_trial_intermediate_value(trial_id, 1, 0.0)
        with pytest.raises(refusal):
            storage.set_trial_user_attr(trial_id, "key", 1)
        with pytest.raises(refusal):
            storage.set_trial_system_attr(trial_id, "key", 1)
        with pytest.raises(refusal):
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_param(ended, "lr", 0.5, FloatDistribution(1e-4, 1.0, log=True))
    for read in (storage.get_trial, storage.get_trial_user_attrs, storage.get_trial_system_attrs):
        with pytest.raises(KeyError):
            read(unknown)
    with pytest.raises(KeyError):
        storage.get_all_trials(999)


# --- several processes ------------------------------------------------------------------------------------------------

COUNT = """
import optuna
study = optuna.create_study(storage=storage, study_name="study", load_if_exists=True)
def count():
    study.set_user_attr("count", study.user_attrs.get("count", 0) + 1)
with Session(storage, "study") as session:
    for _ in range(10):
        session.exclusively(count)
"""


def test_processes_may_open_an_empty_database_at_once_and_the_lock_lets_one_in_at_a_time(
    start: Callable[..., Process], url: str, tmp_path: Path
) -> None:
    for process in [start(COUNT) for _ in range(3)]:
        process.finish()

    storage = open_storage(tmp_path, url)
    assert optuna.load_study(study_name="study", storage=storage).user_attrs == {"count": 30}
    assert living_sessions(storage, "study") == []


HOLD = """
with Session(storage, sys.argv[2]) as session, session.exclusive():
    if sys.argv[3:] == ["True"]:
        session.conclude()
    storage.get_all_studies()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_lock_of_a_killed_process_is_free(start: Callable[..., Process], shared: StudyStorage) -> None:
    holder = start(HOLD, "study")
    assert holder.answer() == "held"
    entered = []
    with Session(shared, "other") as other:
        assert other.exclusively(lambda: "another study's lock") is not None
    with Session(shared, "study") as session:
        waiting = Thread(target=lambda: entered.append(session.exclusively(lambda: "entered")))
        waiting.start()
        wait_until(lambda: num_locks(shared, granted=False) == 1)
        assert entered == []
        holder.signal(signal.SIGKILL)
        waiting.join(TIMEOUT_S)
    assert entered == ["entered"]
    assert num_locks(shared, granted=True) == 0


def test_who_waits_long_for_the_lock_is_told_for_whom(
    start: Callable[..., Process],
    shared: StudyStorage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lease, "_SAID_AFTER_S", 0.2)
    with Session(shared, "study") as session:
        for concludes in (False, True):
            holder = start(HOLD, "study", concludes)
            assert holder.answer() == "held"
            waiting = Thread(target=lambda: session.exclusively(lambda: None))
            waiting.start()
            wait_until(lambda: len(caplog.records) == 1 + concludes)  # noqa: B023
            holder.signal(signal.SIGKILL)
            waiting.join(TIMEOUT_S)
    one, other = (record.message for record in caplog.records)
    assert one == "waiting for another session of study 'study', which may take up to 5 minutes"
    name = f"{socket.gethostname()}:{holder.process.pid}"
    assert other == f"waiting for {name} to finish: study 'study' is complete, and its winner is refit or tested there"


HOLD_LONG = """
import time
from hpo.search import lease
lease._IDLE_S, lease._SIGN_OF_LIFE_S = 1, 0.2
def compute():
    storage.get_all_studies()
    print("held", flush=True)
    time.sleep(600)
with Session(storage, "study") as session:
    session.exclusively(compute, takes_long=True)
"""


def test_who_computes_for_long_keeps_the_lock_and_who_is_stopped_loses_it(
    start: Callable[..., Process], shared: StudyStorage
) -> None:
    holder = start(HOLD_LONG)
    assert holder.answer() == "held"
    time.sleep(2.5)
    assert num_locks(shared, granted=True) == 1
    holder.signal(signal.SIGSTOP)
    wait_until(lambda: num_locks(shared, granted=True) == 0)


def test_the_server_notices_by_itself_that_a_machine_was_cut_off(shared: StudyStorage) -> None:
    """Else a connection that is silent keeps its lock for the two hours of the operating system."""
    with shared.engine.connect() as connection:
        asked = [
            connection.execute(text(f"SHOW {name}")).scalar_one()
            for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        ]
    assert asked == ["10", "5", "3"]


def num_locks(storage: StudyStorage, *, granted: bool) -> int:
    """Locks of studies in the database that are held, or waited for."""
    count = text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted = :granted")
    with storage.engine.connect() as connection:
        return connection.execute(count, {"granted": granted}).scalar_one()


def test_who_has_the_lock_may_ask_for_it_again(storage: StudyStorage) -> None:
    with Session(storage, "study") as session:
        assert session.exclusively(lambda: session.exclusively(lambda: 5)) == 5


@pytest.mark.parametrize("statement", ["of Optuna", "of ours"])
def test_an_action_whose_lock_breaks_begins_again_and_nothing_gets_through_without_the_lock(
    statement: str, shared: StudyStorage, postgres: Postgres, url: str
) -> None:
    study_id = shared.create_new_study([StudyDirection.MINIMIZE], "study")
    trial_id = shared.create_new_trial(study_id)
    held = []

    def count() -> int:
        held.append(num_locks(shared, granted=True))
        if len(held) == 1:
            with postgres.connect(url.rpartition("/")[2]) as other:
                other.execute("SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'")
        if statement == "of Optuna":
            shared.create_new_trial(study_id)
        else:
            counted = shared.get_trial_user_attrs(trial_id).get("count", 1)
            shared.set_trial_user_attr(trial_id, "count", counted + 1)
        return shared.get_n_trials(study_id) + shared.get_trial(trial_id).user_attrs.get("count", 0)

    with Session(shared, "study") as session:
        assert session.exclusively(count) == {"of Optuna": 2, "of ours": 3}[statement]
        shared.create_new_trial(study_id)  # the storage is itself again
    assert held == [1, 1]


# --- sessions ---------------------------------------------------------------------------------------------------------

LIVE = """
with Session(storage, "study", lease_s=1) as session:
    print(session.id, flush=True)
    for line in sys.stdin:
        print(getattr(session, line.strip())(), flush=True)
"""


def test_a_session_is_shown_with_its_process_and_gone_at_its_end(storage: StudyStorage) -> None:
    with Session(storage, "study") as session, Session(storage, "other") as other:
        (shown,) = living_sessions(storage, "study")
        assert (shown.id, shown.name.rpartition(":")[2]) == (session.id, str(os.getpid()))
        assert 0 <= shown.seconds_since_renewal < 30
        assert (session.living(), other.living()) == ({session.id}, {other.id})
        assert not session.has_lapsed()
    assert living_sessions(storage, "study") == []


def test_a_session_that_concludes_is_alive_but_nobody_waits_for_it(storage: StudyStorage) -> None:
    with Session(storage, "study", lease_s=1) as concluding, Session(storage, "study") as session:
        assert not living_sessions(storage, "study")[0].is_concluding
        concluding.conclude()
        assert ([other.id for other in concluding.others()], session.others()) == ([session.id], [])
        assert session.living() == {session.id, concluding.id}
        session.forget_others()
        wait_until(lambda: concluding.id in session.living())  # it comes back as what it was
        assert session.others() == []
    assert living_sessions(storage, "study") == []


CONTAINER = """
import ctypes, os
CLONE_NEWUSER, CLONE_NEWPID = 0x10000000, 0x20000000  # linux/sched.h
assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWPID) == 0, os.strerror(ctypes.get_errno())
if not os.fork():  # what is forked from here on sees its own process ids alone
    with Session(storage, "study") as session:
        print(len(session.forget_gone()), len(session.living()), flush=True)
        sys.stdin.readline()
    os._exit(0)
os.wait()
"""


def test_sessions_in_containers_with_the_name_of_their_host_do_not_take_each_other_for_dead(
    start: Callable[..., Process], shared: StudyStorage
) -> None:
    with Session(shared, "study") as session:
        container = start(CONTAINER)
        assert container.answer() == "0 2"
        assert session.forget_gone() == set()
        assert len(session.living()) == 2
        here, there = (info.name for info in living_sessions(shared, "study"))
        assert here.partition(":")[0] == there.partition(":")[0] == socket.gethostname()
        container.answer("end")
        container.finish()


def test_a_session_whose_process_has_ended_is_known_to_be_gone_where_it_ran() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    here, elsewhere = process_host(), "another-host"
    processes = [f"{here}:{ended.pid}", f"{here}:{os.getpid()}", f"{elsewhere}:{ended.pid}"]
    assert [SessionInfo("id", process, 0.0).is_gone for process in processes] == [True, False, False]


def test_a_killed_session_dies_by_the_databases_clock_and_may_then_be_adopted(
    start: Callable[..., Process], shared: StudyStorage
) -> None:
    with Session(shared, "study", lease_s=3) as session:
        assert not session.may_adopt()
        killed = start(LIVE)
        killed_id = killed.answer()
        assert session.living() == {session.id, killed_id}
        killed.signal(signal.SIGKILL)
        wait_until(lambda: session.living() == {session.id})
        wait_until(session.may_adopt)
        assert not session.has_lapsed()


def test_a_stopped_process_learns_that_its_lease_ran_out_and_waits_before_it_adopts(
    start: Callable[..., Process], shared: StudyStorage
) -> None:
    with Session(shared, "study", lease_s=1) as session:
        stopped = start(LIVE)
        stopped_id = stopped.answer()
        wait_until(lambda: stopped.answer("may_adopt") == "True")
        assert stopped.answer("has_lapsed") == "False"

        stopped.signal(signal.SIGSTOP)
        wait_until(lambda: session.living() == {session.id})
        stopped.signal(signal.SIGCONT)

        assert stopped.answer("has_lapsed") == "True"
        assert stopped.answer("may_adopt") == "False"
        assert stopped.answer("has_lapsed") == "False"
        assert session.living() == {session.id, stopped_id}
        wait_until(lambda: stopped.answer("may_adopt") == "True")


def test_after_an_outage_everyone_may_renew_before_anyone_adopts(shared: StudyStorage, postgres: Postgres) -> None:
    with Session(shared, "study", lease_s=1) as one, Session(shared, "study", lease_s=1) as two:
        wait_until(lambda: one.may_adopt() and two.may_adopt())
        with postgres.outage():
            time.sleep(1.5)

        assert not one.may_adopt()
        wait_until(lambda: one.living() == {one.id, two.id})
        assert one.has_lapsed()
        assert two.has_lapsed()
        wait_until(lambda: one.may_adopt() and two.may_adopt())
        assert not one.has_lapsed()


def test_others_are_forgotten_where_they_are_known_to_be_dead(storage: StudyStorage) -> None:
    with Session(storage, "other") as elsewhere, Session(storage, "study", lease_s=1) as forgotten:
        with Session(storage, "study") as session:
            session.forget_others()
            assert session.living() == {session.id}
            assert elsewhere.living() == {elsewhere.id}
            wait_until(lambda: forgotten.id in session.living())
        assert forgotten.has_lapsed()  # one that was alive after all comes back, and knows


def test_a_session_that_ends_while_the_database_is_away_is_no_error(shared: StudyStorage, postgres: Postgres) -> None:
    session = Session(shared, "study")
    session.__enter__()
    with postgres.outage():
        session.__exit__(None, None, None)


# --- outages ----------------------------------------------------------------------------------------------------------

COORDINATE = """
import time
from functools import partial
from hpo.search.study import Study
study = Study.load(storage, "study")
with Session(storage, "study") as session:
    def ask():
        study.requeue([number for number, owner in study.owners().items() if owner in ("", session.id)])
        return study.ask(session.id) if study.remaining(40) else None
    def tell(number):
        if study.owners().get(number) == session.id:
            study.tell(number, "complete", value=1.0, best_epoch=5)
    while (trial := session.exclusively(ask)) is not None:
        print(trial.number, flush=True)
        for epoch in range(1, 6):
            time.sleep(0.05)
            study.report(trial.number, epoch, 1 / epoch)
        session.exclusively(partial(tell, trial.number))
"""


def test_a_study_outlives_outages_of_its_database_and_ends_with_exactly_its_trials(
    start: Callable[..., Process], shared: StudyStorage, postgres: Postgres
) -> None:
    Study.open(shared, "study", SETTINGS)
    coordinators = [start(COORDINATE), start(COORDINATE)]
    for coordinator in coordinators:
        assert coordinator.answer().isdigit()
    for _ in range(2):
        with postgres.outage():
            time.sleep(1)
        assert coordinators[0].answer().isdigit()

    warnings = [coordinator.finish() for coordinator in coordinators]

    study = Study.load(shared, "study")
    assert study.counts() == dict.fromkeys(get_args(StateName), 0) | {"complete": 40}
    assert [sorted(trial.curve) for trial in study.trials()] == [[1, 2, 3, 4, 5]] * 40
    assert all("the study's database does not answer" in told for told in warnings)


def test_after_its_patience_the_storage_says_that_the_same_command_continues(
    shared: StudyStorage, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    shared.patience_s = 0.5
    with postgres.outage(), pytest.raises(OutageError, match=r"does not answer .*run the same command again") as end:
        shared.get_all_studies()

    assert_one_line_without_secrets(end.value)
    shared.get_all_studies()
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "the study's database does not answer",
        "the study's database answers again",
    ]


@pytest.fixture
def lose_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the next call of one of the database's methods be carried out, and its answer be lost."""

    def lose(method: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        original = getattr(DirectStorage, method)

        def lost(*args: Any, **named: Any) -> None:
            monkeypatch.setattr(DirectStorage, method, original)
            original(*args, **named)
            meanwhile()
            raise OperationalError("COMMIT", None, Exception("the connection was closed"))

        monkeypatch.setattr(DirectStorage, method, lost)

    return lose


@pytest.mark.parametrize(
    ("end", "values"), [(TrialState.COMPLETE, [0.5]), (TrialState.PRUNED, None), (TrialState.WAITING, None)]
)
def test_an_end_whose_answer_is_lost_is_written_once(
    end: TrialState, values: list[float] | None, shared: StudyStorage, lose_answer: Callable[..., None]
) -> None:
    trial_id = shared.create_new_trial(shared.create_new_study([StudyDirection.MINIMIZE], "study"))
    lose_answer("set_trial_state_values")

    assert shared.set_trial_state_values(trial_id, end, values)

    trial = shared.get_trial(trial_id)
    assert (trial.state, trial.values) == (end, values)


def test_a_trial_that_was_taken_from_the_queue_while_the_answer_was_lost_stays_with_who_took_it(
    shared: StudyStorage, lose_answer: Callable[..., None]
) -> None:
    trial_id = shared.create_new_trial(shared.create_new_study([StudyDirection.MINIMIZE], "study"))
    another = plain(shared)
    lose_answer("set_trial_state_values", lambda: another.set_trial_state_values(trial_id, TrialState.RUNNING))

    assert shared.set_trial_state_values(trial_id, TrialState.WAITING)

    assert shared.get_trial(trial_id).state == TrialState.RUNNING


def test_a_parameter_a_report_and_an_attribute_whose_answers_are_lost_are_written_once(
    shared: StudyStorage, lose_answer: Callable[..., None]
) -> None:
    trial_id = shared.create_new_trial(shared.create_new_study([StudyDirection.MINIMIZE], "study"))
    lose_answer("_set_trial_param")
    shared.set_trial_param(trial_id, "lr", 0.5, FloatDistribution(1e-4, 1.0, log=True))
    lose_answer("set_trial_intermediate_value")
    shared.set_trial_intermediate_value(trial_id, 1, 0.25)
    lose_answer("set_trial_user_attr")
    shared.set_trial_user_attr(trial_id, "reason", "none")

    trial = shared.get_trial(trial_id)
    assert (trial.params, trial.intermediate_values, trial.user_attrs) == ({"lr": 0.5}, {1: 0.25}, {"reason": "none"})


def test_a_statement_that_is_wrong_is_no_outage(storage: StudyStorage) -> None:
    storage.create_new_study([StudyDirection.MINIMIZE], "study")
    with storage.engine.begin() as connection:
        connection.execute(text("ALTER TABLE studies RENAME TO lost"))

    with pytest.raises(StorageInternalError):
        storage.get_all_studies()
