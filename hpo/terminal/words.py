"""How numbers, times, sizes and configurations are written for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpo.values import format_value

if TYPE_CHECKING:
    from hpo.records import TrialState

_LONGEST = 80  # characters of a value in a table


def format_configuration(configuration: Mapping[str, Any]) -> str:
    """`lr=0.00123 optimizer=sgd`: short enough to read; --json has all digits."""
    return " ".join(f"{name}={format_cell(value)}" for name, value in configuration.items())


def format_duration(seconds: float) -> str:
    """`8 s`, `2 min 5 s` or `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_bytes(num_bytes: int) -> str:
    """`512 B`, `3.4 kB`, `1.2 GB`."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def describe_counts(counts: Mapping[TrialState, int]) -> str:
    """`12 complete, 7 pruned (pruned trials were stopped early to save epochs)`."""
    text = ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "no trial yet"
    return f"{text} (pruned trials were stopped early to save epochs)" if counts["pruned"] else text


def format_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = format_value(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


ESTIMATED = "≈"
"""Marks the mean of a trial that was pruned before all its folds were trained."""


def format_score(value: float | None, *, estimated: bool = False) -> str:
    if value is None:
        return "-"
    written = f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"
    return f"{ESTIMATED if estimated else ''}{written}"


def format_cost(name: str, cost: float | None) -> str:
    """`8970`, `0.0438 ms`."""
    if cost is None:
        return "-"
    return f"{cost:.3g} ms" if name == "latency" else f"{cost:.0f}"
