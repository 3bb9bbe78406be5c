"""How many requests `hpo serve` answers, and how long each takes: `python benchmarks/serving.py STUDY --home HOME`.

The winner of a study is served on the loopback address by `hpo serve`, by `mlflow models serve` with the same export,
and by examples/deploy/app.py, a FastAPI program with the ONNX export. 1, 4 and 16 clients each send the next request as
soon as the last one is answered, over connections that stay open, with batches of 1 and 32 validation examples as JSON.
An answer with another status than 200, or other than the first one to the same examples, is an error. Clients and
server share the cores. The data sets are found by HPO_DATA_DIR; the extra `export` must be installed.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from machine import describe_machine
from rich.console import Console
from rich.table import Table

from hpo.session.export import choose, export_best, load_with_data

CLIENTS = (1, 4, 16)
BATCH_SIZES = (1, 32)
ROUNDS = 3
START_S = 120.0
WARM_UP_S = 1.0
EXAMPLES = Path(__file__).parent.parent / "examples" / "deploy"
HEADERS = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Server:
    """A command that serves on `{port}`, and what it is asked."""

    command: tuple[str, ...]
    path: str
    key: str | None
    """Of the object that the examples are sent in; None if they are sent as they are."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def body(self, examples: list[object]) -> bytes:
        return json.dumps(examples if self.key is None else {self.key: examples}).encode()


@dataclass
class Load:
    """What clients saw of a server."""

    latencies_s: list[float] = field(default_factory=list)
    num_errors: int = 0
    seconds: float = 0.0

    @property
    def requests_a_second(self) -> float:
        return len(self.latencies_s) / self.seconds


def servers(study: str, home: Path, exports: Path) -> dict[str, Server]:
    """Export the winner and return who serves it, by name."""
    for format in ("mlflow", "onnx"):
        export_best(study, format=format, home=home, out=exports / format)
    run = (sys.executable, "-m")
    of_mlflow = ("models", "serve", "-m", str(exports / "mlflow"), "--env-manager", "local", "--port", "{port}")
    of_app = ("uvicorn", "app:app", "--app-dir", str(EXAMPLES), "--log-level", "warning", "--port", "{port}")
    return {
        "hpo serve": Server(
            (*run, "hpo", "serve", study, "--home", str(home), "--port", "{port}"), "/invocations", "inputs"
        ),
        "mlflow models serve": Server((*run, "mlflow", *of_mlflow), "/invocations", "inputs"),
        "examples/deploy/app.py": Server((*run, *of_app), "/predict", None, {"EXPORT": str(exports / "onnx")}),
    }


@contextmanager
def serving(server: Server, probe: bytes) -> Iterator[int]:
    """The port of the running server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [part.format(port=port) for part in server.command]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **server.environment, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            _await_answer(process, server, port, probe)
            yield port
        finally:
            os.killpg(process.pid, signal.SIGTERM)  # mlflow has started uvicorn as a process of its own
            process.wait()


def _await_answer(process: subprocess.Popen[bytes], server: Server, port: int, probe: bytes) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if ask(http.client.HTTPConnection("127.0.0.1", port), server, probe)[0] == 200:
                return
        except OSError:
            time.sleep(0.2)
    raise SystemExit(f"{' '.join(server.command)} does not answer; exit code {process.poll()}.")


def ask(connection: http.client.HTTPConnection, server: Server, body: bytes) -> tuple[int, bytes]:
    connection.request("POST", server.path, body, HEADERS)
    response = connection.getresponse()
    return response.status, response.read()


def measure(server: Server, port: int, bodies: list[bytes], clients: int, seconds: float) -> Load:
    """What the clients see, each in a thread of its own, after a warm-up."""
    load, lock = Load(), threading.Lock()
    expected = [ask(http.client.HTTPConnection("127.0.0.1", port), server, body) for body in bodies]
    begin = time.perf_counter() + WARM_UP_S
    end = begin + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        turn, latencies, errors = number, [], 0
        while (start := time.perf_counter()) < end:
            turn = (turn + 1) % len(bodies)
            try:
                answer = ask(connection, server, bodies[turn])
            except (OSError, http.client.HTTPException):
                connection.close()
                answer = (0, b"")
            errors += answer[0] != 200 or answer != expected[turn]
            if start >= begin:
                latencies.append(time.perf_counter() - start)
        with lock:
            load.latencies_s += latencies
            load.num_errors += errors

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - begin
    return load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--home", type=Path, default=Path("mlruns"))
    parser.add_argument("--seconds", type=float, default=5.0, help="for each measurement; there are 3 of each")
    given = parser.parse_args()
    _, splits, _ = load_with_data(choose(given.study, trial=None, home=given.home))
    examples = np.asarray(splits.validation.select(slice(0, 256)).in_memory().inputs).tolist()
    cells = [(size, clients) for size in BATCH_SIZES for clients in CLIENTS]
    found: dict[tuple[str, int, int], list[Load]] = {}
    with tempfile.TemporaryDirectory() as folder:
        contenders = servers(given.study, given.home, Path(folder))
        for _ in range(ROUNDS):
            for name, server in contenders.items():
                with serving(server, server.body(examples[:1])) as port:
                    for size, clients in cells:
                        bodies = [server.body(examples[at : at + size]) for at in range(0, 8 * size, size)]
                        load = measure(server, port, bodies, clients, given.seconds)
                        found.setdefault((name, size, clients), []).append(load)
    console = Console(width=120)
    table = Table("server", "batch", "clients", "requests/s", "examples/s", "median ms", "99% ms", "requests", "errors")
    for (name, size, clients), loads in found.items():
        rate = statistics.median(load.requests_a_second for load in loads)
        latencies = 1000 * np.array([each for load in loads for each in load.latencies_s])
        median, high = np.quantile(latencies, [0.5, 0.99])
        counts = str(len(latencies)), str(sum(load.num_errors for load in loads))
        table.add_row(
            name, str(size), str(clients), f"{rate:.0f}", f"{rate * size:.0f}", f"{median:.1f}", f"{high:.1f}", *counts
        )
    console.print(table)
    console.print(describe_machine("torch", "mlflow", "fastapi", "uvicorn", "onnxruntime"))


if __name__ == "__main__":
    main()
