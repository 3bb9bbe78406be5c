"""What needs no network: the simplest guess, and a linear model of the same examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from hpo.data.kinds import IGNORED, labels_of
from hpo.data.parts import Ragged, parts

if TYPE_CHECKING:
    from hpo.data.datasets import Splits
    from hpo.data.examples import Split
    from hpo.data.parts import Part

NUM_COUNTED = 2048
"""Features that ids (tokens, categories) are counted in."""


def baselines(splits: Splits) -> tuple[Tensor, Tensor | None]:
    """Outputs on the validation split of the simplest guess, and of a ridge regression of the inputs.

    A linear model knows no pixels or elements, so it is None where these are labelled.
    """
    targets, num = splits.train.targets, len(splits.validation)
    num_classes = len(splits.spec.classes)
    assert isinstance(targets, Tensor | Ragged), "the kinds of a task's own have no baselines"
    if splits.spec.kind in ("segmentation", "tagging"):
        _, wanted = splits.validation.batch(slice(None))
        labels = labels_of(targets.values if isinstance(targets, Ragged) else targets).flatten()
        commonest = torch.bincount(labels[labels != IGNORED]).argmax()
        guess = functional.one_hot(commonest.expand(labels_of(wanted).shape), num_classes).float()
        return guess.movedim(-1, 1) if splits.spec.kind == "segmentation" else guess, None
    assert isinstance(targets, Tensor), "one row for each example"
    if splits.spec.kind in ("regression", "box"):
        return targets.mean(0).expand(num, *targets.shape[1:]), _ridge(splits, targets)
    if splits.spec.kind == "multilabel":
        return (targets.float().mean(0) - 0.5).expand(num, -1), _ridge_classifier(splits, targets.long()) - 0.5
    naive = torch.bincount(targets).argmax().expand(num)
    naive, linear = (
        functional.one_hot(each, num_classes).float() for each in (naive, _ridge_classifier(splits, targets))
    )
    return naive, linear


def _ridge(splits: Splits, targets: Tensor) -> Tensor:
    from sklearn.linear_model import Ridge  # scikit-learn takes a second to import

    inputs, new = _standardised(splits)
    model = Ridge(alpha=len(inputs) / 100).fit(inputs.numpy(), targets.numpy())
    return torch.from_numpy(model.predict(new.numpy())).float().view(len(new), *targets.shape[1:])


def _ridge_classifier(splits: Splits, targets: Tensor) -> Tensor:
    from sklearn.linear_model import RidgeClassifier

    inputs, new = _standardised(splits)
    strength = float(len(inputs))  # a prior as strong as the data: pixels outnumber the examples
    return torch.tensor(RidgeClassifier(alpha=strength).fit(inputs.numpy(), targets.numpy()).predict(new.numpy()))


def _standardised(splits: Splits) -> tuple[Tensor, Tensor]:
    features, new = (_features(split) for split in (splits.train, splits.validation))
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    return (features - mean) / deviation, (new - mean) / deviation


def _features(split: Split) -> Tensor:
    """All inputs as features (N, F)."""
    return torch.cat([_features_of(part) for part in parts(split.inputs)], dim=1)


def _features_of(part: Part) -> Tensor:
    """Of large images means over parts of them, of sequences means and deviations, of ids how often each is there."""
    if isinstance(part, Ragged):
        rows = torch.arange(len(part)).repeat_interleave(part.lengths)
        if not part.dtype.is_floating_point:
            return _counted(part.values.flatten(), rows.repeat_interleave(part.values[:1].numel()), len(part))
        values = part.values.flatten(1) if part.values.ndim > 1 else part.values[:, None]
        sums = torch.zeros(len(part), 2 * values.shape[1]).index_add_(
            0, rows, torch.cat((values, values**2), 1).float()
        )
        mean, square = (sums / part.lengths[:, None]).chunk(2, dim=1)
        return torch.cat((mean, (square - mean**2).clamp(min=0).sqrt()), dim=1)
    inputs = part[:]
    if not (inputs.is_floating_point() or inputs.dtype == torch.uint8):
        ids = inputs.flatten(1) if inputs.ndim > 1 else inputs[:, None]
        shifted = ids + torch.arange(ids.shape[1]) * 31  # the same id in another column is another one
        return _counted(shifted.flatten(), torch.arange(len(ids)).repeat_interleave(ids.shape[1]), len(ids))
    if inputs.ndim == 4:
        height, width = (min(32, side) for side in inputs.shape[-2:])
        inputs = functional.adaptive_avg_pool2d(inputs.float(), (height, width))
    return (inputs.flatten(1) if inputs.ndim > 1 else inputs[:, None]).float()


def _counted(ids: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """How often each id is in each row, (rows, NUM_COUNTED); ids that agree modulo that count together."""
    cells = rows * NUM_COUNTED + ids.long() % NUM_COUNTED
    return torch.bincount(cells, minlength=num_rows * NUM_COUNTED).view(num_rows, NUM_COUNTED).float()
