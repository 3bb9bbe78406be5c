"""Search spaces: parameters in groups, the groups in order of tuning priority.

    space = Space(
        Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), batch_size=Choice(64, 128, 256, default=128)),
        Group("optimizer", optimizer=Choice("sgd", "adamw", default="sgd"),
              momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"})),
    )

Ranges are checked when the space is put together, because only then a parameter's name is known.
"""

from __future__ import annotations

import math
import unicodedata
from abc import ABC
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any, ClassVar, Self

from hpo.errors import SpaceError, UnknownNameError

Value = Any
"""What a parameter can be: a text, a number, true or false, None, or a tuple of such values."""

Conditions = Mapping[str, Value]
"""A value, or a tuple of values of which one must hold, by the name of a choice."""

LARGEST_INT = 2**53
"""The largest whole number up to which all of them stay distinct when they are stored as real numbers."""

_MISSING: Any = object()
_MAX_SHOWN = 100  # characters of a value in a message


@dataclass(frozen=True)
class _Range(ABC):
    """Numbers from `low` to `high`, both included; equal bounds fix the value."""

    low: float
    high: float
    _: KW_ONLY
    default: float | None = None
    """Value in the default configuration, which is trial 0. Every parameter needs one."""
    log: bool = False
    """Whether the range is searched on a logarithmic scale."""
    when: Conditions = field(default_factory=dict)
    """The parameter is active only where each named choice has this value, or one of these values."""

    _type: ClassVar[type[int] | type[float]]
    _type_name: ClassVar[str]

    def check(self) -> None:
        """Raise ValueError where the declaration makes no sense; the space adds the name."""
        if self.default is None:
            raise ValueError("has no default; give it one with default=")
        for name, value in (("low", self.low), ("high", self.high), ("default", self.default)):
            if isinstance(value, int) and abs(value) > LARGEST_INT:
                raise ValueError(f"{name} is beyond {LARGEST_INT}, the largest whole number that is stored exactly")
            if not self._is_number(value):
                raise ValueError(f"{name} {_shown(value)} is not {self._type_name}")
        if self.low > self.high:
            raise ValueError(f"low {format_value(self.low)} is above high {format_value(self.high)}")
        if self.log and self.low <= 0:
            raise ValueError(f"low {format_value(self.low)} must be above 0 for log=True")
        if not self.contains(self.default):
            raise ValueError(f"default {format_value(self.default)} is outside {self._bounds}")

    def contains(self, value: Any) -> bool:
        return self._is_number(value) and self.low <= value <= self.high

    def narrow(self, text: str) -> Self | Choice:
        """What an override leaves: `LOW:HIGH`, `A,B,C` or one value, all within the range."""
        if ":" in text:
            low, high = (self.parse(part) for part in text.split(":", 1))
            if low > high:
                raise ValueError(f"low {format_value(low)} is above high {format_value(high)}")
            return replace(self, low=low, high=high, default=min(max(self._default, low), high))
        values = list(dict.fromkeys(self.parse(part) for part in text.split(",")))
        if len(values) == 1:
            return replace(self, low=values[0], high=values[0], default=values[0])
        default = self._default if self._default in values else values[0]
        return Choice(*values, default=default, when=self.when)

    @property
    def is_fixed(self) -> bool:
        """Whether there is one value only."""
        return self.low == self.high

    def extremes(self) -> tuple[float, ...]:
        """The values that a check must try: the lowest and the highest."""
        return self.low, self.high

    def with_when(self, when: Conditions) -> Self:
        return replace(self, when=when)

    def describe(self) -> str:
        """The range in words: `0.0001:1 (log)`."""
        if self.is_fixed:
            return f"{format_value(self.low)} (fixed)"
        return f"{self._bounds}{' (log)' if self.log else ''}"

    def to_dict(self) -> dict[str, Any]:
        kind = type(self).__name__.lower()
        return {"type": kind, "low": self.low, "high": self.high, "log": self.log, "default": self.default}

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
        """The value that a text stands for. Raises ValueError where it is none, or outside the range."""
        try:
            value = self._type(text)
        except ValueError:
            raise ValueError(f"'{text}' is not {self._type_name}; allowed is {self._bounds}") from None
        if not self.contains(value):
            raise ValueError(f"{text} is outside {self._bounds}")
        return value


class Float(_Range):
    """Real numbers from `low` to `high`: `Float(1e-4, 1.0, log=True, default=1e-2)`."""

    _type = float
    _type_name = "a number"


class Int(_Range):
    """Whole numbers from `low` to `high`: `Int(2, 20, default=8)`."""

    _type = int
    _type_name = "a whole number"


