"""Workers as tasks of a Ray cluster: Ray places and counts them, the trials and their results travel as everywhere.

Ray Tune is not used: its Optuna searcher tells stopped trials as complete and leaves pruning to itself. The home must
lie on storage that every node sees, for checkpoints and data are read and written there.
"""

from __future__ import annotations

import logging
import os
import queue
import secrets
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any

from hpo.errors import UsageError
from hpo.execution.local import of_rank, start_followers
from hpo.execution.messages import Setup
from hpo.execution.pool import Event, Worker, WorkerEnd, WorkerPool
from hpo.execution.worker import serve
from hpo.training.device import ranks_of_trial, require_share_or_whole, trials_on_gpu

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

_ANSWER_S = 5.0  # of a port at the cluster's address
_CONNECT_S = 30  # to become part of the cluster; mostly Ray's import, which takes 2 s on an idle machine
_GREETING_S = 10  # for each step in which a worker proves that it is one
_DEATH_NOTICE_S = 0.5  # between the end of a worker's connection and Ray's word on why

_READ_AT_IMPORT = {
    # Below `uv run` Ray would copy the working folder to the nodes and install it there; the workers are to run what is
    # installed on them.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Ray prints the log of a lost node to stdout, even with log_to_driver=False (2.60); what matters of it we say.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",
}

_logger = logging.getLogger(__name__)


def ray_workers(setup: Setup, *, num_workers: int | None, address: str, gpus_per_trial: float) -> RayWorkers:
    """Workers on a Ray cluster, whose own logs take what they print."""
    setup = replace(
        setup, gpu_share=min(1.0, gpus_per_trial or 1.0), num_ranks=ranks_of_trial(gpus_per_trial), log=None
    )
    return RayWorkers(setup, num_workers=num_workers, address=address, gpus_per_trial=gpus_per_trial)


class RayWorkers(WorkerPool):
    """Tasks on whatever nodes have room; one that dies is asked for again.

    Each has a CPU, and a share of a GPU or none; or several of both, for as many ranks.
    """

    def __init__(self, setup: Setup, *, num_workers: int | None, address: str, gpus_per_trial: float) -> None:
        """`num_workers` None takes as many as the cluster has room for now; further ones wait for nodes to join.

        Raises UsageError if there is no such cluster, or no room for a single worker.
        """
        require_share_or_whole(gpus_per_trial)
        self._ray, self._is_ours = _connect(address)
        self._room = _room(self._ray, setup.num_ranks, gpus_per_trial)
        if num_workers is None and self._room == 0:
            self._disconnect()
            raise UsageError(
                f"no node of the Ray cluster has room for a trial, which needs a CPU for each of its processes and "
                f"--gpus-per-trial {gpus_per_trial:g}; with --workers N they wait for nodes to join."
            )
        super().__init__(num_workers or self._room, silence_s=setup.silence_s)
        self.device = "cuda" if gpus_per_trial else "cpu"
        self._setup = setup
        # A process for each worker: one that has served cannot be distinguished from one that is about to leave.
        task = self._ray.remote(num_cpus=setup.num_ranks, num_gpus=gpus_per_trial, max_retries=0, max_calls=1)
        self._task = task(_work)
        self._listener = _Listener(self._ray.util.get_node_ip_address())
        self._asked: dict[int, Any] = {}
        """Ray's handles of the workers that have not arrived yet, by their number."""
        self._num_asked = 0
        self._is_closing = False

    def __enter__(self) -> Self:
        for _ in range(self.num_workers):
            self._ask_for_worker()
        waiting = f"; it has room for {self._room}, the others wait for nodes to join"
        _logger.info("asked Ray for --workers %d%s", self.num_workers, waiting * (self.num_workers > self._room))
        return self

    def has_room(self) -> bool:
        return any(worker.trial is None for worker in self._workers)

    def events(self, timeout_s: float) -> Iterator[tuple[int, Event]]:
        self._restart_failed_workers()
        yield from super().events(timeout_s)

    def _idle_worker(self) -> Worker:
        return next(worker for worker in self._workers if worker.trial is None)

    def _listening_sockets(self) -> Sequence[Any]:
        return [self._listener.wakeup_socket]

    def _accept_worker(self) -> None:
        number, connection = self._listener.accept()
        handle = self._asked.pop(number, None)
        if handle is None:  # it died before it was accepted, and another was requested
            connection.close()
            return
        self._workers.append(_RayWorker(connection, self._ray, handle))

    def _restart_failed_workers(self) -> None:
        """Request workers again that died before they connected, for example because their node lacks hpo."""
        if not self._asked:
            return
        handles = list(self._asked.values())
        ended, _ = self._ray.wait(handles, num_returns=len(handles), timeout=0)
        for number in [number for number, handle in self._asked.items() if handle in ended]:
            # Without a cause it has connected, reported something, and exited; its connection will tell.
            cause = _cause_of_death(self._ray, self._asked[number])
            if cause is None:
                continue
            del self._asked[number]
            if cause.is_ours:
                self._count_failed_start(WorkerEnd(f"with {cause.text}"))
            _logger.warning("a Ray worker died at its start and is requested again: %s", cause.text)
            self._ask_for_worker()

    def _remove(self, worker: Worker, grace_s: float = 0) -> WorkerEnd:
        end = super()._remove(worker, grace_s)
        if not self._is_closing:
            self._ask_for_worker()
        return end

    def _ask_for_worker(self) -> None:
        number, self._num_asked = self._num_asked, self._num_asked + 1
        self._asked[number] = self._task.remote(self._listener.address, self._listener.key, number, self._setup)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_closing = True
        super().__exit__(kind, error, trace)
        for handle in self._asked.values():
            self._ray.cancel(handle, force=True)
        self._listener.close()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._is_ours:
            self._ray.shutdown()


