"""What tests of data sets share."""

from __future__ import annotations

import torch

from hpo.data.examples import Split


def assert_same(split: Split, other: Split) -> None:
    for one, two in ((split.inputs, other.inputs), (split.targets, other.targets)):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
