"""What the networks are built of: activations, norms and initialisation, each chosen by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import nn

from hpo.errors import UnknownNameError, UsageError

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
}
VECTOR_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda num_features: nn.Identity(),
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
}
IMAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda num_channels: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": lambda num_channels: nn.GroupNorm(1, num_channels),  # one group: over channels and pixels
}

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


def dropout_layer(dropout: float) -> nn.Module:
    """Dropout of that share of its inputs, in [0, 1); nothing at all for 0."""
    if not 0 <= dropout < 1:
        raise UsageError(f"dropout={dropout} is not allowed: it must be in [0, 1).")
    return nn.Dropout(dropout) if dropout else nn.Identity()


def initialize_hidden(layer: nn.Linear | nn.Conv2d, activation: str) -> None:
    """Weights for a layer in front of an activation: Glorot for tanh, He for those that rectify; biases are 0.

    Glorot and Bengio 2010, http://proceedings.mlr.press/v9/glorot10a.html; He et al. 2015, arXiv:1502.01852.
    """
    if activation == "tanh":
        nn.init.xavier_normal_(layer.weight, gain=nn.init.calculate_gain("tanh"))
    else:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def initialize_output(layer: nn.Linear) -> None:
    """Small weights, so that every class begins with about the same chance (Goyal et al. 2017, arXiv:1706.02677)."""
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
