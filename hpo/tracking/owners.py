"""Which process a run of its own belongs to: a check or a training that is killed cannot end its run itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.machine import process_host
from hpo.tracking.store import explained, search_runs

if TYPE_CHECKING:
    from mlflow.entities import Run

    from hpo.tracking.store import TrackingStore

PROCESS_TAG = "hpo.process"
"""The process's host, its id there, and its start: in ticks since the host's on Linux, else its date."""


def this_process() -> str:
    """The value of `PROCESS_TAG` for runs of this process."""
    return _process_tag(os.getpid())


def has_owner(run: Run) -> bool:
    """Whether a run belongs to one process, and not to a session of a study."""
    return PROCESS_TAG in run.data.tags


def end_dead_runs(store: TrackingStore, experiment_id: str) -> None:
    """End as KILLED what processes of this host that are gone have left RUNNING in an experiment."""
    with explained(store.uri):
        for run in search_runs(store.client, experiment_id, "attributes.status = 'RUNNING'"):
            if _is_dead(run.data.tags.get(PROCESS_TAG, "")):
                store.set_tags(run.info.run_id, {"hpo.state": "interrupted"})
                store.client.set_terminated(run.info.run_id, "KILLED")


def _is_dead(tag: str) -> bool:
    host, pid, _ = tag.split("/") if tag.count("/") == 2 else ("", "", "")
    return host == process_host() and _process_tag(int(pid)) != tag


def _process_tag(pid: int) -> str:
    begun = _start_on_linux(pid) if sys.platform == "linux" else _start_by_ps(pid)
    return f"{process_host()}/{pid}/{begun}" if begun else ""


def _start_on_linux(pid: int) -> str:
    """When a process began; "" for one that is gone or a zombie."""
    try:
        # The name, in parentheses, may contain anything; proc(5) has the fields.
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state == "Z" else fields[18]


def _start_by_ps(pid: int) -> str:
    command = ["ps", "-o", "state=,lstart=", "-p", str(pid)]
    state, _, begun = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().partition(" ")
    return "" if state.startswith("Z") else "-".join(begun.split())
