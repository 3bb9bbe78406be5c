"""Workers as processes of this machine, forked from a server that has torch imported already; on macOS spawned."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from io import TextIOWrapper
from multiprocessing import current_process, forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from hpo.errors import SearchError, UsageError
from hpo.execution.followers import FOLLOWER_LOST
from hpo.execution.messages import Setup
from hpo.execution.pool import MAX_FAILED_STARTS, Worker, WorkerEnd, WorkerPool
from hpo.execution.worker import serve
from hpo.files import keep_end, temporary_folder_for_sockets
from hpo.machine import STOP_SIGNALS, num_cores, num_oom_kills
from hpo.training.device import (
    check_gpus_per_trial,
    memory_share,
    ranks_of_trial,
    trials_on_gpu,
    visible_gpus,
)

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from hpo.execution.pool import Event

# A spawned process imports torch for 2 to 3 s, and its first optimizer torch._dynamo for another 5 (2 cores, torch
# 2.15). Forked from a server that has both, it trains after a twentieth of a second.
_PRELOADED = ["hpo.execution.local", "hpo.models.mlp", "hpo.models.convnet", "torch._dynamo"]
_KILLED_S = 5.0
MAX_LOG_BYTES = 10_000_000
"""Of what the tasks of a worker print; of more, the beginning is cut."""

_SERVER_GONE = 255  # what multiprocessing reports as the exit code of a process whose server was killed
_starting = threading.RLock()
"""Held while a process starts: it finds variables, a main module and signals as other threads would not want them."""

_IGNORED = "ignore:resource_tracker:UserWarning"
"""What multiprocessing says of semaphores that a worker had when it ended, which are removed all the same. A compiler
that shows its progress makes one."""


def process_context() -> ForkServerContext | SpawnContext:
    """How workers are started. Apple's libraries, which torch loads, crash in a process that was forked with them."""
    return SpawnContext() if sys.platform == "darwin" else ForkServerContext()


def warm_up() -> None:
    """Start the server that workers are forked from, and do not wait for it."""
    context = process_context()
    if isinstance(context, SpawnContext):
        return
    context.set_forkserver_preload(_PRELOADED)
    with _starting, _current_folder_ignored(), temporary_folder_for_sockets():
        with _environment("PYTHONWARNINGS", _IGNORED):
            resource_tracker.ensure_running()  # a part of what follows, and it would let the signals through again
        with _signals_held_back():
            forkserver.ensure_running()


def local_workers(
    setup: Setup, *, num_workers: int | None, device: str, gpus_per_trial: float | None = None
) -> LocalWorkers:
    """Workers on this machine: as many as its GPUs have room for, or one for each core it may use, unless given.

    Raises UsageError if there are too few GPUs, and in a process that may not have any of its own.
    """
    if current_process().daemon:
        raise UsageError(
            "workers cannot be started by a daemon process, such as one of multiprocessing.Pool; use "
            "concurrent.futures.ProcessPoolExecutor."
        )
    gpus = visible_gpus(device)
    check_gpus_per_trial(gpus_per_trial, gpus=gpus, num_workers=num_workers)
    num_ranks = ranks_of_trial(gpus_per_trial)
    gpus = [",".join(gpus[first : first + num_ranks]) for first in range(0, len(gpus) - num_ranks + 1, num_ranks)]
    num_workers = num_workers or len(gpus) * trials_on_gpu(gpus_per_trial) or num_cores()
    setup = replace(
        setup,
        num_threads=max(1, num_cores() // (num_workers * num_ranks)),
        num_ranks=num_ranks,
        gpu_share=min(memory_share(num_workers, len(gpus)), gpus_per_trial or 1.0) if gpus else 1.0,
    )
    return LocalWorkers(setup, num_workers=num_workers, gpus=gpus)


class LocalWorkers(WorkerPool):
    """Processes on the CPU, which share its cores, or each on a GPU, taken in turn."""

    def __init__(self, setup: Setup, *, num_workers: int, gpus: list[str]) -> None:
        """`gpus` are values of CUDA_VISIBLE_DEVICES, which workers take in turn; empty for the CPU.

        With `setup.num_ranks` each worker is that many processes, and each value names that many GPUs.
        """
        super().__init__(num_workers, silence_s=setup.silence_s)
        self.device = "cuda" if gpus else "cpu"
        self._setup = setup
        self._gpus = gpus
        self._memory = _Memory()
        warm_up()

    def events(self, timeout_s: float) -> Iterator[tuple[int, Event]]:
        for worker in self._workers:
            if isinstance(worker, _LocalWorker) and worker.log:
                keep_end(worker.log, MAX_LOG_BYTES)
        yield from super().events(timeout_s)

    def has_room(self) -> bool:
        return len([worker for worker in self._workers if worker.trial is not None]) < self.num_workers

    def _idle_worker(self) -> Worker:
        idle = next((worker for worker in self._workers if worker.trial is None), None)
        return idle or self._start()

    def _start(self) -> Worker:
        index = self._free_index()
        if self._setup.log:
            self._setup.log.mkdir(parents=True, exist_ok=True)
        visible = self._gpus[index % len(self._gpus)] if self._gpus else None
        log = self._setup.log and self._setup.log / f"worker-{index}.log"
        setup = replace(self._setup, visible_gpu=visible, log=log)
        name = f"hpo-worker-{index}"
        ours, theirs = process_context().Pipe()
        lines, followers = start_followers(setup, name)
        process = _fork(theirs, of_rank(setup, 0), lines, name=name)
        for end in (theirs, *lines):
            end.close()
        worker = _LocalWorker(ours, [process, *followers], index, log, self._memory)
        self._workers.append(worker)
        return worker

    def _free_index(self) -> int:
        taken = {worker.index for worker in self._workers if isinstance(worker, _LocalWorker)}
        return min(set(range(self.num_workers)) - taken)


class _Memory:
    """Whether the kernel has killed a process for its memory since it was asked the last time."""

    def __init__(self) -> None:
        self._num_kills = num_oom_kills()

    def has_run_out(self) -> bool:
        before, self._num_kills = self._num_kills, num_oom_kills()
        return self._num_kills > before


class _LocalWorker(Worker):
    def __init__(
        self,
        connection: Connection,
        processes: Sequence[BaseProcess],
        index: int,
        log: Path | None,
        memory: _Memory,
    ) -> None:
        """`processes` are the worker and its followers, which end with it."""
        super().__init__(connection)
        self.index = index
        self._processes = processes
        self.log = log
        self._memory = memory

    def end(self, grace_s: float) -> WorkerEnd:
        self._processes[0].join(grace_s)
        has_ended = self._processes[0].exitcode is not None
        for process in self._processes:
            _kill(process)
        for process in self._processes:
            process.join(_KILLED_S)
        code, loss = self._cause()
        is_killed = has_ended and code == -signal.SIGKILL
        is_full = is_killed and self._memory.has_run_out()
        output = f"; see {self.log}" if self.log else ""
        text = loss + _describe_exit(code, is_full=is_full) + output
        return WorkerEnd(text, is_unexplained=is_killed and not is_full)

    def _cause(self) -> tuple[int | None, str]:
        """Exit code of the worker, or of the follower that it has lost and words for that."""
        code, *codes = [process.exitcode for process in self._processes]
        if code == FOLLOWER_LOST:
            for number, of_follower in enumerate(codes, start=2):
                if of_follower != 0:
                    return of_follower, f"has lost its process {number} of {len(codes) + 1}, which "
        return code, ""


def _kill(process: BaseProcess) -> None:
    process.kill()
    if process.exitcode == _SERVER_GONE:  # multiprocessing then takes it for dead
        assert process.pid, "it was started"
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)


