"""The optimizers and the schedules by name: what each does, when to use it, and what builds it.

To add one, add a row here and the same row to docs/training.md; tests/test_docs.py compares the two.
Nothing of torch is imported until a training asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Method:
    """One row of the tables below."""

    factory: str
    """`module:name` of what builds it."""

    does: str
    """What it does, as in the documentation."""

    suits: str
    """When to use it, as in the documentation."""

    settings: tuple[str, ...] = ()
    """What an optimizer's factory takes besides the groups of parameters and `lr`."""

    def load(self) -> Callable[..., Any]:
        found: Callable[..., Any] = resolve_name(self.factory)
        return found


# A factory is called with the groups of parameters, `lr`, and the settings that are named here, from those of
# hpo.training.optimizers.build_optimizer: any class of torch.optim fits.
OPTIMIZERS = {
    "sgd": Method(
        "torch.optim:SGD",
        "gradient steps with `momentum` (0.9), Nesterov's unless `nesterov` is false",
        "conv nets, when the rate and the schedule are tuned",
        ("momentum", "nesterov", "fused"),
    ),
    "adam": Method(
        "torch.optim:Adam",
        "steps scaled by running averages of the gradient and its square",
        "for comparisons; AdamW replaces it",
        ("betas", "eps", "fused"),
    ),
    "adamw": Method(
        "torch.optim:AdamW",
        "Adam with decoupled weight decay",
        "first choice when you know little",
        ("betas", "eps", "fused"),
    ),
    "nadam": Method("torch.optim:NAdam", "Adam with Nesterov's momentum", "deep plain networks", ("betas", "eps")),
    "adamax": Method(
        "torch.optim:Adamax",
        "Adam with the largest gradient instead of the average square",
        "sparse or spiky gradients",
        ("betas", "eps"),
    ),
    "adagrad": Method(
        "torch.optim:Adagrad",
        "steps that shrink with all squared gradients so far",
        "sparse features, short trainings; it slows down permanently",
        ("eps",),
    ),
    "rmsprop": Method(
        "torch.optim:RMSprop",
        "steps scaled by the average square, with `momentum`",
        "small values of `momentum`; with 0.9 it needs a small rate",
        ("momentum", "eps"),
    ),
    "lamb": Method(
        "hpo.training.optimizers:Lamb",
        "Adam with a step length that is, relative to each layer's weights, equal to the rate",
        "only batches above 8 192: below, it is slower than AdamW",
        ("betas", "eps"),
    ),
    "muon": Method(
        "hpo.training.optimizers:muon_with_adamw",
        "momentum with a nearly orthogonal update for hidden matrices; AdamW for the rest",
        "MLPs and transformers; AdamW updates convolution kernels, biases, norms and the last matrix",
        ("momentum", "nesterov", "betas", "eps"),
    ),
}

# A factory is called with the optimizer, the TrainConfig, and the number of steps of the whole training.
SCHEDULES = {
    "constant": Method("hpo.training.schedules:constant", "the rate stays at `lr`", "to compare optimizers"),
    "step": Method(
        "hpo.training.schedules:step",
        "multiplied by `decay_factor` (0.1) at one half and at three quarters of the steps after the warm-up",
        "to reproduce results that used it",
    ),
    "exponential": Method(
        "hpo.training.schedules:exponential",
        "multiplied by the same factor in each step, down to `decay_factor` of `lr`",
        "long trainings with RMSprop or Adagrad",
    ),
    "cosine": Method("hpo.training.schedules:cosine", "down to 0 along half a cosine", "the default: nothing to tune"),
    "cosine_restarts": Method(
        "hpo.training.schedules:cosine_restarts",
        "`num_cycles` (3) cosines, each twice as long as the one before",
        "when a training may be stopped early: each cycle ends with a usable model",
    ),
    "one_cycle": Method(
        "hpo.training.schedules:one_cycle",
        "up to `lr` over 30% of the steps, then down to nearly 0; "
        "momentum (or `beta1`) moves in the opposite direction",
        "short trainings with a high rate",
    ),
    "plateau": Method(
        "hpo.training.schedules:plateau",
        "multiplied by `decay_factor` after `plateau_patience` (3) epochs in which the validation metric did not "
        "improve by `min_delta`",
        "when the number of epochs is unknown; keep it below `patience`",
    ),
}
