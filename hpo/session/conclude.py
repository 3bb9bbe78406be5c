"""The last phase of a search: its winner is compared with the default, tested once, and everything is summarised."""

from __future__ import annotations

import math
import sys
import time
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hpo.checks.table_models import is_table, table_outputs, table_scores
from hpo.config import METRICS, USUAL, augmentation_names, derive_seed
from hpo.data.datasets import all_examples
from hpo.database import without_password
from hpo.deploy.load import LoadedTrial, load_trained_trial, load_trial
from hpo.errors import CheckpointError, HpoError, SearchError, StoreError, in_one_line
from hpo.execution.messages import Assignment
from hpo.execution.worker import refit
from hpo.files import temporary_folder
from hpo.models.preprocessed import MirrorAveraged, own_of
from hpo.plots.study import plot_confusion, plot_curves, plot_front, plot_history, plot_importances, plot_slices
from hpo.provenance import describe as describe_provenance
from hpo.records import ELIGIBLE, Comparison, Winner
from hpo.search.findings import findings
from hpo.search.importances import describe_share, importances
from hpo.search.winner import (
    BASELINE_TESTS,
    BASELINES,
    CERTAINTIES,
    COMPARISONS,
    MAX_CONFUSED,
    REFITS,
    TEST_CONFUSIONS,
    TEST_GAINS,
    TEST_INTERVALS,
    TEST_MISTAKES,
    TEST_READINGS,
    count_candidates,
    describe_baselines,
    describe_comparison,
    describe_confirmation,
    describe_training,
    find_winner,
    front_rows,
    how_far,
    reading_of,
)
from hpo.session.report import has_plotly, report_page
from hpo.training.certainty import has_certainty, measure_certainty
from hpo.training.comparison import (
    Difference,
    common_folds,
    compare_folds,
    compare_models,
    compare_outputs,
    score_interval,
)
from hpo.training.evaluation import evaluate, evaluate_classes, outputs_and_targets
from hpo.training.losses import target_scale
from hpo.training.mistakes import worst_mistakes
from hpo.training.trained import CHECKPOINT, REFIT

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.figure import Figure

    from hpo.data.datasets import Splits
    from hpo.data.examples import DataSpec, SealedSplit, Split
    from hpo.execution.observer import Observer
    from hpo.objective import Objective
    from hpo.search.findings import Finding
    from hpo.search.importances import Importances
    from hpo.search.lease import Session
    from hpo.search.study import Study
    from hpo.session.opening import Opened
    from hpo.session.preparation import Prepared
    from hpo.tracking.runs import StudyRuns, SummaryRun
    from hpo.tracking.store import TrackingStore
    from hpo.trial import TrainedTrial


_POLL_S = 0.5
_ARRIVAL_S = 60.0


def conclude(prepared: Prepared, opened: Opened, observer: Observer) -> Winner | None:
    """Find the winner when all trials have run, test it once, and write the summary; else the winner so far."""
    study, session, coordinator = opened.study, opened.session, opened.coordinator
    ending = "training the winner on all examples" if study.is_refit else "testing the winner"
    observer.note("drawing the plots" + (f" and {ending}" if coordinator.is_done else ""))
    has_arrived = _flush_patiently(opened.runs) if coordinator.is_done else opened.runs.flush()
    coordinator.remove_old_checkpoints()
    session.conclude()
    if coordinator.is_done:
        if not has_arrived:
            _require_winner_arrived(study, opened.runs)
        _await_others(session)
        # Refitting, and judging the test split, may take their time.
        winner = session.exclusively(lambda: tested_winner(prepared, opened), takes_long=True)
    else:
        winner = find_winner(study)
    if study.settings.costs:
        opened.runs.mark_front({trial.number for trial in study.front()})
    write_summary(study, opened.summary, winner)
    log_report(study, opened.summary)
    return winner


def _flush_patiently(runs: StudyRuns) -> bool:
    """Send all that the trials have written; whether all of it arrived. A busy store is asked again for a minute."""
    end = time.monotonic() + _ARRIVAL_S
    while not (has_arrived := runs.flush()) and time.monotonic() < end:
        time.sleep(_POLL_S)
    return has_arrived


