"""An ensemble of what a search has trained anyway: who belongs to it, what it answers, and what it gains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hpo.objectives.digits import load
from torch import Tensor

import hpo
from hpo.errors import StoreError, UsageError
from hpo.models.ensemble import averaged
from hpo.session.search import run_search
from hpo.training.ensembles import estimate_gain, select_members

TARGETS = torch.arange(300) % 3


def logits(*right: Tensor) -> Tensor:
    """Sure answers that are right for these examples, and wrong for all others."""
    is_right = torch.stack(right).any(0)
    return 4.0 * torch.eye(3)[torch.where(is_right, TARGETS, (TARGETS + 1) % 3)]


def errors(outputs: Tensor, rows: Tensor) -> float:
    return float((outputs.argmax(1) != TARGETS[rows]).double().mean())


def test_models_that_make_other_mistakes_are_chosen_and_a_bad_one_is_not() -> None:
    third = torch.arange(300) * 3 // 300
    models = {n: logits(third != n) for n in range(3)} | {9: logits(third > 5)}

    chosen = select_members(models, torch.arange(300), errors, "classification")

    assert set(chosen) == {0, 1, 2}
    assert (
        errors(averaged([models[n] for n in chosen], list(chosen.values()), "classification"), torch.arange(300)) == 0
    )
    gain = estimate_gain(models, 0, errors, "classification", seed=0)
    assert gain == pytest.approx(1 / 3, abs=0.05), "one model is wrong for a third"


def test_of_equals_and_noise_nothing_is_gained() -> None:
    alike = {0: logits(TARGETS > 0), 1: logits(TARGETS > 0)}

    assert sum(select_members(alike, torch.arange(300), errors, "classification").values()) == 1
    assert estimate_gain(alike, 0, errors, "classification", seed=0) == 0


def test_numbers_are_averaged_and_of_logits_their_probabilities() -> None:
    one, other = torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])

    assert torch.equal(averaged([one, other], [3, 1], "regression"), 0.75 * one + 0.25 * other)
    expected = 0.75 * one.softmax(1) + 0.25 * other.softmax(1)
    assert torch.allclose(averaged([one, other], [3, 1], "classification").exp(), expected)


def test_what_a_search_kept_is_one_model_that_is_no_worse_on_the_validation_split(tmp_path: Path, home: Path) -> None:
    outcome = run_search("digits", home=home, trials=3, epochs=3, workers=1, pruner="none", strategy="random")

    together = hpo.load_ensemble("digits", home=home)

    images = load(tmp_path).test.open().inputs
    singles = {n: hpo.load_best("digits", home=home, trial=n).probabilities(images) for n in together.trials}
    total = sum(together.trials.values())
    mean = sum(times * singles[n] for n, times in together.trials.items()) / total
    assert torch.allclose(together.probabilities(images), mean, atol=1e-5)
    assert together.predict([]) == []
    assert together.predict(images[:5]) == [together.classes[index] for index in mean[:5].argmax(1).tolist()]
    assert set(together.trials) <= {0, 1, 2}
    assert -0.2 < together.gain < 0.2
    again = hpo.load_ensemble("digits", home=home)
    assert (again.trials, again.gain) == (together.trials, together.gain)
    assert run_search("digits", home=home).winner == outcome.winner, "the test split was not used again"


def test_what_has_no_ensemble_says_why(home: Path) -> None:
    run_search("digits", home=home, trials=1, epochs=1, workers=1)
    with pytest.raises(StoreError, match="has kept the weights of 1 trials, and an ensemble needs two"):
        hpo.load_ensemble("digits", home=home)
    run_search("digits", home=home, study="folded", trials=1, epochs=1, workers=1, folds=2)
    with pytest.raises(UsageError, match="was searched with --folds: there is no validation split"):
        hpo.load_ensemble("folded", home=home)
