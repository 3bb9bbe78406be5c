"""What a search promises when things go wrong on one machine: each promise with real processes that are really killed.

Most searches run in a thread of this process: their workers are processes of their own all the same, and start at once,
for the server that they are forked from lives on from test to test.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow.entities import Run

import hpo
from hpo.cli import cli
from hpo.data.datasets import save_splits, split_dataset
from hpo.errors import DataError, SearchError, StoreError, UsageError
from hpo.execution.local import LocalWorkers
from hpo.execution.messages import Assignment, Decision, EpochDone, Setup
from hpo.execution.observer import Observer
from hpo.plugins import load_task
from hpo.records import SearchOutcome, TrialRecord
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session import preparation
from hpo.session.search import run_search
from hpo.tracking.server import running_server
from hpo.tracking.store import open_store

PATIENCE_S = 120.0  # until a condition that must come true counts as missed, on a busy machine
GONE_WITHIN_S = 5.0  # the promise, of a machine that has nothing else to do

STOPPING = "stopping after the current epoch; press Ctrl-C again to stop now"

# The digits, with a model that leaves a footprint in each epoch, waits where it is held, and misbehaves as asked.
TASK = """
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from hpo.models.mlp import MLP
from hpo.objective import Objective
from hpo.space import Choice, Float, Group, Space
from hpo.objectives.digits import load as load_digits

FOLDER = Path(__file__).parent


def wait_while(name):
    while (FOLDER / name).exists():
        time.sleep(0.005)


def load(data_dir):
    wait_while("hold-loading")
    return load_digits(data_dir)


class Footprints(torch.nn.Module):
    def __init__(self, net, mood):
        super().__init__()
        self.net, self.mood = net, mood
        self.register_buffer("epoch", torch.tensor(0))  # in the checkpoint: a resumed trial counts on

    def train(self, mode=True):
        if mode:
            self.epoch += 1
            self.leave_footprint()
            wait_while(f"hold-{self.epoch}")
            if self.mood == "slow":
                time.sleep(0.1)
            if self.epoch == 2:
                misbehave(self.mood)
        return super().train(mode)

    def leave_footprint(self):
        facts = {
            "pid": os.getpid(),
            "epoch": int(self.epoch),
            "seed": torch.initial_seed(),
            "mood": self.mood,
            "num_threads": torch.get_num_threads(),
            "time_s": time.time(),
        }
        with (FOLDER / "footprints.jsonl").open("ab", buffering=0) as file:
            file.write((json.dumps(facts) + "\\n").encode())

    def forward(self, inputs):
        outputs = self.net(inputs)
        return outputs * float("nan") if self.training and self.mood == "nan" else outputs


def misbehave(mood):
    if mood == "raises":
        raise RuntimeError("the cat is on the keyboard")
    if mood == "cuda is full":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    if mood == "memory is full":
        resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
        torch.empty(2**40, dtype=torch.uint8)
    if mood == "exits":
        sys.exit("enough")
    if mood == "dies":
        time.sleep(0.5)  # by now the first epoch is on disk
        os.kill(os.getpid(), signal.SIGKILL)
    if mood == "prints":
        for _ in range(10_000):
            print("all work and no play", file=sys.stderr)
            print("makes Jack a dull boy")
        os.write(1, b"past Python's own streams\\n")
        print("the last words")
    if mood == "quarrels":
        try:
            (FOLDER / "first").touch(exist_ok=False)
        except FileExistsError:
            raise RuntimeError("somebody was faster") from None
        wait_while("hold-first")


def model(spec, *, width=16, mood="calm"):
    return Footprints(MLP(spec, depth=1, width=width, activation="relu", norm="none", dropout=0.1), mood)


MOODS = (
    "calm", "raises", "nan", "cuda is full", "prints", "exits", "memory is full", "dies", "slow", "quarrels",
)

