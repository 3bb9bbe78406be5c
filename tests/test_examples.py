"""The examples of kinds of target: the default configuration of each reaches what a wrong implementation would not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpo import find_data_dir, split_dataset
from hpo.checks.compatibility import check_task
from hpo.models.preprocessed import build_model
from hpo.plugins import load_task
from hpo.task import load_dataset
from hpo.training.trainer import fit

EXAMPLES = Path(__file__).parents[1] / "examples"

# The value to reach, and what it is to be compared with.
REACHED = {
    "several_labels": 0.95,  # a linear model has an F1 of 0.89
    "autoencoder": 24.5,  # nats; the mean image alone has 27.2
    "read_lines": 0.05,  # blanks alone have 1
    "two_targets": 0.5,  # the means have 0.71
    "definitions": 0.8,  # the commonest class has 0.17
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.real_data] * (name == "definitions")) for name in REACHED]
)
def test_an_example_learns(name: str) -> None:
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 100
    task = load_task(str(file))
    splits = split_dataset(load_dataset(task, find_data_dir()), seed=0)
    check_task(task, splits)
    values = task.space.active(task.space.defaults())
    model = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0)
    model.fit_statistics(splits.train)
    *_, last = fit(model, splits, task.train_config(values))
    assert last.best_value is not None
    assert task.objective.better.gain(last.best_value, over=REACHED[name]) > 0, last.best_value
