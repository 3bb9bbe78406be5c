"""What a container may use, on Linux with both versions of control groups, and what macOS and Windows lack."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from helpers import warm
from helpers.searches import Searches, tmpfs

from hpo import machine
from hpo.errors import StoreError, UsageError
from hpo.execution.local import process_context
from hpo.files import allocate, temporary_folder, temporary_folder_for_sockets
from hpo.tracking import owners

VISIBLE = 64


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container on a host of 64 cores and 8 GB; its files say what it may use."""
    monkeypatch.setattr(machine, "_PROCESS", tmp_path)
    monkeypatch.setattr(machine, "_VMSTAT", tmp_path / "vmstat")
    monkeypatch.setattr(machine, "_num_visible_cores", lambda: VISIBLE)
    monkeypatch.setattr(machine, "_physical_memory", lambda: 8_000_000_000)
    return tmp_path


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def second_version(root: Path, group: str = "/") -> None:
    write(root, cgroup=f"0::{group}\n")
    write(root, mountinfo=f"30 23 0:28 / {root}/fs rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n")


def first_version(root: Path, group: str, mounted: str = "/") -> None:
    write(root, cgroup=f"4:memory:{group}\n3:cpu,cpuacct:{group}\n0::/\n")
    lines = [
        f"31 23 0:2{number} {mounted} {root}/fs/{name} rw - cgroup cgroup rw,{name}"
        for number, name in enumerate(("memory", "cpu,cpuacct"))
    ]
    write(root, mountinfo="\n".join(lines))


@pytest.mark.parametrize(
    ("quota", "cores"), [("200000 100000", 2), ("150000 100000", 2), ("5000 100000", 1), ("max 100000", VISIBLE)]
)
def test_the_cores_are_those_of_the_quota(root: Path, quota: str, cores: int) -> None:
    second_version(root)
    write(root / "fs", cpu__max=f"{quota}\n")
    assert machine.num_cores() == cores
    assert machine.has_cpu_quota() == (cores < VISIBLE)


def test_limits_of_the_groups_above_count_too(root: Path) -> None:
    second_version(root, "/user.slice/job.scope")
    write(root / "fs" / "user.slice", cpu__max="400000 100000\n", memory__max="3000000000\n")
    write(root / "fs" / "user.slice" / "job.scope", cpu__max="max 100000\n", memory__max="max\n")
    assert machine.num_cores() == 4
    assert machine.memory_bytes() == 3_000_000_000


@pytest.mark.parametrize("mounted", ["/", "/docker/abc"])
def test_the_first_version_of_control_groups_is_read(root: Path, mounted: str) -> None:
    first_version(root, "/docker/abc", mounted)
    below = Path("docker/abc") if mounted == "/" else Path()
    write(root / "fs" / "cpu,cpuacct" / below, cpu__cfs_quota_us="300000\n", cpu__cfs_period_us="100000\n")
    write(root / "fs" / "memory" / below, memory__limit_in_bytes="2000000000\n", memory__oom_control="oom_kill 7\n")
    assert machine.num_cores() == 3
    assert machine.memory_bytes() == 2_000_000_000
    assert machine.num_oom_kills() == 7


def test_no_limit_is_the_host(root: Path) -> None:
    first_version(root, "/")
    write(root / "fs" / "cpu,cpuacct", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="100000\n")
    write(root / "fs" / "memory", memory__limit_in_bytes=f"{2**63 - 4096}\n")
    assert (machine.num_cores(), machine.memory_bytes()) == (VISIBLE, 8_000_000_000)
    write(root, vmstat="nr_free_pages 1\noom_kill 5\n")
    assert machine.num_oom_kills() == 5


def test_a_machine_without_proc_has_its_cores(root: Path) -> None:
    assert (machine.num_cores(), machine.memory_bytes(), machine.num_oom_kills()) == (VISIBLE, 8_000_000_000, 0)


@pytest.mark.parametrize("limits", [{"cpu": "cpu.cfs_quota_us"}, {"memory": "memory.limit_in_bytes"}])
def test_a_real_quota_is_seen(limits: dict[str, str]) -> None:
    [(controller, name)] = limits.items()
    group = Path("/sys/fs/cgroup") / controller / f"hpo-test-{os.getpid()}"
    if not (group.parent / name.replace("limit", "usage").replace("cfs_quota_us", "shares")).exists():
        pytest.skip(f"NOT SHOWN: this machine has no {controller} groups of version 1; files stand for them above")
    group.mkdir()
    try:
        (group / name).write_text("100000" if controller == "cpu" else str(2**30))
        code = "import os, sys; open(sys.argv[1], 'w').write(str(os.getpid())); from hpo import machine"
        code += "; print(machine.num_cores(), machine.memory_bytes())"
        answer = subprocess.run(
            [sys.executable, "-c", code, str(group / "cgroup.procs")], capture_output=True, text=True, check=True
        ).stdout.split()
    finally:
        group.rmdir()
    assert answer[["cpu", "memory"].index(controller)] == ("1" if controller == "cpu" else str(2**30))


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/ann/mlruns", "nfs4"), ("/home", "ext4"), ("/my disk/home", "cifs"), ("/home/anna", "ext4")],
)
def test_the_file_system_is_that_of_the_innermost_mount(root: Path, path: str, kind: str) -> None:
    lines = [
        "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw",
        "28 27 0:40 / /home/ann rw - nfs4 server:/export rw,vers=4.2",
        r"29 27 0:41 / /my\040disk rw - cifs //server/share rw",
    ]
    write(root, mountinfo="\n".join(lines))
    assert machine.file_system(Path(path)) == kind


