"""Executors by name: each starts a pool of workers from what the session may use.

`local` and `ray` come with hpo. Others are entry points in the group `hpo.executors`, or module:factory: a factory
takes `setup` (a Setup) and `resources` (a Resources), and returns a WorkerPool.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.errors import UsageError
from hpo.execution.pool import WorkerPool
from hpo.extensions import EXECUTORS as GROUP
from hpo.extensions import call, find_factory

if TYPE_CHECKING:
    from hpo.execution.messages import Setup


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a session may use."""

    num_workers: int | None
    """Workers at a time; None for as many as there is room for."""
    device: str
    """Device of this machine as torch names it, for workers that run here."""
    address: str | None
    """Address of a cluster, as it was given."""
    gpus_per_trial: float | None
    """GPUs of each worker, a part of one or several; None for what the executor chooses."""


def _local(setup: Setup, resources: Resources) -> WorkerPool:
    from hpo.execution.local import local_workers

    return local_workers(
        setup,
        num_workers=resources.num_workers,
        device=resources.device,
        gpus_per_trial=resources.gpus_per_trial,
    )


def _ray(setup: Setup, resources: Resources) -> WorkerPool:
    from hpo.execution.ray import ray_workers

    return ray_workers(
        setup,
        num_workers=resources.num_workers,
        address=resources.address or "auto",
        gpus_per_trial=resources.gpus_per_trial or 0.0,
    )


_BUILT_IN: dict[str, Callable[[Setup, Resources], WorkerPool]] = {"local": _local, "ray": _ray}


def check_executor(name: str) -> None:
    """Raise UnknownNameError, or UsageError, where there is no such executor on this machine."""
    if name not in _BUILT_IN:
        find_factory(GROUP, name, [*_BUILT_IN])


def start_workers(name: str, setup: Setup, resources: Resources) -> WorkerPool:
    """The workers of an executor. Raises UsageError if it cannot give any."""
    if name in _BUILT_IN:
        return _BUILT_IN[name](setup, resources)
    pool = call(find_factory(GROUP, name, [*_BUILT_IN]), {"setup": setup, "resources": resources})
    if not isinstance(pool, WorkerPool):
        raise UsageError(f"--executor {name} made a {type(pool).__name__}, not a WorkerPool.")
    return pool
