"""Hostile input at every door: `python benchmarks/fuzz.py --seed 0 --cases 10000`, or `--door NAME` for one of them.

A door is a function that makes one hostile input and lets hpo take it. Each case follows from the seed, the door and
its number, so `--door NAME --only 123` repeats one. A case passes if hpo does what was asked, or refuses it with an
error of its own in one line. A traceback is a finding, and so is a case that takes longer than LIMIT_S.
The doors in fuzz_commands.py are whole commands, which take seconds: they get a case for each 20 of another door.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import logging
import random
import signal
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import fuzz_commands
import numpy as np
from machine import describe_machine
from PIL import Image

from hpo.data.datasets import split_dataset
from hpo.data.examples import Dataset
from hpo.data.labels import RARE
from hpo.data.photo_files import SUFFIXES
from hpo.data.photos import load_image_folder, read_photos
from hpo.data.tables import load_table
from hpo.data.texts import load_texts
from hpo.errors import HpoError
from hpo.parameters import Choice, Float, Int, Setting
from hpo.search.encoding import Encoding
from hpo.space import Group, Space
from hpo.values import format_value

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
    limit_s = fuzz_commands.LIMIT_S if DOORS[name] in COMMANDS else LIMIT_S
    with tempfile.TemporaryDirectory(prefix="hpo-fuzz-") as folder, _time_limit(limit_s):
        try:
            DOORS[name](rng, Path(folder))
        except HpoError as error:
            told = str(error)
            is_one_line = bool(told.strip()) and "\n" not in told
            return Outcome(name, number, told, None if is_one_line else f"the message is not one line: {told!r}")
        except _TookTooLong:
            return Outcome(name, number, None, f"took longer than {limit_s} s")
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
    if rng.random() < 0.2:
        default["step"] = rng.choice((1, 2, 0.5, 0.1, *_STRANGE))
    if rng.random() < 0.2:
        bounds = (bounds[0], rng.choice("abcd"))
    return kind(*bounds, **default, log=rng.random() < 0.3)


_COMPARISONS = (">=2", ">0", "<1e3", "<=-1", "0:5", "5:0", ">", "a:b", ">=nan", "0:1:2", ">=2,<3", " < 7 ")


def _condition(rng: random.Random, parameter: Any) -> Any:
    choices = getattr(parameter, "choices", ())
    values = [*choices, *_COMPARISONS, *_STRANGE]
    return rng.choice(values) if rng.random() < 0.8 else tuple(rng.sample(values, 2))


@door
def spaces(rng: random.Random, folder: Path) -> None:
    """Declarations with values that make no sense, and what is done with a space that is accepted."""
    parameters: dict[str, Any] = {}
    for name in "abcd"[: rng.randint(1, 4)]:
        parameter = _parameter(rng)
        if parameters and isinstance(parameter, Float | Int | Choice) and rng.random() < 0.5:
            parent = rng.choice(list(parameters))
            parameter = parameter.with_when({parent: _condition(rng, parameters[parent])})
        parameters[name] = parameter
    ruled = rng.sample([*parameters, "e"], rng.randint(0, 2)) if rng.random() < 0.3 else []
    forbid: Any = [{name: _condition(rng, parameters.get(name)) for name in ruled}] if ruled else []
    space = Space(Group("all", **parameters), forbid=rng.choice((forbid, forbid, forbid, _STRANGE[:1])))
    values = space.active(space.defaults())
    plain, rules = json.loads(json.dumps([space.to_dict(), space.rules()]))
    assert Space.from_dict(plain, rules).to_dict() == space.to_dict(), "it is stored"
    assert Space.from_dict(plain, rules).rules() == space.rules()
    assert Space.from_dict(plain, rules).active(space.defaults()) == values
    encoding = Encoding(space)
    units = encoding.snap(np.random.default_rng(0).uniform(size=(8, len(parameters))))
    for point, is_allowed in zip(units, encoding.allows(units), strict=True):
        assert space.allows(encoding.values(point)) == is_allowed, "two ways to say it"
    for name, parameter in space.parameters.items():
        space.narrow([f"{name}={format_value(parameter.default)}"])


def _override(rng: random.Random) -> str:
    name = rng.choice(("lr", "depth", "optimizer", "momentum", "", "x", " lr ", "lr lr"))
    pieces = (
        *(",", ":", ":", ",", "=", " ", "(", ")", "'"),
        *("1", "0.1", "1e-3", "nan", "inf", "-1", "1e999", "9" * 400, "1_0"),
        *("sgd", "adam", "true", "none", "ä"),
    )
    if rng.random() < 0.5:
        return name + rng.choice(("=", "=", "=", "", "==")) + "".join(rng.choices(pieces, k=rng.randint(0, 5)))
    right = {"lr": ("1e-3:1e-1", "0.1", "1,0.1"), "depth": ("2", "3:5", "4,4"), "optimizer": ("sgd,adam", "adam")}
    name = rng.choice(list(right))
    text = rng.choice(right[name])
    return f"{name}={text[: rng.randint(1, len(text))]}{rng.choice((*[''] * 5, *pieces))}"


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


# --- Doors: files

_WORDS = (
    *("1", "2", "0.5", "nan", "-inf", "1e999", "9" * 30, "2026-01-31"),
    *("", " ", "?", "ä", "\ufeff", "\x00", '"', "'", "a\nb", "x" * 300),
    *("ash", "beech", "true", "../../etc/passwd", "1.png"),
)


def _csv(rng: random.Random, columns: list[str], *, num_rows: int) -> bytes:
    """A table that is nearly right: some values, the encoding, the quotes or the ends of lines are not."""
    delimiter = rng.choice((",", ",", ";", "\t", "|"))
    oddness = rng.choice((0.0, 0.02, 0.3))
    lines = [delimiter.join(columns)]
    for row in range(num_rows):
        values = [str(row % 7), rng.choice(("ash", "beech")), f"{row / 3:.2f}", "a text about trees"][: len(columns)]
        values += ["1"] * (len(columns) - len(values))
        lines.append(delimiter.join(rng.choice(_WORDS) if rng.random() < oddness else value for value in values))
        if rng.random() < oddness / 10:
            lines[-1] += delimiter + "more"
    text = rng.choice(("\n", "\n", "\r\n", "\r")).join(lines)
    content = text.encode(rng.choice(("utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1")), errors="replace")
    return _damaged(rng, content) if rng.random() < 0.4 else content


def _damaged(rng: random.Random, content: bytes) -> bytes:
    """Bits flipped, cut off, a piece of it doubled, or nothing but noise."""
    match rng.randrange(5):
        case 0:
            return content[: rng.randrange(len(content) + 1)]
        case 1:
            return rng.randbytes(rng.randrange(2000))
        case 2:
            start = rng.randrange(len(content) + 1)
            return content[:start] + content[start // 2 :]
        case _:
            flipped = bytearray(content)
            for _ in range(rng.choice((1, 1, 10, 100))):
                if flipped:
                    flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            return bytes(flipped)


def _use(dataset: Dataset) -> None:
    """What a search does with its data first."""
    split_dataset(dataset, seed=0)
    dataset.test.open()


@door
def tables(rng: random.Random, folder: Path) -> None:
    """CSV files for the task `table`, and options that do not fit them."""
    columns = ["number", "tree", "height", "text"][: rng.randint(1, 4)] + (["tree"] if rng.random() < 0.1 else [])
    file = folder / rng.choice(("t.csv", "t.csv", "t.csv", "t.csv", "t.tsv", "t.parquet"))
    file.write_bytes(_csv(rng, columns, num_rows=rng.choice((40, 40, 40, 5, 1, 0))))
    _use(
        load_table(
            file,
            label=rng.choice(("tree", "tree", "number", "height", rng.choice(columns), "x")),
            kind=rng.choice(("auto", "auto", "class", "number")),
            ignore=rng.choice(("", "", "number", "x")),
            categories=rng.choice(("", "", "height")),
            rare=rng.choice(RARE),
        )
    )


@door
def texts(rng: random.Random, folder: Path) -> None:
    """CSV files and folders for the task `text_folder`."""
    if rng.random() < 0.5:
        (folder / "t.csv").write_bytes(
            _csv(rng, ["number", "label", "height", "text"], num_rows=rng.choice((1, 5, 40)))
        )
    else:
        for name in rng.sample(("ash", "beech", "train", "test", "__MACOSX"), rng.randint(1, 4)):
            (folder / name).mkdir()
            for index in range(rng.randrange(4)):
                content = " ".join(rng.choices(_WORDS, k=5)).encode()
                (folder / name / f"{index}.txt").write_bytes(content if rng.random() < 0.7 else _damaged(rng, content))
    _use(
        load_texts(folder, rare=rng.choice(RARE), vocabulary=rng.choice((50, 50, 1, 0)), max_length=rng.choice((1, 20)))
    )


@door
def photo_labels(rng: random.Random, folder: Path) -> None:
    """`labels.csv` beside sound photos."""
    for index in range(12):
        Image.new("L", (8, 8), 20 * index).save(folder / f"{index}.png")
    lines = ["file,tree,height"] + [f"{index}.png,{'ash' if index % 2 else 'beech'},{index / 3}" for index in range(12)]
    for _ in range(rng.randrange(3)):
        row = rng.randrange(len(lines))
        cells = lines[row].split(",")
        cells[rng.randrange(3)] = rng.choice(_WORDS)
        lines[row] = ",".join(cells)
    content = "\n".join(lines).encode()
    (folder / "labels.csv").write_bytes(_damaged(rng, content) if rng.random() < 0.3 else content)
    label = rng.choice(("", "tree", "height", "tree,height", "x"))
    _use(load_image_folder(folder, side=8, label=label, kind=rng.choice(("auto", "class", "number")), rare="drop"))


@cache
def _sound_photos() -> dict[str, bytes]:
    """Photos of each format and mode by ending, some kilobytes each."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4)).astype(np.uint8)
    found = {}
    for suffix, mode in itertools.product(("jpg", "png", "webp", "bmp", "tif"), ("RGB", "L", "P", "RGBA", "I;16", "F")):
        image = Image.fromarray(pixels)
        if mode in ("I;16", "F"):
            values = pixels[..., 0].astype(np.uint16 if mode == "I;16" else np.float32)
            image = Image.fromarray(values * 257 if mode == "I;16" else values / 255)
        else:
            image = image.convert("RGB" if mode == "P" else mode).convert(mode)
        with contextlib.suppress(OSError):  # not every format takes each mode
            image.save(buffer := io.BytesIO(), {"jpg": "jpeg", "tif": "tiff"}.get(suffix, suffix))
            found[f"{mode.replace(';', '')}.{suffix}"] = buffer.getvalue()
    return found


