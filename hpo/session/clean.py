"""`hpo gc`: delete the weights of all but the best trials, and the files that sessions which died have left."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.deploy.load import find_runs
from hpo.execution.retention import BestTrials, without_use_for_checkpoints
from hpo.files import size_of
from hpo.home import Home, find_storage
from hpo.search.lease import living_sessions
from hpo.search.storage import read_storage
from hpo.search.study import Study
from hpo.tracking.store import open_store
from hpo.training.trained import BEST_WEIGHTS, CHECKPOINT

if TYPE_CHECKING:
    from collections.abc import Collection

    from hpo.home import StudyFiles
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

    Checkpoints of trials that run, or can be resumed, stay. Returns what was removed, or would be in a `dry_run`, with
    its size in bytes. May run while the study is searched.
    """
    layout, url = Home.find(home).require(), find_storage(storage)
    database = read_storage(layout.path, url)
    opened = Study.load(database, study)
    store = open_store(layout.path, find_runs(opened, layout.path, tracking_uri, is_shared=url is not None))
    files = layout.study(study)
    files.require_own(url)

    def living() -> set[str]:
        return {session.id for session in living_sessions(database, study)}

    leftovers = [*_weak_weights(store, opened, keep), *_unread_files(files, opened, living)]
    if not dry_run:
        for leftover in leftovers:
            leftover.remove()
    removed = [{"what": leftover.what, "bytes": leftover.num_bytes} for leftover in leftovers]
    return {"study": study, "keep": keep, "dry_run": dry_run, "removed": removed}


def _weak_weights(store: TrackingStore, study: Study, keep: int) -> Iterator[_Leftover]:
    path = f"{CHECKPOINT}/{BEST_WEIGHTS}"
    for number in BestTrials(study, keep).outdone:
        run = store.trial_run(study.name, number, study.id)
        size = store.file_sizes(run, CHECKPOINT).get(path) if run else None  # somebody may have deleted the run
        if run and size is not None:
            yield _Leftover(f"weights of trial {number}", size, partial(store.remove_file, run, path))


def _unread_files(files: StudyFiles, study: Study, living: Callable[[], Collection[str]]) -> Iterator[_Leftover]:
    left = files.splits_of_the_dead(living)
    folders = files.trial_folders()
    ended = without_use_for_checkpoints(study, {number for number, _ in folders})
    for number, folder in folders:
        # A trial that is spooled is sent to MLflow by the next search, with the files of its folder.
        if number in ended and not files.is_spooled(number):
            remove = partial(shutil.rmtree, folder, ignore_errors=True)
            yield _Leftover(f"checkpoints of trial {number}", size_of(folder), remove)
    for file in left:
        yield _Leftover("data of a search that died", file.stat().st_size, partial(file.unlink, missing_ok=True))
