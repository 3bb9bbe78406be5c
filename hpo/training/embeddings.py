"""Losses and a metric of embeddings: what is alike is to be close, what is not is to be far apart.

Outputs are embeddings (B, size), brought to length 1 here; targets (B,) are equal for what is alike. Nothing waits for
the device, as pytorch-metric-learning's miners do, which pick out pairs by their indices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from hpo.training.class_metrics import OfAll

if TYPE_CHECKING:
    from torch import Tensor

PAIRS_AT_ONCE = 2**22
"""Similarities that are compared at a time, 16 MB."""

NEIGHBOURS = 5


def triplet(margin: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """How much the farthest example that is alike lacks to be closer, by the margin, than the nearest that is not.

    The mean over the examples that have both in the batch: batch-hard triplets (Hermans et al. 2017, arXiv:1703.07737,
    equation 5).
    """
    distances, alike, other = _distances(outputs), *_pairs(targets)
    farthest = distances.masked_fill(~alike, 0.0).amax(1)
    nearest = distances.masked_fill(~other, 4.0).amin(1)
    return _mean_where(alike.any(1) & other.any(1), functional.relu(farthest - nearest + margin))


def contrastive(margin: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared distances of what is alike, and squares of what others lack to the margin: half the sum of both means
    (Hadsell et al. 2006, https://doi.org/10.1109/CVPR.2006.100, equation 4, with as much weight for both)."""
    distances, alike, other = _distances(outputs), *_pairs(targets)
    lacking = functional.relu(margin - distances)
    return (_mean_where(alike, distances.square()) + _mean_where(other, lacking.square())) / 2


def info_nce(temperature: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of picking what is alike among all others, by cosine similarity.

    With two views of each example it is NT-Xent (Chen et al. 2020, arXiv:2002.05709, equation 1), with labels the
    supervised loss of Khosla et al. 2020, arXiv:2004.11362, equation 2. What has nothing alike in the batch does not
    count.
    """
    alike, _ = _pairs(targets)
    similarities = (_similarities(outputs) / temperature).masked_fill(_is_self(targets), torch.finfo(torch.float32).min)
    log_shares = similarities.log_softmax(1)
    of_alike = torch.where(alike, -log_shares, 0.0).sum(1) / alike.sum(1).clamp(min=1)
    return _mean_where(alike.any(1), of_alike)


def _distances(outputs: Tensor) -> Tensor:
    """Of embeddings of length 1 from each other (B, B), in [0, 2]; kept off 0, where the root has no slope."""
    return (2 - 2 * _similarities(outputs)).clamp(min=1e-8).sqrt()


def _similarities(outputs: Tensor) -> Tensor:
    """Cosines (B, B), in fp32 whatever the training's precision: in bf16 neighbours would be equal."""
    with torch.autocast(outputs.device.type, enabled=False):
        unit = functional.normalize(outputs.float(), dim=1)
        return unit @ unit.T


def _pairs(targets: Tensor) -> tuple[Tensor, Tensor]:
    """Which pairs of examples are alike, and which are not: (B, B) bool twice."""
    same = targets[:, None] == targets
    return same & ~_is_self(targets), ~same


def _is_self(targets: Tensor) -> Tensor:
    positions = torch.arange(len(targets), device=targets.device)
    return positions[:, None] == positions


def _mean_where(counts: Tensor, values: Tensor) -> Tensor:
    """The mean of the values that count; 0, with gradients of 0, where none does."""
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp(min=1)


class RetrievalMetrics(OfAll):
    """Whether the nearest example, or one of the five nearest, is alike, among all that are evaluated.

    The example itself is left out, and what nothing is alike to does not count: Recall@K (Musgrave et al. 2020,
    arXiv:2003.08505, section 2.1), by cosine similarity.
    """

    def compute(self) -> dict[str, Tensor]:
        counted, first, any_of_five = self.hits().double().sum(1)
        return {"recall_at_1": first / counted, "recall_at_5": any_of_five / counted}

    def hits(self) -> Tensor:
        """For each example whether it counts, and whether its nearest, or one of the five nearest, is alike: (3, N)."""
        outputs, targets = self.together()
        unit = functional.normalize(outputs.float(), dim=1)
        positions = torch.arange(len(unit), device=unit.device)
        found = []
        for rows in torch.split(positions, max(1, PAIRS_AT_ONCE // len(unit))):
            others = rows[:, None] != positions
            alike = (targets[rows][:, None] == targets) & others
            similarities = (unit[rows] @ unit.T).masked_fill(~others, -2.0)
            nearest = similarities.topk(min(NEIGHBOURS, len(unit)), dim=1).indices
            hits = alike.gather(1, nearest)
            found.append(torch.stack((alike.any(1), hits[:, 0], hits.any(1))))
        return torch.cat(found, dim=1)
