"""Metrics of an epoch, accumulated on the device without a sync and read together at its end.

They equal torchmetrics' (precision, recall and F1 are macro averages unless their name says weighted) at a fraction of
its cost a step: on one core of a CPU, 10 classes, torch 2.15, a batch of 32 takes 13 us against 53 us.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from hpo.config import SEVERAL
from hpo.data.kinds import IGNORED, read_greedily
from hpo.data.parts import Padded, tensors_of, values_and_lengths
from hpo.errors import UnknownNameError, UsageError
from hpo.objective import NOTHING_OWN
from hpo.training.embeddings import RetrievalMetrics
from hpo.training.losses import iou_of_pairs, outputs_by_position

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.data.examples import DataSpec
    from hpo.objective import Own


HELD_EXAMPLES = 2048
"""Examples whose outputs are held until they are counted: as many as an evaluation has in a batch."""

METRICS_OF_KIND = {
    "classification": ("accuracy", "precision", "recall", "f1", "precision_weighted", "f1_weighted", "auroc"),
    "soft_labels": ("kl_divergence", "accuracy"),
    "multilabel": ("f1", "precision", "recall", "accuracy", "exact_match", "average_precision"),
    "regression": ("mse", "rmse", "mae", "r2"),
    "segmentation": ("mean_iou", "dice", "accuracy"),
    "box": ("mean_iou", "mae"),
    "tagging": ("accuracy", "perplexity"),
    "transcription": ("character_error_rate", "exact_match"),
    "embedding": ("recall_at_1", "recall_at_5"),
    "instances": ("recall_at_1", "recall_at_5"),
    "reconstruction": ("mse", "rmse", "mae"),
    "own": (),
}
"""The metrics of each kind of target; the loss, and metrics of a task's own, go with any."""


NEED_ALL = ("auroc", "average_precision", "character_error_rate", "exact_match", "recall_at_1", "recall_at_5")
"""Those that come with complete metrics alone; see `EpochMetrics`."""


def check_metric(name: str, spec: DataSpec, own: Own = NOTHING_OWN) -> None:
    """Raise UnknownNameError for a metric that the data do not have."""
    of_targets = [f"{target}/{each}" for target, of in spec.targets.items() for each in METRICS_OF_KIND[of.kind]]
    available = ["loss", *METRICS_OF_KIND.get(spec.kind, ()), *of_targets, *own.metrics]
    if name not in available:
        raise UnknownNameError(f"{spec.kind} metric", name, available)