def _bomb(rng: random.Random) -> bytes:
    """A PNG of a few bytes whose header says that it is huge."""
    side = rng.choice((20_000, 100_000, 2**31 - 1, 0))
    header = struct.pack(">IIBBBBB", side, side, rng.choice((1, 8, 16)), rng.choice((0, 2, 3, 6)), 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100_000))), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@door
def images(rng: random.Random, folder: Path) -> None:
    """Photos with flipped bits, cut at a kilobyte, that unpack into gigabytes, or that are something else."""
    name, content = rng.choice(list(_sound_photos().items()))
    match rng.randrange(4):
        case 0:
            content = content[: 1024 * rng.randrange(1 + len(content) // 1024)]
        case 1:
            content = _bomb(rng)
        case _:
            content = _damaged(rng, content)
    file = folder / (name if rng.random() < 0.8 else f"photo.{rng.choice(SUFFIXES).strip('.')}")
    file.write_bytes(content)
    photos = read_photos([file], side=16)
    assert photos.shape == (1, 3, 16, 16)


# --- The command

COMMANDS = (fuzz_commands.homes, fuzz_commands.environments, fuzz_commands.starts)
COST_OF_COMMANDS = 20  # of another door's case

for _command in COMMANDS:
    door(_command)


def _num_cases(name: str, doors: list[str], total: int) -> int:
    """A door's part of the cases."""
    weights = {each: 1 if DOORS[each] in COMMANDS and len(doors) > 1 else COST_OF_COMMANDS for each in doors}
    return -(-total * weights[name] // sum(weights.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Hostile input at every door; see this file.")
    parser.add_argument("--seed", type=int, default=0, help="the cases follow from it")
    parser.add_argument("--cases", type=int, default=1000, help="number of cases, divided among the doors")
    parser.add_argument("--door", choices=sorted(DOORS), help="this door alone")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="this case of --door alone")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    doors = [asked.door] if asked.door else list(DOORS)
    began, outcomes = time.monotonic(), []
    for name in doors:
        numbers = range(_num_cases(name, doors, asked.cases)) if asked.only is None else [asked.only]
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
    print(describe_machine("optuna", "mlflow", "pillow"))
    sys.exit(bool(num_findings))


if __name__ == "__main__":
    main()
