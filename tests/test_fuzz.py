"""A fixed hundred of hostile inputs: never a traceback, never a hang. benchmarks/fuzz.py has any number of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

CASES = 90
COMMANDS = {"homes": (0, 1, 3, 4, 5, 6, 7, 8), "environments": (3, 4)}
"""Cases of whole commands that only look, which are quick."""


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield importlib.import_module("fuzz")
    sys.modules.pop("fuzz", None)


def test_hostile_input_is_done_or_refused_in_one_line(fuzz: ModuleType) -> None:
    doors = [name for name, door in fuzz.DOORS.items() if door not in fuzz.COMMANDS]
    outcomes = [fuzz.run_case(doors[number % len(doors)], 0, number // len(doors)) for number in range(CASES)]
    assert [outcome for outcome in outcomes if outcome.finding] == []
    assert {outcome.door for outcome in outcomes if outcome.refusal} == set(doors), "they are hostile"


def test_a_command_takes_or_refuses_a_damaged_home_and_strange_variables(fuzz: ModuleType) -> None:
    outcomes = [fuzz.run_case(door, 0, number) for door, numbers in COMMANDS.items() for number in numbers]
    assert {outcome.refusal is None for outcome in outcomes} == {True, False}
    assert [outcome for outcome in outcomes if outcome.finding] == []


def test_what_raises_or_hangs_is_a_finding(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(rng: object, folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "LIMIT_S", 1)
    monkeypatch.setitem(fuzz.DOORS, "raises", lambda rng, folder: 1 / 0)
    monkeypatch.setitem(fuzz.DOORS, "hangs", hang)
    assert "ZeroDivisionError" in fuzz.run_case("raises", 0, 0).finding
    assert fuzz.run_case("hangs", 0, 0).finding == "took longer than 1 s"
