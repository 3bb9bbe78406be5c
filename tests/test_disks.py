"""Disks that fill up, files that are damaged, and homes that cannot be used."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import pickle
import re
import signal
import sqlite3
import subprocess
import sys
import urllib.request
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from helpers.searches import Searches, interrupted_in_epoch_3, searching, tmpfs, wait_until, wait_until_gone
from sqlalchemy.exc import OperationalError

import hpo
from hpo.database import connect_sqlite, prepare_sqlite
from hpo.errors import DataError, SearchError, StoreError, UsageError
from hpo.plugins import load_task
from hpo.search.storage import open_storage
from hpo.session.search import run_search
from hpo.tracking import store
from hpo.tracking.store import explained, open_store


def test_five_failures_in_a_row_end_the_search_though_another_trial_trains(searches: Searches) -> None:
    searches.hold("first")
    with pytest.raises(SearchError, match="5 trials failed in a row; the first one with: RuntimeError: somebody was"):
        searches.run("quarrels", trials=10, workers=2)
    assert searches.study().counts()["failed"] == 5
    assert searches.study().counts()["interrupted"] == 1
    wait_until_gone(footprint.pid for footprint in searches.footprints())
    assert Counter(run.info.status for run in searches.runs()) == {"FAILED": 5, "KILLED": 1}
    assert [run.info.status for run in searches.runs("study")] == ["FAILED"]
    searches.assert_nothing_runs()


# --- disks and files --------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_fails_the_trial_and_harms_no_other(searches: Searches) -> None:
    checkpoints = searches.home / "checkpoints"
    with tmpfs(checkpoints, "size=2m"):
        searches.run(trials=1)
        searches.hold(3)
        search = searches.begin(trials=2)
        searches.reached(3, 2, search, num_ended=1)
        fill(checkpoints / "filler")
        searches.release()
        wait_until(lambda: searches.study().counts()["failed"] == 1, search)
        (checkpoints / "filler").unlink()
        outcome = search.result()
    assert [trial.state for trial in searches.trials()] == ["complete", "failed", "complete"]
    assert re.search(r"OSError.*No space left on device", searches.trials()[1].reason or "")
    assert outcome.winner is not None
    assert hpo.load_best("moody", home=searches.home).classes


def test_a_home_that_fills_up_ends_the_search_in_one_line_and_the_same_command_continues(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "disk"
    with tmpfs(home, "size=30m"), searching(tmp_path, home) as searches:
        searches.hold(2)
        search = searches.begin(trials=2, workers=2)
        searches.reached(2, 2, search)
        fill(home / "filler")
        searches.release()
        with pytest.raises(SearchError, match=r"^[^\n]*disk is full[^\n]*: run the same command again[^\n]*$"):
            search.result()
        assert "Traceback" not in capfd.readouterr().err
        (home / "filler").unlink()
        assert searches.run(trials=2, workers=2).counts["complete"] == 2
        searches.assert_nothing_runs()


def test_a_database_on_a_full_disk_can_be_read_and_has_its_write_ahead_log_again_when_there_is_room(
    tmp_path: Path,
) -> None:
    """So `hpo gc` can make room, and the little that it makes first does not close the database."""
    database, filler = tmp_path / "disk" / "studies.db", tmp_path / "disk" / "filler"
    with tmpfs(database.parent, "size=4m"):
        with closing(connect_sqlite(database)) as connection, connection:
            connection.execute("CREATE TABLE trials AS SELECT 7 AS number")
        fill(filler)
        for room in (0, 20_000):
            with filler.open("rb+") as file:
                file.truncate(filler.stat().st_size - room)
            prepare_sqlite(database, holding="all")
            with closing(connect_sqlite(database)) as connection:
                assert connection.execute("SELECT number FROM trials").fetchall() == [(7,)]
        filler.unlink()
        prepare_sqlite(database, holding="all")
        assert database.read_bytes()[18:20] == b"\2\2", "which is how its header says that there is a log"


def test_a_database_that_cannot_be_opened_since_the_disk_is_full_says_so(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "disk", "size=1m"):
        (tmp_path / "disk" / "locks").mkdir()
        fill(tmp_path / "disk" / "filler")
        with pytest.raises(StoreError, match=r"optuna.db cannot be opened: its disk is full \(.*\); make room there"):
            open_storage(tmp_path / "disk")


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_a_full_disk_ends_the_search_in_one_line(searches: Searches) -> None:
    checkpoints = searches.home / "checkpoints"
    with tmpfs(checkpoints, "size=1m"):
        fill(checkpoints / "filler")
        with pytest.raises(SearchError, match=r"5 trials failed in a row.*OSError.*No space left"):
            searches.run(trials=10, workers=2)
        searches.assert_nothing_runs()


def test_damaged_and_hostile_checkpoints_are_not_used(searches: Searches, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped byte costs what came after an earlier checkpoint, a forged one its trial, and its code is not run."""
    interrupted_in_epoch_3(searches, signal.SIGINT, trials=2, workers=2, epochs=5)
    before = len(searches.footprints())

    flipped = next(searches.home.glob("checkpoints/moody/trial-0000.*/epoch-0003.*.pt"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    trap = searches.home / "trap"
    hostile = pickle.dumps(Touch(trap))
    [folder] = searches.home.glob("checkpoints/moody/trial-0001.*")
    (folder / f"epoch-0004.{hashlib.sha256(hostile).hexdigest()}.pt").write_bytes(hostile)

    with caplog.at_level(logging.WARNING, logger="hpo"):
        searches.run(trials=2, workers=1, epochs=5)
    assert not trap.exists()
    first, second, third = searches.trials()
    assert [trial.state for trial in (first, second, third)] == ["complete", "failed", "complete"]
    assert "was not written by hpo" in (second.reason or "")
    trained = [footprint.epoch for footprint in searches.footprints()[before:]]
    assert trained[-5:] == [1, 2, 3, 4, 5]
    assert trained[:-5] in ([3, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4, 5]), "not every short epoch has a checkpoint"
    told = [record.message for record in caplog.records if record.name.startswith("hpo.")]
    assert len(told) == 1
    assert flipped.name in told[0]
    assert "is damaged and is not used; an earlier checkpoint is" in told[0]


class Touch:
    """Touches a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "train-images-idx3-ubyte is not an IDX file"),
        (None, "no FashionMNIST in .*could not be downloaded"),
    ],
)
def test_damaged_or_missing_data_are_named_and_nothing_is_written(
    tmp_path: Path, content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "_opener", None)  # or later downloads of this process use the proxy, too
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # there is no network
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1") if content else ():
        (raw / f"{name}-ubyte").write_bytes(content or b"")
    with pytest.raises(DataError, match=message):
        run_search("fashion_mnist", data_dir=tmp_path / "data", home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_study_cannot_be_named_out_of_its_home(searches: Searches) -> None:
    load_task(str(searches.task))  # Python keeps the compiled module beside it
    before = set(searches.home.parent.rglob("*"))
    with pytest.raises(UsageError, match=r"'\.\./x' cannot name a study"):
        searches.run(study="../x")
    assert set(searches.home.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=1m", r"has 1 MB left, and a search needs 2\d MB at least; make room, or choose another with --home"),
        ("size=99m,ro", r"cannot be written: Read-only file system; choose another with --home"),
    ],
)
def test_a_home_that_is_full_or_read_only_is_refused_at_the_start(
    searches: Searches, tmp_path: Path, options: str, message: str
) -> None:
    with tmpfs(tmp_path / "disk", options):
        with pytest.raises(StoreError, match=message):
            searches.run(home=tmp_path / "disk")
        assert list((tmp_path / "disk").iterdir()) == []
    assert searches.footprints() == []


@pytest.mark.parametrize(
    ("target", "reason"), [("artifacts", "Too many levels of symbolic links"), ("elsewhere", "No such file")]
)
def test_a_link_in_place_of_the_artifacts_that_leads_nowhere_is_refused_at_the_start(
    searches: Searches, target: str, reason: str
) -> None:
    (searches.home / "artifacts").symlink_to(target)
    with pytest.raises(StoreError, match=f"cannot read .*artifacts: {reason}.*; fix it, or choose another home"):
        searches.run()
    assert searches.footprints() == []


def test_a_store_that_finds_no_room_for_its_tables_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path) -> None:
        raise OperationalError("CREATE TABLE ...", None, sqlite3.OperationalError("database or disk is full"))

    monkeypatch.setattr(store, "_create", refused)
    with pytest.raises(StoreError, match=r"cannot open .*mlflow.db: database or disk is full; choose another home"):
        open_store(tmp_path)


def test_artifacts_that_find_no_room_are_told_of_in_one_line() -> None:
    message = r"MLflow at sqlite:///x.db cannot use .*: No space left on device; make room"
    with pytest.raises(StoreError, match=message), explained("sqlite:///x.db"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_command_whose_output_finds_no_room_says_so_in_one_line() -> None:
    full = ["sh", "-c", 'exec "$@" > /dev/full', "sh", sys.executable, "-m", "hpo", "tasks"]
    done = subprocess.run(full, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 1
    assert re.fullmatch(r"Error: cannot use stdout, .*: No space left on device; make room there\n", done.stderr)
