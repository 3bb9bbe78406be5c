"""What a study remembers of its data, its code and its machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hpo
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.fingerprint import data_fingerprint
from hpo.data.mapped import MappedImages
from hpo.errors import CheckpointError, StudyMismatchError
from hpo.plugins import load_objective
from hpo.provenance import Provenance
from hpo.sources import source_checksums
from hpo.terminal.facts import study_facts
from hpo.tracking.store import open_store

TASK = """
from pathlib import Path
from my_layers.blocks import network  # what the model is made of
import hpo.objective

def load(data_dir):
    ...

objective = hpo.objective.Objective(name="mine", description="", load=load, model=network)
"""


def make_dataset(*, num_test: int = 2) -> Dataset:
    images = torch.arange(6 * 3 * 2 * 2, dtype=torch.uint8).reshape(6, 3, 2, 2)
    train = Split(images, torch.tensor([0, 1, 0, 1, 0, 1]))
    return Dataset(train, SealedSplit(lambda: pytest.fail("the test split stays sealed"), num_test), ("a", "b"))


def with_train(**changes: torch.Tensor) -> Callable[[Dataset], Dataset]:
    return lambda dataset: replace(dataset, train=replace(dataset.train, **changes))


@pytest.mark.parametrize(
    "change",
    [
        with_train(targets=torch.tensor([1, 1, 0, 1, 0, 1])),
        with_train(inputs=make_dataset().train.inputs.flip(0)),
        with_train(inputs=make_dataset().train.inputs.float()),
        lambda dataset: replace(dataset, classes=("a", "c")),
        lambda dataset: make_dataset(num_test=3),
    ],
    ids=["a target", "the order", "the type", "a class name", "the test split's size"],
)
def test_a_fingerprint_shows_every_change_of_the_data(change: Callable[[Dataset], Dataset]) -> None:
    assert data_fingerprint(change(make_dataset())) != data_fingerprint(make_dataset())


def test_a_fingerprint_is_the_same_for_images_in_memory_and_in_a_file(tmp_path: Path) -> None:
    dataset = make_dataset()
    assert isinstance(dataset.train.inputs, torch.Tensor)
    file = tmp_path / "images"
    file.write_bytes(dataset.train.inputs.numpy().tobytes())
    mapped = MappedImages(file, 6, (3, 2, 2), torch.arange(6))
    in_file = replace(dataset, train=replace(dataset.train, inputs=mapped))
    assert data_fingerprint(in_file) == data_fingerprint(dataset)


def test_large_inputs_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 6 examples of 12 bytes the first, the middle ones and the last are read."""
    monkeypatch.setattr("hpo.data.fingerprint.MAX_BYTES", 36)
    dataset = make_dataset()
    assert isinstance(dataset.train.inputs, torch.Tensor)
    before = data_fingerprint(dataset)
    seen = []
    for row in range(6):
        inputs = dataset.train.inputs.clone()
        inputs[row] += 1
        seen.append(data_fingerprint(with_train(inputs=inputs)(dataset)) != before)
    assert seen == [True, False, True, False, False, True]


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A task file with a package beside it."""
    package = tmp_path / "my_layers"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "blocks.py").write_text("from .inner import WIDTH\ndef network(spec):\n    return WIDTH\n")
    (package / "inner.py").write_text("WIDTH = 3\n")
    (tmp_path / "mine.py").write_text(TASK)
    return tmp_path / "mine.py"


@pytest.fixture(autouse=True)
def _imports_afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test imports its own files under the same names."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in [name for name in sys.modules if name.startswith(("my_layers", "hpo_task_mine"))]:
        del sys.modules[name]


def test_the_sources_of_a_task_are_its_file_and_what_it_imports_from_its_folder(task: Path) -> None:
    assert list(source_checksums(load_objective(str(task)))) == [
        "mine.py",
        "my_layers/__init__.py",
        "my_layers/blocks.py",
        "my_layers/inner.py",
    ]


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("# a note\n\nWIDTH = 3  # wide\n", False),
        ("WIDTH = 4\n", True),
        ('WIDTH = 3\nNAME = "# not a comment"\n', True),
    ],
)
def test_comments_and_blank_lines_are_not_a_change_of_the_source(task: Path, text: str, counts: bool) -> None:
    objective = load_objective(str(task))
    before = source_checksums(objective)
    (task.parent / "my_layers/inner.py").write_text(text)
    assert (source_checksums(objective) != before) == counts


def test_a_session_knows_the_commit_and_whether_there_were_changes(task: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
        command = ["git", "-C", str(task.parent), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    objective = load_objective(str(task))
    assert Provenance.of_session(objective, make_dataset()).commit is None
    git("init", "-q")
    git("add", "mine.py")
    git("commit", "-qm", "A task")
    clean = Provenance.of_session(objective, make_dataset())
    assert (clean.commit, clean.is_dirty) == (git("rev-parse", "HEAD"), False)
    task.write_text(task.read_text() + "\n")
    assert Provenance.of_session(objective, make_dataset()).is_dirty


def test_a_session_keeps_its_command_without_passwords(task: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["/usr/bin/hpo", "search", "mine.py", "--storage", "postgresql+psycopg://me:secret@db/hpo"]
    monkeypatch.setattr(sys, "argv", arguments)
    session = Provenance.of_session(load_objective(str(task)), make_dataset())
    assert session.command == "hpo search mine.py --storage 'postgresql+psycopg://me:***@db/hpo'"
    monkeypatch.setattr(sys, "argv", ["/lib/hpo/__main__.py", "search", "digits"])
    assert Provenance.of_session(load_objective(str(task)), make_dataset()).command == "python -m hpo search digits"


# A study on other data, or with another source.

SEARCHED = """
import os
import torch
from torch import nn
import hpo

