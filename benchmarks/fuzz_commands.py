"""Doors of benchmarks/fuzz.py that are whole commands: homes that are damaged, and environments that make no sense.

A case is a command in a process of its own, forked from one that has imported everything (tests/helpers/warm.py), or a
new one where it is about what Python and its libraries read when they start.
"""

from __future__ import annotations

import atexit
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.homes import copy_home
from helpers.warm import WarmPopen

from hpo.errors import HpoError

LIMIT_S = 180
"""Seconds after which a case counts as hanging, on a machine that does other things too."""

NOBODY = 65534
NUM_TRIALS = 3
_GONE_WITHIN_S = 10.0
_ROOT = Path(__file__).parent.parent

_WITHOUT_PRIVILEGES = """
import ctypes
libc = ctypes.CDLL(None)
libc.prctl(28, 3, 0, 0, 0)  # PR_SET_SECUREBITS: what this process starts gets none back
assert libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()) == 0
"""
"""Takes from root, who may open everything, what other accounts lack."""

_FORGET_FOLDERS = "import tempfile; tempfile.tempdir = None"  # the warm process may have looked for one


def ask(
    arguments: Sequence[str], folder: Path, *, given: Mapping[str, str] = {}, prelude: str = "", is_cold: bool = False
) -> None:
    """Run a command of hpo. Raises HpoError with the line that refuses it, AssertionError if it ends otherwise."""
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(_ROOT),
        "HOME": str(folder),
        "HPO_HOME": str(folder / "home"),
        "OMP_NUM_THREADS": "1",
    }
    environment = {name: value for name, value in (environment | given).items() if value != UNSET}
    kind = subprocess.Popen if is_cold else WarmPopen
    options = {} if is_cold else {"prelude": f"{_FORGET_FOLDERS}\n{prelude}"}
    process = kind(
        [sys.executable, "-m", "hpo", *arguments],
        **options,
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, err = (stream.decode(errors="replace") for stream in process.communicate())
        _await_end_of_group(process.pid)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    told = f"hpo {' '.join(arguments)}: exit code {process.returncode}\n{out[-2000:]}\n{err[-6000:]}"
    assert "Traceback" not in out + err, told
    if process.returncode == 0:
        return
    *_, last = err.splitlines() or [""]
    assert process.returncode in (1, 2), told
    assert last.startswith("Error: "), told
    raise HpoError(last.removeprefix("Error: "))


def _await_end_of_group(group: int) -> None:
    """Be sure that no process of a command is left."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while _is_alive(group):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.02)


def _is_alive(group: int) -> bool:
    """Whether a process group has a process that has not ended; one that nobody has waited for yet has."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, of_group = file.read_text().rpartition(")")[2].split()[:3]
            if int(of_group) == group and state not in "ZX":
                return True
    return False


# --- Homes

_COMMANDS = (
    *("show digits", "show digits --json", "show digits --csv", "studies", "best digits", "best digits --as-options"),
    *("report digits --out report.html", "compare digits digits", "gc digits --dry-run", "gc digits --keep 1"),
    *("export digits --format safetensors --out exported", "rerun digits --trial 0", "register digits"),
    *("predict digits digit.jsonl", "refit digits", "confirm digits --plan 2x2"),
    f"search digits --trials {NUM_TRIALS + 1}",
)


