"""A fixed hundred of hostile inputs: never a traceback, never a hang. benchmarks/fuzz.py has any number of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

CASES = 100


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield importlib.import_module("fuzz")
    sys.modules.pop("fuzz", None)


def test_hostile_input_is_done_or_refused_in_one_line(fuzz: ModuleType) -> None:
    doors = list(fuzz.DOORS)
    outcomes = [fuzz.run_case(doors[number % len(doors)], 0, number // len(doors)) for number in range(CASES)]
    assert [outcome for outcome in outcomes if outcome.finding] == []
    assert {outcome.door for outcome in outcomes if outcome.refusal} == set(doors), "they are hostile"


def test_what_raises_or_hangs_is_a_finding(fuzz: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(rng: object, folder: Path) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "LIMIT_S", 1)
    monkeypatch.setitem(fuzz.DOORS, "raises", lambda rng, folder: 1 / 0)
    monkeypatch.setitem(fuzz.DOORS, "hangs", hang)
    assert "ZeroDivisionError" in fuzz.run_case("raises", 0, 0).finding
    assert fuzz.run_case("hangs", 0, 0).finding == "took longer than 1 s"
