"""The model card: what a model is, where it comes from, how good it is and what is not known of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpo.data.kinds import OF_CLASSES
from hpo.provenance import describe, sessions
from hpo.records import Certainty
from hpo.search.winner import TEST_READINGS, describe_comparison, describe_confirmation, how_far, reading_of
from hpo.values import format_value

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from hpo.objective import Objective
    from hpo.records import Winner
    from hpo.search.study import Study


def model_card(study: Study, objective: Objective, trial: int, *, winner: Winner | None, kind: str | None) -> str:
    """Markdown: task, data, scores, configuration, how it was found, and limits.

    `winner` is the study's if `trial` is it, and `kind` that of the targets; None where only the task's loop knows it.
    """
    lines = [
        f"# {objective.name}: trial {trial} of study {study.name}",
        "",
        objective.description,
        "",
        "## Scores",
        "",
        *_scores(study, trial, winner),
        "",
        *_calibration(winner),
        "## Configuration",
        "",
        "| parameter | value | searched |",
        "| --- | --- | --- |",
        *_configuration(study, trial),
        "",
        "## How it was found",
        "",
        *_origin(study),
        "",
        "## Limits",
        "",
        *_limits(study, winner, kind),
        *_confusion(winner),  # the last, as it may be long and MLflow's registry cuts descriptions
    ]
    return "\n".join(lines) + "\n"


def _scores(study: Study, trial: int, winner: Winner | None) -> Iterator[str]:
    record, settings = study.trial(trial), study.settings
    judged = f"the mean of {settings.folds} folds" if settings.folds else "on the validation split"
    pruned = how_far(record, settings)
    yield f"- {settings.metric} {record.value:.4f} {judged}{f', {pruned}' if pruned else ''}."
    if winner is None:
        earlier = (study.recorded(TEST_READINGS) or {}).get(reading_of(trial, is_refit=False))
        yield f"- It is not the winner of its study{'.' if earlier else ', and was not tested.'}"
        if earlier:
            scores = ", ".join(f"{name} {score:.4f}" for name, score in earlier.items())
            yield f"- Test split, as an earlier winner: {scores}."
        return
    if winner.test:
        scores = ", ".join(f"{name} {score:.4f}" for name, score in winner.test.items())
        yield f"- Test split: {scores}. The study has used it {winner.num_test_readings} time(s)."
    else:
        yield "- Not tested."
    if winner.test_interval:
        low, high = winner.test_interval
        yield f"- 95% interval of the test {winner.metric} over the examples: {low:.4f} to {high:.4f}."
    if winner.confirmation:
        yield f"- Confirmed: {describe_confirmation(winner)}."
        yield from _spread(winner.confirmation)
    if winner.comparison:
        yield f"- {describe_comparison(winner)}."


def _spread(confirmation: Mapping[str, Any]) -> Iterator[str]:
    """A row for each configuration that was trained again."""
    yield from ("", "| trial | in the search | mean of new seeds | standard deviation | seeds |")
    yield "| --- | --- | --- | --- | --- |"
    for row in confirmation["configurations"]:
        numbers = ("-" if row[name] is None else f"{row[name]:.4f}" for name in ("searched", "mean", "std"))
        yield f"| {row['trial']} | {' | '.join(numbers)} | {len(row['values'])} |"
    yield ""


def _calibration(winner: Winner | None) -> Iterator[str]:
    """How well it knows what it knows; nothing for a model that was not tested."""
    if winner is None or not winner.certainty:
        return
    known = Certainty.from_dict(winner.certainty)
    yield from ("## Calibration", "")
    if known.temperature and known.calibration_error:
        before, after = known.calibration_error
        yield f"- Temperature {known.temperature:.4g}, fitted on the validation split."
        yield f"- Expected calibration error on the test split: {before:.4f} before, {after:.4f} after."
        if known.least_error is not None:
            yield f"- A calibrated model would have {known.least_error:.4f} on a test split of this size."
        yield ""
    size_of = "classes in a set" if known.temperature else "width of the interval"
    yield from (f"| stated coverage | covered on the test split | {size_of} |", "| --- | --- | --- |")
    yield from (f"| {coverage:.0%} | {share:.1%} | {size:.4g} |" for coverage, (share, size) in known.found.items())
    yield ""


def _confusion(winner: Winner | None) -> Iterator[str]:
    if winner is None or not winner.confusion:
        return
    names = [name.replace("|", "\\|") for name in winner.confusion["classes"]]
    yield from ("", "## Confusion matrix of the test split", "", "A row for each true class, a column for each answer.")
    yield from ("", f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}")
    for name, row in zip(names, winner.confusion["counts"], strict=True):
        yield f"| **{name}** | {' | '.join(map(str, row))} |"


def _configuration(study: Study, trial: int) -> Iterator[str]:
    record = study.trial(trial)
    ranges = {name: parameter for group in study.settings.space.groups for name, parameter in group.parameters.items()}
    for name, value in record.values.items():
        if name not in record.inactive:
            yield f"| {name} | {format_value(value)} | {ranges[name].describe() if name in ranges else ''} |"


def _origin(study: Study) -> Iterator[str]:
    counts = {state: count for state, count in study.counts().items() if count}
    listed = ", ".join(f"{count} {state}" for state, count in counts.items())
    yield f"- {sum(counts.values())} trials ({listed}), strategy {study.settings.strategy}, seed {study.settings.seed}."
    found = sessions(study)
    if found and found[-1].data:
        yield f"- SHA-256 of the data: {found[-1].data}."
    yield from (f"- {line}." for line in describe(study))


def _limits(study: Study, winner: Winner | None, kind: str | None) -> Iterator[str]:
    yield "- It knows what its training data show, and nothing says how it does on data from elsewhere."
    if winner is not None and winner.confirmation:
        yield "- Its validation score is the best of several seeds, so it is optimistic; the test score is not."
    elif winner is not None and len(study.trials()) > 1:
        yield "- Its validation score is the best of several trials, so it is optimistic; the test score is not."
    if winner is not None and winner.is_refit:
        yield "- It was trained on the validation examples too, so only the test score is its own."
    known = Certainty.from_dict(winner.certainty) if winner and winner.certainty else None
    if kind in OF_CLASSES and known and known.calibration_error:
        before, after = known.calibration_error
        of_divided = "better calibrated" if after < before else "no better calibrated"
        yield "- Probabilities come from the network as they are."
        yield f"- Its logits divided by the temperature are {of_divided} on the test split."
    elif kind in OF_CLASSES:
        yield "- Probabilities come from the network as they are; they were not calibrated."
    elif kind == "regression" and not known:
        yield "- How far off its numbers may be was not measured: it has no intervals."
