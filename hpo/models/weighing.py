"""One loss of several: each by its weight, or by what was learned of its noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hpo.objective import Own


class Weighing(nn.Module):
    """The sum of the losses of several targets.

    Each is multiplied by its weight. With `own.weighting` "uncertainty" it is divided by a variance, too, which is
    learned with the model and has its logarithm as its price: a target that cannot be predicted well gets little weight
    (Kendall et al. 2018, arXiv:1705.07115, equation 7, without its factor of 1/2 for squared errors).
    """

    def __init__(self, own: Own) -> None:
        super().__init__()
        self.weights = {name: own.weights.get(name, 1.0) for name in own.losses}
        self.log_variances: nn.Parameter | None = None
        if own.weighting == "uncertainty":
            self.log_variances = nn.Parameter(torch.zeros(len(own.losses)))

    def forward(self, losses: Mapping[str, Tensor]) -> Tensor:
        if self.log_variances is None:
            return torch.stack([weight * losses[name] for name, weight in self.weights.items()]).sum()
        weighed = [
            weight * ((-log_variance).exp() * losses[name] + log_variance / 2)
            for (name, weight), log_variance in zip(self.weights.items(), self.log_variances.unbind(), strict=True)
        ]
        return torch.stack(weighed).sum()