class _RayWorker(Worker):
    def __init__(self, connection: Connection, ray: Any, handle: Any) -> None:
        super().__init__(connection)
        self._ray = ray
        self._handle = handle
        self.has_spoken = (
            True  # connecting is enough: the loss of a node takes many workers with it, and proves nothing
        )

    def end(self, grace_s: float) -> WorkerEnd:
        # The reason is useful, but not worth a long wait: Ray takes half a minute to be sure that a node is lost.
        ended, _ = self._ray.wait([self._handle], timeout=min(grace_s, _DEATH_NOTICE_S))
        if ended:
            cause = _cause_of_death(self._ray, self._handle)
            return WorkerEnd(f"ended with {cause.text}" if cause else "left")
        self._ray.cancel(self._handle, force=True)
        return WorkerEnd("or its node was lost", is_unexplained=True)


def _work(address: tuple[str, int], key: bytes, number: int, setup: Setup) -> None:
    """The Ray task: a worker that calls its coordinator."""
    lines: Sequence[Connection] = ()
    if setup.num_ranks > 1:
        # Before the call: they take seconds to start, in which nothing would be heard of this worker.
        setup = replace(setup, visible_gpu=os.environ.get("CUDA_VISIBLE_DEVICES") or None)
        lines, _ = start_followers(setup, name=f"hpo-worker-{number}")
        setup = of_rank(setup, 0)
        if setup.visible_gpu is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = setup.visible_gpu
    connection = Client(address, authkey=key)
    connection.send_bytes(str(number).encode())
    serve(connection, setup, lines)


