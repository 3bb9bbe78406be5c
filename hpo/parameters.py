"""Parameters of a search space: ranges of numbers, and choices."""

from __future__ import annotations

import math
import sys
import unicodedata
from abc import ABC
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, replace
from decimal import Decimal
from typing import Any, ClassVar, Self

from hpo.values import Conditions, format_value, is_same

Value = Any
"""What a parameter can be: a text, a number, true or false, None, or a tuple of such values."""

CONFIDENCES = ("low", "medium", "high")
"""How sure a user can be of a default."""

LARGEST_INT = 2**53
"""The largest whole number up to which all of them stay distinct when they are stored as real numbers."""

_MISSING: Any = object()
_MAX_SHOWN = 100  # characters of a value in a message
_ROUNDING = 1e-9
"""Relative difference of numbers that count as equal: 0.1 + 0.2 is 0.3."""


@dataclass(frozen=True)
class Range(ABC):
    """Numbers from `low` to `high`, both included; equal bounds fix the value."""

    low: float
    high: Any
    """A number, or the name of one that is declared before: its value is then the highest of this one."""
    _: KW_ONLY
    default: float | None = None
    """Value in the default configuration, which is trial 0. Every parameter needs one."""
    log: bool = False
    """Whether the range is searched on a logarithmic scale."""
    step: float | None = None
    """Only `low`, `low + step`, ... are values."""
    confidence: str | None = None
    """How sure you are of the default: "low", "medium" or "high". `priority` then searches near it first."""
    when: Conditions = field(default_factory=dict)
    """The parameter is active only where each named parameter has this value, or one of these: `{"depth": ">=2"}`."""

    _type: ClassVar[type[int] | type[float]]
    _type_name: ClassVar[str]

    def check(self) -> None:
        """Raise ValueError if the declaration makes no sense; the space adds the name."""
        if self.default is None:
            raise ValueError("has no default; give it one with default=")
        for name, value in (("low", self.low), ("high", self.high), ("default", self.default)):
            if isinstance(value, int) and abs(value) > LARGEST_INT:
                raise ValueError(f"{name} is beyond {LARGEST_INT}, the largest whole number that is stored exactly")
            if not self._is_number(value):
                raise ValueError(f"{name} {shown(value)} is not {self._type_name}")
        if self.low > self.high:
            raise ValueError(f"low {format_value(self.low)} is above high {format_value(self.high)}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {format_value(self.low)} must be above 0 for log=True")
        self._check_width()
        self._check_step()
        if not self.contains(self.default):
            raise ValueError(f"default {format_value(self.default)} is outside {self.describe()}")
        _check_confidence(self.confidence)

    def _check_width(self) -> None:
        """Between ends that only differ in their last digits, samplers divide by zero or leave the range."""
        if self._type is int or self.is_fixed:
            return
        if math.isclose(self.low, self.high, rel_tol=_ROUNDING, abs_tol=sys.float_info.min):
            raise ValueError(f"low {self.low!r} and high {self.high!r} are too close for a search; give one value")

    def _check_step(self) -> None:
        if self.step is None:
            return
        if not self._is_number(self.step) or self.step <= 0:
            raise ValueError(f"step {shown(self.step)} is not {self._type_name} above 0")
        if self.log:
            raise ValueError("has step= and log=True; leave one out")
        num_steps = (self.high - self.low) / self.step
        if abs(num_steps - round(num_steps)) > _ROUNDING:
            last = self.low + math.floor(num_steps) * self.step
            raise ValueError(
                f"high {format_value(self.high)} is not a whole number of steps of {format_value(self.step)} above low "
                f"{format_value(self.low)}; end at {format_value(last)}"
            )
        low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
        if (high - low) % step:  # samplers count in decimals, and would never come to the end
            raise ValueError(
                f"step {self.step!r} is rounded, so that its steps do not end at {format_value(self.high)}; take "
                f"{type(self).__name__ if self._type is int else 'Int'}(0, {round(num_steps)}) and divide in the model"
            )

    def contains(self, value: Any) -> bool:
        if not (self._is_number(value) and self.low <= value <= self.high):
            return False
        return self.step is None or math.isclose(value, self.nearest(value), rel_tol=_ROUNDING, abs_tol=_ROUNDING)

    def nearest(self, value: float) -> float:
        """The value of the range that is nearest to a number."""
        if self.spacing is not None:
            value = self.low + round((value - self.low) / self.spacing) * self.spacing
        low, high = self._type(self.low), self._type(self.high)
        # Rounded, so that 0.1 + 2 * 0.1 is 0.3.
        return min(max(float(f"{value:.12g}") if self._type is float and self.step else self._type(value), low), high)

    @property
    def spacing(self) -> float | None:
        """Distance from one value to the next; None for all real numbers."""
        return self.step or (1 if self._type is int else None)

    def narrow(self, text: str) -> Self | Choice:
        """What an override leaves: `LOW:HIGH`, `A,B,C` or one value, all within the range."""
        if ":" in text:
            if self._is_wider(text):
                raise ValueError(f"{text} is wider than {self._bounds}; add --extend to search all of it")
            low, high = (self.parse(part) for part in text.split(":", 1))
            if low > high:
                raise ValueError(f"low {format_value(low)} is above high {format_value(high)}")
            default = min(max(self._default, low), high)
            return replace(self, low=low, high=high, default=default, confidence=self._confidence_in(default))
        values = list(dict.fromkeys(self.parse(part) for part in text.split(",")))
        if len(values) == 1:
            return replace(self, low=values[0], high=values[0], default=values[0])
        default = self._default if self._default in values else values[0]
        return Choice(*values, default=default, when=self.when, confidence=self._confidence_in(default))

    def _is_wider(self, text: str) -> bool:
        try:
            return self.extend(text) != self
        except ValueError:
            return False

    def extend(self, text: str) -> Self:
        """The range `LOW:HIGH`, which holds this one. Raises ValueError for anything else."""
        try:
            low, high = (self._type(part) for part in text.split(":"))
        except ValueError:
            raise ValueError(f"'{text}' is not a range LOW:HIGH, each end {self._type_name}") from None
        if not low <= self.low <= self.high <= high:
            raise ValueError(f"{text} does not hold the range so far, {self.describe()}: its trials would be outside")
        wider = replace(self, low=low, high=high)
        if not wider.contains(self.low):
            raise ValueError(f"{text} has other values than {self.describe()}: move its ends by whole steps")
        return wider

    @property
    def num_values(self) -> float:
        """How many values there are; infinity for real numbers."""
        if self.is_fixed:
            return 1
        return math.inf if self.spacing is None else round((self.high - self.low) / self.spacing) + 1

    def every_value(self) -> tuple[float, ...]:
        """All values, in rising order, of a range that has a last one."""
        assert self.num_values < math.inf, "the caller has looked"
        return tuple(self.nearest(self.low + index * (self.spacing or 0)) for index in range(int(self.num_values)))

    @property
    def is_fixed(self) -> bool:
        """Whether there is one value only."""
        return bool(self.low == self.high)

    def extremes(self) -> tuple[float, ...]:
        """The values that a check must try: the lowest and the highest."""
        return self.low, self.high

    def with_when(self, when: Conditions) -> Self:
        return replace(self, when=when)

    def describe(self) -> str:
        """The range in words: `0.0001:1 (log)`."""
        if self.is_fixed:
            return f"{format_value(self.low)} (fixed)"
        scale = " (log)" if self.log else f" (step {format_value(self.step)})" if self.step else ""
        return f"{self._bounds}{scale}"

    def to_dict(self) -> dict[str, Any]:
        kind = type(self).__name__.lower()
        given = {"step": self.step, "confidence": self.confidence}
        optional = {name: value for name, value in given.items() if value}
        return {"type": kind, "low": self.low, "high": self.high, "log": self.log, "default": self.default} | optional

    def _confidence_in(self, default: float) -> str | None:
        """It is about a value: another default has none."""
        return self.confidence if default == self.default else None

    @property
    def _default(self) -> float:
        assert self.default is not None, "a space checks its parameters first"
        return self.default

    @property
    def _bounds(self) -> str:
        return f"{format_value(self.low)}:{format_value(self.high)}"

    def _is_number(self, value: Any) -> bool:
        types = (int,) if self._type is int else (int, float)
        if not isinstance(value, types) or isinstance(value, bool):
            return False
        return abs(value) <= LARGEST_INT if isinstance(value, int) else math.isfinite(value)

    def parse(self, text: str) -> float:
        """The value that a text stands for. Raises ValueError if it is none, or outside the range."""
        try:
            value = self._type(text)
        except ValueError:
            raise ValueError(f"'{text}' is not {self._type_name}; allowed is {self._bounds}") from None
        if not self.contains(value):
            raise ValueError(f"{text} is outside {self.describe() if self.step else self._bounds}")
        return self.nearest(value) if self.step else value


