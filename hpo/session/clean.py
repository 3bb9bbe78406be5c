"""What a study keeps on disk: the weights of its best trials, and nothing that dead searches have left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.deploy.load import find_runs
from hpo.execution.worker import BEST_WEIGHTS, CHECKPOINT
from hpo.home import find_home, find_storage, require_home, require_own_files
from hpo.records import ranked
from hpo.search.lease import living_sessions
from hpo.search.priority import DEFAULT_CONFIGURATION
from hpo.search.storage import read_storage
from hpo.search.study import Study
from hpo.tracking.store import open_store

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from hpo.tracking.store import TrackingStore


@dataclass(frozen=True)
class _Leftover:
    what: str
    num_bytes: int
    remove: Callable[[], None]


def clean_study(
    study: str,
    *,
    keep: int,
    dry_run: bool,
    home: Path | None = None,
    storage: str | None = None,
    tracking_uri: str | None = None,
) -> dict[str, Any]:
    """Remove the weights of all but the `keep` best trials, and files in the home that no trial will ever read.

    Checkpoints of trials that run, or can go on, stay. Gives what was removed, or would be in a `dry_run`, with its
    size in bytes. May run while the study is searched.
    """
    folder = require_home(find_home(home))
    database = read_storage(folder, find_storage(storage))
    opened = Study.load(database, study)
    store = open_store(folder, find_runs(opened, folder, tracking_uri, is_shared=find_storage(storage) is not None))
    require_own_files(folder, study, storage=find_storage(storage))
    leftovers = [*_weak_weights(store, opened, keep), *_orphaned_files(folder, opened, database)]
    if not dry_run:
        for leftover in leftovers:
            leftover.remove()
    removed = [{"what": leftover.what, "bytes": leftover.num_bytes} for leftover in leftovers]
    return {"study": study, "keep": keep, "dry_run": dry_run, "removed": removed}


def _weak_weights(store: TrackingStore, study: Study, keep: int) -> Iterator[_Leftover]:
    path = f"{CHECKPOINT}/{BEST_WEIGHTS}"
    front = {trial.number for trial in study.front()} if study.settings.costs else set()
    for trial in ranked(study.trials(), study.settings.direction)[keep:]:
        if trial.number in front or trial.stage == DEFAULT_CONFIGURATION:
            continue
        run = store.find_trial_run(study.name, trial.number, study.id)
        size = store.file_sizes(run, CHECKPOINT).get(path)
        if size is not None:
            yield _Leftover(f"weights of trial {trial.number}", size, partial(store.remove_file, run, path))


def _orphaned_files(home: Path, study: Study, database: BaseStorage) -> Iterator[_Leftover]:
    splits = sorted((home / "splits" / study.name).glob("*.pt"))  # before the sessions: those that begin are spared
    living = {session.id for session in living_sessions(database, study.name)}
    may_go_on = {trial.number for trial in study.finalists()}
    spools = home / "spool" / study.name
    for folder in sorted((home / "checkpoints" / study.name).glob("trial-[0-9]*")):
        number = int(folder.name.removeprefix("trial-").partition(".")[0])
        is_on_its_way = any(spools.glob(f"*/trial-{number:04d}.jsonl"))  # the next search sends it to MLflow first
        if number not in may_go_on and study.has_ended(number) and not is_on_its_way:
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            yield _Leftover(f"checkpoints of trial {number}", size, partial(shutil.rmtree, folder, ignore_errors=True))
    for file in splits:
        if file.stem not in living:
            yield _Leftover("data of a search that died", file.stat().st_size, partial(file.unlink, missing_ok=True))
