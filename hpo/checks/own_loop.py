"""Checks of a training loop of a task's own: it reports, stops, resumes and repeats itself.

They run an epoch of the default configuration, then another one as after an interruption, then the first one again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.checks.verdicts import Verdict
from hpo.config import derive_seed
from hpo.errors import in_one_line
from hpo.files import temporary_folder
from hpo.training.loop import RunningTrial, run_loop

if TYPE_CHECKING:
    from hpo.task import Task
    from hpo.training.trainer import EpochResult


def check_loop(task: Task, device: str) -> Iterator[Verdict]:
    """The verdict of each check as soon as it is made; the first that is wrong is the last."""
    with temporary_folder() as folder:
        attempts = _Attempts(task, device, Path(folder))
        try:
            first, model = attempts.run("first", num_epochs=1)
            yield _describe_report(first, task)
            yield _describe_model(model)
            if task.train_config({}).max_epochs > 1:
                second, _ = attempts.run("first", num_epochs=2)
                yield _describe_resume(second)
            again, _ = attempts.run("again", num_epochs=1)
            yield _describe_repetition(first.results[-1], again.results[-1], task)
        except (Exception, SystemExit) as error:  # the loop is user code and may raise anything
            yield Verdict(check="loop", state="wrong", text=in_one_line(error), advice="fix train(trial) first")


class _Attempt:
    """What one attempt has reported."""

    def __init__(self, num_epochs: int) -> None:
        self.results: list[EpochResult] = []
        self._num_epochs = num_epochs

    def report(self, result: EpochResult) -> bool:
        self.results.append(result)
        return result.epoch < self._num_epochs and not result.diverged


class _Attempts:
    def __init__(self, task: Task, device: str, folder: Path) -> None:
        self._task, self._device, self._folder = task, device, folder

    def run(self, name: str, *, num_epochs: int) -> tuple[_Attempt, bool]:
        """Train up to an epoch, from where the last attempt of that name ended; and whether there is a model."""
        values = self._task.space.active(self._task.space.defaults())
        config = self._task.train_config(values, seed=derive_seed(0, 0), device=self._device)
        attempt = _Attempt(num_epochs)
        trial = RunningTrial(
            self._task.objective,
            0,
            self._task.model_parameters(values),
            config,
            self._folder / name,
            attempt.report,
        )
        with redirect_stdout(sys.stderr):  # what it prints must not mix with --json
            run_loop(trial)
        return attempt, trial.conclude()


def _describe_report(attempt: _Attempt, task: Task) -> Verdict:
    result, metric = attempt.results[-1], task.objective.metric
    others = "".join(f", {name}" for name in result.metrics if name not in (f"val/{metric}", metric, "time/epoch_s"))
    data = {"epoch_s": result.metrics["time/epoch_s"]}
    text = f"{metric} {result.value:.4g} ({task.objective.better}){others}; {data['epoch_s']:.2g} s to the first report"
    if result.diverged:
        return Verdict(
            check="report", state="wrong", text=text, advice=f"its {metric} must be finite with the defaults", data=data
        )
    return Verdict(check="report", state="ok", text=text, data=data)


def _describe_model(has_model: bool) -> Verdict:
    if has_model:
        return Verdict(check="model", state="ok", text="saved, and loads as tensors and plain values")
    return Verdict(
        check="model",
        state="warning",
        text="none was saved",
        advice="call trial.save_model(model) before trial.report(...), or hpo.load_best has nothing to return",
    )


def _describe_resume(attempt: _Attempt) -> Verdict:
    # The first result is the last one of the attempt before; a second of that epoch is of an epoch trained again.
    if [result.epoch for result in attempt.results] == [1, 2]:
        return Verdict(check="resume", state="ok", text="an interrupted trial continues at epoch 2")
    return Verdict(
        check="resume",
        state="warning",
        text="an interrupted trial trains epoch 1 again",
        advice="call trial.save(state) before each trial.report(...), and begin with trial.resume()",
    )


def _describe_repetition(first: EpochResult, again: EpochResult, task: Task) -> Verdict:
    metric = task.objective.metric
    if first.value == again.value or (first.diverged and again.diverged):
        return Verdict(check="seed", state="ok", text=f"the same seed gives the same {metric}")
    return Verdict(
        check="seed",
        state="warning",
        text=f"the same seed gives {metric} {first.value:.6g}, then {again.value:.6g}",
        advice="seed what is random with trial.seed, or use deterministic algorithms",
    )
