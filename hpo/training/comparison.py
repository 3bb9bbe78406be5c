"""Two trained models compared on the same examples: the difference of a metric, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

import torch

from hpo.data.parts import map_tensors
from hpo.models.preprocessed import own_of
from hpo.training.embeddings import RetrievalMetrics
from hpo.training.evaluation import outputs_and_targets
from hpo.training.losses import evaluation_loss
from hpo.training.metrics import NEED_ALL, EpochMetrics

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.config import Direction, TrainConfig
    from hpo.data.examples import DataSpec, Split
    from hpo.objective import Own
    from hpo.training.losses import Scale

NUM_RESAMPLES = 1000
"""Of the bootstrap: enough for the ends of a 95% interval (Efron and Tibshirani, 1993, section 14)."""

_Z = 1.96
"""97.5% quantile of the normal distribution."""


@dataclass(frozen=True)
class Difference:
    """A metric of one model less that of another, with its 95% interval."""

    value: float
    low: float
    high: float

    def as_gain(self, direction: Direction) -> Difference:
        """The same, counted so that more is better."""
        value, *ends = (direction.gain(each, over=0.0) for each in (self.value, self.low, self.high))
        return Difference(value, min(ends), max(ends))


@torch.inference_mode()
def metric_of(outputs: Any, targets: Any, config: TrainConfig, spec: DataSpec, target_scale: Scale, own: Own) -> float:
    """The config's metric of outputs that are known already."""
    return _Judged(outputs, targets, config, spec, target_scale, own, config.metric).value()


def compare_models(
    one: tuple[nn.Module, TrainConfig],
    other: tuple[nn.Module, TrainConfig],
    split: Split,
    *,
    spec: DataSpec,
    target_scale: Scale,
    seed: int,
    num_candidates: int = 1,
) -> Difference:
    """The metric of `one` less that of `other` on a split, as one's config names it; each model with its own config.

    The examples are paired: both models judge the same ones. For accuracy, and for the recall of embeddings, the
    interval is that of the mean difference between paired answers (Agresti and Min, 2005). For any other metric it is
    that of a percentile bootstrap over the examples, which draws the same ones for both. If `one` is the best of
    several candidates on this very split, the interval is Bonferroni's, which holds for whichever is the best.
    `target_scale` is that of the training split, as in `hpo.training.evaluation.evaluate`.
    """
    metric = one[1].metric
    first, second = (_Judged.by(model, config, split, spec, target_scale, metric) for model, config in (one, other))
    return _widened(_difference(first, second, len(split), seed), num_candidates)


def compare_outputs(
    one: Any,
    other: Any,
    targets: Any,
    config: TrainConfig,
    *,
    num_examples: int,
    spec: DataSpec,
    target_scale: Scale,
    own: Own,
    seed: int,
    num_candidates: int = 1,
) -> Difference:
    """As `compare_models`, of outputs for the same `targets` that are known already."""
    first, second = (
        _Judged(outputs, targets, config, spec, target_scale, own, config.metric) for outputs in (one, other)
    )
    return _widened(_difference(first, second, num_examples, seed), num_candidates)


def _difference(first: _Judged, second: _Judged, num_examples: int, seed: int) -> Difference:
    metric, kind = first.metric, first.spec.kind
    if metric == "accuracy" and kind == "classification":
        right, right_too = ((each.outputs.argmax(1) == each.targets).double() for each in (first, second))
        return _difference_of_answers(right - right_too)
    if metric.startswith("recall_at_"):
        # Drawn again, an example would find its own copy.
        return _difference_of_answers(_hits(first) - _hits(second))
    low, high = _bootstrapped(lambda rows: first.value(rows) - second.value(rows), num_examples, seed)
    return Difference(first.value() - second.value(), low, high)


