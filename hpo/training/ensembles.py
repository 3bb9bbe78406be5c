"""Which trained models make the best ensemble, by greedy selection (Caruana et al., 2004)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hpo.models.ensemble import averaged

NUM_ROUNDS = 25
"""Members that are added, repeats counted. Later ones change the mean too little to matter."""

Loss = Callable[[Tensor, Tensor], float]
"""Of outputs for the examples at these indices; smaller is better."""


def select_members(outputs: Mapping[int, Tensor], rows: Tensor, loss: Loss, kind: str) -> Counter[int]:
    """How often each model counts, by number, so that the mean of their `outputs` (N, ...) has the smallest loss.

    Starting from the best one, the model that helps most is added, again and again, one may be added repeatedly; of all
    the ensembles on that way the best one is returned (Caruana et al. 2004, https://doi.org/10.1145/1015330.1015432).
    Only the examples at `rows` count.
    """
    of_rows = {number: each[rows] for number, each in outputs.items()}
    chosen: Counter[int] = Counter()
    best, best_loss = chosen, float("inf")
    for _ in range(NUM_ROUNDS):
        tried = {}
        for number in of_rows:
            with_it = chosen + Counter([number])
            tried[number] = loss(averaged([of_rows[n] for n in with_it], list(with_it.values()), kind), rows)
        added = min(tried, key=lambda number: (tried[number], number))
        chosen = chosen + Counter([added])
        if tried[added] < best_loss:
            best, best_loss = chosen, tried[added]
    return best


def estimate_gain(outputs: Mapping[int, Tensor], winner: int, loss: Loss, kind: str, *, seed: int) -> float:
    """How much smaller the loss of a selected ensemble is than that of the `winner` alone.

    Members are selected on one half of the examples and judged on the other, and the other way round: on the examples
    that chose it an ensemble always looks better.
    """
    num_examples = len(next(iter(outputs.values())))
    order = torch.randperm(num_examples, generator=torch.Generator().manual_seed(seed))
    halves = order[: num_examples // 2], order[num_examples // 2 :]
    gain = 0.0
    for chosen_on, judged_on in (halves, halves[::-1]):
        members = select_members(outputs, chosen_on, loss, kind)
        together = averaged([outputs[n][judged_on] for n in members], list(members.values()), kind)
        gain += (loss(outputs[winner][judged_on], judged_on) - loss(together, judged_on)) / 2
    return gain