def start_followers(setup: Setup, name: str) -> tuple[list[Connection], list[BaseProcess]]:
    """The processes beside a worker that trains on several GPUs, and the worker's end of the line to each."""
    lines: list[Connection] = []
    processes = []
    for rank in range(1, setup.num_ranks):
        ours, theirs = process_context().Pipe()
        processes.append(_fork(theirs, of_rank(setup, rank), (), name=f"{name}-{rank}"))
        theirs.close()
        lines.append(ours)
    return lines, processes


def of_rank(setup: Setup, rank: int) -> Setup:
    """What one of a worker's processes is told: it sees its own GPU alone."""
    if setup.num_ranks == 1:
        return setup
    gpu = setup.visible_gpu.split(",")[rank] if setup.visible_gpu else None
    return replace(setup, rank=rank, visible_gpu=gpu)


def _fork(connection: Connection, setup: Setup, followers: Sequence[Connection], name: str) -> BaseProcess:
    """A worker's process; from a new server where the old one was killed, which shows a few milliseconds later only."""
    for _ in range(MAX_FAILED_STARTS):
        warm_up()
        process = process_context().Process(target=_work, args=(connection, setup, followers), name=name, daemon=True)
        try:
            # The last two for a spawned process; a forked one has them from its server.
            with _starting, _main_module_hidden(), _signals_held_back(), _current_folder_ignored():
                process.start()
        except (EOFError, OSError) as error:
            refusal = error
            time.sleep(0.1)
        else:
            return process
    raise SearchError(f"no worker can be started: {refusal}") from refusal


def _work(connection: Connection, setup: Setup, followers: Sequence[Connection]) -> None:
    """The process's first function. The coordinator alone hears signals: Ctrl-C reaches every process of a terminal."""
    has_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    assert not has_cuda, "a CUDA context does not survive a fork"
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    if setup.visible_gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = setup.visible_gpu
    if setup.log is not None:
        with setup.log.open("ab", buffering=0) as log:
            for descriptor, stream in enumerate((sys.stdout, sys.stderr), start=1):
                assert isinstance(stream, TextIOWrapper), "a process of Python's own making"
                # A worker is killed in the end, and its last words count; no letter that is missing may end a trial.
                stream.reconfigure(line_buffering=True, errors="backslashreplace")
                os.dup2(log.fileno(), descriptor)
    faulthandler.enable()
    serve(connection, setup, followers)


def _describe_exit(code: int | None, *, is_full: bool) -> str:
    """Words for an exit code; `is_full`: the kernel has killed for memory, else it may be unable to tell."""
    if code is None:
        return "could not be ended"
    if code >= 0:
        return f"ended with code {code}"
    guess = "" if code != -signal.SIGKILL else " (out of memory)" if is_full else " (out of memory?)"
    return f"was killed by {signal.Signals(-code).name}{guess}"


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Processes started meanwhile never hear of STOP_SIGNALS, which reach every process of a terminal or service.

    The server would end with a traceback in the seconds in which it imports torch, and later without a word.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _current_folder_ignored() -> Iterator[None]:
    """Keep a `random.py` in the current folder from replacing the library in processes started meanwhile.

    multiprocessing starts them with `python -c`, which imports from there first.
    """
    with _environment("PYTHONSAFEPATH", "1"):
        yield


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for processes started meanwhile."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keep multiprocessing from running the user's script again in each worker, which needs nothing of it.

    It would ask for an `if __name__ == "__main__"` around `hpo.run_search`.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
