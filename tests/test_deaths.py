"""Who is to blame for workers that die: their trial, or a killer that is faster than an epoch."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers.searches import Searches, wait_until
from hpo.objectives.digits import load

from hpo.data.datasets import save_splits, split_dataset
from hpo.errors import SearchError
from hpo.execution import local, pool
from hpo.execution.deaths import NUM_REMEMBERED, Deaths
from hpo.execution.local import LocalWorkers
from hpo.execution.messages import Setup
from hpo.execution.pool import WorkerDied, WorkerEnd

KILLED = WorkerDied("its worker was killed by SIGKILL", is_unexplained=True)
CRASHED = WorkerDied("its worker was killed by SIGSEGV", is_unexplained=False)


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    save_splits(split_dataset(load(tmp_path), validation_fraction=0.2, seed=0), tmp_path / "splits.pt")
    return Setup(task_reference="digits", splits=tmp_path / "splits.pt", num_threads=1, silence_s=30.0)


def deaths_until_failure(deaths: Deaths, trial: int, death: WorkerDied, ages_s: Sequence[float] = (2.0,)) -> int:
    return next(
        count for count in range(1, 1000) if deaths.on_worker_death(trial, 0, death, ages_s[count % len(ages_s)])
    )


@pytest.mark.parametrize("death", [KILLED, CRASHED])
def test_a_trial_whose_workers_alone_die_gets_three_more_in_each_epoch(death: WorkerDied) -> None:
    deaths = Deaths()
    assert [deaths.on_worker_death(0, epoch, death, 1.0) for epoch in (0, 0, 0, 1, 1, 1, 2)] == [None] * 7
    assert [deaths.on_worker_death(0, 2, death, 1.0) for _ in range(3)] == [None, None, "4 workers died in epoch 3"]
    assert deaths_until_failure(deaths, 1, death) == 4, "one that has failed speaks for no other"


def test_trials_that_are_killed_speak_for_each_other_and_for_none_that_crashes() -> None:
    deaths = Deaths()
    rounds = [[deaths.on_worker_death(trial, 0, KILLED, 2.0) for trial in range(4)] for _ in range(12)]
    assert rounds == [[None] * 4] * 12
    assert deaths_until_failure(deaths, 4, CRASHED) == 4
    assert deaths.on_worker_death(0, 0, KILLED, 2.0) == "13 workers died in epoch 1", "it has an end"


def test_kills_at_any_moment_are_held_against_a_trial_only_where_no_other_is_killed() -> None:
    alone, together = Deaths(), Deaths()
    assert deaths_until_failure(alone, 0, KILLED, ages_s=(2.0, 1.2, 1.6, 0.1)) == 4
    assert together.on_worker_death(1, 0, KILLED, 1.0) is None
    assert deaths_until_failure(together, 0, KILLED, ages_s=(2.0, 1.2, 1.6, 0.1)) == NUM_REMEMBERED
    assert deaths_until_failure(together, 2, CRASHED, ages_s=(2.0, 1.2, 1.6, 0.1)) == 4


def test_a_trial_that_came_further_after_it_was_killed_speaks_for_one_that_has_not_yet() -> None:
    deaths = Deaths()
    for epoch in range(NUM_REMEMBERED):
        assert deaths.on_worker_death(0, epoch, KILLED, 1.0) is None
        deaths.on_epoch_done(0, epoch + 1)
    assert 4 < deaths_until_failure(deaths, 1, KILLED) <= 3 * (1 + NUM_REMEMBERED)
    assert deaths_until_failure(deaths, 2, KILLED) < 3 * (1 + NUM_REMEMBERED), "what was long ago proves nothing"


def test_a_killer_that_is_faster_than_an_epoch_fails_no_trial(searches: Searches) -> None:
    searches.hold(1)
    search = searches.begin(trials=2, workers=2)
    for count in range(2, 12):
        wait_until(lambda: len(searches.footprints()) >= count, search)  # noqa: B023
        os.kill(searches.footprints()[count - 2].pid, signal.SIGKILL)
    searches.release()
    search.result()
    assert sorted(trial.attempts for trial in searches.trials()) == [6, 6]
    searches.assert_all_is_there(num_trials=2, num_epochs=3)


def test_a_worker_that_is_killed_while_memory_runs_out_is_not_taken_for_a_victim(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counter of the kernel is pretended: to fill a machine's memory would kill others too."""
    num_kills = [7]
    monkeypatch.setattr(local, "num_oom_kills", lambda: num_kills[0])
    ends = []
    with LocalWorkers(setup, num_workers=1, gpus=[]) as workers:
        for num_kills[0] in (7, 8, 8):
            worker = workers._idle_worker()
            assert isinstance(worker, local._LocalWorker)
            wait_until(worker.connection.poll)
            process = worker._processes[0]
            assert process.pid
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            ends.append(workers._remove(worker))
    explained, unexplained = "was killed by SIGKILL (out of memory)", "was killed by SIGKILL (out of memory?)"
    assert [end.text for end in ends] == [unexplained, explained, unexplained]
    assert [end.is_unexplained for end in ends] == [True, False, True]


@pytest.mark.parametrize(("text", "num_starts"), [("was killed", pool.MAX_KILLED_STARTS), ("ended with code 1", 4)])
def test_workers_killed_at_their_start_are_replaced_longer_than_those_that_crash(
    setup: Setup, text: str, num_starts: int
) -> None:
    with LocalWorkers(setup, num_workers=1, gpus=[]) as workers:
        died = WorkerEnd(text, is_unexplained=text == "was killed")
        for _ in range(num_starts - 1):
            workers._count_failed_start(died)
        with pytest.raises(SearchError, match=f"^{num_starts} workers in a row died at their start"):
            workers._count_failed_start(died)