class EpochMetrics:
    """Mean loss over the examples of an epoch and the metrics of the task.

    What needs all outputs at once, or is the task's own, comes with `is_complete` alone: of a training epoch, whose
    weights change from step to step, it would say little. Small batches are held and taken in together, unless
    `holds_batches` is False, as it must be if the next batch's outputs are written to the same memory.
    """

    def __init__(
        self,
        spec: DataSpec,
        device: torch.device | str,
        *,
        own: Own = NOTHING_OWN,
        is_complete: bool = False,
        holds_batches: bool = True,
        thresholds: Tensor | None = None,
    ) -> None:
        """`thresholds` (num_classes,) are the logits from which on an example has each of several labels."""
        self._metrics = _build_metrics(spec, device, thresholds, is_complete=is_complete)
        self._own = {name: _on_device(make(), device) for name, make in own.metrics.items()} if is_complete else {}
        self._holds_batches = holds_batches
        self._held: list[tuple[Any, Any, Tensor]] = []
        self._held_size = 0  # examples in each of them
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._num_examples = 0

    def update(self, outputs: Any, targets: Any, loss: Tensor) -> None:
        """Take in a batch; `loss` is its mean."""
        size = len(tensors_of(targets)[0])
        if size != self._held_size:
            self._take_in()
            self._held_size = size
        self._held.append((outputs, targets, loss))
        is_small = isinstance(outputs, torch.Tensor) and isinstance(targets, torch.Tensor) and outputs.ndim <= 2
        if not (self._holds_batches and is_small) or len(self._held) * size >= HELD_EXAMPLES:
            self._take_in()

    @torch.inference_mode()  # an evaluation's sums can be changed in this mode alone
    def _take_in(self) -> None:
        """Add up the batches that are held, which have the same size."""
        if not self._held:
            return
        outputs, targets, losses = zip(*self._held, strict=True)
        self._held = []
        num_examples = len(losses) * self._held_size
        together = (torch.cat(outputs), torch.cat(targets)) if len(losses) > 1 else (outputs[0], targets[0])
        for metric in (*self._metrics, *self._own.values()):
            metric.update(*together)
        # Batches may differ in size, so the mean of their means is not the mean.
        self._loss_sum += torch.stack(losses).double().sum() * self._held_size
        self._num_examples += num_examples

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Take in what other processes have counted: `total` gives the sum of a tensor over all of them.

        It is for metrics that are not complete.
        """
        self._take_in()
        for metric in self._metrics:
            assert isinstance(metric, _Sums), "metrics that need all outputs are not counted in parts"
            metric.add_up(total)
        self._loss_sum = total(self._loss_sum)
        self._num_examples = int(total(torch.tensor(self._num_examples)))

    def compute(self) -> dict[str, Tensor]:
        """Scalars on the device, by name. A loss that was not finite in any batch leaves `loss` not finite."""
        self._take_in()
        metrics = {"loss": self._loss_sum / self._num_examples}
        for metric in self._metrics:
            metrics |= metric.compute()
        for name, own in self._own.items():
            metrics[name] = _as_scalar(name, own.compute(), self._loss_sum.device)
        return metrics

    @property
    def confusion(self) -> Tensor | None:
        """Examples (num_classes, num_classes) by target and prediction; None unless it is a classification."""
        self._take_in()
        return next((each.confusion for each in self._metrics if type(each) is ConfusionMetrics), None)


class _Metrics(Protocol):
    def update(self, outputs: Any, targets: Any) -> None: ...
    def compute(self) -> dict[str, Tensor]: ...


@runtime_checkable
class _Sums(Protocol):
    """Metrics that follow from sums over the examples."""

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Put `total` of each sum in its place."""


def _build_metrics(
    spec: DataSpec, device: torch.device | str, thresholds: Tensor | None, *, is_complete: bool
) -> list[_Metrics]:
    if spec.kind == SEVERAL:
        return [
            _OfTarget(name, metric)
            for name in spec.targets
            for metric in _build_metrics(spec.of(name), device, None, is_complete=is_complete)
        ]
    num_classes = len(spec.classes)
    match spec.kind:
        case "classification":
            return [ConfusionMetrics(num_classes, device), *([AreaUnderCurve()] if is_complete else [])]
        case "soft_labels":
            return [ShareMetrics(device)]
        case "embedding" | "instances":
            return [RetrievalMetrics()] if is_complete else []
        case "reconstruction":
            return [ReconstructionMetrics(device)]
        case "multilabel":
            counts = LabelMetrics(num_classes, device, thresholds)
            return [counts, *([AveragePrecision()] if is_complete else [])]
        case "regression":
            return [RegressionMetrics(device)]
        case "segmentation":
            return [MaskMetrics(num_classes, device)]
        case "box":
            return [BoxMetrics(device)]
        case "tagging":
            return [TagMetrics(device)]
        case "transcription":
            return [TranscriptMetrics(device)] if is_complete else []
        case _:
            return []


class _OfTarget:
    """The metrics of one of several targets, by "target/metric"."""

    def __init__(self, name: str, metrics: _Metrics) -> None:
        self._name = name
        self._metrics = metrics

    def update(self, outputs: Any, targets: Any) -> None:
        self._metrics.update(outputs[self._name], targets[self._name])

    def compute(self) -> dict[str, Tensor]:
        return {f"{self._name}/{metric}": value for metric, value in self._metrics.compute().items()}


def _on_device(metric: Any, device: torch.device | str) -> Any:
    return metric.to(device) if hasattr(metric, "to") else metric


