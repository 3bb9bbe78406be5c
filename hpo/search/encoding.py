"""A space as others see it: Optuna's distributions, the unit cube, and the inputs of a Gaussian process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hpo.parameters import Choice, Float, Int, Parameter, Value
from hpo.search.kernels import Array
from hpo.space import Group, Space
from hpo.values import Conditions, Interval, as_tuple, format_value, is_same

_MAX_DECLARATION = 1800
"""Characters of JSON that leave room for what else stands in an Optuna declaration."""

_NUM_NEIGHBOURS = 1024
_ROUNDING = 1e-9


def distribution(parameter: Parameter) -> BaseDistribution:
    """The parameter as Optuna declares it."""
    match parameter:
        case Choice():
            return CategoricalDistribution(parameter.choices)
        case Int():
            return IntDistribution(
                int(parameter.low), int(parameter.high), log=parameter.log, step=int(parameter.step or 1)
            )
        case Float():
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log, step=parameter.step)


class OptunaSpace:
    """A space as Optuna has it: choices that it could not tell apart, or not store, are labels there.

    It compares choices by `==`, for which 1 is True, stores tuples as lists, and keeps a declaration in 2 048
    characters. Three steps of 0.1 are 0.30000000000000004 for it.
    """

    def __init__(self, space: Space) -> None:
        self._labels: dict[str, dict[str, Value]] = {
            name: _labels(parameter)
            for name, parameter in space.parameters.items()
            if isinstance(parameter, Choice) and not _is_stored_by_optuna(parameter)
        }
        self.space = self._labelled(space) if self._labels else space
        self._stepped = {
            name: parameter
            for name, parameter in space.parameters.items()
            if isinstance(parameter, Float) and parameter.step
        }

    def encode(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Values as Optuna has them."""
        return {name: self._label(name, value) for name, value in values.items()}

    def decode(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What Optuna has, as values of the space."""
        return {name: self._value(name, value) for name, value in values.items()}

    def _value(self, name: str, stored: Value) -> Value:
        if name in self._labels:
            return self._labels[name][str(stored)]
        return self._stepped[name].nearest(stored) if name in self._stepped else stored

    def _label(self, name: str, value: Value) -> Value:
        if name not in self._labels:
            return value
        return next(label for label, choice in self._labels[name].items() if is_same(choice, value))

    def _labelled(self, space: Space) -> Space:
        groups = (
            Group(group.name, closed=False, **{n: self._parameter(n, p) for n, p in group.parameters.items()})
            for group in space.groups
        )
        return Space(*groups, forbid=map(self._conditions, space.forbidden), limits=space.limits)

    def _conditions(self, conditions: Conditions) -> Conditions:
        return {
            name: tuple(self._label(name, value) for value in as_tuple(wanted)) for name, wanted in conditions.items()
        }

    def _parameter(self, name: str, parameter: Parameter) -> Parameter:
        when = self._conditions(parameter.when)
        if name not in self._labels:
            return parameter.with_when(when)
        assert isinstance(parameter, Choice), "choices alone have labels"
        default = self._label(name, parameter.default)
        return Choice(*self._labels[name], default=default, when=when, confidence=parameter.confidence)


def _is_stored_by_optuna(choice: Choice) -> bool:
    if any(isinstance(value, tuple) for value in choice.choices) or len(set(choice.choices)) < len(choice.choices):
        return False
    return len(json.dumps(choice.choices)) <= _MAX_DECLARATION


def _labels(choice: Choice) -> dict[str, Value]:
    width = max(8, _MAX_DECLARATION // (8 * len(choice.choices)))
    return {f"#{index} {format_value(value)[:width]}": value for index, value in enumerate(choice.choices)}


class Encoding:
    """A space as a unit cube with one axis a parameter: numbers evenly on their scale, choices as equal intervals."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.names = list(space.parameters)
        self._parameters = list(space.parameters.values())
        self._defaults = self.units(space.defaults())

    @property
    def owners(self) -> NDArray[np.int64]:
        """(d,) which axis each of the `columns` comes from."""
        widths = [len(p.choices) if isinstance(p, Choice) else 1 for p in self._parameters]
        return np.repeat(np.arange(len(widths)), widths)

    @property
    def choice_axes(self) -> NDArray[np.bool_]:
        """(p,) which axes are choices."""
        return np.array([isinstance(parameter, Choice) for parameter in self._parameters])

    def contains(self, values: Mapping[str, object]) -> bool:
        """Whether these are a value for each parameter, within its range."""
        return all(
            name in values and parameter.contains(values[name])
            for name, parameter in zip(self.names, self._parameters, strict=True)
        )

    def units(self, values: Mapping[str, Value]) -> Array:
        """Values of every parameter -> (p,) in [0, 1]."""
        return np.array([_to_unit(p, values[name]) for name, p in zip(self.names, self._parameters, strict=True)])

    def values(self, units: Array) -> dict[str, Value]:
        """(p,) in [0, 1] -> values of every parameter."""
        return {name: _from_unit(p, float(u)) for name, p, u in zip(self.names, self._parameters, units, strict=True)}

    def snap(self, units: Array) -> Array:
        """Move points (m, p) to the nearest ones that stand for values: within the cube, whole numbers, choices."""
        snapped = np.clip(units, 0.0, 1.0)
        for axis, parameter in enumerate(self._parameters):
            if isinstance(parameter, Choice):
                snapped[:, axis] = (positions(snapped[:, axis], len(parameter.choices)) + 0.5) / len(parameter.choices)
            elif parameter.is_fixed:
                snapped[:, axis] = 0.5
            elif parameter.spacing is not None:
                low, high = _scaled_bounds(parameter)
                numbers = _numbers(parameter, snapped[:, axis])
                steps = np.rint((numbers - parameter.low) / parameter.spacing)
                numbers = np.clip(parameter.low + steps * parameter.spacing, parameter.low, parameter.high)
                snapped[:, axis] = ((np.log(numbers) if parameter.log else numbers) - low) / (high - low)
        return snapped

    def allows(self, units: Array) -> NDArray[np.bool_]:
        """Which of the points (m, p), which stand for values, the space allows; (m,)."""
        allowed = np.ones(len(units), dtype=bool)
        if not self.space.has_rules:
            return allowed
        active = self._activity(units)
        limits = {name: limit for name, limit in self.space.limits.items() if name in active and limit in active}
        for name, limit in limits.items():
            number, highest = (self._numbers_of(each, units) for each in (name, limit))
            allowed &= ~(active[name] & active[limit] & (number > highest + _ROUNDING * np.abs(highest)))
        for entry in self.space.forbidden:
            if not active.keys() >= entry.keys():
                continue  # about what is in a closed group
            hits = [active[name] & self._holds(name, wanted, units) for name, wanted in entry.items()]
            allowed &= ~np.logical_and.reduce(hits)
        return allowed

    def nearest_allowed(self, units: Array, rng: np.random.Generator, *, held: NDArray[np.bool_]) -> Array:
        """A point (p,) near another one that stands for values which the space allows.

        It is the nearest of some random ones, or the default configuration where none of them is allowed. What is
        `held` stays, where that is possible.
        """
        around = np.tile(units, (_NUM_NEIGHBOURS, 1))
        points = self.snap(np.concatenate([self.mutated(around, rng), rng.uniform(size=around.shape)]))
        for kept in (np.where(held, self.snap(units[None]), points), points):
            if len(allowed := kept[self.allows(kept)]):
                nearest: Array = allowed[np.argmin(((allowed - units) ** 2).sum(axis=1))]
                return nearest
        return self._defaults

    def mutated(self, units: Array, rng: np.random.Generator) -> Array:
        """Points (m, p) with some of their values moved by steps of all sizes, and some of their choices redrawn."""
        share = rng.choice([0.2, 0.5, 1.0], size=(len(units), 1))
        is_moved = rng.uniform(size=units.shape) < share
        steps = rng.normal(size=units.shape) * 10 ** rng.uniform(-2, -0.5, size=(len(units), 1))
        is_redrawn = is_moved & self.choice_axes & (rng.uniform(size=units.shape) < 0.3)
        return np.where(is_redrawn, rng.uniform(size=units.shape), units + np.where(is_moved, steps, 0.0))

    def columns(self, units: Array) -> Array:
        """Points (m, p) -> (m, d): one column a number, one a value of a choice.

        Two choices are as far apart as the ends of a range. What is inactive counts as the default, for it is without
        effect.
        """
        active = self._activity(units)
        columns = []
        for axis, (name, parameter) in enumerate(zip(self.names, self._parameters, strict=True)):
            effective = np.where(active[name], units[:, axis], self._defaults[axis])
            if isinstance(parameter, Choice):
                one_hot = np.eye(len(parameter.choices))[positions(effective, len(parameter.choices))]
                columns.append(one_hot * math.sqrt(0.5))
            else:
                columns.append(effective[:, None])
        return np.concatenate(columns, axis=1)

    def _activity(self, units: Array) -> dict[str, NDArray[np.bool_]]:
        """Which of the points (m, p) each parameter is active at; (m,) by its name."""
        active: dict[str, NDArray[np.bool_]] = {}
        for name, parameter in zip(self.names, self._parameters, strict=True):
            is_active = np.ones(len(units), dtype=bool)
            for parent, wanted in parameter.when.items():
                is_active &= active[parent] & self._holds(parent, as_tuple(wanted), units)
            active[name] = is_active
        return active

    def _holds(self, name: str, wanted: tuple[Value, ...], units: Array) -> NDArray[np.bool_]:
        """At which of the points (m, p) a parameter has a value that is wanted; (m,)."""
        along = units[:, self.names.index(name), None]
        lows, highs = np.transpose(self.intervals(name, wanted))
        is_within: NDArray[np.bool_] = ((along >= lows - _ROUNDING) & (along <= highs + _ROUNDING)).any(axis=1)
        return is_within

    def intervals(self, name: str, wanted: tuple[Value, ...]) -> list[tuple[float, float]]:
        """The parts of a parameter's axis that stand for wanted values, with a margin around each value it can have."""
        parameter = self._parameters[self.names.index(name)]
        return [interval for each in wanted if (interval := _interval(parameter, each))]

    def _numbers_of(self, name: str, units: Array) -> Array:
        axis = self.names.index(name)
        parameter = self._parameters[axis]
        if isinstance(parameter, Choice):
            return np.array(parameter.choices, dtype=float)[positions(units[:, axis], len(parameter.choices))]
        return _numbers(parameter, units[:, axis])


def _interval(parameter: Parameter, wanted: Value) -> tuple[float, float] | None:
    if isinstance(parameter, Choice):
        position, count = _position(parameter, wanted), len(parameter.choices)
        return (position + 0.25) / count, (position + 0.75) / count
    interval = Interval.parse(wanted)
    assert interval is not None, "the space has checked it"
    if isinstance(parameter, Int):
        interval = interval.whole()
    if parameter.is_fixed:
        return (0.0, 1.0) if interval.contains(parameter.low) else None
    margin = 0.25 * parameter.spacing if parameter.spacing else 0.0
    low, high = max(interval.low - margin, parameter.low - margin), min(interval.high + margin, parameter.high + margin)
    if low > high:
        return None
    start, end = _scaled_bounds(parameter)
    low, high = ((math.log(number) if parameter.log else number) for number in (low, high))
    return (low - start) / (end - start), (high - start) / (end - start)


def _numbers(parameter: Float | Int, units: Array) -> Array:
    """Where points (m,) of a number's axis are on its range; (m,)."""
    if parameter.is_fixed:
        return np.full(len(units), float(parameter.low))
    low, high = _scaled_bounds(parameter)
    scaled = low + units * (high - low)
    numbers: Array = np.exp(scaled) if parameter.log else scaled
    return numbers


def _to_unit(parameter: Parameter, value: Value) -> float:
    if isinstance(parameter, Choice):
        return (_position(parameter, value) + 0.5) / len(parameter.choices)
    if parameter.is_fixed:
        return 0.5
    low, high = _scaled_bounds(parameter)
    return ((math.log(float(value)) if parameter.log else float(value)) - low) / (high - low)


def _from_unit(parameter: Parameter, unit: float) -> Value:
    if isinstance(parameter, Choice):
        return parameter.choices[min(int(unit * len(parameter.choices)), len(parameter.choices) - 1)]
    if parameter.is_fixed:
        return parameter.low
    low, high = _scaled_bounds(parameter)
    scaled = low + unit * (high - low)
    return parameter.nearest(math.exp(scaled) if parameter.log else scaled)


def _scaled_bounds(parameter: Parameter) -> tuple[float, float]:
    """Ends of the axis on its scale. A whole number is the middle of an interval, so that the ends are not rarer."""
    assert not isinstance(parameter, Choice)
    margin = 0.5 * parameter.spacing if parameter.spacing else 0.0
    low, high = parameter.low - margin, parameter.high + margin
    return (math.log(low), math.log(high)) if parameter.log else (low, high)


def _position(choice: Choice, value: object) -> int:
    return next(i for i, known in enumerate(choice.choices) if is_same(known, value))


def positions(units: Array, num_choices: int) -> NDArray[np.int64]:
    """Which choice each place on an axis stands for; places are from 0 to 1."""
    return np.minimum((units * num_choices).astype(np.int64), num_choices - 1)
