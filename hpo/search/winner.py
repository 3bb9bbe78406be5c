"""The winner of a study, and with several objectives its Pareto front, as far as they are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.records import describe_pruning

if TYPE_CHECKING:
    from hpo.records import TrialRecord, TrialState
    from hpo.search.study import Study, StudySettings

TEST_READINGS = "test_readings"
TEST_CONFUSIONS = "test_confusions"
COMPARISONS = "comparisons"

MAX_CONFUSED = 50
"""Classes of which a confusion matrix can be looked at."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What the winner gains over the default configuration, on the examples that chose the winner."""

    trial: int
    """The trial of the default configuration."""
    state: TrialState
    value: float | None
    """Its metric on the validation split, or over the folds; None where it diverged or failed."""
    pruned: str | None
    """`pruned after 3 of 20 epochs` for a default that did not run to its end."""
    gain: float | None
    """How much better the winner's metric is; None for the default itself, and where either has no model to compare."""
    low: float | None
    """Lower end of the 95 % interval of the gain."""
    high: float | None
    num_examples: int
    """Validation examples that both models judged; 0 where folds were compared."""

    @property
    def is_distinct(self) -> bool:
        """Whether the interval leaves out 0: the two are not just as good."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The best trial by its validation score, and what the test split says of it."""

    trial: int
    configuration: dict[str, Any]
    metric: str
    validation: float
    """The metric at the best epoch on the validation split; the mean over the folds where there are any."""
    best_epoch: int
    """With folds the mean over them, rounded: for so many epochs the model is trained on all examples."""
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


def find_winner(study: Study) -> Winner | None:
    """The winner as far as it is known; None while no trial has finished. Reads no data."""
    best = study.best()
    if best is None:
        return None
    assert best.value is not None, "the best trial has a value"
    assert best.best_epoch is not None, "the best trial has a best epoch"
    readings: dict[str, dict[str, float]] = study.recorded(TEST_READINGS) or {}
    comparisons: dict[str, dict[str, Any]] = study.recorded(COMPARISONS) or {}
    confusions: dict[str, dict[str, Any]] = study.recorded(TEST_CONFUSIONS) or {}
    return Winner(
        trial=best.number,
        configuration={name: value for name, value in best.values.items() if name not in best.inactive},
        metric=study.settings.metric,
        validation=best.value,
        best_epoch=best.best_epoch,
        folds=study.settings.folds,
        pruned=how_far(best, study.settings),
        test=readings.get(str(best.number)),
        comparison=comparisons.get(str(best.number)),
        confusion=confusions.get(str(best.number)),
        num_test_readings=len(readings),
    )


def how_far(trial: TrialRecord, settings: StudySettings) -> str | None:
    """`pruned after 3 of 20 epochs`; None for a trial that was not pruned."""
    if trial.state != "pruned":
        return None
    return describe_pruning(len(trial.curve), settings.num_steps, folds=bool(settings.folds))


def describe_comparison(winner: Winner) -> str:
    """`default 0.9514 (trial 0); gain 0.0208, 95 % interval 0.0035 to 0.0382`, and whether that tells them apart."""
    assert winner.comparison is not None, "the winner was compared"
    found = Comparison(**winner.comparison)
    if found.trial == winner.trial:
        return "The winner is the default configuration"
    if found.value is None:
        return f"The default configuration (trial {found.trial}) {found.state}"
    stopped = f", {found.pruned}" if found.pruned else ""
    default = f"The default configuration (trial {found.trial}{stopped}) has {winner.metric} {found.value:.4f}"
    if found.gain is None:
        return f"{default}; its weights were not kept, so the difference has no interval"
    over = f"{found.num_examples} validation examples" if found.num_examples else f"{winner.folds} folds"
    gain = f"the winner gains {found.gain:.4f}, 95 % interval {found.low:.4f} to {found.high:.4f}"
    verdict = f"over {over}" if found.is_distinct else f"cannot be distinguished from the default with {over}"
    return f"{default}; {gain}{' ' if found.is_distinct else ': '}{verdict}"


def front_rows(study: Study) -> list[dict[str, Any]]:
    """The Pareto front as plain data, the best metric first; empty with one objective."""
    if not study.settings.costs:
        return []
    return [
        {
            "trial": trial.number,
            study.settings.metric: trial.value,
            **trial.costs,
            "configuration": {name: value for name, value in trial.values.items() if name not in trial.inactive},
        }
        for trial in study.front()
    ]
