"""How sure a model may be: calibrated probabilities, sets of classes and intervals that keep their word."""

from __future__ import annotations

import math
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import of_classes
from helpers.homes import copy_database
from hpo.objectives.digits import load
from PIL import Image
from torch import nn

import hpo
from hpo.config import TrainConfig
from hpo.data.examples import SealedSplit, Split
from hpo.data.mapped import MappedImages
from hpo.errors import UsageError
from hpo.models.preprocessed import PreprocessedModel
from hpo.plugins import load_objective
from hpo.records import Certainty, Mistake, SearchOutcome
from hpo.search.storage import read_storage
from hpo.search.study import Study
from hpo.search.winner import find_mistakes, find_winner
from hpo.session.card import model_card
from hpo.session.report import report_page
from hpo.session.search import run_search
from hpo.terminal.facts import best_facts
from hpo.training.certainty import conformal_quantile, fit_temperature, measure_certainty
from hpo.training.evaluation import outputs_and_targets
from hpo.training.mistakes import worst_mistakes


def answers(model: nn.Module, split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    return outputs_and_targets(model, split, TrainConfig(batch_size=256), "classification")


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
    few = torch.eye(3)[targets[:30]] * 6
    assert 0.5 < fit_temperature(few, targets[:30]) < 1, "30 that are all right do not show how sure it may be"


@pytest.mark.parametrize(("coverage", "expected"), [(0.5, 5.0), (0.8, 8.0), (0.9, 9.0), (0.95, math.inf)])
def test_the_quantile_leaves_room_for_the_new_example(coverage: float, expected: float) -> None:
    scores = torch.tensor([3.0, 1.0, 9.0, 2.0, 7.0, 5.0, 8.0, 4.0, 6.0])  # nine: ceil(10 * coverage)

    assert conformal_quantile(scores, coverage) == expected


def test_the_calibration_error_equals_that_of_torchmetrics() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, targets = draw(1_000, 0, sharper=2.5).batch(slice(None))
    logits[0] = torch.tensor([100.0, 0.0, 0.0])  # a confidence of 1
    found = measure_certainty((logits, targets), (logits, targets), is_classified=True).calibration_error
    assert found is not None
    expected = multiclass_calibration_error(logits.softmax(1), targets, num_classes=3, n_bins=15)
    assert found[0] == pytest.approx(float(expected), rel=1e-5)


def test_sets_and_probabilities_are_as_good_on_new_examples_as_they_say() -> None:
    validation, test = draw(4000, 1, sharper=3.0), draw(4000, 2, sharper=3.0)

    known = measure_certainty(answers(nn.Identity(), validation), answers(nn.Identity(), test), is_classified=True)

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

    asked = answers(_Centre(), other)
    known = measure_certainty(answers(_Centre(), split), asked, is_classified=False)

    for coverage, (share, width) in known.found.items():
        assert share == pytest.approx(coverage, abs=0.03)
        assert width == 2 * known.quantiles[coverage]
    assert known.quantiles[0.9] == pytest.approx(1.645, abs=0.1)
    few = measure_certainty(answers(_Centre(), Split(inputs[:9], targets[:9])), asked, is_classified=False)
    assert few.quantiles[0.95] == math.inf
    assert Certainty.from_dict(few.to_dict()) == few


def picture_of(mistake: Mistake) -> Image.Image:
    return Image.open(BytesIO(b64decode(mistake.picture)))


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, mlflow_template: Path) -> SearchOutcome:
    home = tmp_path_factory.mktemp("searched")
    copy_database(mlflow_template, home / "mlflow.db")
    return run_search("digits", home=home, trials=1, epochs=3, workers=1)


def test_the_winner_of_a_search_knows_how_sure_it_may_be(tmp_path: Path, searched: SearchOutcome) -> None:
    outcome, home = searched, searched.home
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


