"""How sure a model may be: a temperature for its probabilities, and sets or intervals with a stated coverage.

Both follow from the validation split, which the training has not seen, and are judged on the test split. A model that
was trained on all examples has none.
"""

from __future__ import annotations

import math
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from hpo.models.preprocessed import in_sets
from hpo.records import COVERAGES, Certainty

if TYPE_CHECKING:
    from hpo.data.examples import DataSpec

_NUM_BINS = 15
"""Of the calibration error, as in Guo et al. 2017."""

_RANGE = (0.05, 20.0)
"""Temperatures that are looked at."""

_PRIOR_DEVIATION = 0.5
"""Of the logarithm of a temperature before any example is seen: a few that are all right would have the lowest."""

_NUM_DRAWS = 100
"""Of what a calibrated model would get right."""


def has_certainty(spec: DataSpec) -> bool:
    """Whether targets are of a kind that has one: one class, or one number."""
    return spec.kind == "classification" or (spec.kind == "regression" and not spec.target_shape)


def measure_certainty(
    validation: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, is_classified: bool
) -> Certainty:
    """What outputs and targets of the validation split say of a model's certainty, and what those of the test split
    say of that: logits (N, classes) and classes (N,), or numbers (N,) both."""
    return (_of_classes if is_classified else _of_numbers)(*validation, *test)


def fit_temperature(logits: Tensor, targets: Tensor) -> float:
    """What logits (N, classes) are divided by so that the cross-entropy is smallest.

    Guo et al. 2017, arXiv:1706.04599, with a normal prior of its logarithm around 0, which many examples outweigh.
    Found by golden-section search.
    """
    logits = logits.double()

    def loss(log_temperature: float) -> float:
        likelihood = float(cross_entropy(logits / math.exp(log_temperature), targets, reduction="sum"))
        return likelihood + log_temperature**2 / (2 * _PRIOR_DEVIATION**2)

    low, high = map(math.log, _RANGE)
    ratio = (math.sqrt(5) - 1) / 2
    while high - low > 1e-3:
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return math.exp((low + high) / 2)


def conformal_quantile(scores: Tensor, coverage: float) -> float:
    """The score (of N examples, larger is stranger) that a new example stays below with probability `coverage`.

    It is the ceil((N + 1) coverage)-th smallest (Vovk et al. 2005); infinite where there are too few examples.
    """
    rank = math.ceil((len(scores) + 1) * coverage)
    return float(scores.double().sort().values[rank - 1]) if rank <= len(scores) else math.inf


def _of_classes(logits: Tensor, targets: Tensor, test_logits: Tensor, test_targets: Tensor) -> Certainty:
    temperature = fit_temperature(logits, targets)
    # Least ambiguous sets: a class belongs if its probability reaches a threshold; see PreprocessedModel.predict_sets.
    of_target = (logits / temperature).softmax(1).gather(1, targets[:, None]).squeeze(1)
    quantiles = {coverage: conformal_quantile(1 - of_target, coverage) for coverage in COVERAGES}
    test = (test_logits / temperature).softmax(1)
    found = {}
    for coverage, quantile in quantiles.items():
        sets = in_sets(test, quantile)
        covered = sets.gather(1, test_targets[:, None])
        found[coverage] = float(covered.double().mean()), float(sets.sum(1).double().mean())
    before, after = (_calibration_error(each, test_targets) for each in (test_logits.softmax(1), test))
    return Certainty(
        temperature=temperature,
        calibration_error=(before, after),
        least_error=_error_if_calibrated(test),
        quantiles=quantiles,
        found=found,
    )


def _error_if_calibrated(probabilities: Tensor) -> float:
    """The mean calibration error of these probabilities (N, classes) if they are right; of few examples it is not 0."""
    confidence = probabilities.double().max(1).values.cpu()
    draw = torch.Generator().manual_seed(0)
    drawn = (torch.rand(len(confidence), generator=draw, dtype=torch.float64) < confidence for _ in range(_NUM_DRAWS))
    return fmean(_binned_error(confidence, is_right) for is_right in drawn)


def _calibration_error(probabilities: Tensor, targets: Tensor) -> float:
    """The expected calibration error: how far confidence and accuracy are apart, over bins of confidence.

    It equals torchmetrics', whose import alone takes longer than a short training.
    """
    confidence, predicted = probabilities.double().max(1)
    return _binned_error(confidence, predicted == targets)


def _binned_error(confidence: Tensor, is_right: Tensor) -> float:
    bins = (confidence * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    excess = confidence - is_right.double()
    return float(excess.new_zeros(_NUM_BINS).index_add(0, bins, excess).abs().sum() / len(confidence))


def _of_numbers(values: Tensor, targets: Tensor, test_values: Tensor, test_targets: Tensor) -> Certainty:
    # Intervals of one width around the prediction (Lei et al. 2018, arXiv:1604.04173).
    errors, test_errors = (values - targets).abs(), (test_values - test_targets).abs()
    quantiles = {coverage: conformal_quantile(errors, coverage) for coverage in COVERAGES}
    found = {
        coverage: (float((test_errors <= quantile).double().mean()), 2 * quantile)
        for coverage, quantile in quantiles.items()
    }
    return Certainty(temperature=None, calibration_error=None, quantiles=quantiles, found=found)