def load(data_dir):
    inputs = torch.randn(80, 4, generator=torch.Generator().manual_seed(0)) * float(os.environ.get("SCALE", "1"))
    return hpo.hold_out(inputs, (inputs.sum(1) > 0).long(), classes=["low", "high"])

def model(spec, *, width=4):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

objective = hpo.Objective(
    name="mine", description="", load=load, model=model, settings={"max_epochs": 1, "batch_size": 16},
    space=hpo.Space(hpo.Group("step size", lr=hpo.Float(1e-3, 1e-1, log=True, default=1e-2))),
)
"""


def test_a_study_notices_other_data_and_another_source(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    task = tmp_path / "mine.py"
    task.write_text(SEARCHED)
    options: dict[str, Any] = {"home": home, "workers": 1, "device": "cpu"}
    hpo.run_search(str(task), trials=1, **options)
    assert hpo.load_best("mine", home=home)
    assert caplog.text == ""

    monkeypatch.setenv("SCALE", "2")
    with pytest.raises(StudyMismatchError, match=r"^the data changed since study 'mine' was last searched"):
        hpo.run_search(str(task), trials=2, **options)
    monkeypatch.delenv("SCALE")
    task.write_text(SEARCHED.replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.raises(StudyMismatchError, match=r"^mine.py changed since .* --accept-changes, which every report"):
        hpo.run_search(str(task), trials=2, **options)
    hpo.load_best("mine", home=home)
    assert "was trained with another version of mine.py" in caplog.text
    assert hpo.run_search(str(task), trials=2, accept_changes=True, **options).is_done
    changes = study_facts("mine", home)["made_with"][1:]
    assert changes == ["Changed before trial 1: mine.py"]
    assert hpo.run_search(str(task), trials=2, **options).is_done, "what was accepted is known"

    task.write_text(SEARCHED.replace("nn.Linear(width, 2)", "nn.Linear(width, 3), nn.Linear(3, 2)"))
    with pytest.raises(CheckpointError, match=r"do not fit the model .* restore the source .*: mine.py changed since"):
        hpo.load_best("mine", home=home)


def test_each_run_is_tagged_with_what_it_was_made_with(tmp_path: Path, home: Path) -> None:
    hpo.run_search("digits", trials=1, epochs=1, workers=1, home=home)
    client = open_store(home).client
    [experiment] = [each for each in client.search_experiments() if each.name == "hpo/digits"]
    for run in client.search_runs([experiment.experiment_id]):
        tags = run.data.tags
        assert tags["hpo.version.torch"] == torch.__version__.partition("+")[0]
        assert len(tags["hpo.data"]) == 64
        assert tags["hpo.command"]
