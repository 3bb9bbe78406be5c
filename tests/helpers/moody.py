"""Short searches of a task that is slow, held, raises or gives NaN, as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.homes import copy_home
from hpo.records import SearchOutcome
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session.search import run_search
from hpo.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow.entities import Run


# The digits with one more thing that a test needs: it can take its time, raise, or give NaN.
TASK = """
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from hpo.models.mlp import MLP
from hpo.objective import Objective
from hpo.parameters import Choice, Float
from hpo.space import Group, Space
from hpo.objectives.digits import load


class Moody(torch.nn.Module):
    def __init__(self, net, mood):
        super().__init__()
        self.net, self.mood = net, mood

    def forward(self, inputs):
        if self.training and self.mood in ("slow", "stuck"):
            time.sleep({"slow": 0.05, "stuck": 600}[self.mood])
        while self.training and self.mood == "held" and (Path(__file__).parent / "hold").exists():
            time.sleep(0.005)
        if self.training and self.mood == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.training and self.mood == "raises":
            raise RuntimeError("the cat is on the keyboard")
        outputs = self.net(inputs)
        return outputs * float("nan") if self.training and self.mood == "nan" else outputs


def model(spec, *, width=32, mood="calm"):
    return Moody(MLP(spec, depth=1, width=width, activation="relu", norm="none", dropout=0.1), mood)


objective = Objective(
    name="moody", description="digits with moods", load=load, model=model,
    settings={"max_epochs": 3, "batch_size": 256, "optimizer": "sgd", "lr": 0.1},
    space=Space(
        Group("step size", lr=Float(1e-3, 1.0, log=True, default=0.1)),
        Group(
            "architecture",
            width=Choice(16, 32, default=32),
            mood=Choice("calm", "slow", "held", "stuck", "raises", "nan", "dies", default="calm"),
        ),
    ),
)
"""
PLOTS = ("confusion_matrix", "history", "learning_curves", "slices")


# One trial after the other, so that a test can say which one is under way.
ALONE: dict[str, Any] = {"trials": 3, "pruner": "none", "workers": 1}


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "moody.py"
    path.write_text(TASK)
    return str(path)


@pytest.fixture
def search(task: str, home: Path) -> Callable[..., SearchOutcome]:
    """A short search in this process."""

    def run(**options: Any) -> SearchOutcome:
        return run_search(task, home=home, **{**ALONE, "overrides": ("mood=calm",), **options})

    return run


@pytest.fixture(scope="session")
def finished_study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the task and a home in which it was searched: one trial is complete."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "moody.py").write_text(TASK)
    run_search(str(folder / "moody.py"), home=folder / "home", **{**ALONE, "trials": 1}, overrides=("mood=calm",))
    return folder


@pytest.fixture
def finished(finished_study: Path, home: Path) -> Callable[..., SearchOutcome]:
    """As `search`, in a home that is a copy of a finished search's.

    Only for what reads no artifacts: in one process MLflow takes those of the original.
    """
    copy_home(finished_study / "home", home)

    def run(**options: Any) -> SearchOutcome:
        task = str(finished_study / "moody.py")
        return run_search(task, home=home, **{**ALONE, "overrides": ("mood=calm",), **options})

    return run


def study(home: Path, name: str = "moody") -> Study:
    return Study.load(open_storage(home), name)


def runs(home: Path, filter_string: str = "tags.`hpo.kind` = 'trial'", name: str = "moody") -> list[Run]:
    client = open_store(home).client
    experiment = client.get_experiment_by_name(f"hpo/{name}")
    assert experiment is not None
    return sorted(
        client.search_runs([experiment.experiment_id], filter_string),
        key=lambda run: int(run.data.tags.get("hpo.trial", -1)),
    )


def assert_nothing_is_left_running(home: Path) -> None:
    assert study(home).counts()["running"] == 0
    assert runs(home, "attributes.status = 'RUNNING'") == []


def curve(home: Path, run: Run, key: str = "val/accuracy") -> list[int]:
    return sorted(metric.step for metric in open_store(home).client.get_metric_history(run.info.run_id, key))


def values(home: Path, run: Run, key: str) -> list[float]:
    return [metric.value for metric in open_store(home).client.get_metric_history(run.info.run_id, key)]