class _Listener:
    """A port on which workers connect; only those that know the key are accepted."""

    def __init__(self, host: str) -> None:
        self.key = secrets.token_bytes(32)
        self._socket = socket.create_server((host, 0), backlog=128)
        self.address: tuple[str, int] = self._socket.getsockname()
        self._arrived: queue.SimpleQueue[tuple[int, Connection]] = queue.SimpleQueue()
        self.wakeup_socket, self._wakeup_sender = socket.socketpair()
        threading.Thread(target=self._accept_connections, name="hpo-listener", daemon=True).start()

    def accept(self) -> tuple[int, Connection]:
        """Number and connection of a worker, after `wakeup_socket` became readable."""
        self.wakeup_socket.recv(1)
        return self._arrived.get()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)  # ends a pending accept, as close alone does not
        self._socket.close()
        for end in (self.wakeup_socket, self._wakeup_sender):
            end.close()
        while not self._arrived.empty():
            self._arrived.get()[1].close()

    def _accept_connections(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:  # closed
                return
            # A thread for each, so that a client that sends nothing keeps nobody else waiting.
            threading.Thread(target=self._authenticate, args=(client,), name="hpo-client", daemon=True).start()

    def _authenticate(self, client: socket.socket) -> None:
        with client:
            connection = Connection(os.dup(client.fileno()))
            try:
                _limit_reads(client, _GREETING_S)
                deliver_challenge(connection, self.key)
                answer_challenge(connection, self.key)
                number = int(connection.recv_bytes(maxlength=20))
                _limit_reads(client, 0)
                self._arrived.put((number, connection))
                self._wakeup_sender.send(b"!")
            # Python before 3.12 asserts where a challenge is malformed.
            except (AuthenticationError, AssertionError, EOFError, OSError, ValueError) as error:
                connection.close()
                _logger.warning(
                    "rejected a connection that did not come from a worker: %s", error or type(error).__name__
                )


def _limit_reads(client: socket.socket, seconds: int) -> None:
    """Let reads fail that take longer, also on what was duplicated from the socket; 0 lets them wait forever."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", seconds, 0))


def _connect(address: str) -> tuple[Any, bool]:
    """The module `ray`, connected to the cluster, and whether it was we who connected it."""
    os.environ.update(_READ_AT_IMPORT)
    try:
        import ray
    except ImportError as error:
        raise UsageError("--executor ray needs Ray: pip install 'hpo-torch[ray]'.") from error
    if ray.is_initialized():
        return ray, False
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "auto")
    _require_cluster(address)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler would end the process without our exit code
    return ray, True


def _require_cluster(address: str) -> None:
    """Raise UsageError if `ray.init` would: it tries for minutes and cannot be stopped, so another process tries."""
    advice = "start one with `ray start --head`, and run hpo on one of its nodes."
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal() and "://" not in host):
        raise UsageError(f"--address {address} is not allowed: it must be auto or HOST:PORT, of a cluster that runs.")
    if address != "auto":
        try:
            socket.create_connection((host, int(port)), _ANSWER_S).close()
        except (OSError, OverflowError) as error:
            raise UsageError(f"no Ray cluster at --address {address} ({error}); {advice}") from error
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys, ray; ray.init(address=sys.argv[1], logging_level='ERROR')",
        address,
    ]
    try:
        attempt = subprocess.run(command, capture_output=True, text=True, timeout=_CONNECT_S)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"no Ray cluster at --address {address}: no answer in {_CONNECT_S} s; {advice}") from error
    if attempt.returncode != 0:
        reason = attempt.stderr.rstrip().rpartition("\n")[2]
        raise UsageError(f"cannot join a Ray cluster at --address {address} ({reason}); {advice}")


def _room(ray: Any, num_ranks: int, gpus_per_trial: float) -> int:
    """How many workers the cluster has room for when it does nothing else."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(_room_on_node(node.get("CPU", 0), node.get("GPU", 0), num_ranks, gpus_per_trial) for node in nodes)


def _room_on_node(cpus: float, gpus: float, num_ranks: int, gpus_per_trial: float) -> int:
    if gpus_per_trial == 0:
        return int(cpus) // num_ranks
    # A share lies within one GPU.
    return int(min(cpus // num_ranks, int(gpus) // num_ranks * trials_on_gpu(gpus_per_trial)))


@dataclass(frozen=True)
class _Cause:
    """Why a task did not end well, in words for the user."""

    text: str
    is_ours: bool
    """Whether it raised, instead of being ended by its node or with it."""


def _cause_of_death(ray: Any, handle: Any) -> _Cause | None:
    """Why a task that has ended did not end well; None where it did."""
    try:
        ray.get(handle)
    except ray.exceptions.RayTaskError as error:
        return _Cause(f"{type(error.cause).__name__}: {error.cause}", is_ours=True)
    except ray.exceptions.RayError as error:
        return _Cause(f"{type(error).__name__}: {str(error).partition('. ')[0].strip()}", is_ours=False)
    return None
