"""Two trained models compared on the same examples: the difference of a metric, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import torch

from hpo.data.batches import evaluation_batch_size, evaluation_batches
from hpo.training.device import in_fitting_batches
from hpo.training.losses import loss_function
from hpo.training.metrics import EpochMetrics
from hpo.training.precision import has_convolutions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.config import TrainConfig
    from hpo.data.examples import Split

NUM_RESAMPLES = 1000
"""Of the bootstrap: enough for the ends of a 95 % interval (Efron and Tibshirani, 1993, section 14)."""

_Z = 1.96
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True)
class Difference:
    """A metric of one model less that of another, with its 95 % interval."""

    value: float
    low: float
    high: float


def compare_models(
    one: tuple[nn.Module, TrainConfig],
    other: tuple[nn.Module, TrainConfig],
    split: Split,
    *,
    num_classes: int,
    target_scale: float,
    seed: int,
) -> Difference:
    """The metric of `one` less that of `other` on a split, as one's config names it; each model with its own config.

    The examples are paired: both models judge the same ones. For accuracy the interval is the normal one of the mean
    difference between paired answers (McNemar, 1947). For any other metric it is that of a percentile bootstrap over
    the examples, which draws the same ones for both. `num_classes` is 0 for a regression; `target_scale` is that of the
    training split, as in `trainer.evaluate`.
    """
    metric = one[1].metric
    first, second = (
        _Judged.by(model, config, split, num_classes, target_scale, metric) for model, config in (one, other)
    )
    if metric == "accuracy":
        return _difference_of_answers(first, second)
    draw = torch.Generator().manual_seed(seed)
    count = len(first.targets)
    differences = []
    for _ in range(NUM_RESAMPLES):
        rows = torch.randint(count, (count,), generator=draw).to(first.targets.device)
        differences.append(first.value(rows) - second.value(rows))
    # A metric that some resample does not have, as auroc of one class, says nothing there.
    spread = torch.tensor([value for value in differences if math.isfinite(value)], dtype=torch.float64)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = torch.quantile(spread, ends).tolist() if len(spread) else (-math.inf, math.inf)
    return Difference(first.value() - second.value(), low, high)


def compare_folds(one: Sequence[float], other: Sequence[float]) -> Difference:
    """The mean of `one` less that of `other` over the same folds, at least two, with a 95 % interval.

    Student's, with the variance enlarged because the folds share most of their training examples (Nadeau and Bengio,
    2003, https://doi.org/10.1023/A:1024068626366).
    """
    from scipy.stats import t  # a second, which a study without folds can do without

    differences = [first - second for first, second in zip(one, other, strict=True)]
    count = len(differences)
    error = stdev(differences) * math.sqrt(1 / count + 1 / (count - 1))
    mean, width = fmean(differences), float(t.ppf(0.975, count - 1)) * error
    return Difference(mean, mean - width, mean + width)


@dataclass(frozen=True)
class _Judged:
    """What a model answers to the examples of a split, and how that is measured."""

    outputs: Tensor
    """(N, num_classes) logits, or (N,) values."""

    targets: Tensor
    """(N,)"""

    config: TrainConfig
    num_classes: int
    target_scale: float
    metric: str

    @classmethod
    @torch.inference_mode()
    def by(
        cls, model: nn.Module, config: TrainConfig, split: Split, num_classes: int, target_scale: float, metric: str
    ) -> _Judged:
        model = model.to(config.device).eval()
        convolves_on_cpu = config.device == "cpu" and has_convolutions(model)
        batch_size = evaluation_batch_size(split, config.batch_size, convolves_on_cpu=convolves_on_cpu)

        def attempt(batch_size: int) -> tuple[Tensor, Tensor]:
            batches = evaluation_batches(split, batch_size, config.device)
            outputs, targets = zip(*((model(inputs), targets) for inputs, targets in batches), strict=True)
            return torch.cat(outputs), torch.cat(targets)

        outputs, targets = in_fitting_batches(attempt, batch_size)
        return cls(outputs, targets, config, num_classes, target_scale, metric)

    def value(self, rows: Tensor | None = None) -> float:
        """The metric over all examples, or over some of them by index (repeats count)."""
        outputs, targets = (self.outputs, self.targets) if rows is None else (self.outputs[rows], self.targets[rows])
        metrics = EpochMetrics(self.num_classes, targets.device, with_auroc=self.metric == "auroc")
        loss = loss_function(self.config, self.num_classes, self.target_scale)
        metrics.update(outputs, targets, loss(outputs, targets))
        return float(metrics.compute()[self.metric])


def _difference_of_answers(first: _Judged, second: _Judged) -> Difference:
    """The difference of accuracies: the mean of what each example adds to it, which is 1, 0 or -1."""
    right, right_too = ((each.outputs.argmax(1) == each.targets).double() for each in (first, second))
    gains = right - right_too
    mean = float(gains.mean())
    width = _Z * float(gains.std(correction=0)) / math.sqrt(len(gains))
    return Difference(mean, mean - width, mean + width)
