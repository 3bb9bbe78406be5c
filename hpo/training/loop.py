"""A task's own training loop in a worker: its reports become the results that the shared trainer yields, too.

A trial's folder then holds

    epoch-0007.<sha256>.pt    what `save` was given, numbered by the calls
    progress.json             the last result that was reported, and the SHA-256 of the best epoch's model
    best-0005.pt              that model
    files/                    the loop's own

`progress.json` is written after the model and before the result is sent, so whatever is killed between them, the model
on disk is that of the best epoch which the coordinator knows of, or learns of first in the next attempt.
"""

from __future__ import annotations

import json
import math
import operator
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import nn

from hpo.data.loaded import allow_children
from hpo.errors import CheckpointError, UsageError, in_one_line
from hpo.files import write_atomically
from hpo.objective import METRIC_CHARACTERS, METRIC_NAME
from hpo.sources import source_checksums
from hpo.training.checkpoint import CheckpointFolder, load_weights, save_weights
from hpo.training.trained import BEST_WEIGHTS, TrialDescription
from hpo.training.trainer import EpochResult
from hpo.trial import Trial, loop_seed

if TYPE_CHECKING:
    from pathlib import Path

    from hpo.config import TrainConfig
    from hpo.objective import Objective
    from hpo.parameters import Value


def run_loop(trial: RunningTrial) -> None:
    """Run a task's own loop until it returns, from where an earlier attempt has left it.

    A trial that was begun before first reports its last result once more: whoever was killed may not have got it.
    """
    assert trial.objective.train is not None, "the task has a loop of its own"
    seed_everything(trial.seed)
    allow_children()
    if trial.repeat_last_result():
        trial.objective.train(trial)
    if not trial.is_stopped:
        trial.require_complete()


def seed_everything(seed: int) -> None:
    """Seed the global random numbers of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # the legacy generator is what the libraries of others use
    torch.manual_seed(seed)


@dataclass(frozen=True)
class _Progress:
    """What an attempt leaves to the next one beside the loop's own state."""

    result: EpochResult
    """The last one that was reported."""

    weights_sha256: str | None = None
    """Of the best epoch's model; None if it was not saved."""

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        try:
            plain = json.loads((folder / _PROGRESS).read_bytes())
            return cls(EpochResult(**plain["result"]), plain["weights_sha256"])
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / _PROGRESS} was not written by hpo: {error}") from error

    def write(self, folder: Path) -> None:
        write_atomically(folder / _PROGRESS, json.dumps(asdict(self)).encode())


_PROGRESS = "progress.json"