def _as_scalar(name: str, value: Any, device: torch.device) -> Tensor:
    tensor = torch.as_tensor(value, device=device)
    if tensor.numel() != 1:
        raise UsageError(f"the metric {name} must give one number, but gives the shape {tuple(tensor.shape)}.")
    return tensor.reshape(())


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


class AreaUnderCurve:
    """The `auroc` of all examples together."""

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._all.append((outputs, targets))

    def compute(self) -> dict[str, Tensor]:
        outputs, targets = (torch.cat(part) for part in zip(*self._all, strict=True))
        return {"auroc": auroc(outputs, targets)}


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


class AveragePrecision:
    """The mean over the labels of the average precision, from all outputs at once; labels without an example are left
    out. It equals torchmetrics' where no two outputs are equal."""

    def __init__(self) -> None:
        self._all: list[tuple[Tensor, Tensor]] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self._all.append((outputs, targets))

    def compute(self) -> dict[str, Tensor]:
        outputs, targets = (torch.cat(part) for part in zip(*self._all, strict=True))
        order = outputs.double().argsort(dim=0, descending=True)
        has = (targets > 0.5).gather(0, order).double()
        precision = has.cumsum(0) / torch.arange(1, len(has) + 1, device=has.device)[:, None]
        return {"average_precision": ((precision * has).sum(0) / has.sum(0)).nanmean()}


class MaskMetrics:
    """Mean intersection over union and Dice coefficient over the classes, and the accuracy of pixels, from a confusion
    matrix of all pixels. A class that is in no mask, neither given nor wanted, is left out."""

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self._num_classes = num_classes
        self._counts = torch.zeros(num_classes**2 + 1, dtype=torch.float64, device=device)  # the last for IGNORED

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in logits (B, num_classes, H, W) and masks (B, H, W)."""
        logits, labels = outputs_by_position(outputs, targets)
        cells = labels * self._num_classes + logits.argmax(-1)
        cells = torch.where(labels == IGNORED, self._num_classes**2, cells).flatten()
        self._counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.float64))

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._counts = total(self._counts)

    def compute(self) -> dict[str, Tensor]:
        confusion = self._counts[:-1].view(self._num_classes, self._num_classes)
        correct, actual, given = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
        num_seen = (actual + given > 0).sum()
        return {
            "mean_iou": (correct / (actual + given - correct)).nan_to_num().sum() / num_seen,
            "dice": (2 * correct / (actual + given)).nan_to_num().sum() / num_seen,
            "accuracy": correct.sum() / confusion.sum(),
        }


class BoxMetrics:
    """Mean intersection over union, and mean absolute error of the four numbers in pixels."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._num_examples = 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in boxes (B, 4), x1 y1 x2 y2."""
        errors = (outputs - targets).abs().double().mean(1)
        self._sums += torch.stack((iou_of_pairs(outputs, targets).double().sum(), errors.sum()))
        self._num_examples += len(targets)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._sums = total(self._sums)
        self._num_examples = int(total(torch.tensor(self._num_examples)))

    def compute(self) -> dict[str, Tensor]:
        mean_iou, mae = self._sums / self._num_examples
        return {"mean_iou": mean_iou, "mae": mae}


