"""Search spaces: parameters in groups, the groups in order of tuning priority.

    space = Space(
        Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), batch_size=Choice(64, 128, 256, default=128)),
        Group("optimizer", optimizer=Choice("sgd", "adamw", default="sgd"),
              momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"})),
    )

Ranges are checked when the space is put together, because only then a parameter's name is known.

Some configurations may be excluded: `Space(..., forbid=[{"optimizer": "sgd", "lr": ">0.5"}])`, and a range may end
where another parameter is: `Int(1, "depth", default=1)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any, Self

from hpo.errors import SpaceError, UnknownNameError
from hpo.parameters import Choice, Float, Int, Parameter, Value, has_control_characters, shown, split_values
from hpo.values import Conditions, Interval, as_tuple, describe_conditions, format_value, holds, is_number


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

    def __init__(
        self, *groups: Group, forbid: Iterable[Conditions] = (), limits: Mapping[str, str] | None = None
    ) -> None:
        """`forbid` are configurations that no trial may have: each entry names conditions that must not all hold.

        Conditions are as those of `when`. What depends on an inactive parameter does not hold. `limits` has the number
        whose value is the highest of another one, by the name of that one: `Int(8, "width")` adds to it.
        """
        self.declared: dict[str, Parameter] = {}
        self.limits = dict(limits or {})
        self.groups, self.closed_groups = groups, groups[:0]  # errors name the group of a parameter
        names = [group.name for group in groups]
        for group in groups:
            if names.count(group.name) > 1:
                raise SpaceError(f"two groups are named '{group.name}'; a group's name belongs to one priority.")
            for name, parameter in group.parameters.items():
                self._add(name, parameter)
        for group in groups:
            for name in group.parameters:
                if not name or name != name.strip() or set(name) & set("=,") or has_control_characters(name):
                    raise SpaceError(f"{name!r} (in '{group.name}') cannot be the name of a parameter: use a word.")
        complete = [
            Group(group.name, closed=group.closed, **{name: self.declared[name] for name in group.parameters})
            for group in groups
        ]
        self.groups = tuple(group for group in complete if not group.closed)
        self.closed_groups = tuple(group for group in complete if group.closed)
        self.parameters = {name: self.declared[name] for group in self.groups for name in group.parameters}
        self.forbidden = tuple(map(self._forbidden, forbid))
        self._check_defaults()

    def _forbidden(self, entry: Conditions) -> dict[str, tuple[Value, ...]]:
        if not isinstance(entry, Mapping) or not entry:
            raise SpaceError(f"forbid has {shown(entry)}; an entry is conditions by name, such as {{'lr': '>0.5'}}.")
        for name in entry:
            if name not in self.declared:
                raise UnknownNameError("parameter", name, self.declared, "(forbid)")
        conditions = {}
        for name, wanted in entry.items():
            try:
                conditions[name] = _conditions_on(self.declared[name], wanted)
            except ValueError as problem:
                raise SpaceError(f"forbid has {shown(entry)}, which can never hold: {name} {problem}.") from None
        return conditions

    def _check_defaults(self) -> None:
        if problem := self.why_forbidden(self.defaults()):
            raise SpaceError(
                f"the default configuration is forbidden: {problem}; change a default, or what is forbidden."
            )

    def num_configurations(self, most: int) -> int | None:
        """How many different configurations a trial may have; None where there are more than `most` combinations.

        Those that differ in inactive parameters alone are one.
        """
        if math.prod(parameter.num_values for parameter in self.parameters.values()) > most:
            return None
        combinations = product(*(parameter.every_value() for parameter in self.parameters.values()))
        configurations = (dict(zip(self.parameters, combination, strict=True)) for combination in combinations)
        return len({self.identity(values) for values in configurations if self.allows(values)})

    def identity(self, values: Mapping[str, Value]) -> str:
        """The same text for configurations that train the same."""
        return ", ".join(f"{name}={value!r}" for name, value in self.active(values).items())

    def describe_rules(self) -> list[str]:
        """What is forbidden, in words, one sentence each."""
        limits = [f"{name} is never above {limit}" for name, limit in self.limits.items()]
        return limits + [f"never: {describe_conditions(entry)}" for entry in self.forbidden]

    @property
    def has_rules(self) -> bool:
        """Whether some configurations are forbidden."""
        return bool(self.forbidden or self.limits)

    def allows(self, values: Mapping[str, Value]) -> bool:
        """Whether a trial may have these values, of which there is one for each parameter."""
        return self.why_forbidden(values) is None

    def why_forbidden(self, values: Mapping[str, Value]) -> str | None:
        """The rule that forbids a configuration, in words; None where none does."""
        active = self.active(values)
        for name, limit in self.limits.items():
            if name in active and limit in active and active[name] > active[limit]:
                return f"{name} {format_value(active[name])} is above {limit} {format_value(active[limit])}"
        for entry in self.forbidden:
            if all(name in active and holds(active[name], wanted) for name, wanted in entry.items()):
                return describe_conditions(entry)
        return None

    def _add(self, name: str, parameter: Parameter) -> None:
        if name in self.declared:
            raise self._error(name, f"is already in '{self.group_of(name)}'; a parameter belongs to one group")
        if not isinstance(parameter, Parameter):
            raise self._error(name, f"{shown(parameter)} is not a Float, Int or Choice")
        if isinstance(parameter, Float | Int) and isinstance(parameter.high, str):
            parameter = self._limited(name, parameter, parameter.high)
        try:
            parameter.check()
        except ValueError as problem:
            raise self._error(name, str(problem)) from None
        when = {parent: self._condition(name, parent, wanted) for parent, wanted in parameter.when.items()}
        self.declared[name] = parameter.with_when(when)

    def _limited(self, name: str, parameter: Float | Int, limit: str) -> Float | Int:
        """The range up to the highest value that the parameter named `limit` can have."""
        highest = max(_numbers(self.declared.get(limit)), default=None)
        if highest is None:
            known = ", ".join(n for n, p in self.declared.items() if _numbers(p)) or "none"
            raise self._error(
                name, f"high '{limit}' is neither a number nor the name of one declared before it: {known}"
            )
        self.limits[name] = limit
        return replace(parameter, high=int(highest) if isinstance(parameter, Int) else highest)

    def _condition(self, name: str, parent: str, wanted: Value) -> tuple[Value, ...]:
        """The values, or ranges, of another parameter with which a parameter is active."""
        declared = self.declared.get(parent)
        if declared is None:
            known = ", ".join(self.declared) or "none"
            raise self._error(name, f"when={{'{parent}': ...}} must name a parameter declared before it: {known}")
        try:
            return _conditions_on(declared, wanted)
        except ValueError as problem:
            raise self._error(
                name, f"when={{'{parent}': {shown(wanted)}}} can never hold; {parent} {problem}"
            ) from None

    def _error(self, name: str, problem: str) -> SpaceError:
        return SpaceError(f"{name} (in '{self.group_of(name)}'): {problem}")

    def group_of(self, name: str) -> str:
        """Name of the group that a parameter belongs to."""
        return next(group.name for group in (*self.groups, *self.closed_groups) if name in group.parameters)

    def defaults(self) -> dict[str, Value]:
        """The default configuration: a value for every parameter."""
        return {name: parameter.default for name, parameter in self.parameters.items()}

    def confidences(self) -> dict[str, str]:
        """How sure the user is of defaults, one of CONFIDENCES by parameter; of those that say so and can vary."""
        return {
            name: parameter.confidence
            for name, parameter in self.parameters.items()
            if parameter.confidence and not parameter.is_fixed
        }

    def active(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """The given values without those whose `when` does not hold."""
        active: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            if all(
                parent in active and holds(active[parent], as_tuple(wanted))
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

    def extend(self, overrides: Iterable[str]) -> Space:
        """The space with wider ranges, such as `lr=1e-4:3`, or more choices, such as `batch_size=1024`.

        Overrides of one parameter add up. Raises SpaceError for what would exclude a value that is allowed so far, and
        UnknownNameError for a parameter that is not searched.
        """
        first, others = tuple(overrides)[:1], tuple(overrides)[1:]
        if not first:
            return self
        ((name, text),) = parse_assignments("-p", first, "NAME=LOW:HIGH or NAME=A,B,C").items()
        if name not in self.parameters:
            raise UnknownNameError("parameter", name, self.parameters, "(--extend)")
        try:
            wider = self.parameters[name].extend(text)
        except ValueError as problem:
            raise self._error(name, f"{problem} (-p {name}={text} --extend)") from None
        return self._with({name: wider}, "-p").extend(others)

    def fix(self, values: Mapping[str, Value]) -> Space:
        """The space with one value for each of these parameters, which it need not have declared for them.

        A parameter whose condition can no longer hold is dropped. Raises SpaceError if one that is to be fixed is
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
        return self._ruled(kept, *(group for group in groups if group.parameters))

    def _ruled(self, kept: Mapping[str, Parameter], *groups: Group) -> Space:
        """A space of these groups, with what of this one's rules may still matter."""
        possible = (_still_possible(entry, kept) for entry in self.forbidden)
        limits = {name: limit for name, limit in self.limits.items() if name in kept and limit in kept}
        return Space(*groups, forbid=[entry for entry in possible if all(entry.values())], limits=limits)

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
        if rule := self.why_forbidden(values):
            raise SpaceError(f"--try {text} is forbidden in this space: {rule}.")
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
                name: parameter.to_dict() | {"when": {key: list(as_tuple(v)) for key, v in parameter.when.items()}}
                for name, parameter in group.parameters.items()
            }
            for group in self.groups
        }

    def rules(self) -> dict[str, Any]:
        """What is forbidden as plain data; empty where nothing is."""
        if not self.has_rules:
            return {}
        entries = [{name: list(wanted) for name, wanted in entry.items()} for entry in self.forbidden]
        return {"forbid": entries, "limits": self.limits}

    @classmethod
    def from_dict(
        cls, declaration: Mapping[str, Mapping[str, Mapping[str, Any]]], rules: Mapping[str, Any] | None = None
    ) -> Self:
        """The space that `to_dict` and `rules` described."""
        groups = (
            Group(
                group, closed=False, **{name: _parameter_from_dict(described) for name, described in parameters.items()}
            )
            for group, parameters in declaration.items()
        )
        rules = rules or {"forbid": [], "limits": {}}
        return cls(*groups, forbid=map(from_stored, rules["forbid"]), limits=rules["limits"])


