"""Examples of any shape: sequences, mappings and tuples, stored, divided, saved and put into batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo import DataError, Dataset, DataSpec, Padded, Ragged, Split, Splits, UsageError, hold_out, split_dataset
from hpo.data.batches import TrainingBatches, evaluation_batches
from hpo.data.datasets import all_examples, folds, load_splits, save_splits
from hpo.data.fingerprint import data_fingerprint
from hpo.models.preprocessed import PreprocessedModel

SEQUENCES = [[5, 6, 7], [1], [2, 3], [9, 9, 9, 9], [4, 8]]


def mixed_data(num_examples: int = 40) -> Dataset:
    """Two inputs, one of them of sequences, whose row number is in each part."""
    rows = torch.arange(num_examples)
    words = Ragged.of([torch.full((1 + row % 5,), row) for row in range(num_examples)])
    return hold_out({"words": words, "numbers": rows[:, None].float()}, rows % 2, ["even", "odd"])


def rows_of(inputs: Any) -> list[int]:
    return [int(row) for row in inputs["numbers"][:, 0]]


def test_a_batch_of_sequences_is_padded_to_the_longest_of_them() -> None:
    ragged = Ragged.of(SEQUENCES, padding=-1)
    for rows in (torch.tensor([2, 0]), slice(1, 3)):
        batch = ragged.padded(rows, rows)
        wanted = [SEQUENCES[row] for row in torch.arange(5)[rows].tolist()]
        longest = max(map(len, wanted))
        assert batch.values.tolist() == [row + [-1] * (longest - len(row)) for row in wanted]
        assert batch.lengths.tolist() == [len(row) for row in wanted]
        assert batch.mask.tolist() == [[position < len(row) for position in range(longest)] for row in wanted]
        assert len(batch) == 2


def test_sequences_may_have_elements_of_any_shape() -> None:
    sequences = [torch.randn(length, 2, 3) for length in (4, 1, 2)]
    batch = Ragged.of(sequences).padded(slice(0, 3), slice(0, 3))
    assert batch.values.shape == (3, 4, 2, 3)
    for row, sequence in enumerate(sequences):
        assert torch.equal(batch.values[row, : len(sequence)], sequence)
        assert not batch.values[row, len(sequence) :].any()


def test_chosen_sequences_are_stored_without_the_others() -> None:
    chosen = Ragged.of(SEQUENCES).select(torch.tensor([3, 1]))
    assert chosen.values.tolist() == [9, 9, 9, 9, 1]
    assert chosen.join(Ragged.of([[7]])).padded(slice(1, 3), slice(1, 3)).values.tolist() == [[1], [7]]


def test_what_belongs_together_stays_together_when_data_are_divided_saved_and_folded(tmp_path: Path) -> None:
    splits = split_dataset(mixed_data(), seed=0)
    save_splits(splits, tmp_path / "splits.pt")
    loaded = load_splits(tmp_path / "splits.pt")
    assert loaded.spec == splits.spec
    parts = [loaded.train, loaded.validation, all_examples(loaded), *(fold.validation for fold in folds(loaded, 3))]
    for split in parts:
        inputs, targets = split.batch(slice(None))
        assert inputs["words"].values[:, 0].tolist() == rows_of(inputs)
        assert inputs["words"].lengths.tolist() == [1 + row % 5 for row in rows_of(inputs)]
        assert targets.tolist() == [row % 2 for row in rows_of(inputs)]
    assert sorted(rows_of(all_examples(loaded).inputs)) == sorted(
        rows_of(splits.train.inputs) + rows_of(splits.validation.inputs)
    )


def training_batches(split: Split, epoch: int, batch_size: int = 4) -> list[Any]:
    order = torch.Generator().manual_seed(epoch)
    return list(TrainingBatches(split, batch_size, order=order, augmentation=torch.Generator(), augment="none"))


def test_an_epoch_sees_each_example_once_and_sequences_of_similar_lengths_together() -> None:
    train = mixed_data(500).train
    batches = training_batches(train, epoch=1, batch_size=8)
    assert len({row for inputs, _ in batches for row in rows_of(inputs)}) == 400
    spread = [int(inputs["words"].lengths.max() - inputs["words"].lengths.min()) for inputs, _ in batches]
    assert sum(spread) <= 5  # only a batch at the border between two lengths has two of them
    longest = [inputs["words"].values.shape[1] for inputs, _ in batches]
    assert longest != sorted(longest)
    assert [rows_of(inputs) for inputs, _ in training_batches(train, epoch=1, batch_size=8)] == [
        rows_of(inputs) for inputs, _ in batches
    ]
    assert rows_of(training_batches(train, epoch=2, batch_size=8)[0][0]) != rows_of(batches[0][0])


def test_an_evaluation_sees_each_example_in_order() -> None:
    train = mixed_data().train
    seen = [row for inputs, _ in evaluation_batches(train, 7) for row in rows_of(inputs)]
    assert seen == rows_of(train.inputs)


def test_a_checksum_sees_every_part_and_the_borders_of_sequences() -> None:
    def checksum(words: Any, targets: Any = None) -> str:
        inputs = {"words": Ragged.of(words), "numbers": torch.zeros(len(words), 1)}
        return data_fingerprint(hold_out(inputs, targets))

    words = [[1, 2, 3], [4, 5], [6], [7, 8], [9]]
    moved = [[1, 2], [3, 4, 5], [6], [7, 8], [9]]
    assert len({checksum(words), checksum(moved), checksum(words, torch.rand(5)), checksum([*words[:4], [2]])}) == 4
    assert checksum(words) == checksum(words)


def test_examples_are_known_again_by_all_their_inputs() -> None:
    inputs = {"words": Ragged.of([[1, 2], [1, 2], [1, 2]]), "number": torch.tensor([0.0, 0.0, 1.0])}
    one, same, other = Split(inputs, None).fingerprints()
    assert one == same != other


class Echo(nn.Module):
    def forward(self, inputs: Any) -> Any:
        self.seen = inputs
        return torch.zeros(3, 2)


def test_floats_and_images_are_normalised_and_integers_are_not() -> None:
    inputs = {
        "ids": torch.tensor([0, 7, 2]),
        "sound": Ragged.of([[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]),
        "image": torch.randint(256, (3, 3, 4, 4), dtype=torch.uint8),
        "raw": torch.tensor([10.0, 20.0, 30.0]),
        "frames": Ragged.of([torch.rand(length, 3, 4, 5) for length in (2, 1, 4)]),
    }
    data = Dataset(Split(inputs, torch.tensor([0, 1, 0])), test=None, classes=("a", "b"), normalise={"raw": False})  # type: ignore[arg-type]
    assert data.spec.inputs["ids"].vocabulary == 8  # type: ignore[call-overload, index]
    model = PreprocessedModel(Echo(), data.spec)
    model.fit_statistics(data.train)
    batch, _ = data.train.batch(slice(None))
    model(batch)
    seen = model.network.seen
    assert torch.equal(seen["ids"], inputs["ids"])  # type: ignore[arg-type]
    assert torch.equal(seen["raw"], inputs["raw"])  # type: ignore[arg-type]
    sound = seen["sound"]
    assert sound.values[sound.mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert sound.values[sound.mask].std(correction=0).item() == pytest.approx(1)
    assert not sound.values[~sound.mask].any()
    frames = seen["frames"]
    assert torch.allclose(frames.values[frames.mask].mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    image = seen["image"]
    assert torch.allclose(image.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    restored = PreprocessedModel(Echo(), DataSpec.from_dict(data.spec.to_dict()))
    restored.load_state_dict(model.state_dict())
    restored(batch)
    assert torch.equal(restored.network.seen["image"], image)


def test_a_vocabulary_covers_all_examples_and_is_given_where_more_may_come() -> None:
    words = Ragged.of([[row % 7] for row in range(20)])
    assert hold_out(words, torch.zeros(20)).spec.only_input.vocabulary == 7
    assert hold_out(words, torch.zeros(20), vocabulary=100).spec.only_input.vocabulary == 100
    columns = torch.stack([torch.arange(20) % 3, torch.arange(20) % 11], dim=1)
    assert hold_out(columns, torch.zeros(20)).spec.only_input.categories == (3, 11)
    with pytest.raises(DataError, match="hold the integer 6, but a vocabulary of 5 ends at 4"):
        hold_out(words, torch.zeros(20), vocabulary=5)


def test_what_version_0_1_wrote_beside_its_checkpoints_is_read() -> None:
    written = {"input_shape": [1, 8, 8], "classes": ["a", "b"]}
    assert DataSpec.from_dict(written) == DataSpec((1, 8, 8), ("a", "b"), "classification")
    assert DataSpec.from_dict({"input_shape": [6], "classes": []}).kind == "regression"


def test_what_a_model_takes_is_checked_when_it_predicts() -> None:
    data = mixed_data()
    model = PreprocessedModel(Echo(), data.spec).eval()
    words = [[1, 2], [3], [4, 5, 6]]
    assert len(model.predict({"words": words, "numbers": [[1.0], [2.0], [3.0]]})) == 3
    with pytest.raises(UsageError, match="takes several inputs: words, numbers"):
        model.predict({"words": words})
    with pytest.raises(UsageError, match="takes integers from 0 to 39, not 1 to 40"):
        model.predict({"words": [[1], [40]], "numbers": [[1.0], [2.0]]})
    with pytest.raises(UsageError, match=r"takes integers \(int64\), not float32"):
        model.predict({"words": [[1.0], [2.0]], "numbers": [[1.0], [2.0]]})
    with pytest.raises(UsageError, match=r"takes a batch of shape \(B, 1\), not \(3,\)"):
        model.predict({"words": words, "numbers": [1.0, 2.0, 3.0]})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.bfloat16, torch.float64])
def test_a_model_takes_numbers_of_any_type_and_ids_of_any_integer_type(dtype: torch.dtype) -> None:
    model = PreprocessedModel(Echo(), mixed_data().spec).eval()
    ids = torch.int64 if dtype.is_floating_point else dtype
    batch = model.as_batch({"words": [torch.tensor([1, 0], dtype=ids)], "numbers": torch.ones(1, 1, dtype=dtype)})
    model(batch)
    seen: Any = model.network.seen
    assert seen["words"].values.tolist() == [[1, 0]]
    assert seen["numbers"].tolist() == [[1.0]]


@pytest.mark.parametrize("name", ["sequences", "features", "several"])
def test_an_empty_list_has_no_predictions(name: str) -> None:
    datasets = {
        "sequences": lambda: hold_out(Ragged.of(SEQUENCES), torch.zeros(5)),
        "features": lambda: hold_out(torch.rand(5, 2), torch.zeros(5)),
        "several": mixed_data,
    }
    model = PreprocessedModel(Echo(), datasets[name]().spec)
    assert model.predict([]) == []
    assert model.predict(Ragged.of([])) == []


def test_an_empty_sequence_among_others_is_refused_when_a_model_predicts() -> None:
    model = PreprocessedModel(Echo(), hold_out(Ragged.of(SEQUENCES), torch.zeros(5)).spec)
    for inputs in ([[1, 2], [], [3]], Ragged.of([[1, 2], [], [3]]), Padded(torch.ones(2, 1), torch.tensor([1, 0]))):
        with pytest.raises(UsageError, match="example 1 is an empty sequence; leave it out"):
            model.predict(inputs)


def test_splits_of_several_parts_move_to_a_device_as_a_whole() -> None:
    splits = split_dataset(mixed_data(), seed=0)
    moved = Splits(splits.train, splits.validation, splits.spec).to("meta")
    assert moved.train.device.type == "meta"
    assert {part.device.type for part in moved.train.parts if isinstance(part, Tensor | Ragged)} == {"meta"}
    assert isinstance(splits.train.batch(torch.tensor([0]))[0]["words"], Padded)
