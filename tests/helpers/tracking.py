"""A store of MLflow, and the runs of a study in it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers.warm import WarmPopen
from hpo.config import Direction
from hpo.tracking.runs import StudyRuns
from hpo.tracking.store import TrackingStore, open_store


@pytest.fixture
def store(home: Path) -> TrackingStore:
    return open_store(home)


@pytest.fixture
def runs(store: TrackingStore) -> Iterator[StudyRuns]:
    with open_runs(store) as runs:
        yield runs


def open_runs(store: TrackingStore, *, is_shared: bool = True) -> StudyRuns:
    maximize, session = Direction.MAXIMIZE, uuid4().hex
    return StudyRuns(store, "digits", metric="accuracy", direction=maximize, session=session, is_shared=is_shared)


class BrokenClient:
    """The store's client, which refuses all writing while `broken`, as when a server is away."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.broken = False

    def __getattr__(self, name: str) -> Any:
        if self.broken:
            raise ConnectionError("connection refused")
        return getattr(self._client, name)


def find_trial(store: TrackingStore, number: int) -> Any:
    return store.client.get_run(store.find_trial_run("digits", number))


def curve(store: TrackingStore, number: int, key: str = "val/accuracy") -> list[tuple[int, float]]:
    history = store.client.get_metric_history(store.find_trial_run("digits", number), key)
    return sorted((row.step, row.value) for row in history)


def spooled(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "spool" / "digits").glob("*/*"))


def run_python(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A process of its own that runs this code; `import_all` of the room stands above it."""
    prelude = "import os, sys, time\nfrom pathlib import Path\nfrom hpo.config import Direction\n"
    prelude += "from hpo.tracking.runs import StudyRuns\n"
    prelude += "from hpo.tracking.store import open_store\nhome = Path(sys.argv[1])\n"
    return WarmPopen(
        [sys.executable, "-c", prelude + code, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
