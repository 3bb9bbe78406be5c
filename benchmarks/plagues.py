"""What benchmarks/chaos.py does to a search besides killing: a network that is cut, a clock that jumps, a full disk.

Each plague is a context in which a search is started by `command` with `environment`, and strikes until it relents.
"""

from __future__ import annotations

import os
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests"))

from helpers.machines import Machine, Network, machines_and_servers
from helpers.postgres import running_postgres

from hpo.tracking.server import running_server
from hpo.tracking.store import open_store

MLFLOW_PORT = 5187


class Plague(ABC):
    """Something that goes wrong for a while, again and again."""

    command: Sequence[str] = ()
    """What the search's command begins with."""

    environment: dict[str, str]
    """What the search's environment has besides."""

    may_end_the_search = False
    """Whether the search may end with an error meanwhile; the same command then continues it."""

    def __init__(self) -> None:
        self.environment = {}

    @abstractmethod
    def strike(self) -> None: ...

    @abstractmethod
    def relent(self) -> None: ...


class CutNetwork(Plague):
    """The search's machine, a network namespace, loses its link to PostgreSQL and MLflow."""

    def __init__(self, network: Network, stores: tuple[str, str]) -> None:
        super().__init__()
        self._machine: Machine = network.machines["victim"]
        assert self._machine.namespace, "checked when it was made"
        self.command = ("ip", "netns", "exec", self._machine.namespace)
        self.stores = stores
        """Addresses of a PostgreSQL database and of an MLflow server."""

    def strike(self) -> None:
        self._link("down")

    def relent(self) -> None:
        self._link("up")

    def _link(self, state: str) -> None:
        subprocess.run(["ip", "-n", str(self._machine.namespace), "link", "set", "eth0", state], check=True)


class JumpingClock(Plague):
    """The wall clock of all the search's processes jumps an hour ahead and back, by libfaketime."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        found = find_spec("libfaketime")
        if found is None or found.origin is None:
            sys.exit("the clock is turned by libfaketime: run with `uv run --with libfaketime`")
        library = Path(found.origin).parent / "vendor" / "libfaketime" / "src" / "libfaketime.so.1"
        self._offset = folder / "offset"
        self.relent()
        self.environment = {
            "LD_PRELOAD": str(library),
            "FAKETIME_TIMESTAMP_FILE": str(self._offset),
            "FAKETIME_CACHE_DURATION": "1",  # seconds between looks at the file
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def strike(self) -> None:
        self._turn("+1h")

    def relent(self) -> None:
        self._turn("+0")

    def _turn(self, offset: str) -> None:
        new = self._offset.with_suffix(".new")  # a reader never sees half of it
        new.write_text(offset)
        new.replace(self._offset)


class FullDisk(Plague):
    """A file takes all the room that the home's file system has left."""

    may_end_the_search = True

    def __init__(self, home: Path) -> None:
        super().__init__()
        self._ballast = home.parent / "ballast"

    def strike(self) -> None:
        with self._ballast.open("wb", buffering=0) as file, suppress(OSError):  # until there is no room left
            while True:
                file.write(bytes(2**20))

    def relent(self) -> None:
        self._ballast.unlink(missing_ok=True)


@contextmanager
def network_plague(folder: Path) -> Iterator[CutNetwork]:
    """With a PostgreSQL and an MLflow server of its own on this side of the link."""
    with machines_and_servers("victim") as network:
        if network.refusal:
            sys.exit(f"the network cannot be cut: {network.refusal}")
        listening = f"listen_addresses=127.0.0.1,{network.address}"
        away = folder / "away"
        os.environ["MLFLOW_SERVER_ALLOWED_HOSTS"] = f"{network.address}:{MLFLOW_PORT}"  # else it takes the loopback's
        with (
            running_postgres("fsync=off", listening) as postgres,
            running_server(open_store(away), host=network.address, port=MLFLOW_PORT),
        ):
            postgres.let_in(f"{network.address}/24")
            storage = postgres.new_database().replace("@127.0.0.1", f"@{network.address}")
            yield CutNetwork(network, (storage, f"http://{network.address}:{MLFLOW_PORT}"))


@contextmanager
def disk_plague(home: Path, size: str = "300m") -> Iterator[FullDisk]:
    """The home's parent folder becomes a small file system."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", home.parent], check=True)
    try:
        home.mkdir()
        yield FullDisk(home)
    finally:
        subprocess.run(["umount", "--lazy", home.parent], check=True)
