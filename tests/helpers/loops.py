"""A training loop of one's own that leaves a footprint in each epoch, and waits in its third one while it is held."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

LOOP = """
import json
import os
import time
from pathlib import Path

import hpo

FOLDER = Path(os.environ.get("LOOPS") or Path(__file__).parent)


def train(trial):
    start = (trial.resume() or {"epoch": 0})["epoch"]
    for epoch in range(start + 1, trial.max_epochs + 1):
        footprint = {"pid": os.getpid(), "trial": trial.number, "epoch": epoch, "resumed_after": start}
        with (FOLDER / "footprints.jsonl").open("ab", buffering=0) as file:
            file.write((json.dumps(footprint) + "\\n").encode())
        while epoch == 3 and (FOLDER / "hold").exists():
            time.sleep(0.02)
        trial.save({"epoch": epoch})
        trial.save_model({"epoch": epoch})
        if not trial.report(epoch, {"accuracy": epoch / 10}):
            return


objective = hpo.Objective(
    name="looped", description="a loop that can be held up", train=train, direction="maximize",
    settings={"max_epochs": 4}, space=hpo.Space(hpo.Group("all", lr=hpo.Float(0.1, 1.0, default=0.2))),
)
"""


@dataclass(frozen=True)
class Footprint:
    """What the loop wrote down when one of its epochs began."""

    pid: int
    trial: int
    epoch: int
    resumed_after: int
    """Epoch of the save that the attempt began with; 0 where there was none."""


def footprints(folder: Path, epoch: int | None = None) -> list[Footprint]:
    """All so far, or those of one epoch."""
    path = folder / "footprints.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [Footprint(**json.loads(line)) for line in lines]
    return [each for each in found if epoch in (None, each.epoch)]