class RunningTrial(Trial):
    """A trial whose loop runs in this process."""

    def __init__(
        self,
        objective: Objective,
        number: int,
        parameters: Mapping[str, Value],
        config: TrainConfig,
        folder: Path,
        report: Callable[[EpochResult], bool],
        *,
        sources: dict[str, str] | None = None,
    ) -> None:
        """`folder` may hold files of an earlier attempt; `report` takes each result and returns whether to continue.

        `sources` are the checksums of the task's source files, if this process cannot tell them.
        """
        files = folder / "files"
        files.mkdir(parents=True, exist_ok=True)
        super().__init__(
            number=number,
            parameters=dict(parameters),
            seed=loop_seed(config.seed),
            device=config.device,
            max_epochs=config.max_epochs,
            folder=files,
        )
        self.objective = objective
        self._sources = sources
        self.is_stopped = False
        """Whether `report` has said so."""
        self._config = config
        self._folder = folder
        self._report = report
        self._checkpoints = CheckpointFolder(folder)
        self._progress = _Progress.read(folder)
        self._num_known = self._progress.result.epoch if self._progress else 0  # epochs of earlier attempts
        self._epoch: int | None = None  # the last one that this attempt has reported
        self._epoch_began = time.perf_counter()
        self._candidate: nn.Module | Mapping[str, Any] | None = None  # the model of the epoch that is reported next
        self._num_saves: int | None = None
        self._has_resumed = False
        self._is_readable = False  # what is saved; checked once

    def repeat_last_result(self) -> bool:
        """Report the last result of an earlier attempt once more, if there was one; whether epochs are missing."""
        if self._progress:
            self.is_stopped = not self._report(self._progress.result)
        return not self.is_stopped and self._num_known < self.max_epochs

    def resume(self) -> dict[str, Any] | None:
        saved = self._checkpoints.load()
        if saved is None:
            return None
        self._num_saves, state = saved
        self._has_resumed = True
        resumed: dict[str, Any] = state["state"]
        return resumed

    def save(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping):
            raise UsageError(f"trial.save takes a dictionary of tensors and plain values, not a {_type(state)}.")
        if self._num_saves is None:  # a loop that does not resume begins again, and its states are the newer ones
            left = self._checkpoints.load()
            self._num_saves = left[0] if left else 0
        self._num_saves += 1
        self._checkpoints.save({"state": dict(state)}, self._num_saves)
        if not self._is_readable:
            self._require_readable()

    def _require_readable(self) -> None:
        """Torch writes more than it reads: an object of any class, which could run code when it is loaded."""
        try:
            self._checkpoints.load()
        except CheckpointError as error:
            raise UsageError(f"trial.save takes {_PLAIN}: {_first_sentence(error)}") from error
        self._is_readable = True

    def save_model(self, model: nn.Module | Mapping[str, Any]) -> None:
        if not isinstance(model, nn.Module | Mapping):
            raise UsageError(f"trial.save_model takes a module or a dictionary of tensors, not a {_type(model)}.")
        self._candidate = model

    def report(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        if self.is_stopped:
            raise UsageError(
                f"train continued to epoch {epoch} after trial.report returned False; return from train when it does."
            )
        self._epoch = self._checked_epoch(epoch)
        numbers = self._checked_metrics(metrics)
        if self._progress and self._epoch <= self._num_known:  # an earlier attempt has judged it, and kept its model
            self._candidate = None
        else:
            result = self._judge(self._epoch, numbers)
            self._progress = _Progress(result, self._write_model(result))
            self._progress.write(self._folder)
            self._remove_other_models(result)
        self.is_stopped = not self._report(self._progress.result)
        self._epoch_began = time.perf_counter()
        return not self.is_stopped

    def _checked_epoch(self, epoch: int) -> int:
        try:
            number = operator.index(epoch)
        except TypeError:
            raise UsageError(f"trial.report takes the number of an epoch first, not {epoch!r}.") from None
        if not 1 <= number <= self.max_epochs:
            raise UsageError(
                f"epoch {number} cannot be reported: epochs go from 1 to trial.max_epochs, here {self.max_epochs}."
            )
        first = range(1, self._num_known + 3) if self._has_resumed else range(1, 2)
        # Of the first one after a resume: its state may have been saved, and it was killed before it was reported.
        if number not in (first if self._epoch is None else [self._epoch + 1]):
            after = f"after epoch {self._epoch}" if self._epoch else "as the first one"
            raise UsageError(
                f"epoch {number} was reported {after}: report each epoch once and in order, from 1, or from where the "
                "state of trial.resume() ended."
            )
        return number

    def _checked_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics as they are logged: numbers, and the objective's as `val/NAME`."""
        if not isinstance(metrics, Mapping):
            raise UsageError(f"trial.report takes a dictionary of metrics after the epoch, not a {_type(metrics)}.")
        numbers = {name: _number(name, value) for name, value in metrics.items()}
        metric = self.objective.metric
        wanted = _logged_name(metric)
        if wanted not in numbers and metric in numbers:
            numbers[wanted] = numbers.pop(metric)
        if wanted not in numbers:
            raise UsageError(
                f"epoch {self._epoch} was reported without '{metric}', the metric of task '{self.objective.name}', "
                f"but with {', '.join(map(repr, metrics)) or 'nothing'}."
            )
        return {"time/epoch_s": time.perf_counter() - self._epoch_began, **numbers}

    def _judge(self, epoch: int, metrics: dict[str, float]) -> EpochResult:
        value = metrics[_logged_name(self.objective.metric)]
        diverged = not math.isfinite(value)
        last = self._progress.result if self._progress else None
        best_value, best_epoch = (last.best_value, last.best_epoch) if last else (None, None)
        is_best = not diverged and (best_value is None or self.objective.better.gain(value, over=best_value) > 0)
        return EpochResult(
            epoch=epoch,
            metrics=metrics,
            value=math.nan if diverged else value,
            best_value=value if is_best else best_value,
            best_epoch=epoch if is_best else best_epoch,
            is_best=is_best,
            diverged=diverged,
            settled={},
            symptoms={},
        )

    def _write_model(self, result: EpochResult) -> str | None:
        """Write the model where the epoch is the best so far; the SHA-256 of the best epoch's, if it was saved."""
        before = self._progress.weights_sha256 if self._progress else None
        candidate, self._candidate = self._candidate, None
        if not result.is_best:
            return before
        if candidate is None:
            if before is not None:
                raise UsageError(_NOT_SAVED.format(epoch=result.epoch))
            return None
        state = candidate.state_dict() if isinstance(candidate, nn.Module) else candidate
        sha256 = save_weights(state, self._model_file(result.epoch))
        if before is None:
            self._require_loadable(result.epoch, sha256)
        return sha256

    def _require_loadable(self, epoch: int, sha256: str) -> None:
        try:
            load_weights(self._model_file(epoch), sha256)
        except CheckpointError as error:
            raise UsageError(f"trial.save_model takes {_PLAIN}: {_first_sentence(error)}") from error

    def _model_file(self, epoch: int) -> Path:
        return self._folder / f"best-{epoch:04d}.pt"

    def _remove_other_models(self, result: EpochResult) -> None:
        for path in self._folder.glob("best-*.pt"):
            if result.best_epoch is None or path != self._model_file(result.best_epoch):
                path.unlink()

    def require_complete(self) -> None:
        """Raise UsageError if the loop has returned without having done its part."""
        if self._progress is None:
            raise UsageError(
                f"train of task '{self.objective.name}' returned without a result: call trial.report(epoch, "
                "{'" + self.objective.metric + "': ...}) after each epoch."
            )
        if self._candidate is not None:
            raise UsageError(_NOT_SAVED.format(epoch=self._progress.result.epoch))

    def conclude(self) -> bool:
        """Write what a trial with a finite value leaves behind; whether that is a model, too."""
        assert self._progress is not None, "the trial has a result"
        result, sha256 = self._progress.result, self._progress.weights_sha256
        if result.best_epoch is None or result.best_value is None:
            return False
        folder = self._folder
        if sha256 is not None:
            write_atomically(folder / BEST_WEIGHTS, self._model_file(result.best_epoch).read_bytes())
        TrialDescription(
            trial=self.number,
            spec=None,
            model_parameters=self.parameters,
            config=self._config,
            best_epoch=result.best_epoch,
            best_value=result.best_value,
            weights_sha256=sha256,
            sources=self._sources or source_checksums(self.objective),
        ).write(folder)
        return sha256 is not None


_PLAIN = "tensors and plain values (numbers, texts, lists, dictionaries)"
_NOT_SAVED = (
    "epoch {epoch} was reported before its model was saved: call trial.save_model(model) before trial.report(...) in "
    "every epoch; only the best one is written."
)


def _logged_name(metric: str) -> str:
    return metric if metric.startswith("val/") else f"val/{metric}"


def _number(name: str, value: Any) -> float:
    if not isinstance(name, str) or not METRIC_NAME.fullmatch(name):
        raise UsageError(f"a metric cannot be named {name!r}: use {METRIC_CHARACTERS}.")
    try:
        return float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError):
        raise UsageError(f"metric '{name}' must be a number, not a {_type(value)}: {value!r:.60}.") from None


def _first_sentence(error: CheckpointError) -> str:
    """What torch did not like, without its advice to load any class."""
    text = in_one_line(error.__cause__ or error)
    _, _, found = text.partition("WeightsUnpickler error: ")
    return (found or text).partition(". ")[0]


def _type(value: Any) -> str:
    return type(value).__name__
