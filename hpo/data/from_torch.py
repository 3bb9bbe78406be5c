"""A data set out of map-style torch Datasets, with their own transforms."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpo.data.datasets import hold_out
from hpo.data.examples import Dataset, Groups, SealedSplit, Split, Vocabulary
from hpo.data.loaded import Loaded, Source, make_source, read_targets
from hpo.errors import DataError, in_one_line

_logger = logging.getLogger(__name__)

_NUM_COMPARED = 8
"""Examples whose targets are compared with those given for all: enough to notice another order."""


def from_torch(
    train: Any,
    test: Any = None,
    *,
    evaluation: Any = None,
    targets: Tensor | Sequence[Any] | None = None,
    classes: Sequence[str] = (),
    kind: str | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    num_workers: int = 2,
    vocabulary: Vocabulary | Mapping[str, Vocabulary] | None = None,
    normalise: bool | Mapping[str, bool] = True,
    groups: Groups | None = None,
    is_ordered: bool = False,
) -> Dataset:
    """The examples of a `torch.utils.data.Dataset` that returns (inputs, target) by index.

    They are read by `num_workers` processes for each trial and stay out of memory. `train` may transform at random:
    each example is read after Python's, numpy's and torch's global generators were seeded by epoch and example, so that
    the same batches come again. `evaluation` returns the same examples without that; it is `train` if omitted. Without
    `test` a fifth is held out. `targets` are those of `train`, in order: without them every example is read once for
    its target.

    `collate_fn` makes (inputs, targets) of a list of examples; by default torch's. Ids need a `vocabulary`; the other
    arguments are those of `Dataset`. Raises DataError for what cannot be indexed or read.
    """
    source, rows = make_source(train, train if evaluation is None else evaluation, collate_fn, num_workers)
    given: dict[str, Any] = {"classes": tuple(classes), "kind": kind, "vocabulary": vocabulary, "normalise": normalise}
    given |= {"groups": groups, "is_ordered": is_ordered}
    known = _targets(source, len(rows), targets, kind, classes)
    if test is None:
        return hold_out(Loaded(source, rows), known, **given)
    test_source, test_rows = make_source(test, test, collate_fn, num_workers)

    def read_test() -> Split:
        return Split(Loaded(test_source, test_rows), _targets(test_source, len(test_rows), None, kind, classes))

    return Dataset(Split(Loaded(source, rows), known), SealedSplit(read_test, len(test_rows)), **given)


def _targets(source: Source, num_examples: int, given: Any, kind: str | None, classes: Sequence[str]) -> Tensor | None:
    """The targets as one tensor; None if they are something that only the task's own loss knows."""
    if kind == "own":
        return None
    are_given = given is not None
    if not are_given:
        _logger.info("%d examples are read for their targets; from_torch(targets=...) spares this.", num_examples)
        given = read_targets(source, range(num_examples))
    try:
        found = given if isinstance(given, Tensor) else torch.stack([torch.as_tensor(target) for target in given])
    except (RuntimeError, TypeError, ValueError) as error:
        if kind is None and not classes:
            return None
        needed = f"the kind {kind} needs" if kind else "classes need, whose indices they are"
        raise DataError(
            f"the targets of the Dataset must be numbers of one shape, as {needed}: {in_one_line(error)}."
        ) from error
    if len(found) != num_examples:
        raise DataError(f"there are {len(found)} targets for {num_examples} examples.")
    if are_given:
        _require_the_examples_own(source, found)
    if found.dtype == torch.float64:
        return found.float()
    return found if found.is_floating_point() or found.dtype in (torch.bool, torch.uint8) else found.long()


def _require_the_examples_own(source: Source, targets: Tensor) -> None:
    """Raise DataError if some examples, evenly spread, have other targets than those given for them.

    What a collate function makes of an example's target is not known, so only numbers of the same size are compared.
    """
    rows = torch.linspace(0, len(targets) - 1, min(_NUM_COMPARED, len(targets))).long().tolist()
    for row, own in zip(rows, read_targets(source, rows), strict=True):
        if isinstance(own, int | float | Tensor | np.number | np.ndarray):
            own, given = torch.as_tensor(own).flatten(), targets[row].flatten()
            if len(own) == len(given) and not torch.allclose(own.double(), given.double(), equal_nan=True):
                raise DataError(
                    f"targets[{row}] is {given.tolist()}, but example {row} of the Dataset has {own.tolist()}: "
                    "give the targets in the order of the examples, or omit them."
                )
