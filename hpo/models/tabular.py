"""A network for tables: numbers and categories, each category with an embedding of its own."""

from __future__ import annotations

from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from hpo.data.examples import DataSpec, InputSpec
from hpo.data.parts import tensors_of
from hpo.errors import UsageError
from hpo.models.layers import dropout_layer, initialize_hidden, initialize_output, require_at_least_one, require_share


class Tabular(nn.Module):
    """An MLP, or with `residual` the ResNet for tables of Gorishniy et al. 2021, arXiv:2106.11959, section 3.2.

    Inputs are a table of numbers (B, F), one of categories (B, K) int64, or several of them. A category of n values has
    n vectors of `embedding` features, or of half of n where that is less; one that only later data have is all zeros.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        depth: int = 2,
        width: int = 128,
        embedding: int = 16,
        residual: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(depth=depth, width=width, embedding=embedding)
        require_share(dropout=dropout)
        self.embeddings = nn.ModuleList()
        size = 0
        for name, of_input in spec.input_specs.items():
            columns = _categories(name, of_input)
            if columns is None:
                size += prod(of_input.shape)
                continue
            layers = nn.ModuleList(nn.Embedding(n, min(embedding, (n + 1) // 2)) for n in columns)
            size += sum(cast(nn.Embedding, layer).embedding_dim for layer in layers)
            self.embeddings.append(layers)
        for layer in self.embeddings.modules():
            if isinstance(layer, nn.Embedding):
                nn.init.normal_(layer.weight, std=0.02)
        self.layers = _residual(size, width, depth, dropout) if residual else _plain(size, width, depth, dropout)
        self.output = nn.Linear(width, spec.num_outputs)
        initialize_output(self.output)

    def forward(self, inputs: Any) -> Tensor:
        features: list[Tensor] = []
        embeddings = iter(self.embeddings)
        for part in tensors_of(inputs):
            columns = part.flatten(1) if part.ndim > 1 else part.unsqueeze(1)
            if part.is_floating_point():
                features.append(columns)
                continue
            layers = cast(nn.ModuleList, next(embeddings))
            features += [self._embedded(layer, ids) for layer, ids in zip(layers, columns.unbind(1), strict=True)]
        return cast(Tensor, self.output(self.layers(torch.cat(features, dim=1))))

    def _embedded(self, layer: nn.Module, ids: Tensor) -> Tensor:
        """The vectors (B, features) of a column's categories (B,)."""
        ids = ids.long()
        if self.training:  # of these examples each column has its number of categories
            return cast(Tensor, layer(ids))
        is_known = ids < cast(nn.Embedding, layer).num_embeddings
        return cast(Tensor, layer(ids.where(is_known, 0))) * is_known.unsqueeze(1)


def _categories(name: str, of_input: InputSpec) -> tuple[int, ...] | None:
    """How many values each column of an input has; None for numbers."""
    if of_input.is_ragged:
        raise UsageError(f"a network for tables takes no sequences{f' ({name})' if name else ''}; use hpo.recurrent.")
    if of_input.vocabulary is None:
        return None
    return of_input.categories or (of_input.vocabulary,) * prod(of_input.shape)


def _plain(size: int, width: int, depth: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in [size, *[width] * (depth - 1)]:
        linear = nn.Linear(inputs, width)
        initialize_hidden(linear, "relu")
        layers += [linear, nn.ReLU(), dropout_layer(dropout)]
    return nn.Sequential(*layers)


def _residual(size: int, width: int, depth: int, dropout: float) -> nn.Sequential:
    blocks = [_Block(width, dropout) for _ in range(depth)]
    return nn.Sequential(nn.Linear(size, width), *blocks, nn.BatchNorm1d(width), nn.ReLU())


class _Block(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        hidden, output = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        initialize_hidden(hidden, "relu")
        initialize_hidden(output, "relu")
        self.layers = nn.Sequential(nn.BatchNorm1d(width), hidden, nn.ReLU(), dropout_layer(dropout), output)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + cast(Tensor, self.layers(inputs))
