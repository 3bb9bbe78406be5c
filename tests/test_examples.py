"""The examples of kinds of target: the default configuration of each reaches what a wrong implementation would not."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from statistics import fmean

import pytest

from hpo import Dataset, EpochResult, Objective, PreprocessedModel, find_data_dir, split_dataset
from hpo.checks.compatibility import check_task
from hpo.models.preprocessed import build_model
from hpo.plugins import load_task
from hpo.task import Task, load_dataset
from hpo.training.trainer import fit

EXAMPLES = Path(__file__).parents[1] / "examples"

# The value to reach, and what it is to be compared with.
REACHED = {
    "several_labels": 0.95,  # a linear model has an F1 of 0.89
    "autoencoder": 24.5,  # nats; the mean image alone has 27.2
    "read_lines": 0.05,  # blanks alone have 1
    "two_targets": 0.5,  # the means have 0.71
    "definitions": 0.8,  # the commonest class has 0.17
    "text_transformer": 0.88,  # the same
    "three_numbers": 0.3,  # pixels; the means have 1.48
    "two_inputs": 0.9,  # the number alone has 0.79
    "boxes": 0.7,  # the mean box has 0.14
    "segmentation": 0.85,  # background alone has 0.45
}
READ_WORDNET = ("definitions", "text_transformer")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.real_data] * (name in READ_WORDNET)) for name in REACHED]
)
def test_an_example_learns(name: str) -> None:
    file = EXAMPLES / f"{name}.py"
    assert len(file.read_text().splitlines()) <= 100
    task = load_task(str(file))
    last, *_ = trained(task)
    assert last.best_value is not None
    assert task.objective.better.gain(last.best_value, over=REACHED[name]) > 0, last.best_value


def trained(task: Task, *, seed: int = 0) -> tuple[EpochResult, PreprocessedModel, Dataset]:
    """The default configuration on the validation split, with the best weights."""
    data = load_dataset(task, find_data_dir())
    splits = split_dataset(data, seed=0)
    check_task(task, splits)
    values = task.space.active(task.space.defaults())
    model = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0)
    model.fit_statistics(splits.train)
    # What is fastest on a machine must not decide what is learned.
    *_, last = fit(model, splits, task.train_config(values, seed=seed, precision="fp32", compile="off"))
    return last, model, data


def test_weights_from_pre_training_without_labels_help_where_labels_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len((EXAMPLES / "pretraining.py").read_text().splitlines()) <= 80
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = import_module("pretraining")

    def accuracy(objective: Objective) -> float:
        """On the test split, the mean over three seeds."""
        task = Task(reference="pretraining", objective=objective, space=objective.space)
        return fmean(_test_accuracy(*trained(task, seed=seed)[1:]) for seed in range(3))

    pretraining = example.pretraining
    _, model, _ = trained(Task(reference="pretraining", objective=pretraining, space=pretraining.space))
    tuned = accuracy(example.fine_tuning(model.network.body.state_dict()))
    assert tuned > 0.75, "of ten classes, from 100 labels"
    assert tuned > accuracy(example.fine_tuning(None)) + 0.01


def _test_accuracy(model: PreprocessedModel, data: Dataset) -> float:
    examples = data.test.open()
    predicted = model.predict(examples.inputs)
    return fmean(int(one) == other for one, other in zip(predicted, examples.targets.tolist(), strict=True))
