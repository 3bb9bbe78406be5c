"""What a study has learned, in plain sentences with the data behind them.

A sentence is left out wherever chance alone would often have written it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from hpo.parameters import Choice, Float, Int, Value
from hpo.records import ELIGIBLE, OUT_OF_BUDGET, TIMED_OUT, TrialRecord, ranked
from hpo.search.encoding import Encoding

if TYPE_CHECKING:
    from hpo.search.study import Study

MIN_TRIALS = 10
"""Below this many trials the best tenth is not even one of them."""

MIN_BEST_TRIALS = 3
"""The best tenth of the trials, but at least this many, says where the good region is."""

EDGE = 0.05
"""The outer part of a range, on its own scale, that the best value must lie in to be at its end."""

NEAR_EDGE = 0.2
"""The outer part that most of the best tenth must lie in, so that one lucky trial is not taken for a trend."""

MOST_COUNTED = 10_000
"""Combinations of values above which nobody asks whether all have been tried."""

MIN_DIVERGED = 3
ACCIDENT = 0.05
"""Highest probability that chance alone would have shown what a finding says, in any of the places it looks at."""

COMMON = 0.25
"""Share of the trials above which something is reported that the best one does not suffer from."""

Topic = Literal[
    "edge of range",
    "divergence",
    "training length",
    "overfitting",
    "plateau",
    "vanishing gradients",
    "exploding gradients",
    "dead units",
    "epochs saved",
    "space used up",
    "rehearsal",
]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a user may act on."""

    topic: Topic
    text: str
    """One sentence."""
    data: dict[str, Any]
    """The figures in it."""


def findings(study: Study) -> list[Finding]:
    """What the study found beside its winner; empty if there is nothing to report."""
    return [
        *find_edges(study),
        *find_divergence(study),
        *find_training_length(study),
        *find_symptoms(study),
        *find_savings(study),
        *find_exhaustion(study),
        *find_broken_extremes(study),
    ]


def find_broken_extremes(study: Study) -> Iterator[Finding]:
    """Extremes of the space that did not train, or not in time, before the first trial."""
    if found := study.broken_extremes:
        yield Finding(
            topic="rehearsal",
            text=f"The rehearsal before the first trial found: {found}.",
            data={"found": found},
        )


def find_exhaustion(study: Study) -> Iterator[Finding]:
    """Whether each configuration of a small space has been trained."""
    space = study.settings.space
    ended = _ended(study)
    number = space.num_configurations(most=MOST_COUNTED) if len(ended) > 1 else None
    if number is not None and number <= len({space.identity(record.values) for record in ended}):
        yield Finding(
            topic="space used up",
            text=f"All {number} configurations of this space have been tried: more trials repeat them with other "
            "seeds; widen the space in a file for --space, or compare the best ones with `hpo confirm`.",
            data={"configurations": number, "trials": len(ended)},
        )


def find_edges(study: Study) -> Iterator[Finding]:
    """Parameters whose best value lies at an end of the range, where trials are also better than elsewhere.

    Most of the best tenth of the trials lie there, and the trials there are better than the others by more than chance
    explains: a search that has proposed many trials at an end, because one was lucky, has shown nothing. An end that is
    0, or 1 for whole numbers, is taken for a natural one: no dropout, one layer.
    """
    records = ranked(study.trials(), study.settings.direction)
    if len(records) < MIN_TRIALS:
        return
    encoding, best = Encoding(study.settings.space), _best_tenth(records)
    ends = [
        (name, parameter, end, bound, wider)
        for name, parameter in study.settings.space.parameters.items()
        if not isinstance(parameter, Choice) and not parameter.is_fixed
        for end, bound in (("lower", parameter.low), ("upper", parameter.high))
        if (wider := _wider(parameter, end)) and not _is_natural(parameter, bound)
    ]

    def lies_within(share: float, record: TrialRecord, name: str, bound: float) -> bool:
        return name not in record.inactive and _distance(encoding, name, record.values[name], bound) <= share

    for name, parameter, end, bound, wider in ends:
        if not lies_within(EDGE, records[0], name, bound):
            continue
        if 2 * sum(lies_within(NEAR_EDGE, record, name, bound) for record in best) <= len(best):
            continue
        active = [record for record in records if name not in record.inactive]
        near = {record.number for record in active if lies_within(NEAR_EDGE, record, name, bound)}
        losses = {record.number: study.settings.direction.loss(record.known_value) for record in active}
        if _chance_of_lower(losses, near) > ACCIDENT / len(ends):
            continue
        value = records[0].values[name]
        command = f"-p {name}={wider} --extend"
        if study.settings.strategy == "grid":
            command += " in a new --study"
        yield Finding(
            topic="edge of range",
            text=f"{name}'s best is at {value:.3g}, the {end} end of {parameter.describe()}: widen it with {command}.",
            data={"parameter": name, "value": value, "end": end, "bound": bound},
        )


