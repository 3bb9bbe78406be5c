"""Whether the intervals of importances cover: functions with known importances are searched as `hpo search` does it.

    python benchmarks/importances.py --studies 36 --trials 20 30 50 200

Each study searches a function of its own, drawn at random: a sum of effects, one with interactions, one that saturates
(a plateau of good and one of bad configurations), or a product (Sobol's g-function). `momentum` is active with one of
three optimizers. Learning curves rise to the function at a pace that depends on the configuration, with noise of the
trial and of the epoch. The strategy is `priority`; the pruner is `model`, `sha` or none.

The true importances are computed with 65 536 quasi-random points. Figures are rounded to whole percents, as they are
reported, so an interval covers what it misses by less than half a percent.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import optuna
from machine import describe_machine
from numpy.typing import NDArray
from optuna.storages import InMemoryStorage

from hpo.config import Direction
from hpo.parameters import Choice, Float, Int
from hpo.search import importances as module
from hpo.search.encoding import Encoding
from hpo.search.importances import Design, importances
from hpo.search.settings import StudySettings
from hpo.search.study import Study
from hpo.space import Group, Space

Array = NDArray[np.float64]

SPACE = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=1e-2),
        batch_size=Choice(64, 128, 256, default=128),
    ),
    Group(
        "architecture and optimizer",
        depth=Int(1, 12, default=4),
        width=Int(16, 512, log=True, default=64),
        optimizer=Choice("sgd", "adam", "adamw", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
    ),
    Group(
        "regularization",
        dropout=Float(0.0, 0.5, default=0.1),
        weight_decay=Float(1e-6, 1e-2, log=True, default=1e-4),
    ),
)
ENCODING = Encoding(SPACE)
NAMES = ENCODING.names
NUM_EPOCHS = 20
KINDS = ("sum", "interactions", "plateaus", "product")
PRUNERS = ("model", "sha", "none")
NOISES = (0.05, 0.15, 0.3)
"""Standard deviation of the noise of a trial, by that of the function over the space."""

ROUNDING = 0.005
"""Shares are reported in whole percents."""

RELEVANT = 0.05


class Landscape:
    """A function of a configuration in the unit cube, with its learning curves."""

    def __init__(self, kind: str, seed: int) -> None:
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        count = len(NAMES)
        self._kind = kind
        self._weights = rng.gamma(0.6, size=count)
        self._shapes = rng.integers(3, size=count)
        self._places = rng.uniform(0.2, 0.8, size=count)
        self._signs = rng.choice([-1, 1], size=count)
        self._levels = rng.normal(size=(count, 3)) * 0.5
        self._pairs = [tuple(rng.choice(count, 2, replace=False)) for _ in range(4)]
        self._pair_weights = rng.gamma(0.6, size=4) * rng.choice([-1, 1], size=4) * 1.5
        self._steepness, self._shift = rng.uniform(1.5, 4.0), rng.uniform(-0.5, 0.5)
        self._pace = rng.normal(size=3) * 0.7
        self._mean, self._deviation = 0.0, 1.0
        somewhere = ENCODING.snap(np.random.default_rng(0).random((20_000, count)))
        plain = self._plain(somewhere)
        self._mean, self._deviation = float(plain.mean()), float(plain.std())
        self.spread = float(self.end(somewhere).std())

    def end(self, units: Array) -> Array:
        """Points (m, p) -> (m,) the metric at the last epoch, without noise."""
        plain = (self._plain(units) - self._mean) / self._deviation
        if self._kind == "plateaus":
            return np.asarray(1.0 / (1.0 + np.exp(-self._steepness * (plain + self._shift))))
        return plain

    def curve(self, units: Array, noise: float, rng: np.random.Generator) -> Array:
        """(epochs,) of one trial at a point (p,)."""
        lowest = -0.05 if self._kind == "plateaus" else -3.0 * self.spread
        pace = 0.25 * math.exp(float(self._pace @ (units[[0, 2, 3]] - 0.5)))  # by lr, depth and width
        epochs = np.arange(1, NUM_EPOCHS + 1)
        progress = (1.0 - np.exp(-pace * epochs)) / (1.0 - math.exp(-pace * NUM_EPOCHS))
        end = float(self.end(units[None])[0]) + noise * self.spread * rng.normal()
        return np.asarray(lowest + (end - lowest) * progress + 0.3 * noise * self.spread * rng.normal(size=NUM_EPOCHS))

    def importances(self) -> dict[tuple[str, str | None], float]:
        """The true ones."""
        design = Design(SPACE, ENCODING, np.random.default_rng(0), 2**16)
        values = self.end(np.concatenate(design.blocks)).reshape(len(design.blocks), -1, 1)
        return {key: float(share[0]) for key, share in design.shares(values).items()}

    def _plain(self, units: Array) -> Array:
        effects = np.column_stack([self._effect(axis, units[:, axis]) for axis in range(len(NAMES))])
        is_sgd = units[:, NAMES.index("optimizer")] < 1 / 3
        effects[:, NAMES.index("momentum")] *= 1.5 * is_sgd
        if self._kind == "product":
            return np.asarray(np.prod(1.0 + effects * np.minimum(self._weights, 1.5) * 0.5, axis=1))
        total = effects @ self._weights
        if self._kind != "sum":
            for (one, other), weight in zip(self._pairs, self._pair_weights, strict=True):
                total = total + weight * effects[:, one] * effects[:, other]
        return np.asarray(total)

    def _effect(self, axis: int, x: Array) -> Array:
        if isinstance(SPACE.parameters[NAMES[axis]], Choice):
            return np.asarray(self._levels[axis][np.minimum((3 * x).astype(int), 2)])
        if self._kind == "product":
            return np.asarray((np.abs(4.0 * ((x + self._places[axis]) % 1.0) - 2.0) - 1.0) * 0.87)
        shapes: tuple[Callable[[], Array], ...] = (
            lambda: self._signs[axis] * (x - 0.5) * 1.74,
            lambda: -4.0 * (x - self._places[axis]) ** 2,
            lambda: 0.7 * np.sin(2.0 * np.pi * (0.8 * x + self._places[axis])),
        )
        return np.asarray(shapes[self._shapes[axis]]())


@dataclass(frozen=True)
class Interval:
    """What was reported of one group or parameter, and what is true."""

    num_trials: int
    kind: str
    pruner: str
    key: tuple[str, str | None]
    truth: float
    low: float
    high: float
    is_reported: bool
    missing_trials: int

    @property
    def covers(self) -> bool:
        return self.low - ROUNDING <= self.truth <= self.high + ROUNDING


def search(landscape: Landscape, num_trials: int, pruner: str, noise: float, seed: int) -> Study:
    """A study of the function."""
    settings = StudySettings(
        task="bench",
        space=SPACE,
        seed=seed,
        strategy="priority",
        pruner=pruner,
        max_epochs=NUM_EPOCHS,
        metric="score",
        direction=Direction.MAXIMIZE,
        limit=None,
        planned_trials=num_trials,
    )
    study = Study.open(InMemoryStorage(), "bench", settings)
    rng = np.random.default_rng([seed, num_trials])
    for _ in range(num_trials):
        suggestion = study.ask()
        curve = landscape.curve(ENCODING.units(suggestion.values), noise, rng)
        state, best_epoch = "complete", 1
        for epoch, value in enumerate(curve, start=1):
            best_epoch = epoch if value > curve[best_epoch - 1] else best_epoch
            if study.report(suggestion.number, epoch, float(value)):
                state = "pruned"
                break
        study.tell(suggestion.number, state, value=float(curve[best_epoch - 1]), best_epoch=best_epoch)  # type: ignore[arg-type]
    return study


def rate(job: tuple[int, int]) -> list[Interval]:
    """The intervals of one study. Every one is looked at, also those that are too wide to be reported."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    seed, num_trials = job
    kind, pruner, noise = (KINDS[seed % 4], PRUNERS[seed // 4 % 3], NOISES[seed // 12 % 3])
    landscape = Landscape(kind, seed)
    study = search(landscape, num_trials, pruner, noise, seed)
    reported = importances(study).groups
    widest, fewest = module.WIDEST, module.MIN_ACTIVE_TRIALS
    module.WIDEST, module.MIN_ACTIVE_TRIALS = 1.0, 0
    found = importances(study).groups
    module.WIDEST, module.MIN_ACTIVE_TRIALS = widest, fewest
    intervals = []
    for (group, name), truth in landscape.importances().items():
        each = found[group].parameters[name] if name else found[group]
        told = (reported[group].parameters[name] if name else reported[group]) if reported else None
        assert each.low is not None
        assert each.high is not None
        intervals.append(
            Interval(
                num_trials,
                kind,
                pruner,
                (group, name),
                truth,
                each.low,
                each.high,
                is_reported=told is not None and told.share is not None,
                missing_trials=told.missing_trials if told else 0,
            )
        )
    return intervals


def coverage(intervals: list[Interval]) -> str:
    return f"{np.mean([each.covers for each in intervals]):.0%} of {len(intervals)}" if intervals else "-"


SELECTIONS: dict[str, Callable[[Interval], bool]] = {
    "all": lambda each: True,
    f"true share of {RELEVANT:.0%} or more": lambda each: each.truth >= RELEVANT,
    "reported": lambda each: each.is_reported,
    f"reported, true share of {RELEVANT:.0%} or more": lambda each: each.is_reported and each.truth >= RELEVANT,
    "groups": lambda each: each.key[1] is None,
    "momentum, which is conditional": lambda each: each.key[1] == "momentum",
    **{kind: lambda each, kind=kind: each.kind == kind for kind in KINDS},  # type: ignore[misc]
    **{f"pruner {pruner}": lambda each, pruner=pruner: each.pruner == pruner for pruner in PRUNERS},  # type: ignore[misc]
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=96)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--trials", type=int, nargs="*", default=[20, 50, 200])
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.studies)
    jobs = [(seed, num_trials) for num_trials, seed in product(arguments.trials, seeds)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        intervals = [each for found in pool.map(rate, jobs) for each in found]
    print(f"{arguments.studies} studies; {describe_machine('numpy', 'scipy')}\n")
    print("| coverage at ... trials |", " | ".join(map(str, arguments.trials)), "|")
    print("| --- |", " | ".join("---" for _ in arguments.trials), "|")
    by_trials = [[each for each in intervals if each.num_trials == number] for number in arguments.trials]
    for name, is_chosen in SELECTIONS.items():
        print(f"| {name} |", " | ".join(coverage([e for e in found if is_chosen(e)]) for found in by_trials), "|")
    widths = (f"{np.mean([each.high - each.low for each in found]):.2f}" for found in by_trials)
    print("| mean width |", " | ".join(widths), "|")
    shown = (f"{np.mean([each.is_reported for each in found]):.0%}" for found in by_trials)
    print("| share that is reported |", " | ".join(shown), "|")
    missing = ([each.missing_trials for each in found if each.missing_trials] for found in by_trials)
    print("| median of missing trials |", " | ".join(f"{np.median(m):.0f}" if m else "-" for m in missing), "|")


if __name__ == "__main__":
    main()
