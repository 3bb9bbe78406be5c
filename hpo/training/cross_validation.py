"""A training for each fold of the data, which count together as one."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from hpo.config import derive_seed
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.distributed import ALONE, Ranks
from hpo.training.trainer import EpochResult, fit

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from hpo.config import TrainConfig
    from hpo.data.datasets import Splits


def fit_folds(
    build: Callable[[Splits, TrainConfig], nn.Module],
    folds: Iterable[Splits],
    config: TrainConfig,
    *,
    checkpoints: Path,
    is_streamed: bool = False,
    ranks: Ranks = ALONE,
) -> Generator[EpochResult, None, None]:
    """Train a model of its own on each fold, and yield their epochs one after the other.

    Epochs are counted through: those of fold k come after (k - 1) * max_epochs. `best_value` is the mean over the folds
    so far of the best value in each, and `best_epoch` the mean of the epochs in which they had it, rounded. The metrics
    have that value as `fold/METRIC` where a fold ends. Each fold stops early by itself, and has a seed of its own; one
    that diverges ends everything.

    The state is saved below `checkpoints`. A run that was interrupted continues after the last saved epoch, bit-equal;
    first it yields the last result of each fold that was over once more. `is_streamed` and `ranks` are those of `fit`.
    Thresholds of several labels are 0, as those of the model that is trained on all examples will be.
    """
    over: list[EpochResult] = []
    for fold, splits in enumerate(folds, start=1):
        own = fold_config(config, fold)
        checkpoint = CheckpointFolder(checkpoints / f"fold-{fold}")
        model = build(splits, own)
        run = fit(
            model, splits, own, checkpoint=checkpoint, is_streamed=is_streamed, ranks=ranks, tunes_thresholds=False
        )
        for result in run:
            yield _counted_through(result, fold, over, config)
        if result.diverged:
            return
        over.append(result)


def fold_config(config: TrainConfig, fold: int) -> TrainConfig:
    """The settings of one fold's training; folds count from 1."""
    return replace(config, seed=derive_seed(config.seed, "fold", fold))


def _counted_through(result: EpochResult, fold: int, over: list[EpochResult], config: TrainConfig) -> EpochResult:
    """The result of a fold's epoch as that of the whole, after the folds that are `over`."""
    so_far = [*over, result]
    best_values = [each.best_value for each in so_far if each.best_value is not None]
    best_epochs = [each.best_epoch for each in so_far if each.best_epoch is not None]
    is_known = len(best_values) == len(so_far)
    metrics = dict(result.metrics)
    if result.is_last and result.best_value is not None:
        metrics[f"fold/{config.metric}"] = result.best_value
    return replace(
        result,
        epoch=(fold - 1) * config.max_epochs + result.epoch,
        metrics=metrics,
        best_value=fmean(best_values) if is_known else None,
        best_epoch=round(fmean(best_epochs)) if is_known else None,
        fold=fold,
        fold_value=result.best_value,
    )