objective = Objective(
    name="moody", description="digits with moods", load=load, model=model,
    settings={"max_epochs": 3, "batch_size": 256, "optimizer": "sgd", "lr": 0.1},
    space=Space(
        Group("step size", lr=Float(1e-3, 1.0, log=True, default=0.1)),
        Group("architecture", width=Choice(16, 32, default=16), mood=Choice(*MOODS, default="calm")),
    ),
)
"""


@dataclass(frozen=True)
class Footprint:
    """What a model wrote down when one of its epochs began."""

    pid: int
    epoch: int
    seed: int
    mood: str
    num_threads: int
    time_s: float


@dataclass
class Witness(Observer):
    """Remembers what a search told its user."""

    notes: list[str] = field(default_factory=list)
    ends: list[tuple[str, str | None]] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def trial_ended(self, suggestion: Any, state: str, result: Any, reason: str | None) -> None:
        self.ends.append((state, reason))


class Searches:
    """Searches of one task in one home, in a thread of this process or as a process of their own."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.home = home
        self.task = folder / "moody.py"
        self.task.write_text(TASK)
        self.witness = Witness()
        self._threads = ThreadPoolExecutor()
        self._processes: list[subprocess.Popen[str]] = []

    def run(self, *moods: str, **options: Any) -> SearchOutcome:
        """One search. By default a short one at random, in which nothing is pruned."""
        chosen = {
            "home": self.home,
            "overrides": (f"mood={','.join(moods or ['calm'])}",),
            "trials": 3,
            "workers": 1,
            "strategy": "random",
            "pruner": "none",
            "observer": self.witness,
        }
        return run_search(str(self.task), **chosen | options)

    def begin(self, *moods: str, **options: Any) -> Future[SearchOutcome]:
        """One search in a thread; whoever waits for it hears of its errors."""
        return self._threads.submit(self.run, *moods, **options)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """One search as a process that leads a group of its own, as in a terminal."""
        options = ["--home", self.home, "-p", "mood=calm", "--strategy", "random", "--pruner", "none", *arguments]
        return self.start_python("-m", "hpo", "search", self.task, *options)

    def start_python(self, *arguments: object) -> subprocess.Popen[str]:
        self._processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                # Python's own streams shall be as they are for a user.
                env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
            )
        )
        return self._processes[-1]

    def hold(self, what: object) -> None:
        """Make every trial wait at the beginning of this epoch, or `first`, until it is released."""
        (self.task.parent / f"hold-{what}").touch()

    def release(self) -> None:
        for hold in self.task.parent.glob("hold-*"):
            hold.unlink()

    def footprints(self, epoch: int | None = None) -> list[Footprint]:
        """Those of all trials so far, or of those that began this epoch."""
        path = self.task.parent / "footprints.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [Footprint(**json.loads(line)) for line in lines]
        return [footprint for footprint in found if epoch in (None, footprint.epoch)]

    def reached(
        self, epoch: int, num_trials: int, *searches: Future[SearchOutcome], num_ended: int = 0
    ) -> list[Footprint]:
        """Wait until this many attempts have begun the epoch, and the one before is on disk; their footprints.

        Of trials that have ended nothing is on disk any more.
        """
        wait_until(lambda: len(self.footprints(epoch)) >= num_trials, *searches)
        num_running = len({footprint.seed for footprint in self.footprints(epoch)}) - num_ended
        wait_until(lambda: self.num_saved(epoch - 1) >= num_running, *searches)
        return self.footprints(epoch)

    def num_saved(self, epoch: int) -> int:
        """How many trials that have not ended have a checkpoint of the epoch, or of a later one."""
        newest = (max(folder.glob("epoch-*.pt"), default=None) for folder in self.home.glob("checkpoints/*/trial-*"))
        return sum(path is not None and int(path.name[6:10]) >= epoch for path in newest) if epoch else 10**6

    def study(self, name: str = "moody") -> Study:
        return Study.load(open_storage(self.home), name)

    def trials(self, name: str = "moody") -> list[TrialRecord]:
        return self.study(name).trials()

    def runs(self, kind: str = "trial") -> list[Run]:
        """The study's runs in MLflow, by trial."""
        client = open_store(self.home).client
        experiment = client.get_experiment_by_name("hpo/moody")
        found = client.search_runs([experiment.experiment_id], f"tags.`hpo.kind` = '{kind}'")
        return sorted(found, key=lambda run: int(run.data.tags.get("hpo.trial", -1)))

    def recorded_epochs(self, run: Run) -> list[int]:
        history = open_store(self.home).client.get_metric_history(run.info.run_id, "val/accuracy")
        return [metric.step for metric in history]

    def assert_all_is_there(self, num_trials: int, num_epochs: int) -> None:
        """Each trial ran to its end once, all its epochs are in both stores, and nothing else is."""
        assert [trial.state for trial in self.trials()] == ["complete"] * num_trials
        assert [sorted(trial.curve) for trial in self.trials()] == [list(range(1, num_epochs + 1))] * num_trials
        assert [run.info.status for run in self.runs()] == ["FINISHED"] * num_trials
        assert [self.recorded_epochs(run) for run in self.runs()] == [list(range(1, num_epochs + 1))] * num_trials
        assert [run.info.status for run in self.runs("study")] == ["FINISHED"]
        self.assert_nothing_is_left()

    def assert_nothing_is_left(self) -> None:
        """No trial runs in either store, and no file waits for a process."""
        self.assert_nothing_runs()
        for folder in ("spool", "splits", "checkpoints"):
            assert list((self.home / folder).glob("moody/**/*")) == []

    def assert_nothing_runs(self) -> None:
        assert self.study().counts()["running"] == 0
        assert "RUNNING" not in {run.info.status for kind in ("trial", "study") for run in self.runs(kind)}

    def end(self) -> None:
        self.release()
        for process in self._processes:
            process.kill()
            process.communicate()
        self._threads.shutdown()


