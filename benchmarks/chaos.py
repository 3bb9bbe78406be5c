"""Kill a search again and again, and count what is left: `python benchmarks/chaos.py`.

A search of the digits runs 100 trials on 4 workers. About every second a random worker is killed with -9, and a few
times the searching process itself, which is then started again with the same command. At the end there must be exactly
the trials that were asked for, none lost, none too many, and nothing RUNNING in either store.

`--storage postgresql+psycopg://...` and `--tracking-uri ...` do the same against PostgreSQL;
`python tests/helpers/postgres.py` starts one and prints its address.
`--plague network`, `clock` or `disk` lets something else go wrong as well, for some seconds again and again: the link
to PostgreSQL and MLflow is cut, the clock jumps an hour ahead and back, or the disk is full (plagues.py; as root).
The exit code is 1 where a promise is broken. The last lines name what was used.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import describe_machine
from plagues import JumpingClock, Plague, disk_plague, network_plague

from hpo.execution.observer import Observer
from hpo.session.options import checked
from hpo.session.request import read_study, this_machine
from hpo.session.search import run_search
from hpo.tracking.store import home_store_uri, open_store, search_runs

if TYPE_CHECKING:
    from hpo.records import EndState
    from hpo.search.study import Suggestion
    from hpo.training.trainer import EpochResult

STUDY = "chaos"
TIME_LIMIT_S = 1800


class Diary(Observer):
    """Writes down when what happened, as one JSON line each, so that it outlives the process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)

    def trial_started(self, suggestion: Suggestion) -> None:
        self._write("started", suggestion)

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        self._write("epoch", suggestion, epoch=result.epoch, trained_s=result.metrics["time/epoch_s"])

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        self._write("ended", suggestion, state=state)

    def _write(self, what: str, suggestion: Suggestion, **facts: Any) -> None:
        entry = {"time": time.time(), "what": what, "trial": suggestion.number, "attempt": suggestion.attempt, **facts}
        self._file.write(json.dumps(entry) + "\n")


def search(home: Path, options: argparse.Namespace) -> None:
    """The process that is killed."""
    outcome = run_search(
        "digits",
        study=STUDY,
        home=home,
        storage=options.storage,
        tracking_uri=options.tracking_uri,
        trials=options.trials,
        workers=options.workers,
        observer=Diary(home / "diary.jsonl"),
    )
    sys.exit(0 if outcome.is_done else 1)


class Torment:
    """Runs the search to its end, and kills, and lets the plague strike."""

    def __init__(self, home: Path, options: argparse.Namespace, plague: Plague | None) -> None:
        self._command = [sys.executable, __file__, "--inside", str(home), *sys.argv[1:]]
        self._environment = os.environ.copy()
        self._options = options
        self._diary = home / "diary.jsonl"
        self._plague = plague
        if plague:
            self._command = [*plague.command, *self._command]
            self._environment |= plague.environment
        if options.storage:
            self._command += ["--storage", options.storage, "--tracking-uri", options.tracking_uri or ""]
        self._draw = random.Random(options.seed)
        self._began = time.monotonic()
        self._parent_kills = [self._began + options.parent_every_s * (k + 1) for k in range(options.parent_kills)]
        self._is_struck = False
        self._turn = self._began + options.plague_every_s
        self.worker_kills: list[float] = []
        """When, in seconds since 1970."""
        self.num_parent_kills = 0
        self.num_strikes = 0
        self.num_ends = 0
        """How often the search ended with an error, where the plague lets it."""

    def run(self) -> None:
        while time.monotonic() - self._began < TIME_LIMIT_S:
            started_at = time.time()
            process = subprocess.Popen(self._command, env=self._environment)
            while process.poll() is None:
                time.sleep(self._draw.expovariate(1 / self._options.every_s))
                if self._has_written_since(started_at):  # a search that cannot begin ends, and shall
                    self._strike_or_relent()
                self._kill(process)
            if process.returncode == 0:
                return
            if process.returncode != -signal.SIGKILL:
                self._recover(process.returncode)
        sys.exit(f"the search has not ended after {TIME_LIMIT_S} s")

    def _has_written_since(self, time_s: float) -> bool:
        return self._diary.exists() and (facts := self._diary.stat()).st_size > 0 and facts.st_mtime > time_s

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        if self._parent_kills and time.monotonic() > self._parent_kills[0]:
            del self._parent_kills[0]
            process.kill()
            self.num_parent_kills += 1
        elif victims := workers_of(process.pid):
            victim = self._draw.choice(victims)
            self.worker_kills.append(time.time())
            with suppress(ProcessLookupError):  # it has ended since it was listed
                os.kill(victim, signal.SIGKILL)

    def _strike_or_relent(self) -> None:
        if self._plague is None or time.monotonic() < self._turn:
            return
        if self._is_struck:
            self._plague.relent()
            self._turn = time.monotonic() + self._options.plague_every_s
        else:
            self._plague.strike()
            self.num_strikes += 1
            self._turn = time.monotonic() + self._options.plague_for_s
        self._is_struck = not self._is_struck

    def _recover(self, code: int) -> None:
        if self._plague is None or not self._plague.may_end_the_search:
            sys.exit(f"the search ended with code {code}")
        self.num_ends += 1
        while self._is_struck:
            time.sleep(0.1)
            self._strike_or_relent()