class TagMetrics:
    """Accuracy of elements, and perplexity: e to the mean cross-entropy of an element, without label smoothing."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # right, cross-entropy, elements

    def update(self, outputs: Any, targets: Any) -> None:
        """Take in logits (B, L, num_classes) and labels (B, L)."""
        logits, labels = outputs_by_position(outputs, targets)
        is_counted = labels != IGNORED
        surprise = -logits.float().log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        surprise = torch.where(is_counted, surprise, 0.0).double().sum()
        self._sums += torch.stack(((logits.argmax(-1) == labels).sum(), surprise, is_counted.sum()))

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._sums = total(self._sums)

    def compute(self) -> dict[str, Tensor]:
        right, surprise, num_elements = self._sums
        return {"accuracy": right / num_elements, "perplexity": (surprise / num_elements).exp()}


class TranscriptMetrics:
    """Character error rate (edits to get from what was read to what is written, per class written), and the share of
    transcriptions without an error. Read greedily, and compared on the CPU at the epoch's end."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._all: list[tuple[Tensor, Tensor | None, Padded]] = []

    def update(self, outputs: Any, targets: Padded) -> None:
        """Take in logits (B, T, num_classes + 1), or Padded of them, and the classes written."""
        logits, lengths = values_and_lengths(outputs)
        self._blank = logits.shape[-1] - 1
        self._all.append((logits.argmax(-1), lengths, targets))

    def compute(self) -> dict[str, Tensor]:
        from torchmetrics.functional.text import char_error_rate

        read = [text for best, lengths, _ in self._all for text in read_greedily(best, lengths, self._blank)]
        written = [
            row[:length]
            for *_, targets in self._all
            for row, length in zip(targets.values.tolist(), targets.lengths.tolist(), strict=True)
        ]
        texts, wanted = (["".join(map(chr, row)) for row in rows] for rows in (read, written))
        exact = sum(map(operator.eq, texts, wanted)) / len(wanted)
        rate = char_error_rate(texts, wanted)
        return {"character_error_rate": rate.to(self._device), "exact_match": torch.tensor(exact, device=self._device)}


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


class ReconstructionMetrics:
    """MSE, RMSE and MAE of all values of the inputs, in their units."""

    def __init__(self, device: torch.device | str) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._num_values = 0

    def update(self, outputs: Any, targets: Tensor) -> None:
        """Take in outputs, of several tensors the first, and the inputs (B, ...)."""
        error = tensors_of(outputs)[0].detach().reshape(targets.shape).double() - targets
        self._sums += torch.stack((error.square().sum(), error.abs().sum()))
        self._num_values += targets.numel()

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        self._sums = total(self._sums)
        self._num_values = int(total(torch.tensor(self._num_values)))

    def compute(self) -> dict[str, Tensor]:
        mse, mae = self._sums / self._num_values
        return {"mse": mse, "rmse": mse.sqrt(), "mae": mae}


class RegressionMetrics:
    """MSE, RMSE, MAE and R2 in the target's units, from sums in float64; of several values the means over them.

    Targets are summed as differences to the first one, so that R2 keeps its digits where the mean is large
    beside the deviation.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._sums: Tensor | None = None  # (4,) or (4, values)
        self._num_examples = 0
        self._shift: Tensor | None = None

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Take in outputs (B,) or (B, 1) and targets (B,), or both (B, values)."""
        targets = targets.double()
        if self._sums is None or self._shift is None:
            self._shift = targets[0]
            self._sums = torch.zeros(4, *targets.shape[1:], dtype=torch.float64, device=self._device)
        error = outputs.detach().reshape(targets.shape).double() - targets
        shifted = targets - self._shift
        sums = [error.abs().sum(0), error.square().sum(0), shifted.sum(0), shifted.square().sum(0)]
        self._sums += torch.stack(sums)
        self._num_examples += len(targets)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        assert self._sums is not None, "there are examples"
        assert self._shift is not None, "there are examples"
        num_all = int(total(torch.tensor(self._num_examples)))
        common = total(self._shift * (self._num_examples / num_all))
        # Each process has differences to a target of its own.
        change = self._shift - common
        absolute, squared, shifted, shifted_squared = self._sums
        shifted_squared = shifted_squared + 2 * change * shifted + self._num_examples * change.square()
        shifted = shifted + self._num_examples * change
        self._sums = total(torch.stack((absolute, squared, shifted, shifted_squared)))
        self._shift, self._num_examples = common, num_all

    def compute(self) -> dict[str, Tensor]:
        """R2 of targets that are all equal is 1 where every prediction is exact and 0 otherwise."""
        assert self._sums is not None, "there are examples"
        absolute, squared, shifted, shifted_squared = self._sums
        mse = squared / self._num_examples
        total = shifted_squared - shifted.square() / self._num_examples
        r2 = torch.where(total > 0, 1 - squared / total, (squared == 0).double())
        metrics = {"mse": mse, "rmse": mse.sqrt(), "mae": absolute / self._num_examples, "r2": r2}
        return {name: value.mean() for name, value in metrics.items()}
