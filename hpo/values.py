"""Values of parameters: how they are compared and written, and the conditions that a space puts on them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

Conditions = Mapping[str, Any]
"""By the name of a parameter: a value, a text such as `>=2`, `<0.5` or `2:8`, or a tuple of these, of which one must
hold. Comparisons are of numbers."""

_COMPARISON = re.compile(r"\s*(>=|<=|>|<)\s*(\S+)\s*")
_RANGE = re.compile(r"\s*([^\s:]+)\s*:\s*([^\s:]+)\s*")


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`, with or without these two."""

    low: float = -math.inf
    high: float = math.inf
    has_low: bool = True
    has_high: bool = True

    @classmethod
    def parse(cls, text: object) -> Self | None:
        """What `>=2`, `>2`, `<=8`, `<8` or `2:8` stands for; None where it is none of these."""
        if not isinstance(text, str):
            return None
        try:
            if found := _COMPARISON.fullmatch(text):
                operator, bound = found[1], float(found[2])
                if operator[0] == ">":
                    return cls(low=bound, has_low=operator == ">=")
                return cls(high=bound, has_high=operator == "<=")
            if found := _RANGE.fullmatch(text):
                return cls(float(found[1]), float(found[2]))
        except ValueError:  # not numbers
            return None
        return None

    def contains(self, number: float) -> bool:
        is_above = number > self.low or (self.has_low and number == self.low)
        return is_above and (number < self.high or (self.has_high and number == self.high))

    def whole(self) -> Interval:
        """The same of whole numbers, which have a next one."""
        low = math.ceil(self.low) if math.isfinite(self.low) else self.low
        high = math.floor(self.high) if math.isfinite(self.high) else self.high
        return Interval(
            low + 1 if low == self.low and not self.has_low else low,
            high - 1 if high == self.high and not self.has_high else high,
        )


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def holds(value: Any, wanted: tuple[Any, ...]) -> bool:
    """Whether a value is one of those that are wanted, or a number within one of their ranges."""
    return any(is_same(value, each) or _is_within(value, each) for each in wanted)


def _is_within(value: Any, wanted: object) -> bool:
    interval = Interval.parse(wanted) if is_number(value) else None
    return interval is not None and interval.contains(value)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same choice: 1 == True in Python, but they are different choices."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def as_tuple(values: Any) -> tuple[Any, ...]:
    return values if isinstance(values, tuple) else (values,)


def format_value(value: Any) -> str:
    """A parameter's value as a person writes it: 0.001, 1e-05, 256, sgd, true, none, (64,128)."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"({','.join(map(format_value, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def describe_conditions(conditions: Conditions) -> str:
    """Conditions in words: `optimizer is sgd or rmsprop and depth is >=2`."""
    return " and ".join(
        f"{name} is {' or '.join(map(_in_words, as_tuple(wanted)))}" for name, wanted in conditions.items()
    )


def _in_words(wanted: Any) -> str:
    interval = Interval.parse(wanted)
    return format_value(interval.low if interval and interval.low == interval.high else wanted)