class Float(Range):
    """Real numbers from `low` to `high`: `Float(1e-4, 1.0, log=True, default=1e-2)`."""

    _type = float
    _type_name = "a number"


class Int(Range):
    """Whole numbers from `low` to `high`: `Int(2, 20, default=8)`."""

    _type = int
    _type_name = "a whole number"


@dataclass(frozen=True, init=False)
class Choice:
    """One of a few values: `Choice("sgd", "adamw", default="sgd")`, `Choice(None, 0.1, default=None)`.

    Values are texts, numbers, true and false, None, and tuples of such values. 1 and True are different choices; values
    that are written alike, such as 1 and "1", are refused. With `is_open` these are strings to begin with, and `-p` may
    name others. `confidence` is as in `Float`.
    """

    choices: tuple[Value, ...]
    default: Value
    when: Conditions
    is_open: bool
    confidence: str | None

    def __init__(
        self,
        *choices: Value,
        default: Value = _MISSING,
        when: Conditions | None = None,
        is_open: bool = False,
        confidence: str | None = None,
    ) -> None:
        object.__setattr__(self, "choices", tuple(map(_as_plain, choices)))
        object.__setattr__(self, "default", _as_plain(default))
        object.__setattr__(self, "when", when or {})
        object.__setattr__(self, "is_open", is_open)
        object.__setattr__(self, "confidence", confidence)

    def check(self) -> None:
        """Raise ValueError if the declaration makes no sense; the space adds the name."""
        if not self.choices:
            raise ValueError("has no choices; give at least one")
        for choice in self.choices:
            _check_value(choice)
        written: dict[str, Value] = {}
        for choice in self.choices:
            text = format_value(choice)
            if text in written and is_same(written[text], choice):
                raise ValueError(f"has a choice twice: {self._listing}")
            if text in written:
                raise ValueError(f"choices {shown(written[text])} and {shown(choice)} are both written {text}")
            written[text] = choice
            if isinstance(choice, tuple) and choice and all(map(self.contains, choice)):
                raise ValueError(f"choice {choice!r} is a tuple of other choices; change one of them")
        if self.default is _MISSING:
            raise ValueError("has no default; give it one with default=")
        if not self.contains(self.default):
            raise ValueError(f"default {_cut(format_value(self.default))} is not one of {self._listing}")
        _check_confidence(self.confidence)

    def contains(self, value: Any) -> bool:
        return any(is_same(choice, value) for choice in self.choices)

    def narrow(self, text: str) -> Choice:
        """What an override leaves: `A,B,C` or one value, each among the choices unless these are open."""
        if not self.is_open and (whole := self._read(text)):
            return Choice(*whole, default=whole[0], when=self.when)
        read = str.strip if self.is_open else self.parse
        chosen = {format_value(value): value for value in (read(part) for part in split_values(text))}
        is_kept = format_value(self.default) in chosen
        default = chosen[format_value(self.default)] if is_kept else next(iter(chosen.values()))
        confidence = self.confidence if is_kept else None
        return Choice(*chosen.values(), default=default, when=self.when, confidence=confidence)

    def extend(self, text: str) -> Choice:
        """These choices, then the new ones of `A,B,C`. Raises ValueError if one is of another type."""
        added: list[Value] = []
        for part in split_values(text):
            if not self._read(part):
                added.append(self._new_choice(part.strip()))
        return self._with(self.when, *self.choices, *added)

    def _new_choice(self, text: str) -> Value:
        kinds = {type(choice) for choice in self.choices}
        for kind in (int, float, str):
            if kind in kinds:
                with suppress(ValueError):
                    return kind(text)
        names = " or ".join(sorted(kind.__name__ for kind in kinds))
        raise ValueError(f"'{text}' is not of type {names}, as the other choices are")

    @property
    def num_values(self) -> int:
        return len(self.choices)

    def every_value(self) -> tuple[Value, ...]:
        return self.choices

    @property
    def is_fixed(self) -> bool:
        """Whether there is one value only."""
        return len(self.choices) == 1

    def extremes(self) -> tuple[Value, ...]:
        """The values that a check must try: all of them."""
        return self.choices

    def with_when(self, when: Conditions) -> Choice:
        return self._with(when, *self.choices)

    def _with(self, when: Conditions, *choices: Value) -> Choice:
        return Choice(*choices, default=self.default, when=when, is_open=self.is_open, confidence=self.confidence)

    def describe(self) -> str:
        """The choices in words: `sgd, adamw`."""
        return f"{self._listing} (fixed)" if self.is_fixed else self._listing

    def to_dict(self) -> dict[str, Any]:
        confidence = {"confidence": self.confidence} if self.confidence else {}
        return {"type": "choice", "choices": list(self.choices), "default": self.default} | confidence

    @property
    def _listing(self) -> str:
        return ", ".join(format_value(choice) for choice in self.choices)

    def parse(self, text: str) -> Value:
        """The choice that a text stands for. Raises ValueError if it is none of them."""
        if found := self._read(text):
            return found[0]
        raise ValueError(f"'{text.strip()}' is not one of {self._listing}")

    def _read(self, text: str) -> list[Value]:
        """The choice that a text stands for, as it is written or else by its value; empty where it is none."""
        exact = [choice for choice in self.choices if format_value(choice) == text]
        return exact or [choice for choice in self.choices if _reads_as(text.strip(), choice)][:1]


