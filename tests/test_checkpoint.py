"""Checkpoints against the ways in which a disk, a crash or a stranger can spoil them."""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import warm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.errors import CheckpointError
from hpo.training import checkpoint
from hpo.training.checkpoint import CheckpointFolder, CheckpointWriter, load_weights, save_weights


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "run")


def files(folder: CheckpointFolder) -> list[Path]:
    return sorted(folder.path.iterdir())


def epochs(folder: CheckpointFolder) -> list[str]:
    return [path.name.partition(".")[0] for path in files(folder)]


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 0x10
    path.write_bytes(content)


class Hostile:
    """Touches a file as soon as it is unpickled."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> Any:
        return Path.touch, (self.touched,)


def hostile_file(kind: str, touched: Path, target: Path) -> None:
    payload = {"model": Hostile(touched)}
    if kind == "torch archive":
        torch.save(payload, target)
    else:
        target.write_bytes(pickle.dumps(payload, protocol=2))
    pickle.loads(pickle.dumps(payload))
    assert touched.exists(), "the payload must do harm, or the test shows nothing"
    touched.unlink()


def test_a_saved_state_is_loaded_as_it_was(folder: CheckpointFolder) -> None:
    state = {"weights": {"w": torch.arange(6.0).view(2, 3)}, "rate": 0.1, "best": None, "names": ["a"], "over": False}
    folder.save(state, epoch=3)

    loaded = CheckpointFolder(folder.path).load()
    assert loaded is not None
    epoch, restored = loaded
    assert epoch == 3
    assert torch.equal(restored.pop("weights")["w"], state.pop("weights")["w"])
    assert restored == state


def test_a_folder_that_does_not_exist_holds_no_checkpoint(folder: CheckpointFolder) -> None:
    assert folder.load() is None
    assert not folder.path.exists()


def test_the_file_name_holds_the_sha256_of_the_content(folder: CheckpointFolder) -> None:
    folder.save({"x": 1}, epoch=7)
    (path,) = files(folder)
    assert path.name == f"epoch-0007.{hashlib.sha256(path.read_bytes()).hexdigest()}.pt"


def test_the_newest_two_checkpoints_are_kept(folder: CheckpointFolder) -> None:
    for epoch in (1, 2, 3, 4):
        folder.save({"x": epoch}, epoch)
    assert epochs(folder) == ["epoch-0003", "epoch-0004"]
    assert folder.load() == (4, {"x": 4})


def test_epochs_are_ordered_as_numbers_beyond_four_digits(folder: CheckpointFolder) -> None:
    for epoch in (9998, 9999, 10000):
        folder.save({"x": epoch}, epoch)
    assert folder.load() == (10000, {"x": 10000})


def test_what_a_crash_left_behind_is_ignored_and_then_deleted(folder: CheckpointFolder) -> None:
    folder.save({"x": 1}, epoch=1)
    stale = folder.path / f".epoch-0002.{'0' * 64}.pt.3f.tmp"
    stale.write_bytes(b"half a checkp")
    assert folder.load() == (1, {"x": 1})

    folder.save({"x": 2}, epoch=2)
    assert epochs(folder) == ["epoch-0001", "epoch-0002"]
    assert not stale.exists()


def test_files_of_others_are_neither_read_nor_deleted(folder: CheckpointFolder) -> None:
    folder.save({"x": 1}, epoch=1)
    others = [folder.path / name for name in ("notes.txt", "epoch-0009.pt", "epoch-last.abc.pt")]
    for path in others:
        path.write_text("mine")
    for epoch in (2, 3, 4):
        folder.save({"x": epoch}, epoch)
    assert folder.load() == (4, {"x": 4})
    assert all(path.exists() for path in others)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 10**6))
def test_a_flipped_byte_is_detected_and_the_previous_checkpoint_is_used(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture, position: int
) -> None:
    folder = CheckpointFolder(tmp_path_factory.mktemp("run"))
    folder.save({"w": torch.zeros(50)}, epoch=1)
    folder.save({"w": torch.ones(50)}, epoch=2)
    damaged = files(folder)[-1]
    flip_byte(damaged, position)

    caplog.clear()
    loaded = folder.load()
    assert loaded is not None
    assert loaded[0] == 1
    assert torch.equal(loaded[1]["w"], torch.zeros(50))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert damaged.name in caplog.text


def test_a_truncated_checkpoint_is_detected(folder: CheckpointFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.save({"x": 1}, epoch=1)
    folder.save({"x": 2}, epoch=2)
    newest = files(folder)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    assert folder.load() == (1, {"x": 1})
    assert "damaged" in caplog.text


def test_with_every_checkpoint_damaged_there_is_none(
    folder: CheckpointFolder, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (1, 2):
        folder.save({"x": epoch}, epoch)
    for path in files(folder):
        flip_byte(path, 100)
    assert folder.load() is None
    assert len(caplog.records) == 2


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(folder: CheckpointFolder) -> None:
    for epoch in (1, 2, 3):
        folder.save({"x": epoch}, epoch)
    flip_byte(files(folder)[-1], 100)
    assert folder.load() == (2, {"x": 2})

    folder.save({"x": "3, again"}, epoch=3)
    assert epochs(folder) == ["epoch-0002", "epoch-0003"]
    flip_byte(files(folder)[-1], 100)
    assert folder.load() == (2, {"x": 2})


@pytest.mark.parametrize("kind", ["torch archive", "plain pickle"])
def test_a_hostile_checkpoint_is_refused_without_running_it(
    folder: CheckpointFolder, tmp_path: Path, kind: str
) -> None:
    touched, forged = tmp_path / "touched", tmp_path / "forged"
    hostile_file(kind, touched, forged)
    folder.save({"x": 1}, epoch=1)
    forged.rename(folder.path / f"epoch-0002.{hashlib.sha256(forged.read_bytes()).hexdigest()}.pt")

    with pytest.raises(CheckpointError, match="not written by hpo"):
        folder.load()
    assert not touched.exists()


@pytest.mark.parametrize("kind", ["torch archive", "plain pickle"])
def test_hostile_weights_are_refused_without_running_them(tmp_path: Path, kind: str) -> None:
    touched, forged = tmp_path / "touched", tmp_path / "best.pt"
    hostile_file(kind, touched, forged)
    with pytest.raises(CheckpointError, match="not written by hpo"):
        load_weights(forged, hashlib.sha256(forged.read_bytes()).hexdigest())
    assert not touched.exists()


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200).filter(lambda content: content[:1] != b"\x80"))
def test_any_foreign_bytes_are_refused_as_weights(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "foreign.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="not written by hpo"):
        load_weights(path, hashlib.sha256(content).hexdigest())


def test_a_whole_file_that_is_no_dictionary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    torch.save(torch.ones(3), path)
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dictionary"):
        load_weights(path, hashlib.sha256(path.read_bytes()).hexdigest())


def test_saved_weights_are_loaded_as_they_were(tmp_path: Path) -> None:
    weights = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).state_dict()
    sha256 = save_weights(weights, tmp_path / "deep" / "best.pt")
    loaded = load_weights(tmp_path / "deep" / "best.pt", sha256)
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["best.pt"]


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    sha256 = save_weights({"w": torch.ones(3)}, path)
    flip_byte(path, 200)
    with pytest.raises(CheckpointError, match=rf"best\.pt is damaged: its SHA-256 is \w{{64}}, written was {sha256}"):
        load_weights(path, sha256)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best\.pt is missing"):
        load_weights(tmp_path / "best.pt", "0" * 64)


FULL_DISK = """
import errno, resource, sys, torch
from pathlib import Path
from hpo.training import checkpoint
from hpo.training.checkpoint import CheckpointFolder, CheckpointWriter, save_weights
root = Path(sys.argv[1])
small, large = {"w": torch.zeros(10)}, {"w": torch.zeros(100_000)}
sha256 = save_weights(small, root / "best.pt")
folder = CheckpointFolder(root / "run")
folder.save(small, epoch=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for write in (lambda: folder.save(large, epoch=2), lambda: save_weights(large, root / "best.pt")):
    try:
        write()
    except OSError as problem:
        print(errno.errorcode[problem.errno])
print(sha256)
"""


def test_a_write_that_the_disk_cannot_hold_fails_and_leaves_the_previous_file(tmp_path: Path) -> None:
    finished = warm.run([sys.executable, "-c", FULL_DISK, tmp_path])
    assert finished.returncode == 0, finished.stderr
    output = finished.stdout.split()
    assert output[:2] == ["EFBIG", "EFBIG"]
    folder = CheckpointFolder(tmp_path / "run")
    loaded = folder.load()
    assert loaded is not None
    assert loaded[0] == 1
    assert epochs(folder) == ["epoch-0001"], "no temporary file takes up space on a full disk"
    assert torch.equal(load_weights(tmp_path / "best.pt", output[2])["w"], torch.zeros(10))


ENDLESS_SAVES = """
import sys, torch
from itertools import count
from pathlib import Path
from hpo.training.checkpoint import CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]))
for epoch in count(1):
    folder.save({"w": torch.full((200_000,), float(epoch))}, epoch)
    print(epoch, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", ENDLESS_SAVES, tmp_path]
    with warm.WarmPopen(command, text=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        last_reported = [int(process.stdout.readline()) for _ in range(5)][-1]
        os.kill(process.pid, signal.SIGKILL)
    loaded = CheckpointFolder(tmp_path).load()
    assert loaded is not None
    epoch, state = loaded
    assert epoch >= last_reported
    assert torch.equal(state["w"], torch.full((200_000,), float(epoch)))
    assert not caplog.records


def test_the_rename_comes_after_the_content_is_on_the_disk(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor))[1])
    monkeypatch.setattr(Path, "replace", lambda path, target: (calls.append("rename"), rename(path, target))[1])
    folder.save({"x": 1}, epoch=1)
    assert calls == ["fsync", "rename", "fsync"], "the content, the rename, then the folder"