def _chance_of_lower(losses: Mapping[int, float], chosen: Collection[int]) -> float:
    """The probability that chosen trials would have losses as low by accident, beside the other trials: the one-sided p
    of Mann and Whitney (1947). 1 where there are no others."""
    from scipy.stats import mannwhitneyu  # a second, which most studies can do without

    others = [loss for number, loss in losses.items() if number not in chosen]
    if not others:
        return 1.0
    return float(mannwhitneyu([losses[number] for number in chosen], others, alternative="less").pvalue)


def _wider(parameter: Float | Int, end: str) -> str | None:
    """The range with more room at one end, as `-p` takes it; a positive range stays positive, and a share below 1.

    None if it cannot have more.
    """
    low, high = _with_room(parameter, end)
    if (low, high) == (parameter.low, parameter.high):
        return None
    if parameter.step:
        low, high = (float(f"{bound:.12g}") for bound in (low, high))  # whole steps must stay whole
    elif end == "upper":
        high = _rounded(high, above=parameter.high, below=1.0 if _is_share(parameter) else math.inf)
    else:
        low = _rounded(low, above=0.0 if parameter.low > 0 else -math.inf, below=parameter.low)
    return f"{_exactly(parameter, low)}:{_exactly(parameter, high)}"


def _rounded(value: float, *, above: float, below: float) -> float:
    """The number with the fewest digits, three or more, that is between two others, as the value is."""
    candidates = (float(f"{value:.{digits}g}") for digits in range(3, 17))
    return next((rounded for rounded in candidates if above < rounded < below), value)


def _exactly(parameter: Float | Int, bound: float) -> str:
    return str(int(bound)) if isinstance(parameter, Int) else f"{bound:.17g}" if bound == int(bound) else repr(bound)


def _is_share(parameter: Float | Int) -> bool:
    return isinstance(parameter, Float) and parameter.low >= 0 and parameter.high < 1 and not parameter.log