def parse_assignments(option: str, assignments: Iterable[str], wanted: str) -> dict[str, str]:
    """What assignments such as `lr=0.1` say, as text by name. Raises SpaceError if one is malformed or repeated."""
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
        return Choice(
            *from_stored(described["choices"]),
            default=from_stored(described["default"]),
            when=when,
            confidence=described.get("confidence"),
        )
    kind = Int if described["type"] == "int" else Float
    names = ("low", "high", "log", "default", "step", "confidence")
    return kind(**{name: described[name] for name in names if name in described}, when=when)


def from_stored(stored: Any) -> Any:
    """A value, or values by name, after JSON: a tuple was stored as a list."""
    if isinstance(stored, Mapping):
        return {name: from_stored(value) for name, value in stored.items()}
    return tuple(map(from_stored, stored)) if isinstance(stored, list | tuple) else stored


def _conditions_on(parameter: Parameter, wanted: Value) -> tuple[Value, ...]:
    """Values of a choice, or ranges of a number as texts, of which one must hold. Raises ValueError if one cannot.

    A tuple may itself be one of the choices. A range of a choice of numbers gives its values.
    """
    if isinstance(parameter, Choice):
        each = (wanted,) if parameter.contains(wanted) or not isinstance(wanted, tuple) else wanted
        values = tuple(value for one in each for value in _chosen(parameter, one))
    else:
        values = tuple(_range_text(parameter, one) for one in as_tuple(wanted))
    if not values:
        raise ValueError(f"is one of {parameter.describe()}")
    return values


