"""Tracking, on real stores: sqlite files, processes that are killed, a server that goes away."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.config import Direction
from hpo.errors import SearchError, StoreError, UnknownNameError, UsageError
from hpo.plots import study as plots
from hpo.records import EndState
from hpo.tracking import server
from hpo.tracking.runs import StudyRuns
from hpo.tracking.spool import Sender, Spool
from hpo.tracking.store import TrackingStore, open_store


@pytest.fixture
def store(home: Path) -> TrackingStore:
    return open_store(home)


@pytest.fixture
def runs(store: TrackingStore) -> Iterator[StudyRuns]:
    with open_runs(store) as runs:
        yield runs


def open_runs(store: TrackingStore) -> StudyRuns:
    return StudyRuns(store, "digits", metric="accuracy", direction=Direction.MAXIMIZE, session=uuid4().hex)


class BrokenClient:
    """The store's client, which refuses all writing while `broken`, as when a server is away."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        if self.broken:
            raise ConnectionError("connection refused")
        return getattr(self._client, name)


def find_trial(store: TrackingStore, number: int) -> Any:
    return store.client.get_run(store.find_trial_run("digits", number))


def curve(store: TrackingStore, number: int, key: str = "val/accuracy") -> list[tuple[int, float]]:
    history = store.client.get_metric_history(store.find_trial_run("digits", number), key)
    return sorted((row.step, row.value) for row in history)


def spooled(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "spool" / "digits").glob("*/*"))


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs this code; `import_all` of the room stands above it."""
    prelude = "import os, sys, time\nfrom pathlib import Path\nfrom hpo.config import Direction\n"
    prelude += "from hpo.tracking.runs import StudyRuns\n"
    prelude += "from hpo.tracking.store import open_store\nhome = Path(sys.argv[1])\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


# The store


def test_importing_the_room_imports_no_mlflow() -> None:
    code = (
        "import sys\n"
        "import hpo.tracking.runs, hpo.tracking.server, hpo.tracking.store, hpo.tracking.spool\n"
        "import hpo.plots.study\n"
        "sys.exit(bool({'mlflow', 'torch', 'optuna', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_store_is_the_argument_then_the_environment_then_the_home(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, environment = (f"sqlite:///{tmp_path / name}.db" for name in ("given", "environment"))
    for name in ("given", "environment"):
        shutil.copy(home / "mlflow.db", tmp_path / f"{name}.db")
    assert open_store(home).uri == f"sqlite:///{home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    assert open_store(home).uri == environment
    assert open_store(home, given).uri == given


def test_artifacts_lie_in_the_home_whatever_the_database(home: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(home / "mlflow.db", tmp_path / "elsewhere.db")
    with open_runs(open_store(home, f"sqlite:///{tmp_path / 'elsewhere.db'}")) as runs:
        summary = runs.summary_run()
        summary.log_text("hello", "greeting.txt")
        summary.finish("complete")
    [found] = (home / "artifacts" / "digits").rglob("greeting.txt")
    assert runs.store.download(summary.run_id, "greeting.txt") == found
    assert not (tmp_path / "mlruns").exists()


@pytest.mark.parametrize("name", ["my home", "höme", "50%", "a#b", "a&b"])
def test_a_home_may_have_an_odd_name(home: Path, tmp_path: Path, name: str) -> None:
    odd = tmp_path / name
    shutil.copytree(home, odd)
    with open_runs(open_store(odd)) as runs:
        runs.trial_run(0, params={}).finish("complete", value=0.5)
    assert find_trial(runs.store, 0).info.status == "FINISHED"
    assert sorted(tmp_path.iterdir()) == sorted([home, odd])


def test_processes_may_start_at_once_and_just_end_and_every_row_arrives(tmp_path: Path) -> None:
    """Both create the store, over what a killed one left, and neither closes what it opened."""
    aside = tmp_path / "mlflow.db.new"
    aside.mkdir()
    (aside / "mlflow.db").write_bytes(b"half a schema")
    (aside / "mlflow.db-journal").write_bytes(b"half a journal")
    code = """
