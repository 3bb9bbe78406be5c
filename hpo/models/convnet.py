"""Small residual convolutional network."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from hpo.errors import UsageError
from hpo.models.layers import (
    ACTIVATIONS,
    IMAGE_NORMS,
    choose,
    dropout_layer,
    initialize_hidden,
    initialize_output,
    require_at_least_one,
)
from hpo.objective import DataSpec


class ConvNet(nn.Module):
    """A stem of `width // 4` channels, two stages of `blocks` residual blocks with `width` channels, global average.

    Each stage halves the resolution, so that most of the arithmetic is done on few pixels: it is made for a CPU. Takes
    images of any size. With its defaults it has 127 000 parameters and 17 million multiplications an image of 32x32.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        width: int = 64,
        blocks: int = 1,
        activation: str = "relu",
        norm: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(width=width, blocks=blocks)
        if len(spec.input_shape) != 3:
            raise UsageError(f"a ConvNet takes images (C, H, W); this task's inputs have the shape {spec.input_shape}.")
        stem = max(1, width // 4)
        num_inputs = [stem, *[width] * (2 * blocks - 1)]
        self.features = nn.Sequential(
            _convolution(spec.input_shape[0], stem, activation, norm),
            choose("activation", activation, ACTIVATIONS)(),
            *(
                ResidualBlock(channels, width, 2 if index % blocks == 0 else 1, activation, norm)
                for index, channels in enumerate(num_inputs)
            ),
        )
        self.dropout = dropout_layer(dropout)
        self.output = nn.Linear(width, spec.num_outputs)
        initialize_output(self.output)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.dropout(self.features(inputs).mean((2, 3)))))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    He et al. 2016, arXiv:1512.03385.
    """

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, activation: str, norm: str) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            _convolution(num_inputs, num_outputs, activation, norm, stride=stride),
            choose("activation", activation, ACTIVATIONS)(),
            _convolution(num_outputs, num_outputs, activation, norm),
        )
        same_shape = stride == 1 and num_inputs == num_outputs
        self.shortcut = (
            nn.Identity()
            if same_shape
            else _convolution(num_inputs, num_outputs, activation, norm, kernel_size=1, stride=stride)
        )
        self.activation = choose("activation", activation, ACTIVATIONS)()

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.activation(self.residual(inputs) + self.shortcut(inputs)))


def _convolution(
    num_inputs: int, num_outputs: int, activation: str, norm: str, *, kernel_size: int = 3, stride: int = 1
) -> nn.Sequential:
    """A convolution that keeps the resolution but for its stride, and its norm."""
    convolution = nn.Conv2d(num_inputs, num_outputs, kernel_size, stride, padding=kernel_size // 2, bias=norm == "none")
    initialize_hidden(convolution, activation)
    return nn.Sequential(convolution, choose("norm", norm, IMAGE_NORMS)(num_outputs))