@pytest.fixture
def searches(tmp_path: Path, home: Path) -> Iterator[Searches]:
    """None of them outlives the test."""
    found = Searches(tmp_path, home)
    yield found
    found.end()


def wait_until(condition: Callable[[], bool], *searches: Future[SearchOutcome], within_s: float = PATIENCE_S) -> None:
    """Wait for a condition. Raises what a search raised, for then it will not come true any more."""
    deadline = time.monotonic() + within_s
    while not condition():
        for search in searches:
            if search.done():
                pytest.fail(f"the search ended too early: {search.result()}")
        assert time.monotonic() < deadline, f"not within {within_s:.0f} s"
        time.sleep(0.005)


def lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"  # a zombie is dead, whether or not somebody has taken note
    except FileNotFoundError:
        return False


def descendants(pid: int) -> set[int]:
    """The processes that this one has started, and those that they have."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int(_stat(int(folder.name))[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
    found: set[int] = set()
    while more := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= more
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the third on: state, parent, group, ..."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def wait_until_gone(processes: Iterable[int]) -> None:
    pids = set(processes)
    slowdown = max(1.0, os.getloadavg()[0] / len(os.sched_getaffinity(0)))
    wait_until(lambda: not any(map(lives, pids)), within_s=GONE_WITHIN_S * slowdown)


@contextmanager
def tmpfs(path: Path, options: str) -> Iterator[None]:
    """A real file system of a few megabytes."""
    path.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], capture_output=True, text=True)
    if mounted.returncode:
        pytest.fail(
            f"a small disk cannot be mounted here ({mounted.stderr.strip()}), and so nothing is shown of a full one; "
            "run the tests as root, or behind `unshare --user --map-root-user --mount`"
        )
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


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
    pool.answer(0, Decision.GO_ON)
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
    process = searches.start_python(script, searches.task, searches.home)
    wait_until(lambda: len(searches.footprints(3)) == searches.num_saved(2) == 2 or process.poll() is not None)
    family = descendants(process.pid)
    workers = {footprint.pid for footprint in searches.footprints(3)}
    assert workers < family, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until_gone(family)
    assert process.communicate()[0] == "begun\n"
    assert searches.study().counts()["running"] == 2
    for log in searches.home.glob("logs/moody/worker-*.log"):
        assert log.read_text().endswith("the last words\n")

    searches.release()
    searches.run("prints", trials=4, epochs=5, workers=2)
    assert sorted(trial.attempts for trial in searches.trials()) == [1, 1, 2, 2]
    resumed = Counter(footprint.epoch for footprint in searches.footprints())
    assert resumed == {1: 4, 2: 4, 3: 6, 4: 4, 5: 4}, "nothing but the epoch under way is trained again"
    searches.assert_all_is_there(num_trials=4, num_epochs=5)


def interrupted_in_epoch_3(searches: Searches, number: signal.Signals, **options: Any) -> SearchOutcome:
    """A search that this process's main thread runs, and that gets a signal while all its workers are in epoch 3."""
    searches.hold(3)

    def interrupt() -> None:
        searches.reached(3, options["workers"])
        os.kill(os.getpid(), number)
        wait_until(lambda: STOPPING in searches.witness.notes)
        searches.release()

    with ThreadPoolExecutor(1) as thread:
        signalled = thread.submit(interrupt)
        outcome = searches.run(**options)
        signalled.result()
    return outcome


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