def _with_room(parameter: Float | Int, end: str) -> tuple[float, float]:
    low, high = parameter.low, parameter.high
    room = (high - low) / 2
    if parameter.step:
        num_steps = max(1, int(room // parameter.step))
        if end == "upper":
            return low, high + num_steps * parameter.step
        num_positive = math.ceil(low / parameter.step) - 1 if low > 0 else num_steps
        return low - min(num_steps, num_positive) * parameter.step, high
    if end == "upper":
        high = high * 10 if parameter.log else (high + 1) / 2 if _is_share(parameter) else high + room
        return low, math.ceil(high) if isinstance(parameter, Int) else high
    wider = low / 10 if parameter.log else low / 2 if low > 0 else low - room
    if isinstance(parameter, Int):
        wider = max(1, math.floor(wider)) if low > 0 else math.floor(wider)
    return wider, high


def find_divergence(study: Study) -> Iterator[Finding]:
    """The learning rate above which every trial diverged.

    Silent where as many of the largest rates would often have diverged if divergence had nothing to do with the rate.
    """
    name = "lr"
    parameter = study.settings.space.parameters.get(name)
    if parameter is None or isinstance(parameter, Choice):
        return
    ended = _ended(study)
    rates = {record.number: record.values[name] for record in ended if name not in record.inactive}
    diverged = {record.number for record in ended if record.state == "diverged"} & set(rates)
    survived = max((rate for number, rate in rates.items() if number not in diverged), default=math.inf)
    above = [rate for rate in rates.values() if rate > survived]
    num_accidents = math.comb(len(rates) - len(above), len(diverged) - len(above))
    if len(above) < MIN_DIVERGED or num_accidents > ACCIDENT * math.comb(len(rates), len(diverged)):
        return
    highest = _exactly(parameter, _rounded(survived, above=math.nextafter(survived, 0.0), below=min(above)))
    narrower = f"{_exactly(parameter, parameter.low)}:{highest}"
    yield Finding(
        topic="divergence",
        text=f"All {len(above)} trials with {name} above {highest} diverged: -p {name}={narrower} in a new study "
        "spares them.",
        data={"parameter": name, "above": survived, "lowest": min(above), "trials": len(above)},
    )


def find_training_length(study: Study) -> Iterator[Finding]:
    """Whether the best trials had their best epoch in the first tenth or the last quarter of the epochs.

    Those of the best tenth that ran to their end tell; if they are too few, complete trials that are weaker would not.
    """
    max_epochs = study.settings.max_epochs
    complete = [
        record
        for record in _best_tenth(ranked(study.trials(), study.settings.direction))
        if record.state == "complete" and record.best_epoch and not _timed_out(record)
    ]
    if len(complete) < MIN_BEST_TRIALS:
        return
    epochs = [record.best_epoch or 0 for record in complete]
    middle = median(epochs)
    if middle <= max_epochs // 10:
        advice = "fewer --epochs would do, or a smaller learning rate"
    elif middle > max_epochs - max_epochs // 4:
        advice = "more --epochs may help, though a schedule that decays does this by itself"
    else:
        return
    yield Finding(
        topic="training length",
        text=f"The best trials are at their best in epoch {middle:g} of {max_epochs}: {advice}.",
        data={"epoch": middle, "epochs": max_epochs, "trials": len(epochs)},
    )


def find_symptoms(study: Study) -> Iterator[Finding]:
    """What went wrong in the training of the best trial, or else in many of the others'."""
    best, ended = study.best(), _ended(study)
    for name, (topic, of_best, of_many, advice) in _SYMPTOMS.items():
        affected = [record for record in ended if name in record.symptoms]
        if best and name in best.symptoms:
            value = best.symptoms[name]
            told = f"Trial {best.number}, the best, {of_best}{' (in its last fold)' if study.settings.folds else ''}"
        elif len(affected) >= max(MIN_BEST_TRIALS, COMMON * len(ended)):
            value = median(record.symptoms[name] for record in affected)
            told = f"{len(affected)} of {len(ended)} trials {of_many}"
        else:
            continue
        yield Finding(
            topic=topic,
            text=f"{told.format(value=value)}: {advice}.",
            data={"value": value, "trials": [record.number for record in affected], "of": len(ended)},
        )


_SYMPTOMS: dict[str, tuple[Topic, str, str, str]] = {
    "overfits_from": (
        "overfitting",
        "overfits from epoch {value:g}",
        "overfit, half of them from epoch {value:g} or earlier",
        "dropout, weight decay, augmentation or more data would help",
    ),
    "stalls_from": (
        "plateau",
        "stops improving at epoch {value:g}, training loss included",
        "stop improving, training loss included, half of them at epoch {value:g} or earlier",
        "another learning rate, a schedule that decays or a larger network may help, unless the rest is noise",
    ),
    "vanishing_layers": (
        "vanishing gradients",
        "has gradients that vanish up to layer {value:g}",
        "have gradients that vanish, in the median up to layer {value:g}",
        "use a norm, another initialisation or fewer layers",
    ),
    "exploding": (
        "exploding gradients",
        "has gradients that explode: a hidden layer's is {value:.0f} times its weights",
        "have gradients that explode: a hidden layer's is {value:.0f} times its weights in the median",
        "use a norm, another initialisation or clip_norm",
    ),
    "dead_units": (
        "dead units",
        "has {value:.0%} dead units (inactive for every example)",
        "have dead units (inactive for every example): {value:.0%} of all in the median",
        "use a smaller learning rate, a norm, or an activation such as leaky_relu or gelu",
    ),
}
"""By the name of a symptom (see TrialRecord.symptoms): its topic, what is said of one trial and of many, what to do."""


def find_savings(study: Study) -> Iterator[Finding]:
    """The share of epochs, or folds, that pruning saved, of those that all trials together might have run."""
    steps, num_steps = "folds" if study.settings.folds else "epochs", study.settings.num_steps
    ended = _ended(study)
    unspent = {"pruned": 0, "complete": 0, "diverged": 0, "out of time": 0}
    for record in ended:
        cause = "out of time" if record.reason == OUT_OF_BUDGET or _timed_out(record) else record.state
        unspent[cause] += num_steps - len(record.curve)
    planned = len(ended) * num_steps
    if not unspent["pruned"]:
        return
    others = unspent["complete"] + unspent["diverged"]
    other_reasons = "divergence" if study.settings.folds else "early stopping and divergence"
    cut_off = f"; {unspent['out of time'] / planned:.0%} had no time" if unspent["out of time"] else ""
    yield Finding(
        topic="epochs saved",
        text=f"Pruning saved {unspent['pruned'] / planned:.0%} of the {planned} {steps} that {len(ended)} trials of "
        f"{num_steps} might have run; {other_reasons} saved {others / planned:.0%}{cut_off}.",
        data={"planned": planned, "trained": planned - sum(unspent.values()), "saved": unspent},
    )


def _timed_out(record: TrialRecord) -> bool:
    return (record.reason or "").startswith(TIMED_OUT)


def _ended(study: Study) -> list[TrialRecord]:
    """The trials that pruning, divergence or the last epoch has ended."""
    return [record for record in study.trials() if record.state in (*ELIGIBLE, "diverged")]


def _best_tenth(records: Sequence[TrialRecord]) -> Sequence[TrialRecord]:
    return records[: max(MIN_BEST_TRIALS, math.ceil(len(records) / 10))]


def _distance(encoding: Encoding, name: str, value: Value, other: Value) -> float:
    """How far apart two values of a parameter are, from 0 to 1, on the scale of its range."""
    axis = encoding.names.index(name)
    near, far = (encoding.units(encoding.space.defaults() | {name: end})[axis] for end in (value, other))
    return abs(float(near - far))


def _is_natural(parameter: Float | Int, bound: float) -> bool:
    return bound == 0 or (isinstance(parameter, Int) and bound == 1)
