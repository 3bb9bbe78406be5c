"""How fast a study's database is: `python benchmarks/storage.py`, or with `--storage postgresql+psycopg://...`.

Two questions. How many trials a second one coordinator can serve, with four trials under way at any time: it asks,
stores 20 epochs and judges each, and tells. And how many seconds of CPU it takes to go on with a study of 5 000 trials:
to open it, to count what is missing, and to ask for one more. Nothing is trained.

`python tests/helpers/postgres.py` starts a PostgreSQL and prints its address. The last lines here name what was used.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from uuid import uuid4

from machine import describe_machine
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution, distribution_to_json
from optuna.storages._rdb.models import (
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from rich.console import Console
from rich.table import Table
from sqlalchemy import insert, select

from hpo.config import Direction
from hpo.parameters import Choice, Float, Int
from hpo.search.encoding import distribution
from hpo.search.lease import Session
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study, Suggestion
from hpo.space import Group, Space

NUM_EPOCHS = 20
NUM_AT_ONCE = 4
SPACE = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=1e-2),
        batch_size=Choice(64, 128, 256, default=128),
    ),
    Group(
        "architecture and optimizer",
        depth=Int(2, 20, default=8),
        optimizer=Choice("sgd", "adam", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        schedule=Choice("constant", "cosine", default="cosine"),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.0),
        weight_decay=Float(1e-6, 1e-2, log=True, default=1e-4),
    ),
)


def settings(planned_trials: int, *, pruner: str) -> StudySettings:
    return StudySettings(
        task="benchmark",
        space=SPACE,
        seed=0,
        strategy="random",  # what the strategy costs is in search_quality.py
        pruner=pruner,
        max_epochs=NUM_EPOCHS,
        metric="accuracy",
        direction=Direction.MAXIMIZE,
        limit=None,
        planned_trials=planned_trials,
    )


def accuracy(epoch: int) -> float:
    return 1 - 0.5 / epoch - random.random() / 10


def trials_per_second(home: Path, url: str | None, num_trials: int) -> tuple[float, float]:
    """One coordinator with four trials under way, whose epochs come in turn; none is pruned, so each has 20.

    Trials a second by the clock, and by the CPU time of the coordinator, which a busy machine does not change.
    """
    storage, name = open_storage(home, url), f"throughput-{uuid4().hex}"
    study = Study.open(storage, name, settings(num_trials, pruner="sha"))
    with Session(storage, name) as session:

        def ask() -> Suggestion | None:
            return study.ask(session.id) if study.remaining(num_trials) else None

        def tell(number: int, epoch: int) -> None:
            study.tell(number, "complete", value=accuracy(epoch), best_epoch=epoch)

        started, started_cpu = time.perf_counter(), time.process_time()
        running: deque[tuple[Suggestion, int]] = deque()
        num_told = 0
        while num_told < num_trials:
            while len(running) < NUM_AT_ONCE and (suggestion := session.exclusively(ask)) is not None:
                running.append((suggestion, 1))
            suggestion, epoch = running.popleft()
            study.report(suggestion.number, epoch, accuracy(epoch))
            if epoch < NUM_EPOCHS:
                running.append((suggestion, epoch + 1))
            else:
                session.exclusively(partial(tell, suggestion.number, epoch))
                num_told += 1
        return num_trials / (time.perf_counter() - started), num_trials / (time.process_time() - started_cpu)


def fill(home: Path, url: str | None, name: str, num_trials: int) -> None:
    """A study with that many trials, half of them pruned after a fifth of their epochs."""
    storage = open_storage(home, url)
    Study.open(storage, name, settings(num_trials, pruner="sha"))
    study_id = storage.get_study_id_from_name(name)
    distributions = {name: distribution(parameter) for name, parameter in SPACE.parameters.items()}
    trials, params, attributes, rungs, epochs, values = [], [], [], [], [], []
    # Row by row, through the storage's own calls, it would take minutes.
    with storage.engine.begin() as connection:
        for number in range(num_trials):
            now = datetime.now(UTC).replace(tzinfo=None)
            times = {"datetime_start": now, "datetime_complete": now}
            state = "COMPLETE" if number % 2 == 0 else "PRUNED"
            trials.append({"number": number, "study_id": study_id, "state": state, **times})
        connection.execute(insert(TrialModel.__table__), trials)
        of_study = select(TrialModel.trial_id).where(TrialModel.study_id == study_id).order_by(TrialModel.trial_id)
        for number, trial_id in enumerate(connection.execute(of_study).scalars().all()):
            for parameter, chosen in distributions.items():
                drawn = chosen.to_internal_repr(random_value(chosen))
                row = {"param_name": parameter, "param_value": drawn, "distribution_json": distribution_to_json(chosen)}
                params.append({"trial_id": trial_id, **row})
            num_epochs = NUM_EPOCHS if number % 2 == 0 else NUM_EPOCHS // 5
            for epoch in range(1, num_epochs + 1):
                row = {"step": epoch, "intermediate_value": accuracy(epoch), "intermediate_value_type": "FINITE"}
                epochs.append({"trial_id": trial_id, **row})
            values.append({"trial_id": trial_id, "objective": 0, "value": accuracy(num_epochs), "value_type": "FINITE"})
            for key, value in {"attempt": 1, "inactive": [], "best_epoch": num_epochs, "reason": None}.items():
                attributes.append({"trial_id": trial_id, "key": key, "value_json": json.dumps(value)})
            rungs.append({"trial_id": trial_id, "key": "completed_rung_0", "value_json": json.dumps(accuracy(4))})
        connection.execute(insert(TrialParamModel.__table__), params)
        connection.execute(insert(TrialIntermediateValueModel.__table__), epochs)
        connection.execute(insert(TrialValueModel.__table__), values)
        connection.execute(insert(TrialUserAttributeModel.__table__), attributes)
        connection.execute(insert(TrialSystemAttributeModel.__table__), rungs)


def random_value(chosen: BaseDistribution) -> float | int | str:
    """A value in the range, of which it does not matter which."""
    if isinstance(chosen, CategoricalDistribution):
        return random.choice(chosen.choices)
    if isinstance(chosen, IntDistribution):
        return random.randint(chosen.low, chosen.high)
    return random.uniform(chosen.low, chosen.high)


RESUME = """
import sys, time
from pathlib import Path
from hpo.search.storage import open_storage
from hpo.search.study import Study, read_settings
home, url, name, num_trials = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3], int(sys.argv[4])
started = time.process_time()
storage = open_storage(home, url)
study = Study.open(storage, name, read_settings(storage, name))
assert study.remaining(num_trials + 1) == 1
study.ask()
print(time.process_time() - started, time.process_time())
"""


def seconds_to_resume(home: Path, url: str | None, num_trials: int) -> tuple[float, float]:
    """CPU seconds of a fresh process: without and with its imports."""
    name = f"resume-{uuid4().hex}"
    fill(home, url, name, num_trials)
    command = [sys.executable, "-c", RESUME, str(home), url or "", name, str(num_trials)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(printed[0]), float(printed[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", metavar="URL", help="a PostgreSQL database; without it sqlite in a new folder")
    parser.add_argument("--trials", type=int, default=300, help="trials for the throughput (default: 300)")
    parser.add_argument("--resume", type=int, default=5000, help="trials of the study to go on with (default: 5000)")
    given = parser.parse_args()

    table = Table("", "measured", "aim")
    with tempfile.TemporaryDirectory() as folder:
        rate, rate_of_cpu = trials_per_second(Path(folder), given.storage, given.trials)
        table.add_row(f"trials a second, {NUM_EPOCHS} reports each", f"{rate:.1f}", "25" if not given.storage else "15")
        table.add_row("trials a second of the coordinator's CPU", f"{rate_of_cpu:.1f}", "")
        cpu_s, with_imports_s = seconds_to_resume(Path(folder), given.storage, given.resume)
        table.add_row(f"CPU seconds to go on with {given.resume} trials", f"{cpu_s:.2f}", "3")
        table.add_row("the same with the imports", f"{with_imports_s:.2f}", "")
    console = Console()
    console.print(table)
    packages = ("optuna", "sqlalchemy", *(["psycopg"] if given.storage else []))
    console.print("PostgreSQL" if given.storage else "sqlite", describe_machine(*packages), sep="; ")


if __name__ == "__main__":
    main()
