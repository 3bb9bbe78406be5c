"""Metrics of targets that are classes: one, several labels, or shares of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


class ConfusionMetrics:
    """Accuracy, and the averages of precision, recall and F1 over the classes, from a confusion matrix.

    Macro averages count every class alike, weighted ones by its examples. Weighted recall is accuracy.
    """

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self._num_classes = num_classes
        self._counts = torch.zeros(num_classes**2, dtype=torch.float64, device=device)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in logits (B, num_classes) and class indices (B,), or the shares (B, num_classes) of mixed examples:
        each is counted in the row of every class that it has a share of, by that share."""
        predicted = outputs.argmax(1)
        # Not bincount: on a GPU it waits for the largest index, on a CPU it takes twice as long.
        if targets.is_floating_point():
            self._counts.view(self._num_classes, -1).index_add_(1, predicted, targets.T.double())
        else:
            cells = targets * self._num_classes + predicted
            self._counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._counts = total(self._counts)

    @property
    def confusion(self) -> Tensor:
        """Examples (num_classes, num_classes) by target and prediction."""
        return self._counts.view(self._num_classes, self._num_classes)

    def compute(self) -> dict[str, Tensor]:
        """A class that is neither a target nor predicted is left out of the averages; 0 / 0 is 0 for the others."""
        confusion = self.confusion
        correct, actual, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        num_classes_seen = (actual + predicted > 0).sum()
        precision = (correct / predicted).nan_to_num()
        f1 = (2 * correct / (actual + predicted)).nan_to_num()
        weights = actual / actual.sum()
        return {
            "accuracy": correct.sum() / confusion.sum(),
            "precision": precision.sum() / num_classes_seen,
            "recall": (correct / actual).nan_to_num().sum() / num_classes_seen,
            "f1": f1.sum() / num_classes_seen,
            "precision_weighted": (weights * precision).sum(),
            "f1_weighted": (weights * f1).sum(),
        }


