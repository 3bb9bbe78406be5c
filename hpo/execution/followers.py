"""The other processes of a worker that trains on several GPUs: one per GPU beside its own.

They are workers, too, whose coordinator is the first one: it passes on what it is told, and nobody hears their results,
which are its own. It watches them, because a process that has died leaves the others waiting in a collective operation,
on a GPU for minutes. Then the worker ends as a whole, and its trial is retried as that of any worker that died.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, NoReturn

import torch.distributed as dist

from hpo.execution.messages import LogLine, Message, TrialRaised, WorkerUnfit, decode
from hpo.training.distributed import ALONE, Ranks, join_ranks

if TYPE_CHECKING:
    from hpo.execution.messages import Setup

FOLLOWER_LOST = 70
"""Exit code of a worker that has lost one of its followers."""

SETTLE_S = 2.0
"""What a process that has raised waits before it says so: it may have raised because another one was killed."""


class Followers:
    """The followers of a worker, as it sees them; none where it trains alone."""

    def __init__(self, connections: Sequence[Connection], say: Callable[[Message], None], silence_s: float) -> None:
        self._connections = [*connections]
        self._say = say
        self._silence_s = silence_s
        if connections:
            threading.Thread(target=self._watch, name="hpo-followers", daemon=True).start()

    def tell(self, message: dict[str, Any]) -> None:
        """Pass on what the worker was told."""
        for connection in self._connections:
            try:
                connection.send_bytes(json.dumps(message).encode())
            except OSError:
                self._leave(connection, "is gone")

    def _watch(self) -> NoReturn:
        heard = dict.fromkeys(self._connections, time.monotonic())
        while True:
            for ready in wait(self._connections, self._silence_s / 3):
                assert isinstance(ready, Connection), "there are no others"
                try:
                    message = decode(ready.recv_bytes())
                except (EOFError, OSError):
                    self._leave(ready, "is gone")
                heard[ready] = time.monotonic()
                if isinstance(message, TrialRaised | WorkerUnfit):
                    self._say(message)
                    os._exit(0)
            for connection, last in heard.items():
                if last < time.monotonic() - self._silence_s:
                    self._leave(connection, f"was silent for {self._silence_s:.0f} s")

    def _leave(self, connection: Connection, fate: str) -> NoReturn:
        number = self._connections.index(connection) + 2
        text = f"process {number} of the {len(self._connections) + 1} that share a trial {fate}"
        self._say(LogLine(logging.WARNING, text))
        os._exit(FOLLOWER_LOST)


def join(setup: Setup, followers: Followers, hear: Callable[[], dict[str, Any]]) -> Ranks:
    """Meet the other processes of the worker; `hear` returns what a follower is told next."""
    if setup.num_ranks == 1:
        return ALONE
    if setup.rank == 0:
        listener = socket.create_server(("127.0.0.1", 0))  # torch would listen on every address of the machine
        port = listener.getsockname()[1]
        followers.tell({"port": port})
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1",
            port,
            setup.num_ranks,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    else:
        store = dist.TCPStore("127.0.0.1", hear()["port"], setup.num_ranks)  # type: ignore[attr-defined]
    return join_ranks(store, setup.rank, setup.num_ranks)
