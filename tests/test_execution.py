"""What a search on one machine promises: its processes, what stays on disk, a server that is away."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.searches import Footprint, Searches, wait_until, wait_until_gone

import hpo
from hpo.cli import cli
from hpo.tracking.server import running_server
from hpo.tracking.store import open_store

# --- MLflow is away ---------------------------------------------------------------------------------------------------


def test_a_server_that_hangs_stalls_no_training_and_loses_no_metric(searches: Searches, free_port: int) -> None:
    address = f"http://127.0.0.1:{free_port}"
    with running_server(open_store(searches.home), host="127.0.0.1", port=free_port) as server:
        search = searches.begin("slow", trials=4, epochs=15, workers=2, tracking_uri=address)
        searches.reached(8, 2, search)
        os.killpg(server.pid, signal.SIGSTOP)
        before = len(searches.footprints())
        try:
            wait_until(lambda: len(searches.footprints()) == 4 * 15, search)
        finally:
            os.killpg(server.pid, signal.SIGCONT)
        search.result()
    usual, stopped = searches.footprints()[:before], searches.footprints()[before - 2 :]
    assert {1, 15} <= {footprint.epoch for footprint in stopped}, "trials end and begin meanwhile"
    assert max(gaps(stopped)) < max(gaps(usual)) + 1.0
    searches.assert_all_is_there(num_trials=4, num_epochs=15)


def gaps(footprints: list[Footprint]) -> list[float]:
    """Seconds between one epoch and the next of the same worker, from trial to trial too."""
    by_worker = defaultdict[int, list[float]](list)
    for footprint in footprints:
        by_worker[footprint.pid].append(footprint.time_s)
    return [later - sooner for times in by_worker.values() for sooner, later in pairwise(times)]


# --- what is promised when nothing goes wrong -------------------------------------------------------------------------


def test_two_threads_search_in_one_home_at_once(searches: Searches) -> None:
    both = [searches.begin(study=name, trials=1) for name in ("one", "two")]
    assert [search.result().counts["complete"] for search in both] == [1, 1]


def test_a_command_whose_streams_are_closed_gives_its_processes_open_ones(tmp_path: Path) -> None:
    child = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(str([os.fstat(i).st_rdev for i in range(3)]))"
    )
    code = (
        "import subprocess, sys; from hpo.machine import open_closed_streams; open_closed_streams()\n"
        "subprocess.run([sys.executable, '-c', *sys.argv[1:]], check=True, close_fds=True)"
    )
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, child, str(tmp_path / "found")]
    assert subprocess.run(command, check=False, timeout=200).returncode == 0
    assert (tmp_path / "found").read_text() == str([Path(os.devnull).stat().st_rdev] * 3)


def test_a_daemon_process_is_told_that_it_can_start_no_workers(
    searches: Searches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    with pytest.raises(hpo.UsageError, match="cannot be started by a daemon process, such as one of multiprocessing"):
        searches.run()


def test_each_worker_is_a_process_with_its_share_of_the_cores(searches: Searches) -> None:
    searches.hold(1)
    search = searches.begin(trials=4, workers=4)
    together = searches.reached(1, 4, search)
    assert len({footprint.pid for footprint in together} - {os.getpid()}) == 4
    share = max(1, len(os.sched_getaffinity(0)) // 4)
    assert {footprint.num_threads for footprint in together} == {share}
    assert {child.pid for child in multiprocessing.active_children()} >= {footprint.pid for footprint in together}
    searches.release()
    search.result()
    wait_until_gone(footprint.pid for footprint in together)
    searches.assert_all_is_there(num_trials=4, num_epochs=3)


def test_only_the_best_trials_keep_their_weights_and_gc_removes_what_it_said(searches: Searches) -> None:
    outcome = searches.run(trials=6, keep=2)
    ranking = sorted(searches.trials(), key=lambda trial: (-(trial.value or 0), trial.number))
    second = ranking[1].number
    assert second != 0, "the default configuration, with which the winner is compared, stays anyway"
    assert weights(searches).keys() == {0, ranking[0].number, second}
    assert outcome.winner is not None
    assert outcome.winner.trial == ranking[0].number

    orphans = [
        searches.home / "checkpoints" / "moody" / "trial-0001.1" / "epoch-0001.pt",
        searches.home / "splits" / "moody" / "0123.pt",
    ]
    for orphan in orphans:
        orphan.parent.mkdir(parents=True, exist_ok=True)
        orphan.write_bytes(bytes(1000))
    said = [
        {"what": f"weights of trial {second}", "bytes": weights(searches)[second]},
        {"what": "checkpoints of trial 1", "bytes": 1000},
        {"what": "data of a search that died", "bytes": 1000},
    ]
    before = files(searches.home)
    assert gc(searches, "--keep", "1", "--dry-run") == said
    assert files(searches.home) == before
    assert gc(searches, "--keep", "1") == said
    gone = before - files(searches.home)
    assert len(gone) == 3
    assert weights(searches).keys() == {0, ranking[0].number}
    assert gc(searches, "--keep", "1") == []
    store = open_store(searches.home)
    store.client.delete_run(store.find_trial_run("moody", second))
    assert gc(searches, "--keep", "1") == [], "a trial whose run was deleted has no weights"
    assert hpo.load_best("moody", home=searches.home).classes


def weights(searches: Searches) -> dict[int, int]:
    """Size of the weights that MLflow has, by trial."""
    artifacts = searches.home / "artifacts" / "moody"
    paths = [artifacts / run.info.run_id / "artifacts" / "checkpoint" / "best.pt" for run in searches.runs()]
    return {number: path.stat().st_size for number, path in enumerate(paths) if path.exists()}


def files(home: Path) -> set[Path]:
    """All but the databases, whose write-ahead logs come and go."""
    return {path for path in home.rglob("*") if path.is_file() and ".db" not in path.name}


def gc(searches: Searches, *options: str) -> list[dict[str, Any]]:
    answer = CliRunner().invoke(cli, ["gc", "moody", "--home", str(searches.home), "--json", *options])
    assert answer.exit_code == 0, answer.output
    removed: list[dict[str, Any]] = json.loads(answer.stdout)["removed"]
    return removed
