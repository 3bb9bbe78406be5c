"""What a study has learned: how much each parameter matters, and plain sentences with the data behind them.

A sentence is left out wherever chance alone would often have written it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from hpo.config import derive_seed
from hpo.records import CROWNABLE, TrialRecord, ranked
from hpo.search.encoding import Encoding, distribution
from hpo.search.priority import tunable_groups
from hpo.space import Choice, Float, Int, Value, format_value

if TYPE_CHECKING:
    from hpo.search.study import Study

MIN_TRIALS = 10
"""Below this many trials the best tenth is not even one of them."""

MIN_TRIALS_FOR_IMPORTANCES = 30
"""Below this many, the best tenth is one or two trials, and importances are chance."""

MIN_BEST_TRIALS = 3
"""The best tenth of the trials, but at least this many, says where the good region is."""

EDGE = 0.05
"""The outer part of a range, on its own scale, that the best value must lie in to be at its end."""

NEAR_EDGE = 0.2
"""The outer part that most of the best tenth must lie in, so that one lucky trial is not taken for a trend."""

MIN_DIVERGED = 3
ACCIDENT = 0.05
"""Highest probability that this many of the largest learning rates would have diverged by accident."""

NUM_RESAMPLES = 50
"""Enough for a standard error (Efron and Tibshirani, 1993, section 6.4)."""

MAX_RESAMPLE = 200
"""Maximum trials in a resample; with more, the evaluation of 50 of them takes seconds."""


COMMON = 0.25
"""Share of the trials from which on something is told that the best one does not suffer from."""

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
]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that a user may act on."""

    topic: Topic
    text: str
    """One sentence."""
    data: dict[str, Any]
    """The figures in it."""


@dataclass(frozen=True)
class Importance:
    """A share of the variation between trials, from 0 to 1, with its standard error."""

    share: float
    error: float


@dataclass(frozen=True)
class GroupImportance(Importance):
    """The importance of a group, and of each parameter in it."""

    parameters: dict[str, Importance]


def findings(study: Study) -> list[Finding]:
    """What the study found beside its winner; empty where nothing can be told."""
    return [
        *find_edges(study),
        *find_divergence(study),
        *find_training_length(study),
        *find_symptoms(study),
        *find_savings(study),
    ]


def find_edges(study: Study) -> Iterator[Finding]:
    """Parameters whose best value lies at an end of the range, as do most of the best tenth of the trials.

    An end that is 0, or 1 for whole numbers, is taken for a natural one: no dropout, one layer.
    """
    records = ranked(study.trials(), study.settings.direction)
    if len(records) < MIN_TRIALS:
        return
    best = _best_tenth(records)
    encoding = Encoding(study.settings.space)
    for name, parameter in study.settings.space.parameters.items():
        if isinstance(parameter, Choice) or parameter.is_fixed or name in best[0].inactive:
            continue
        active = [record.values[name] for record in best if name not in record.inactive]
        for end, bound in (("lower", parameter.low), ("upper", parameter.high)):
            distances = [_distance(encoding, name, value, bound) for value in active]
            is_at_end = distances[0] <= EDGE and 2 * sum(distance <= NEAR_EDGE for distance in distances) > len(best)
            if is_at_end and not _is_natural(parameter, bound):
                yield Finding(
                    topic="edge of range",
                    text=f"{name}'s best is at {active[0]:.3g}, the {end} end of {parameter.describe()}: "
                    "widen it in a file for --space, because -p only narrows.",
                    data={"parameter": name, "value": active[0], "end": end, "bound": bound},
                )