class Setting(Choice):
    """A value that is not searched; `-p` puts others of its type in its place: `Setting("default")`, `Setting(224)`."""

    def __init__(self, value: str | int | float | bool, *, when: Conditions | None = None) -> None:
        super().__init__(value, default=value, when=when)

    def check(self) -> None:
        """Raise ValueError if the declaration makes no sense; the space adds the name."""
        super().check()
        if not isinstance(self.default, str | int | float):
            raise ValueError(f"setting {self.default!r} is not a string, number or boolean; use Choice")

    def with_when(self, when: Conditions) -> Setting:
        return Setting(self.default, when=when)

    def narrow(self, text: str) -> Choice:
        """What an override says, be it one value or `A,B,C`."""
        kind = type(self.default)
        try:
            values = [_read_as(kind, part.strip()) for part in text.split(",")]
        except (ValueError, OverflowError):
            raise ValueError(f"'{text}' is not of type {kind.__name__}") from None
        distinct = {format_value(value): value for value in values}
        return Choice(*distinct.values(), default=values[0], when=self.when)


Parameter = Float | Int | Choice


def describe_default(parameter: Parameter) -> str:
    """The default in words: `0.01`, or `0.01 (high confidence)`."""
    text = format_value(parameter.default)
    is_believed = parameter.confidence and not parameter.is_fixed
    return f"{text} ({parameter.confidence} confidence)" if is_believed else text