def workers_of(parent: int) -> list[int]:
    """The searching process's workers: children of the server that it forks them from."""
    rows = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    processes = [line.split(None, 2) for line in rows.splitlines()]
    servers = {pid for pid, ppid, args in processes if int(ppid) == parent and "forkserver" in args}
    return [int(pid) for pid, ppid, _ in processes if ppid in servers]


def judge(home: Path, options: argparse.Namespace, torment: Torment) -> bool:
    """Print what is left; whether every promise was kept."""
    stores = {"storage": options.storage, "tracking_uri": options.tracking_uri}
    machine = this_machine(checked({"home": home} | stores))
    study = read_study(machine, STUDY)
    assert study is not None, "the search has made it"
    counts = study.counts()
    num_ended = counts["complete"] + counts["pruned"] + counts["diverged"]
    store = open_store(home, options.tracking_uri or home_store_uri(home))
    experiment = store.client.get_experiment_by_name(f"hpo/{STUDY}")
    assert experiment is not None, "the search has made it"
    runs = search_runs(store.client, experiment.experiment_id, "")
    statuses = Counter(run.info.status for run in runs)
    holes = [
        trial.number
        for trial in study.trials()
        if sorted(trial.curve) != list(range(1, max(trial.curve, default=0) + 1))
    ]
    diary = [json.loads(line) for line in (home / "diary.jsonl").read_text().splitlines()]
    asked_s, running_s = replacement_times(diary, torment.worker_kills)
    seconds_lost = most_seconds_lost(diary)
    promises = {
        f"{options.trials} trials complete, pruned or diverged": num_ended == options.trials,
        "no trial too many, none failed": len(study.trials()) == options.trials,
        "nothing RUNNING in Optuna": counts["running"] == 0,
        "nothing RUNNING in MLflow": statuses["RUNNING"] == 0,
        "a run for each trial, and the summary": len(runs) == options.trials + 1,
        "no epoch missing in a curve": not holes,
        f"at most the running epoch lost a kill, and 2 s of finished ones ({seconds_lost:.1f} s)": seconds_lost <= 2.5,
    }
    print(f"killed: {len(torment.worker_kills)} workers, {torment.num_parent_kills} times the search itself")
    if options.plague:
        print(f"{options.plague}: struck {torment.num_strikes} times, ended the search {torment.num_ends} times")
    print(f"trials: { {state: count for state, count in counts.items() if count} }, MLflow: {dict(statuses)}")
    for what, times in (("handed to a new worker", asked_s), ("trained on by it", running_s)):
        if len(times) < 2:
            continue
        print(
            f"from the kill until the trial was {what}: median {statistics.median(times):.3f} s, "
            f"90th percentile {statistics.quantiles(times, n=10)[-1]:.3f} s (n={len(times)})"
        )
    for promise, is_kept in promises.items():
        print(f"{'kept  ' if is_kept else 'BROKEN'} {promise}")
    return all(promises.values())