def _require_winner_arrived(study: Study, runs: StudyRuns) -> None:
    """Raise StoreError if MLflow lacks what is to be tested; other runs may wait for the next search."""
    winner = find_winner(study)
    if winner is not None and not runs.has_arrived(winner.trial):
        raise StoreError(
            f"MLflow at {without_password(runs.store.uri)} has not accepted the run of trial {winner.trial}, the "
            "winner, which waits in the home; the warning above says why."
        )


def _await_others(session: Session) -> None:
    """Wait until MLflow has the weights of other machines' trials too."""
    while session.others():
        time.sleep(_POLL_S)


def tested_winner(prepared: Prepared, opened: Opened) -> Winner | None:
    """The winner with its test scores, and compared with the default configuration on the validation split.

    The test split is opened only if this winner has not been tested before. What has been cross-validated, or is to be
    refit, is trained on all examples first; where that is cut short it is trained again. The caller holds the study's
    lock, so that no two sessions test at once.
    """
    study, store, task = opened.study, opened.store, prepared.request.task
    device = prepared.request.machine.device
    winner = find_winner(study)
    if winner is not None and not _knows_the_default(study, winner):
        compared = compare_with_default(study, store, prepared.splits, winner, device, task.objective)
        if compared:
            _record(study, COMPARISONS, str(winner.trial), asdict(compared))
    if winner is not None and winner.baselines is None and prepared.splits and is_table(prepared.splits):
        metric = USUAL[prepared.splits.spec.kind][1] if winner.metric == "loss" else winner.metric
        if metric in METRICS:
            scores = table_scores(prepared.splits, metric, study.settings.folds)
            study.record(BASELINES, {"metric": metric, "scores": scores})
            winner = find_winner(study)
    if winner is not None and study.is_refit and not (winner.is_refit or study.settings.folds):
        _refit(winner, prepared, opened, REFIT)
        _record(study, REFITS, str(winner.trial), True)
        winner = find_winner(study)
    if winner is None or winner.test is not None or not task.has_test:
        return find_winner(study)
    if prepared.test is None:
        scores = _scores_of_own_test(task.objective, load_trained_trial(store, study, winner.trial, device))
    else:
        scores = _test_scores(winner, prepared.test, prepared, opened)
    _record(study, TEST_READINGS, reading_of(winner.trial, is_refit=winner.is_refit), scores)
    return find_winner(study)


def _test_scores(winner: Winner, test: SealedSplit, prepared: Prepared, opened: Opened) -> dict[str, float]:
    """Open the test split, and judge the winner by it."""
    study, request = opened.study, prepared.request
    reading = reading_of(winner.trial, is_refit=winner.is_refit)
    if study.settings.folds:
        _refit(winner, prepared, opened, CHECKPOINT)
    device, task = request.machine.device, request.task.objective
    trained = load_trial(opened.store, study, winner.trial, device, task, is_refit=winner.is_refit)
    spec, classes = trained.model.spec, trained.model.classes
    examples, is_classified = _read_test_split(test, spec), spec.kind == "classification"
    assert prepared.splits is not None, "a task with a test split has others"
    scale = target_scale(prepared.splits.train, spec)
    if is_classified:
        scores, counts = evaluate_classes(trained.model, examples, trained.config, spec)
        if len(classes) <= MAX_CONFUSED:
            _record(study, TEST_CONFUSIONS, reading, {"classes": classes, "counts": counts})
    else:
        scores = evaluate(trained.model, examples, trained.config, spec, target_scale=scale)
    answers = outputs_and_targets(trained.model, examples, trained.config, spec.kind)
    ends = score_interval(
        answers,
        trained.config,
        num_examples=len(examples),
        spec=spec,
        target_scale=scale,
        own=own_of(trained.model),
        thresholds=getattr(trained.model, "thresholds", None),
        seed=derive_seed(study.settings.seed, "test interval"),
    )
    if all(map(math.isfinite, ends)):
        _record(study, TEST_INTERVALS, reading, ends)
    if gain := _test_gain(winner, trained, examples, prepared, opened):
        _record(study, TEST_GAINS, reading, gain)
    if winner.baselines:
        found = _compare_with_baseline(winner.baselines, answers, examples, prepared.splits, trained, study)
        _record(study, BASELINE_TESTS, reading, found)
    if has_certainty(spec) and not study.is_refit:  # else it has seen the validation examples
        known = outputs_and_targets(trained.model, prepared.splits.validation, trained.config, spec.kind)
        certainty = measure_certainty(known, answers, is_classified=is_classified)
        _record(study, CERTAINTIES, reading, certainty.to_dict())
    if is_classified:
        mistakes = worst_mistakes(*answers, inputs=examples.inputs, test=test, classes=classes)
        _record(study, TEST_MISTAKES, reading, [asdict(mistake) for mistake in mistakes])
    if study.settings.metric != "loss":
        del scores["loss"]  # of use in training alone
    if is_classified and {"flip", "alternating_flip"} & {*augmentation_names(trained.config.augment)}:
        # Apart from the others: it takes two passes, which the model that is loaded does not make.
        both = evaluate(MirrorAveraged(trained.model), examples, trained.config, spec)
        scores["accuracy_mirror_averaged"] = both["accuracy"]
    return scores


