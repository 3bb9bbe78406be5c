"""Options of a task's data: declared by its `load`, given by every command, and kept by the study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpo.cli import cli
from hpo.errors import StudyMismatchError, UsageError
from hpo.plugins import load_task
from hpo.session.search import run_search
from hpo.session.training import train_once

TASK = """
from pathlib import Path

import torch
from hpo import Choice, Dataset, Float, Group, Objective, Space, hold_out, mlp

def load(data_dir: Path, *, label: str, rows: int = 200, noise: float = 0.1, shuffled: bool = False, unused=object()):
    with (Path(__file__).parent / "loads.txt").open("a") as file:
        file.write(f"{label} {rows} {noise} {shuffled}\\n")
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 4, generator=generator)
    number = inputs.sum(1) + noise * torch.randn(rows, generator=generator)
    return hold_out(inputs, number) if label == "number" else hold_out(inputs, (number > 0).long(), ["low", "high"])

objective = Objective(
    name="mine", description="a class or a number", load=load, model=mlp, loss="auto", metric="auto",
    settings={"max_epochs": 1, "batch_size": 16},
    space=Space(Group("step size", lr=Float(1e-4, 1e-1, log=True, default=1e-2))),
)
"""


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(TASK)
    return file


def loads(task: Path) -> list[str]:
    return (task.parent / "loads.txt").read_text().splitlines()


def test_a_study_keeps_the_options_of_its_data_and_the_data_decide_loss_and_metric(task: Path, home: Path) -> None:
    options: Any = {"home": home, "workers": 1, "device": "cpu"}
    run_search(str(task), trials=1, data_options={"label": "number", "rows": 150}, **options)
    outcome = run_search(str(task), trials=2, **options)

    assert outcome.winner is not None
    assert outcome.winner.metric == "r2"  # it is a number
    assert loads(task) == ["number 150 0.1 False"] * 2  # once in each session: workers get the splits
    facts = json.loads(CliRunner().invoke(cli, ["show", "mine", "--home", str(home), "--json"]).output)
    assert facts["data_options"] == ["label=number", "rows=150"]
    assert (
        "Data options: label=number, rows=150" in CliRunner().invoke(cli, ["show", "mine", "--home", str(home)]).output
    )
    with pytest.raises(StudyMismatchError, match="--data-option label=number rows=150, not label=class"):
        run_search(str(task), trials=2, data_options=["label=class"], **options)
    assert len(loads(task)) == 2  # before the data are read


def test_every_command_that_reads_data_takes_their_options(task: Path, home: Path) -> None:
    options = ["--data-option", "label=class", "--data-option", "rows=160"]
    checked = CliRunner().invoke(cli, ["check", str(task), "--home", str(home), "--device", "cpu", *options])
    training = train_once(str(task), data_options=["label=class", "noise=0"], home=home, device="cpu")

    assert "Data options: label=class, rows=160, noise=0.1, shuffled=false" in checked.output, checked.output
    assert training.metric == "accuracy"
    assert loads(task) == ["class 160 0.1 False", "class 200 0.0 False"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (),
            r"task 'mine' needs --data-option label=VALUE; its data options are label=\.\.\. \(required\), rows=200, ",
        ),
        (["label=class", "row=3"], "no data option 'row'; did you mean 'rows'"),
        (["label=class", "rows=many"], "--data-option rows=many is not allowed: rows must be a whole number"),
        (["label=class", "shuffled=1"], "shuffled must be true or false"),
        (["label=class", "noise=loud"], "noise must be a number"),
        (["label=class", "label=number"], "label is given twice"),
        (["label"], "--data-option 'label' is not NAME=VALUE"),
        ({"label": 3}, "--data-option label=3 is not allowed: label must be a text"),
        (["label=class", "unused=3"], "no data option 'unused'"),
    ],
)
def test_what_is_no_option_of_the_data_is_reported_before_they_are_read(task: Path, given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_task(str(task)).with_data_options(given)
    assert not (task.parent / "loads.txt").exists()


def test_a_task_without_options_says_so(home: Path) -> None:
    with pytest.raises(UsageError, match="--data-option label=x: task 'digits' has no data options; omit it"):
        run_search("digits", home=home, data_options={"label": "x"})


def test_a_name_with_several_columns_is_written_with_commas(task: Path) -> None:
    assert load_task(str(task)).with_data_options({"label": ["a", "b"]}).written_data_options == ("label=a,b",)
