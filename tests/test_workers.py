"""Workers that are killed, stopped or abandoned: real processes, which start at once, forked from a server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from helpers.searches import Searches, lives, wait_until

from hpo.data.datasets import save_splits, split_dataset
from hpo.execution.local import LocalWorkers
from hpo.execution.messages import Assignment, Decision, EpochDone, Setup
from hpo.plugins import load_task
from hpo.records import TrialRecord
from hpo.session import preparation

# --- workers that are killed ------------------------------------------------------------------------------------------


def test_a_killed_worker_costs_the_epoch_it_was_in_and_nothing_else(searches: Searches) -> None:
    searches.hold(4)
    search = searches.begin(epochs=6, workers=2)
    victim, bystander = searches.reached(4, 2, search)
    os.kill(victim.pid, signal.SIGKILL)
    again = searches.reached(4, 3, search)[2]
    searches.release()
    outcome = search.result()

    assert again.pid not in (victim.pid, bystander.pid)
    assert again.seed == victim.seed, "the same trial, with the same random numbers"
    assert [footprint.epoch for footprint in searches.footprints() if footprint.pid == again.pid][:3] == [4, 5, 6]
    assert outcome.counts["complete"] == outcome.num_trials == 3
    assert sorted(trial.attempts for trial in searches.trials()) == [1, 1, 2]
    searches.assert_all_is_there(num_trials=3, num_epochs=6)
    assert {run.data.tags["hpo.attempt"] for run in searches.runs()} == {"1", "2"}

    searches.run(epochs=6, study="undisturbed")
    assert found(searches.trials()) == found(searches.trials("undisturbed"))


def found(trials: list[TrialRecord]) -> list[Any]:
    return [(trial.values, trial.curve, trial.value, trial.best_epoch) for trial in trials]


def test_a_killed_server_of_the_workers_is_replaced(searches: Searches, monkeypatch: pytest.MonkeyPatch) -> None:
    searches.hold(2)
    searches.hold(3)
    search = searches.begin(epochs=4, trials=2)
    [victim] = searches.reached(2, 1, search)
    kill_server()
    (searches.task.parent / "hold-2").unlink()
    [survivor] = searches.reached(3, 1, search)
    assert survivor.pid == victim.pid, "its workers live on"

    killed = []

    def find_it_running_and_then_not() -> None:
        forkserver.ensure_running()
        if not killed:
            killed.append(kill_server())

    # Between a look at the server, and the request for a process.
    monkeypatch.setattr(forkserver._forkserver, "ensure_running", find_it_running_and_then_not)  # type: ignore[attr-defined]
    os.kill(victim.pid, signal.SIGKILL)
    again = searches.reached(3, 2, search)[1]
    searches.release()
    search.result()
    assert again.seed == survivor.seed
    assert len(killed) == 1
    assert [trial.attempts for trial in searches.trials()] == [2, 1]
    searches.assert_all_is_there(num_trials=2, num_epochs=4)


def kill_server() -> int:
    pid: int = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_stopped_worker_is_replaced_once_it_was_silent_for_too_long(
    searches: Searches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "SILENCE_S", 2.0)
    searches.hold(2)
    search = searches.begin(trials=2, workers=2)
    stopped, other = searches.reached(2, 2, search)
    os.kill(stopped.pid, signal.SIGSTOP)
    again = searches.reached(2, 3, search)[2]
    assert not lives(stopped.pid)
    assert lives(other.pid), "it trains for as long as it likes, for it says that it lives"
    searches.release()
    search.result()
    assert again.seed == stopped.seed
    assert ("interrupted", "its worker was silent for 2 s") in searches.witness.ends
    searches.assert_all_is_there(num_trials=2, num_epochs=3)


def test_an_abandoned_worker_is_ended_and_not_heard_any_more(searches: Searches, pool: LocalWorkers) -> None:
    searches.hold(1)
    for number in (0, 1):
        pool.run(assignment(searches, number))
    let_begin(pool)
    searches.release()
    wait_until(lambda: all(worker.connection.poll() for worker in pool._workers))
    heard = []
    for number, event in pool.events(timeout_s=0):
        assert isinstance(event, EpochDone)
        heard.append(number)
        pool.abandon(1 - number)
        pool.abandon(1 - number)
    assert len(heard) == 1
    lost = searches.footprints(1)
    assert sum(lives(footprint.pid) for footprint in lost) == 1


def test_a_worker_is_not_silent_when_nobody_listened(searches: Searches, pool: LocalWorkers) -> None:
    """A coordinator that waits for its database hears nobody for minutes."""
    pool.run(assignment(searches, 0))
    wait_until(lambda: bool(list(pool.events(timeout_s=0.05))))
    searches.hold(1)
    pool.run(assignment(searches, 1))
    let_begin(pool)
    pool.answer(0, Decision.CONTINUE)
    wait_until(lambda: pool._workers[0].connection.poll())
    events = pool.events(timeout_s=0)
    assert next(events)[0] == 0
    searches.release()
    wait_until(lambda: pool._workers[1].connection.poll())
    pool._workers[1].last_heard -= 1000
    assert list(events) == []
    [(number, event)] = pool.events(timeout_s=0)
    assert (number, type(event)) == (1, EpochDone)


def let_begin(pool: LocalWorkers) -> None:
    """Hear from every worker that it is there; its trial is held, so that it says nothing else."""

    def have_begun() -> bool:
        assert list(pool.events(timeout_s=0.05)) == []
        return all(worker.has_spoken for worker in pool._workers)

    wait_until(have_begun)


@pytest.fixture
def pool(searches: Searches, tmp_path: Path) -> Iterator[LocalWorkers]:
    """Workers without a coordinator: the test decides what is heard, and when."""
    dataset = load_task(str(searches.task)).objective.load(tmp_path)
    save_splits(split_dataset(dataset, validation_fraction=0.2, seed=0), tmp_path / "splits.pt")
    setup = Setup(task_reference=str(searches.task), splits=tmp_path / "splits.pt", num_threads=1, silence_s=30.0)
    with LocalWorkers(setup, num_workers=2, gpus=[]) as workers:
        yield workers


def assignment(searches: Searches, number: int) -> Assignment:
    config = load_task(str(searches.task)).train_config({}, seed=number, device="cpu")
    folder = searches.home / "checkpoints" / f"trial-{number}"
    return Assignment(number=number, model_parameters={}, config=config, folder=folder)


def test_a_semaphore_of_a_worker_that_ended_is_removed_without_a_word(tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text("""
import os
from multiprocessing import RLock
from hpo.execution import local

def work():
    held = RLock()
    os._exit(0)

if __name__ == "__main__":
    local._PRELOADED.clear()
    local.warm_up()
    worker = local.process_context().Process(target=work)
    worker.start()
    worker.join()
    assert worker.exitcode == 0
""")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