def _compare_with_baseline(
    baselines: Mapping[str, Any],
    answers: tuple[Any, Any],
    examples: Split,
    splits: Splits,
    trained: LoadedTrial,
    study: Study,
) -> dict[str, Any]:
    """What a network gains on the test split over the model that was the better one on the validation split.

    `answers` are its outputs and the targets there. That model learns from the examples that the network has seen.
    """
    metric = baselines["metric"]
    best = min(baselines["scores"], key=lambda name: METRICS[metric].loss(baselines["scores"][name]))
    train = all_examples(splits) if study.is_refit or study.settings.folds else splits.train
    outputs, targets = (each.cpu() for each in answers)
    gain = compare_outputs(
        outputs,
        table_outputs(replace(splits, train=train, validation=examples), (best,))[best],
        targets,
        replace(trained.config, metric=metric, device="cpu"),
        num_examples=len(examples),
        spec=splits.spec,
        target_scale=target_scale(train, splits.spec),
        own=own_of(trained.model),
        seed=derive_seed(study.settings.seed, "comparison"),
    ).as_gain(METRICS[metric])
    return {"model": best, "gain": gain.value, "low": gain.low, "high": gain.high, "num_examples": len(examples)}


def _scores_of_own_test(objective: Objective, trained: TrainedTrial) -> dict[str, float]:
    """What the `test` of a task with its own training loop returns. What it prints must not mix with --json."""
    assert objective.test is not None, "it has a test"
    try:
        with redirect_stdout(sys.stderr):
            scores = objective.test(trained)
        return {str(name): float(score) for name, score in scores.items()}
    except HpoError:
        raise
    except (Exception, SystemExit) as error:  # it is user code and may raise anything, or return anything
        raise SearchError(
            f"test of task '{objective.name}' failed with trial {trained.number}, the winner: {in_one_line(error)}; "
            "the trials are kept."
        ) from error


def compare_with_default(
    study: Study, store: TrackingStore, splits: Splits | None, winner: Winner, device: str, task: Objective
) -> Comparison | None:
    """What a winner gains over the default configuration; None where the study has no trial of that.

    With folds their values are compared, else what both models make of the validation split. A training loop of the
    task's own has that split: the gain then comes without an interval.
    """
    default = study.default_trial
    if default is None:
        return None
    num_candidates = count_candidates(study)
    difference, num_examples, num_folds = None, 0, 0
    is_same = repr(winner.configuration) == repr(default.configuration)
    if default.state in ELIGIBLE and not is_same:
        if study.settings.folds:
            curve = study.trial(winner.trial).curve
            difference = compare_folds(
                curve, default.curve, num_folds=study.settings.folds, num_candidates=num_candidates
            )
            num_folds = len(common_folds(curve, default.curve))
        elif splits is None:
            difference = Difference(winner.validation - default.known_value, math.nan, math.nan)
        else:
            num_examples = len(splits.validation)
            one, other = (_kept_model(study, store, each, device, task) for each in (winner.trial, default.number))
            if one and other:
                difference = _difference_on(splits.validation, splits, study, (one, other), num_candidates)
    gain = difference.as_gain(study.settings.direction) if difference else None
    interval = gain if gain and math.isfinite(gain.low) else None
    return Comparison(
        trial=default.number,
        state=default.state,
        value=default.value if default.state in ELIGIBLE else None,
        pruned=how_far(default, study.settings),
        gain=gain.value if gain else None,
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        num_examples=num_examples,
        num_folds=num_folds,
        num_candidates=num_candidates,
        is_same=is_same,
    )


