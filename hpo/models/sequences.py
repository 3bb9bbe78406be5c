"""Networks for sequences of ids or numbers: recurrent, a transformer encoder, and one of convolutions in time.

They take one input: `Padded` sequences of different lengths or a tensor (B, L) or (B, L, F), of ids or of numbers. They
answer for the whole sequence, or for each element where the target is one of `tagging` or `transcription`; what fills a
sequence up changes nothing, and no layer waits for a GPU to learn a length.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.data.examples import DataSpec
from hpo.data.parts import Padded
from hpo.errors import UnknownNameError, UsageError
from hpo.models.layers import initialize_output, require_at_least_one, require_share

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}
OF_ELEMENTS = ("tagging", "transcription")


class Recurrent(nn.Module):
    """`depth` layers of `width` LSTM or GRU units, in both directions unless `bidirectional` is False.

    Recurrent weights begin orthogonal (Saxe et al. 2014, arXiv:1312.6120), and an LSTM remembers at first: its forget
    gate has a bias of 1 (Jozefowicz et al. 2015).
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        cell: str = "lstm",
        depth: int = 1,
        width: int = 128,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        require_at_least_one(depth=depth, width=width)
        require_share(dropout=dropout)
        if cell not in CELLS:
            raise UnknownNameError("cell", cell, CELLS)
        num_directions = 2 if bidirectional else 1
        self.elements = Elements(spec, width)
        sizes = [width, *[num_directions * width] * (depth - 1)]
        self.layers = nn.ModuleList(
            nn.ModuleList(CELLS[cell](size, width, batch_first=True) for _ in range(num_directions)) for size in sizes
        )
        self.dropout = nn.Dropout(dropout)
        self.head = Head(spec, num_directions * width)
        for layer in self.layers.modules():
            if isinstance(layer, nn.RNNBase):
                _initialize_recurrent(layer, width)

    def forward(self, inputs: Tensor | Padded) -> Tensor | Padded:
        values, lengths, mask = self.elements(inputs)
        # The other direction begins at each sequence's own end, not in what fills it up.
        positions = torch.arange(values.shape[1], device=values.device)
        backwards = torch.where(mask, lengths[:, None] - 1 - positions, positions)
        for directions in self.layers:
            forwards, *other = cast(nn.ModuleList, directions)
            values = self.dropout(values)
            outputs = [forwards(values)[0]]
            outputs += [_at(layer(_at(values, backwards))[0], backwards) for layer in other]
            values = torch.cat(outputs, dim=-1)
        if self.head.is_of_elements:
            return cast("Tensor | Padded", self.head(values, lengths, mask))
        width = values.shape[-1] // len(outputs)
        last = _at(values, (lengths - 1)[:, None])[:, 0, :width]
        first = values[:, 0, width:]  # where the other direction has seen all
        return cast(Tensor, self.head.output(self.dropout(torch.cat((last, first), dim=1))))


