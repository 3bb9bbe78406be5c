"""Fixtures that several rooms' tests share."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: threads of several test processes would wait for each other, spinning.
os.environ["OMP_NUM_THREADS"] = "1"

# The tests start many Python processes, each of which would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import hypothesis
import pytest
import torch

from hpo.execution import local
from hpo.machine import num_cores
from hpo.session import conclude
from hpo.tracking.store import open_store
from hpo.training.compiled import OLDEST_CAPTURING, OLDEST_TRACING, can_capture, can_trace

pytest.register_assert_rewrite("helpers")  # before any of them is imported

from helpers.homes import copy_database  # noqa: E402
from helpers.postgres import Postgres, running_postgres  # noqa: E402

# Workers import the file of their task, here a test file: what that imports, the server they are forked from has.
local._PRELOADED += ["hpo.session.search", "hypothesis", "pandas", "pytest", "sklearn.datasets"]

pytest_plugins = ["helpers.studies", "helpers.tracking", "helpers.searches", "helpers.moody", "helpers.databases"]

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# A script that starts the tests in the background lets them ignore Ctrl-C, `nohup` a closed terminal, and with them all
# that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    # MLflow 3.17 uses a loader strategy that SQLAlchemy 2.1 deprecates: a warning when its tables are imported.
    config.addinivalue_line("filterwarnings", "ignore:The ``noload`` loader strategy:DeprecationWarning")
    # torch 2.9 warns of its own way to read a .pt2 file, and 2.15 that Python 3.13.0 slows compiled functions down.
    config.addinivalue_line("filterwarnings", "ignore:The given buffer is not writable:UserWarning")
    config.addinivalue_line("filterwarnings", "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
    if config.getoption("numprocesses", None):
        config.option.dist = "loadgroup"  # tests that share a cluster or servers run in one process
    if hasattr(config, "workerinput"):  # one of xdist's processes, which do not hear of that
        config.option.loadgroup = True


def pytest_xdist_auto_num_workers() -> int:
    """What `-n auto` means: two more than there are cores, because many tests wait for processes and servers."""
    return num_cores() + 2


@pytest.fixture(scope="session")
def mlflow_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty mlflow.db: creating its schema costs seconds, copying it costs none. One for all xdist workers."""
    base = tmp_path_factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "mlflow-template"
    open_store(home, tracking_uri=f"sqlite:///{home / 'mlflow.db'}")
    return home / "mlflow.db"


@pytest.fixture
def home(tmp_path: Path, mlflow_template: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with an empty MLflow store, and no environment that points elsewhere."""
    for name in ("MLFLOW_TRACKING_URI", "HPO_HOME"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    copy_database(mlflow_template, home / "mlflow.db")
    return home


@pytest.fixture(autouse=True)
def _figures_are_drawn_where_they_are_looked_at(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawing them takes half of the time of a short search."""
    if not request.node.get_closest_marker("figures"):
        monkeypatch.setattr(conclude, "draw_figures", lambda *_: {})
        monkeypatch.setattr(conclude, "log_report", lambda *_: None)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL, one for each process that runs tests; whoever kills it starts it again."""
    with running_postgres("fsync=off") as server:
        yield server


# What a test needs from the machine, by its marker.
NEEDS = {
    "real_data": (bool(os.environ.get("HPO_DATA_DIR")), "HPO_DATA_DIR with the real data sets"),
    "gpu": (torch.cuda.is_available(), "a CUDA device"),
    "compiled_step": (can_trace(), f"torch {OLDEST_TRACING} or later, which can compile a whole step"),
    "captured_step": (can_capture(), f"torch {OLDEST_CAPTURING} or later, which can give up the capture of a step"),
    "pretended_gpu": (
        not torch.cuda.is_available() and hasattr(torch._C, "_ensureCUDADeviceGuardSet"),
        "a machine without a GPU, where those marked 'gpu' run instead, and a torch that can pretend one",
    ),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the machine cannot run; the summary says so."""
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in _missing())]
    config.hook.pytest_deselected(items=left_out)
    left = [item for item in items if item not in left_out]
    # What runs in one process begins first, so that nothing waits for it at the end.
    items[:] = sorted(left, key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in _missing():
        terminalreporter.write_line(f"Left out: the tests marked '{name}', which need {NEEDS[name][1]}.", yellow=True)


def _missing() -> list[str]:
    return [name for name, (is_there, _) in NEEDS.items() if not is_there]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def real_data_dir() -> Path:
    """Where the real data sets lie."""
    return Path(os.environ["HPO_DATA_DIR"])