# --- other systems ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Python has on macOS: no affinity, no /proc, and the commands of BSD."""
    monkeypatch.setattr(sys, "platform", "darwin")
    for name in ("sched_getaffinity", "posix_fallocate"):
        monkeypatch.delattr(os, name)
    monkeypatch.setattr(machine, "_PROCESS", tmp_path / "nothing")
    monkeypatch.setattr(machine, "_VMSTAT", tmp_path / "nothing")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    commands = tmp_path / "bin"
    commands.mkdir()
    scripts = {
        "sysctl": "echo 17179869184",
        "mount": "echo '/dev/disk3s1 on / (apfs, local)'; echo 'server:/export on /Volumes/my home (nfs, nodev)'",
    }
    for name, body in scripts.items():
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    return tmp_path


def test_a_mac_says_what_it_has(mac: Path) -> None:
    assert (machine.num_cores(), machine.has_cpu_quota(), machine.memory_bytes()) == (8, False, 2**34)
    assert machine.num_oom_kills() == 0
    assert machine.file_system(Path("/Volumes/my home/mlruns")) == "nfs"
    assert machine.file_system(Path("/Users/ann")) == "apfs"


def test_a_search_on_a_mac_spawns_its_workers(searches: Searches, mac: Path) -> None:
    """Everything but the worker itself runs as there; it is a process of its own, which sees this machine."""
    outcome = searches.run(trials=1, epochs=1)
    assert outcome.counts["complete"] == 1
    assert not isinstance(process_context(), ForkServerContext)
    searches.assert_nothing_is_left()


def test_a_process_is_known_by_its_start_where_there_is_no_proc(mac: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        tag = owners._process_tag(process.pid)
        assert tag.startswith(f"{socket.gethostname()}/{process.pid}/")
        assert not owners._is_dead(tag)
        process.kill()
    assert owners._is_dead(tag)


def test_room_for_a_file_is_reserved_without_the_call_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    with (tmp_path / "disk").open("w+b") as file:
        allocate(file.fileno(), 3 * 2**20 + 5)
        assert os.fstat(file.fileno()).st_size == 3 * 2**20 + 5
        assert os.fstat(file.fileno()).st_blocks * 512 >= 3 * 2**20
    small = tmp_path / "small"
    with tmpfs(small, "size=1m"), (small / "file").open("w+b") as file, pytest.raises(OSError, match="No space left"):
        allocate(file.fileno(), 3 * 2**20)


# --- temporary folders, and what is not UTF-8 ------------------------------------------------------------------------


def test_a_long_temporary_folder_does_not_keep_the_workers_server_from_listening(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 120)
    long.mkdir()
    code = """
import tempfile
from multiprocessing import forkserver
from hpo.files import temporary_folder_for_sockets
with temporary_folder_for_sockets():
    forkserver.ensure_running()
assert len(tempfile.gettempdir()) > 100
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"TMPDIR": str(long)}, capture_output=True, text=True
    )
    assert (answer.returncode, answer.stderr) == (0, "")


def test_no_temporary_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/nowhere', '/tmp']")

    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr("tempfile.gettempdir", nowhere)
    expected = r"there is no temporary folder that can be written \(TMPDIR=/nowhere\); set TMPDIR to a folder that can"
    for ask in (temporary_folder, temporary_folder_for_sockets().__enter__):
        with pytest.raises(StoreError, match=expected):
            ask()


def test_what_a_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sign that its encoding lacks, and a file name that is not UTF-8."""
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="ascii"))
    machine.escape_what_streams_lack()
    print("\u2248 0.97 caf\udce9", flush=True)
    assert written.getvalue() == b"\\u2248 0.97 caf\\udce9\n"


@pytest.mark.parametrize("settings", ["x", "a:1,x", "a:b:c", "a\nb"])
def test_settings_that_would_end_torch_are_refused_before_it_is_imported(settings: str) -> None:
    finished = warm.run([sys.executable, "-m", "hpo", "tasks"], env={**os.environ, "PYTORCH_ALLOC_CONF": settings})
    assert finished.stderr.startswith(f"Error: torch cannot read PYTORCH_ALLOC_CONF={settings!r}: give NAME:VALUE")
    assert finished.returncode == 2


def test_settings_that_torch_can_read_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, roundup_power2_divisions:[256:1,512:2],")
    machine.require_readable_allocator_settings()


def test_a_backend_that_matplotlib_does_not_know_stops_no_command() -> None:
    code = "import sys; from hpo.cli import main; sys.argv = ['hpo', '-V']\ntry: main()\nfinally: import matplotlib"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "MPLBACKEND": "true"}, check=True)


def test_windows_is_told_of_wsl(monkeypatch: pytest.MonkeyPatch) -> None:
    machine.require_supported_system()
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(UsageError, match=r"hpo runs on Linux and macOS; on Windows use WSL: run `wsl --install`"):
        machine.require_supported_system()
