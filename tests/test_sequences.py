"""The networks for sequences and tables that ship."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo import (
    Dataset,
    DataSpec,
    InputSpec,
    Padded,
    Ragged,
    TrainConfig,
    UnknownNameError,
    UsageError,
    convnet1d,
    hold_out,
    mlp,
    recurrent,
    split_dataset,
    tabular,
    transformer,
)
from hpo.models.preprocessed import PreprocessedModel
from hpo.training.trainer import fit

NETWORKS: dict[str, Callable[[DataSpec], nn.Module]] = {
    "lstm": lambda spec: recurrent(spec, width=16),
    "deep gru": lambda spec: recurrent(spec, cell="gru", depth=2, width=16),
    "lstm in one direction": lambda spec: recurrent(spec, width=16, bidirectional=False),
    "transformer": lambda spec: transformer(spec, width=16, heads=2, dropout=0.0),
    "conv net": lambda spec: convnet1d(spec, width=16, blocks=2),
}
IDS = InputSpec((), "int64", is_ragged=True, vocabulary=9)
NUMBERS = InputSpec((3,), "float32", is_ragged=True)


def sequences(of_input: InputSpec) -> Padded:
    torch.manual_seed(0)
    lengths = (5, 1, 9, 3)
    rows = [torch.randint(9, (n,)) if of_input.vocabulary else torch.randn(n, 3) for n in lengths]
    return Ragged.of(rows).padded(slice(0, 4), slice(0, 4))


def alone(batch: Padded, row: int) -> Padded:
    return Padded(batch.values[row : row + 1, : int(batch.lengths[row])], batch.lengths[row : row + 1])


@pytest.mark.parametrize("of_input", [IDS, NUMBERS], ids=["ids", "numbers"])
@pytest.mark.parametrize("kind", ["classification", "tagging", "transcription"])
@pytest.mark.parametrize("name", NETWORKS)
def test_what_fills_a_sequence_up_changes_nothing(name: str, kind: str, of_input: InputSpec) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name](DataSpec(of_input, ("a", "b"), kind))
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)
    batch = sequences(of_input)
    garbage = torch.where(batch.mask.view(*batch.mask.shape, *[1] * (batch.values.ndim - 2)), batch.values, 7)
    together = network.eval()(Padded(garbage.to(batch.values.dtype), batch.lengths))
    assert isinstance(together, Padded if kind == "transcription" else Tensor)
    outputs = together.values if isinstance(together, Padded) else together
    for row, length in enumerate(batch.lengths.tolist()):
        single = network(alone(batch, row))
        single = single.values if isinstance(single, Padded) else single
        expected = outputs[row, :length] if kind != "classification" else outputs[row]
        torch.testing.assert_close(single[0], expected, rtol=1e-4, atol=1e-5)


def ordered() -> Dataset:
    """Which of two ids comes first: nothing that a bag of ids could tell."""
    draw = torch.Generator().manual_seed(0)
    rows, labels = [], []
    for length in torch.randint(6, 14, (600,), generator=draw).tolist():
        row = torch.randint(2, 9, (length,), generator=draw)
        first, second = torch.randperm(length, generator=draw)[:2].tolist()
        row[first], row[second] = 0, 1
        rows.append(row)
        labels.append(int(first < second))
    return hold_out(Ragged.of(rows), torch.tensor(labels), ["after", "before"])


def accuracy(network: Callable[[DataSpec], nn.Module], data: Dataset, epochs: int, lr: float = 3e-3) -> float:
    splits = split_dataset(data, seed=0)
    torch.manual_seed(0)
    model = PreprocessedModel(network(splits.spec), splits.spec)
    model.fit_statistics(splits.train)
    config = TrainConfig(max_epochs=epochs, batch_size=16, lr=lr, compile="off", patience=epochs)
    *_, last = fit(model, splits, config)
    assert last.best_value is not None
    return last.best_value


@pytest.mark.parametrize(
    ("name", "lr", "reached"),
    [("lstm", 1e-2, 0.9), ("deep gru", 1e-2, 0.9), ("transformer", 3e-3, 0.7), ("conv net", 1e-2, 0.9)],
)
def test_each_network_learns_from_the_order_of_a_sequence(name: str, lr: float, reached: float) -> None:
    networks = {
        "lstm": lambda spec: recurrent(spec, width=32),
        "deep gru": lambda spec: recurrent(spec, cell="gru", depth=2, width=32),
        "transformer": lambda spec: transformer(spec, width=32, heads=2, dropout=0.0),
        "conv net": lambda spec: convnet1d(spec, width=32),
    }
    assert accuracy(networks[name], ordered(), epochs=12, lr=lr) > reached


def test_sequences_of_one_length_are_taken_as_they_are() -> None:
    ids, numbers = torch.randint(9, (4, 6)), torch.randn(4, 6)
    for inputs, of_input in ((ids, InputSpec((6,), "int64", vocabulary=9)), (numbers, InputSpec((6,)))):
        for network in NETWORKS.values():
            assert network(DataSpec(of_input, ("a", "b")))(inputs).shape == (4, 2)


def test_an_element_of_a_causal_transformer_sees_none_that_comes_later() -> None:
    torch.manual_seed(0)
    network = transformer(DataSpec(IDS, ("a", "b"), "tagging"), width=16, heads=2, causal=True).eval()
    batch = sequences(IDS)
    changed = Padded(batch.values.clone(), batch.lengths)
    changed.values[2, 6:] = 0
    before, after = network(batch)[2], network(changed)[2]
    torch.testing.assert_close(before[:6], after[:6])
    assert not torch.allclose(before[6:], after[6:])


def test_weights_begin_as_their_layer_needs_it() -> None:
    torch.manual_seed(0)
    of_ids = DataSpec(InputSpec((), "int64", is_ragged=True, vocabulary=500), ("a", "b"))
    network: Any = recurrent(of_ids, width=32)
    lstm = network.layers[0][0]
    for gate in lstm.weight_hh_l0.split(32):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), atol=1e-5, rtol=0)
    assert lstm.bias_ih_l0[32:64].tolist() == [1.0] * 32
    assert lstm.bias_ih_l0[:32].tolist() == lstm.bias_hh_l0[:32].tolist() == [0.0] * 32
    assert network.elements.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    layers: Any = transformer(of_ids, depth=2, width=32).layers
    assert not torch.equal(layers.layers[0].linear1.weight, layers.layers[1].linear1.weight)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: recurrent(DataSpec(IDS, ("a", "b")), cell="rnn"), "no cell 'rnn'"),
        (lambda: transformer(DataSpec(IDS, ("a", "b")), width=30), "width=30 .* must be a multiple of heads=4"),
        (lambda: convnet1d(DataSpec(IDS, ("a", "b")), dropout=1.5), "dropout=1.5"),
        (lambda: recurrent(DataSpec((3, 8, 8), ("a", "b"))), r"elements have the shape \(8, 8\)"),
        (
            lambda: recurrent(DataSpec(InputSpec(()), ("a", "b"))),
            "the inputs are one value each",
        ),
        (lambda: tabular(DataSpec(IDS, ("a", "b"))), "takes no sequences; use hpo.recurrent"),
    ],
)
def test_what_a_network_cannot_be_is_reported(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises((UsageError, UnknownNameError), match=message):
        make()


@pytest.mark.parametrize("residual", [False, True])
def test_a_table_of_numbers_and_categories_is_learned_from_both(residual: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randn(600, 3, generator=draw)
    categories = torch.randint(4, (600, 2), generator=draw)
    labels = ((numbers[:, 0] > 0) ^ (categories[:, 1] < 2)).long()
    data = hold_out({"numbers": numbers, "categories": categories}, labels, ["no", "yes"])
    assert accuracy(lambda spec: tabular(spec, width=64, residual=residual), data, epochs=10, lr=1e-2) > 0.93


def test_each_category_has_an_embedding_no_larger_than_half_of_its_values() -> None:
    spec = DataSpec({"colour": InputSpec((2,), "int64", vocabulary=100, categories=(3, 100))}, ("a", "b"))
    network: Any = tabular(spec, embedding=8)
    sizes = [(layer.num_embeddings, layer.embedding_dim) for layer in network.embeddings[0]]
    assert sizes == [(3, 2), (100, 8)]


@pytest.mark.parametrize("network", [mlp, tabular])
def test_networks_of_features_take_one_number_for_each_example(network: Callable[[DataSpec], nn.Module]) -> None:
    assert network(DataSpec(InputSpec(()), ("a", "b")))(torch.randn(5)).shape == (5, 2)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int16, torch.int32])
@pytest.mark.parametrize("network", [tabular, recurrent])
def test_ids_may_be_integers_of_any_size(network: Callable[[DataSpec], nn.Module], dtype: torch.dtype) -> None:
    spec = DataSpec(InputSpec((3,), str(dtype).removeprefix("torch."), vocabulary=2), ("a", "b"))
    assert network(spec)(torch.ones(5, 3, dtype=dtype)).shape == (5, 2)


def test_a_category_that_only_later_data_have_is_a_vector_of_zeros() -> None:
    spec = DataSpec(InputSpec((2,), "int64", vocabulary=9, categories=(3, 9)), ("a", "b"))
    network: Any = tabular(spec).eval()
    later, known = torch.tensor([[3, 8], [7, 8]]), torch.tensor([[0, 8]])
    assert not torch.equal(network(known), network(later[:1]))
    with torch.no_grad():
        network.embeddings[0][0].weight[0] = 0.0
    torch.testing.assert_close(network(later), network(known).expand(2, -1))
    assert torch.equal(network(known), network.train()(known))
