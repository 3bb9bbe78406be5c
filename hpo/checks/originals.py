"""Whether the files of photos give away their class: then a network may learn which tool saved them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpo.checks.verdicts import Verdict
from hpo.data.mapped import MappedImages
from hpo.data.photos import originals_of

if TYPE_CHECKING:
    from hpo.data.examples import Dataset

SAMPLE = 10_000
"""Training photos that are looked at."""

MIN_PHOTOS = 10
"""Of a class, and of all others, below which nothing is said."""

COMMON, RARE = 0.9, 0.1
"""Shares of a class and of all others that have a property which gives the class away."""

SEPARATED = 0.95
"""Share of pairs, one of the class and one of the others, in which the class has the larger value, or the smaller."""


def has_originals(dataset: Dataset) -> bool:
    """Whether it is known what the files of the examples were, and each has one class."""
    return isinstance(dataset.train.inputs, MappedImages) and dataset.spec.kind == "classification"


def check_originals(dataset: Dataset) -> Verdict:
    """Compare each class with all others by what is known of the files: size, type of pixels, format, brightness."""
    images, labels = dataset.train.inputs, dataset.train.targets
    assert isinstance(images, MappedImages), "the caller has asked has_originals"
    assert isinstance(labels, Tensor), "the caller has asked has_originals"
    rows = torch.arange(0, len(images), max(1, len(images) // SAMPLE))
    some, classes = images.select(rows), labels[rows].numpy()
    found = originals_of(some)
    kinds: dict[str, Sequence[Any]] = {
        "format": [each.format for each in found],
        "type of pixels": [each.mode for each in found],
        "size": [f"{each.width}x{each.height}" for each in found],
    }
    amounts: dict[str, Sequence[float]] = {
        "width": [each.width for each in found],
        "height": [each.height for each in found],
        "brightness": [some[slice(i, i + 1)].float().mean().item() for i in range(len(some))],
    }
    told = []
    for label, name in enumerate(dataset.spec.classes):
        is_of_class = classes == label
        if min(is_of_class.sum(), (~is_of_class).sum()) < MIN_PHOTOS:
            continue
        differences = [_of_kind(kind, values, is_of_class) for kind, values in kinds.items()]
        differences += [_of_amount(kind, values, is_of_class) for kind, values in amounts.items()]
        told += [f"'{name}': {difference}" for difference in differences if difference]
    commonest = [f"{kind} {Counter(values).most_common(1)[0][0]}" for kind, values in kinds.items()]
    text = f"most have {', '.join(commonest)}"
    if not told:
        return Verdict(state="ok", text=text)
    more = f"; {len(told) - 3} more such differences" if len(told) > 3 else ""
    advice = (
        f"{'; '.join(told[:3])}{more}: if another tool or camera saved these photos, a network may learn the tool; "
        "save all of them alike, or add photos of each class from each source"
    )
    return Verdict(state="warning", text=text, advice=advice, data={"differences": told})


def _of_kind(kind: str, values: Sequence[str], is_of_class: NDArray[np.bool_]) -> str | None:
    """What most photos of the class have and hardly any other."""
    here = Counter(value for value, mine in zip(values, is_of_class, strict=True) if mine)
    value, count = here.most_common(1)[0]
    share = count / is_of_class.sum()
    elsewhere = sum(other == value for other, mine in zip(values, is_of_class, strict=True) if not mine)
    share_elsewhere = elsewhere / (~is_of_class).sum()
    if share < COMMON or share_elsewhere > RARE:
        return None
    return f"{share:.0%} have the {kind} {value}, of the others {share_elsewhere:.0%}"


def _of_amount(kind: str, values: Sequence[float], is_of_class: NDArray[np.bool_]) -> str | None:
    """Whether nearly all photos of the class have more, or less, than nearly all others."""
    amounts = np.asarray(values, dtype=np.float64)
    here, elsewhere = np.sort(amounts[is_of_class]), np.sort(amounts[~is_of_class])
    below = np.searchsorted(elsewhere, here, "left").mean() / len(elsewhere)
    up_to = np.searchsorted(elsewhere, here, "right").mean() / len(elsewhere)
    larger = (below + up_to) / 2  # ties count half: the area under the ROC curve
    if 1 - SEPARATED < larger < SEPARATED:
        return None
    return f"a {kind} around {np.median(here):.0f}, the others around {np.median(elsewhere):.0f}"