def test_sigterm_to_everyone_keeps_the_trials(searches: Searches) -> None:
    """As when a service is stopped, or a batch job's time is up."""
    searches.hold(2)
    process = searches.start("--trials", "4", "--workers", "2")
    wait_until(lambda: len(searches.footprints(2)) == 2 or process.poll() is not None)
    family = descendants(process.pid)
    assert {footprint.pid for footprint in searches.footprints(2)} < family, process.communicate()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.stdout is not None
    while process.stdout.readline() != f"{STOPPING}\n":
        assert process.poll() is None
    searches.release()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (130, "")
    assert "Interrupted" in out
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


def test_a_study_is_searched_once_at_a_time(searches: Searches) -> None:
    searches.hold(1)
    search = searches.begin(trials=1)
    searches.reached(1, 1, search)
    with pytest.raises(UsageError, match=r"study 'moody' is being searched by another process.*--study"):
        searches.run(trials=2)
    searches.release()
    assert search.result().counts["complete"] == 1


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
    with closing(sqlite3.connect(mlflow_template)) as source, closing(sqlite3.connect(home / "mlflow.db")) as target:
        source.backup(target)
    searches = Searches(folder, home)
    moods = ["calm", "nan", "prints", *MISBEHAVIOURS]
    overrides = ("lr=0.1", "width=16", f"mood={','.join(moods)}")
    searches.run(strategy="grid", trials=len(moods), overrides=overrides)
    yield searches
    searches.end()


def the_trial(searches: Searches, mood: str) -> TrialRecord:
    [trial] = [trial for trial in searches.trials() if trial.values["mood"] == mood]
    return trial


