"""What this machine lets a process use: cores, memory, signs on a terminal, and what kind of disk a folder is on.

A container sees the cores and the memory of its host; what it may use is in its control groups, version 1 or 2
(https://docs.kernel.org/admin-guide/cgroup-v2.html).
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from types import FrameType

from hpo.errors import UsageError

_PROCESS = Path("/proc/self")
_VMSTAT = Path("/proc/vmstat")
STOP_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What asks a process to stop: Ctrl-C, a service or a batch system, and a terminal that is closed; not on Windows."""

_FIRST_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h


def require_supported_system() -> None:
    """Raise UsageError on Windows, where processes, locks and signals work otherwise."""
    if sys.platform == "win32":
        raise UsageError(
            "hpo runs on Linux and macOS; on Windows use WSL: run `wsl --install`, then install hpo in there "
            "(https://learn.microsoft.com/windows/wsl/install)."
        )


def require_readable_allocator_settings() -> None:
    """Raise UsageError for settings of its allocator with which torch 2.15 ends the process that imports it."""
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        given = os.environ.get(name, "")
        settings = re.sub(r"\[[^]]*\]", "", given).split(",")
        if any(setting.strip() and setting.count(":") != 1 for setting in settings):
            raise UsageError(
                f"torch cannot read {name}={given[:100]!r}: give NAME:VALUE, such as max_split_size_mb:128, "
                "or unset it."
            )


def open_closed_streams() -> None:
    """Give a command that was started with `>&-` somewhere to write: its next file would become its stdout."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free


def hear_stop_signals() -> None:
    """Let all signals to stop do what Ctrl-C does, so that everything that is open is closed; `nohup` ignores one."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    leave_closed_terminal(number)
    raise KeyboardInterrupt


def leave_closed_terminal(number: int) -> None:
    """After a signal that the terminal was closed, let what is still written go nowhere: writing there would fail.

    What comes from the terminal's end once more is not a second request: a shell sends SIGHUP, and then the kernel.
    """
    if signal.Signals(number).name != "SIGHUP":
        return
    signal.signal(number, signal.SIG_IGN)
    for descriptor in range(3):
        with suppress(OSError):  # a descriptor that is closed
            is_lost = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
            if not is_lost:
                continue
            nowhere = os.open(os.devnull, os.O_RDWR)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def escape_what_streams_lack() -> None:
    """Let a terminal or a pipe that is not UTF-8 show \\u2248 for a sign that it does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def num_cores() -> int:
    """CPU cores that this process may use: those that it may run on, or the fewer that a container's quota is worth."""
    quotas = [math.ceil(quota) for folder in _control_groups("cpu") if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([_num_visible_cores(), *quotas]))


def has_cpu_quota() -> bool:
    """Whether a container's quota allows fewer cores than this process sees."""
    return num_cores() < _num_visible_cores()


def _num_visible_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(folder: Path) -> float | None:
    """Cores' worth of time that a control group may use; None for no limit."""
    if words := _read(folder / "cpu.max").split():
        quota, period = words
    else:
        quota, period = _read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()
    return int(quota) / int(period) if quota.isdecimal() and period.isdecimal() else None  # "max" and -1: no limit


def memory_bytes() -> int:
    """Memory that this process and the others of its container may use, in bytes."""
    limits = [
        int(limit)
        for folder in _control_groups("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _read(folder / name).strip()).isdecimal()
    ]
    return min([_physical_memory(), *limits])


def _physical_memory() -> int:
    if sys.platform == "darwin":
        return int(subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, text=True, check=True).stdout)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def num_oom_kills() -> int:
    """Processes killed because memory ran out, in this container or on this machine; 0 if unknown."""
    files = [folder / name for folder in _control_groups("memory") for name in ("memory.events", "memory.oom_control")]
    for file in (*files, _VMSTAT):
        for line in _read(file).splitlines():
            name, _, count = line.partition(" ")
            if name == "oom_kill":
                return int(count)
    return 0


def _control_groups(controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of those that it is in, the innermost first."""
    groups = [line.split(":", 2) for line in _read(_PROCESS / "cgroup").splitlines()]
    for root, mount_point, kind, options in _mounts():
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and controller not in options.split(",")):
            continue
        wanted = controller if kind == "cgroup" else ""
        for group in (path for _, controllers, path in groups if wanted in controllers.split(",")):
            inside = Path(group).relative_to(root) if Path(group).is_relative_to(root) else Path()
            folder = mount_point / inside
            yield folder
            yield from (above for above in folder.parents if above.is_relative_to(mount_point))


def process_host() -> str:
    """Where a process id means the same process as here: this host's name, in a container "HOST@NAMESPACE".

    Containers that share the host's network share its name, too, and do not see each other's processes.
    """
    try:
        namespace = (_PROCESS / "ns" / "pid").readlink().name
    except OSError:  # not Linux, or a container that hides it
        namespace = _FIRST_NAMESPACE
    within = "" if namespace == _FIRST_NAMESPACE else "@" + re.sub(r"\D", "", namespace)
    return socket.gethostname() + within


def file_system(path: Path) -> str:
    """Type of the file system that a path is on, such as ext4 or nfs4; "" if this machine does not say."""
    path = path.resolve()
    if sys.platform == "darwin":
        return _file_system_of_bsd(path)
    found = max(
        ((len(mount_point.parts), order, kind) for order, (_, mount_point, kind, _) in enumerate(_mounts())
         if path.is_relative_to(mount_point)),
        default=(0, 0, ""),
    )  # fmt: skip
    return found[2]


def _file_system_of_bsd(path: Path) -> str:
    """The same by the lines of `mount`: `server:/export on /Volumes/home (nfs, nodev, ...)`."""
    listed = subprocess.run(["mount"], capture_output=True, text=True, check=False).stdout
    found = (0, "")
    for line in listed.splitlines():
        mounted, _, options = line.rpartition(" (")
        mount_point = Path(mounted.partition(" on ")[2])
        if path.is_relative_to(mount_point):
            found = max(found, (len(mount_point.parts), options.partition(",")[0].rstrip(")")))
    return found[1]


def _mounts() -> Iterator[tuple[str, Path, str, str]]:
    """Root within its file system, mount point, type and options of every mount, as proc(5) lists them."""
    for line in _read(_PROCESS / "mountinfo").splitlines():
        mount, _, system = line.partition(" - ")
        root, mount_point = mount.split(" ")[3:5]
        kind, _, options = system.split(" ")[:3]
        yield _unescaped(root), Path(_unescaped(mount_point)), kind, options


def _unescaped(path: str) -> str:
    for code, character in ((r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", "\\")):
        path = path.replace(code, character)
    return path


def _read(path: Path) -> str:
    """The text of a file of the kernel; "" where it has none of that name."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
