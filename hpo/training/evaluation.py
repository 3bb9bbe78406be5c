"""What a model makes of a split: its loss and metrics, its outputs, and the thresholds that follow from them.

No gradients are recorded, but torch's inference mode is not used: what a network keeps of an evaluation, such as a mask
or positions, could not be used in the training that follows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from hpo.data.batches import evaluation_batch_size, evaluation_batches, evaluation_views
from hpo.data.parts import joined
from hpo.models.preprocessed import own_of
from hpo.training.class_metrics import best_thresholds
from hpo.training.device import in_fitting_batches
from hpo.training.distributed import ALONE, Ranks
from hpo.training.losses import evaluation_loss, num_averaged, one_by_one
from hpo.training.metrics import EpochMetrics
from hpo.training.precision import autocast, has_convolutions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.config import TrainConfig
    from hpo.data.examples import DataSpec, Split
    from hpo.objective import Own
    from hpo.training.losses import LossFunction, Scale


def evaluate(
    model: nn.Module, split: Split, config: TrainConfig, spec: DataSpec, *, target_scale: Scale = 1.0
) -> dict[str, float]:
    """Loss and metrics of `model`, left in evaluation mode, on any split of the data that `spec` describes.

    In fp32, as the model is deployed. A loss of numbers is in units of `target_scale`, as in `fit` with
    `losses.target_scale(splits.train, spec)`; all other metrics are in the targets' units.
    """
    return read_all(_measured(model, split, config, spec, target_scale).compute())


def evaluate_classes(
    model: nn.Module, split: Split, config: TrainConfig, spec: DataSpec
) -> tuple[dict[str, float], list[list[int]]]:
    """The same of a classifier, and its confusion matrix: a row for each class, a column for what it is taken for."""
    metrics = _measured(model, split, config, spec, target_scale=1.0)
    assert metrics.confusion is not None, "there are classes"
    return read_all(metrics.compute()), metrics.confusion.long().tolist()


_AT_ZERO = ("accuracy", "exact_match", "precision", "recall")
"""Metrics of several labels that thresholds of the best F1 would spoil."""


def has_thresholds(spec: DataSpec, config: TrainConfig) -> bool:
    """Whether a model gets thresholds of its own: for several labels, unless the config's metric is better without."""
    return spec.kind == "multilabel" and config.metric not in _AT_ZERO


def choose_thresholds(model: nn.Module, split: Split, config: TrainConfig) -> None:
    """Give a model of several labels the logits from which on an example has each: those of the best F1 on a split.

    It is left in evaluation mode. Raises DeviceMemoryError as `fit` does.
    """
    outputs, targets = outputs_and_targets(model, split, config, "multilabel")
    model.get_buffer("thresholds").copy_(best_thresholds(outputs, targets))


def _measured(model: nn.Module, split: Split, config: TrainConfig, spec: DataSpec, target_scale: Scale) -> EpochMetrics:
    model, own = model.to(config.device), own_of(model)
    loss = evaluation_loss(config, spec, target_scale, own)
    return measure(model, split, config, loss, spec, own, precision="fp32")


@torch.no_grad()
def measure(
    model: nn.Module,
    split: Split,
    config: TrainConfig,
    loss_function: LossFunction,
    spec: DataSpec,
    own: Own,
    *,
    precision: str,
    ranks: Ranks = ALONE,
    tunes_thresholds: bool = False,
) -> EpochMetrics:
    """Loss and metrics on a split; leaves the model, which is on the config's device, in evaluation mode.

    Metrics of several labels are those with the model's thresholds, or with the best on this split. With several ranks
    each makes its part of the outputs, and all of them then have all metrics. Batches that the device's memory does not
    hold are halved until it does, unless there are several ranks. Raises DeviceMemoryError where it cannot hold one
    example.
    """
    model.eval()
    batch_size = _batch_size(model, split, config, spec.kind)
    thresholds = getattr(model, "thresholds", None)

    def attempt(batch_size: int) -> EpochMetrics:
        metrics = EpochMetrics(
            spec,
            config.device,
            own=own,
            is_complete=True,
            thresholds=thresholds,
            tunes_thresholds=tunes_thresholds,
        )
        for inputs, targets in _batches(split, config, spec.kind, batch_size):
            with autocast(precision, torch.device(config.device)):
                outputs = ranks.outputs(model, inputs)
                loss = loss_function(outputs, targets)
            metrics.update(outputs, targets, loss, num_averaged(loss_function, targets))
        return metrics

    return in_fitting_batches(attempt, batch_size) if ranks.size == 1 else attempt(batch_size)


@torch.no_grad()
def outputs_and_targets(model: nn.Module, split: Split, config: TrainConfig, kind: str) -> tuple[Any, Any]:
    """What a model, moved to the config's device and left in evaluation mode, makes of a split, and what is right.

    Of the kind `instances` each example is there in two views, one after the other. Outputs of sequences are padded to
    the longest of all. Raises DeviceMemoryError if the device's memory cannot hold one example.
    """
    model = model.to(config.device).eval()
    batch_size = _batch_size(model, split, config, kind)

    def attempt(batch_size: int) -> tuple[Any, Any]:
        batches = _batches(split, config, kind, batch_size)
        outputs, targets = joined((model(inputs), targets) for inputs, targets in batches)
        return outputs, targets

    return in_fitting_batches(attempt, batch_size)


@torch.no_grad()
def losses_of_examples(
    model: nn.Module, split: Split, config: TrainConfig, loss_function: LossFunction, kind: str
) -> Tensor:
    """The loss of each example (N,), on the config's device, by a model that is left in evaluation mode."""
    model.eval()

    def attempt(batch_size: int) -> Tensor:
        batches = evaluation_batches(split, batch_size, config.device)
        return torch.cat([one_by_one(loss_function, model(inputs), targets) for inputs, targets in batches])

    return in_fitting_batches(attempt, _batch_size(model, split, config, kind))


def _batches(split: Split, config: TrainConfig, kind: str, batch_size: int) -> Iterator[tuple[Any, Any]]:
    if kind == "instances":
        return evaluation_views(split, config, batch_size)
    return evaluation_batches(split, batch_size, config.device)


def _batch_size(model: nn.Module, split: Split, config: TrainConfig, kind: str) -> int:
    if kind in ("embedding", "instances"):
        return config.batch_size  # their losses depend on who is in a batch
    convolves_on_cpu = config.device == "cpu" and has_convolutions(model)
    return evaluation_batch_size(split, config.batch_size, convolves_on_cpu=convolves_on_cpu)


def read_all(metrics: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers from scalars on the device, all in one transfer: the only sync of an epoch."""
    return dict(zip(metrics, torch.stack([value.double() for value in metrics.values()]).tolist(), strict=True))