@dataclass(frozen=True, init=False)
class Choice:
    """One of a few values: `Choice("sgd", "adamw", default="sgd")`, `Choice(None, 0.1, default=None)`.

    Values are texts, numbers, true and false, None, and tuples of such values. 1 and True are different choices; values
    that are written alike, such as 1 and "1", are refused. With `is_open` these are strings to begin with, and `-p` may
    name others.
    """

    choices: tuple[Value, ...]
    default: Value
    when: Conditions
    is_open: bool

    def __init__(
        self, *choices: Value, default: Value = _MISSING, when: Conditions | None = None, is_open: bool = False
    ) -> None:
        object.__setattr__(self, "choices", tuple(map(_as_plain, choices)))
        object.__setattr__(self, "default", _as_plain(default))
        object.__setattr__(self, "when", when or {})
        object.__setattr__(self, "is_open", is_open)

    def check(self) -> None:
        """Raise ValueError where the declaration makes no sense; the space adds the name."""
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
                raise ValueError(f"choices {_shown(written[text])} and {_shown(choice)} are both written {text}")
            written[text] = choice
            if isinstance(choice, tuple) and choice and all(map(self.contains, choice)):
                raise ValueError(f"choice {choice!r} is a tuple of other choices; change one of them")
        if self.default is _MISSING:
            raise ValueError("has no default; give it one with default=")
        if not self.contains(self.default):
            raise ValueError(f"default {_cut(format_value(self.default))} is not one of {self._listing}")

    def contains(self, value: Any) -> bool:
        return any(is_same(choice, value) for choice in self.choices)

    def narrow(self, text: str) -> Choice:
        """What an override leaves: `A,B,C` or one value, each among the choices unless these are open."""
        if not self.is_open and (whole := self._read(text)):
            return Choice(*whole, default=whole[0], when=self.when)
        read = str.strip if self.is_open else self.parse
        chosen = {format_value(value): value for value in (read(part) for part in split_values(text))}
        default = chosen.get(format_value(self.default), next(iter(chosen.values())))
        return Choice(*chosen.values(), default=default, when=self.when)

    @property
    def is_fixed(self) -> bool:
        """Whether there is one value only."""
        return len(self.choices) == 1

    def extremes(self) -> tuple[Value, ...]:
        """The values that a check must try: all of them."""
        return self.choices

    def with_when(self, when: Conditions) -> Choice:
        return Choice(*self.choices, default=self.default, when=when, is_open=self.is_open)

    def describe(self) -> str:
        """The choices in words: `sgd, adamw`."""
        return f"{self._listing} (fixed)" if self.is_fixed else self._listing

    def to_dict(self) -> dict[str, Any]:
        return {"type": "choice", "choices": list(self.choices), "default": self.default}

    @property
    def _listing(self) -> str:
        return ", ".join(format_value(choice) for choice in self.choices)

    def parse(self, text: str) -> Value:
        """The choice that a text stands for. Raises ValueError where it is none of them."""
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
        """Raise ValueError where the declaration makes no sense; the space adds the name."""
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


class Group:
    """Parameters of one tuning priority: `Group("step size", lr=Float(...), batch_size=Choice(...))`.

    A closed group is not searched: each of its parameters is opened by an override that names it, and until then the
    trainer's, or the model's, own default holds.
    """

    def __init__(self, name: str, /, *, closed: bool = False, **parameters: Parameter) -> None:
        self.name = name
        self.closed = closed
        self.parameters = parameters


