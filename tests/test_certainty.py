"""How sure a model may be: calibrated probabilities, sets of classes and intervals that keep their word."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.data import of_classes
from hpo.objectives.digits import load
from torch import nn

import hpo
from hpo.config import TrainConfig
from hpo.data.examples import Split
from hpo.errors import UsageError
from hpo.models.preprocessed import PreprocessedModel
from hpo.records import Certainty
from hpo.session.search import run_search
from hpo.terminal.facts import best_facts
from hpo.training.certainty import conformal_quantile, fit_temperature, measure_certainty


def draw(count: int, seed: int, *, sharper: float) -> Split:
    """Examples whose classes are drawn from the softmax of logits; the inputs are these logits, times `sharper`."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 3, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return Split(sharper * logits, targets)


def test_the_temperature_undoes_what_made_a_model_too_sure() -> None:
    split = draw(20_000, 0, sharper=2.5)
    logits, targets = split.batch(slice(None))

    assert fit_temperature(logits, targets) == pytest.approx(2.5, rel=0.05)
    assert fit_temperature(torch.eye(3)[targets], targets) == pytest.approx(0.05, rel=0.1), "as sure as it may be"


@pytest.mark.parametrize(("coverage", "expected"), [(0.5, 5.0), (0.8, 8.0), (0.9, 9.0), (0.95, math.inf)])
def test_the_quantile_leaves_room_for_the_new_example(coverage: float, expected: float) -> None:
    scores = torch.tensor([3.0, 1.0, 9.0, 2.0, 7.0, 5.0, 8.0, 4.0, 6.0])  # nine: ceil(10 * coverage)

    assert conformal_quantile(scores, coverage) == expected


def test_sets_and_probabilities_are_as_good_on_new_examples_as_they_say() -> None:
    config = TrainConfig(batch_size=256)
    validation, test = draw(4000, 1, sharper=3.0), draw(4000, 2, sharper=3.0)

    known = measure_certainty(nn.Identity(), validation, test, config, of_classes(3))

    before, after = known.calibration_error
    assert before > 0.1
    assert after < 0.03
    for coverage, (share, size) in known.found.items():
        assert share == pytest.approx(coverage, abs=0.025)
        assert 1 <= size <= 3
    assert Certainty.from_dict(known.to_dict()) == known


class _Centre(nn.Module):
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs.squeeze(-1)


def test_intervals_contain_the_share_that_they_say_and_too_few_examples_promise_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4000, 1, generator=generator)
    targets = inputs.squeeze(1) + torch.randn(4000, generator=generator)
    split, other = Split(inputs[:2000], targets[:2000]), Split(inputs[2000:], targets[2000:])

    known = measure_certainty(_Centre(), split, other, TrainConfig(), of_classes(0))

    for coverage, (share, width) in known.found.items():
        assert share == pytest.approx(coverage, abs=0.03)
        assert width == 2 * known.quantiles[coverage]
    assert known.quantiles[0.9] == pytest.approx(1.645, abs=0.1)
    few = measure_certainty(_Centre(), Split(inputs[:9], targets[:9]), other, TrainConfig(), of_classes(0))
    assert few.quantiles[0.95] == math.inf
    assert Certainty.from_dict(few.to_dict()) == few


def test_the_winner_of_a_search_knows_how_sure_it_may_be(tmp_path: Path, home: Path) -> None:
    outcome = run_search("digits", home=home, trials=1, epochs=3, workers=1)
    model = hpo.load_best("digits", home=home)
    test = load(tmp_path).test.open()

    known = Certainty.from_dict(outcome.winner.certainty)
    assert model.certainty == known
    sets = model.predict_sets(test.inputs, coverage=0.8)
    classes = [model.classes[target] for target in test.targets.tolist()]
    covered = sum(name in found for name, found in zip(classes, sets, strict=True)) / len(sets)
    assert (covered, sum(map(len, sets)) / len(sets)) == pytest.approx(known.found[0.8])
    assert [found[0] for found in sets] == model.predict(test.inputs), "the most probable first"
    assert model.calibrated(test.inputs).sum(1) == pytest.approx(torch.ones(len(sets)), abs=1e-5)
    assert best_facts("digits", home)["winner"]["certainty"] == outcome.winner.certainty
    with pytest.raises(UsageError, match=r"coverage=0.85 is not allowed: use 0.8, 0.9, 0.95, 0.99"):
        model.predict_sets(test.inputs, coverage=0.85)
    with pytest.raises(UsageError, match="intervals are for a task of the kind regression"):
        model.predict_intervals(test.inputs)


def test_a_model_that_was_not_tested_says_that_it_does_not_know() -> None:
    model = PreprocessedModel(nn.Linear(1, 3), of_classes(3))

    with pytest.raises(UsageError, match="they come with the tested winner of a study"):
        model.predict_sets(torch.zeros(2, 1))
