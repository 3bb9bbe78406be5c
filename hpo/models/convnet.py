"""Small residual convolutional network."""

from __future__ import annotations

from dataclasses import dataclass
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
    `norm_first` says whether a norm comes before the activation (at the end of a block, before the sum) or after it.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        width: int = 64,
        blocks: int = 1,
        activation: str = "relu",
        init: str = "auto",
        norm: str = "batch",
        norm_first: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(width=width, blocks=blocks)
        if len(spec.input_shape) != 3:
            raise UsageError(f"a ConvNet takes images (C, H, W); this task's inputs have the shape {spec.input_shape}.")
        stem = max(1, width // 4)
        num_inputs = [stem, *[width] * (2 * blocks - 1)]
        layers = _Layers(activation, init, norm, norm_first)
        self.features = nn.Sequential(
            layers.convolution(spec.input_shape[0], stem),
            layers.activation(stem),
            *(
                ResidualBlock(layers, channels, width, 2 if index % blocks == 0 else 1)
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

    def __init__(self, layers: _Layers, num_inputs: int, num_outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            layers.convolution(num_inputs, num_outputs, stride=stride),
            layers.activation(num_outputs),
            layers.convolution(num_outputs, num_outputs),
        )
        same_shape = stride == 1 and num_inputs == num_outputs
        self.shortcut = (
            nn.Identity() if same_shape else layers.convolution(num_inputs, num_outputs, kernel_size=1, stride=stride)
        )
        self.activation = layers.activation(num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.activation(self.residual(inputs) + self.shortcut(inputs)))


@dataclass(frozen=True)
class _Layers:
    """What all layers of a network have in common."""

    activation_name: str
    init: str
    norm: str
    norm_first: bool

    def convolution(self, num_inputs: int, num_outputs: int, *, kernel_size: int = 3, stride: int = 1) -> nn.Module:
        """A convolution that keeps the resolution but for its stride, and its norm where that comes first."""
        has_norm = self.norm != "none" and self.norm_first
        convolution = nn.Conv2d(
            num_inputs, num_outputs, kernel_size, stride, padding=kernel_size // 2, bias=not has_norm
        )
        initialize_hidden(convolution, self.activation_name, self.init)
        return nn.Sequential(convolution, self._norm(num_outputs)) if self.norm_first else convolution

    def activation(self, num_channels: int) -> nn.Module:
        """The activation, and the norm where that comes after it."""
        activation = choose("activation", self.activation_name, ACTIVATIONS)()
        return activation if self.norm_first else nn.Sequential(activation, self._norm(num_channels))

    def _norm(self, num_channels: int) -> nn.Module:
        return choose("norm", self.norm, IMAGE_NORMS)(num_channels)
