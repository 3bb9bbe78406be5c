"""What a trained model looks like on disk: its best weights, and all that is needed to build it again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Self

from hpo.config import TrainConfig
from hpo.data.examples import DataSpec
from hpo.errors import CheckpointError
from hpo.files import write_atomically
from hpo.parameters import Value
from hpo.space import from_stored

CHECKPOINT = "checkpoint"
"""Folder of a run's artifacts that holds the two files below."""

REFIT = "refit"
"""The same for a winner that was trained on training and validation examples together."""

BEST_WEIGHTS = "best.pt"
DESCRIPTION = "trial.json"

_FORMER_SETTINGS = ("direction",)  # of TrainConfig in version 0.1; a trained model does not need them


@dataclass(frozen=True, kw_only=True)
class TrialDescription:
    """What stands beside a trial's best weights: all that is needed to rebuild the model and to check the file."""

    trial: int
    spec: DataSpec | None
    """None for a task with a training loop of its own, whose model cannot be built again from here."""
    model_parameters: dict[str, Value]
    config: TrainConfig
    best_epoch: int
    best_value: float
    weights_sha256: str | None
    """Of the best weights; None where such a loop saved none."""
    sources: dict[str, str] = field(default_factory=dict)
    """Checksums of the task's source files (hpo.sources); none where an earlier version trained."""

    def write(self, folder: Path) -> None:
        plain = asdict(self) | {"spec": self.spec and self.spec.to_dict()}
        write_atomically(folder / DESCRIPTION, json.dumps(plain, indent=2).encode())

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Raises CheckpointError if the file is missing or damaged."""
        try:
            plain = json.loads((folder / DESCRIPTION).read_bytes())
            config = {name: value for name, value in plain["config"].items() if name not in _FORMER_SETTINGS}
            _require_known(folder / DESCRIPTION, {*plain} - {each.name for each in fields(cls)})
            _require_known(folder / DESCRIPTION, {*config} - {each.name for each in fields(TrainConfig)})
            spec = plain["spec"] and DataSpec.from_dict(plain["spec"])
            parameters = from_stored(plain["model_parameters"])
            return cls(**plain | {"spec": spec, "config": TrainConfig(**config), "model_parameters": parameters})
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{folder / DESCRIPTION} is missing or damaged: {error}") from error


def files_of_model(*, has_weights: bool) -> tuple[str, ...]:
    """Names of the files that a trial leaves; a training loop of the task's own may have saved no weights."""
    return (BEST_WEIGHTS, DESCRIPTION) if has_weights else (DESCRIPTION,)


def _require_known(file: Path, unknown: set[str]) -> None:
    """Raise CheckpointError for what only a later version writes: it may change what the weights mean."""
    if unknown:
        raise CheckpointError(
            f"{file} was written by a newer version of hpo, with '{min(unknown)}'; upgrade hpo to load it."
        )
