"""A worker: runs one trial from plain data, reports each epoch and does as it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Self

from hpo.config import TrainConfig, derive_seed
from hpo.data.datasets import Splits
from hpo.errors import CheckpointError
from hpo.files import write_atomically
from hpo.models.preprocessed import build_model
from hpo.objective import DataSpec
from hpo.plugins import Task
from hpo.space import Value
from hpo.training.checkpoint import CheckpointFolder, save_weights
from hpo.training.trainer import EpochResult, fit

CHECKPOINT = "checkpoint"  # folder of a run's artifacts that holds the next two
BEST_WEIGHTS = "best.pt"
DESCRIPTION = "trial.json"


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that a worker is told of a trial; plain data, so that it can travel."""

    number: int
    model_parameters: dict[str, Value]
    config: TrainConfig
    folder: Path
    """Where the trial's checkpoints are, and in the end its best weights."""


@dataclass(frozen=True, kw_only=True)
class TrialDescription:
    """What stands beside a trial's best weights: all that is needed to rebuild the model and to check the file."""

    trial: int
    spec: DataSpec
    model_parameters: dict[str, Value]
    config: TrainConfig
    best_epoch: int
    best_value: float
    weights_sha256: str

    def write(self, folder: Path) -> None:
        write_atomically(folder / DESCRIPTION, json.dumps(asdict(self), indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises CheckpointError where the file is missing or damaged."""
        try:
            plain = json.loads((folder / DESCRIPTION).read_bytes())
            spec = {name: tuple(values) for name, values in plain["spec"].items()}
            return cls(**plain | {"spec": DataSpec(**spec), "config": TrainConfig(**plain["config"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / DESCRIPTION} is missing or damaged: {error}") from error


class Decision(Enum):
    """What the coordinator answers to an epoch's result."""

    GO_ON = "go on"
    STOP = "stop"
    LEAVE = "leave"
    """Stop, and keep the checkpoint: the trial will be continued."""


def run_trial(assignment: Assignment, task: Task, splits: Splits, report: Callable[[EpochResult], Decision]) -> None:
    """Train until the trainer ends or `report` says so.

    A trial that was begun before goes on from its checkpoint. Unless it is left to be continued, its folder then holds
    the weights of the best epoch (`best.pt`) and all that is needed to rebuild the model (`trial.json`).
    """
    config = assignment.config
    model = build_model(
        task.objective, splits.spec, assignment.model_parameters, seed=derive_seed(config.seed, "initialisation")
    )
    model.fit_statistics(splits.train)
    model.to(config.device)
    # Closed before the weights are saved: it is then that the model gets those of the best epoch.
    with closing(fit(model, splits, config, checkpoint=CheckpointFolder(assignment.folder))) as results:
        for result in results:
            decision = report(result)
            if decision is Decision.LEAVE:
                return
            if decision is Decision.STOP:
                break
    if result.best_epoch is None or result.best_value is None:
        return
    TrialDescription(
        trial=assignment.number,
        spec=splits.spec,
        model_parameters=assignment.model_parameters,
        config=config,
        best_epoch=result.best_epoch,
        best_value=result.best_value,
        weights_sha256=save_weights(model.state_dict(), assignment.folder / BEST_WEIGHTS),
    ).write(assignment.folder)
