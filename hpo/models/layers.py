"""What the networks are built of: activations, norms and initialisation, each chosen by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.nn import functional

from hpo.errors import UnknownNameError, UsageError

GROUP_SIZE = 16  # channels a group; Wu and He 2018, arXiv:1803.08494, table 3


class SquaredReLU(nn.Module):
    """The square of what ReLU lets pass (So et al. 2021, arXiv:2109.08668, section 4.1)."""

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.relu(inputs).square()


class SwiGLU(nn.Module):
    """One half of the features, gated by SiLU of the other: (B, 2 * F) to (B, F). Shazeer 2020, arXiv:2002.05202."""

    def forward(self, inputs: Tensor) -> Tensor:
        values, gates = inputs.chunk(2, dim=1)
        return values * functional.silu(gates)


def _group_norm(num_channels: int) -> nn.GroupNorm:
    """Groups of 16 channels; a single one, as a layer norm has, where that does not come out even."""
    return nn.GroupNorm(num_channels // GROUP_SIZE if num_channels % GROUP_SIZE == 0 else 1, num_channels)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "squared_relu": SquaredReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
}
GATED_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"swiglu": SwiGLU}
"""Those that halve the number of features."""

VECTOR_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda num_features: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "group": _group_norm,
}
IMAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda num_channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": partial(nn.GroupNorm, 1),  # one group: over channels and pixels
    "group": _group_norm,
}
INITS = ("auto", "glorot", "he", "lecun", "orthogonal")

T = TypeVar("T")


def choose(argument: str, name: str, available: Mapping[str, T]) -> T:
    """The entry of that name; UnknownNameError, naming the argument, where there is none."""
    if name not in available:
        raise UnknownNameError(argument, name, available)
    return available[name]


def require_at_least_one(**arguments: int) -> None:
    """Raise UsageError for a count below 1."""
    for name, value in arguments.items():
        if value < 1:
            raise UsageError(f"{name}={value} is not allowed: it must be at least 1.")


def dropout_layer(dropout: float, *, after: str | None = None) -> nn.Module:
    """Dropout of that share of its inputs, in [0, 1); nothing at all for 0.

    Right after a "selu" it is alpha dropout, which keeps mean and deviation (Klambauer et al. 2017, arXiv:1706.02515,
    section 2).
    """
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout} is not allowed: it must be in [0, 1).")
    if not dropout:
        return nn.Identity()
    return nn.AlphaDropout(dropout) if after == "selu" else nn.Dropout(dropout)


def initialize_hidden(layer: nn.Linear | nn.Conv2d, activation: str, init: str = "auto") -> None:
    """Weights for a layer in front of an activation; biases are 0.

    "auto" takes "glorot" for tanh (Glorot and Bengio 2010, http://proceedings.mlr.press/v9/glorot10a.html), "lecun" for
    SELU (Klambauer et al. 2017, arXiv:1706.02515) and "he" for all that rectify (He et al. 2015, arXiv:1502.01852).
    "orthogonal" is of Saxe et al. 2014, arXiv:1312.6120, times the gain of the activation.
    """
    if init not in INITS:
        raise UnknownNameError("init", init, INITS)
    match {"tanh": "glorot", "selu": "lecun"}.get(activation, "he") if init == "auto" else init:
        case "glorot":
            nn.init.xavier_normal_(layer.weight, gain=5 / 3 if activation == "tanh" else 1.0)
        case "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        case "lecun":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
        case "orthogonal":
            nn.init.orthogonal_(layer.weight, gain={"tanh": 5 / 3, "selu": 1.0}.get(activation, math.sqrt(2)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def initialize_output(layer: nn.Linear) -> None:
    """Small weights, so that every class begins with about the same chance (Goyal et al. 2017, arXiv:1706.02677)."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
