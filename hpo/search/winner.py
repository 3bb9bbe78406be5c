"""The winner of a study, and with several objectives its Pareto front, as far as they are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.trial import describe_pruning

if TYPE_CHECKING:
    from hpo.search.study import Study, StudySettings
    from hpo.trial import TrialRecord

TEST_READINGS = "test_readings"
TEST_CONFUSIONS = "test_confusions"

MAX_CONFUSED = 50
"""Classes of which a confusion matrix can be looked at."""


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
    confusions: dict[str, dict[str, Any]] = study.recorded(TEST_CONFUSIONS) or {}
    return Winner(
        trial=best.number,
        configuration={name: value for name, value in best.values.items() if name not in best.inactive},
        metric=study.settings.metric,
        validation=best.value,
        best_epoch=best.best_epoch,
        folds=study.settings.folds,
        pruned=_describe_pruning(best, study.settings) if best.state == "pruned" else None,
        test=readings.get(str(best.number)),
        confusion=confusions.get(str(best.number)),
        num_test_readings=len(readings),
    )


def _describe_pruning(trial: TrialRecord, settings: StudySettings) -> str:
    return describe_pruning(len(trial.curve), settings.num_steps, folds=bool(settings.folds))


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