class Transformer(nn.Module):
    """A transformer encoder of `depth` layers with `width` features and `heads`: Vaswani et al. 2017, arXiv:1706.03762.

    Norms come first (Xiong et al. 2020, arXiv:2002.04745), positions are sines, and the answer for a sequence is made
    from the mean over its elements. With `causal` an element sees only itself and those before it.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        depth: int = 2,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.1,
        causal: bool = False,
    ) -> None:
        super().__init__()
        require_at_least_one(depth=depth, width=width, heads=heads)
        require_share(dropout=dropout)
        if width % heads:
            raise UsageError(f"width={width} is not allowed: it must be a multiple of heads={heads}.")
        self.elements = Elements(spec, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.dropout = nn.Dropout(dropout)
        self.head = Head(spec, width)
        self.causal = causal
        for each in self.layers.modules():  # the layers are copies of one, with the same weights
            if isinstance(each, nn.Linear):
                nn.init.xavier_uniform_(each.weight)
                nn.init.zeros_(each.bias)
            elif isinstance(each, nn.MultiheadAttention):
                nn.init.xavier_uniform_(each.in_proj_weight)

    def forward(self, inputs: Tensor | Padded) -> Tensor | Padded:
        values, lengths, mask = self.elements(inputs)
        length, width = values.shape[1:]
        values = self.dropout(values + _sines(length, width, values.device))
        later = torch.ones(length, length, dtype=torch.bool, device=values.device).triu(1) if self.causal else None
        # Not None: torch would compare the mask with a causal one, for which the host waits for the GPU.
        values = self.layers(values, mask=later, src_key_padding_mask=~mask, is_causal=False)
        return cast("Tensor | Padded", self.head(values, lengths, mask))


class ConvNet1d(nn.Module):
    """`blocks` residual blocks of two convolutions over time, each of which sees twice as far as the block before.

    The dilated convolutions of Yu and Koltun 2016, arXiv:1511.07122, with a layer norm for each element, which padding
    does not change.
    """

    def __init__(
        self, spec: DataSpec, *, width: int = 128, blocks: int = 3, kernel_size: int = 5, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require_at_least_one(width=width, blocks=blocks, kernel_size=kernel_size)
        require_share(dropout=dropout)
        self.elements = Elements(spec, width)
        self.blocks = nn.ModuleList(_Block1d(width, kernel_size, 2**number, dropout) for number in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = Head(spec, width)

    def forward(self, inputs: Tensor | Padded) -> Tensor | Padded:
        values, lengths, mask = self.elements(inputs)
        for block in self.blocks:
            values = block(values, mask)
        return cast("Tensor | Padded", self.head(self.norm(values), lengths, mask))


class _Block1d(nn.Module):
    def __init__(self, width: int, kernel_size: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.convolutions = nn.ModuleList(
            nn.Conv1d(width, width, kernel_size, padding="same", dilation=dilation) for _ in range(2)
        )
        self.dropout = nn.Dropout(dropout)
        for convolution in self.convolutions:
            nn.init.kaiming_normal_(cast(Tensor, convolution.weight), nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, convolution.bias))

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        changed = values
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            changed = functional.relu(norm(changed)) * mask.unsqueeze(-1)
            changed = convolution(self.dropout(changed).transpose(1, 2)).transpose(1, 2)
        return values + changed


class Elements(nn.Module):
    """The elements of sequences as features (B, L, width), with their lengths (B,) and mask (B, L).

    Ids get an embedding, normal with a deviation of 0.02 at first and multiplied by the root of the width, so that
    positions do not drown it (Vaswani et al. 2017, section 3.4); numbers a linear layer.
    """

    def __init__(self, spec: DataSpec, width: int) -> None:
        super().__init__()
        given = spec.only_input
        if not given.is_ragged and not given.shape:
            raise UsageError("networks of sequences take (B, length, features); the inputs are one value each.")
        element = given.shape if given.is_ragged else given.shape[1:]
        self.embedding: nn.Module
        if given.vocabulary is not None:
            if element:
                raise UsageError(f"sequence networks take one id per element; the inputs have {element}.")
            self.embedding = nn.Embedding(given.vocabulary, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
        else:
            if len(element) > 1:
                raise UsageError(
                    f"networks of sequences take (B, length, features); elements have the shape {element}."
                )
            self.embedding = nn.Linear(element[0] if element else 1, width)
        self.has_features = bool(element)
        self.is_of_ids = given.vocabulary is not None
        self.scale = math.sqrt(width) if self.is_of_ids else 1.0

    def forward(self, inputs: Tensor | Padded) -> tuple[Tensor, Tensor, Tensor]:
        if not isinstance(inputs, Padded):
            inputs = Padded(inputs, torch.full(inputs.shape[:1], inputs.shape[1], device=inputs.device))
        values = inputs.values.long() if self.is_of_ids else inputs.values
        if not self.is_of_ids and not self.has_features:
            values = values.unsqueeze(-1)
        mask = inputs.mask
        return self.embedding(values) * (self.scale * mask.unsqueeze(-1)), inputs.lengths, mask


class Head(nn.Module):
    """From features of elements (B, L, width) to the outputs that the kind of target wants."""

    def __init__(self, spec: DataSpec, width: int) -> None:
        super().__init__()
        self.is_of_elements = spec.kind in OF_ELEMENTS
        self.is_transcribed = spec.kind == "transcription"
        self.output = nn.Linear(width, spec.num_outputs)
        initialize_output(self.output)

    def forward(self, values: Tensor, lengths: Tensor, mask: Tensor) -> Tensor | Padded:
        if self.is_transcribed:
            return Padded(self.output(values), lengths)
        if self.is_of_elements:
            return cast(Tensor, self.output(values))
        mean = (values * mask.unsqueeze(-1)).sum(1) / lengths[:, None]
        return cast(Tensor, self.output(mean))


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Elements (B, P, F) at these positions (B, P) of sequences (B, L, F)."""
    return values.gather(1, positions.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def _sines(length: int, width: int, device: torch.device) -> Tensor:
    """Positions as sines and cosines of wavelengths up to 10 000, (length, width)."""
    positions = torch.arange(length, device=device, dtype=torch.float32)[:, None]
    rates = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10_000.0) / width))
    return torch.stack((torch.sin(positions * rates), torch.cos(positions * rates)), dim=-1).flatten(1)[:, :width]


def _initialize_recurrent(layer: nn.RNNBase, width: int) -> None:
    for name, parameter in layer.named_parameters():
        if name.startswith("weight_hh"):
            for gate in torch.split(parameter.data, width):
                nn.init.orthogonal_(gate)
        elif name.startswith("weight_ih"):
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)
            if isinstance(layer, nn.LSTM) and name.startswith("bias_ih"):
                parameter.data[width : 2 * width] = 1.0  # the forget gate
