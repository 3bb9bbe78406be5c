"""Small residual convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from hpo.data.examples import DataSpec
from hpo.errors import UsageError
from hpo.models.layers import (
    ACTIVATIONS,
    IMAGE_NORMS,
    choose,
    dropout_layer,
    initialize_hidden,
    initialize_output,
    require_at_least_one,
    require_share,
    scale_to_unit_variance,
)

FEWEST_CHANNELS = 8
"""Channels from which a 1x1 convolution may have a stride."""

DROPOUT_TYPES: dict[str, Callable[[float], nn.Module] | None] = {
    "dropout": None,  # before the output layer, not in the blocks
    "spatial": nn.Dropout2d,
    "dropblock": lambda dropout: DropBlock(dropout, block_size=3),
}


class ConvNet(nn.Module):
    """A stem of `width // 4` channels, two stages of `blocks` residual blocks with `width` channels, global average.

    Each stage halves the resolution, so that most of the arithmetic is done on few pixels: it is made for a CPU. Takes
    images of any size. With its defaults it has 127 000 parameters and 17 million multiplications an image of 32x32.
    `norm_first` says whether a norm comes before the activation (at the end of a block, before the sum) or after it.

    `dropout` drops features before the output layer. With a `dropout_type` of "spatial" it drops whole channels in the
    middle of each block (Tompson et al. 2015, arXiv:1411.4280), with "dropblock" squares of 3x3 positions there (Ghiasi
    et al. 2018, arXiv:1810.12890). `stochastic_depth` is the chance that an example skips the convolutions of the last
    block; those before it are skipped less often, in proportion to their depth (Huang et al. 2016, arXiv:1603.09382).
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
        dropout_type: str = "dropout",
        stochastic_depth: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(width=width, blocks=blocks)
        require_share(dropout=dropout, stochastic_depth=stochastic_depth)
        if len(spec.input_shape) != 3:
            raise UsageError(f"a ConvNet takes images (C, H, W); this task's inputs have the shape {spec.input_shape}.")
        stem = max(1, width // 4)
        num_blocks = 2 * blocks
        num_inputs = [stem, *[width] * (num_blocks - 1)]
        layers = _Layers(activation, init, norm, norm_first, dropout, dropout_type)
        self._init = init
        self.features = nn.Sequential(
            layers.convolution(spec.input_shape[0], stem),
            layers.activation(stem),
            *(
                ResidualBlock(
                    layers,
                    channels,
                    width,
                    stride=2 if index % blocks == 0 else 1,
                    skipped=stochastic_depth * (index + 1) / num_blocks,
                )
                for index, channels in enumerate(num_inputs)
            ),
        )
        self.dropout = dropout_layer(dropout if dropout_type == "dropout" else 0.0)
        self.output = nn.Linear(width, spec.num_outputs)
        initialize_output(self.output)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.dropout(self.features(inputs).mean((2, 3)))))

    def initialize_from_data(self, inputs: Tensor) -> None:
        """The second half of `init="lsuv"`."""
        if self._init == "lsuv":
            scale_to_unit_variance(self, [m for m in self.features.modules() if isinstance(m, nn.Conv2d)], inputs)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes.

    He et al. 2016, arXiv:1512.03385.
    """

    def __init__(self, layers: _Layers, num_inputs: int, num_outputs: int, *, stride: int, skipped: float) -> None:
        """`skipped` is the chance of an example to take the shortcut alone."""
        super().__init__()
        self.residual = nn.Sequential(
            layers.convolution(num_inputs, num_outputs, stride=stride),
            layers.activation(num_outputs),
            *layers.dropout(),
            layers.convolution(num_outputs, num_outputs),
            *([_stochastic_depth(skipped)] if skipped else []),
        )
        # With a stride, a 1x1 convolution of few channels writes past its memory in oneDNN's backward pass for AVX2
        # (https://github.com/uxlfoundation/oneDNN/issues/6035, seen with torch 2.15). So it gets every second pixel.
        self.step = stride if num_inputs < FEWEST_CHANNELS else 1
        same_shape = stride == 1 and num_inputs == num_outputs
        self.shortcut = (
            nn.Identity()
            if same_shape
            else layers.convolution(num_inputs, num_outputs, kernel_size=1, stride=stride // self.step)
        )
        self.activation = layers.activation(num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        seen = inputs if self.step == 1 else inputs[:, :, :: self.step, :: self.step]
        return cast(Tensor, self.activation(self.residual(inputs) + self.shortcut(seen)))


class DropBlock(nn.Module):
    """torchvision's, which cannot drop squares that are larger than the image: there it drops single positions."""

    def __init__(self, dropout: float, block_size: int) -> None:
        super().__init__()
        from torchvision.ops import drop_block2d  # seconds that most can do without

        self.dropout, self.block_size = dropout, block_size
        self._drop: Callable[..., Tensor] = drop_block2d

    def forward(self, inputs: Tensor) -> Tensor:
        size = self.block_size if min(inputs.shape[-2:]) >= self.block_size else 1
        return self._drop(inputs, self.dropout, size, training=self.training)

    def extra_repr(self) -> str:
        return f"{self.dropout}, block_size={self.block_size}"


def _stochastic_depth(skipped: float) -> nn.Module:
    from torchvision.ops import StochasticDepth

    return cast(nn.Module, StochasticDepth(skipped, mode="row"))


@dataclass(frozen=True)
class _Layers:
    """What all layers of a network have in common."""

    activation_name: str
    init: str
    norm: str
    norm_first: bool
    dropout_rate: float
    dropout_type: str

    def convolution(self, num_inputs: int, num_outputs: int, *, kernel_size: int = 3, stride: int = 1) -> nn.Module:
        """A convolution that keeps the resolution except for its stride, and its norm where that comes first."""
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

    def dropout(self) -> list[nn.Module]:
        """What is dropped between the convolutions of a block, if anything."""
        build = choose("dropout_type", self.dropout_type, DROPOUT_TYPES)
        return [build(self.dropout_rate)] if build and self.dropout_rate else []

    def _norm(self, num_channels: int) -> nn.Module:
        return choose("norm", self.norm, IMAGE_NORMS)(num_channels)