@cache
def _searched_home() -> Path:
    """A home with a study that is complete."""
    folder = Path(tempfile.mkdtemp(prefix="hpo-fuzz-home-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    ask(
        f"search digits --trials {NUM_TRIALS} --epochs 1 --pruner none --workers 1".split(),
        folder,
        prelude="from hpo.session import conclude; conclude.draw_figures = lambda *_: {}",  # half of its time
    )
    return folder / "home"


def homes(rng: random.Random, folder: Path) -> None:
    """Homes with a file or a folder that is missing, cut, something else, closed to this user, or another's."""
    home = folder / "home"
    copy_home(_searched_home(), home)
    (folder / "digit.jsonl").write_text(f"{[[[0.0] * 8] * 8]}\n")
    is_plain = os.geteuid() == 0 and rng.random() < 0.4
    for _ in range(rng.choice((1, 1, 1, 3))):
        _damage(rng, home, has_owners=is_plain)
    command = rng.choice(_COMMANDS)
    try:
        ask(command.split(), folder, prelude=_WITHOUT_PRIVILEGES if is_plain else "")
    finally:
        _assert_nothing_is_half_done(home / "optuna.db")
    if command.startswith("search"):
        ended = [state for state in _states(home / "optuna.db") if state in ("COMPLETE", "PRUNED")]
        assert len(ended) == NUM_TRIALS + 1, ended


def _damage(rng: random.Random, home: Path, *, has_owners: bool) -> None:
    databases = [path for path in home.glob("*.db") if path.is_file()]
    # Runs have other names each time: without them the same number damages the same file.
    everything = [home, *sorted(home.rglob("*"), key=lambda path: re.sub("[0-9a-f]{32}", "RUN", str(path)))]
    everything = [path for path in everything if path.exists()]
    paths = databases if rng.random() < 0.3 else everything
    if not paths:
        return  # an earlier damage took them
    path = rng.choice(paths)
    kinds = ["removed", "emptied", "cut", "replaced", "flipped"] + ["closed", "owned", "owned"] * has_owners
    kind = rng.choice(kinds)
    if kind == "closed":
        path.chmod(0)
    elif kind == "owned":
        mode = rng.choice((0o755, 0o700))
        for each in (path, *path.rglob("*")):
            each.chmod(mode)
            os.chown(each, NOBODY, NOBODY)
    elif kind in ("cut", "flipped", "emptied") and path.is_file():
        content = bytearray(path.read_bytes())
        del content[{"cut": rng.randrange(len(content) + 1), "emptied": 0, "flipped": len(content)}[kind] :]
        if kind == "flipped" and content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    else:
        was_file = path.is_file()
        path.unlink() if was_file else shutil.rmtree(path)
        if kind == "replaced":
            path.mkdir() if was_file else path.write_text("no folder")


def _assert_nothing_is_half_done(database: Path) -> None:
    assert "RUNNING" not in _states(database), "a trial is left RUNNING"


def _states(database: Path) -> list[str]:
    """How the trials of a database have ended; none if it cannot be read."""
    with suppress(sqlite3.DatabaseError), closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as connection:
        return [state for (state,) in connection.execute("SELECT state FROM trials")]
    return []


# --- Environments

UNSET = "\0"
_ODD = ("", " ", "0", "-1", "1", "nan", "x", "true", "a" * 3000, "ä", "\udcff", "a\nb", "/nowhere", "/dev/null", "=")
_ADDRESSES = (
    *("http://127.0.0.1:1", "http://", "http://127.0.0.1:99999", "sqlite:///", "sqlite:////nowhere/x.db", "file:///x"),
    *("postgresql://u@127.0.0.1:1/d", "postgresql+psycopg://u:p@127.0.0.1:1/d", "mysql://u@h/d", "databricks", "://"),
)
_READ_BY_US: dict[str, Sequence[str]] = {
    **dict.fromkeys(("HPO_HOME", "HPO_DATA_DIR"), (UNSET, "~", "/proc", "/dev/null/x", "rel/ative", "x?y", "y#z %20")),
    **dict.fromkeys(("HPO_STORAGE", "HPO_NOTIFY", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"), _ADDRESSES),
    **dict.fromkeys(("MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_RUN_ID", "MLFLOW_TRACKING_TOKEN"), ()),
    **dict.fromkeys(("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_LOGGING_LEVEL"), ()),
    **dict.fromkeys(("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "MLFLOW_ENABLE_ASYNC_LOGGING"), ("true", "false")),
    **dict.fromkeys(("MLFLOW_SQLALCHEMYSTORE_POOL_SIZE", "MLFLOW_TRUNCATE_LONG_VALUES"), ()),
    "MLFLOW_TRACKING_USERNAME": (),
    **dict.fromkeys(("TMPDIR", "TMP", "TEMP"), ("/proc", "/nowhere/at/all", "~", "LONG", "/root")),
    **dict.fromkeys(("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "USER", "LOGNAME", "PATH"), (UNSET, "/proc")),
    **dict.fromkeys(("COLUMNS", "LINES"), ("1", "0", "99999999999999999999", "80")),
    **dict.fromkeys(("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE", "TERM", "TTY_COMPATIBLE"), ("1", "dumb", "unknown")),
    **dict.fromkeys(("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MASTER_PORT", "RAY_ADDRESS"), ("2", "auto")),
    **dict.fromkeys(("TZ", "http_proxy", "GIT_DIR", "EDITOR", "DISPLAY"), ("Mars/Olympus", "http://127.0.0.1:1")),
}
_READ_AT_THE_START: dict[str, Sequence[str]] = {
    **dict.fromkeys(("LC_ALL", "LANG", "LC_CTYPE"), ("C", "POSIX", "xx_YY.nothing", "de_DE.ISO-8859-1", "C.UTF-8")),
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT"), ("99999", "0", "2,2", UNSET)),
    **dict.fromkeys(("OMP_WAIT_POLICY", "OMP_PROC_BIND", "OMP_SCHEDULE", "OMP_STACKSIZE", "OMP_DYNAMIC"), ("active",)),
    **dict.fromkeys(("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"), ("99", "0,0", "GPU-x", "MIG-x", "NoDevFiles")),
    **dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING"), ("max:1", ":1:1")),
    **dict.fromkeys(("MPLBACKEND", "MLFLOW_DISABLE_TELEMETRY", "SCIPY_ARRAY_API"), ("TkAgg", "agg")),
}
_READ_BY_PYTHON = {  # with other values Python itself does not start
    "PYTHONHASHSEED": ("0", "1", "random", "4294967295"),
    "PYTHONIOENCODING": ("ascii", "latin-1", "utf-16", "ascii:strict", "utf-8:surrogateescape"),
    "PYTHONUTF8": ("0", "1"),
    "PYTHONWARNINGS": ("always", "x", "default::DeprecationWarning"),
    "PYTHONOPTIMIZE": ("1", "2"),
    "PYTHONSAFEPATH": ("1", ""),
    "PYTHONUNBUFFERED": ("1",),
    "PYTHONNOUSERSITE": ("1", ""),
    "PYTHONDONTWRITEBYTECODE": ("1",),
}


def environments(rng: random.Random, folder: Path) -> None:
    """Variables that hpo, MLflow and the terminal read while a command runs."""
    _run_in(rng, folder, {name: (*right, *_ODD) for name, right in _READ_BY_US.items()}, is_cold=False)


def starts(rng: random.Random, folder: Path) -> None:
    """Variables that Python, OpenMP, CUDA and the locale read when a process starts."""
    values = {name: (*right, *_ODD) for name, right in _READ_AT_THE_START.items()}
    _run_in(rng, folder, values | _READ_BY_PYTHON, is_cold=True)


def _run_in(rng: random.Random, folder: Path, values: Mapping[str, Sequence[str]], *, is_cold: bool) -> None:
    names = rng.sample(list(values), rng.choice((1, 1, 2, 3)))
    given = {name: rng.choice(values[name]) for name in names}
    looks = ("show digits", "best digits", "studies", "space digits", "tasks", "show digits --json", "report digits")
    searches = (f"search digits --trials {NUM_TRIALS + 1}", "search digits --trials 1 --epochs 1 --study new")
    command = rng.choice(searches if rng.random() < (0.2 if is_cold else 0.5) else looks)
    copy_home(_searched_home(), folder / "home")
    long = folder / ("t" * 200)
    long.mkdir()
    given = {name: str(long) if value == "LONG" else value for name, value in given.items()}
    try:
        ask(command.split(), folder, given=given, is_cold=is_cold)
    except AssertionError as error:
        raise AssertionError(f"{given}: {error}") from None
    finally:
        _assert_nothing_is_half_done(folder / "home" / "optuna.db")
