"""Multilayer perceptron."""

from __future__ import annotations

from math import prod
from typing import cast

from torch import Tensor, nn

from hpo.data.examples import DataSpec
from hpo.errors import UnknownNameError
from hpo.models.layers import (
    ACTIVATIONS,
    GATED_ACTIVATIONS,
    VECTOR_NORMS,
    DropConnectLinear,
    choose,
    dropout_layer,
    initialize_hidden,
    initialize_output,
    require_at_least_one,
    scale_to_unit_variance,
)

DROPOUT_TYPES = ("dropout", "dropconnect")


class MLP(nn.Module):
    """`depth` hidden layers of `width` units, each linear, norm, activation, dropout; then one linear output layer.

    Images are flattened, and a single number is one feature. There is no shortcut: a deep one (20 layers of 100 SiLU
    units, say) needs a norm, or care. `norm_first` says whether the norm comes before the activation. SwiGLU's layers
    have a gate for each unit, and so twice the weights. With a `dropout_type` of "dropconnect" it is the weights of
    hidden layers that are dropped.
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
        dropout_type: str = "dropout",
    ) -> None:
        super().__init__()
        require_at_least_one(depth=depth, width=width)
        if dropout_type not in DROPOUT_TYPES:
            raise UnknownNameError("dropout_type", dropout_type, DROPOUT_TYPES)
        self._init = init
        sizes = [prod(spec.input_shape), *[width] * depth]
        self.hidden = nn.Sequential(
            *(
                _hidden_layer(inputs, width, activation, init, norm, norm_first, dropout, dropout_type)
                for inputs in sizes[:-1]
            )
        )
        self.output = nn.Linear(width, spec.num_outputs)
        initialize_output(self.output)

    def forward(self, inputs: Tensor) -> Tensor:
        features = inputs.flatten(1) if inputs.ndim > 1 else inputs.unsqueeze(1)
        return cast(Tensor, self.output(self.hidden(features)))

    def initialize_from_data(self, inputs: Tensor) -> None:
        """The second half of `init="lsuv"`."""
        if self._init == "lsuv":
            scale_to_unit_variance(self, [m for m in self.hidden.modules() if isinstance(m, nn.Linear)], inputs)


def _hidden_layer(
    num_inputs: int,
    width: int,
    activation: str,
    init: str,
    norm: str,
    norm_first: bool,
    dropout: float,
    dropout_type: str,
) -> nn.Sequential:
    num_features = 2 * width if activation in GATED_ACTIVATIONS else width
    bias = norm == "none" or not norm_first  # a norm has its own
    linear: nn.Linear
    if dropout_type == "dropconnect":
        linear, dropout = DropConnectLinear(num_inputs, num_features, bias=bias, dropout=dropout), 0.0
    else:
        linear = nn.Linear(num_inputs, num_features, bias=bias)
    initialize_hidden(linear, activation, init)
    activate = choose("activation", activation, ACTIVATIONS | GATED_ACTIVATIONS)()
    normalise = choose("norm", norm, VECTOR_NORMS)(num_features if norm_first else width)
    order = (normalise, activate) if norm_first else (activate, normalise)
    return nn.Sequential(linear, *order, dropout_layer(dropout, after=activation))