def _kept_model(study: Study, store: TrackingStore, number: int, device: str, task: Objective) -> LoadedTrial | None:
    """None where a trial's weights are gone, as the default's are in studies of before hpo 0.2."""
    try:
        return load_trial(store, study, number, device, task)
    except (CheckpointError, StoreError):
        return None


def _difference_on(
    split: Split, splits: Splits, study: Study, models: tuple[LoadedTrial, LoadedTrial], num_candidates: int
) -> Difference:
    """What the first model's metric on a split is above the other's; `splits` are those that they were trained on."""
    one, other = models
    return compare_models(
        (one.model, one.config),
        (other.model, other.config),
        split,
        spec=splits.spec,
        target_scale=target_scale(splits.train, splits.spec),
        seed=derive_seed(study.settings.seed, "comparison"),
        num_candidates=num_candidates,
    )


def _test_gain(
    winner: Winner, trained: LoadedTrial, examples: Split, prepared: Prepared, opened: Opened
) -> dict[str, Any] | None:
    """What a winner gains over the default configuration on the test split, which has chosen neither of them.

    None for the default itself, and for a winner that was trained on other examples than the default.
    """
    study, default = opened.study, opened.study.default_trial
    has_other_examples = study.settings.folds or study.is_refit
    if has_other_examples or default is None or default.state not in ELIGIBLE or prepared.splits is None:
        return None
    if repr(winner.configuration) == repr(default.configuration):
        return None
    device, task = prepared.request.machine.device, prepared.request.task.objective
    other = _kept_model(study, opened.store, default.number, device, task)
    if other is None:
        return None
    found = _difference_on(examples, prepared.splits, study, (trained, other), num_candidates=1)
    gain = found.as_gain(study.settings.direction)
    return {"gain": gain.value, "low": gain.low, "high": gain.high, "num_examples": len(examples)}


def _refit(winner: Winner, prepared: Prepared, opened: Opened, artifact: str) -> None:
    """Train the winner on training and validation examples together, and give its run the model."""
    request, study, store, splits = prepared.request, opened.study, opened.store, prepared.splits
    assert splits is not None, "the shared trainer has splits"
    config = request.task.train_config(
        winner.configuration,
        max_epochs=study.settings.max_epochs,
        seed=study.trial_seed(winner.trial),
        device=request.machine.device,
        **request.machine.trainer,
    )
    parameters = request.task.model_parameters(winner.configuration)
    thresholds = None
    if artifact == REFIT and splits.spec.kind == "multilabel":
        trained = load_trial(store, study, winner.trial, config.device, request.task.objective)
        thresholds = trained.model.thresholds
    with temporary_folder() as folder:
        assignment = Assignment(number=winner.trial, model_parameters=parameters, config=config, folder=Path(folder))
        refit(
            assignment,
            request.task.objective,
            splits,
            num_epochs=_epochs_found(winner, study),
            value=winner.validation,
            thresholds=thresholds,
        )
        store.upload(store.find_trial_run(study.name, winner.trial, study.id), Path(folder), artifact)


def _epochs_found(winner: Winner, study: Study) -> int:
    """The epochs that the winning configuration needs: the mean of its new trainings, if it was confirmed."""
    confirmed = study.race.winner
    epochs = [repeat.best_epoch for repeat in confirmed.repeats if repeat.best_epoch] if confirmed else []
    return round(fmean(epochs)) if epochs else winner.best_epoch


def _knows_the_default(study: Study, winner: Winner) -> bool:
    """Whether the winner was compared with the default configuration as it is now, and not as it was interrupted, as
    the best of the trials that there are now."""
    known, default = winner.comparison, study.default_trial
    if known is None or default is None:
        return known is not None
    if known.get("num_seeds"):  # it follows from the repeats
        return True
    return bool(known.get("num_candidates") == count_candidates(study) and known["state"] == default.state)


def _record(study: Study, key: str, of: str, fact: Any) -> None:
    study.record(key, {**(study.recorded(key) or {}), of: fact})