def score_interval(
    answers: tuple[Any, Any],
    config: TrainConfig,
    *,
    num_examples: int,
    spec: DataSpec,
    target_scale: Scale,
    own: Own,
    thresholds: Tensor | None = None,
    seed: int,
) -> tuple[float, float]:
    """The 95% interval of the config's metric over the examples that `answers`, outputs and targets, belong to.

    `thresholds` (num_classes,) are the logits from which on an example has each of several labels. For accuracy and
    recall at k, which are shares of the examples, it is Wilson's (1927), which holds near 0 and 1 too; for any other
    metric that of a percentile bootstrap. Infinite ends mean that there is none: no resample has the metric, or all
    have the same, as where no example is answered wrongly; or it is the loss of embeddings.
    """
    judged = _Judged(*answers, config, spec, target_scale, own, config.metric, thresholds)
    if config.metric == "accuracy" and spec.kind == "classification":
        return _wilson(judged.value(), num_examples)
    if config.metric.startswith("recall_at_"):
        hits = _hits(judged)
        return _wilson(float(hits.mean()), len(hits)) if len(hits) else (-math.inf, math.inf)
    if config.metric == "loss" and spec.kind in ("embedding", "instances"):
        return -math.inf, math.inf  # it is measured in batches, and over all examples at once it is another
    low, high = _bootstrapped(judged.value, num_examples, seed)
    return (low, high) if low < high else (-math.inf, math.inf)


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Ends of the score interval of a proportion (Wilson, 1927, https://doi.org/10.2307/2276774)."""
    centre = (share + _Z**2 / (2 * count)) / (1 + _Z**2 / count)
    width = _Z / (1 + _Z**2 / count) * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    return centre - width, centre + width


def _bootstrapped(value: Callable[[Tensor], float], count: int, seed: int) -> tuple[float, float]:
    """Ends of the percentile bootstrap of a value over `count` examples, which are drawn by index.

    The percentiles are those of Hesterberg's expanded interval (2015, https://doi.org/10.1080/00031305.2015.1089789,
    section 5.3), as that of a mean of few examples is too narrow otherwise.
    """
    from scipy.stats import norm, t  # a second, which accuracy can do without

    draw = torch.Generator().manual_seed(seed)
    values = [value(torch.randint(count, (count,), generator=draw)) for _ in range(NUM_RESAMPLES)]
    # A metric that some resample does not have, as auroc of one class, says nothing there.
    spread = torch.tensor([each for each in values if math.isfinite(each)], dtype=torch.float64)
    if not len(spread):
        return -math.inf, math.inf
    freedom = max(1, count - 1)
    tail = float(norm.cdf(float(t.ppf(0.025, freedom)) * math.sqrt(1 + 1 / freedom)))
    low, high = torch.quantile(spread, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def compare_folds(
    one: Mapping[int, float], other: Mapping[int, float], *, num_folds: int, num_candidates: int = 1
) -> Difference | None:
    """The mean of `one` less that of `other`, values by fold, over the folds of both, with a 95% interval.

    None if they have fewer than two folds in common. The interval is Student's, with the variance enlarged because the
    `num_folds` folds that the examples were divided into share most of their training examples (Nadeau and Bengio,
    2003, https://doi.org/10.1023/A:1024068626366). `num_candidates` are those of `compare_models`.
    """
    from scipy.stats import t  # a second, which a study without folds can do without

    differences = [one[fold] - other[fold] for fold in common_folds(one, other)]
    count = len(differences)
    if count < 2:
        return None
    error = stdev(differences) * math.sqrt(1 / count + 1 / (num_folds - 1))
    mean, width = fmean(differences), float(t.ppf(0.975, count - 1)) * error
    return _widened(Difference(mean, mean - width, mean + width), num_candidates)


def _widened(found: Difference, num_candidates: int) -> Difference:
    """With an interval that holds for whichever of several candidates is the best (Bonferroni, of a normal spread)."""
    from scipy.stats import norm  # a second, which accuracy can do without

    if num_candidates == 1:
        return found
    factor = float(norm.ppf(1 - 0.025 / num_candidates)) / _Z
    low, high = (found.value + factor * (end - found.value) for end in (found.low, found.high))
    return Difference(found.value, low, high)


def common_folds(one: Mapping[int, float], other: Mapping[int, float]) -> list[int]:
    """The folds that both have a value of."""
    return sorted(one.keys() & other.keys())


@dataclass(frozen=True)
class _Judged:
    """What a model answers to the examples of a split, and how that is measured."""

    outputs: Any
    targets: Any
    config: TrainConfig
    spec: DataSpec
    target_scale: Scale
    own: Own
    metric: str
    thresholds: Tensor | None = None
    """Of several labels; 0 if they are None."""

    @classmethod
    def by(
        cls,
        model: nn.Module,
        config: TrainConfig,
        split: Split,
        spec: DataSpec,
        target_scale: Scale,
        metric: str,
    ) -> _Judged:
        outputs, targets = outputs_and_targets(model, split, config, spec.kind)
        return cls(
            outputs, targets, config, spec, target_scale, own_of(model), metric, getattr(model, "thresholds", None)
        )

    @torch.inference_mode()
    def value(self, rows: Tensor | None = None) -> float:
        """The metric over all examples, or over some of them by index (repeats count)."""
        outputs, targets = self.outputs, self.targets
        if rows is not None:
            rows = self._rows_of_outputs(rows)
            outputs, targets = map_tensors(lambda tensor: tensor[rows.to(tensor.device)], (outputs, targets))
        needs_all = self.metric in self.own.metrics or self.metric.rpartition("/")[2] in NEED_ALL
        metrics = EpochMetrics(
            self.spec, self.config.device, own=self.own, is_complete=needs_all, thresholds=self.thresholds
        )
        loss = torch.zeros((), device=self.config.device)
        if self.metric == "loss":
            loss = evaluation_loss(self.config, self.spec, self.target_scale, self.own)(outputs, targets)
        metrics.update(outputs, targets, loss)
        return float(metrics.compute()[self.metric])

    def _rows_of_outputs(self, rows: Tensor) -> Tensor:
        """Where the outputs for these examples are. Among embeddings a copy would be alike to itself, so each is there
        once, which makes the interval wider."""
        if self.spec.kind not in ("embedding", "instances"):
            return rows
        once = torch.tensor(sorted(set(rows.tolist())))
        return once if self.spec.kind == "embedding" else torch.stack((2 * once, 2 * once + 1), dim=1).flatten()


def _hits(judged: _Judged) -> Tensor:
    """Whether each example that counts finds one that is alike, among all."""
    metrics = RetrievalMetrics()
    metrics.update(judged.outputs, judged.targets)
    counts, *found = metrics.hits()
    hits: Tensor = found[1] if judged.metric == "recall_at_5" else found[0]
    chosen: Tensor = hits[counts]
    return chosen.double()


def _difference_of_answers(gains: Tensor) -> Difference:
    """The mean of what each example adds to the difference, which is 1, 0 or -1.

    The interval is Wald's with half an example more for each of the four outcomes of a pair (Agresti and Min, 2005,
    https://doi.org/10.1002/sim.1781), which keeps its promise where the models differ on few examples.
    """
    count, won, lost = len(gains) + 2, float((gains > 0).sum()) + 0.5, float((gains < 0).sum()) + 0.5
    centre = (won - lost) / count
    width = _Z * math.sqrt((won + lost) / count - centre**2) / math.sqrt(count)
    return Difference(float(gains.mean()), centre - width, centre + width)
