"""A space as others see it: Optuna's distributions, the unit cube, and the inputs of a Gaussian process."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from hpo.search.gaussian_process import Array
from hpo.space import Choice, Float, Group, Int, Parameter, Space, Value, format_value, is_same

_MAX_DECLARATION = 1800
"""Characters of JSON that leave room for what else stands in an Optuna declaration."""


def distribution(parameter: Parameter) -> BaseDistribution:
    """The parameter as Optuna declares it."""
    match parameter:
        case Choice():
            return CategoricalDistribution(parameter.choices)
        case Int():
            return IntDistribution(int(parameter.low), int(parameter.high), log=parameter.log)
        case Float():
            return FloatDistribution(parameter.low, parameter.high, log=parameter.log)


class OptunaSpace:
    """A space as Optuna has it: choices that it could not tell apart, or not store, are labels there.

    It compares choices by `==`, for which 1 is True, stores tuples as lists, and keeps a declaration in 2 048
    characters.
    """

    def __init__(self, space: Space) -> None:
        self._labels: dict[str, dict[str, Value]] = {
            name: _labels(parameter)
            for name, parameter in space.parameters.items()
            if isinstance(parameter, Choice) and not _is_stored_by_optuna(parameter)
        }
        self.space = self._labelled(space) if self._labels else space

    def encode(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Values as Optuna has them."""
        return {name: self._label(name, value) for name, value in values.items()}

    def decode(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """What Optuna has, as values of the space."""
        if not self._labels:
            return dict(values)
        return {
            name: self._labels[name][str(value)] if name in self._labels else value for name, value in values.items()
        }

    def _label(self, name: str, value: Value) -> Value:
        if name not in self._labels:
            return value
        return next(label for label, choice in self._labels[name].items() if is_same(choice, value))

    def _labelled(self, space: Space) -> Space:
        return Space(
            *(
                Group(group.name, closed=False, **{n: self._parameter(n, p) for n, p in group.parameters.items()})
                for group in space.groups
            )
        )

    def _parameter(self, name: str, parameter: Parameter) -> Parameter:
        when = {
            parent: tuple(self._label(parent, value) for value in wanted)
            for parent, wanted in parameter.when.items()
            if isinstance(wanted, tuple)
        }
        if name not in self._labels:
            return parameter.with_when(when)
        assert isinstance(parameter, Choice), "choices alone have labels"
        return Choice(*self._labels[name], default=self._label(name, parameter.default), when=when)


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
                snapped[:, axis] = (_positions(snapped[:, axis], parameter) + 0.5) / len(parameter.choices)
            elif parameter.is_fixed:
                snapped[:, axis] = 0.5
            elif isinstance(parameter, Int):
                low, high = _scaled_bounds(parameter)
                scaled = low + snapped[:, axis] * (high - low)
                whole = np.clip(np.rint(np.exp(scaled) if parameter.log else scaled), parameter.low, parameter.high)
                snapped[:, axis] = ((np.log(whole) if parameter.log else whole) - low) / (high - low)
        return snapped

    def columns(self, units: Array) -> Array:
        """Points (m, p) -> (m, d): one column a number, one a value of a choice.

        Two choices are as far apart as the ends of a range. What is inactive counts as the default, for it is without
        effect.
        """
        active: dict[str, NDArray[np.bool_]] = {}
        columns = []
        for axis, (name, parameter) in enumerate(zip(self.names, self._parameters, strict=True)):
            active[name] = self._is_active(parameter, units, active)
            effective = np.where(active[name], units[:, axis], self._defaults[axis])
            if isinstance(parameter, Choice):
                one_hot = np.eye(len(parameter.choices))[_positions(effective, parameter)]
                columns.append(one_hot * math.sqrt(0.5))
            else:
                columns.append(effective[:, None])
        return np.concatenate(columns, axis=1)

    def _is_active(self, parameter: Parameter, units: Array, active: dict[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
        result = np.ones(len(units), dtype=bool)
        for parent, wanted in parameter.when.items():
            axis = self.names.index(parent)
            choice = self._parameters[axis]
            assert isinstance(choice, Choice), "the space has checked it"
            assert isinstance(wanted, tuple), "the space has made it one"
            allowed = [_position(choice, value) for value in wanted]
            result &= active[parent] & np.isin(_positions(units[:, axis], choice), allowed)
        return result


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
    value = min(max(math.exp(scaled) if parameter.log else scaled, parameter.low), parameter.high)
    return round(value) if isinstance(parameter, Int) else value


def _scaled_bounds(parameter: Parameter) -> tuple[float, float]:
    """Ends of the axis on its scale. A whole number is the middle of an interval, so that the ends are not rarer."""
    assert not isinstance(parameter, Choice)
    margin = 0.5 if isinstance(parameter, Int) else 0.0
    low, high = parameter.low - margin, parameter.high + margin
    return (math.log(low), math.log(high)) if parameter.log else (low, high)


def _position(choice: Choice, value: object) -> int:
    return next(i for i, known in enumerate(choice.choices) if is_same(known, value))


def _positions(units: Array, choice: Choice) -> NDArray[np.int64]:
    num_choices = len(choice.choices)
    return np.minimum((units * num_choices).astype(np.int64), num_choices - 1)