def find_divergence(study: Study, name: str = "lr") -> Iterator[Finding]:
    """The learning rate above which every trial diverged.

    Silent where as many of the largest rates would often have diverged if divergence had nothing to do with the rate.
    """
    parameter = study.settings.space.parameters.get(name)
    if parameter is None or isinstance(parameter, Choice):
        return
    ended = [record for record in study.trials() if record.state in (*CROWNABLE, "diverged")]
    rates = {record.number: record.values[name] for record in ended if name not in record.inactive}
    diverged = {record.number for record in ended if record.state == "diverged"} & set(rates)
    survived = max((rate for number, rate in rates.items() if number not in diverged), default=math.inf)
    above = [rate for rate in rates.values() if rate > survived]
    num_accidents = math.comb(len(rates) - len(above), len(diverged) - len(above))
    if len(above) < MIN_DIVERGED or num_accidents > ACCIDENT * math.comb(len(rates), len(diverged)):
        return
    narrower = f"{format_value(parameter.low)}:{survived:.3g}"
    yield Finding(
        topic="divergence",
        text=f"All {len(above)} trials with {name} above {survived:.3g} diverged: -p {name}={narrower} in a new study "
        "spares them.",
        data={"parameter": name, "above": survived, "lowest": min(above), "trials": len(above)},
    )


def find_training_length(study: Study) -> Iterator[Finding]:
    """Whether the best complete trials had their best epoch in the first tenth or the last quarter of the epochs."""
    max_epochs = study.settings.max_epochs
    complete = [record for record in study.trials() if record.state == "complete" and record.best_epoch]
    if len(complete) < MIN_BEST_TRIALS:
        return
    epochs = [record.best_epoch or 0 for record in _best_tenth(ranked(complete, study.settings.direction))]
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
    best = study.best()
    ended = [record for record in study.trials() if record.state in (*CROWNABLE, "diverged")]
    for name, (topic, of_best, of_many, advice) in _SYMPTOMS.items():
        affected = [record for record in ended if name in record.symptoms]
        if best and name in best.symptoms:
            value = best.symptoms[name]
            told = f"Trial {best.number}, the best, {of_best}"
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
        "another learning rate, a schedule that decays or a larger network would help",
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
"""By the name of a symptom (see TrialRecord.symptoms): its topic, what is told of one trial and of many, what to do."""


def find_savings(study: Study) -> Iterator[Finding]:
    """The share of epochs, or folds, that pruning saved, of those that all trials together might have run."""
    steps, num_steps = "folds" if study.settings.folds else "epochs", study.settings.num_steps
    ended = [record for record in study.trials() if record.state in (*CROWNABLE, "diverged")]
    unspent = {"pruned": 0, "complete": 0, "diverged": 0}
    for record in ended:
        unspent[record.state] += num_steps - len(record.curve)
    planned = len(ended) * num_steps
    if not unspent["pruned"]:
        return
    others = unspent["complete"] + unspent["diverged"]
    other_reasons = "divergence" if study.settings.folds else "early stopping and divergence"
    yield Finding(
        topic="epochs saved",
        text=f"Pruning saved {unspent['pruned'] / planned:.0%} of the {planned} {steps} that {len(ended)} trials of "
        f"{num_steps} might have run; {other_reasons} saved {others / planned:.0%}.",
        data={"planned": planned, "trained": planned - sum(unspent.values()), "saved": unspent},
    )


