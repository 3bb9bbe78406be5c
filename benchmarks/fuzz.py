"""Hostile input at every door: `python benchmarks/fuzz.py --seed 0 --cases 10000`, or `--door NAME` for one of them.

A door is a function that makes one hostile input and lets hpo take it. Each case follows from the seed, the door and
its number, so `--door NAME --only 123` repeats one. A case passes if hpo does what was asked, or refuses it with an
error of its own in one line. A traceback is a finding, and so is a case that takes longer than LIMIT_S.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hpo.errors import HpoError
from hpo.space import Choice, Float, Group, Int, Setting, Space, format_value

LIMIT_S = 20
"""Seconds after which a case counts as hanging."""

Door = Callable[[random.Random, Path], None]
"""Makes an input from the generator, below an empty folder of its own, and lets hpo take it."""

DOORS: dict[str, Door] = {}


def door(function: Door) -> Door:
    """Register a door under its function's name."""
    DOORS[function.__name__] = function
    return function


@dataclass(frozen=True)
class Outcome:
    """What became of one case."""

    door: str
    number: int
    refusal: str | None
    """hpo's own error; None if it did what was asked."""
    finding: str | None
    """What is wrong; None if the case passed."""


class _TookTooLong(BaseException):
    """Not an Exception: what a reader of strange files catches must not hide it."""


def run_case(name: str, seed: int, number: int) -> Outcome:
    """One case of a door."""
    rng = random.Random(f"{seed}/{name}/{number}")
    with tempfile.TemporaryDirectory(prefix="hpo-fuzz-") as folder, _time_limit(LIMIT_S):
        try:
            DOORS[name](rng, Path(folder))
        except HpoError as error:
            told = str(error)
            is_one_line = bool(told.strip()) and "\n" not in told
            return Outcome(name, number, told, None if is_one_line else f"the message is not one line: {told!r}")
        except _TookTooLong:
            return Outcome(name, number, None, f"took longer than {LIMIT_S} s")
        except BaseException:  # whatever else it is, a person would see a traceback
            return Outcome(name, number, None, traceback.format_exc())
    return Outcome(name, number, None, None)


@contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    def stop(signum: int, frame: FrameType | None) -> None:
        raise _TookTooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- Doors: search spaces

_STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 0.0, 1.0, -0.0, 0.1, 1e-300, 1e300, 10**30),
    *(float("nan"), float("inf"), float("-inf")),
    *("", " ", "1", "none", "None", "true", "a,b", "a=b", "(1,2)", "ä", "\u0000", "\ud800", "\n", "x" * 5000),
    *((), (1, 2), (1.0, 2), ("a", None), ((1, 2), 3)),
    *([1], {"a": 1}, b"x", object(), int, 1j),
)


def _parameter(rng: random.Random) -> Any:
    kind = rng.choice((Float, Int, Choice, Setting, None))
    default = {} if rng.random() < 0.1 else {"default": rng.choice(_STRANGE)}
    if kind is None:
        return rng.choice(_STRANGE)
    if kind is Setting:
        return Setting(rng.choice(_STRANGE))
    if kind is Choice:
        choices = rng.sample(_STRANGE, rng.randrange(5))
        if choices and rng.random() < 0.8:
            default = {"default": rng.choice(choices)}
        return Choice(*choices, **default)
    low, high = rng.sample(range(-3, 40), 2)
    bounds = (low, high) if rng.random() < 0.7 else rng.sample(_STRANGE, 2)
    if rng.random() < 0.7:
        bounds, default = sorted((low, high)), {"default": max(low, high)}
    return kind(*bounds, **default, log=rng.random() < 0.3)


@door
def spaces(rng: random.Random, folder: Path) -> None:
    """Declarations with values that make no sense, and what is done with a space that is accepted."""
    parameters: dict[str, Any] = {}
    for name in "abcd"[: rng.randint(1, 4)]:
        parameter = _parameter(rng)
        if parameters and isinstance(parameter, Float | Int | Choice) and rng.random() < 0.5:
            parent = rng.choice(list(parameters))
            of_parent = getattr(parameters[parent], "choices", ())
            parameter = parameter.with_when({parent: rng.choice([*of_parent, *_STRANGE])})
        parameters[name] = parameter
    space = Space(Group("all", **parameters))
    values = space.active(space.defaults())
    plain = json.loads(json.dumps(space.to_dict()))
    assert Space.from_dict(plain).to_dict() == space.to_dict(), "it is stored"
    assert Space.from_dict(plain).active(space.defaults()) == values
    for name, parameter in space.parameters.items():
        space.narrow([f"{name}={format_value(parameter.default)}"])


def _override(rng: random.Random) -> str:
    name = rng.choice(("lr", "depth", "optimizer", "momentum", "", "x", " lr ", "lr lr"))
    pieces = (
        *(",", ":", ":", ",", "=", " ", "(", ")", "'"),
        *("1", "0.1", "1e-3", "nan", "inf", "-1", "1e999", "9" * 400, "1_0"),
        *("sgd", "adam", "true", "none", "ä"),
    )
    return name + rng.choice(("=", "=", "=", "", "==")) + "".join(rng.choices(pieces, k=rng.randint(0, 5)))


@door
def overrides(rng: random.Random, folder: Path) -> None:
    """`-p` and `--try` with malformed texts."""
    space = Space(
        Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), depth=Int(2, 20, default=8)),
        Group(
            "optimizer",
            optimizer=Choice("sgd", "adam", default="sgd"),
            momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        ),
    )
    if rng.random() < 0.3:
        space.configure(",".join(_override(rng) for _ in range(rng.randint(1, 3))))
    else:
        narrowed = space.narrow([_override(rng) for _ in range(rng.randint(1, 3))])
        assert Space.from_dict(narrowed.to_dict()).to_dict() == narrowed.to_dict()


# --- The command


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile input at every door; see this file.")
    parser.add_argument("--seed", type=int, default=0, help="the cases follow from it")
    parser.add_argument("--cases", type=int, default=1000, help="number of cases, divided among the doors")
    parser.add_argument("--door", choices=sorted(DOORS), help="this door alone")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case of --door alone")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    doors = [asked.door] if asked.door else list(DOORS)
    numbers = range(asked.cases // len(doors)) if asked.only is None else [asked.only]
    began, outcomes = time.monotonic(), []
    for name in doors:
        for number in numbers:
            outcome = run_case(name, asked.seed, number)
            outcomes.append(outcome)
            if outcome.finding:
                print(f"--door {name} --only {number} --seed {asked.seed}:\n{outcome.finding}", flush=True)
        told = [outcome for outcome in outcomes if outcome.door == name]
        fates = Counter("finding" if each.finding else "refused" if each.refusal else "accepted" for each in told)
        print(f"{name}: {len(told)} cases, {', '.join(f'{count} {fate}' for fate, count in fates.items())}", flush=True)
    num_findings = sum(outcome.finding is not None for outcome in outcomes)
    print(f"{len(outcomes)} cases in {time.monotonic() - began:.0f} s: {num_findings} findings")
    sys.exit(bool(num_findings))


if __name__ == "__main__":
    main()