def _chosen(choice: Choice, wanted: Value) -> list[Value]:
    if choice.contains(wanted):
        return [wanted]
    found = [value for value in choice.choices if holds(value, (wanted,))]
    if not found:
        raise ValueError(f"is one of {choice.describe()}")
    return found


def _range_text(number: Float | Int, wanted: Value) -> str:
    """A condition on a number as the text of a range: 2 is `2:2`."""
    text = wanted if isinstance(wanted, str) else f"{wanted!r}:{wanted!r}"
    if not _overlaps(number, text):
        raise ValueError(f"is in {number.describe()}; write a number, or a text such as '>=2', '<0.5' or '2:8'")
    return text


def _overlaps(number: Float | Int, text: object) -> bool:
    """Whether a number can have a value within the range of a text."""
    interval = Interval.parse(text)
    if interval is None:
        return False
    if isinstance(number, Int):
        interval = interval.whole()
    low, high = max(number.low, interval.low), min(number.high, interval.high)
    return low < high or (low == high and interval.contains(low))


def _numbers(parameter: Parameter | None) -> list[float]:
    """The largest number that a parameter can be, and others; empty where it can be something else."""
    values: tuple[Value, ...] = () if parameter is None else parameter.extremes()
    numbers = [value for value in values if is_number(value)]
    return numbers if len(numbers) == len(values) else []


def _still_possible(conditions: Conditions, kept: Mapping[str, Parameter]) -> dict[str, tuple[Value, ...]]:
    """What of conditions may hold with the parameters that are kept; an empty tuple where nothing may."""
    return {
        name: tuple(value for value in as_tuple(wanted) if name in kept and _may_be(kept[name], value))
        for name, wanted in conditions.items()
    }


def _may_be(parameter: Parameter, wanted: Value) -> bool:
    if not isinstance(parameter, Choice):
        return _overlaps(parameter, wanted)
    return parameter.contains(wanted) or any(holds(value, (wanted,)) for value in parameter.choices)
