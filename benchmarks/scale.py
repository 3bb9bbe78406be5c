"""What a trial costs the coordinator as a study grows: `python benchmarks/scale.py --trials 10000 --workers 1000`.

The coordinator, the study's database and MLflow's store are real. The workers are not: an event of theirs comes as soon
as the coordinator asks for one, in the order of a clock that only counts, on which an epoch takes one of 0.5 to 2
units. So the coordinator is always behind, and its events a second say how many workers it can serve. Each epoch has
two metrics, and a trial leaves no weights.

`--storage postgresql+psycopg://...` puts the study there; MLflow's store is sqlite in a new folder. The last lines name
what was used.
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import resource
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from machine import describe_machine
from sqlalchemy import Engine, event

from hpo.config import Direction
from hpo.execution.coordinator import Coordinator
from hpo.execution.messages import Assignment, Decision, EpochDone, TrialDone
from hpo.execution.observer import Observer
from hpo.execution.pool import Event, Worker, WorkerPool
from hpo.home import Home
from hpo.plugins import load_task
from hpo.search.lease import Session
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.tracking.runs import StudyRuns
from hpo.tracking.store import open_store
from hpo.training.trained import DESCRIPTION
from hpo.training.trainer import EpochResult

if TYPE_CHECKING:
    from hpo.records import EndState
    from hpo.search.study import Suggestion

NUM_EPOCHS = 20
MARKS = (100, 300, 1000, 3000, 10_000, 30_000)


class SimulatedWorkers(WorkerPool):
    """Workers that train nothing, on a clock that only counts."""

    device = "cpu"

    def __init__(self, num_workers: int) -> None:
        super().__init__(num_workers, silence_s=1e9)
        self._random = random.Random(0)
        self._under_way: dict[int, tuple[float, float]] = {}
        """Of each trial the accuracy that it comes to, and how long an epoch takes."""
        self._agenda: list[tuple[float, int, int]] = []
        """When which trial ends which epoch; epoch 0 is the end of the trial."""
        self._best: dict[int, tuple[float, int]] = {}
        self._now = 0.0

    def has_room(self) -> bool:
        return len(self._under_way) < self.num_workers

    def _idle_worker(self) -> Worker:
        raise NotImplementedError("nothing is sent to a process here")

    def run(self, assignment: Assignment) -> None:
        assignment.folder.mkdir(parents=True, exist_ok=True)
        (assignment.folder / DESCRIPTION).write_text("{}")
        pace = self._random.uniform(0.5, 2.0)
        # Worse where the learning rate is far from 0.01 to 0.1, so that there is something to learn.
        distance = abs(math.floor(math.log10(assignment.config.lr)) + 2)
        self._under_way[assignment.number] = (0.95 - 0.1 * distance - 0.05 * self._random.random(), pace)
        self._plan(assignment.number, 1)

    def _plan(self, number: int, epoch: int) -> None:
        heapq.heappush(self._agenda, (self._now + self._under_way[number][1], number, epoch))

    def events(self, timeout_s: float) -> Iterator[tuple[int, Event]]:
        if not self._agenda:
            return
        self._now, number, epoch = heapq.heappop(self._agenda)
        if epoch:
            yield number, EpochDone(self._result(number, epoch))
        else:
            del self._under_way[number]
            yield number, TrialDone(has_weights=False)

    def answer(self, trial: int, decision: Decision) -> None:
        if decision is Decision.CONTINUE and self._last_epoch < NUM_EPOCHS:
            self._plan(trial, self._last_epoch + 1)
        else:
            heapq.heappush(self._agenda, (self._now, trial, 0))

    def _result(self, number: int, epoch: int) -> EpochResult:
        self._last_epoch = epoch
        value = self._under_way[number][0] * (1 - 0.5 / epoch) + 0.01 * self._random.random()
        best = max(self._best.get(number, (0.0, 0)) if epoch > 1 else (0.0, 0), (value, epoch))
        self._best[number] = best
        return EpochResult(
            epoch=epoch,
            metrics={"train/loss": 1 - value, "val/accuracy": value},
            value=value,
            best_value=best[0],
            best_epoch=best[1],
            is_best=best[1] == epoch,
            diverged=False,
            settled={"precision": "fp32"},
            symptoms={},
            is_last=epoch == NUM_EPOCHS,
        )


class Meter(Observer):
    """Prints at each mark what a trial has cost since the last one."""

    def __init__(self) -> None:
        print("| trials | coordinator, ms | sender, ms | events | events/s | statements: study | runs | memory, MiB |")
        print("| --- " * 8 + "|")
        self._num_ended = self._num_events = 0
        self._statements = {"study": 0, "runs": 0}
        event.listen(Engine, "before_cursor_execute", self._count)
        self._start()

    def _count(self, connection: Any, *others: Any) -> None:
        self._statements["study" if is_of_study(connection.engine) else "runs"] += 1

    def _start(self) -> None:
        self._since, self._num_events = self._num_ended, 0
        self._statements = dict.fromkeys(self._statements, 0)
        self._thread_s, self._process_s = time.thread_time(), time.process_time()

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        self._num_events += 1

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        self._num_events += 1
        self._num_ended += 1
        if self._num_ended in MARKS:
            self._note()

    def _note(self) -> None:
        num_trials = self._num_ended - self._since
        own_s, all_s = time.thread_time() - self._thread_s, time.process_time() - self._process_s
        cells = (
            f"{self._since} to {self._num_ended}",
            f"{1000 * own_s / num_trials:.1f}",
            f"{1000 * (all_s - own_s) / num_trials:.1f}",
            f"{self._num_events / num_trials:.1f}",
            f"{self._num_events / own_s:.0f}",
            f"{self._statements['study'] / num_trials:.0f}",
            f"{self._statements['runs'] / num_trials:.0f}",
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f}",
        )
        print("|", " | ".join(cells), "|", flush=True)
        self._start()


def is_of_study(engine: Engine) -> bool:
    """Whether an engine is that of the study's database, rather than of MLflow's store."""
    return engine.name == "postgresql" or "optuna" in str(engine.url)


def search(home: Path, given: argparse.Namespace, meter: Meter) -> None:
    """Run the trials of a study of the digits with the real coordinator."""
    task = load_task("digits")
    settings = StudySettings(
        task="digits",
        space=task.space,
        seed=0,
        strategy=given.strategy,
        pruner=given.pruner,
        max_epochs=NUM_EPOCHS,
        metric="accuracy",
        direction=Direction.MAXIMIZE,
        limit=None,
        planned_trials=given.trials,
    )
    name = f"scale-{uuid4().hex}"
    database, store = open_storage(home, given.storage), open_store(home)
    with Session(database, name) as session:
        study = Study.open(database, name, settings)
        study.remember_session(num_trials=given.trials, task_reference="digits", tracking_uri=None)
        runs = StudyRuns(
            store,
            name,
            metric="accuracy",
            direction=settings.direction,
            session=session.id,
            study_id=study.id,
            is_shared=session.is_shared,
        )
        with runs:
            Coordinator(
                study=study,
                session=session,
                runs=runs,
                task=task,
                workers=SimulatedWorkers(given.workers),
                files=Home(home).study(name),
                keep=5,
                timeout_s=None,
                trainer={},
                observer=meter,
            ).run()
            started = time.perf_counter()
            while not runs.flush(600):
                pass
            print(f"MLflow had the last of it {time.perf_counter() - started:.0f} s after the search")


def print_rows(database: Path, num_trials: int) -> None:
    """How much a database of a home has for each trial."""
    with closing(sqlite3.connect(database)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        num_rows = sum(connection.execute(f"SELECT COUNT(*) FROM {name}").fetchone()[0] for name in tables)
        size = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
        (num_bytes,) = connection.execute(size).fetchone()
    per_trial = f"{num_rows / num_trials:.0f} rows and {num_bytes / num_trials / 1024:.1f} KiB a trial"
    print(f"{database.name}: {per_trial}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="trials of the study (default: 1000)")
    parser.add_argument("--workers", type=int, default=64, help="simulated workers (default: 64)")
    parser.add_argument("--strategy", default="priority", help="(default: priority)")
    parser.add_argument("--pruner", default="sha", help="(default: sha)")
    parser.add_argument("--storage", metavar="URL", help="a PostgreSQL database; without it sqlite in a new folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder))
        search(home.path, given, Meter())
        for database in filter(Path.exists, (home.optuna_database, home.mlflow_database)):
            print_rows(database, given.trials)
    packages = ("optuna", "mlflow", "sqlalchemy", *(["psycopg"] if given.storage else []))
    print("PostgreSQL" if given.storage else "sqlite", describe_machine(*packages), sep="; ")


if __name__ == "__main__":
    main()