class Space:
    """Groups of parameters; the order of the groups is the tuning priority.

    `groups` and `parameters` are what is searched, `closed_groups` what `narrow` can add, and `declared` holds the
    parameters of both. Raises SpaceError, naming the parameter and its group, when a range, a default or a condition
    makes no sense.
    """

    def __init__(self, *groups: Group) -> None:
        self.declared: dict[str, Parameter] = {}
        self.groups, self.closed_groups = groups, groups[:0]  # errors name the group of a parameter
        names = [group.name for group in groups]
        for group in groups:
            if names.count(group.name) > 1:
                raise SpaceError(f"two groups are named '{group.name}'; a group's name belongs to one priority.")
            for name, parameter in group.parameters.items():
                self._add(name, parameter)
        for group in groups:
            for name in group.parameters:
                if not name or name != name.strip() or set(name) & set("=,") or _has_control_characters(name):
                    raise SpaceError(f"{name!r} (in '{group.name}') cannot be the name of a parameter: use a word.")
        complete = [
            Group(group.name, closed=group.closed, **{name: self.declared[name] for name in group.parameters})
            for group in groups
        ]
        self.groups = tuple(group for group in complete if not group.closed)
        self.closed_groups = tuple(group for group in complete if group.closed)
        self.parameters = {name: self.declared[name] for group in self.groups for name in group.parameters}

    def _add(self, name: str, parameter: Parameter) -> None:
        if name in self.declared:
            raise self._error(name, f"is already in '{self.group_of(name)}'; a parameter belongs to one group")
        if not isinstance(parameter, Parameter):
            raise self._error(name, f"{_shown(parameter)} is not a Float, Int or Choice")
        try:
            parameter.check()
        except ValueError as problem:
            raise self._error(name, str(problem)) from None
        when = {parent: self._condition(name, parent, wanted) for parent, wanted in parameter.when.items()}
        self.declared[name] = parameter.with_when(when)

    def _condition(self, name: str, parent: str, wanted: Value) -> tuple[Value, ...]:
        """The values of a choice with which a parameter is active; a tuple may itself be one of the choices."""
        choice = self.declared.get(parent)
        if not isinstance(choice, Choice):
            known = ", ".join(n for n, p in self.declared.items() if isinstance(p, Choice)) or "none"
            raise self._error(name, f"when={{'{parent}': ...}} must name a Choice declared before it: {known}")
        values = (wanted,) if choice.contains(wanted) or not isinstance(wanted, tuple) else wanted
        if not values:
            raise self._error(name, f"when={{'{parent}': ()}} can never hold; name a value of {choice.describe()}")
        for value in values:
            if not choice.contains(value):
                problem = f"when={{'{parent}': {_shown(value)}}} can never hold; {parent} is one of {choice.describe()}"
                raise self._error(name, problem)
        return values

    def _error(self, name: str, problem: str) -> SpaceError:
        return SpaceError(f"{name} (in '{self.group_of(name)}'): {problem}")

    def group_of(self, name: str) -> str:
        """Name of the group that a parameter belongs to."""
        return next(group.name for group in (*self.groups, *self.closed_groups) if name in group.parameters)

    def defaults(self) -> dict[str, Value]:
        """The default configuration: a value for every parameter."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def active(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The given values without those whose `when` does not hold."""
        active: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if all(
                parent in active and any(is_same(active[parent], value) for value in _as_tuple(wanted))
                for parent, wanted in parameter.when.items()
            ):
                active[name] = values[name]
        return active

    def narrow(self, overrides: Iterable[str]) -> Space:
        """The space after overrides such as `lr=1e-3:1e-1`, `optimizer=sgd,adamw` or `batch_size=256`.

        An override of a parameter in a closed group opens it; closed groups are dropped, and so is a parameter whose
        condition can no longer hold. Raises SpaceError for a malformed override, an unknown parameter, values outside
        the declared range, and an override of a parameter that another one drops.
        """
        texts = parse_assignments("-p", overrides, "NAME=VALUE, NAME=LOW:HIGH or NAME=A,B,C")
        for name in texts:
            if name not in self.declared:
                raise UnknownNameError("parameter", name, self.declared)
        return self._with({name: self._narrow_one(name, texts) for name in texts}, "-p")

    def fix(self, values: Mapping[str, Value]) -> Space:
        """The space with one value for each of these parameters, which it need not have declared for them.

        A parameter whose condition can no longer hold is dropped. Raises SpaceError where one that is to be fixed is
        dropped with the value of another.
        """
        fixed = {name: Choice(value, default=value, when=self.declared[name].when) for name, value in values.items()}
        return self._with(fixed, "--set")

    def _with(self, replaced: Mapping[str, Parameter], option: str) -> Space:
        kept: dict[str, Parameter] = {}
        for name, parameter in self.declared.items():
            if name not in self.parameters and name not in replaced:
                continue
            when = _still_possible(parameter.when, kept)
            if not all(when.values()):
                if name in replaced:
                    raise self._error(
                        name, f"is active only when {describe_conditions(parameter.when)}, which {option} excludes"
                    )
                continue
            kept[name] = replaced.get(name, parameter).with_when(when)
        groups = (
            Group(group.name, closed=False, **{name: kept[name] for name in group.parameters if name in kept})
            for group in (*self.groups, *self.closed_groups)
        )
        return Space(*(group for group in groups if group.parameters))

    def configure(self, text: str) -> dict[str, Value]:
        """The default configuration except for what `lr=0.1,optimizer=sgd` says; a value for every parameter.

        Raises SpaceError for malformed text, a value that is not allowed, and one that would be without effect because
        its condition does not hold; UnknownNameError for an unknown parameter.
        """
        texts = parse_assignments("--try", split_values(text), "NAME=VALUE,NAME=VALUE,...")
        values = self.defaults()
        for name, written in texts.items():
            if name not in self.parameters:
                raise UnknownNameError("parameter", name, self.parameters)
            try:
                values[name] = self.parameters[name].parse(written)
            except ValueError as problem:
                raise self._error(name, f"{problem} (--try {text})") from None
        active = self.active(values)
        for name in texts:
            if name not in active:
                condition = describe_conditions(self.parameters[name].when)
                raise self._error(name, f"is active only when {condition}; set that in --try {text}, or omit it")
        return values

    def _narrow_one(self, name: str, texts: Mapping[str, str]) -> Parameter:
        try:
            return self.declared[name].narrow(texts[name])
        except ValueError as problem:
            raise self._error(name, f"{problem} (-p {name}={texts[name]})") from None

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """What is searched as plain data, group by group; two spaces are the same exactly when this is."""
        return {
            group.name: {
                name: parameter.to_dict() | {"when": {key: list(_as_tuple(v)) for key, v in parameter.when.items()}}
                for name, parameter in group.parameters.items()
            }
            for group in self.groups
        }

    @classmethod
    def from_dict(cls, declaration: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Self:
        """The space that `to_dict` described."""
        return cls(
            *(
                Group(
                    group,
                    closed=False,
                    **{name: _parameter_from_dict(described) for name, described in parameters.items()},
                )
                for group, parameters in declaration.items()
            )
        )


def parse_assignments(option: str, assignments: Iterable[str], wanted: str) -> dict[str, str]:
    """What assignments such as `lr=0.1` say, as text by name. Raises SpaceError where one is malformed or repeated."""
    texts: dict[str, str] = {}
    for assignment in assignments:
        name, equals, text = (part.strip() for part in assignment.partition("="))
        if not (name and equals and text):
            raise SpaceError(f"{option} '{assignment}' is not {wanted}.")
        if name in texts:
            raise SpaceError(f"{name} is given twice: {option} {name}={texts[name]} and {option} {name}={text}.")
        texts[name] = text
    return texts


def _parameter_from_dict(described: Mapping[str, Any]) -> Parameter:
    when = {parent: from_stored(values) for parent, values in described["when"].items()}
    if described["type"] == "choice":
        return Choice(*from_stored(described["choices"]), default=from_stored(described["default"]), when=when)
    kind = Int if described["type"] == "int" else Float
    return kind(described["low"], described["high"], log=described["log"], default=described["default"], when=when)


def format_value(value: Any) -> str:
    """A parameter's value as a person writes it: 0.001, 1e-05, 256, sgd, true, none, (64,128)."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"({','.join(map(format_value, value))})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def is_same(one: Any, other: Any) -> bool:
    """Whether two values are the same choice: 1 == True in Python, but they are different choices."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return bool(one == other)


def from_stored(stored: Any) -> Any:
    """A value, or values by name, after JSON: a tuple was stored as a list."""
    if isinstance(stored, Mapping):
        return {name: from_stored(value) for name, value in stored.items()}
    return tuple(map(from_stored, stored)) if isinstance(stored, list | tuple) else stored


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


def _shown(value: object) -> str:
    """A stranger's value in a message."""
    return _cut(repr(value))


def _cut(shown: str) -> str:
    return shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."


def _as_plain(value: Any) -> Any:
    """Numbers of numpy as Python's own."""
    if isinstance(value, tuple):
        return tuple(map(_as_plain, value))
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def _check_value(value: Any) -> None:
    """Raise ValueError for what cannot be a choice, or cannot be stored and written."""
    if type(value) is tuple:
        for each in value:
            _check_value(each)
        return
    if value is not None and type(value) not in (str, int, float, bool):
        raise ValueError(f"choice {_shown(value)} is not a string, number, boolean, None or a tuple of them")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"choice {value!r} is not finite")
    if isinstance(value, int) and abs(value) > LARGEST_INT:
        raise ValueError(f"a choice is beyond {LARGEST_INT}, the largest whole number that is stored exactly")
    if isinstance(value, str) and _has_control_characters(value):
        raise ValueError(f"choice {_shown(value)} has control characters; give it a name instead")


def _has_control_characters(text: str) -> bool:
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
    """A text as a value of a type. Raises ValueError where it is none."""
    if kind is not bool:
        return kind(text)
    if text.lower() not in ("true", "false"):
        raise ValueError(f"'{text}' is neither true nor false")
    return text.lower() == "true"


def _as_tuple(values: Value) -> tuple[Value, ...]:
    return values if isinstance(values, tuple) else (values,)


def _still_possible(when: Conditions, kept: Mapping[str, Parameter]) -> dict[str, tuple[Value, ...]]:
    return {
        parent: tuple(value for value in _as_tuple(wanted) if parent in kept and kept[parent].contains(value))
        for parent, wanted in when.items()
    }


def describe_conditions(when: Conditions) -> str:
    """A `when` in words: `optimizer is sgd or rmsprop`."""
    return " and ".join(
        f"{parent} is {' or '.join(format_value(value) for value in _as_tuple(wanted))}"
        for parent, wanted in when.items()
    )
