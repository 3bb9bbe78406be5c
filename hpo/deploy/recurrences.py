"""LSTM and GRU layers as loops, which a graph can hold: torch.export unrolls PyTorch's own for one length alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops import scan
from torch.nn.functional import linear

State = tuple[Tensor, ...]
"""What a layer carries from one element to the next, each (B, H)."""


@contextmanager
def as_loops(model: nn.Module) -> Iterator[None]:
    """Let the LSTM and GRU layers of a model in evaluation mode compute what they compute by `scan`."""
    layers = [
        each for each in model.modules() if isinstance(each, nn.RNNBase) and type(each) in _STEPS and not each.proj_size
    ]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.RNNBase, values: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """As the layer's own, for a batch of sequences: (B, L, F) with `batch_first`, else (L, B, F)."""
    name = type(layer).__name__
    if not isinstance(values, Tensor) or values.dim() != 3:
        raise NotImplementedError(f"an {name} is exported with a tensor of three dimensions, not packed sequences")
    num_states, step = _STEPS[type(layer)]
    sequence = values.transpose(0, 1) if layer.batch_first else values
    given = (state,) if isinstance(state, Tensor) else state
    last: list[State] = []
    for depth in range(layer.num_layers):
        outputs = []
        for suffix in (f"_l{depth}", f"_l{depth}_reverse")[: 1 + layer.bidirectional]:
            zeros = sequence.new_zeros(sequence.shape[1], layer.hidden_size)
            first = tuple((given[part][len(last)] if given else zeros).clone() for part in range(num_states))
            is_reverse = suffix.endswith("reverse")
            end, output = _run(layer, suffix, step, first, sequence.flip(0) if is_reverse else sequence)
            last.append(end)
            outputs.append(output.flip(0) if is_reverse else output)
        sequence = torch.cat(outputs, dim=-1)
    final = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
    return sequence.transpose(0, 1) if layer.batch_first else sequence, final if num_states > 1 else final[0]


def _run(
    layer: nn.RNNBase, suffix: str, step: Callable[[State, Tensor, Tensor], State], first: State, sequence: Tensor
) -> tuple[State, Tensor]:
    """The last state and the outputs (L, B, H) of one layer in one direction."""
    weight, bias = getattr(layer, f"weight_hh{suffix}"), getattr(layer, f"bias_hh{suffix}", None)
    of_inputs = linear(sequence, getattr(layer, f"weight_ih{suffix}"), getattr(layer, f"bias_ih{suffix}", None))

    def advance(state: State, of_input: Tensor) -> tuple[State, Tensor]:
        state = step(state, of_input, linear(state[0], weight, bias))
        return state, state[0].clone()

    end, outputs = scan(advance, first, of_inputs)
    return end, outputs


def _lstm_step(state: State, of_input: Tensor, of_hidden: Tensor) -> State:
    """Hochreiter and Schmidhuber 1997, with PyTorch's order of the gates."""
    add, forget, new, output = (of_input + of_hidden).chunk(4, dim=-1)
    cell = forget.sigmoid() * state[1] + add.sigmoid() * new.tanh()
    return output.sigmoid() * cell.tanh(), cell


def _gru_step(state: State, of_input: Tensor, of_hidden: Tensor) -> State:
    """Cho et al. 2014, arXiv:1406.1078, with PyTorch's order of the gates."""
    (reset, update, new), hidden = of_input.chunk(3, dim=-1), of_hidden.chunk(3, dim=-1)
    keep = (update + hidden[1]).sigmoid()
    return ((1 - keep) * (new + (reset + hidden[0]).sigmoid() * hidden[2]).tanh() + keep * state[0],)


_STEPS: dict[type, tuple[int, Callable[[State, Tensor, Tensor], State]]] = {
    nn.LSTM: (2, _lstm_step),
    nn.GRU: (1, _gru_step),
}
"""How many parts the state of a layer has, and the next state from this one, the input and the hidden state."""
