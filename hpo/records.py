"""What a study remembers, and what a search, a training and a rerun return, as plain data for tables and decisions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal, Self

if TYPE_CHECKING:
    import pandas as pd

    from hpo.config import Direction


EndState = Literal["complete", "pruned", "diverged", "infeasible", "failed", "interrupted"]
TrialState = Literal["complete", "pruned", "diverged", "infeasible", "failed", "interrupted", "running", "queued"]

OUT_OF_BUDGET = "the study's --budget is used up"
"""The reason of a trial that the budget has cut off."""

TIMED_OUT = "reached --trial-timeout"
"""How the reason of a trial begins that its own time has ended."""

FINISHED: tuple[TrialState, ...] = ("complete", "pruned", "diverged", "infeasible")
"""The states that count towards the number of trials that was asked for."""

ELIGIBLE: tuple[TrialState, ...] = ("complete", "pruned")
"""The states in which a trial is eligible to win: the best epoch of a pruned trial is as good a model as any."""


def count_finished(counts: Mapping[TrialState, int]) -> int:
    """How many trials count towards the number that was asked for, of the numbers in each state."""
    return sum(counts[state] for state in FINISHED)


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial of a study; trial 0 is the default configuration."""

    number: int
    """Position in the study, from 0."""

    state: TrialState
    """How the trial ended, or `running`, or `queued` where a configuration was given and has yet to be tried."""

    value: float | None
    """The monitored metric at the best epoch, the mean over the folds where there are any; None where no epoch, or
    fold, was finished."""

    values: dict[str, Any]
    """Every parameter, the inactive ones too."""

    inactive: tuple[str, ...]
    """Names of parameters whose `when` does not hold in this trial."""

    curve: dict[int, float]
    """The monitored metric by epoch, or by fold where there are any; NaN where it was not finite."""

    best_epoch: int | None
    """Epoch that `value` was reached in, the mean over the folds where there are any."""

    stage: str
    """Group of parameters, or step of the strategy, that this trial searched."""

    reason: str | None
    """Why the trial was pruned, failed or interrupted, in words for the user."""

    attempts: int = 1
    """How often the trial was started."""

    duration_s: float | None = None
    """Seconds of the last attempt; None while it runs."""

    trained_s: float = 0.0
    """Seconds that a worker was busy with it, in all its attempts; of a running trial up to 10 s are missing."""

    pruned_after: int | None = None
    """Epochs, or folds, after which the trial was pruned before it was continued to its end; None if it never was."""

    costs: dict[str, float] = field(default_factory=dict)
    """What else is minimised, by name; empty with one objective, and while the trial is not complete."""

    symptoms: dict[str, float] = field(default_factory=dict)
    """What went wrong in its training by its last epoch; see `hpo.training.symptoms`."""

    repeats: int | None = None
    """Trial whose configuration this one trains again with another seed; None for a trial of the search."""

    @property
    def configuration(self) -> dict[str, Any]:
        """The values that matter: those of the active parameters."""
        return {name: value for name, value in self.values.items() if name not in self.inactive}

    @property
    def has_value(self) -> bool:
        """Whether it has one that is finite."""
        return self.value is not None and math.isfinite(self.value)

    @property
    def known_value(self) -> float:
        """The value, of a trial that is known to have one."""
        assert self.value is not None, "only asked of trials that have a value"
        return self.value


def describe_pruning(num_steps: int, of: int, *, folds: bool) -> str:
    """`pruned after 3 of 20 epochs`."""
    return f"pruned after {num_steps} of {of} {'folds' if folds else 'epochs'}"


def ranked(records: Iterable[TrialRecord], direction: Direction) -> list[TrialRecord]:
    """The trials that can be the winner, the best first; of equals the one that costs less, then the earlier one."""

    def rank(record: TrialRecord) -> tuple[Any, ...]:
        costs = tuple(record.costs.values())  # known of complete trials, and with several objectives
        return direction.loss(record.known_value), not costs, costs, record.number

    return sorted((record for record in records if record.state in ELIGIBLE and record.value is not None), key=rank)


