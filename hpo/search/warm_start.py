"""What an earlier study has found, as configurations that another study tries first.

They are measured again and not believed: data, epochs and the space may have changed since. Its other trials are data
for the model (hpo.search.prior).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from hpo.errors import UsageError
from hpo.parameters import Choice
from hpo.records import ranked
from hpo.search.encoding import Encoding
from hpo.values import is_number

if TYPE_CHECKING:
    from hpo.parameters import Parameter, Value
    from hpo.records import TrialRecord
    from hpo.search.prior import Observation
    from hpo.search.study import Study
    from hpo.space import Space

NUM_CONFIGURATIONS = 5
"""Maximum number of configurations to take over."""

NUM_OF_ANOTHER_TASK = 2
"""Maximum number of configurations to take over from a study of another task."""

MAX_OBSERVATIONS = 150
"""Maximum number of trials to keep of another study."""

MIN_DISTANCE = 0.5
"""How far apart they are at least: half the range of one number, or another value of one choice, is as much."""


def best_configurations(earlier: Study, space: Space, *, most: int = NUM_CONFIGURATIONS) -> list[dict[str, Value]]:
    """The best configurations of an earlier study that differ from each other, translated to `space`, the best first.

    They are taken from the best quarter of its trials. Raises UsageError if it has no trial with a result, or
    nothing of its space is in this one.
    """
    records = ranked(earlier.trials(), earlier.settings.direction)
    if not records:
        raise UsageError(f"--warm-start {earlier.name}: no trial of study '{earlier.name}' has a result; omit it.")
    if not set(earlier.settings.space.parameters) & set(space.parameters):
        searched = ", ".join(earlier.settings.space.parameters)
        raise UsageError(
            f"--warm-start {earlier.name}: study '{earlier.name}' searched {searched}, none of which is searched here; "
            "omit it."
        )
    encoding = Encoding(space)
    chosen: list[dict[str, Value]] = []
    for record in records[: max(NUM_CONFIGURATIONS, math.ceil(len(records) / 4))]:
        values = translate(record, space)
        if space.allows(values) and all(_distance(encoding, values, other) >= MIN_DISTANCE for other in chosen):
            chosen.append(values)
    return chosen[:most]


def observations(earlier: Study, space: Space) -> list[Observation]:
    """The trials of another study with a result, the best first; of many, as many of each part of the ranking.

    A value that was inactive becomes the default. A trial is left out if another one is not allowed here.
    """
    direction = earlier.settings.direction
    shared = [name for name in space.parameters if name in earlier.settings.space.parameters]
    defaults = space.defaults()
    seen = []
    for record in ranked(earlier.trials(), direction):
        values = {name: defaults[name] if name in record.inactive else record.values[name] for name in shared}
        if all(space.parameters[name].contains(value) for name, value in values.items()):
            seen.append({"values": values, "loss": direction.loss(record.value or 0.0)})
    return seen[:: max(1, math.ceil(len(seen) / MAX_OBSERVATIONS))]


def translate(record: TrialRecord, space: Space) -> dict[str, Value]:
    """The configuration of a trial as a value for every parameter of another space.

    A number outside its range goes to the nearest value that is allowed. A choice that is unknown here becomes the
    default, and so does a parameter that the trial did not have, or that was inactive in it.
    """
    values = space.defaults()
    for name, parameter in space.parameters.items():
        if name in record.values and name not in record.inactive:
            values[name] = _nearest(parameter, record.values[name])
    return values


def _nearest(parameter: Parameter, value: Value) -> Value:
    assert parameter.default is not None, "a space checks its parameters first"
    if isinstance(parameter, Choice):
        if parameter.contains(value):
            return value
        numbers = [choice for choice in parameter.choices if is_number(choice)]
        if not (numbers and is_number(value)):
            return parameter.default
        return min(numbers, key=lambda number: abs(float(number) - float(value)))
    if not is_number(value):
        return parameter.default
    return parameter.nearest(float(value))


def _distance(encoding: Encoding, values: dict[str, Value], other: dict[str, Value]) -> float:
    points = encoding.columns(np.stack([encoding.units(values), encoding.units(other)]))
    return float(np.linalg.norm(points[0] - points[1]))