def importances(study: Study) -> dict[str, GroupImportance]:
    """Importance of each parameter that varies and is active in every trial, by group; the shares sum to 1.

    PED-ANOVA (Watanabe et al., 2023, arXiv:2304.10255): how much the values in the best tenth of the trials differ
    from those in all. Pruned trials count with their best epoch, and diverged ones as the worst, for among complete
    trials alone hardly anything differs. Parameters that were inactive in some trial are left out: PED-ANOVA would
    count values that no network has seen. Empty below `MIN_TRIALS_FOR_IMPORTANCES` such trials, and where the best
    tenth cannot be told from the others.

    The standard error is the spread over bootstrap resamples of the trials (Efron, 1979). Where there are many, a
    resample holds some of them only, and its spread is scaled down accordingly (Bickel et al., 1997). Against the
    spread over ten studies of 12 parameters that differ in their seed it was right with 20 and with 400 trials, and
    up to two and a half times too large in between; it takes 0.3 s to 0.6 s on one core (Optuna 5.0.0).
    """
    trials = _scored_trials(study)
    if len(trials) < MIN_TRIALS_FOR_IMPORTANCES or not _has_best_tenth(trials):
        return {}
    conditional = {name for trial in study.trials() for name in trial.inactive}
    groups = {
        group: rated
        for group, members in tunable_groups(study.settings.space).items()
        if (rated := [name for name in members if name not in conditional])
    }
    if not groups:
        return {}
    names = [name for group in groups.values() for name in group]
    shares = dict(zip(names, _shares(trials, names), strict=True))
    size = min(len(trials), MAX_RESAMPLE)
    rng = np.random.default_rng(derive_seed(study.settings.seed, "importances"))
    resampled = [
        _shares([trials[index] for index in rng.integers(len(trials), size=size)], names) for _ in range(NUM_RESAMPLES)
    ]
    spread = dict(zip(names, np.transpose(resampled), strict=True))  # (resamples,) of each parameter
    scale = math.sqrt(size / len(trials))

    def error(members: Sequence[str]) -> float:
        return scale * float(np.std(sum(spread[name] for name in members), ddof=1))

    return {
        group: GroupImportance(
            share=sum(shares[name] for name in members),
            error=error(members),
            parameters={name: Importance(shares[name], error([name])) for name in members},
        )
        for group, members in groups.items()
    }


def _scored_trials(study: Study) -> list[FrozenTrial]:
    """Finished trials with their loss as value; lower is better."""
    direction = study.settings.direction
    records = [record for record in study.trials() if record.state in (*CROWNABLE, "diverged")]
    losses = {r.number: direction.loss(r.value) for r in records if r.state in CROWNABLE and r.value is not None}
    worst = max(losses.values(), default=0.0)
    losses |= {record.number: worst for record in records if record.state == "diverged"}
    distributions = {name: distribution(parameter) for name, parameter in study.settings.space.parameters.items()}
    return [
        FrozenTrial(
            number=record.number,
            trial_id=record.number,
            state=OptunaState.COMPLETE,
            value=losses[record.number],
            params=record.values,
            distributions=distributions,
            datetime_start=None,
            datetime_complete=None,
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )
        for record in records
        if record.number in losses
    ]


class _Sample(optuna.Study):
    """A study that consists of given trials: adding each of them to a storage costs more than the evaluation."""

    def __init__(self, trials: list[FrozenTrial]) -> None:
        storage = InMemoryStorage()
        name = storage.get_study_name_from_id(storage.create_new_study([optuna.study.StudyDirection.MINIMIZE]))
        super().__init__(name, storage)
        self._given = trials

    def get_trials(self, deepcopy: bool = True, states: object = None) -> list[FrozenTrial]:
        return self._given


def _shares(trials: list[FrozenTrial], names: Sequence[str]) -> list[float]:
    """The importance of each parameter; all the same where the trials cannot be told apart."""
    from optuna.importance import PedAnovaImportanceEvaluator  # it imports scikit-learn, which takes a second

    if not _has_best_tenth(trials):
        return [1 / len(names)] * len(names)
    found = PedAnovaImportanceEvaluator().evaluate(_Sample(trials), list(names))
    total = sum(found.values())
    return [found[name] / total if total else 1 / len(names) for name in names]


def _has_best_tenth(trials: Sequence[FrozenTrial]) -> bool:
    """Whether the best tenth is better than the rest."""
    losses = sorted(trial.values[0] for trial in trials)
    return bool(losses[math.ceil(len(losses) / 10) - 1] < losses[-1])


def _best_tenth(records: Sequence[TrialRecord]) -> Sequence[TrialRecord]:
    return records[: max(MIN_BEST_TRIALS, math.ceil(len(records) / 10))]


def _distance(encoding: Encoding, name: str, value: Value, other: Value) -> float:
    """How far apart two values of a parameter are, from 0 to 1, on the scale of its range."""
    axis = encoding.names.index(name)
    near, far = (encoding.units(encoding.space.defaults() | {name: end})[axis] for end in (value, other))
    return abs(float(near - far))


def _is_natural(parameter: Float | Int, bound: float) -> bool:
    return bound == 0 or (isinstance(parameter, Int) and bound == 1)
