"""`hpo train` and MLflow, when its process is killed and when it is not."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.searches import wait_until
from helpers.warm import WarmPopen

import hpo
from hpo.session.training import train_once
from hpo.tracking.store import open_store, search_runs


@pytest.fixture
def training(home: Path) -> Any:
    command = [sys.executable, "-m", "hpo", "train", "digits", "--epochs", "10000", "--set", "patience=10000"]
    with WarmPopen([*command, "--home", home], start_new_session=True) as process:
        wait_until(lambda: [*statuses(home).values()] == ["RUNNING"])
        yield process
        process.kill()


def statuses(home: Path) -> dict[str, str]:
    """The status of each training's run, by its id."""
    store = open_store(home)
    experiment = store.client.get_experiment_by_name("hpo/digits")
    if experiment is None:
        return {}
    runs = search_runs(store.client, experiment.experiment_id, "tags.`hpo.kind` = 'training'")
    return {run.info.run_id: run.info.status for run in runs}


def test_a_killed_training_is_ended_by_the_next_command_and_one_that_lives_is_not(home: Path, training: Any) -> None:
    [first] = statuses(home)
    hpo.run_search("digits", home=home, trials=1, epochs=1, workers=1)
    assert statuses(home)[first] == "RUNNING", "a search leaves a training alone that is under way"
    training.send_signal(signal.SIGKILL)
    training.wait()
    second = train_once("digits", epochs=1, home=home).run_id
    assert statuses(home) == {first: "KILLED", second: "FINISHED"}