def _read_test_split(test: SealedSplit, spec: DataSpec) -> Split:
    try:
        examples = test.open()
        examples.require_like(spec)
        return examples
    except HpoError:
        raise
    except Exception as error:  # reading is user code and may raise anything
        raise SearchError(
            f"the test split cannot be read: {type(error).__name__}: {error}; the trials are kept."
        ) from error


def write_summary(study: Study, summary: SummaryRun, winner: Winner | None) -> None:
    """Put what the study found into its summary run: settings, space, plots, what it learned and the winner."""
    settings = study.settings
    summary.log_dict(settings.to_dict(), "settings.json")
    rated = importances(study)
    front = front_rows(study)
    if front:
        summary.log_dict({"front": front}, "front.json")
    for name, figure in draw_figures(study, rated, front, winner).items():
        summary.log_figure(f"plots/{name}.png", figure)
    learned = _what_was_learned(findings(study), rated)
    summary.log_text(learned, "findings.md")
    if winner is None:
        summary.set_note("No trial has a result yet.")
        return
    summary.log_dict(asdict(winner), "winner.json")
    summary.set_tags({"hpo.winner": str(winner.trial)})
    summary.log_metrics({f"best/{settings.metric}": winner.validation})
    summary.log_metrics({f"test/{name}": score for name, score in (winner.test or {}).items()})
    summary.set_note(f"{_in_words(study, winner)}\n\n{learned}")


def log_report(study: Study, summary: SummaryRun) -> None:
    """Put the report into the summary run too, if plotly is installed."""
    if has_plotly():
        summary.log_text(report_page(study), "report.html")


def draw_figures(
    study: Study, rated: Importances, front: Sequence[Mapping[str, Any]], winner: Winner | None
) -> dict[str, Figure]:
    """What there is to see of a study, by the name of its file."""
    settings, trials = study.settings, study.trials()
    metric, direction = settings.metric, settings.direction
    figures = {
        "history": plot_history(trials, metric=metric, direction=direction),
        "learning_curves": plot_curves(trials, metric=metric, direction=direction, has_folds=bool(settings.folds)),
        "slices": plot_slices(trials, settings.space, metric=metric, direction=direction),
    }
    if any((known := rated.known()).values()):
        figures["importances"] = plot_importances(known, note=rated.note)
    if front:
        figures["pareto_front"] = plot_front(
            trials, [row["trial"] for row in front], metric=metric, direction=direction, costs=settings.costs
        )
    if winner and winner.confusion:
        figures["confusion_matrix"] = plot_confusion(winner.confusion["classes"], winner.confusion["counts"])
    return figures


def _in_words(study: Study, winner: Winner) -> str:
    rows = "".join(f"| {name} | {value} |\n" for name, value in winner.configuration.items())
    untested = "not evaluated yet" if winner.has_test else "none"
    test = untested if winner.test is None else ", ".join(f"{k} {v:.4f}" for k, v in winner.test.items())
    judged = f"the mean of {winner.folds} folds" if winner.folds else "on the validation split"
    compared = f" {describe_comparison(winner)}." if winner.comparison else ""
    compared += f" Confirmation: {describe_confirmation(winner)}." if winner.confirmation else ""
    if winner.baselines:
        compared += f" {describe_baselines(winner)}."
    return (
        f"**Winner: {describe_training(winner)}**, {winner.metric} {winner.validation:.4f} {judged}; "
        f"test split: {test}.{compared}\n\n| parameter | value |\n| --- | --- |\n{rows}\n"
        f'Load it: `hpo.load_best("{study.name}")`. Plots, settings and search space are in the artifacts.\n\n'
        f"{'. '.join(describe_provenance(study))}."
    )


def _what_was_learned(found: Sequence[Finding], rated: Importances) -> str:
    """The findings as Markdown, and the importances of groups and parameters with their intervals."""
    sentences = "".join(f"- {finding.text}\n" for finding in found)
    rows = "".join(
        f"| {group} | {name} | {describe_share(each.share, each.low, each.high, each.condition)} |\n"
        for group, name, each in rated.rows()
    )
    table = f"\n| group | parameter | importance (90% interval) |\n| --- | --- | --- |\n{rows}" if rows else ""
    note = f"\n{rated.note}\n" if rated.note else ""
    return (sentences + table + note).lstrip() or "There is nothing to learn from yet.\n"