runs = StudyRuns(open_store(home), sys.argv[2], metric="accuracy", direction=Direction.MAXIMIZE, session="one")
run = runs.trial_run(0, params={})
for epoch in range(20):
    run.log_epoch(epoch, {"val/accuracy": epoch / 20})
sys.exit(3)
"""
    processes = [run_python(code, tmp_path, study) for study in ("one", "two")]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 3
    assert not aside.exists()
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store = open_store(tmp_path)
    for study in ("one", "two"):
        run_id = store.find_trial_run(study, 0)
        assert len(store.client.get_metric_history(run_id, "val/accuracy")) == 20
        assert store.client.get_run(run_id).info.status == "KILLED"


def damage_header(path: Path) -> None:
    path.write_bytes(b"this is no database" * 100)


def damage_tail(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def damage_middle(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(os.urandom(size // 2))


@pytest.mark.parametrize("damage", [damage_header, damage_tail, damage_middle])
def test_a_damaged_store_is_refused_and_left_as_it_is(home: Path, damage: Callable[[Path], None]) -> None:
    path = home / "mlflow.db"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(
        StoreError, match=rf"^{re.escape(str(path))} is damaged \(.*\); restore a copy, or move it away"
    ):
        open_store(home)
    assert path.read_bytes() == before


def test_a_store_of_another_mlflow_is_refused_with_the_command_that_helps(home: Path) -> None:
    with closing(sqlite3.connect(home / "mlflow.db")) as database:
        database.execute("UPDATE alembic_version SET version_num = '0123456789ab'")
        database.commit()
    with pytest.raises(StoreError, match="mlflow db upgrade"):
        open_store(home)


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for home in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(StoreError, match=rf"{re.escape(str(home))}.*--home"):
            open_store(home)


@pytest.mark.parametrize("uri", ["mlruns", "file:///tmp/mlruns", "ftp://host/db", "sqlite://", "sqlite:///:memory:"])
def test_a_tracking_uri_that_is_none_is_refused_before_anything_is_written(tmp_path: Path, uri: str) -> None:
    with pytest.raises(StoreError, match=f"'{re.escape(uri)}'"):
        open_store(tmp_path / "home", uri)
    assert not (tmp_path / "home").exists()


def test_a_home_with_a_question_mark_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"contains '\?'.*--home"):
        open_store(tmp_path / "what?")


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, free_port: int) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    with pytest.raises(StoreError, match=f"no MLflow server answers at {uri}.*start it"):
        open_store(tmp_path / "home", uri)
    assert not (tmp_path / "home").exists()


def test_optimise_gives_the_planner_statistics(store: TrackingStore) -> None:
    store.optimise()
    with closing(sqlite3.connect(store.home / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM sqlite_stat1").fetchone()[0] > 0


def test_asking_for_what_is_not_there_writes_nothing_and_says_so(store: TrackingStore) -> None:
    with pytest.raises(StoreError, match="no run of trial 3 in study 'digits'"):
        store.find_trial_run("digits", 3)
    assert store.studies() == []


def test_an_unknown_study_gets_its_near_miss(runs: StudyRuns) -> None:
    with pytest.raises(UnknownNameError, match=r"no study 'digit'; did you mean 'digits'\?"):
        runs.store.study_url("digit", "http://127.0.0.1:5000")
    assert runs.store.studies() == ["digits"]


def test_a_missing_file_of_a_run_is_named(runs: StudyRuns) -> None:
    run_id = runs.summary_run().run_id
    with pytest.raises(StoreError, match=rf"run {run_id} .* has no file 'plots/none\.png'"):
        runs.store.download(run_id, "plots/none.png")


def test_a_deleted_experiment_is_named_with_the_way_back(runs: StudyRuns) -> None:
    runs.store.client.delete_experiment(runs.experiment_id)
    with pytest.raises(StoreError, match=rf"was deleted; .*restore -x {runs.experiment_id}"):
        open_runs(runs.store)


# Trials


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("complete", "FINISHED"),
        ("pruned", "FINISHED"),
        ("diverged", "FINISHED"),
        ("failed", "FAILED"),
        ("interrupted", "KILLED"),
    ],
)
def test_a_trial_is_a_run_with_parameters_curves_and_its_end(runs: StudyRuns, state: EndState, status: str) -> None:
    params = {"lr": 1e-05, "momentum": 0.1 + 0.2, "depth": 3, "optimizer": "sgd", "nesterov": True}
    run = runs.trial_run(7, params=params, tags={"hpo.stage": "step size"})
    for epoch in range(1, 4):
        run.log_epoch(epoch, {"train/loss": 1 / epoch, "val/accuracy": epoch / 4})
    run.finish(state, value=0.75, reason="because")
    assert runs.flush()
    found = find_trial(runs.store, 7)
    assert found.info.run_name == "trial-0007"
    assert found.info.status == status
    assert found.data.params == {
        "lr": "1e-05",
        "momentum": "0.30000000000000004",
        "depth": "3",
        "optimizer": "sgd",
        "nesterov": "True",
    }
    expected = {"hpo.kind": "trial", "hpo.trial": "7", "hpo.state": state, "hpo.stage": "step size"}
    assert (expected | {"hpo.reason": "because"}).items() <= found.data.tags.items()
    assert {"mlflow.user", "mlflow.source.name"} <= set(found.data.tags)
    assert found.data.metrics["best/accuracy"] == 0.75
    assert curve(runs.store, 7) == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert spooled(runs.store.home) == []


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_trial_without_a_finite_value_stands_in_no_sort_by_value(runs: StudyRuns, value: float | None) -> None:
    runs.trial_run(0, params={}).finish("failed", value=value, reason="x" * 10_000)
    assert runs.flush()
    assert find_trial(runs.store, 0).data.metrics == {}


def test_the_runs_table_sorts_by_the_best_value(runs: StudyRuns) -> None:
    for number, value in enumerate((0.2, 0.9, 0.5)):
        runs.trial_run(number, params={}).finish("complete", value=value)
    assert runs.flush()
    found = runs.store.client.search_runs([runs.experiment_id], order_by=["metrics.`best/accuracy` DESC"])
    assert [run.info.run_name for run in found] == ["trial-0001", "trial-0002", "trial-0000"]

    runs.trial_run(1, params={}, attempt=2).finish("diverged", value=math.nan)  # continued after it was pruned
    assert runs.flush()
    found = runs.store.client.search_runs([runs.experiment_id], order_by=["metrics.`best/accuracy` DESC"])
    assert [run.info.run_name for run in found] == ["trial-0002", "trial-0000", "trial-0001"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_every_number_arrives_as_it_was_and_what_is_not_finite_as_nan(runs: StudyRuns, values: list[float]) -> None:
    number = runs.__dict__.setdefault("examples", 0)
    runs.__dict__["examples"] += 1
    run = runs.trial_run(number, params={})
    for epoch, value in enumerate(values):
        run.log_epoch(epoch, {"train/loss": value, "lr": 0.1})
    assert run.flush()
    arrived = [value for _, value in curve(runs.store, number, "train/loss")]
    expected = [value if math.isfinite(value) else math.nan for value in values]
    assert arrived == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    tag = find_trial(runs.store, number).data.tags.get("hpo.nonfinite")
    assert tag == (None if all(map(math.isfinite, values)) else "train/loss")


def test_a_long_story_goes_in_batches_of_whole_epochs(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    log_batch = store.client.log_batch

    def noted(run_id: str, metrics: Any = (), **others: Any) -> None:
        sizes.append(len(metrics))
        log_batch(run_id, metrics, **others)

    monkeypatch.setattr(store.client, "log_batch", noted)
    client = BrokenClient(store.client)
    with open_runs(replace(store, client=client)) as runs:  # type: ignore[arg-type]
        client.broken = True
        run = runs.trial_run(0, params={})
        for epoch in range(600):
            run.log_epoch(epoch, {"val/accuracy": epoch / 600, "lr": 0.1, "train/loss": math.nan})
        client.broken = False
    assert [step for step, _ in curve(store, 0)] == list(range(600))
    assert sum(sizes) == 1800
    assert all(size % 3 == 0 and size < 1000 for size in sizes)


def test_files_and_texts_become_artifacts(runs: StudyRuns, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"weights")
    run = runs.trial_run(0, params={})
    run.log_text('{"lr": 0.1}', "config.json")
    run.log_file(tmp_path / "best.pt", "checkpoint")
    assert run.flush()
    run_id = runs.store.find_trial_run("digits", 0)
    assert runs.store.download(run_id, "config.json").read_text() == '{"lr": 0.1}'
    assert (runs.store.download(run_id, "checkpoint") / "best.pt").read_bytes() == b"weights"


def test_a_file_that_is_gone_is_told_and_holds_nothing_up(
    runs: StudyRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs.trial_run(0, params={})
    run.log_file(tmp_path / "gone.pt")
    run.finish("complete", value=0.5)
    assert runs.flush()
    assert "gone.pt is gone" in caplog.text
    assert find_trial(runs.store, 0).info.status == "FINISHED"


def test_a_resumed_trial_goes_on_in_its_run_and_repeats_no_epoch(runs: StudyRuns) -> None:
    first = runs.trial_run(0, params={"lr": 0.1}, attempt=1)
    for epoch in (1, 2):
        first.log_epoch(epoch, {"val/accuracy": epoch / 10})
    first.finish("interrupted", value=0.2, reason="stopped by hand")
    assert runs.flush()
    run_id = runs.store.find_trial_run("digits", 0)

    with open_runs(runs.store) as later:
        second = later.trial_run(0, params={"lr": 0.1, "depth": 2}, attempt=2)
        assert later.flush()
        running = find_trial(runs.store, 0)
        assert (running.info.status, running.data.tags["hpo.state"]) == ("RUNNING", "running")
        assert "hpo.reason" not in running.data.tags
        for epoch in (2, 3):
            second.log_epoch(epoch, {"val/accuracy": epoch / 10})
        second.finish("complete", value=0.3)
    ended = find_trial(runs.store, 0)
    assert ended.info.run_id == run_id
    assert ended.data.params == {"lr": "0.1", "depth": "2"}
    assert (ended.data.tags["hpo.attempt"], ended.data.metrics["best/accuracy"]) == ("2", 0.3)
    assert curve(runs.store, 0) == [(1, 0.1), (2, 0.2), (3, 0.3)]


# What happens when something dies


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


def test_a_spool_told_twice_changes_nothing(store: TrackingStore) -> None:
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
    assert [event["epoch"] for event in spool.untold()[0]] == [1, 3]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.binary(min_size=1).filter(lambda junk: b"\n" not in junk and b"\r" not in junk))
def test_a_damaged_line_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    path = tmp_path / "trial-0000.jsonl"
    path.write_bytes(b'{"epoch": 1}\n' + junk + b'\n{"epoch": 2}\n')
    caplog.clear()
    events = Spool(path).untold()[0]
    assert events == [{"epoch": 1}, {"epoch": 2}]
    assert "skipped a damaged line" in caplog.text


_texts = st.dictionaries(st.text(), st.text() | st.integers() | st.floats(allow_nan=False), max_size=4)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=st.lists(_texts, max_size=6), told=st.integers(0, 6))
def test_a_spool_gives_back_what_is_not_told_yet(tmp_path: Path, events: list[dict[str, Any]], told: int) -> None:
    path = tmp_path / "trial-0000.jsonl"
    path.write_bytes(b"")
    spool = Spool(path)
    for event in events[:told]:
        spool.append({"event": event})
    spool.told(spool.untold()[1])
    for event in events[told:]:
        spool.append({"event": event})
    assert [entry["event"] for entry in spool.untold()[0]] == events[told:]
    assert [entry["event"] for entry in Spool(path).untold()[0]] == events, "a new process tells all of it again"


def test_a_spool_that_grew_while_it_was_told_is_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "trial-0000.jsonl")
    spool.append({"end": {}})
    spool.told(spool.untold()[1])
    spool.append({"start": {}})
    spool.remove_if_told()
    assert [list(event) for event in spool.untold()[0]] == [["time_ms", "start"]]


def test_a_disk_that_takes_nothing_is_named(runs: StudyRuns) -> None:
    run = runs.trial_run(0, params={})
    assert runs.flush()
    shutil.rmtree(runs.store.home / "spool")
    with pytest.raises(SearchError, match=r"cannot write .*trial-0000\.jsonl: No such file or directory; make room"):
        run.log_epoch(1, {"val/accuracy": 0.5})


def test_training_goes_on_while_mlflow_is_away_and_no_metric_is_lost(
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
    assert "did not take everything" in caplog.text
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


# The summary


def test_the_summary_is_one_run_that_is_found_again(runs: StudyRuns) -> None:
    summary = runs.summary_run()
    assert runs.store.client.get_run(summary.run_id).info.status == "RUNNING"
    summary.log_dict({"step size": {"lr": [0.1, 1.0]}}, "space.json")
    summary.log_figure("plots/history.png", plots.plot_history([], metric="accuracy", direction=Direction.MAXIMIZE))
    summary.log_metrics({"best/accuracy": 0.9, "test/accuracy": 0.8})
    summary.set_tags({"hpo.best_trial": "3"})
    summary.set_note("The winner is **trial 3**.")
    summary.finish("complete")
    again = runs.summary_run()
    assert again.run_id == summary.run_id
    assert runs.store.client.get_run(summary.run_id).info.status == "RUNNING"
    again.finish("interrupted")
    found = runs.store.client.get_run(summary.run_id)
    assert (found.info.run_name, found.info.status) == ("study summary", "KILLED")
    assert found.data.metrics == {"best/accuracy": 0.9, "test/accuracy": 0.8}
    assert found.data.tags["mlflow.note.content"] == "The winner is **trial 3**."
    assert json.loads(runs.store.download(summary.run_id, "space.json").read_text())["step size"] == {"lr": [0.1, 1.0]}
    assert runs.store.download(summary.run_id, "plots/history.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_runs_while_its_search_does(runs: StudyRuns) -> None:
    """A search first ends what earlier ones have left RUNNING, and leaves its own summary alone."""
    summary = runs.summary_run()
    runs.recover()
    found = runs.store.client.get_run(summary.run_id)
    assert (found.info.status, found.data.tags["hpo.state"]) == ("RUNNING", "running")


def test_a_running_trial_stands_in_the_table_with_its_best_value_so_far(runs: StudyRuns) -> None:
    run = runs.trial_run(0, params={})
    for epoch, value in ((1, 0.5), (2, 0.75)):
        run.log_epoch(epoch, {"val/accuracy": value, "best/accuracy": value})
    assert runs.flush()
    assert find_trial(runs.store, 0).data.metrics["best/accuracy"] == 0.75
    run.finish("complete", value=0.7123456789)
    assert runs.flush()
    assert find_trial(runs.store, 0).data.metrics["best/accuracy"] == 0.712346
    run = runs.trial_run(1, params={})
    run.log_epoch(1, {"best/accuracy": 0.9})
    run.finish("failed")
    assert runs.flush()
    assert math.isnan(find_trial(runs.store, 1).data.metrics["best/accuracy"]), "it sorts last"


def test_the_ui_names_the_address_of_each_study(store: TrackingStore) -> None:
    for study in ("digits", "wine"):
        StudyRuns(store, study, metric="accuracy", direction=Direction.MAXIMIZE, session="one").close()
    base = "http://127.0.0.1:5000"
    one, several = (server._addresses(store, study, base) for study in ("wine", None))
    assert one == [f"MLflow is at {store.study_url('wine', base)}"]
    assert several[1:] == [f"  {name}  {store.study_url(name, base)}" for name in ("wine", "digits")]


@pytest.mark.parametrize(("direction", "ascending"), [(Direction.MAXIMIZE, False), (Direction.MINIMIZE, True)])
def test_the_saved_view_of_the_runs_table_puts_the_best_on_top(
    store: TrackingStore, direction: Any, ascending: bool
) -> None:
    with StudyRuns(
        store, "digits", metric="rmse", direction=direction, session="one", columns=["lr"], note="What this is."
    ) as runs:
        tags = store.client.get_experiment(runs.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.hpo"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`best/rmse`", ascending)
    assert view["columnOrder"] == ["tags.`hpo.state`", "metrics.`best/rmse`", "params.`lr`"]
    assert view["searchFilter"] == "tags.`hpo.kind` = 'trial'", "the summary is no trial"
    assert [chart.get("selectedMetricKeys") for chart in view["compareRunCharts"]] == [
        ["train/loss", "val/loss"],
        ["val/rmse"],
        None,
    ]
    assert tags["mlflow.note.content"] == "What this is."
    assert "viewStateShareKey=hpo" in store.study_url("digits", "http://127.0.0.1:5000")


# The UI


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bytes(answer.read())


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_ui_serves_the_store_takes_runs_and_leaves_no_process_behind(
    store: TrackingStore, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start of the server, which takes seconds, for the whole story."""
    with open_runs(store) as runs:
        summary = runs.summary_run()
        summary.log_text("what an artifact viewer shows", "report.txt")
        summary.finish("complete")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    base = f"http://127.0.0.1:{free_port}"
    with ExitStack() as stack:
        group = stack.enter_context(server.running_server(store, host="127.0.0.1", port=free_port)).pid
        assert b"<title>MLflow</title>" in get(base)
        assert get(f"{base}/get-artifact?run_uuid={summary.run_id}&path=report.txt") == b"what an artifact viewer shows"

        remote = open_store(tmp_path / "remote", base)
        lines: list[str] = []
        server.serve(remote, study="digits", say=lines.append)
        assert lines == [f"MLflow is at {store.study_url('digits', base)}"]
        runs = stack.enter_context(open_runs(remote))
        trial = runs.trial_run(5, params={"lr": 0.1})
        trial.log_epoch(1, {"val/accuracy": 0.1})
        assert runs.flush()

        os.killpg(group, signal.SIGKILL)
        trial.log_epoch(2, {"val/accuracy": 0.2})
        trial.finish("complete", value=0.2)
        assert not runs.flush()
    assert group_is_gone(group)
    assert spooled(remote.home) == ["trial-0005.jsonl"]
    with open_runs(open_store(remote.home, store.uri)) as later:
        later.recover()
    assert curve(store, 5) == [(1, 0.1), (2, 0.2)]
    assert find_trial(store, 5).info.status == "FINISHED"