def split_values(text: str) -> list[str]:
    """The parts of a list such as `a,(1,2),b`: a comma within brackets separates nothing."""
    parts, depth = [""], 0
    for character in text:
        depth = max(0, depth + (character == "(") - (character == ")"))
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def shown(value: object) -> str:
    """A user's value in a message."""
    return _cut(repr(value))


def _cut(shown: str) -> str:
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


def _as_plain(value: Any) -> Any:
    """Numbers of numpy as Python's own."""
    if isinstance(value, tuple):
        return tuple(map(_as_plain, value))
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def _check_confidence(confidence: Any) -> None:
    if confidence is not None and confidence not in CONFIDENCES:
        raise ValueError(
            f"confidence {shown(confidence)} is not one of {', '.join(CONFIDENCES)}; omit it to say nothing"
        )


def _check_value(value: Any) -> None:
    """Raise ValueError for what cannot be a choice, or cannot be stored and written."""
    if type(value) is tuple:
        for each in value:
            _check_value(each)
        return
    if value is not None and type(value) not in (str, int, float, bool):
        raise ValueError(f"choice {shown(value)} is not a string, number, boolean, None or a tuple of them")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"choice {value!r} is not finite")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"a choice is beyond {LARGEST_INT}, the largest whole number that is stored exactly")
    if isinstance(value, str) and has_control_characters(value):
        raise ValueError(f"choice {shown(value)} has control characters; give it a name instead")


def has_control_characters(text: str) -> bool:
    """Whether a text has line breaks and the like, or what cannot be encoded."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _reads_as(text: str, choice: Value) -> bool:
    if isinstance(choice, tuple):
        return text.replace(" ", "") == format_value(choice).replace(" ", "")
    if choice is None or isinstance(choice, bool):
        return text.lower() == format_value(choice)
    if isinstance(choice, str):
        return text == choice
    try:
        return bool(float(text) == choice)
    except ValueError:
        return False


def _read_as(kind: type, text: str) -> Any:
    """A text as a value of a type. Raises ValueError if it is none."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(f"'{text}' is neither true nor false")
    return text.lower() == "true"
