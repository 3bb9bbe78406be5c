"""The winner of a study, and with several objectives its Pareto front, as far as they are known."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hpo.config import METRICS
from hpo.errors import UsageError
from hpo.records import Certainty, Comparison, Mistake, Winner, describe_pruning, ranked
from hpo.search.confirmation import best_repeat

if TYPE_CHECKING:
    from hpo.records import TrialRecord
    from hpo.search.settings import StudySettings
    from hpo.search.study import Study

TEST_READINGS = "test_readings"
TEST_INTERVALS = "test_intervals"
TEST_GAINS = "test_gains"
CERTAINTIES = "certainties"
REFITS = "refits"
TEST_CONFUSIONS = "test_confusions"
TEST_MISTAKES = "test_mistakes"
COMPARISONS = "comparisons"
BASELINES = "baselines"
BASELINE_TESTS = "baseline_tests"

MAX_CONFUSED = 50
"""Classes of which a confusion matrix can be looked at."""


def find_winner(study: Study) -> Winner | None:
    """The winner as far as it is known; None while no trial has finished. Reads no data."""
    race = study.race
    found = study.best()
    if found is None:
        return None
    confirmed = race.winner if study.has_searched else None
    best = best_repeat(confirmed, study.settings.direction) if confirmed else found
    assert best.value is not None, "the best trial has a value"
    assert best.best_epoch is not None, "the best trial has a best epoch"
    readings: dict[str, dict[str, float]] = study.recorded(TEST_READINGS) or {}
    comparisons: dict[str, dict[str, Any]] = study.recorded(COMPARISONS) or {}
    confusions: dict[str, dict[str, Any]] = study.recorded(TEST_CONFUSIONS) or {}
    by_seeds = race.compared(study.default_trial) if confirmed and study.default_trial else None
    baselines: dict[str, Any] | None = study.recorded(BASELINES)
    is_refit = str(best.number) in (study.recorded(REFITS) or {})
    reading = reading_of(best.number, is_refit=is_refit)
    return Winner(
        trial=best.number,
        searched=best.number if best.repeats is None else best.repeats,
        configuration=best.configuration,
        metric=study.settings.metric,
        validation=best.value,
        best_epoch=best.best_epoch,
        folds=study.settings.folds,
        pruned=how_far(best, study.settings),
        test=readings.get(reading),
        test_interval=(study.recorded(TEST_INTERVALS) or {}).get(reading),
        test_gain=(study.recorded(TEST_GAINS) or {}).get(reading),
        certainty=(study.recorded(CERTAINTIES) or {}).get(reading),
        is_refit=is_refit,
        confirmation=race.to_dict() if race.contenders and study.has_searched else None,
        comparison=asdict(by_seeds) if by_seeds else comparisons.get(str(best.number)),
        confusion=confusions.get(reading),
        num_test_readings=len(readings),
        has_test=study.has_test,
        baselines=baselines and {**baselines, "test": (study.recorded(BASELINE_TESTS) or {}).get(reading)},
    )


def no_winner_yet(study: str) -> UsageError:
    """The error where somebody wants the model of a study that has none."""
    return UsageError(f"study '{study}' has no finished trial yet; resume it with `hpo search`.")


def find_mistakes(study: Study, winner: Winner) -> list[Mistake]:
    """The test examples that a tested winner is most sure of and wrong about."""
    known = (study.recorded(TEST_MISTAKES) or {}).get(reading_of(winner.trial, is_refit=winner.is_refit))
    return [Mistake(**plain) for plain in known or []]


def reading_of(trial: int, *, is_refit: bool) -> str:
    """The key that a reading of the test split is recorded under."""
    return f"{trial} refit" if is_refit else str(trial)


def forget_models(study: Study, trials: Collection[int]) -> None:
    """Forget what is known of the models of trials that train on. How often the test split was used stays known.

    The caller holds the study's lock.
    """
    numbers = {str(number) for number in trials}
    for key in (TEST_INTERVALS, TEST_GAINS, CERTAINTIES, REFITS, TEST_CONFUSIONS, TEST_MISTAKES, BASELINE_TESTS):
        _replace(study, key, lambda known: {of: fact for of, fact in known.items() if of.split()[0] not in numbers})
    _replace(
        study,
        COMPARISONS,
        lambda known: {of: fact for of, fact in known.items() if not {of, str(fact["trial"])} & numbers},
    )
    _replace(
        study,
        TEST_READINGS,
        lambda known: {
            f"an earlier model of {of}, {index}" if of.split()[0] in numbers else of: scores
            for index, (of, scores) in enumerate(known.items())
        },
    )


def _replace(study: Study, key: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    known = study.recorded(key) or {}
    if (changed := change(known)) != known:
        study.record(key, changed)


def how_far(trial: TrialRecord, settings: StudySettings) -> str | None:
    """`pruned after 3 of 20 epochs`; None for a trial that was not pruned."""
    if trial.state != "pruned":
        return None
    return describe_pruning(len(trial.curve), settings.num_steps, folds=bool(settings.folds))


def count_candidates(study: Study) -> int:
    """How many trials the winner is the best of, without the default configuration; at least 1."""
    return max(1, len(ranked(study.trials(), study.settings.direction)) - 1)


def describe_comparison(winner: Winner) -> str:
    """`default 0.9514 (trial 0); gain 0.0208, 95% interval 0.0035 to 0.0382`, and whether that tells them apart."""
    assert winner.comparison is not None, "the winner was compared"
    found = Comparison(**winner.comparison)
    if found.is_same or found.trial == winner.searched:
        return "The winner is the default configuration"
    if found.value is None:
        how = " with each new seed" if found.num_seeds else ""
        return f"The default configuration (trial {found.trial}) {found.state}{how}"
    stopped = f", {found.pruned}" if found.pruned else ""
    default = f"The default configuration (trial {found.trial}{stopped}) has {winner.metric} {found.value:.4f}"
    if found.num_seeds and found.num_seeds[1] > 1:
        default += f", the mean of {found.num_seeds[1]} trainings"
    if found.gain is None and winner.folds:
        return f"{default}; too few folds of both are known for an interval of the difference"
    if found.gain is None:
        return f"{default}; its weights were not kept, so the difference has no interval"
    if found.low is None or found.high is None:
        return f"{default}; the winner gains {found.gain:.4f}, without an interval: only its training loop has the data"
    over = _describe_evidence(found, winner)
    whose = "the mean of the winner" if found.num_seeds else "the winner"
    gain = f"{whose} gains {found.gain:.4f}, 95% interval {found.low:.4f} to {found.high:.4f}"
    if found.num_candidates > 1:
        gain += f" (as the best of {found.num_candidates} trials)"
    verdict = f"over {over}" if found.is_distinct else f"cannot be distinguished from the default with {over}"
    return f"{default}; {gain}{' ' if found.is_distinct else ': '}{verdict}{_describe_test_gain(winner)}"


def _describe_test_gain(winner: Winner) -> str:
    """What the model gains on the test split, which did not choose it; empty where that was not measured."""
    if winner.test_gain is None:
        return ""
    gain, low, high, num = (winner.test_gain[name] for name in ("gain", "low", "high", "num_examples"))
    return f"; on the {num} test examples its model gains {gain:.4f}, 95% interval {low:.4f} to {high:.4f}"


def _describe_evidence(found: Comparison, winner: Winner) -> str:
    """What the interval of a comparison is about."""
    if found.num_seeds:
        return "{} trainings of the winner and {} of the default".format(*found.num_seeds)
    if found.num_examples:
        return f"{found.num_examples} validation examples"
    is_part = found.num_folds and found.num_folds != winner.folds
    return f"{found.num_folds} of {winner.folds} folds" if is_part else f"{winner.folds} folds"


def describe_baselines(winner: Winner) -> str:
    """What a linear model and gradient boosting reach, and whether the network is better on the test split.

    The validation split cannot say so: the network was chosen on it, among many.
    """
    assert winner.baselines is not None, "they were measured"
    metric, scores, test = (winner.baselines[key] for key in ("metric", "scores", "test"))
    told = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
    text, direction = f"{metric} on the same splits: {told}", METRICS[metric]
    if test:
        examples = f"on the {test['num_examples']} test examples"
        gain = f"gain {test['gain']:.4f}, 95% interval {test['low']:.4f} to {test['high']:.4f}"
        if test["low"] > 0:
            return f"{text}; the network beats {test['model']} {examples}: {gain}"
        if test["high"] < 0:
            return f"{text}; the network is worse than {test['model']} {examples} ({gain}): do not deploy it"
        return f"{text}; the network cannot be distinguished from {test['model']} {examples}: {gain}"
    unbeaten = [name for name, score in scores.items() if direction.gain(winner.validation, over=score) <= 0]
    if metric == winner.metric and unbeaten:
        return f"{text}; the network does not beat {' and '.join(unbeaten)}, though it was chosen on these examples"
    return text


def front_rows(study: Study) -> list[dict[str, Any]]:
    """The Pareto front as plain data, the best metric first; empty with one objective."""
    if not study.settings.costs:
        return []
    return [
        {
            "trial": trial.number,
            study.settings.metric: trial.value,
            **trial.costs,
            "configuration": trial.configuration,
        }
        for trial in study.front()
    ]


def describe_training(winner: Winner) -> str:
    """`trial 23, a repeat of trial 12, epoch 9`, and how far it came and what was trained on all examples."""
    parts = [f"trial {winner.trial}"]
    if winner.trial != winner.searched:
        parts.append(f"a repeat of trial {winner.searched}")
    if winner.folds:
        parts.append(f"trained on all examples for {winner.best_epoch} epochs")
    else:
        parts.append(f"epoch {winner.best_epoch}")
    if winner.is_refit:
        parts.append("then trained on training and validation examples together")
    return ", ".join(parts + ([winner.pruned] if winner.pruned else []))


def describe_confirmation(winner: Winner) -> str:
    """`mean 0.9312, standard deviation 0.0021, over 3 new seeds; trial 12, the best of the search, has mean 0.9275`."""
    assert winner.confirmation is not None, "it was asked for"
    if not winner.confirmation["is_done"]:
        return "not finished yet: the winner so far is the best trial of the search"
    rows = {row["trial"]: row for row in winner.confirmation["configurations"]}
    chosen, luckiest = rows.get(winner.searched), next(iter(rows.values()))
    if chosen is None or chosen["mean"] is None:
        return "none of the new trainings has a result; the winner is the best trial of the search"
    text = _mean_of(chosen)
    if luckiest is chosen and len(rows) > 1:
        return f"{text}; the best trial of the search stays ahead of {_others(len(rows) - 1)}"
    if luckiest is chosen:
        return text
    lucky = (
        f"trial {luckiest['trial']}, the best of the search with {luckiest['searched']:.4f}, has {_mean_of(luckiest)}"
    )
    return f"{text}; {lucky}"


def describe_certainty(winner: Winner) -> str:
    """`calibration error 0.0210 on the test split, 0.0090 with temperature 1.31 (0.0085 if calibrated); ...`."""
    assert winner.certainty is not None, "it was measured"
    known = Certainty.from_dict(winner.certainty)
    covered, size = known.found[0.9]
    if known.temperature is None or known.calibration_error is None:
        return f"intervals of 90% contain {covered:.1%} of the test examples; they are {size:.4g} wide"
    before, after = known.calibration_error
    least = "" if known.least_error is None else f" ({known.least_error:.4f} if calibrated)"
    return (
        f"calibration error {before:.4f} on the test split, {after:.4f} with temperature "
        f"{known.temperature:.3g}{least}; sets of 90% contain the class of {covered:.1%} of the test examples, "
        f"{size:.2f} classes on average"
    )


def _mean_of(row: dict[str, Any]) -> str:
    if row["num_diverged"]:
        return f"diverged with {row['num_diverged']} of {len(row['repeats'])} new seeds"
    if row["mean"] is None:
        return "no result with new seeds"
    spread = "" if row["std"] is None else f", standard deviation {row['std']:.4f}"
    return f"mean {row['mean']:.4f}{spread} over {len(row['values'])} new seed{'s' if len(row['values']) > 1 else ''}"


def _others(number: int) -> str:
    return "the other configuration" if number == 1 else f"the other {number} configurations"
