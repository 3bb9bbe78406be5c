"""What the networks are built of: activations, norms and initialisation, each chosen by its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TypeVar, cast

import torch
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
INITS = ("auto", "glorot", "he", "lecun", "orthogonal", "lsuv")

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


def require_share(**arguments: float) -> None:
    """Raise UsageError for a probability outside [0, 1)."""
    for name, value in arguments.items():
        if not 0 <= value < 1:
            raise UsageError(f"{name}={value} is not allowed: it must be in [0, 1).")


def dropout_layer(dropout: float, *, after: str | None = None) -> nn.Module:
    """Dropout of that share of its inputs, in [0, 1); nothing at all for 0.

    Right after a "selu" it is alpha dropout, which keeps mean and deviation (Klambauer et al. 2017, arXiv:1706.02515,
    section 2).
    """
    require_share(dropout=dropout)
    if not dropout:
        return nn.Identity()
    return nn.AlphaDropout(dropout) if after == "selu" else nn.Dropout(dropout)


class DropConnectLinear(nn.Linear):
    """A linear layer that loses a share of its weights in each training step, the others scaled up for it.

    Wan et al. 2013, https://proceedings.mlr.press/v28/wan13.html; the whole batch loses the same ones, because a mask
    for each example would take as much memory as the batch has copies of the layer.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool, dropout: float) -> None:
        super().__init__(num_inputs, num_outputs, bias=bias)
        require_share(dropout=dropout)
        self.dropout = dropout

    def forward(self, inputs: Tensor) -> Tensor:
        weight = functional.dropout(self.weight, self.dropout, self.training)
        return functional.linear(inputs, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}"


def initialize_hidden(layer: nn.Linear | nn.Conv2d, activation: str, init: str = "auto") -> None:
    """Weights for a layer in front of an activation; biases are 0.

    "auto" takes "glorot" for tanh (Glorot and Bengio 2010, http://proceedings.mlr.press/v9/glorot10a.html), "lecun" for
    SELU (Klambauer et al. 2017, arXiv:1706.02515) and "he" for all that rectify (He et al. 2015, arXiv:1502.01852).
    "orthogonal" is of Saxe et al. 2014, arXiv:1312.6120, times the gain of the activation, and what "lsuv" begins with:
    `scale_to_unit_variance` does the rest when there are data.
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
        case "orthogonal" | "lsuv":
            nn.init.orthogonal_(layer.weight, gain={"tanh": 5 / 3, "selu": 1.0}.get(activation, math.sqrt(2)))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


@torch.no_grad()
def scale_to_unit_variance(network: nn.Module, layers: Iterable[nn.Module], inputs: Tensor) -> None:
    """Scale the weights of each layer, one after the other, until its outputs for `inputs` have a variance near 1.

    Layer-sequential unit-variance (Mishkin and Matas 2016, arXiv:1511.06422, algorithm 1, with its tolerance of 0.1 and
    10 attempts). `layers` come in the order in which they are run; without biases, as layers begin, one attempt does.
    The network is left in the mode that it is in, and nothing random is drawn.
    """
    was_training = network.training
    network.eval()
    for layer in layers:
        variances: list[Tensor] = []
        hook = layer.register_forward_hook(lambda module, args, outputs, seen=variances: seen.append(outputs.var()))
        for _ in range(10):
            network(inputs)
            variance = variances.pop()
            if abs(variance - 1) < 0.1 or not 0 < variance < math.inf:
                break
            cast(Tensor, layer.weight).div_(variance.sqrt())
        hook.remove()
    network.train(was_training)


def initialize_output(layer: nn.Linear | nn.Conv2d) -> None:
    """Small weights, so that every class begins with about the same chance (Goyal et al. 2017, arXiv:1706.02677)."""
    nn.init.normal_(layer.weight, std=0.01)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
