"""A class for each pixel: a small U-Net."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.data.examples import DataSpec
from hpo.errors import UsageError
from hpo.models.layers import (
    ACTIVATIONS,
    IMAGE_NORMS,
    choose,
    initialize_hidden,
    initialize_output,
    require_at_least_one,
    require_share,
)


class UNet(nn.Module):
    """Ronneberger et al. 2015, arXiv:1505.04597: `depth` times the resolution is halved, and then doubled again.

    Each level has two 3x3 convolutions and twice the channels of the level above, which has `width`; on the way back a
    level also sees what it had on the way down. Takes images (B, C, H, W) of any size, returns (B, classes, H, W).
    `dropout` drops whole channels at the lowest resolution.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        width: int = 16,
        depth: int = 2,
        activation: str = "relu",
        norm: str = "batch",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(width=width, depth=depth)
        require_share(dropout=dropout)
        if len(spec.input_shape) != 3:
            raise UsageError(f"a U-Net takes images (C, H, W); this task's inputs have the shape {spec.input_shape}.")
        if min(spec.input_shape[1:]) < 2**depth:
            raise UsageError(
                f"depth={depth} is not allowed: it halves images of {spec.input_shape[1]}x{spec.input_shape[2]} pixels "
                "to nothing; take less."
            )
        channels = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _level(before, after, activation, norm)
            for before, after in zip([spec.input_shape[0], *channels], channels, strict=False)
        )
        self.dropout = nn.Dropout2d(dropout)
        self.up = nn.ModuleList(
            _level(channels[level] + channels[level + 1], channels[level], activation, norm)
            for level in reversed(range(depth))
        )
        self.output = nn.Conv2d(width, spec.num_outputs, 1)
        initialize_output(self.output)

    def forward(self, inputs: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for level in self.down:
            inputs = level(functional.max_pool2d(inputs, 2) if seen else inputs)
            seen.append(inputs)
        inputs = self.dropout(seen.pop())
        for level in self.up:
            beside = seen.pop()
            enlarged = functional.interpolate(inputs, size=beside.shape[-2:], mode="nearest")
            inputs = level(torch.cat((beside, enlarged), dim=1))
        outputs: Tensor = self.output(inputs)
        return outputs


def _level(num_inputs: int, num_outputs: int, activation: str, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (num_inputs, num_outputs):
        convolution = nn.Conv2d(channels, num_outputs, 3, padding=1, bias=norm == "none")
        initialize_hidden(convolution, activation)
        layers += [convolution, choose("norm", norm, IMAGE_NORMS)(num_outputs)]
        layers += [choose("activation", activation, ACTIVATIONS)()]
    return nn.Sequential(*layers)
