"""A rehearsal: a few real steps of the default configuration and of the extremes of the space."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from hpo.checks.verdicts import Subject, Verdict
from hpo.errors import CheckpointError, DeviceMemoryError, in_one_line
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.parameters import Choice
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.device import free_memory
from hpo.training.trainer import fit
from hpo.values import format_value, is_same

if TYPE_CHECKING:
    from hpo.config import TrainConfig
    from hpo.data.datasets import Splits
    from hpo.parameters import Value
    from hpo.task import Task

REHEARSAL_S = 15.0
"""Seconds after which no further configuration is begun."""

NUM_STEPS, NUM_VALIDATION = 2, 64
MAX_SHOWN = 3


def check_rehearsal(subject: Subject) -> Verdict:
    """Whether each configuration trains, is evaluated, and, the default one, is saved and resumed in a second epoch."""
    deadline = time.monotonic() + REHEARSAL_S
    defaults = subject.task.space.defaults()
    error = _error_of(subject, defaults, is_resumed=True)
    if error:
        advice = "no trial of the default configuration can succeed; fix this first"
        return Verdict(state="wrong", text=f"the default configuration {error}", advice=advice)
    extremes, failures, num_tried = _extremes(subject.task), dict[str, str](), 0
    for values in extremes:
        if time.monotonic() > deadline:
            break
        num_tried += 1
        if error := _error_of(subject, values):
            blamed, error = _smallest_failure(subject, values, error, deadline)
            failures[_described(blamed)] = error
    data = {"rehearsed": 1 + num_tried, "failed": len(failures)}
    left = (
        f"; {len(extremes) - num_tried} more did not fit into {REHEARSAL_S:.0f} s" if num_tried < len(extremes) else ""
    )
    if failures:
        text = "; ".join(f"{names} {error}" for names, error in list(failures.items())[:MAX_SHOWN])
        advice = "trials with these values fail: leave them out with -p, or change the model"
        return Verdict(state="wrong", text=text + left, advice=advice, data=data)
    text = f"the default configuration and {num_tried} extremes of the space train and are evaluated{left}"
    return Verdict(state="ok", text=text, data=data)


def _extremes(task: Task) -> list[dict[str, Value]]:
    """Configurations that together have both ends of each range and each choice that is no number: first the highest of
    all, then the lowest. The learning rate stays: a loss that is not finite is no failure."""
    tried = {name: _values(parameter) for name, parameter in task.space.parameters.items() if name != "lr"}
    longest = max((len(values) for values in tried.values()), default=0)
    configurations = [
        task.space.defaults() | {name: values[number] for name, values in tried.items() if number < len(values)}
        for number in range(longest)
    ]
    default = task.space.active(task.space.defaults())
    return [values for values in configurations if task.space.allows(values) and task.space.active(values) != default]


def _values(parameter: object) -> list[Value]:
    assert hasattr(parameter, "extremes"), "a parameter of a space"
    values: list[Value] = list(parameter.extremes())
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    if isinstance(parameter, Choice) and len(numbers) < len(values):
        return values
    return sorted({min(numbers), max(numbers)}, reverse=True)


def _smallest_failure(
    subject: Subject, values: Mapping[str, Value], error: str, deadline: float
) -> tuple[dict[str, Value], str]:
    """What of a configuration that fails is needed for it to fail, as far as the time allows, and how it fails."""
    defaults, active = subject.task.space.defaults(), subject.task.space.active(values)
    blamed = {name: value for name, value in active.items() if not is_same(value, defaults[name])}
    for name in list(blamed):
        without = {other: value for other, value in blamed.items() if other != name}
        if not without or time.monotonic() > deadline:
            break
        if found := _error_of(subject, defaults | without):
            blamed, error = without, found
    return blamed, error


def _described(values: Mapping[str, Value]) -> str:
    """As in `width=4096 with batch_size=512`."""
    return " with ".join(f"{name}={format_value(value)}" for name, value in values.items())


def _error_of(subject: Subject, values: Mapping[str, Value], *, is_resumed: bool = False) -> str | None:
    """What a short training raises, in words; None if it raises nothing."""
    try:
        _rehearse(subject, values, is_resumed=is_resumed)
    except (DeviceMemoryError, torch.OutOfMemoryError, MemoryError):
        error = "does not fit in memory"
    except CheckpointError:
        error = "cannot be resumed: it may hold tensors and plain values alone; look at what get_extra_state returns"
    except (Exception, SystemExit) as raised:  # a stranger's code may raise anything
        is_full = "can't allocate memory" in str(raised)
        error = "does not fit in memory" if is_full else f"fails: {in_one_line(raised)[:300]}"
    else:
        return None
    free_memory(torch.device(subject.config.device))  # out here the attempt's tensors are gone
    return error


def _rehearse(subject: Subject, values: Mapping[str, Value], *, is_resumed: bool) -> None:
    active = subject.task.space.active(values)
    config = subject.task.train_config(active, device=subject.config.device, precision=subject.config.precision)
    most = len(subject.splits.train) // config.accumulate  # of a torch Dataset there are only some examples here
    config = replace(config, max_epochs=2, compile="off", batch_size=min(config.batch_size, most))
    splits = _few_examples(subject.splits, config)
    if not is_resumed:
        with closing(fit(_built(subject, active), splits, config)) as results:
            next(results)
        return
    with TemporaryDirectory(prefix="hpo-") as folder:
        checkpoint = CheckpointFolder(Path(folder))
        with closing(fit(_built(subject, active), splits, config, checkpoint=checkpoint)) as results:
            next(results)
        for _ in fit(_built(subject, active), splits, config, checkpoint=checkpoint):
            pass


def _few_examples(splits: Splits, config: TrainConfig) -> Splits:
    train = splits.train.sample(NUM_STEPS * config.batch_size * config.accumulate, "cpu")
    return replace(splits, train=train, validation=splits.validation.sample(NUM_VALIDATION, "cpu"))


def _built(subject: Subject, active: Mapping[str, Value]) -> PreprocessedModel:
    parameters = subject.task.model_parameters(active)
    model = build_model(subject.task.objective, subject.splits.spec, parameters, seed=subject.config.seed)
    model.fit_statistics(subject.splits.train)
    return model
