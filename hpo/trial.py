"""Trial and TrainedTrial: what a task's own training loop is given, and what its test is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from hpo.parameters import Value


@dataclass(kw_only=True)
class Trial(ABC):
    """One trial, as a training loop of your own sees it: `train(trial)` of an `Objective`.

    ```python
    def train(trial: hpo.Trial) -> None:
        model, optimizer, start = build(**trial.parameters), ..., 1
        if state := trial.resume():
            model.load_state_dict(state["model"])
            start = state["epoch"] + 1
        for epoch in range(start, trial.max_epochs + 1):
            ...
            trial.save_model(model)
            trial.save({"model": model.state_dict(), "epoch": epoch})
            if not trial.report(epoch, {"accuracy": accuracy}):
                return
    ```

    Python's, numpy's and torch's random numbers are seeded with `seed` before each attempt.
    """

    number: int
    """Position in the study, from 0."""

    parameters: dict[str, Value]
    """The value of each active parameter of the search space."""

    seed: int
    """Seed of everything random in the trial, in [0, 2**31)."""

    device: str
    """As torch names it: cpu or cuda. The GPU of the trial is the only visible one."""

    max_epochs: int
    """The last epoch that can be reported."""

    folder: Path
    """Scratch folder of the trial. A later attempt has the content under another path, so keep no path in the state;
    it is deleted when the trial has ended for good."""

    @abstractmethod
    def resume(self) -> dict[str, Any] | None:
        """The state that was saved last, tensors on the CPU; None if there is none: the trial begins.

        A damaged one is passed over, with a warning, for the one before.
        """

    @abstractmethod
    def save(self, state: Mapping[str, Any]) -> None:
        """Write the state that `resume` returns if this attempt is killed: tensors and plain values.

        Plain values are numbers, texts, None, and lists, tuples, sets and dictionaries of them, as in a `state_dict`.
        The last two states are kept. Raises UsageError for anything else, OSError if it cannot be written.
        """

    @abstractmethod
    def save_model(self, model: nn.Module | Mapping[str, Any]) -> None:
        """Keep a model for the epoch that is reported next: `report` writes it if that epoch is the best so far.

        It is a module, of which the state dict is kept, or a mapping of tensors and plain values. `hpo.load_best`
        returns what was kept. Call it before each `report`, or never: a trial without a model has a value all the same.
        """

    @abstractmethod
    def report(self, epoch: int, metrics: Mapping[str, float]) -> bool:
        """Report the results of an epoch; False if the trial is to stop: `train` then returns.

        Epochs count from 1, and each is reported. `metrics` has the objective's metric, as NAME or `val/NAME`, and
        any others (train/loss, val/loss, ...), all of which become curves in MLflow. A metric of the objective that
        is not finite ends the trial as diverged. An epoch that an earlier attempt has reported keeps what it has.

        Raises UsageError for an epoch that is not the next one, a metric that is missing or is not a number, and for
        a call after it has returned False.
        """


@dataclass(frozen=True, kw_only=True)
class TrainedTrial:
    """A trial of a training loop of your own that has ended, as `test(trial)` of its `Objective` sees it."""

    number: int
    """Position in the study, from 0."""

    parameters: dict[str, Value]
    """The value of each active parameter of the search space."""

    seed: int
    """`Trial.seed`."""

    device: str
    """As torch names it."""

    best_epoch: int

    best_value: float
    """The metric in the best epoch."""

    model: dict[str, Any] | None
    """What `save_model` was given in the best epoch (of a module its state dict), tensors on the CPU; None if the loop
    never called it."""

    folder: Path
    """Folder with the files `best.pt`, the model, and `trial.json`."""


def loop_seed(seed: int) -> int:
    """A trial's seed as every library takes it: numpy's legacy generator and Lightning want 32 bits."""
    return seed % 2**31
