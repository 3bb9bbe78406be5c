"""What a coordinator and its workers say to each other: plain data as JSON over a connection, never a pickle.

A worker gets assignments, reports each epoch and is answered by a decision. Local processes and Ray tasks differ only
in how the connection came about.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hpo.config import TrainConfig
from hpo.space import from_stored
from hpo.training.trainer import EpochResult

if TYPE_CHECKING:
    from hpo.parameters import Value


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a worker gets once, when it starts."""

    task_reference: str
    """What finds the task's code."""

    objective: bytes | None = None
    """The task itself where nothing finds its code, by cloudpickle: it travels to our own workers only."""

    import_path: tuple[str, ...] = ()
    """Where what such a task imports is found."""

    sources: dict[str, str] | None = None
    """Checksums of the source files of such a task, whose script the worker does not run (hpo.sources)."""

    splits: Path | None
    """File with the training and the validation split, which the worker maps into memory; None for a task with a
    training loop of its own."""

    num_threads: int
    """Threads that torch may use on the CPU."""

    silence_s: float
    """Seconds without a message after which the worker counts as dead; it says every third of them that it lives."""

    visible_gpu: str | None = None
    """Value of CUDA_VISIBLE_DEVICES; None leaves it as it is. Several ranks have one each, separated by commas."""

    rank: int = 0
    """Which of the processes that train a trial together it is; see hpo.training.distributed."""

    num_ranks: int = 1

    gpu_share: float = 1.0
    """Share of the GPU's memory that the worker may use; the others on it have the rest."""

    log: Path | None = None
    """File that takes what the task prints; None leaves it where it goes."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that a worker gets for a trial."""

    number: int
    model_parameters: dict[str, Value]
    config: TrainConfig
    folder: Path
    """Where the trial's checkpoints are, and in the end its best weights."""
    costs: tuple[str, ...] = ()
    """What is to be measured when the training has ended, some of hpo.config.COSTS."""
    limits: dict[str, float] = field(default_factory=dict)
    """The most that the untrained model may cost, by some of the same names."""
    folds: int | None = None
    """Folds of a cross-validation over all examples; None for one training, judged by the validation split."""
    num_examples: int | None = None
    """Training examples to use, the first ones; None for all: a rehearsal takes a few."""
    sources: dict[str, str] | None = None
    """Those of the worker's `Setup`."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        read = {
            "model_parameters": from_stored(plain["model_parameters"]),
            "config": TrainConfig(**plain["config"]),
            "folder": Path(plain["folder"]),
            "costs": tuple(plain["costs"]),
        }
        return cls(**plain | read)


class Decision(Enum):
    """What the coordinator answers to an epoch's result."""

    CONTINUE = "continue"
    STOP = "stop"
    LEAVE = "leave"
    """Stop, and keep the checkpoint: the trial will be continued."""


@dataclass(frozen=True)
class EpochDone:
    """The worker has finished an epoch and waits for a decision."""

    result: EpochResult

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Self:
        return cls(EpochResult(**plain["result"]))


@dataclass(frozen=True)
class TrialDone:
    """The trial has ended as decided, or by itself; what it leaves behind is in its folder."""

    costs: dict[str, float] = field(default_factory=dict)
    """What the assignment asked for."""

    has_weights: bool = True
    """Whether that is its best weights, too: a training loop of the task's own may have saved none."""


@dataclass(frozen=True)
class TrialInfeasible:
    """The model costs more than its limits: it was not trained."""

    reason: str


@dataclass(frozen=True)
class TrialRaised:
    """The model, the data or the disk raised: another attempt would raise again. The worker ends itself."""

    reason: str
    traceback: str


@dataclass(frozen=True)
class WorkerUnfit:
    """The worker cannot run any trial of this study, for it finds no task or no data."""

    reason: str


@dataclass(frozen=True)
class Alive:
    """Nothing happened, and the worker is well."""


@dataclass(frozen=True)
class LogLine:
    """Something that the user should read."""

    level: int
    text: str


Message = EpochDone | TrialDone | TrialInfeasible | TrialRaised | WorkerUnfit | Alive | LogLine
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in Message.__args__}


def encode(message: Message) -> bytes:
    """A worker's message as it travels."""
    return json.dumps({"kind": type(message).__name__, **asdict(message)}).encode()


def decode(frame: bytes) -> Message:
    """The message in a frame; raises ValueError, KeyError or TypeError if it is none."""
    plain = json.loads(frame)
    kind = _KINDS[plain.pop("kind")]
    message: Message = kind.from_dict(plain) if hasattr(kind, "from_dict") else kind(**plain)
    return message
