"""The networks that ship, as a task names them: `Objective(model=mlp)`. torch is imported when one is built."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from hpo.data.examples import DataSpec


def mlp(
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
) -> nn.Module:
    """A multilayer perceptron, for images and vectors; see hpo.models.mlp.MLP."""
    from hpo.models.mlp import MLP

    return MLP(
        spec,
        depth=depth,
        width=width,
        activation=activation,
        init=init,
        norm=norm,
        norm_first=norm_first,
        dropout=dropout,
        dropout_type=dropout_type,
    )


def convnet(
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
) -> nn.Module:
    """A small residual convolutional network; see hpo.models.convnet.ConvNet."""
    from hpo.models.convnet import ConvNet

    return ConvNet(
        spec,
        width=width,
        blocks=blocks,
        activation=activation,
        init=init,
        norm=norm,
        norm_first=norm_first,
        dropout=dropout,
        dropout_type=dropout_type,
        stochastic_depth=stochastic_depth,
    )


def airnet(spec: DataSpec, *, width: int = 64, dropout: float = 0.0) -> nn.Module:
    """A convolutional network that learns small photographs in few epochs; see hpo.models.airnet.AirNet."""
    from hpo.models.airnet import AirNet

    return AirNet(spec, width=width, dropout=dropout)


def pretrained(
    spec: DataSpec,
    *,
    architecture: str = "resnet18",
    weights: str = "default",
    image_size: int = 0,
    trainable_layers: int = -1,
) -> nn.Module:
    """A classification model of torchvision or timm, for photos; see hpo.models.pretrained.PretrainedNetwork."""
    from hpo.models.pretrained import PretrainedNetwork

    return PretrainedNetwork(
        spec,
        architecture=architecture,
        weights=weights,
        image_size=image_size,
        trainable_layers=trainable_layers,
    )


def unet(
    spec: DataSpec,
    *,
    width: int = 16,
    depth: int = 2,
    activation: str = "relu",
    norm: str = "batch",
    dropout: float = 0.0,
) -> nn.Module:
    """A small U-Net, for a class of each pixel; see hpo.models.unet.UNet."""
    from hpo.models.unet import UNet

    return UNet(spec, width=width, depth=depth, activation=activation, norm=norm, dropout=dropout)


def recurrent(
    spec: DataSpec,
    *,
    cell: str = "lstm",
    depth: int = 1,
    width: int = 128,
    bidirectional: bool = True,
    dropout: float = 0.0,
) -> nn.Module:
    """An LSTM or GRU for sequences of ids or numbers; see hpo.models.sequences.Recurrent."""
    from hpo.models.sequences import Recurrent

    return Recurrent(spec, cell=cell, depth=depth, width=width, bidirectional=bidirectional, dropout=dropout)


def transformer(
    spec: DataSpec, *, depth: int = 2, width: int = 128, heads: int = 4, dropout: float = 0.1, causal: bool = False
) -> nn.Module:
    """A small transformer encoder for sequences of ids or numbers; see hpo.models.sequences.Transformer."""
    from hpo.models.sequences import Transformer

    return Transformer(spec, depth=depth, width=width, heads=heads, dropout=dropout, causal=causal)


def convnet1d(
    spec: DataSpec, *, width: int = 128, blocks: int = 3, kernel_size: int = 5, dropout: float = 0.0
) -> nn.Module:
    """A network of convolutions over time, for sequences of ids or numbers; see hpo.models.sequences.ConvNet1d."""
    from hpo.models.sequences import ConvNet1d

    return ConvNet1d(spec, width=width, blocks=blocks, kernel_size=kernel_size, dropout=dropout)


def tabular(
    spec: DataSpec,
    *,
    depth: int = 2,
    width: int = 128,
    embedding: int = 16,
    residual: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """An MLP or ResNet for tables of numbers and categories; see hpo.models.tabular.Tabular."""
    from hpo.models.tabular import Tabular

    return Tabular(spec, depth=depth, width=width, embedding=embedding, residual=residual, dropout=dropout)