@pytest.mark.parametrize(("mood", "reason"), MISBEHAVIOURS.items())
def test_a_trial_that_misbehaves_fails_with_its_reason_and_the_search_goes_on(
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


def test_a_worker_takes_one_trial_after_the_other_and_a_fresh_one_follows_an_error(unruly: Searches) -> None:
    workers = {trial.values["mood"]: set[int]() for trial in unruly.trials()}
    for footprint in unruly.footprints():
        workers[footprint.mood].add(footprint.pid)
    for mood, following in pairwise(workers):
        is_reused = bool(workers[mood] & workers[following])
        assert is_reused == (mood not in MISBEHAVIOURS), (mood, following)


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


def test_five_failures_in_a_row_end_the_search_though_another_trial_trains(searches: Searches) -> None:
    searches.hold("first")
    with pytest.raises(SearchError, match="5 trials failed in a row; the first one with: RuntimeError: somebody was"):
        searches.run("quarrels", trials=10, workers=2)
    assert searches.study().counts()["failed"] == 5
    assert searches.study().counts()["interrupted"] == 1
    wait_until_gone(footprint.pid for footprint in searches.footprints())
    assert Counter(run.info.status for run in searches.runs()) == {"FAILED": 5, "KILLED": 1}
    assert [run.info.status for run in searches.runs("study")] == ["FAILED"]
    searches.assert_nothing_runs()


# --- disks and files --------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_fails_the_trial_and_harms_no_other(searches: Searches) -> None:
    checkpoints = searches.home / "checkpoints"
    with tmpfs(checkpoints, "size=2m"):
        searches.run(trials=1)
        searches.hold(3)
        search = searches.begin(trials=2)
        searches.reached(3, 2, search, num_ended=1)
        fill(checkpoints / "filler")
        searches.release()
        wait_until(lambda: searches.study().counts()["failed"] == 1, search)
        (checkpoints / "filler").unlink()
        outcome = search.result()
    assert [trial.state for trial in searches.trials()] == ["complete", "failed", "complete"]
    assert re.search(r"OSError.*No space left on device", searches.trials()[1].reason or "")
    assert outcome.winner is not None
    assert hpo.load_best("moody", home=searches.home).classes


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file:
        for size in (65536, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue


def test_a_full_disk_ends_the_search_in_one_line(searches: Searches) -> None:
    checkpoints = searches.home / "checkpoints"
    with tmpfs(checkpoints, "size=1m"):
        fill(checkpoints / "filler")
        with pytest.raises(SearchError, match=r"5 trials failed in a row.*OSError.*No space left"):
            searches.run(trials=10, workers=2)
        searches.assert_nothing_runs()


def test_damaged_and_hostile_checkpoints_are_not_used(searches: Searches, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped byte costs what came after an earlier checkpoint, a forged one its trial, and its code is not run."""
    interrupted_in_epoch_3(searches, signal.SIGINT, trials=2, workers=2, epochs=5)
    before = len(searches.footprints())

    flipped = next(searches.home.glob("checkpoints/moody/trial-0000.*/epoch-0003.*.pt"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    trap = searches.home / "trap"
    hostile = pickle.dumps(Touch(trap))
    [folder] = searches.home.glob("checkpoints/moody/trial-0001.*")
    (folder / f"epoch-0004.{hashlib.sha256(hostile).hexdigest()}.pt").write_bytes(hostile)

    with caplog.at_level(logging.WARNING, logger="hpo"):
        searches.run(trials=2, workers=1, epochs=5)
    assert not trap.exists()
    first, second, third = searches.trials()
    assert [trial.state for trial in (first, second, third)] == ["complete", "failed", "complete"]
    assert "was not written by hpo" in (second.reason or "")
    trained = [footprint.epoch for footprint in searches.footprints()[before:]]
    assert trained[-5:] == [1, 2, 3, 4, 5]
    assert trained[:-5] in ([3, 4, 5], [2, 3, 4, 5], [1, 2, 3, 4, 5]), "not every short epoch has a checkpoint"
    told = [record.message for record in caplog.records if record.name.startswith("hpo.")]
    assert len(told) == 1
    assert flipped.name in told[0]
    assert "is damaged and is not used; an earlier checkpoint is" in told[0]


class Touch:
    """Touches a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no image", "train-images-idx3-ubyte is not an IDX file"),
        (None, "no FashionMNIST in .*could not be downloaded"),
    ],
)
def test_damaged_or_missing_data_are_named_and_nothing_is_written(
    tmp_path: Path, content: bytes | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # there is no network
    raw = tmp_path / "data" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1") if content else ():
        (raw / f"{name}-ubyte").write_bytes(content or b"")
    with pytest.raises(DataError, match=message):
        run_search("fashion_mnist", data_dir=tmp_path / "data", home=tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_study_cannot_be_named_out_of_its_home(searches: Searches) -> None:
    before = set(searches.home.parent.rglob("*"))
    with pytest.raises(UsageError, match=r"'\.\./x' cannot name a study"):
        searches.run(study="../x")
    assert set(searches.home.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size=1m", r"has 1 MB left, and a search needs 2\d MB at least; make room, or choose another with --home"),
        ("size=99m,ro", r"cannot be written: Read-only file system; choose another with --home"),
    ],
)
def test_a_home_that_is_full_or_read_only_is_refused_at_the_start(
    searches: Searches, tmp_path: Path, options: str, message: str
) -> None:
    with tmpfs(tmp_path / "disk", options):
        with pytest.raises(StoreError, match=message):
            searches.run(home=tmp_path / "disk")
        assert list((tmp_path / "disk").iterdir()) == []
    assert searches.footprints() == []


# --- MLflow is away ---------------------------------------------------------------------------------------------------


def test_a_server_that_hangs_stalls_no_training_and_loses_no_metric(searches: Searches, free_port: int) -> None:
    address = f"http://127.0.0.1:{free_port}"
    with running_server(open_store(searches.home), host="127.0.0.1", port=free_port) as server:
        search = searches.begin("slow", trials=4, epochs=15, workers=2, tracking_uri=address)
        searches.reached(8, 2, search)
        os.killpg(server.pid, signal.SIGSTOP)
        before = len(searches.footprints())
        try:
            wait_until(lambda: len(searches.footprints()) >= before + 40, search)
        finally:
            os.killpg(server.pid, signal.SIGCONT)
        search.result()
    usual, stopped = searches.footprints()[:before], searches.footprints()[before - 2 : before + 40]
    assert {1, 15} <= {footprint.epoch for footprint in stopped}, "trials end and begin meanwhile"
    assert max(gaps(stopped)) < max(gaps(usual)) + 1.0
    searches.assert_all_is_there(num_trials=4, num_epochs=15)


def gaps(footprints: list[Footprint]) -> list[float]:
    """Seconds between one epoch and the next of the same worker, from trial to trial too."""
    by_worker = defaultdict[int, list[float]](list)
    for footprint in footprints:
        by_worker[footprint.pid].append(footprint.time_s)
    return [later - sooner for times in by_worker.values() for sooner, later in pairwise(times)]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- what is promised when nothing goes wrong -------------------------------------------------------------------------


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
