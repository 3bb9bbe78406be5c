"""SMOTE: examples of rare classes that lie between those there are."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo.data.examples import Split
from hpo.errors import UsageError

NEIGHBOURS = 5
ROWS_AT_ONCE = 1024


def oversample(split: Split, seed: int) -> Split:
    """The split with new examples of all classes but the largest, until each has as many; they come last.

    A new one lies anywhere between an example and one of its five nearest neighbours of the same class (Chawla et al.
    2002, https://doi.org/10.1613/jair.953, without borders). Distances are in units of each feature's deviation.
    Raises UsageError if the examples are not vectors of numbers with a class each.
    """
    inputs, targets = split.inputs, split.targets
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim != 2:
        raise UsageError("sampling='smote' is for vectors of numbers (N, F); use 'balanced', which repeats examples.")
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.ndim != 1:
        raise UsageError("sampling='smote' is for classes; this task has other targets: use 'uniform'.")
    features, labels, generator = inputs.cpu(), targets.cpu(), torch.Generator().manual_seed(seed)
    deviation = features.std(0, correction=0)
    scaled = (features - features.mean(0)) / torch.where(deviation > 0, deviation, 1.0)
    counts = torch.bincount(labels)
    new_inputs, new_labels = [inputs], [targets]
    for label, count in enumerate(counts.tolist()):
        num_new = int(counts.max()) - count
        if not count or not num_new:
            continue
        members = (labels == label).nonzero()[:, 0]
        chosen = torch.randint(count, (num_new,), generator=generator)
        pick, share = torch.rand(2, num_new, generator=generator)
        neighbours = _neighbours(scaled[members])
        other = neighbours[chosen, (pick * neighbours.shape[1]).long()]
        one, other = features[members[chosen]], features[members[other]]
        new_inputs.append(torch.lerp(one, other, share[:, None].to(one.dtype)).to(inputs.device))
        new_labels.append(torch.full((num_new,), label, dtype=targets.dtype, device=targets.device))
    return Split(torch.cat(new_inputs), torch.cat(new_labels))


def _neighbours(features: Tensor) -> Tensor:
    """For each row the nearest others, (N, at most 5); a row without others has itself."""
    num = min(NEIGHBOURS, len(features) - 1)
    if not num:
        return torch.zeros(1, 1, dtype=torch.int64)
    found = []
    for rows in torch.split(torch.arange(len(features)), ROWS_AT_ONCE):
        distances = torch.cdist(features[rows], features, compute_mode="donot_use_mm_for_euclid_dist")
        distances[torch.arange(len(rows)), rows] = torch.inf
        found.append(distances.topk(num, largest=False).indices)
    return torch.cat(found)
