"""What learns a table without a network: a linear model, and scikit-learn's gradient boosting, on the same splits."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from hpo.config import USUAL
from hpo.data.datasets import folds
from hpo.data.parts import named_parts, parts
from hpo.training.metrics import EpochMetrics

if TYPE_CHECKING:
    from hpo.data.datasets import Splits
    from hpo.data.examples import InputSpec, Split

LINEAR, BOOSTED = "a linear model", "gradient boosting"

MAX_BINNED = 255
"""Categories up to which gradient boosting tells a column's apart; it takes more of them for a number."""


MAX_NUMBERS = 10**8
"""Examples times columns, a category's values one column each, up to which a linear model is fitted."""


def is_table(splits: Splits) -> bool:
    """Whether the examples are rows of numbers and categories, and the target is one class or one number.

    Token ids look like categories, of which there are too many.
    """
    are_flat = all(isinstance(part, Tensor) and part.ndim <= 2 for part in parts(splits.train.inputs))
    is_one = splits.spec.kind in ("classification", "regression") and not splits.spec.target_shape
    return are_flat and is_one and len(splits.train) * sum(max(1, size) for size in _sizes(splits)) <= MAX_NUMBERS


def table_scores(splits: Splits, metric: str, num_folds: int | None = None) -> dict[str, float]:
    """The metric of both models on the validation split, or its mean over the folds; for a loss the usual metric."""
    name = USUAL[splits.spec.kind][1] if metric == "loss" else metric
    if num_folds:
        each = [table_scores(fold, name) for fold in folds(splits, num_folds)]
        return {model: mean(scores[model] for scores in each) for model in (LINEAR, BOOSTED)}
    return {model: _score(splits, outputs, name) for model, outputs in table_outputs(splits).items()}


def table_outputs(splits: Splits, names: Sequence[str] = (LINEAR, BOOSTED)) -> dict[str, Tensor]:
    """Outputs of both models, or of some, on the validation split; of classes the logarithms of probabilities."""
    outputs = {LINEAR: _linear_outputs, BOOSTED: _boosted_outputs}
    return {name: outputs[name](splits) for name in names}


def _linear_outputs(splits: Splits) -> Tensor:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    rows, new_rows = _standardised(splits)
    if splits.spec.kind == "regression":
        return _numbers(Ridge(alpha=len(rows) / 100), splits, rows, new_rows)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a baseline
        return _log_probabilities(LogisticRegression(max_iter=200), splits, rows, new_rows)


def _boosted_outputs(splits: Splits) -> Tensor:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    rows, new_rows = (_columns(splits, split, lambda ids, of: ids.float()).numpy() for split in _both(splits))
    settings: dict[str, Any] = {"categorical_features": _categorical(splits), "random_state": 0}
    if splits.spec.kind == "regression":
        return _numbers(HistGradientBoostingRegressor(**settings), splits, rows, new_rows)
    return _log_probabilities(HistGradientBoostingClassifier(**settings), splits, rows, new_rows)


def _numbers(model: Any, splits: Splits, rows: NDArray[Any], new_rows: NDArray[Any]) -> Tensor:
    return torch.from_numpy(model.fit(rows, _targets(splits)).predict(new_rows)).float()


def _log_probabilities(model: Any, splits: Splits, rows: NDArray[Any], new_rows: NDArray[Any]) -> Tensor:
    """(N, classes), of which with groups a fold may lack some."""
    targets = _targets(splits)
    known = np.unique(targets)
    probabilities = np.zeros((len(new_rows), len(splits.spec.classes)))
    probabilities[:, known] = model.fit(rows, targets).predict_proba(new_rows) if len(known) > 1 else 1.0
    return torch.from_numpy(probabilities).clamp(min=1e-9).log().float()


def _targets(splits: Splits) -> NDArray[Any]:
    assert isinstance(splits.train.targets, Tensor), "one row for each example"
    targets: NDArray[Any] = splits.train.targets.numpy()
    return targets


def _score(splits: Splits, outputs: Tensor, metric: str) -> float:
    metrics = EpochMetrics(splits.spec, "cpu", is_complete=True)
    metrics.update(outputs, splits.validation.targets, torch.zeros(()))
    return metrics.compute()[metric].item()


def _both(splits: Splits) -> tuple[Split, Split]:
    return splits.train, splits.validation


def _standardised(splits: Splits) -> tuple[NDArray[Any], NDArray[Any]]:
    """All columns as numbers, a category as a column of 0 and 1 for each value."""

    def one_hot(ids: Tensor, of_input: InputSpec) -> Tensor:
        sizes = _categories(of_input, ids.shape[1])
        return torch.cat([functional.one_hot(c, n).float() for c, n in zip(ids.unbind(1), sizes, strict=True)], dim=1)

    train, new = (_columns(splits, split, one_hot) for split in _both(splits))
    center, deviation = train.mean(0), train.std(0, correction=0).clamp(min=1e-6)
    return ((train - center) / deviation).numpy(), ((new - center) / deviation).numpy()


def _columns(splits: Splits, split: Split, of_ids: Callable[[Tensor, InputSpec], Tensor]) -> Tensor:
    """All inputs of a split side by side, (N, F) float32."""
    found = []
    for name, part in named_parts(split.inputs).items():
        assert isinstance(part, Tensor), "the examples are rows"
        columns, of_input = part if part.ndim > 1 else part[:, None], splits.spec.input_specs[name]
        found.append(columns.float() if of_input.vocabulary is None else of_ids(columns, of_input))
    return torch.cat(found, dim=1)


def _categorical(splits: Splits) -> list[bool]:
    return [0 < size <= MAX_BINNED for size in _sizes(splits)]


def _sizes(splits: Splits) -> list[int]:
    """How many categories each column has; 0 for numbers."""
    found: list[int] = []
    for name, part in named_parts(splits.train.inputs).items():
        of_input, num = splits.spec.input_specs[name], part.shape[1] if len(part.shape) > 1 else 1  # type: ignore[union-attr]
        found += (0,) * num if of_input.vocabulary is None else _categories(of_input, num)
    return found


def _categories(of_input: InputSpec, num_columns: int) -> tuple[int, ...]:
    """How many there are in each column of ids."""
    return of_input.categories or (of_input.vocabulary or 0,) * num_columns
