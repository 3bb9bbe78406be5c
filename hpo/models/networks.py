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
    """A classification model of torchvision's, for photos; see hpo.models.pretrained.PretrainedNetwork."""
    from hpo.models.pretrained import PretrainedNetwork

    return PretrainedNetwork(
        spec,
        architecture=architecture,
        weights=weights,
        image_size=image_size,
        trainable_layers=trainable_layers,
    )