def test_the_report_shows_the_mistakes_it_is_most_sure_of_and_the_card_how_sure_it_may_be(
    searched: SearchOutcome,
) -> None:
    home = searched.home
    images, targets = load(home).test.open().batch(slice(None))
    study = Study.load(read_storage(home, None), "digits")
    winner = find_winner(study)

    mistakes = find_mistakes(study, winner)

    probabilities = [mistake.probability for mistake in mistakes]
    assert probabilities == sorted(probabilities, reverse=True)
    model = hpo.load_best("digits", home=home)
    for mistake in mistakes:
        assert mistake.truth == model.classes[targets[mistake.example]] != mistake.answer
        assert (np.asarray(picture_of(mistake)) == images[mistake.example, 0].numpy()).all()
    page = report_page(study)
    assert page.count('<figure><img src="data:image/png;base64,') == len(mistakes) == 12
    card = model_card(study, load_objective("digits"), winner.trial, winner=winner, kind="classification")
    before, after = winner.certainty["calibration_error"]
    assert f"Expected calibration error on the test split: {before:.4f} before, {after:.4f} after." in card
    assert f"A calibrated model would have {winner.certainty['least_error']:.4f} on a test split of this size." in card
    counts = winner.confusion["counts"]
    assert f"| **3** | {' | '.join(map(str, counts[3]))} |" in card
    assert "were not calibrated" not in card
    later = model_card(study, load_objective("digits"), winner.trial, winner=None, kind="classification")
    assert f"- Test split, as an earlier winner: accuracy {winner.test['accuracy']:.4f}, " in later
    refit = replace(winner, certainty=None)
    limits = {
        kind: model_card(study, load_objective("digits"), winner.trial, winner=refit, kind=kind).partition("## Limits")[
            2
        ]
        for kind in ("classification", "regression", "box")
    }
    assert "they were not calibrated" in limits["classification"]
    assert "it has no intervals" in limits["regression"]
    assert not any("robabilities" in limits[kind] for kind in ("regression", "box"))


def test_mistakes_of_texts_are_texts_and_large_photos_become_small() -> None:
    logits, targets = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 1, 1])
    test = SealedSplit(lambda: Split(logits, targets), 3, lambda rows: [f"text {row}" for row in rows.tolist()])
    photos = torch.zeros(3, 3, 200, 100, dtype=torch.uint8)

    sure, other = worst_mistakes(logits, targets, inputs=logits, test=test, classes=("a", "b"))
    small, _ = worst_mistakes(logits, targets, inputs=photos, test=test, classes=("a", "b"))

    assert (sure.example, sure.truth, sure.answer, sure.text, sure.picture) == (1, "b", "a", "text 1", None)
    assert sure.probability == pytest.approx(1 / (1 + math.exp(-3)))
    assert (other.example, other.truth, other.answer) == (0, "a", "b")
    assert picture_of(small).size == (32, 64)
    strips = photos[:, :, :2].repeat(1, 1, 1, 20)
    narrow, _ = worst_mistakes(logits, targets, inputs=strips, test=test, classes=("a", "b"))
    assert picture_of(narrow).size == (64, 1)


def test_photos_that_stay_in_a_file_become_pictures_too(tmp_path: Path) -> None:
    (tmp_path / "photos").write_bytes(bytes(range(4 * 3 * 2 * 2)))
    photos = MappedImages(tmp_path / "photos", 4, (3, 2, 2), torch.tensor([3, 1]))
    test = SealedSplit(lambda: Split(photos, None), 2)

    (mistake,) = worst_mistakes(torch.eye(2), torch.tensor([0, 0]), inputs=photos, test=test, classes=("a", "b"))

    assert np.asarray(picture_of(mistake))[0, 0].tolist() == [12, 16, 20]


def test_a_model_that_was_not_tested_says_that_it_does_not_know() -> None:
    model = PreprocessedModel(nn.Linear(1, 3), of_classes(3))

    with pytest.raises(UsageError, match="they come with the tested winner of a study"):
        model.predict_sets(torch.zeros(2, 1))
