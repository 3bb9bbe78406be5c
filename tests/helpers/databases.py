"""Databases of studies, empty for each test, and other coordinators' processes over them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.postgres import Postgres
from helpers.warm import WarmPopen
from hpo.search.storage import StudyStorage, open_storage

TIMEOUT_S = 60


@pytest.fixture(scope="module")
def database(postgres: Postgres) -> str:
    """The address of the database that these tests use, one after the other."""
    return postgres.new_database()


@pytest.fixture
def url(database: str, postgres: Postgres) -> str:
    """The address of a database, which is empty now: making one for each test costs a thousand files."""
    with postgres.connect(database.rpartition("/")[2]) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return database


@pytest.fixture(params=["sqlite", "postgresql"])
def either_storage(request: pytest.FixtureRequest, tmp_path: Path) -> StudyStorage:
    """An empty storage, of either kind."""
    return open_storage(tmp_path, request.getfixturevalue("url") if request.param == "postgresql" else None)  # type: ignore[return-value]


@pytest.fixture
def shared(tmp_path: Path, url: str) -> StudyStorage:
    """An empty storage in PostgreSQL."""
    return open_storage(tmp_path, url)  # type: ignore[return-value]


def wait_until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.05)


class Process:
    """Another coordinator's process: Python code with a `storage`, that reads lines and prints answers."""

    def __init__(self, url: str, code: str, *args: object) -> None:
        opening = "import sys\nfrom pathlib import Path\nfrom hpo.search.lease import Session\n"
        opening += "from hpo.search.storage import open_storage\nstorage = open_storage(Path(), sys.argv[1])\n"
        self.process = WarmPopen(
            [sys.executable, "-c", opening + code, url, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        )

    def answer(self, line: str | None = None) -> str:
        """The next line that it prints, after it was sent one."""
        if line is not None:
            print(line, file=self.process.stdin, flush=True)
        return self.process.stdout.readline().strip()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def finish(self) -> str:
        """Wait for its end, which must be without an error; what it wrote to stderr."""
        _, err = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, err
        return err


@pytest.fixture
def start(url: str) -> Iterator[Callable[..., Process]]:
    """Start processes over the database; none outlives the test."""
    processes = []

    def start_one(code: str, *args: object) -> Process:
        processes.append(Process(url, code, *args))
        return processes[-1]

    yield start_one
    for process in processes:
        process.process.kill()
        process.process.communicate()
