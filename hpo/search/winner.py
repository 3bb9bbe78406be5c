"""The winner of a study, and with several objectives its Pareto front, as far as they are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpo.records import Comparison, Winner, describe_pruning

if TYPE_CHECKING:
    from hpo.records import TrialRecord
    from hpo.search.settings import StudySettings
    from hpo.search.study import Study

TEST_READINGS = "test_readings"
TEST_CONFUSIONS = "test_confusions"
COMPARISONS = "comparisons"

MAX_CONFUSED = 50
"""Classes of which a confusion matrix can be looked at."""


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
        has_test=study.has_test,
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
    if found.low is None or found.high is None:
        return f"{default}; the winner gains {found.gain:.4f}, without an interval: only its training loop has the data"
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
