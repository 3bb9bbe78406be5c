"""MLflow's UI on a store: a server of two processes in a group of its own, which ends with the command."""

from __future__ import annotations

import http.client
import ipaddress
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO

from hpo.errors import StoreError, UsageError
from hpo.files import require_temporary_folder
from hpo.home import Home
from hpo.tracking.store import TrackingStore, prepare_mlflow
from hpo.tracking.view import CURVES_VIEW, NUM_CURVES

DEFAULT_PORT = 5000  # of MLflow
_PORTS_TRIED = 100
_LISTENS = b"Uvicorn running on"  # in the log of a server that has its port
_START_TIMEOUT_S = 120.0  # 10 to 20 s on two quiet cores
_STOP_TIMEOUT_S = 5.0
_LOG_BYTES = 100_000

# A shell that becomes the server, and leaves a watcher in its group. Its standard input is a pipe that nobody writes to
# and that the system closes when this process ends, however it ends: kill -9 takes the server along.
_ENDING_WITH_US = 'exec 3<&0 </dev/null; { read -r _ <&3; kill -KILL 0; } & exec "$@" 3<&-'


def serve(
    store: TrackingStore,
    *,
    study: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Show MLflow's UI until Ctrl-C, SIGTERM or the server's own end; `say` gets the lines for the user.

    Without a port it is the first from 5000 that is free.

    Raises UsageError if the port is taken, UnknownNameError for an unknown study, StoreError if the server does
    not start.
    """
    if store.is_server:
        for line in _addresses(store, study, store.uri):
            say(line)
        return
    if study:
        store.study_url(study, "")  # raises where there is none, before the server is started
    port = port or find_free_port(host, DEFAULT_PORT, say)
    if not is_loopback(host):
        say(f"Warning: whoever can reach {host}:{port} can read and change every run; MLflow asks for no password.")
    say("Starting MLflow, which takes 10 to 20 seconds ...")
    with running_server(store, host=host, port=port) as server:
        for line in _addresses(store, study, _base_url(host, port)):
            say(line)
        say("Stop it with Ctrl-C.")
        server.wait()


def _addresses(store: TrackingStore, study: str | None, base_url: str) -> list[str]:
    """Where MLflow shows the study, or each study, the newest first: its own start page shows traces, not runs."""
    studies = [study] if study else store.studies()
    if not studies:
        return [f"MLflow is at {base_url}"]
    if len(studies) == 1:
        curves = store.study_url(studies[0], base_url, CURVES_VIEW)
        return [
            f"MLflow is at {store.study_url(studies[0], base_url)}",
            f"Curves of the best {NUM_CURVES} trials: {curves}",
        ]
    return [
        "Studies in MLflow, newest first:",
        *(f"  {name}  {store.study_url(name, base_url)}" for name in studies),
    ]


@contextmanager
def running_server(store: TrackingStore, *, host: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An MLflow server on the store that answers requests; its whole process group is gone afterwards."""
    require_free_port(host, port)
    store.optimise()
    prepare_mlflow()
    require_temporary_folder()
    with tempfile.TemporaryFile() as log, _sigterm_as_exit():
        server = subprocess.Popen(
            ["sh", "-c", _ENDING_WITH_US, "sh", *_command(store, host, port)],
            cwd=store.home,
            # MLflow's job runner would add eight processes and a gigabyte.
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _await_answer(server, host, port, log)
            yield server
        finally:
            _end_group(server)


def _command(store: TrackingStore, host: str, port: int) -> list[str]:
    options = {
        "--backend-store-uri": store.uri,
        "--default-artifact-root": Home(store.home).artifacts.as_uri(),
        "--host": host,
        "--port": str(port),
        "--workers": "1",
    }
    given = [word for option in options.items() for word in option]
    return [sys.executable, "-m", "mlflow", "server", "--no-serve-artifacts", *given]


def _await_answer(server: subprocess.Popen[bytes], host: str, port: int, log: IO[bytes]) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    # Its log says that it listens: what answers may be another's server, which has taken the port since we looked.
    while not (_LISTENS in os.pread(log.fileno(), _LOG_BYTES, 0) and _is_healthy(host, port)):
        if server.poll() is not None:
            raise StoreError(f"MLflow's server ended with code {server.returncode} at its start: {_last_line(log)}")
        if time.monotonic() > deadline:
            raise StoreError(f"MLflow's server did not answer within {_START_TIMEOUT_S:.0f} s: {_last_line(log)}")
        time.sleep(0.2)


def _is_healthy(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(_reachable(host), port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")


def _end_group(server: subprocess.Popen[bytes]) -> None:
    """End the server, its worker and its watcher, politely and then not."""
    for stop in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, stop)
        except ProcessLookupError:
            break
        _wait_for_end(server)
    server.communicate()  # collects it and closes its pipe


def _wait_for_end(server: subprocess.Popen[bytes]) -> None:
    """Wait until no process of the group is left, or for `_STOP_TIMEOUT_S`."""
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while time.monotonic() < deadline:
        server.poll()  # collects the leader, which else stays as a zombie in its group
        try:
            os.killpg(server.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the server is ended too. Only the main thread may set signal handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(signum: int, frame: FrameType | None) -> None:
        sys.exit(128 + signum)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def find_free_port(host: str, first: int, say: Callable[[str], None]) -> int:
    """The first port from `first` on that nobody listens on; `say` hears of it if that is another one.

    Raises UsageError if none of the next hundred is free, or the host is not an address of this machine.
    """
    for port in range(first, first + _PORTS_TRIED):
        try:
            require_free_port(host, port)
        except UsageError:
            continue
        if port != first:
            say(f"Port {first} is taken by another program; using {port}.")
        return port
    require_free_port(host, first)
    raise UsageError(f"the ports {first} to {port} are taken; choose another with --port.")


def require_free_port(host: str, port: int) -> None:
    """Raise UsageError if another process listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was left a moment ago is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UsageError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another port with --port, "
                f"such as --port {port + 1}."
            ) from error


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reachable(host: str) -> str:
    """The address to call: a server that listens everywhere is called on the loopback."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _base_url(host: str, port: int) -> str:
    address = _reachable(host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
