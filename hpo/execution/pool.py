"""A pool of workers: started, given trials, heard, answered and replaced, wherever their processes run."""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, Self

from hpo.errors import SearchError
from hpo.execution.messages import (
    Alive,
    EpochDone,
    LogLine,
    TrialDone,
    TrialInfeasible,
    TrialRaised,
    WorkerUnfit,
    decode,
)

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from types import TracebackType

    from hpo.execution.messages import Assignment, Decision

MAX_FAILED_STARTS = 4
"""Workers in a row that died before they reported anything; after these no other is started."""

MAX_KILLED_STARTS = 40
"""The same of workers that something unknown has killed."""

_EXIT_S = 2.0
"""Between the end of a connection and that of its process."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerDied:
    """The worker of a trial is gone: killed, crashed, silent for too long, or cut off."""

    reason: str
    is_unexplained: bool
    """Whether something killed it, and nothing says that its trial is to blame."""


@dataclass(frozen=True)
class WorkerEnd:
    """What became of a worker that was ended."""

    text: str
    """For the user, to follow "its worker"."""
    is_unexplained: bool = False


Event = EpochDone | TrialDone | TrialInfeasible | TrialRaised | WorkerDied


class Worker(ABC):
    """A worker as its pool sees it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.trial: int | None = None
        """Number of the trial that it runs."""
        self.last_heard = time.monotonic()
        self.has_spoken = False

    def send(self, message: dict[str, Any]) -> None:
        # What cannot be sent is not lost: the next look at the connection finds the worker dead.
        try:
            self.connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            _logger.debug("worker of trial %s is gone: %s", self.trial, error)

    @abstractmethod
    def end(self, grace_s: float) -> WorkerEnd:
        """Make sure that the process is gone, killed after `grace_s`; what became of it."""


class WorkerPool(ABC):
    """Up to `num_workers` workers, each with one trial at a time. Leaving the context ends them all.

    A worker that has been silent for `silence_s` seconds counts as dead, be it stopped, stuck or cut off, and is ended.
    """

    device: str
    """Device of the trials, as their processes name it."""

    def __init__(self, num_workers: int, *, silence_s: float) -> None:
        self.num_workers = num_workers
        self._silence_s = silence_s
        self._workers: list[Worker] = []
        self._failed_starts = 0
        self._killed_starts = 0

    @abstractmethod
    def has_room(self) -> bool:
        """Whether a further trial would begin at once."""

    @abstractmethod
    def _idle_worker(self) -> Worker:
        """A worker without a trial, started if need be; there is room."""

    def run(self, assignment: Assignment) -> None:
        """Start or continue a trial; there must be room."""
        worker = self._idle_worker()
        worker.trial = assignment.number
        worker.last_heard = time.monotonic()
        worker.send({"assignment": assignment.to_dict()})

    def answer(self, trial: int, decision: Decision) -> None:
        """Tell the worker of a trial what to do after an epoch."""
        self._worker_of(trial).send({"decision": decision.value})

    def abandon(self, trial: int) -> None:
        """End the worker of a trial that is no longer ours, if it is still training it."""
        for worker in [worker for worker in self._workers if worker.trial == trial]:
            self._remove(worker)

    def events(self, timeout_s: float) -> Iterator[tuple[int, Event]]:
        """What has happened, by trial number; waits at most `timeout_s` for something to happen.

        Raises SearchError if no worker can do anything for this study.
        """
        by_connection: dict[Any, Worker] = {worker.connection: worker for worker in self._workers}
        listening = self._listening_sockets()
        for ready in wait([*by_connection, *listening], timeout_s):
            if ready in listening:
                self._accept_worker()
            elif by_connection[ready] in self._workers:  # it may have been abandoned while the last event was handled
                yield from self._hear(by_connection[ready])
        while silent := self._silent():
            yield from self._lose(silent[0], f"was silent for {self._silence_s:.0f} s")

    def _listening_sockets(self) -> Sequence[Any]:
        """Sockets that become readable when a worker that was started elsewhere connects."""
        return ()

    def _accept_worker(self) -> None:
        """Accept a worker that has connected."""
        raise NotImplementedError("this pool has no listener")

    def _hear(self, worker: Worker) -> Iterator[tuple[int, Event]]:
        try:
            message = decode(worker.connection.recv_bytes())
        except (EOFError, OSError):
            yield from self._lose(worker)
            return
        worker.last_heard = time.monotonic()
        worker.has_spoken = True
        self._failed_starts = self._killed_starts = 0
        match message:
            case Alive():
                pass
            case LogLine():
                _logger.log(message.level, message.text)
            case WorkerUnfit():
                raise SearchError(f"a worker cannot start: {message.reason}")
            case EpochDone() | TrialDone() | TrialInfeasible() | TrialRaised():
                assert worker.trial is not None, "only a worker with a trial speaks of one"
                trial = worker.trial
                if not isinstance(message, EpochDone):
                    worker.trial = None
                if isinstance(message, TrialRaised):
                    self._remove(worker)
                yield trial, message

    def _lose(self, worker: Worker, reason: str | None = None) -> Iterator[tuple[int, Event]]:
        end = self._remove(worker, _EXIT_S if reason is None else 0)
        if not worker.has_spoken:
            self._count_failed_start(end)
        if worker.trial is not None:
            yield worker.trial, WorkerDied(f"its worker {reason or end.text}", reason is None and end.is_unexplained)

    def _count_failed_start(self, end: WorkerEnd) -> None:
        self._killed_starts += end.is_unexplained
        self._failed_starts += not end.is_unexplained
        if self._failed_starts >= MAX_FAILED_STARTS or self._killed_starts >= MAX_KILLED_STARTS:
            num_starts = self._failed_starts + self._killed_starts
            raise SearchError(f"{num_starts} workers in a row died at their start; the last one {end.text}")

    def _silent(self) -> list[Worker]:
        earliest = time.monotonic() - self._silence_s
        quiet = [worker for worker in self._workers if worker.trial is not None and worker.last_heard < earliest]
        # After an outage of the database, in which nobody listened, what they have said may lie there unread.
        return [worker for worker in quiet if not worker.connection.poll()]

    def _remove(self, worker: Worker, grace_s: float = 0) -> WorkerEnd:
        self._workers.remove(worker)
        end = worker.end(grace_s)
        worker.connection.close()
        return end

    def _worker_of(self, trial: int) -> Worker:
        return next(worker for worker in self._workers if worker.trial == trial)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self._workers):
            self._remove(worker)