def replacement_times(diary: list[dict[str, Any]], kills: list[float]) -> tuple[list[float], list[float]]:
    """Seconds from each kill of a working worker until its trial was handed out again, and until it trained again."""
    asked, running = [], []
    for kill in kills:
        ends = (e for e in diary if e["what"] == "ended" and e["state"] == "interrupted" and 0 <= e["time"] - kill < 2)
        end = next(ends, None)
        if end is None:
            continue  # an idle worker, or the search itself was killed right after
        later = [e for e in diary if e["trial"] == end["trial"] and e["time"] >= end["time"]]
        asked += [e["time"] - kill for e in later if e["what"] == "started"][:1]
        running += [e["time"] - kill for e in later if e["what"] == "epoch"][:1]
    return asked, running


def most_seconds_lost(diary: list[dict[str, Any]]) -> float:
    """The most seconds of training, in finished epochs, that an attempt had to repeat.

    A resumed attempt begins with the result of the epoch that its checkpoint holds.
    """
    trained_s: dict[int, dict[int, float]] = {}
    attempts: dict[int, int] = {}
    most = 0.0
    for entry in diary:
        if entry["what"] != "epoch":
            continue
        trial, epoch = entry["trial"], entry["epoch"]
        known = trained_s.setdefault(trial, {})
        if entry["attempt"] > attempts.get(trial, entry["attempt"]):
            most = max(most, sum(seconds for done, seconds in known.items() if done > epoch))
            trained_s[trial] = known = {done: seconds for done, seconds in known.items() if done <= epoch}
        attempts[trial] = entry["attempt"]
        known[epoch] = entry["trained_s"]
    return most


@contextmanager
def plagued(folder: Path, options: argparse.Namespace) -> Iterator[tuple[Path, Plague | None]]:
    """The home of the search and what it suffers from; puts the plague's stores into the options."""
    home = folder / "disk" / "home"
    home.parent.mkdir()
    with ExitStack() as entered:
        plague: Plague | None = None
        match options.plague:
            case "network":
                plague = entered.enter_context(network_plague(folder))
                options.storage, options.tracking_uri = plague.stores
            case "clock":
                plague = JumpingClock(folder)
            case "disk":
                plague = entered.enter_context(disk_plague(home))
        home.mkdir(exist_ok=True)
        yield home, plague


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--every-s", type=float, default=1.0, help="mean seconds between kills")
    parser.add_argument("--parent-kills", type=int, default=3, help="times that the search itself is killed")
    parser.add_argument("--parent-every-s", type=float, default=20.0, help="seconds between those")
    parser.add_argument("--storage", help="URL of a PostgreSQL database")
    parser.add_argument("--tracking-uri", help="MLflow store, if not the home's")
    parser.add_argument("--plague", choices=["network", "clock", "disk"], help="what else goes wrong")
    parser.add_argument("--plague-every-s", type=float, default=15.0, help="seconds between its visits")
    parser.add_argument("--plague-for-s", type=float, default=5.0, help="seconds that it stays")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        search(options.inside, options)
    with tempfile.TemporaryDirectory() as folder, plagued(Path(folder), options) as (home, plague):
        began = time.monotonic()
        torment = Torment(home, options, plague)
        torment.run()
        is_fine = judge(home, options, torment)
        print(f"{time.monotonic() - began:.0f} s; {' '.join(sys.argv)}")
    print(describe_machine("torch", "optuna", "mlflow"))
    sys.exit(0 if is_fine else 1)


if __name__ == "__main__":
    main()
