"""What tests of data sets share."""

from __future__ import annotations

import torch

from hpo.data.examples import DataSpec, Split
from hpo.parameters import Float
from hpo.space import Group, Space

LR_SPACE = Space(Group("step size", lr=Float(1e-4, 1e-1, log=True, default=1e-2)))
"""The smallest space of a task that is trained."""


def assert_same(split: Split, other: Split) -> None:
    for one, two in ((split.inputs, other.inputs), (split.targets, other.targets)):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)  # type: ignore[arg-type]


def of_classes(num_classes: int) -> DataSpec:
    """The description of data of one feature and so many classes; 0 stands for a regression."""
    return DataSpec((1,), tuple(map(str, range(num_classes))))
