"""The process that searches is killed, or asked to stop."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.searches import (
    PATIENCE_S,
    STOPPING,
    Searches,
    descendants,
    interrupted_in_epoch_3,
    lives,
    wait_until,
    wait_until_gone,
)

from hpo.errors import UsageError
from hpo.terminal.facts import study_facts

# --- the parent is killed, or asked to stop ---------------------------------------------------------------------------

# Without `if __name__ == "__main__"`: nothing but the script itself may run it.
SCRIPT = """
import sys
from pathlib import Path
import hpo
print("begun", flush=True)
hpo.run_search(sys.argv[1], home=Path(sys.argv[2]), workers=2, **{options})
"""


def test_a_plain_script_killed_with_minus_9_leaves_no_process_and_loses_no_trial(
    searches: Searches, tmp_path: Path
) -> None:
    options = {"trials": 4, "epochs": 5, "overrides": ("mood=prints",), "strategy": "random", "pruner": "none"}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(options=options))
    searches.hold(3)
    process = searches.start_script(script, searches.task, searches.home)
    wait_until(lambda: len(searches.footprints(3)) == searches.num_saved(2) == 2 or process.poll() is not None)
    family = descendants(process.pid)
    workers = {footprint.pid for footprint in searches.footprints(3)}
    assert workers < family, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(family)
    assert process.communicate()[0] == "begun\n"
    assert searches.study().counts()["running"] == 2
    shown = study_facts("moody", searches.home)
    assert (shown["counts"]["running"], shown["counts"]["interrupted"]) == (0, 2), "nobody runs them"
    assert [trial["state"] for trial in shown["trials"]] == ["interrupted"] * 2
    for log in searches.home.glob("logs/moody/worker-*.log"):
        assert log.read_text().endswith("the last words\n")

    spooled = {path: path.read_text() for path in searches.home.glob("spool/moody/*/trial-*.jsonl")}
    searches.release()
    searches.run("prints", trials=4, epochs=5, workers=2)
    assert sorted(trial.attempts for trial in searches.trials()) == [1, 1, 2, 2]
    resumed = Counter(footprint.epoch for footprint in searches.footprints())
    assert resumed == {1: 4, 2: 4, 3: 6, 4: 4, 5: 4}, "nothing but the epoch under way is trained again"
    assert len(spooled) == 2
    for path, lines in spooled.items():
        events = [json.loads(line) for line in lines.splitlines()]
        logged = {event["epoch"]: event["time_ms"] for event in events if "epoch" in event}
        assert logged.keys() == {1, 2}
        assert logged.items() <= searches.logged_at(int(path.stem.removeprefix("trial-"))).items(), "nor logged again"
    searches.assert_all_is_there(num_trials=4, num_epochs=5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_one_signal_lets_every_trial_end_its_epoch_and_keeps_it(searches: Searches, number: signal.Signals) -> None:
    outcome = interrupted_in_epoch_3(searches, number, trials=5, workers=3, epochs=5)
    assert outcome.interrupted
    assert not outcome.is_done
    assert outcome.counts["interrupted"] == 3
    assert {footprint.epoch for footprint in searches.footprints()} == {1, 2, 3}
    assert [run.info.status for run in searches.runs() + searches.runs("study")] == ["KILLED"] * 4
    searches.assert_nothing_runs()

    assert searches.run(trials=5, workers=3, epochs=5).is_done
    assert len(searches.footprints()) == 5 * 5, "no epoch is trained twice"
    searches.assert_all_is_there(num_trials=5, num_epochs=5)


def test_ctrl_c_in_a_terminal_reaches_everyone_and_twice_ends_all_within_5_s(searches: Searches) -> None:
    searches.hold(2)
    process = searches.start("--trials", "4", "--workers", "2")
    wait_until(lambda: len(searches.footprints(2)) == 2 or process.poll() is not None)
    family = descendants(process.pid)
    assert {footprint.pid for footprint in searches.footprints(2)} < family, process.communicate()
    os.killpg(process.pid, signal.SIGINT)
    assert process.stdout is not None
    while process.stdout.readline() != f"{STOPPING}\n":
        assert process.poll() is None
    assert all(map(lives, family)), "an epoch may take its time"
    os.killpg(process.pid, signal.SIGINT)
    wait_until_gone({process.pid, *family})
    _, err = process.communicate()
    assert (process.returncode, err.strip()) == (130, "Error: interrupted; run the same command again to resume")
    assert searches.study().counts()["interrupted"] == 2
    assert [run.info.status for run in searches.runs() + searches.runs("study")] == ["KILLED"] * 3
    searches.assert_nothing_runs()


def test_a_terminal_that_is_closed_lets_the_trials_end_their_epoch(searches: Searches) -> None:
    searches.hold(2)
    ours, theirs = os.openpty()
    process = searches.start_in_terminal(theirs, "--trials", "4", "--workers", "2")
    os.close(theirs)
    wait_until(lambda: len(searches.footprints(2)) == 2 or process.poll() is not None)
    family = descendants(process.pid)
    os.close(ours)  # the kernel sends SIGHUP to everyone in front of it, and what is written to it fails
    time.sleep(0.5)
    assert process.poll() is None, "an epoch may take its time"
    searches.release()
    assert process.wait(PATIENCE_S) == 130
    wait_until_gone(family)
    assert [sorted(trial.curve) for trial in searches.trials()] == [[1, 2]] * 2
    assert [run.info.status for run in searches.runs() + searches.runs("study")] == ["KILLED"] * 3
    searches.assert_nothing_runs()


def test_sigterm_to_everyone_keeps_the_trials_and_another_search_is_refused_until_then(searches: Searches) -> None:
    """As when a service is stopped, or a batch job's time is up. Until then nobody else searches the study."""
    searches.hold(2)
    process = searches.start("--trials", "4", "--workers", "2")
    wait_until(lambda: len(searches.footprints(2)) == 2 or process.poll() is not None)
    family = descendants(process.pid)
    assert {footprint.pid for footprint in searches.footprints(2)} < family, process.communicate()
    with pytest.raises(UsageError, match=r"study 'moody' is being searched by another process.*--study"):
        searches.run(trials=4)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout is not None
    while process.stdout.readline() != f"{STOPPING}\n":
        assert process.poll() is None
    searches.release()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, "")
    assert "Interrupted" in out
    assert "Run the same command again to resume" in out
    wait_until_gone(family)
    assert [sorted(trial.curve) for trial in searches.trials()] == [[1, 2]] * 2
    assert [run.info.status for run in searches.runs() + searches.runs("study")] == ["KILLED"] * 3
    searches.assert_nothing_runs()


def test_ctrl_c_while_the_search_begins_is_one_line(searches: Searches) -> None:
    (searches.task.parent / "hold-loading").touch()
    process = searches.start("--trials", "1")
    assert process.stdout is not None
    assert process.stdout.readline() == "loading the data of moody\n"
    family = descendants(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err.strip()) == (130, "Error: interrupted; run the same command again to resume")
    wait_until_gone(family)
