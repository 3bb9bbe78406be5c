"""Originals that are converted once and kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers.data import assert_same

from hpo.data.cache import cached_split
from hpo.data.examples import Split


@pytest.fixture
def originals(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "originals" / name for name in ("a", "b")]
    paths[0].parent.mkdir()
    for path in paths:
        path.write_text(path.name)
    return paths


class Conversion:
    """Converts to a constant split, and counts how often."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> Split:
        self.count += 1
        return Split(torch.arange(60, dtype=torch.uint8).view(5, 3, 2, 2), torch.arange(5))


def test_originals_are_converted_once(tmp_path: Path, originals: list[Path]) -> None:
    convert = Conversion()
    first, second = (cached_split(tmp_path / "cache", "pets-train", originals, convert) for _ in range(2))
    assert convert.count == 1
    assert_same(first, second)
    (file,) = (tmp_path / "cache").iterdir()
    assert hashlib.sha256(file.read_bytes()).hexdigest() in file.name


@pytest.mark.parametrize("change", ["written to", "renamed", "added", "removed"])
def test_changed_originals_are_converted_again_and_the_outdated_file_goes(
    tmp_path: Path, originals: list[Path], change: str
) -> None:
    convert = Conversion()
    cached_split(tmp_path / "cache", "pets-train", originals, convert)
    cached_split(tmp_path / "cache", "pets-test", originals, convert)
    match change:
        case "written to":
            originals[0].write_text("c")
            os.utime(originals[0], (0, 0))  # not within one tick of the file system's clock
        case "renamed":
            originals[0] = originals[0].rename(originals[0].with_name("c"))
        case "added":
            shutil.copy2(originals[0], originals[0].with_name("c"))
            originals.append(originals[0].with_name("c"))
        case "removed":
            originals.pop()
    cached_split(tmp_path / "cache", "pets-train", originals, convert)
    assert convert.count == 3
    assert sorted(path.name.split(".")[0] for path in (tmp_path / "cache").iterdir()) == ["pets-test", "pets-train"]


@pytest.mark.parametrize("damage", ["a flipped bit", "cut off", "empty"])
def test_a_damaged_cache_is_noticed_and_rebuilt(
    tmp_path: Path, originals: list[Path], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    convert = Conversion()
    expected = cached_split(tmp_path, "pets", originals, convert)
    (file,) = tmp_path.glob("pets.*.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"a flipped bit": content, "cut off": content[:-1], "empty": b""}[damage])  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        assert_same(cached_split(tmp_path, "pets", originals, convert), expected)
    assert f"{file} is damaged" in caplog.text
    assert_same(cached_split(tmp_path, "pets", originals, convert), expected)
    assert convert.count == 2, "the rebuilt file was not used"


def test_a_folder_that_cannot_be_written_costs_a_conversion_each_time(
    tmp_path: Path, originals: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    convert = Conversion()
    (tmp_path / "cache").write_text("not a folder")
    for _ in range(2):
        assert len(cached_split(tmp_path / "cache", "pets", originals, convert)) == 5
    assert convert.count == 2
    assert "pets cannot be kept" in caplog.text


def test_a_full_disk_leaves_no_half_file(
    tmp_path: Path, originals: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
    try:
        split = cached_split(tmp_path / "cache", "pets", originals, Conversion())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_same(split, Conversion()())
    assert list((tmp_path / "cache").iterdir()) == []
    assert "pets cannot be kept" in caplog.text


def test_conversions_at_the_same_time_do_not_harm_each_other(tmp_path: Path, originals: list[Path]) -> None:
    start = threading.Barrier(8)

    def convert() -> Split:
        start.wait()
        return Conversion()()

    with ThreadPoolExecutor(8) as pool:
        splits = list(pool.map(lambda _: cached_split(tmp_path / "cache", "pets", originals, convert), range(8)))
    for split in splits:
        assert_same(split, Conversion()())
    assert len(list((tmp_path / "cache").iterdir())) == 1
    unused = Conversion()
    assert_same(cached_split(tmp_path / "cache", "pets", originals, unused), splits[0])
    assert unused.count == 0
