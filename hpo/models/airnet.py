"""The network of airbench94, made to learn CIFAR-10 in as little time as possible."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from hpo.data.examples import DataSpec
from hpo.errors import UsageError
from hpo.models.layers import dropout_layer, require_at_least_one

WHITENING_EPS = 5e-4


class AirNet(nn.Module):
    """A frozen whitening layer, three pairs of 3x3 convolutions with `width`, 4 and 4 times `width` channels, GELU.

    Jordan 2024, arXiv:2404.00498, section 3: the first layer decorrelates patches of 2x2 pixels and is taken from the
    data, convolutions begin as the identity on as many channels as they get, norms learn a shift but no scale, and the
    logits are scaled down. Its biases' rate of 64 times the others' is left out. With its default width of 64 it has
    1.97 million parameters, and takes images of 16 pixels and more. Calls for `initialize_from_data` before a training.
    """

    def __init__(self, spec: DataSpec, *, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        require_at_least_one(width=width)
        if len(spec.input_shape) != 3:
            raise UsageError(f"an AirNet takes images (C, H, W); this task's inputs have the shape {spec.input_shape}.")
        num_patch_values = 4 * spec.input_shape[0]
        self.whitening = nn.Conv2d(spec.input_shape[0], 2 * num_patch_values, kernel_size=2)
        self.whitening.weight.requires_grad = False
        self.features = nn.Sequential(
            nn.GELU(),
            _convolutions(2 * num_patch_values, width),
            _convolutions(width, 4 * width),
            _convolutions(4 * width, 4 * width),
            GlobalMaxPool(),
            dropout_layer(dropout),
        )
        self.output = nn.Linear(4 * width, spec.num_outputs, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.output(self.features(self.whitening(inputs))) / 9)

    @torch.no_grad()
    def initialize_from_data(self, inputs: Tensor) -> None:
        """Let the whitening layer's filters be the principal components of the patches, scaled to unit variance, and
        their negatives, so that nothing is lost in the activation that follows."""
        channels = inputs.shape[1]
        patches = nn.functional.unfold(inputs.double(), kernel_size=2).transpose(1, 2).reshape(-1, 4 * channels)
        variances, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (components / (variances + WHITENING_EPS).sqrt()).T.view(-1, channels, 2, 2)
        self.whitening.weight.copy_(torch.cat((filters, -filters)))
        nn.init.zeros_(cast(Tensor, self.whitening.bias))


class GlobalMaxPool(nn.Module):
    """The largest value of each channel: (B, C, H, W) to (B, C).

    AdaptiveMaxPool2d has no deterministic form on CUDA.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.flatten(2).max(2).values


def _convolutions(num_inputs: int, num_outputs: int) -> nn.Sequential:
    """Two convolutions, the resolution halved between them."""
    return nn.Sequential(
        _convolution(num_inputs, num_outputs),
        nn.MaxPool2d(2),
        _norm(num_outputs),
        nn.GELU(),
        _convolution(num_outputs, num_outputs),
        _norm(num_outputs),
        nn.GELU(),
    )


def _convolution(num_inputs: int, num_outputs: int) -> nn.Conv2d:
    convolution = nn.Conv2d(num_inputs, num_outputs, kernel_size=3, padding="same", bias=False)
    nn.init.dirac_(convolution.weight[:num_inputs].detach())
    return convolution


def _norm(num_channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(num_channels, eps=1e-12, momentum=0.4)
    norm.weight.requires_grad = False
    return norm
