"""Multilayer perceptron."""

from __future__ import annotations

from math import prod
from typing import cast

from torch import Tensor, nn

from hpo.models.layers import (
    ACTIVATIONS,
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
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        depth: int = 2,
        width: int = 128,
        activation: str = "relu",
        norm: str = "none",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(depth=depth, width=width)
        sizes = [prod(spec.input_shape), *[width] * depth]
        self.hidden = nn.Sequential(*(_hidden_layer(inputs, width, activation, norm, dropout) for inputs in sizes[:-1]))
        self.output = nn.Linear(width, spec.num_outputs)
        initialize_output(self.output)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.hidden(inputs.flatten(1))))


def _hidden_layer(num_inputs: int, width: int, activation: str, norm: str, dropout: float) -> nn.Sequential:
    linear = nn.Linear(num_inputs, width, bias=norm == "none")  # a norm has its own bias
    initialize_hidden(linear, activation)
    return nn.Sequential(
        linear,
        choose("norm", norm, VECTOR_NORMS)(width),
        choose("activation", activation, ACTIVATIONS)(),
        dropout_layer(dropout),
    )
