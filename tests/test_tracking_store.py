"""The MLflow store: where it is, and in what state it is refused."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import requests
from helpers.tracking import find_trial, open_runs, run_python
from sqlalchemy import event
from sqlalchemy.orm import Session

from hpo.errors import StoreError, UnknownNameError
from hpo.tracking.runs import StudyRuns
from hpo.tracking.store import TrackingStore, explained, open_store


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


def test_threads_make_stores_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor() as threads:
        made = list(threads.map(open_store, [tmp_path / "one", tmp_path / "other"]))
    assert [store.client.search_experiments()[0].name for store in made] == ["Default", "Default"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_making_a_store_prints_nothing(tmp_path: Path) -> None:
    code = "import pathlib, sys; from hpo.tracking.store import open_store; open_store(pathlib.Path(sys.argv[1]))"
    own = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=own, check=True, timeout=120)
    assert done.stdout + done.stderr == ""


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
    with pytest.raises(
        StoreError, match=rf"was made by another MLflow than .*run `mlflow db upgrade sqlite:///{home}/mlflow\.db`\.$"
    ):
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


@pytest.mark.parametrize(("name", "odd"), [("what?", r"\?"), ("feature%2Fx", "%2F")])
def test_a_home_whose_name_a_database_url_cannot_hold_is_refused(tmp_path: Path, name: str, odd: str) -> None:
    with pytest.raises(StoreError, match=f"contains '{odd}'.*--home"):
        open_store(tmp_path / name)


def test_a_server_that_does_not_answer_is_named(tmp_path: Path, free_port: int) -> None:
    uri = f"http://127.0.0.1:{free_port}"
    with pytest.raises(StoreError, match=f"no MLflow server answers at {uri}.*start it"):
        open_store(tmp_path / "home", uri)
    assert not (tmp_path / "home").exists()


def test_optimise_gives_the_planner_statistics(store: TrackingStore) -> None:
    store.optimise()
    with closing(sqlite3.connect(store.home / "mlflow.db")) as database:
        assert database.execute("SELECT count(*) FROM sqlite_stat1").fetchone()[0] > 0


def test_statistics_that_cannot_be_written_are_done_without(
    store: TrackingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = sqlite3.connect
    monkeypatch.setattr("hpo.tracking.store.sqlite3.connect", lambda path, timeout: connect(path, timeout=0))
    with closing(connect(store.home / "mlflow.db")) as database:
        database.execute("BEGIN EXCLUSIVE")
        store.optimise()


def test_what_a_server_of_artifacts_refuses_names_the_store() -> None:
    with pytest.raises(StoreError, match="MLflow at http://host refused: 413"), explained("http://host"):
        raise requests.HTTPError("413 Request Entity Too Large")


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


def test_a_deleted_experiment_is_named_with_the_way_back_and_restored_by_who_continues(
    runs: StudyRuns, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (0, 1):
        runs.trial_run(number, params={}).finish("complete", value=0.5)
    assert runs.flush()
    runs.store.client.delete_experiment(runs.experiment_id)
    with pytest.raises(StoreError, match=rf"was deleted; .*restore -x {runs.experiment_id}"):
        runs.store.find_trial_run("digits", 0)
    with open_runs(runs.store) as again:
        assert again.experiment_id == runs.experiment_id
        assert [record.message for record in caplog.records if record.name.startswith("hpo")] == [
            "the experiment 'hpo/digits' was deleted in MLflow; it is restored with its runs."
        ]
        assert again.missing([0, 1]) == []
        runs.store.client.delete_run(runs.store.find_trial_run("digits", 1))
        assert again.missing([0, 1]) == [1]


def test_a_variable_that_mlflow_cannot_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "many")
    with pytest.raises(StoreError, match=r"MLflow cannot read MLFLOW_SQLALCHEMYSTORE_POOL_SIZE=many: .*; unset it, or"):
        open_store(tmp_path / "home")
    assert list(tmp_path.iterdir()) == []


def test_a_tag_may_be_set_or_deleted_by_two_machines_at_once(runs: StudyRuns) -> None:
    run_id, database = runs.summary_run().run_id, runs.store.home / "mlflow.db"

    def overtake(*_: object) -> None:
        with closing(sqlite3.connect(database)) as other, other:
            other.execute("INSERT INTO tags (run_uuid, key, value) VALUES (?, 'hpo.winner', '2')", (run_id,))

    event.listen(Session, "before_flush", overtake, once=True)
    runs.store.set_tags(run_id, {"hpo.winner": "3"})
    assert runs.store.tags(run_id)["hpo.winner"] == "3"
    for _ in range(2):
        runs.store.delete_tag(run_id, "hpo.winner")
    assert "hpo.winner" not in runs.store.tags(run_id)
    with pytest.raises(StoreError, match=r"refused: .*no run"):
        runs.store.set_tags("no run", {"hpo.winner": "3"})