def mean_of_finite(values: Iterable[float]) -> float | None:
    """The mean over the folds that a trial has finished; None if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else None


def losses(record: TrialRecord, direction: Direction) -> tuple[float, ...]:
    """The objectives of a trial with a value, each better when smaller."""
    assert record.value is not None, "the trial has a value"
    return direction.loss(record.value), *record.costs.values()


def pareto_front(points: Mapping[int, tuple[float, ...]]) -> list[int]:
    """The trials that no other one beats in an objective without losing in another; of equals the first.

    `points` are the losses of each trial by number. With one objective the front is the best trial. Sorted by the first
    objective, the best first.
    """
    front: list[int] = []
    # A trial can only be dominated by one that comes before it in this order.
    for number in sorted(points, key=lambda number: (points[number], number)):
        if not any(_is_as_good(points[other], points[number]) for other in front):
            front.append(number)
    return front


def _is_as_good(point: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(one <= another for one, another in zip(point, other, strict=True))


def to_plain(value: Any) -> Any:
    """The value as JSON can hold it: keys as strings, NaN and infinities as null."""
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the winner gains over the default configuration, on the examples that chose the winner.

    A winner that is confirmed is compared by the means over seeds, any other by its model.
    """

    trial: int
    """The trial of the default configuration."""
    state: TrialState
    value: float | None
    """Its metric on the validation split, or the mean over folds or seeds; None where it diverged or failed."""
    pruned: str | None
    """`pruned after 3 of 20 epochs` for a default that did not run to its end."""
    gain: float | None
    """How much better the winner's metric is; None for the default itself, and where either has no model to compare."""
    low: float | None
    """Lower end of the 95% interval of the gain, which allows for the choice among `num_candidates`; None for a
    training loop of the task's own, which has the data."""
    high: float | None
    num_examples: int
    """Validation examples that both models judged; 0 where folds, or seeds, were compared."""
    num_folds: int = 0
    """Folds that both have a value of, and that were compared: fewer than all for a default that was pruned."""
    num_candidates: int = 1
    """Trials that the winner is the best of on these examples, or folds; 1 where means over seeds are compared."""
    num_seeds: tuple[int, int] | None = None
    """Trainings of the winning configuration and of the default whose means are compared."""
    is_same: bool = False
    """Whether the winner has the default's values, in a trial of its own or not."""

    @property
    def is_distinct(self) -> bool:
        """Whether the interval leaves out 0: the two are not just as good."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


COVERAGES = (0.8, 0.9, 0.95, 0.99)
"""Shares of new examples that prediction sets and intervals are made for."""


@dataclass(frozen=True, kw_only=True)
class Certainty:
    """How sure a model may be, from the validation split; see `hpo.training.certainty`."""

    temperature: float | None
    """What logits are divided by for calibrated probabilities; None for a regression."""
    calibration_error: tuple[float, float] | None
    """The expected calibration error on the test split, before and after; None for a regression."""
    quantiles: dict[float, float]
    """By coverage: how improbable the right class may be, 1 for none, or how far a number may be off; infinite where
    there are too few examples."""
    found: dict[float, tuple[float, float]]
    """By coverage: the share of the test examples that were covered, and the mean size of a set, or the width of the
    interval."""
    least_error: float | None = None
    """The calibration error that a calibrated model would have on a test split of this size; None for a regression, and
    where an earlier version measured."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "temperature": self.temperature,
            "calibration_error": self.calibration_error,
            "least_error": self.least_error,
            "quantiles": {str(coverage): to_plain(value) for coverage, value in self.quantiles.items()},
            "found": {str(coverage): to_plain(value) for coverage, value in self.found.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `to_dict` described, after JSON too."""

        def number(value: float | None) -> float:
            return math.inf if value is None else value

        error = plain["calibration_error"]
        return cls(
            temperature=plain["temperature"],
            calibration_error=error and (error[0], error[1]),
            least_error=plain.get("least_error"),
            quantiles={float(coverage): number(value) for coverage, value in plain["quantiles"].items()},
            found={float(coverage): (share, number(size)) for coverage, (share, size) in plain["found"].items()},
        )


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """A test example that a model takes for another class than it is."""

    example: int
    """Its row in the test split."""
    truth: str
    answer: str
    probability: float
    """Of the answer, as the network says it."""
    picture: str | None = None
    """A small PNG as base64, for images."""
    text: str | None = None
    """The text, or the row of the table."""


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best trial by its validation score, and what the test split says of it."""

    trial: int
    """The training whose model is used: the best trial, or if its configuration was confirmed the best repeat of it."""
    searched: int
    """The trial of the search that found the configuration; `trial` itself without a confirmation."""
    configuration: dict[str, Any]
    metric: str
    validation: float
    """The metric at the best epoch on the validation split; the mean over the folds where there are any."""
    best_epoch: int
    """With folds, their rounded mean: the number of epochs that the model is trained for on all examples."""
    folds: int | None
    pruned: str | None
    """`pruned after 3 of 20 epochs` for a trial that did not run to its end; None for one that did."""
    test: dict[str, float] | None
    """Scores on the test split; None until the search has reached its end."""
    confusion: dict[str, Any] | None
    """What the test split's classes are taken for: `classes` and `counts`, a row of counts for each class. None for a
    regression, and with more than MAX_CONFUSED classes."""
    comparison: dict[str, Any] | None
    """A `Comparison` with the default configuration, as plain data; None until the search has reached its end."""
    num_test_readings: int
    """How often this study has read the test split: once for each winner that it had at an end."""
    test_gain: dict[str, Any] | None = None
    """What the model gains over that of the default configuration on the test split: `gain` with its 95% interval
    `low`, `high`, and `num_examples`. None until it is tested, for the default itself, and with folds or a refit."""
    test_interval: tuple[float, float] | None = None
    """Bounds of the 95% interval of the metric on the test split, over its examples; None until it is tested, and
    where only the task's own `test` has the examples."""
    certainty: dict[str, Any] | None = None
    """A `Certainty` as plain data; None until it is tested, for a model trained on all examples, and for targets that
    are neither one class nor one number."""
    is_refit: bool = False
    """Whether the model was trained on training and validation examples together."""
    confirmation: dict[str, Any] | None = None
    """The race between the best configurations, as plain data; None where none was asked for."""
    has_test: bool = True
    """Whether it ever will: the `Objective` of a training loop of its own may have no `test`."""
    baselines: dict[str, Any] | None = None
    """For a table, the `scores` in a `metric` of models that are not networks, on the same splits; None until the
    search has reached its end."""


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """The result of a search."""

    study: str
    home: Path
    counts: Mapping[TrialState, int]
    """Number of trials of the study in each state."""
    num_trials: int
    """Total of complete, pruned, diverged and infeasible trials that was requested."""
    is_done: bool
    """Whether all of them have run; the winner is tested only then."""
    interrupted: bool
    """Whether Ctrl-C or a signal stopped the search."""
    winner: Winner | None
    to_continue: tuple[int, ...] = ()
    """Pruned trials that may still win, after all trials have run; the next session continues them."""
    front: list[dict[str, Any]] = field(default_factory=list)
    """The Pareto front, the best metric first; empty with one objective."""
    trials: tuple[TrialRecord, ...] = ()
    """Every trial of the study, by number; then the repeats that confirm configurations."""
    stopped_at: float | None = None
    """The value of the metric that a trial has reached, and that ended the search before it had all its trials."""
    flat_gain: float | None = None
    """The gain that more trials no longer promise, which ended the search before it had all its trials."""
    spent_budget_s: float | None = None
    """The training time of all trials together that was allowed, and is used up, in seconds."""

    @property
    def num_finished(self) -> int:
        """Trials that count for the total."""
        return count_finished(self.counts)

    @property
    def all_diverged(self) -> bool:
        """Whether the search is complete and every trial with a result diverged."""
        return self.is_done and self.winner is None and self.counts["diverged"] > 0

    @property
    def all_too_costly(self) -> bool:
        """Whether the search is complete and no model was as small, or as fast, as the constraints demand."""
        return self.is_done and self.winner is None and not self.all_diverged and self.counts["infeasible"] > 0

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON can hold it."""
        plain: dict[str, Any] = to_plain(asdict(self) | {"home": str(self.home)})
        del plain["trials"]  # `hpo show --json` has them
        return plain

    def trials_dataframe(self) -> pd.DataFrame:
        """The trials as a pandas data frame: a row for each, and a column `params_NAME` for each parameter.

        A parameter that is inactive in a trial is missing there.
        """
        import pandas as pd  # half a second, which a search can do without

        rows = [
            {
                "number": trial.number,
                "state": trial.state,
                "repeats": trial.repeats,
                "stage": trial.stage,
                "value": trial.value,
                "best_epoch": trial.best_epoch,
                "num_epochs": len(trial.curve),
                "attempts": trial.attempts,
                "duration_s": trial.duration_s,
                **trial.costs,
                "reason": trial.reason,
                **{f"params_{name}": value for name, value in trial.configuration.items()},
            }
            for trial in self.trials
        ]
        return pd.DataFrame(rows)

    def _repr_html_(self) -> str:
        """What a notebook shows: the winner, its learning curve, and what to do next."""
        return outcome_as_html(self)


def outcome_as_html(outcome: SearchOutcome) -> str:
    """A search's outcome for a notebook: the best configuration, its learning curve and the next steps."""
    states = ", ".join(f"{number} {state}" for state, number in outcome.counts.items() if number)
    head = f"<p><b>{escape(outcome.study)}</b>: {states or 'no trial yet'}</p>"
    if outcome.winner is None:
        return f"{head}<p>No trial has a result yet.</p>"
    winner = outcome.winner
    scores = {f"validation {winner.metric}": winner.validation}
    scores |= {f"test {name}": score for name, score in (winner.test or {}).items()}
    repeat = "" if winner.trial == winner.searched else f", a repeat of trial {winner.searched}"
    rows = {"best": f"trial {winner.trial}{repeat}, epoch {winner.best_epoch}"}
    rows |= {name: f"{score:.4f}" for name, score in scores.items()}
    rows |= {
        name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in winner.configuration.items()
    }
    table = "".join(f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in rows.items())
    curves = [trial.curve for trial in outcome.trials if trial.number == winner.trial]
    steps = [
        "" if outcome.is_done else "call run_search again with the same arguments to resume",
        f'hpo.load_best("{outcome.study}") loads the model',
        f"`hpo ui {outcome.study}` shows all curves",
        ".trials_dataframe() has the trials",
    ]
    curve = _curve_as_svg(curves[0], winner.metric) if curves else ""
    return f"{head}<table>{table}</table>{curve}<p>Next: {escape('; '.join(filter(None, steps)))}.</p>"


def _curve_as_svg(curve: Mapping[int, float], metric: str) -> str:
    """A learning curve; steps that are not finite are left out, and so is a curve of fewer than two others."""
    points = {step: value for step, value in sorted(curve.items()) if math.isfinite(value)}
    if len(points) < 2:
        return ""
    width, height, low, high = 320, 120, min(points.values()), max(points.values())
    first, last = min(points), max(points)
    shown = " ".join(
        f"{width * (step - first) / (last - first):.1f},{height - height * (value - low) / ((high - low) or 1):.1f}"
        for step, value in points.items()
    )
    caption = f"{escape(metric)} by step {first} to {last}: {low:.4f} to {high:.4f}"
    return (
        f'<svg width="{width + 8}" height="{height + 8}" viewBox="-4 -4 {width + 8} {height + 8}">'
        f'<polyline points="{shown}" fill="none" stroke="#0072b2" stroke-width="2"/></svg><p>{caption}</p>'
    )


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one training gave."""

    task: str
    """What finds the task's code: a registered name, a FILE.py, or module:attribute."""
    configuration: dict[str, Any]
    metric: str
    seed: int
    curve: dict[int, float]
    """The metric by epoch; NaN where it was not finite."""
    best_epoch: int | None
    """None where no epoch was finite."""
    best_value: float | None
    diverged: bool
    has_model: bool
    """Whether the best epoch's model is in the artifacts of the run."""
    run_id: str
    """Of its run in MLflow."""
    home: Path

    def to_dict(self) -> dict[str, Any]:
        """The training as JSON can hold it."""
        plain: dict[str, Any] = to_plain(vars(self) | {"home": str(self.home)})
        return plain


@dataclass(frozen=True, kw_only=True)
class Rerun:
    """A trial that was run again."""

    study: str
    trial: int
    metric: str
    seed: int
    is_same_seed: bool
    """Whether it is the one that the trial had."""
    value: float | None
    """The best value of this time; None where it diverged at once. With folds, the mean over them."""
    earlier_value: float | None
    first_difference: int | None
    """The first epoch, or fold, with another value; None where both curves are equal in every bit."""
    difference: float | None
    """This value less the earlier one."""
    low: float | None
    """Lower end of the 95% interval of the difference, over the validation examples or the folds; None where the
    earlier model was not kept, and for a training loop of the task's own."""
    high: float | None
    changes: list[str]
    """What differs from the session that ran the trial: the data, source files, versions, the machine."""
    run_id: str
    home: Path

    @property
    def is_equal(self) -> bool:
        """Whether every epoch, or fold, has the same value as before."""
        return self.first_difference is None

    @property
    def is_within_spread(self) -> bool | None:
        """Whether the interval of the difference contains 0; None where there is no interval."""
        return None if self.low is None or self.high is None else self.low <= 0 <= self.high

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON can hold it."""
        plain: dict[str, Any] = to_plain(
            vars(self) | {"home": str(self.home), "is_equal": self.is_equal, "is_within_spread": self.is_within_spread}
        )
        return plain
