"""Cross-validation: a trial is the mean of its folds, from the division of the data to the model of the winner."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from helpers.training import (
    ImageNet,
    Scripted,
    assert_equal_weights,
    image_splits,
    quick_config,
    weights_of,
    without_time,
)
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage

import hpo
from hpo.config import Direction
from hpo.data.datasets import Splits, all_examples, check_folds, folds, split_dataset
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.errors import UsageError
from hpo.execution.observer import Observer
from hpo.objectives import diabetes  # type: ignore[attr-defined]
from hpo.parameters import Float
from hpo.plots.study import plot_curves
from hpo.search.findings import find_savings
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study, Suggestion
from hpo.session import conclude
from hpo.session.search import run_search
from hpo.space import Group, Space
from hpo.tracking.store import open_store
from hpo.training.cross_validation import fit_folds, fold_config
from hpo.training.trainer import EpochResult, fit

# --- the data ---------------------------------------------------------------------------------------------------------


def numbered_splits(num_examples: int, num_classes: int, seed: int = 0) -> Splits:
    """Examples that are known by their number."""
    inputs = torch.arange(num_examples, dtype=torch.float32)[:, None]
    targets = torch.arange(num_examples) % num_classes if num_classes else inputs[:, 0]
    examples = Split(inputs, targets)
    dataset = Dataset(examples, SealedSplit(lambda: examples, 1), tuple("abcdefgh"[:num_classes]))
    return split_dataset(dataset, validation_fraction=0.3, seed=seed)


def numbers(split: Split) -> list[int]:
    return [int(number) for number in split.inputs[:, 0]]  # type: ignore[call-overload]


@given(
    num_folds=st.integers(2, 7),
    num_examples=st.integers(30, 80),
    num_classes=st.sampled_from([0, 2, 4]),
    seed=st.integers(),
)
def test_each_example_is_validated_on_in_one_fold_and_trained_on_in_all_others(
    num_folds: int, num_examples: int, num_classes: int, seed: int
) -> None:
    splits = numbered_splits(num_examples, num_classes, seed)
    divided = list(folds(splits, num_folds))
    assert len(divided) == num_folds
    assert sorted(number for fold in divided for number in numbers(fold.validation)) == list(range(num_examples))
    for fold in divided:
        assert sorted(numbers(fold.train) + numbers(fold.validation)) == list(range(num_examples))
        assert abs(len(fold.validation) - num_examples / num_folds) < 1
        for label in range(num_classes):  # in proportion
            count = int((fold.validation.targets == label).sum())
            assert abs(count - num_examples / num_classes / num_folds) <= 2
    again = [numbers(fold.validation) for fold in folds(splits, num_folds)]
    assert again == [numbers(fold.validation) for fold in divided]
    assert again != [
        numbers(fold.validation) for fold in folds(numbered_splits(num_examples, num_classes, seed + 1), num_folds)
    ]


def test_more_folds_than_examples_of_a_class_are_refused() -> None:
    splits = numbered_splits(12, 4)
    examples = all_examples(splits)
    check_folds(examples, splits.spec, 3)
    with pytest.raises(UsageError, match="--folds 4 is not allowed: there are only 3 examples of 'a'"):
        check_folds(examples, splits.spec, 4)
    unclassified = numbered_splits(12, 0)
    with pytest.raises(UsageError, match="--folds 13 is not allowed: there are only 12 examples\\."):
        check_folds(all_examples(unclassified), unclassified.spec, 13)


# --- the training -----------------------------------------------------------------------------------------------------

CONFIG = quick_config(max_epochs=4, batch_size=16, patience=2)


def build(splits: Splits, config: Any) -> ImageNet:
    torch.manual_seed(config.seed)
    return ImageNet(dropout=0.2)


def trained(checkpoints: Path, config: Any = CONFIG) -> list[EpochResult]:
    return list(fit_folds(build, folds(image_splits(), 3), config, checkpoints=checkpoints))


def test_the_value_is_the_mean_of_the_folds_trained_by_themselves(tmp_path: Path) -> None:
    results = trained(tmp_path)
    alone = []
    for number, splits in enumerate(folds(image_splits(), 3), start=1):
        config = fold_config(CONFIG, number)
        alone.append(list(fit(build(splits, config), splits, config)))
    assert [r.metrics["val/loss"] for r in results] == [r.metrics["val/loss"] for fold in alone for r in fold]
    assert [r.epoch for r in results] == [4 * number + r.epoch for number, fold in enumerate(alone) for r in fold]
    assert [r.fold for r in results if r.is_last] == [1, 2, 3]
    assert [r.fold_value for r in results if r.is_last] == [fold[-1].best_value for fold in alone]
    assert [r.metrics["fold/accuracy"] for r in results if r.is_last] == [fold[-1].best_value for fold in alone]
    assert results[-1].best_value == fmean(fold[-1].best_value or 0.0 for fold in alone)
    assert results[-1].best_epoch == round(fmean(fold[-1].best_epoch or 0 for fold in alone))
    assert len({fold_config(CONFIG, number).seed for number in (1, 2, 3)}) == 3


def test_a_training_that_stopped_within_a_fold_or_at_its_end_is_resumed_bit_equal(tmp_path: Path) -> None:
    whole = [without_time(result) for result in trained(tmp_path / "whole")]
    for stopped_after in (2, 4, len(whole) - 1):
        checkpoints = tmp_path / str(stopped_after)
        cut = fit_folds(build, folds(image_splits(), 3), CONFIG, checkpoints=checkpoints)
        begun = [without_time(next(cut)) for _ in range(stopped_after)]
        cut.close()
        resumed = [without_time(result) for result in trained(checkpoints)]
        # First what the folds that are over had come to, then the saved epoch once more.
        over = [result for result in begun if result["is_last"]]
        known = over if begun[-1]["is_last"] else [*over, begun[-1]]
        assert resumed == known + whole[stopped_after:]


def test_a_fold_that_diverges_ends_everything(tmp_path: Path) -> None:
    results = trained(tmp_path, replace(CONFIG, optimizer="sgd", lr=1e30))
    assert results[-1].diverged
    assert {result.fold for result in results} == {1}


def test_a_training_of_a_given_length_ends_with_its_last_weights() -> None:
    splits = image_splits()
    model = Scripted([0.2, 0.9, 0.5, 0.6, 1.0], splits.validation.targets)  # type: ignore[arg-type]
    results = list(fit(model, splits, quick_config(max_epochs=5, patience=1), num_epochs=4))
    assert [result.is_last for result in results] == [False] * 3 + [True], "patience has no say in it"
    assert results[-1].best_epoch == 2
    assert model.epoch == 4


# --- the study --------------------------------------------------------------------------------------------------------

SETTINGS = StudySettings(
    task="digits",
    space=Space(Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2))),
    seed=0,
    strategy="priority",
    pruner="wilcoxon",
    max_epochs=30,
    metric="r2",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=20,
    folds=5,
)
BASELINE = [0.4, 0.6, 0.5, 0.9, 0.3]


def new_study(**changes: Any) -> Study:
    return Study.open(InMemoryStorage(), "s", replace(SETTINGS, **changes))


def run(study: Study, values: list[float]) -> Suggestion:
    """A trial with these values of its folds, or those before it is pruned."""
    suggestion = study.ask()
    for fold, value in enumerate(values, start=1):
        if study.report(suggestion.number, fold, value):
            mean = study.estimated_mean(suggestion.number)
            study.tell(suggestion.number, "pruned", value=mean, best_epoch=9)
            return suggestion
    study.tell(suggestion.number, "complete", value=fmean(values), best_epoch=9)
    return suggestion


@pytest.mark.parametrize("direction", [*Direction])
def test_a_trial_that_is_worse_in_two_folds_is_pruned(direction: Any) -> None:
    sign = 1 if direction == "maximize" else -1
    study = new_study(direction=direction)
    run(study, [sign * value for value in BASELINE])
    run(study, [sign * (value - 0.1) for value in BASELINE])
    run(study, [sign * (value + 0.01) for value in BASELINE])
    run(study, [sign * (value + shift) for value, shift in zip(BASELINE, (-0.1, 0.2, -0.1, 0.05, -0.05), strict=True)])
    first, worse, better, mixed = study.trials()
    assert [trial.state for trial in (first, worse, better, mixed)] == ["complete", "pruned", "complete", "complete"]
    assert list(worse.curve) == [1, 2]
    # Folds that happen to be harder or easier than the others do not distort it.
    assert worse.value == pytest.approx(sign * (fmean(BASELINE) - 0.1))
    assert study.best() == better
    (saved,) = find_savings(study)
    assert "Pruning saved 15% of the 20 folds that 4 trials of 5 might have run" in saved.text


def test_a_trial_without_folds_to_compare_with_continues() -> None:
    study = new_study()
    assert run(study, [value - 0.2 for value in BASELINE]).number == 0
    assert study.counts()["complete"] == 1


def test_a_trial_that_was_pruned_after_an_interruption_is_not_taken_for_a_complete_one() -> None:
    study = new_study()
    run(study, BASELINE)
    suggestion = study.ask()
    study.report(suggestion.number, 1, 0.1)
    study.tell(suggestion.number, "interrupted")
    assert study.trials()[1].state == "interrupted"
    assert study.trials()[1].value == 0.1
    run(study, [0.1, 0.1, 0.1, 0.1, 0.1])
    assert study.trials()[1].state == "pruned"


def test_priority_learns_from_the_means_alone() -> None:
    def next_lr(spread: float, **changes: Any) -> Any:
        study = new_study(pruner="none", **changes)
        for number in range(6):
            lr = float(study.settings.space.defaults()["lr"]) * 10 ** (number / 2 - 1)
            study.enqueue([{"lr": lr}], "by hand")
            mean = 0.5 - 0.1 * (number - 2.3) ** 2
            run(study, [mean, mean + spread * (number == 5), mean, mean, mean - spread * (number == 5)])
        return study.ask().values["lr"]

    assert next_lr(0.0) == pytest.approx(next_lr(2.0))
    as_curves = {"folds": None, "max_epochs": 5}
    assert next_lr(0.0, **as_curves) != pytest.approx(next_lr(2.0, **as_curves))


def test_folds_are_no_learning_curve_in_the_plot() -> None:
    study = new_study()
    run(study, BASELINE)
    figure = plot_curves(study.trials(), metric="r2", direction=Direction.MAXIMIZE, has_folds=True)
    assert figure.axes[0].get_xlabel() == "fold"
    assert {line.get_linestyle() for line in figure.axes[0].lines} == {"None"}
    assert [text.get_text() for legend in figure.legends for text in legend.get_texts()] == ["trial 0: 0.54"]


# --- the search -------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, Any] = {"folds": 3, "trials": 2, "pruner": "none", "workers": 1, "compile": "off"}


class KillsTheWorker(Observer):
    """As a machine that runs out of memory in the third fold of the second trial."""

    def __init__(self) -> None:
        self.num_kills = 0

    def epoch_done(self, suggestion: Suggestion, result: EpochResult) -> None:
        if (suggestion.number, result.fold, result.is_last, self.num_kills) == (1, 3, False, 0):
            self.num_kills += 1
            (worker,) = multiprocessing.active_children()
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGKILL)


def test_a_search_whose_worker_is_killed_in_a_fold_ends_as_one_that_is_not(tmp_path: Path, home: Path) -> None:
    other = Path(shutil.copytree(home, tmp_path / "other"))
    killer = KillsTheWorker()
    run_search("diabetes", **OPTIONS, epochs=6, home=home, observer=killer)
    outcome = run_search("diabetes", **OPTIONS, epochs=6, home=other)
    assert killer.num_kills == 1
    studies = [Study.load(open_storage(where), "diabetes") for where in (home, other)]
    assert [trial.attempts for trial in studies[0].trials()] == [1, 2]
    first, second = ([(trial.value, trial.curve, trial.best_epoch) for trial in study.trials()] for study in studies)
    assert first == second
    assert outcome.winner is not None
    assert outcome.winner.validation == fmean(studies[1].trials()[outcome.winner.trial].curve.values())
    assert_equal_weights(*(weights_of(hpo.load_best("diabetes", home=where)) for where in (home, other)))
    # The curves of the folds stand one after the other, and none is told twice.
    for where in (home, other):
        store = open_store(where)
        points = store.client.get_metric_history(store.find_trial_run("diabetes", 1), "val/r2")
        assert [point.step for point in points] == list(range(1, 19))


def test_the_winner_is_trained_again_where_that_was_cut_short(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = OPTIONS | {"folds": 2, "epochs": 3, "home": home}

    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conclude, "refit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_search("diabetes", **options)
    with pytest.raises(UsageError, match="has no model of its own: with --folds only the winner gets one"):
        hpo.load_best("diabetes", home=home)
    winner = run_search("diabetes", **options).winner
    assert winner is not None
    assert winner.test is not None
    assert winner.num_test_readings == 1

    features = diabetes.load(Path()).train.inputs
    model = hpo.load_best("diabetes", home=home)
    torch.testing.assert_close(model.input_mean, features.mean(0), msg="all examples have been trained on")
