"""Searches of one task in one home, with a model that leaves footprints, waits and misbehaves as asked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from helpers.warm import WarmPopen
from hpo.execution.observer import Observer
from hpo.records import SearchOutcome, TrialRecord
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session import conclude
from hpo.session.search import run_search
from hpo.tracking.store import open_store

if TYPE_CHECKING:
    from mlflow.entities import Run


PATIENCE_S = 120.0  # until a condition that must come true counts as missed, on a busy machine
GONE_WITHIN_S = 10.0  # twice the promise, which is of a machine that has nothing else to do
STOPPING = "stopping after the current epoch; press Ctrl-C again to stop now"


# Tests of faults do not look at this: the winner is found, but neither compared nor tested, and nothing is summarised.
# It is run in this process, and at the beginning of those that it starts.
WITHOUT_CONCLUSION = """
from hpo.search.winner import find_winner
from hpo.session import conclude
conclude.tested_winner = lambda prepared, opened: find_winner(opened.study)
conclude.write_summary = lambda study, summary, winner: None
"""

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
from hpo.parameters import Choice, Float
from hpo.space import Group, Space
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
        chosen: dict[str, Any] = {
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
        return self._begin(partial(WarmPopen, prelude=WITHOUT_CONCLUSION), *self._search(*arguments))

    def start_in_terminal(self, terminal: int, *arguments: str) -> subprocess.Popen[str]:
        """The same in front of a terminal, which is a file descriptor, and writing to it."""
        prelude = f"import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n{WITHOUT_CONCLUSION}"
        popen = partial(WarmPopen, prelude=prelude)
        return self._begin(popen, *self._search(*arguments), stdin=terminal, stdout=terminal, stderr=terminal)

    def _search(self, *arguments: str) -> Sequence[object]:
        options = ["--home", self.home, "-p", "mood=calm", "--strategy", "random", "--pruner", "none", *arguments]
        return "-m", "hpo", "search", self.task, *options

    def start_script(self, *arguments: object) -> subprocess.Popen[str]:
        """A script of a user, which is really started anew."""
        return self._begin(subprocess.Popen, *arguments)

    def _begin(
        self, popen: Callable[..., subprocess.Popen[str]], *arguments: object, **streams: int
    ) -> subprocess.Popen[str]:
        self._processes.append(
            popen(
                [sys.executable, *map(str, arguments)],
                text=True,
                start_new_session=True,
                # Python's own streams shall be as they are for a user.
                env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
                **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
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

    def logged_at(self, trial: int) -> dict[int, int]:
        """When each epoch of a trial was logged, in ms since 1970."""
        history = open_store(self.home).client.get_metric_history(self.runs()[trial].info.run_id, "val/accuracy")
        return {metric.step: metric.timestamp for metric in history}

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
    """None of them outlives the test, and none tests its winner."""
    with searching(tmp_path, home) as found:
        yield found


@contextmanager
def searching(folder: Path, home: Path) -> Iterator[Searches]:
    found = Searches(folder, home)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tested_winner", "write_summary"):
            patch.setattr(conclude, name, getattr(conclude, name))  # so that they are there again afterwards
        exec(WITHOUT_CONCLUSION, {})
        try:
            yield found
        finally:
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
    except (FileNotFoundError, ProcessLookupError):
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
