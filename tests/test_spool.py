"""Rows that wait for MLflow: nothing is lost when a process dies or a server is away."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sqlite3
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tracking import BrokenClient, curve, find_trial, open_runs, run_python, spooled
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hpo.errors import SearchError
from hpo.execution.observer import Observer
from hpo.session import conclude
from hpo.session.search import run_search
from hpo.tracking.runs import StudyRuns
from hpo.tracking.spool import Sender, Spool
from hpo.tracking.store import TrackingStore, open_store


def test_kill_9_loses_no_row_and_leaves_nothing_running(home: Path) -> None:
    code = """
runs = StudyRuns(open_store(home), "digits", metric="accuracy", direction=Direction.MAXIMIZE, session="dead")
runs.summary_run()
runs.trial_run(0, params={"lr": 0.1}).finish("complete", value=0.5)
run = runs.trial_run(1, params={"lr": 0.2})
run.log_epoch(0, {"val/accuracy": 0.0})
runs.flush()
runs.store.client.create_run(runs.experiment_id, tags={"hpo.kind": "trial", "hpo.trial": "2"})
for epoch in range(1, 50):
    run.log_epoch(epoch, {"val/accuracy": epoch / 50})
print("ready", flush=True)
time.sleep(60)
"""
    process = run_python(code, home)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    store = open_store(home)
    assert len(curve(store, 1)) == 1, "the rows must be on disk alone, or this test shows nothing"

    with open_runs(store) as runs:
        runs.recover()
        found = store.client.search_runs([runs.experiment_id])
    assert curve(store, 1) == [(epoch, epoch / 50) for epoch in range(50)]
    ends = {run.data.tags.get("hpo.trial"): (run.info.status, run.data.tags["hpo.state"]) for run in found}
    assert ends == {
        None: ("KILLED", "interrupted"),
        "0": ("FINISHED", "complete"),
        "1": ("KILLED", "interrupted"),
        "2": ("KILLED", "interrupted"),
    }
    assert spooled(home) == []


def test_an_error_in_the_search_leaves_no_trial_running(store: TrackingStore) -> None:
    def search() -> None:
        with open_runs(store) as runs:
            runs.trial_run(0, params={}).finish("complete", value=0.5)
            runs.trial_run(1, params={}).log_epoch(1, {"val/accuracy": 0.5})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search()
    assert [find_trial(store, number).data.tags["hpo.state"] for number in (0, 1)] == ["complete", "interrupted"]
    assert find_trial(store, 1).info.status == "KILLED"
    assert spooled(store.home) == []


def test_a_spool_sent_twice_changes_nothing(store: TrackingStore) -> None:
    client = BrokenClient(store.client)
    with open_runs(replace(store, client=client)) as runs:  # type: ignore[arg-type]
        client.broken = True
        run = runs.trial_run(0, params={"lr": 0.1})
        for epoch in range(3):
            run.log_epoch(epoch, {"val/accuracy": epoch / 3, "train/loss": math.nan})
        run.finish("pruned", value=0.5, reason="weak")
    (path,) = store.home.glob("spool/digits/*/trial-0000.jsonl")
    story = path.read_bytes()
    told = []
    for _ in range(2):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(story)
        with open_runs(store) as later:
            later.recover()
        told.append(json.dumps(find_trial(store, 0).to_dictionary()))  # as text, where NaN equals NaN
    assert told[0] == told[1]
    assert len(curve(store, 0)) == len(curve(store, 0, "train/loss")) == 3
    assert len(store.client.search_runs([later.experiment_id])) == 1


def test_half_a_line_at_the_end_of_a_spool_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "trial-0000.jsonl"
    Spool(path).append({"epoch": 1})
    with path.open("a") as file:
        file.write('{"epoch": 2, "met')
    spool = Spool(path)
    spool.append({"epoch": 3})
    assert [event["epoch"] for event in spool.unsent()[0]] == [1, 3]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(min_size=1).filter(lambda junk: b"\n" not in junk and b"\r" not in junk))
@example(junk=b"{}")
def test_a_damaged_line_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    path = tmp_path / "trial-0000.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + junk + b'\n{"epoch": 2}\n')
    caplog.clear()
    events = Spool(path).unsent()[0]
    assert events == [{"epoch": 1}, {"epoch": 2}]
    assert "skipped a damaged line" in caplog.text


_texts = st.dictionaries(st.text(), st.text() | st.integers() | st.floats(allow_nan=False), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(_texts, max_size=6), told=st.integers(0, 6))
def test_a_spool_gives_back_what_is_not_sent_yet(tmp_path: Path, events: list[dict[str, Any]], told: int) -> None:
    path = tmp_path / "trial-0000.jsonl"
    path.write_bytes(b"")
    spool = Spool(path)
    for event in events[:told]:
        spool.append({"event": event})
    spool.mark_sent(spool.unsent()[1])
    for event in events[told:]:
        spool.append({"event": event})
    assert [entry["event"] for entry in spool.unsent()[0]] == events[told:]
    assert [entry["event"] for entry in Spool(path).unsent()[0]] == events, "a new process tells all of it again"


def test_a_spool_that_grew_while_it_was_sent_is_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "trial-0000.jsonl")
    spool.append({"end": {}})
    spool.mark_sent(spool.unsent()[1])
    spool.append({"start": {}})
    spool.remove_if_told()
    assert [list(event) for event in spool.unsent()[0]] == [["time_ms", "start"]]


def test_a_disk_that_takes_nothing_is_named(runs: StudyRuns) -> None:
    run = runs.trial_run(0, params={})
    assert runs.flush()
    shutil.rmtree(runs.store.home / "spool")
    with pytest.raises(SearchError, match=r"cannot write .*trial-0000\.jsonl: No such file or directory; make room"):
        run.log_epoch(1, {"val/accuracy": 0.5})


def test_training_continues_while_mlflow_is_away_and_no_metric_is_lost(
    store: TrackingStore, caplog: pytest.LogCaptureFixture
) -> None:
    client = BrokenClient(store.client)
    with open_runs(replace(store, client=client)) as runs:  # type: ignore[arg-type]
        before = runs.trial_run(0, params={"lr": 0.1})
        assert runs.flush()
        client.broken = True
        before.log_epoch(1, {"val/accuracy": 0.1})
        before.finish("complete", value=0.1)
        during = runs.trial_run(1, params={"lr": 0.2})
        during.log_epoch(1, {"val/accuracy": 0.2})
        assert not runs.flush()
        assert not during.flush()
        client.broken = False
        assert runs.flush()
        during.finish("pruned", value=0.2)
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1, "once an outage"
    assert (curve(store, 0), curve(store, 1)) == ([(1, 0.1)], [(1, 0.2)])
    assert find_trial(store, 0).data.tags["hpo.state"] == "complete"
    assert find_trial(store, 1).data.params == {"lr": "0.2"}
    assert spooled(store.home) == []


def test_what_does_not_arrive_before_the_end_is_kept_for_the_next_search(
    store: TrackingStore, caplog: pytest.LogCaptureFixture
) -> None:
    client = BrokenClient(store.client)
    with open_runs(replace(store, client=client)) as runs:  # type: ignore[arg-type]
        client.broken = True
        runs.trial_run(0, params={}).finish("failed", reason="out of memory")
    assert "did not accept everything" in caplog.text
    assert spooled(store.home) == ["trial-0000.jsonl"]
    with open_runs(store) as later:
        later.recover()
    assert find_trial(store, 0).data.tags["hpo.reason"] == "out of memory"


def test_a_run_that_someone_deleted_holds_no_other_up_and_is_made_anew(runs: StudyRuns) -> None:
    deleted, other = runs.trial_run(0, params={"lr": 0.1}), runs.trial_run(1, params={"lr": 0.2})
    assert runs.flush()
    runs.store.client.delete_run(runs.store.find_trial_run("digits", 0))
    deleted.log_epoch(1, {"val/accuracy": 0.1})
    other.log_epoch(1, {"val/accuracy": 0.2})
    assert not runs.flush()
    runs.flush()
    assert curve(runs.store, 1) == [(1, 0.2)]
    runs.close()
    with open_runs(runs.store) as later:
        later.recover()
    assert curve(runs.store, 0) == [(1, 0.1)]


class CountingDelivery:
    """A delivery that only notes that it was told."""

    def __init__(self) -> None:
        self.told = threading.Event()

    def deliver(self) -> None:
        self.told.set()


def test_rows_are_sent_by_themselves_after_the_interval() -> None:
    delivery: Any = CountingDelivery()
    sender = Sender(interval_s=0.01)
    sender.put(delivery)
    assert delivery.told.wait(10)
    assert sender.close(10)
    assert sender.close(10), "a second close returns at once"


class Refusing(Observer):
    """MLflow's database takes the run of no trial, from the start of the first one on."""

    def __init__(self, home: Path) -> None:
        self.database = home / "mlflow.db"

    def trial_started(self, suggestion: Any) -> None:
        self._execute("CREATE TRIGGER busy BEFORE INSERT ON runs BEGIN SELECT RAISE(ABORT, 'busy'); END")

    def relent(self) -> None:
        self._execute("DROP TRIGGER IF EXISTS busy")

    def _execute(self, statement: str) -> None:
        with closing(sqlite3.connect(self.database, timeout=60)) as connection, connection:
            connection.execute(statement)


def test_a_store_that_is_busy_when_the_search_ends_is_asked_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, flush = Refusing(home), StudyRuns.flush
    refused = []

    def flush_and_relent(runs: StudyRuns, *timeout_s: float) -> bool:
        refused.append(not flush(runs, *timeout_s))
        store.relent()
        return not refused[-1]

    monkeypatch.setattr(StudyRuns, "flush", flush_and_relent)
    outcome = run_search("digits", home=home, trials=1, epochs=1, workers=1, observer=store)

    assert outcome.winner is not None
    assert outcome.winner.test is not None
    assert refused[-2:] == [True, False]


def test_a_winner_that_mlflow_never_took_is_named_and_tested_by_the_next_search(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conclude, "_ARRIVAL_S", 0.0)
    store = Refusing(home)
    with pytest.raises(SearchError, match=r"has not accepted the run of trial 0, the winner, .* run the same command"):
        run_search("digits", home=home, trials=1, epochs=1, workers=1, observer=store)
    store.relent()
    winner = run_search("digits", home=home).winner
    assert winner is not None
    assert winner.num_test_readings == 1
