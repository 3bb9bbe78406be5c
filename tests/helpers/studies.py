"""A search space, settings of a study, and trials whose results are a formula."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice

import pytest
from hypothesis import strategies as st
from optuna.storages import BaseStorage

from hpo.config import Direction
from hpo.parameters import Choice, Float, Int, Value
from hpo.records import EndState
from hpo.search.encoding import distribution
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study, Suggestion
from hpo.space import Group, Space

SPACE = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=1e-2),
        batch_size=Choice(64, 128, 256, default=128),
    ),
    Group(
        "architecture and optimizer",
        depth=Int(2, 20, default=8),
        optimizer=Choice("sgd", "adam", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.0),
        weight_decay=Float(1e-6, 1e-2, log=True, default=1e-4),
    ),
)
SETTINGS = StudySettings(
    task="digits",
    space=SPACE,
    seed=0,
    strategy="priority",
    pruner="none",
    max_epochs=3,
    metric="accuracy",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=20,
)
DISTRIBUTIONS = {name: distribution(parameter) for name, parameter in SPACE.parameters.items()}


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> BaseStorage:
    """One sqlite file for the tests of this module; each makes studies of its own in it."""
    return open_storage(tmp_path_factory.mktemp("home"))


@pytest.fixture
def study_name(request: pytest.FixtureRequest) -> str:
    return request.node.name


def accuracy(values: dict[str, Value], epoch: int) -> float:
    """Rises epoch by epoch to what the values are worth; best at lr=0.03, depth=10."""
    lr, depth = float(values["lr"]), int(values["depth"])
    return 1 - (math.log10(lr) + 1.5) ** 2 / 10 - (depth - 10) ** 2 / 500 - 0.1 / epoch


def run_trials(study: Study, total: int, at_most: int | None = None) -> list[Suggestion]:
    """Run what is missing to `total`, or only the next `at_most` trials, as a coordinator would."""
    return list(islice(_run_trials(study, total), at_most))


def _run_trials(study: Study, total: int) -> Iterator[Suggestion]:
    while study.remaining(total) > 0:
        suggestion = study.ask()
        state: EndState = "complete"
        for epoch in range(1, study.settings.max_epochs + 1):
            value = accuracy(suggestion.values, epoch)
            if study.report(suggestion.number, epoch, value):
                state = "pruned"
                break
        study.tell(suggestion.number, state, value=value, best_epoch=epoch)
        yield suggestion


def values_of(suggestions: list[Suggestion]) -> list[dict[str, Value]]:
    return [suggestion.values for suggestion in suggestions]


parameters = st.one_of(
    st.tuples(st.floats(-1e3, 1e3), st.just(0.0) | st.floats(1e-3, 1e3)).map(
        lambda t: Float(t[0], t[0] + t[1], default=t[0])
    ),
    st.tuples(st.floats(1e-6, 1e3), st.just(1.0) | st.floats(1.001, 1e6)).map(
        lambda t: Float(t[0], t[0] * t[1], log=True, default=t[0])
    ),
    st.tuples(st.integers(-50, 50), st.integers(0, 50)).map(lambda t: Int(t[0], t[0] + t[1], default=t[0])),
    st.tuples(st.integers(1, 50), st.integers(0, 500)).map(
        lambda t: Int(t[0], t[0] + t[1], log=True, default=t[0] + t[1])
    ),
    st.lists(
        st.sampled_from(["a", "b", "c", 1, 2, 0.5, True, None, (1, 3), (True, "d")]),
        min_size=1,
        max_size=4,
        unique_by=str,
    ).map(lambda choices: Choice(*choices, default=choices[-1])),
)
spaces = st.lists(parameters, min_size=1, max_size=6).map(
    lambda drawn: Space(*(Group(f"group {i}", **{f"p{i}": parameter}) for i, parameter in enumerate(drawn)))  # type: ignore[arg-type]
)


def run_python(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
