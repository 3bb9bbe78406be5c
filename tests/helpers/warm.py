"""Python processes that begin at once: forked from one that has imported torch, MLflow and scikit-learn already.

`python -m hpo search` imports for 10 s of CPU time, and the server of its workers for another 5 (2 cores, torch 2.15).
A test that only needs a process to kill, stop or interrupt takes `WarmPopen` in place of `subprocess.Popen`. What runs
is the same: a process of its own, which is the parent of a server of its own, which is the parent of its workers. What
is not shown is that the command can be started at all; tests/test_plugins.py starts one.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from multiprocessing import util
from pathlib import Path
from types import ModuleType
from typing import Any

PRELOADED = (
    "hpo.cli",
    "hpo.session.search",
    "hpo.models.convnet",
    "hpo.models.mlp",
    "hpo.plots.study",
    "hpo.objectives.digits",
    "matplotlib.backends.backend_agg",
    "mlflow.store.tracking.sqlalchemy_store",
    "mlflow.tracking",
    "optuna",
    "sklearn.datasets",
    "torch._dynamo",
)
_TESTS = str(Path(__file__).parent.parent)
_POLL_S = 0.01
_CLONE_NEWUTS, _CLONE_NEWNET = 0x04000000, 0x40000000  # linux/sched.h; Python has them from 3.12


class WarmPopen(subprocess.Popen[str]):
    """`subprocess.Popen` of `[sys.executable, ...]`, for the interpreter options -c, -m and the name of a script.

    `prelude` is Python code that it runs first. `machine` is the name of a network namespace, in which the process also
    has the last part of it as its host name.
    """

    def __init__(
        self, command: Sequence[object], *, prelude: str = "", machine: tuple[str, str] | None = None, **options: Any
    ) -> None:
        self._prelude, self._machine = prelude, machine
        super().__init__([*map(str, command)], **options)

    def _execute_child(  # type: ignore[override]
        self,
        args: list[str],
        _executable: object,
        _preexec: object,
        _close: object,
        _pass: object,
        cwd: str | None,
        env: dict[str, str] | None,
        *others: Any,
    ) -> None:
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, *_, start_new_session, _group = others[3:]
        assert args[0] == sys.executable
        request = {
            "arguments": args[1:],
            "folder": str(cwd or Path.cwd()),
            "environment": dict(os.environ if env is None else env),
            "leads_a_group": start_new_session,
            "prelude": self._prelude,
            "machine": self._machine,
        }
        streams = [own if own != -1 else inherited for own, inherited in ((p2cread, 0), (c2pwrite, 1), (errwrite, 2))]
        self._child_created = True
        self.pid = _ask(request, streams)
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:  # type: ignore[override]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)  # type: ignore[attr-defined]
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        while True:
            status = _ask({"wait": self.pid}, [])
            if status != -1 or wait_flags:
                return (0, 0) if status == -1 else (self.pid, status)
            time.sleep(_POLL_S)


def run(command: Sequence[object], **options: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a warm process, with its output as text."""
    with WarmPopen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# --- the process that forks -------------------------------------------------------------------------------------------

_lock = threading.Lock()


def _ask(request: dict[str, Any], streams: list[int]) -> int:
    """The answer of the warm process, which starts with the first request: a process id, or how a process ended."""
    with _lock:
        connection = _connection()
        _send(connection, request, streams)
        return int(connection.recv(32))


@cache
def _connection() -> socket.socket:
    """To a warm process, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "helpers.warm", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # no signal to the tests' terminal reaches it
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (_TESTS, os.environ.get("PYTHONPATH"))))},
            cwd=_TESTS,
        )

    def end() -> None:
        ours.close()
        process.wait()

    atexit.register(end)
    return ours


def _send(connection: socket.socket, message: Any, files: Sequence[int]) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
    socket.send_fds(connection, [json.dumps(message).encode()], [*files])


def _receive(connection: socket.socket) -> tuple[Any, list[int]]:
    """The message, None at its end, and the files that came with it."""
    content, files, _, _ = socket.recv_fds(connection, 2**20, 3)
    return (json.loads(content) if content else None), list(files)


def serve(connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Fork whatever is asked for. In a forked process: what it is to run; in this one, None at the end."""
    while True:
        request, streams = _receive(connection)
        if request is None:
            return None
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            connection.send(str(status if pid else -1).encode())
        elif pid := os.fork():
            for stream in streams:
                os.close(stream)
            connection.send(str(pid).encode())
        else:
            connection.close()
            return request, streams


