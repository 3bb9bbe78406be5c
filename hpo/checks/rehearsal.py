"""A rehearsal: the default configuration and the extremes of the space train for two short epochs in a worker.

Each epoch is one step and an evaluation. Between the two a checkpoint is written, and the trial continues from it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from hpo.checks.verdicts import Subject, Verdict
from hpo.data.datasets import save_splits
from hpo.execution.executors import Resources, start_workers
from hpo.execution.messages import Assignment, Decision, EpochDone, Setup, TrialDone, TrialRaised
from hpo.execution.pool import WorkerDied
from hpo.execution.task_code import task_code
from hpo.files import temporary_folder
from hpo.parameters import Choice, Parameter
from hpo.values import format_value, is_number, is_same

if TYPE_CHECKING:
    from hpo.config import TrainConfig
    from hpo.execution.pool import WorkerPool
    from hpo.parameters import Value
    from hpo.task import Task

REHEARSAL = "rehearsal"
"""The name of this check."""

LIMIT_S = 30.0
"""Seconds for all of it. What still runs then is killed."""

EXTREME_S = 10.0
"""Seconds for one extreme, so that others have their turn: the largest network may take minutes on a CPU."""

NUM_VALIDATION = 64
MAX_SHOWN = 3

Configuration = dict[str, "Value"]


def check_rehearsal(
    subject: Subject, settings: Mapping[str, Any] | None = None, resources: Resources | None = None
) -> Verdict:
    """Whether each configuration trains, is evaluated, saved and resumed: wrong if the default one does not, a warning
    if an extreme does not.

    `settings` are those of TrainConfig that the session has for its trials. Raises SearchError if no worker starts.
    """
    resources = resources or Resources(num_workers=1, device=subject.config.device, address=None, gpus_per_trial=None)
    extremes = _extremes(subject.task)
    with _opened_stage(subject, dict(settings or {}), resources, extremes.values()) as stage:
        try:
            error = stage.error_of(stage.defaults, LIMIT_S)
        except TimeoutError:
            text = f"the default configuration does not finish two steps and two evaluations in {LIMIT_S:g} s"
            return Verdict(state="warning", text=text, advice="each trial will be slow, if it does not hang")
        if error:
            text = f"the default configuration {error}{stage.remedy()}"
            advice = "no trial of the default configuration can succeed; fix this first"
            return Verdict(state="wrong", text=text, advice=advice)
        return _of_extremes(stage, extremes)


def _of_extremes(stage: _Stage, extremes: Mapping[str, Configuration]) -> Verdict:
    failures, unfinished = dict[str, str](), list[str]()
    for name, values in extremes.items():
        try:
            if error := stage.error_of(values, EXTREME_S):
                blamed, error = stage.smallest_failure(values, error)
                failures[_described(blamed)] = error
        except TimeoutError:
            unfinished.append(name)
    num_tried = len(extremes) - len(unfinished)
    data = {"rehearsed": 1 + num_tried, "failed": len(failures)}
    late = f"not finished in time ({EXTREME_S:g} s each, {LIMIT_S:g} s in all): {_listed(unfinished)}"
    if failures:
        text = _listed([f"{names} {error}" for names, error in failures.items()], "; ")
        advice = "trials with these values fail: leave them out with -p, or change the model"
        return Verdict(state="warning", text=f"{text}; {late}" if unfinished else text, advice=advice, data=data)
    text = f"the default configuration and {num_tried} extremes of the space train, are evaluated and resume"
    if unfinished:
        advice = "such trials are slow here, if they do not hang"
        return Verdict(state="warning", text=f"{text}; {late}", advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _listed(parts: Sequence[str], separator: str = ", ") -> str:
    more = f" and {len(parts) - MAX_SHOWN} more" if len(parts) > MAX_SHOWN else ""
    return separator.join(parts[:MAX_SHOWN]) + more


def _extremes(task: Task) -> dict[str, Configuration]:
    """Configurations by name that together have both ends of each range and each choice that is not a number.

    The likeliest to break come first: the highest numbers. The learning rate stays: a loss that is not finite is not a
    failure.
    """
    space, defaults, parameters = task.space, task.space.defaults(), _varied(task)
    ends = {name: _ends(each) for name, each in parameters.items() if _is_number(each)}
    others = {
        name: [value for value in each.extremes() if not is_same(value, defaults[name])]
        for name, each in parameters.items()
        if name not in ends
    }
    longest = max(map(len, others.values()), default=0)
    rows = [{name: values[row] for name, values in others.items() if row < len(values)} for row in range(longest)]
    named = {
        "the highest numbers": defaults | {name: high for name, (_, high) in ends.items()},
        **{_described(row): defaults | row for row in rows},
        "the lowest numbers": defaults | {name: low for name, (low, _) in ends.items()},
    }
    default = space.active(defaults)
    return {name: each for name, each in named.items() if space.allows(each) and space.active(each) != default}


def _varied(task: Task) -> dict[str, Parameter]:
    return {name: parameter for name, parameter in task.space.parameters.items() if name != "lr"}


def _is_number(parameter: Parameter) -> bool:
    """Whether each of its values is a number, which has a highest and a lowest."""
    return not isinstance(parameter, Choice) or all(map(is_number, parameter.extremes()))


def _ends(parameter: Parameter) -> tuple[Any, Any]:
    values: tuple[Any, ...] = parameter.extremes()
    return min(values), max(values)


def _described(values: Mapping[str, Value]) -> str:
    """As in `width=4096 with batch_size=512`."""
    return " with ".join(f"{name}={format_value(value)}" for name, value in values.items())


@contextmanager
def _opened_stage(
    subject: Subject, settings: dict[str, Any], resources: Resources, extremes: Iterable[Configuration]
) -> Iterator[_Stage]:
    """A worker that has a few examples; it ends with the block, whatever it does then."""
    configurations = [subject.task.space.defaults(), *extremes]
    deadline = time.monotonic() + LIMIT_S
    with temporary_folder() as name:
        folder = Path(name)
        configs = [_config(subject, settings, values, "cpu") for values in configurations]
        most = max(config.batch_size * config.accumulate for config in configs)
        splits = replace(
            subject.splits,
            train=subject.splits.train.sample(most, "cpu"),
            validation=subject.splits.validation.sample(NUM_VALIDATION, "cpu"),
        )
        save_splits(splits, folder / "splits.pt")
        setup = Setup(
            **task_code(subject.task),
            splits=folder / "splits.pt",
            num_threads=1,
            silence_s=LIMIT_S,
            log=folder,  # what the task prints is not the search's
        )
        with start_workers("local", setup, resources) as workers:
            yield _Stage(subject, settings, workers, folder, deadline)


def _config(subject: Subject, settings: Mapping[str, Any], values: Configuration, device: str) -> TrainConfig:
    """As the trial's, but nothing is compiled, and on a CPU no time is spent on measuring which precision is faster."""
    config = subject.task.train_config(subject.task.space.active(values), **settings, device=device)
    if config.precision == "auto" and device == "cpu":
        config = replace(config, precision="fp32")
    most = max(1, len(subject.splits.train) // config.accumulate)
    return replace(config, max_epochs=2, compile="off", batch_size=min(config.batch_size, most))


class _Stage:
    """Where configurations are rehearsed, one after the other, until the time is up."""

    def __init__(
        self, subject: Subject, settings: Mapping[str, Any], workers: WorkerPool, folder: Path, deadline: float
    ) -> None:
        self._subject, self._settings = subject, settings
        self._workers, self._folder, self._deadline = workers, folder, deadline
        self.defaults = subject.task.space.defaults()

    def error_of(self, values: Configuration, limit_s: float = EXTREME_S) -> str | None:
        """What goes wrong in a short training, in words; None if nothing does. Raises TimeoutError if it takes longer,
        or there is no time left."""
        deadline = min(self._deadline, time.monotonic() + limit_s)
        config = _config(self._subject, self._settings, values, self._workers.device)
        with TemporaryDirectory(dir=self._folder) as folder:
            assignment = Assignment(
                number=0,
                model_parameters=self._subject.task.model_parameters(self._subject.task.space.active(values)),
                config=config,
                folder=Path(folder),
                num_examples=config.batch_size * config.accumulate,
            )
            # The second time it continues from the checkpoint of the first.
            return self._train(assignment, Decision.LEAVE, deadline) or self._train(
                assignment, Decision.CONTINUE, deadline
            )

    def _train(self, assignment: Assignment, decision: Decision, deadline: float) -> str | None:
        if time.monotonic() < deadline:
            self._workers.run(assignment)
        while (left_s := deadline - time.monotonic()) > 0:
            for _, event in self._workers.events(left_s):
                match event:
                    case EpochDone():
                        self._workers.answer(assignment.number, decision)
                    case TrialDone():
                        return None
                    case TrialRaised(reason):
                        return _in_words(reason)
                    case WorkerDied(reason):
                        return _in_words_of_death(reason)
        self._workers.abandon(assignment.number)
        raise TimeoutError

    def smallest_failure(self, values: Configuration, error: str) -> tuple[Configuration, str]:
        """What of a configuration that fails is needed for it to fail, as far as the time allows, and how it fails."""
        active = self._subject.task.space.active(values)
        blamed = {name: value for name, value in active.items() if not is_same(value, self.defaults[name])}
        for name in list(blamed):
            without = {other: value for other, value in blamed.items() if other != name}
            if not without:
                break
            try:
                found = self.error_of(self.defaults | without)
            except TimeoutError:
                continue
            if found:
                blamed, error = without, found
        return blamed, error

    def remedy(self) -> str:
        """The first single value that makes the default configuration work, in words; "" if the time allows none."""
        for name, parameter in _varied(self._subject.task).items():
            for value in _alternatives(parameter, self.defaults[name]):
                values = self.defaults | {name: value}
                if self._subject.task.space.allows(values) and self._works(values):
                    return f" with {_described({name: self.defaults[name]})}; {_described({name: value})} works"
        return ""

    def _works(self, values: Configuration) -> bool:
        try:
            return self.error_of(values) is None
        except TimeoutError:
            return False


def _alternatives(parameter: Parameter, default: Value) -> list[Value]:
    values = [_ends(parameter)[0]] if _is_number(parameter) else list(parameter.extremes())
    return [value for value in values if not is_same(value, default)]


def _in_words(reason: str) -> str:
    """What a training has raised, `TYPE: MESSAGE`, as the end of a sentence."""
    kind, _, message = reason.partition(": ")
    if kind in ("DeviceMemoryError", "OutOfMemoryError", "MemoryError") or "can't allocate memory" in reason:
        return "does not fit in memory"
    if kind == "CheckpointError":
        return "cannot be resumed: it may hold tensors and plain values alone; look at what get_extra_state returns"
    told = " ".join((message if kind == "UsageError" else reason).split())
    return f"fails: {told[:300]}"


def _in_words_of_death(reason: str) -> str:
    """The same for a worker that is gone; its log goes with it."""
    told = reason.partition("; see ")[0]
    return "does not fit in memory" if told.endswith("(out of memory)") else f"fails: {told}"