def auroc(outputs: Tensor, targets: Tensor) -> Tensor:
    """Area under the ROC curve of each class's share against all other classes, the mean over the classes; a scalar.

    `outputs` are logits (N, num_classes). A class that none or all of the examples have is left out; NaN where none is
    left.
    """
    shares = outputs.double().log_softmax(1).T  # in logarithms, so that sure answers do not become equal
    is_positive = targets == torch.arange(len(shares), device=targets.device)[:, None]
    num_at_once = max(1, 2**20 // len(targets))  # so that thousands of classes need no more memory than one
    parts = zip(torch.split(shares, num_at_once), torch.split(is_positive, num_at_once), strict=True)
    return torch.cat([_areas(*part) for part in parts]).nanmean()


def _areas(scores: Tensor, is_positive: Tensor) -> Tensor:
    """How often a positive's score is above a negative's, by class (C, N); (C,).

    Exact: from ranks, equal scores sharing the mean of theirs (Hanley and McNeil 1982,
    https://doi.org/10.1148/radiology.143.1.7063747).
    """
    ordered, order = scores.sort(dim=1)
    positions = torch.arange(1, scores.shape[1] + 1, device=scores.device)
    is_first = ordered != ordered.roll(1, dims=1)  # of a run of equal scores
    is_first[:, 0] = True
    is_last = is_first.roll(-1, dims=1)
    first = torch.where(is_first, positions, 0).cummax(1).values
    last = torch.where(is_last, positions, len(positions)).flip(1).cummin(1).values.flip(1)
    ranks = (first + last).double() / 2
    num_positive, num_negative = is_positive.sum(1), (~is_positive).sum(1)
    positive_ranks = (ranks * is_positive.gather(1, order)).sum(1)
    return (positive_ranks - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


class OfAll:
    """What is computed from the outputs and targets of all examples together."""

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in those of a batch, (B, ...) and (B, ...)."""
        self._all.append((outputs, targets))

    def together(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets of all batches so far, (N, ...) and (N, ...)."""
        outputs, targets = zip(*self._all, strict=True)
        return torch.cat(outputs), torch.cat(targets)


class AreaUnderCurve(OfAll):
    """The `auroc` of all examples together."""

    def compute(self) -> dict[str, Tensor]:
        return {"auroc": auroc(*self.together())}


class ShareMetrics:
    """Mean Kullback-Leibler divergence from the shares that are wanted, and how often both have the same largest."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._num_examples = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in logits and shares, both (B, num_classes)."""
        shares = targets.double()
        divergence = torch.xlogy(shares, shares) - shares * outputs.double().log_softmax(1)
        self._sums += torch.stack((divergence.sum(), (outputs.argmax(1) == targets.argmax(1)).sum()))
        self._num_examples += len(targets)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._sums = total(self._sums)
        self._num_examples = int(total(torch.tensor(self._num_examples)))

    def compute(self) -> dict[str, Tensor]:
        divergence, right = self._sums / self._num_examples
        return {"kl_divergence": divergence, "accuracy": right}


class LabelMetrics:
    """Macro averages over the labels, accuracy of all answers, and the share of examples with all labels right.

    A label that no example has and none is given is left out of the averages.
    """

    def __init__(self, num_classes: int, device: torch.device | str, thresholds: Tensor | None = None) -> None:
        self._thresholds = torch.zeros(num_classes, device=device) if thresholds is None else thresholds
        # By label: has it and was given it, has it, was given it.
        self._counts = torch.zeros(3, num_classes, dtype=torch.float64, device=device)
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # right answers, examples all right
        self._num_examples = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in logits and labels of 0 or 1, both (B, num_classes)."""
        given, has = outputs > self._thresholds, targets > 0.5
        self._counts += torch.stack((given & has, has, given)).sum(1)
        is_right = given == has
        self._sums += torch.stack((is_right.sum(), is_right.all(1).sum()))
        self._num_examples += len(targets)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._counts, self._sums = total(self._counts), total(self._sums)
        self._num_examples = int(total(torch.tensor(self._num_examples)))

    def compute(self) -> dict[str, Tensor]:
        correct, actual, given = self._counts
        num_seen = (actual + given > 0).sum()
        right, all_right = self._sums
        return {
            "f1": (2 * correct / (actual + given)).nan_to_num().sum() / num_seen,
            "precision": (correct / given).nan_to_num().sum() / num_seen,
            "recall": (correct / actual).nan_to_num().sum() / num_seen,
            "accuracy": right / (self._num_examples * actual.numel()),
            "exact_match": all_right / self._num_examples,
        }


class TunedLabelMetrics(OfAll):
    """Those of `LabelMetrics`, with the thresholds that are the best for these examples."""

    def compute(self) -> dict[str, Tensor]:
        outputs, targets = self.together()
        metrics = LabelMetrics(outputs.shape[1], outputs.device, best_thresholds(outputs, targets))
        metrics.update(outputs, targets)
        return metrics.compute()


def best_thresholds(outputs: Tensor, targets: Tensor) -> Tensor:
    """For each label the logit from which on it is to be given, so that its F1 on these examples is highest.

    Logits and labels are (N, num_classes). It is in the middle between the last output that is above it and the next;
    0 for a label that no example has.
    """
    scores, order = outputs.double().sort(dim=0, descending=True)
    has = (targets > 0.5).gather(0, order).double()
    num_given = torch.arange(1, len(has) + 1, device=has.device)[:, None]
    f1 = 2 * has.cumsum(0) / (num_given + has.sum(0))
    f1[:-1] = f1[:-1].where(scores[:-1] > scores[1:], -1.0)  # equal outputs are given the label together
    best = f1.argmax(0, keepdim=True)
    following = scores.gather(0, (best + 1).clamp(max=len(has) - 1))
    chosen = (scores.gather(0, best) + following)[0] / 2
    chosen = torch.where(best[0] == len(has) - 1, scores[-1] - 1, chosen)
    return torch.where(has.sum(0) > 0, chosen, 0.0).to(outputs.dtype)


class AveragePrecision(OfAll):
    """The mean over the labels of the average precision, from all outputs at once; labels without an example are left
    out. Equal outputs are given a label together, as in torchmetrics."""

    def compute(self) -> dict[str, Tensor]:
        outputs, targets = self.together()
        scores, order = outputs.double().sort(dim=0, descending=True)
        has = (targets > 0.5).gather(0, order).double()
        precision = has.cumsum(0) / torch.arange(1, len(has) + 1, device=has.device)[:, None]
        # Of equal outputs each counts with the precision that all of them together have, which is that of the last one.
        ends_run = torch.ones_like(has, dtype=torch.bool)
        ends_run[:-1] = scores[:-1] != scores[1:]
        rows = torch.arange(len(has), device=has.device)[:, None].expand_as(has)
        last = rows.where(ends_run, len(has)).flip(0).cummin(0).values.flip(0)
        return {"average_precision": ((precision.gather(0, last) * has).sum(0) / has.sum(0)).nanmean()}
