"""Multilayer perceptron."""

from __future__ import annotations

from math import prod
from typing import cast

from torch import Tensor, nn

from hpo.models.layers import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    VECTOR_NORMS,
    choose,
    dropout_layer,
    initialize_hidden,
    initialize_output,
    require_at_least_one,
)
from hpo.objective import DataSpec


class MLP(nn.Module):
    """`depth` hidden layers of `width` units, each linear, norm, activation, dropout; then one linear output layer.

    Images are flattened. There is no shortcut: a deep one (20 layers of 100 SiLU units, say) needs a norm, or care.
    `norm_first` says whether the norm comes before the activation. SwiGLU's layers have a gate for each unit, and so
    twice the weights.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        depth: int = 2,
        width: int = 128,
        activation: str = "relu",
        init: str = "auto",
        norm: str = "none",
        norm_first: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(depth=depth, width=width)
        sizes = [prod(spec.input_shape), *[width] * depth]
        self.hidden = nn.Sequential(
            *(_hidden_layer(inputs, width, activation, init, norm, norm_first, dropout) for inputs in sizes[:-1])
        )
        self.output = nn.Linear(width, spec.num_outputs)
        initialize_output(self.output)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.hidden(inputs.flatten(1))))


def _hidden_layer(
    num_inputs: int, width: int, activation: str, init: str, norm: str, norm_first: bool, dropout: float
) -> nn.Sequential:
    num_features = 2 * width if activation in GATED_ACTIVATIONS else width
    linear = nn.Linear(num_inputs, num_features, bias=norm == "none" or not norm_first)  # a norm has its own bias
    initialize_hidden(linear, activation, init)
    activate = choose("activation", activation, ACTIVATIONS | GATED_ACTIVATIONS)()
    normalise = choose("norm", norm, VECTOR_NORMS)(num_features if norm_first else width)
    order = (normalise, activate) if norm_first else (activate, normalise)
    return nn.Sequential(linear, *order, dropout_layer(dropout, after=activation))