HEALTHY_WITH_A_CHILD = """
import http.server, os, sys
os.fork()
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer.allow_reuse_port = True
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_stopping_the_command_stops_the_server_and_its_children(
    home: Path, free_port: int, stop: signal.Signals, code: int
) -> None:
    script = f"""
import signal
from hpo.tracking import server
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
from hpo.tracking.store import TrackingStore
server._command = lambda store, host, port: [sys.executable, "-c", {HEALTHY_WITH_A_CHILD!r}, str(port)]
store = TrackingStore(home=home, uri=f"sqlite:///{{home / 'mlflow.db'}}", client=None)
try:
    with server.running_server(store, host="127.0.0.1", port=int(sys.argv[2])) as running:
        print(running.pid, flush=True)
        running.wait()
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = run_python(script, home, free_port)
    assert process.stdout is not None
    group = int(process.stdout.readline())
    assert not group_is_gone(group)
    process.send_signal(stop)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert group_is_gone(group)


def test_a_taken_port_is_named_with_the_way_out(store: TrackingStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*--port {port + 1}"):
            server.serve(store, port=port, say=lambda line: None)


def test_a_server_that_does_not_start_says_why(
    store: TrackingStore, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; print('first'); sys.exit('no disk today')"]
    monkeypatch.setattr(server, "_command", lambda *_: failing)
    with pytest.raises(StoreError, match="ended with code 1 at its start: no disk today"):
        server.serve(store, port=free_port, say=lambda line: None)


def test_a_host_that_others_can_reach_is_warned_about(
    store: TrackingStore, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_command", lambda *_: ["false"])
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)):
        lines: list[str] = []
        with pytest.raises(StoreError):
            server.serve(store, host=host, port=free_port, say=lines.append)
        assert any("can read and change every run" in line for line in lines) == warned
