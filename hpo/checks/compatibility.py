"""Checks before the first trial: what would make trial after trial fail is found here, in a second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hpo.config import config_fields
from hpo.data.batches import build_batches
from hpo.data.datasets import Splits
from hpo.errors import DataError, SpaceError, UsageError
from hpo.models.preprocessed import build_model
from hpo.space import Choice, Value, format_value
from hpo.task import Task
from hpo.training.losses import training_loss
from hpo.training.metrics import check_metric
from hpo.training.trainer import check_fine_tuning


def check_task(task: Task, splits: Splits) -> None:
    """Raise UsageError where a metric, a batch size or the model of the task does not fit its data."""
    check_metric(task.objective.metric, len(splits.spec.classes))
    _check_batch_sizes(task, splits)
    _check_model(task, splits)
    _check_choices(task, splits)
    for name in ("loss", "class_weights", "sampling", "augment", "mixup", "cutmix"):
        for value in _possible_values(task, name):
            _check_setting(task, splits, name, value)


def _possible_values(task: Task, name: str) -> tuple[Value, ...]:
    """What a trial may have for a setting: the values or ends of its parameter, or the task's own value."""
    parameter = task.space.parameters.get(name)
    return parameter.extremes() if parameter else (getattr(task.train_config({}), name),)


def _check_batch_sizes(task: Task, splits: Splits) -> None:
    """Every batch size that may be drawn must fit, or trials would fail one by one."""
    sizes, num_examples = _possible_values(task, "batch_size"), len(splits.train)
    fitting = [str(size) for size in sizes if int(size) <= num_examples]
    for size in sizes:
        if int(size) > num_examples:
            narrowed = f"allow smaller ones only, as -p batch_size={','.join(fitting)}, raise --limit"
            advice = narrowed if fitting else f"take at most {num_examples}, as --set batch_size={num_examples}"
            raise SpaceError(
                f"batch_size {size} is larger than the {num_examples} training examples; {advice}, or add examples."
            )


def _check_setting(task: Task, splits: Splits, name: str, value: Value) -> None:
    """Every loss, sampling and augmentation that may be drawn must fit the data."""
    config = task.train_config({name: value}, batch_size=1)
    num_classes = len(splits.spec.classes)
    training_loss(config, splits.train, num_classes)
    generator = torch.Generator()
    build_batches(splits.train, config, num_classes, order=generator, augmentation=generator)


def _check_model(task: Task, splits: Splits) -> None:
    """Build the default configuration and let it see two examples, so that a mistake in a task is found at once."""
    values = task.space.active(task.space.defaults())
    with _blamed_on(task, "the default configuration"):
        model = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0).eval()
        model.fit_statistics(splits.train)
        outputs = model(splits.train.inputs[:2])
    if not isinstance(outputs, torch.Tensor):
        raise UsageError(
            f"the model of task '{task.objective.name}' returns a {type(outputs).__name__}; it must return one tensor."
        )
    shape = tuple(outputs.shape)
    wanted = (2, splits.spec.num_outputs) if splits.spec.classes else (2,)
    if shape != wanted:
        raise UsageError(
            f"the model of task '{task.objective.name}' returns outputs of shape {shape} for 2 examples, not {wanted}."
        )
    check_fine_tuning(model, task.train_config(values))


def _check_choices(task: Task, splits: Splits) -> None:
    """Every choice must build the model: an architecture, above all, for which there are no pretrained weights."""
    for name, parameter in task.space.parameters.items():
        if not isinstance(parameter, Choice) or name in config_fields():
            continue
        for value in (choice for choice in parameter.choices if choice != parameter.default):
            parameters = task.model_parameters(task.space.active(task.space.defaults() | {name: value}))
            with _blamed_on(task, f"{name}={format_value(value)}"):
                build_model(task.objective, splits.spec, parameters, seed=0)


@contextmanager
def _blamed_on(task: Task, configuration: str) -> Iterator[None]:
    """Whatever the model raises, told as a UsageError."""
    try:
        yield
    except DataError:  # no pretrained weights; it says what to do
        raise
    except (Exception, SystemExit) as error:  # the model is a stranger's code and may raise anything
        raise UsageError(
            f"the model of task '{task.objective.name}' fails with {configuration}: {type(error).__name__}: {error}"
        ) from error
