"""A worker: runs one trial from plain data, reports each epoch and does as it is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

from hpo.config import TrainConfig, derive_seed
from hpo.data.datasets import Splits
from hpo.models.preprocessed import build_model
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


class Decision(Enum):
    """What the coordinator answers to an epoch's result."""

    GO_ON = "go on"
    STOP = "stop"
    LEAVE = "leave"
    """Stop, and keep the checkpoint: the trial will be continued."""


def run_trial(
    assignment: Assignment, task: Task, splits: Splits, report: Callable[[EpochResult], Decision]
) -> EpochResult | None:
    """Train until the trainer ends or `report` says so; the last epoch's result, or None if there was none.

    A trial that was begun before goes on from its checkpoint. Unless it is left to be continued, its folder then holds
    the weights of the best epoch (`best.pt`) and all that is needed to rebuild the model (`trial.json`).
    """
    config = assignment.config
    model = build_model(
        task.objective, splits.spec, assignment.model_parameters, seed=derive_seed(config.seed, "initialisation")
    )
    model.fit_statistics(splits.train)
    model.to(config.device)
    result = None
    for result in fit(model, splits, config, checkpoint=CheckpointFolder(assignment.folder)):
        decision = report(result)
        if decision is Decision.LEAVE:
            return result
        if decision is Decision.STOP:
            break
    if result is not None and result.best_epoch is not None:
        digest = save_weights(model.state_dict(), assignment.folder / BEST_WEIGHTS)
        _describe(assignment, task, splits, result, digest)
    return result


def _describe(assignment: Assignment, task: Task, splits: Splits, result: EpochResult, digest: str) -> None:
    description = {
        "task": task.reference,
        "trial": assignment.number,
        "spec": asdict(splits.spec),
        "model_parameters": assignment.model_parameters,
        "config": asdict(assignment.config),
        "best_epoch": result.best_epoch,
        "best_value": result.best_value,
        "weights_sha256": digest,
    }
    (assignment.folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
