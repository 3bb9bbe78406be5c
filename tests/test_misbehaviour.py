"""Trials that misbehave: each fails with its reason, and the search continues."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from helpers.homes import copy_database
from helpers.searches import Searches, searching

from hpo.execution import local
from hpo.files import keep_end
from hpo.records import TrialRecord

# --- trials that misbehave --------------------------------------------------------------------------------------------

MISBEHAVIOURS = {
    "raises": "RuntimeError: the cat is on the keyboard",
    "exits": "SystemExit: enough",
    "cuda is full": "DeviceMemoryError: out of memory (oom): CUDA out of memory. Tried to allocate 20.00 GiB. Choose",
    "memory is full": "can't allocate memory: you tried to allocate 1099511627776 bytes",
    "dies": "its worker was killed by SIGKILL",
}


@pytest.fixture(scope="module")
def unruly(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> Iterator[Searches]:
    """A search in which each mood has one trial: the grid over all of them."""
    folder = tmp_path_factory.mktemp("unruly")
    home = folder / "home"
    home.mkdir()
    copy_database(mlflow_template, home / "mlflow.db")
    moods = ["calm", "nan", "prints", *MISBEHAVIOURS]
    overrides = ("lr=0.1", "width=16", f"mood={','.join(moods)}")
    with searching(folder, home) as searches:
        searches.run(strategy="grid", trials=len(moods), overrides=overrides)
        yield searches


def the_trial(searches: Searches, mood: str) -> TrialRecord:
    [trial] = [trial for trial in searches.trials() if trial.values["mood"] == mood]
    return trial


@pytest.mark.parametrize(("mood", "reason"), MISBEHAVIOURS.items())
def test_a_trial_that_misbehaves_fails_with_its_reason_and_the_search_continues(
    unruly: Searches, mood: str, reason: str
) -> None:
    trial = the_trial(unruly, mood)
    assert trial.state == "failed"
    assert reason in (trial.reason or "")
    run = unruly.runs()[trial.number]
    assert (run.info.status, run.data.tags["hpo.reason"]) == ("FAILED", trial.reason)
    others = {trial.state for trial in unruly.trials() if trial.values["mood"] in ("calm", "prints")}
    assert others == {"complete"}
    unruly.assert_nothing_is_left()


@pytest.mark.parametrize("mood", [mood for mood in MISBEHAVIOURS if mood != "dies"])
def test_what_a_model_raises_is_not_tried_again(unruly: Searches, mood: str) -> None:
    trial = the_trial(unruly, mood)
    assert trial.attempts == 1
    assert [footprint.epoch for footprint in unruly.footprints() if footprint.mood == mood] == [1, 2]
    [trace] = unruly.home.glob(f"artifacts/moody/{unruly.runs()[trial.number].info.run_id}/**/traceback.txt")
    assert "misbehave(self.mood)" in trace.read_text()


def test_a_trial_that_kills_every_worker_is_begun_four_times(unruly: Searches) -> None:
    trial = the_trial(unruly, "dies")
    assert trial.attempts == 1 + 3
    assert trial.reason is not None
    assert trial.reason.endswith("(4 workers died in epoch 2)")
    prints = [footprint for footprint in unruly.footprints() if footprint.mood == "dies"]
    assert [footprint.epoch for footprint in prints] == [1, 2, 2, 2, 2]
    assert len({footprint.pid for footprint in prints}) == 4
    assert len({footprint.seed for footprint in prints if footprint.epoch == 2}) == 1


def test_a_loss_that_is_not_a_number_ends_its_trial_as_diverged(unruly: Searches) -> None:
    trial = the_trial(unruly, "nan")
    assert (trial.state, trial.attempts, trial.value) == ("diverged", 1, None)
    assert trial.reason == "the loss was not finite in epoch 1"
    run = unruly.runs()[trial.number]
    assert (run.info.status, run.data.tags["hpo.state"]) == ("FINISHED", "diverged")
    assert run.data.tags["hpo.reason"] == trial.reason


def test_a_worker_takes_one_trial_after_the_other_and_a_fresh_one_follows_an_error(unruly: Searches) -> None:
    workers = {trial.values["mood"]: set[int]() for trial in unruly.trials()}
    for footprint in unruly.footprints():
        workers[footprint.mood].add(footprint.pid)
    for mood, following in pairwise(workers):
        is_reused = bool(workers[mood] & workers[following])
        assert is_reused == (mood not in MISBEHAVIOURS), (mood, following)


def test_a_log_keeps_its_end_within_bounds(tmp_path: Path) -> None:
    log = tmp_path / "worker-0.log"
    with log.open("ab", buffering=0) as worker:
        for line in range(1000):
            worker.write(f"line {line}\n".encode())
        keep_end(log, 2000)
        worker.write(b"the last words\n")
        kept = log.read_text().splitlines()
        assert kept[0] == "... (the beginning was cut)"
        assert kept[-2:] == ["line 999", "the last words"]
        assert 900 < log.stat().st_size < 1100
        keep_end(log, 2000)
        assert log.read_text().splitlines() == kept
    keep_end(tmp_path / "not there", 2000)


def test_the_logs_of_workers_that_print_without_end_are_cut_while_they_run(
    searches: Searches, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "MAX_LOG_BYTES", 20_000)
    searches.run("prints", trials=1)
    [log] = searches.home.glob("logs/moody/worker-*.log")
    assert log.stat().st_size < 420_000 - 20_000, "10 000 rounds of 41 bytes, less what was cut"
    assert log.read_text().startswith("... (the beginning was cut)\n")


def test_what_a_task_prints_goes_to_its_log_to_the_last_word_and_not_to_the_user(
    searches: Searches, capfd: pytest.CaptureFixture[str]
) -> None:
    searches.hold(2)
    search = searches.begin("prints", trials=2, workers=2)
    searches.reached(2, 2, search)
    searches.release()
    search.result()
    assert capfd.readouterr() == ("", "")
    logs = [log.read_text() for log in searches.home.glob("logs/moody/worker-*.log")]
    assert len(logs) == 2
    for log in logs:
        assert log.count("all work and no play\n") == log.count("makes Jack a dull boy\n") == 10_000
        assert "past Python's own streams\n" in log
        assert log.endswith("the last words\n")
    searches.assert_all_is_there(num_trials=2, num_epochs=3)