def become(request: dict[str, Any], streams: Sequence[int]) -> Callable[[], object]:
    """Turn a forked process into the one that was asked for; what it does then."""
    if request["leads_a_group"]:
        os.setsid()
    for stream, number in zip(streams, range(3), strict=True):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["machine"]:
        _enter(*request["machine"])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if unbuffered else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    _fork_the_workers_server_from_here()
    exec(request["prelude"], {})
    option, *arguments = request["arguments"]
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = str(Path(option).parent) if option not in ("-c", "-m") else request["folder"]
    sys.path[:] = [own, *filter(None, named), *(folder for folder in sys.path if folder != _TESTS)]
    main = ModuleType("__main__")
    sys.modules["__main__"] = main
    if option == "-m":
        module, *arguments = arguments
        sys.argv[:] = [module, *arguments]
        return lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)
    if option == "-c":
        code, *arguments = arguments
        sys.argv[:] = [option, *arguments]
        return lambda: exec(compile(code, "<string>", "exec"), vars(main))
    sys.argv[:] = [option, *arguments]
    return lambda: runpy.run_path(option, run_name="__main__")


def run_to_the_end(main: Callable[[], object]) -> None:
    """Run it, and end as Python does, except that modules are not taken apart: that copies all of them, for 3 s."""
    try:
        main()
        code: str | int = 0
    except SystemExit as end:
        code = end.code or 0
    if not isinstance(code, int):
        sys.exit(str(code))  # a message, which Python prints
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code & 0xFF)


def _enter(namespace: str, hostname: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open() as file:
        entered = libc.setns(file.fileno(), _CLONE_NEWNET) == 0 and libc.unshare(_CLONE_NEWUTS) == 0
    if not entered:
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    socket.sethostname(hostname)


def _fork_the_workers_server_from_here() -> None:
    """Let a process wait that becomes the server which workers are forked from, in place of one that is spawned.

    It is forked now, while nothing is open. A second server, which replaces one that was killed, is spawned.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    signals = (signal.SIGINT, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    server = os.fork()
    if server == 0:
        ours.close()
        _await_code(theirs)
        os._exit(0)
    theirs.close()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    spawn = util.spawnv_passfds

    def spawn_or_take(path: bytes, args: Sequence[str], passed: Sequence[int]) -> int:
        if "multiprocessing.forkserver" not in args[-1]:
            return spawn(path, args, passed)
        util.spawnv_passfds = spawn
        held_back = [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])]
        with ours:
            _send(ours, {"code": args[-1], "numbers": [*passed], "held_back": held_back}, passed)
        return server

    util.spawnv_passfds = spawn_or_take  # type: ignore[assignment]


def _await_code(connection: socket.socket) -> None:
    message, files = _receive(connection)
    connection.close()
    if message is None:
        return
    aside = [os.dup2(file, 500 + index) for index, file in enumerate(files)]
    for file in files:
        os.close(file)
    for file, number in zip(aside, message["numbers"], strict=True):
        os.dup2(file, number)
        os.close(file)
    signal.pthread_sigmask(signal.SIG_SETMASK, message["held_back"])
    sys.argv[:] = ["-c"]
    exec(message["code"], {"__name__": "__main__"})


if __name__ == "__main__":
    for name in PRELOADED:
        import_module(name)
    assert threading.active_count() == 1, "only a process of one thread can be forked safely"
    if found := serve(socket.socket(fileno=int(sys.argv[1]))):
        run_to_the_end(become(*found))