# Writing in a thread.


class HeldFolder(CheckpointFolder):
    """A folder on a disk that takes nothing until it is released."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.is_writing, self.is_released = threading.Event(), threading.Event()

    def save(self, state: Mapping[str, Any], epoch: int) -> None:
        self.is_writing.set()
        assert self.is_released.wait(60)
        super().save(state, epoch)


def test_a_training_does_not_wait_for_the_disk_and_its_last_state_is_written(tmp_path: Path) -> None:
    """What is written is the state as it was handed over, and of those that wait the newest alone."""
    folder, weights = HeldFolder(tmp_path), torch.zeros(2)
    with CheckpointWriter(folder) as writer:
        for epoch in (1, 2, 3):
            writer.save({"weights": weights, "nested": [{"weights": weights}]}, epoch)
            assert folder.is_writing.wait(60)
            weights += 1
        folder.is_released.set()
    assert epochs(folder) == ["epoch-0001", "epoch-0003"]
    loaded = folder.load()
    assert loaded is not None
    assert loaded[1]["weights"].tolist() == loaded[1]["nested"][0]["weights"].tolist() == [2.0, 2.0]


def test_what_a_thread_cannot_write_is_raised_where_the_training_runs(tmp_path: Path) -> None:
    (tmp_path / "run").touch()  # a file where the folder should be
    writer = CheckpointWriter(CheckpointFolder(tmp_path / "run"))
    writer.save({}, 1)
    with pytest.raises(OSError, match="run"):
        writer.close()


def test_a_state_waits_for_its_writing_no_longer_than_the_longest_rest(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody asks for it: a process that is killed while an epoch takes its time loses that epoch alone."""
    folder.path.mkdir()
    monkeypatch.setattr(checkpoint, "MAX_REST_S", 0.01)
    with CheckpointWriter(folder) as writer:
        for epoch in (1, 2, 3):
            writer.save({}, epoch)
        deadline = time.monotonic() + 60
        while "epoch-0003" not in epochs(folder):
            assert time.monotonic() < deadline
            time.sleep(0.01)
