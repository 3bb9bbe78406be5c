"""The study's database in the home: a sqlite file."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from helpers.studies import SETTINGS, run_python, run_trials

import hpo.database
from hpo.errors import StoreError, UnknownNameError
from hpo.search.storage import open_storage, read_storage
from hpo.search.study import Study, list_studies

# --- storage ----------------------------------------------------------------------------------------------------------

OPEN_AND_ASK = """
import sys
from pathlib import Path
from hpo.config import Direction
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.search.settings import StudySettings
from hpo.parameters import Float
from hpo.space import Group, Space
study = Study.open(open_storage(Path(sys.argv[1])), sys.argv[2], StudySettings(
    task="t", space=Space(Group("g", x=Float(0.0, 1.0, default=0.5))), seed=0, strategy="priority", pruner="sha",
    max_epochs=3, metric="m", direction=Direction.MINIMIZE, limit=None, planned_trials=3))
study.tell(study.ask().number, "complete", value=1.0)
print("torch" in sys.modules)
"""


def test_processes_may_make_the_same_storage_at_once_and_none_loads_torch(tmp_path: Path) -> None:
    processes = [run_python(OPEN_AND_ASK, tmp_path / "home", f"study-{i}") for i in range(3)]

    printed = [process.communicate()[0].strip() for process in processes]

    assert [process.returncode for process in processes] == [0] * 3
    assert printed == ["False"] * 3
    studies = list_studies(open_storage(tmp_path / "home"))
    assert sorted(study.name for study in studies) == [f"study-{i}" for i in range(3)]
    assert [study.num_finished for study in studies] == [1] * 3


def test_the_storage_is_a_write_ahead_log_below_any_path(tmp_path: Path) -> None:
    home = tmp_path / "odd {name} ?a=b#c %20"

    Study.open(open_storage(home), "study", SETTINGS)

    with closing(sqlite3.connect(home / "optuna.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("SELECT study_name FROM studies").fetchall() == [("study",)]


@pytest.mark.parametrize("damage", ["not a database", "page overwritten", "cut short"])
def test_a_damaged_file_is_named_with_what_helps(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "optuna.db"
    run_trials(Study.open(open_storage(tmp_path), "study", SETTINGS), 3)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    for log in tmp_path.glob("optuna.db-*"):
        log.unlink()
    content = path.read_bytes()
    middle = len(content) // 2
    match damage:
        case "not a database":
            path.write_bytes(b"PK\x03\x04" * 2000)
        case "page overwritten":
            path.write_bytes(content[:8192] + b"\xff" * 40960 + content[49152:])
        case "cut short":
            path.write_bytes(content[:middle])

    with pytest.raises(StoreError, match=r"optuna\.db is damaged .*move it away") as refusal:
        open_storage(tmp_path)

    assert "\n" not in str(refusal.value)


def test_a_home_that_is_a_file_is_named_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")

    with pytest.raises(StoreError, match=r"home/optuna\.db cannot be opened: .*--home"):
        open_storage(tmp_path / "home")


def test_tables_of_another_optuna_are_refused(tmp_path: Path) -> None:
    open_storage(tmp_path)
    with closing(sqlite3.connect(tmp_path / "optuna.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v9.9.9.a'")

    with pytest.raises(StoreError, match=r"optuna\.db was made by a newer Optuna than .*; use the version of hpo that"):
        open_storage(tmp_path)
    with closing(sqlite3.connect(tmp_path / "optuna.db")) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v2.6.0.a'")
    upgrade = rf"make a copy of it, then run `optuna storage upgrade --storage sqlite:///{tmp_path}/optuna\.db`\.$"
    with pytest.raises(StoreError, match=upgrade):
        open_storage(tmp_path)


def test_reading_a_home_without_studies_writes_nothing(tmp_path: Path) -> None:
    storage = read_storage(tmp_path / "home")

    assert list_studies(storage) == []
    with pytest.raises(UnknownNameError, match="There is no study yet"):
        Study.load(storage, "digits")
    assert not (tmp_path / "home").exists()


def test_reading_a_home_shows_what_a_search_wrote(tmp_path: Path) -> None:
    run_trials(Study.open(open_storage(tmp_path), "study", SETTINGS), 2)

    assert [record.number for record in Study.load(read_storage(tmp_path), "study").trials()] == [0, 1]


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs"])
def test_a_home_on_a_network_file_system_has_no_write_ahead_log(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    open_storage(tmp_path / "local")
    monkeypatch.setattr(hpo.database, "file_system", lambda path: kind)
    hpo.database._network_file_system.cache_clear()
    try:
        for home, num_warnings in ((tmp_path / "new", 1), (tmp_path / "local", 1)):
            run_trials(Study.open(open_storage(home), "study", SETTINGS), 2)
            with closing(sqlite3.connect(home / "optuna.db")) as connection:
                assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            assert sum(f"is on a network file system ({kind})" in text for text in caplog.messages) == num_warnings
    finally:
        hpo.database._network_file_system.cache_clear()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "apfs", "tmpfs", "overlay", "zfs", "fuse.fuseblk", ""])
def test_a_local_disk_is_not_taken_for_a_network_file_system(kind: str) -> None:
    assert not hpo.database._NETWORK.fullmatch(kind)
