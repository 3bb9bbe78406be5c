"""Sessions that share a study: the lock in its database, leases, and what becomes of the trials of the dead."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import optuna
import pytest
from helpers.databases import TIMEOUT_S, Process, wait_until
from helpers.postgres import Postgres
from optuna.study import StudyDirection
from sqlalchemy import text

from hpo.machine import process_host
from hpo.search import lease
from hpo.search.lease import Session, SessionInfo, living_sessions
from hpo.search.storage import StudyStorage, open_storage


@pytest.fixture
def storage(either_storage: StudyStorage) -> StudyStorage:
    return either_storage


# --- the lock ---------------------------------------------------------------------------------------------------------

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
