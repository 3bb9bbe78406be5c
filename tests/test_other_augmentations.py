"""Augmentation of texts and sound, of images with their masks and boxes, and new examples of rare classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import assert_equal_weights, without_time
from sklearn.neighbors import NearestNeighbors
from torch import Tensor, nn

from hpo import DataError, Dataset, DataSpec, Padded, Ragged, Split, TrainConfig, hold_out, read_synonyms, split_dataset
from hpo.config import AUGMENTATIONS as OF_IMAGES
from hpo.data.audio_augment import Gain, Mask, Noise, Pitch, Speed
from hpo.data.augment import AUGMENTATIONS, Moving
from hpo.data.batches import build_batches
from hpo.data.datasets import load_splits, save_splits
from hpo.data.oversampling import oversample
from hpo.data.text_augment import DeleteWords, DropTokens, ReplaceSynonyms, SwapWords, uniform
from hpo.models.networks import recurrent
from hpo.models.preprocessed import PreprocessedModel
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.trainer import fit

NUM = 400


def seeds(num: int = NUM, seed: int = 0) -> Tensor:
    return torch.randint(2**31, (num, 1), generator=torch.Generator().manual_seed(seed))


def test_the_numbers_of_positions_are_uniform_and_those_of_examples_and_purposes_have_nothing_in_common() -> None:
    numbers = uniform(seeds(), 200)
    assert 0 <= float(numbers.min()) <= float(numbers.max()) < 1
    counts = torch.histc(numbers, bins=20, min=0, max=1)
    expected = numbers.numel() / 20
    assert float(((counts - expected) ** 2 / expected).sum()) < 50, "chi squared of 19 degrees has 43.8 at 0.1%"
    others = uniform(seeds(), 200, 1), uniform(seeds() + 1, 200), numbers.roll(1, 1)
    for other in others:
        assert abs(float(torch.corrcoef(torch.stack((numbers.flatten(), other.flatten())))[0, 1])) < 0.02
    assert torch.equal(uniform(seeds(), 50), numbers[:, :50]), "padding changes nothing"


def texts() -> Padded:
    """The words of a text count upwards from 10."""
    lengths = torch.arange(NUM) % 12 + 1
    words = Ragged.of([torch.arange(10, 10 + int(length)) for length in lengths])
    return words.padded(slice(None), slice(None))


def rows_of(batch: Padded) -> list[list[int]]:
    return [row[:length] for row, length in zip(batch.values.tolist(), batch.lengths.tolist(), strict=True)]


def test_words_are_left_out_of_each_text_by_itself_and_some_always_stay() -> None:
    before, after = texts(), DeleteWords(0.3).apply(texts(), seeds())
    for old, new in zip(rows_of(before), rows_of(after), strict=True):
        assert new == sorted(new)
        assert new
        assert set(new) <= set(old)
    share = 1 - float(after.lengths.sum() / before.lengths.sum())
    assert 0.2 < share < 0.35
    assert (after.values[~after.mask] == 0).all()
    long = [new for new, length in zip(rows_of(after), before.lengths.tolist(), strict=True) if length == 12]
    assert len({tuple(new) for new in long}) > 25
    assert all(rows_of(DeleteWords(0.999).apply(texts(), seeds())))


def test_neighbours_are_swapped_and_nothing_is_lost() -> None:
    after = rows_of(SwapWords(0.5).apply(texts(), seeds()))
    moved = 0
    for old, new in zip(rows_of(texts()), after, strict=True):
        assert sorted(new) == old
        assert max(abs(one - other) for one, other in zip(old, new, strict=True)) <= 1
        moved += sum(one != other for one, other in zip(old, new, strict=True))
    assert 0.3 < moved / sum(map(len, after)) < 0.55
    assert any(new[0] == 11 for new in after), "the first pair may begin with the first word"
    assert any(new[1:2] == [12] for new in after), "or with the second"


def test_tokens_become_unknown_and_padding_does_not() -> None:
    before, after = texts(), DropTokens(0.3, 3).apply(texts(), seeds())
    is_unknown = after.values == 3
    assert 0.25 < float(is_unknown.sum() / before.lengths.sum()) < 0.35
    assert not (is_unknown & ~before.mask).any()
    assert torch.equal(after.values[~is_unknown], before.values[~is_unknown])


def test_words_are_replaced_by_their_synonyms_alone(tmp_path: Path) -> None:
    file = tmp_path / "synonyms.tsv"
    file.write_text("big\tlarge\thuge\nred\tscarlet\nunknown\tlarge\nsmall\tnot there\n")
    ids = {"big": 10, "large": 2, "huge": 3, "red": 11, "small": 12}
    table = read_synonyms(file, ids, vocabulary=30)
    assert set(table[10].tolist()) == {2, 3}
    assert set(table[11].tolist()) == {11}, "scarlet is not in the vocabulary"
    assert set(table[12].tolist()) == {12}
    before, after = texts(), ReplaceSynonyms(0.4, table).apply(texts(), seeds())
    of_big = after.values[before.values == 10]
    assert {2, 3, 10} == set(of_big.tolist())
    assert 0.3 < float((of_big != 10).double().mean()) < 0.5
    assert torch.equal(after.values[before.values != 10], before.values[before.values != 10])
    with pytest.raises(DataError, match="is missing; it has a word and its synonyms in each line"):
        read_synonyms(tmp_path / "none.tsv", ids)
    with pytest.raises(DataError, match="has no synonyms for any of the 1 words"):
        read_synonyms(file, {"blue": 1})


def test_synonyms_go_with_the_sequences_to_their_splits_and_files(tmp_path: Path) -> None:
    table = torch.arange(30)[:, None].repeat(1, 8)
    words = Ragged.of([torch.arange(1 + row % 5, 9) for row in range(40)], synonyms=table)
    splits = split_dataset(hold_out(words, torch.arange(40) % 2, ["a", "b"]), seed=0)
    save_splits(splits, tmp_path / "splits.pt")
    inputs: Any = load_splits(tmp_path / "splits.pt").train.inputs
    assert torch.equal(inputs.synonyms, table)


# --- sound ------------------------------------------------------------------------------------------------------------

RATE, LENGTH = 8000, 4096


def tones(frequency: float = 500.0, num: int = 60) -> Tensor:
    return torch.sin(2 * torch.pi * frequency * torch.arange(LENGTH) / RATE).repeat(num, 1)


def pitch_of(sound: Tensor) -> Tensor:
    """The strongest frequency of each recording, in Hz."""
    spectrum = torch.fft.rfft(sound * torch.hann_window(sound.shape[-1]), n=4 * sound.shape[-1]).abs()
    return spectrum.argmax(-1) * RATE / (4 * sound.shape[-1])


def test_noise_is_added_in_proportion_to_each_recording() -> None:
    sound = torch.cat((tones(num=100), 100 * tones(num=100)))
    added = Noise(0.4).apply(sound, seeds(200)) - sound
    shares = added.std(1) / sound.std(1)
    assert 0 <= float(shares.min()) < 0.05
    assert 0.35 < float(shares.max()) < 0.42
    assert abs(float(shares[:100].mean() - shares[100:].mean())) < 0.06
    normal = added[100] / added[100].std()
    assert abs(float(normal.mean())) < 0.05
    assert abs(float((normal.abs() < 1).double().mean()) - 0.683) < 0.03


def test_gain_is_up_to_the_decibels_either_way() -> None:
    ratio = 20 * (Gain(12).apply(tones(), seeds(60))[:, 100] / tones()[:, 100]).log10()
    assert -12 <= float(ratio.min()) < -8
    assert 8 < float(ratio.max()) <= 12


def test_speed_changes_pitch_and_length_and_pitch_keeps_the_length() -> None:
    faster = Speed(1.3).apply(tones(), seeds(60))
    heights = pitch_of(faster) / 500
    assert 1 / 1.31 < float(heights.min()) < 0.9
    assert 1.1 < float(heights.max()) < 1.31
    quick = int(heights.argmax())
    assert faster[quick, int(LENGTH / heights[quick]) + 20 :].abs().max() == 0, "it is over earlier"
    shifted = Pitch(4).apply(tones(), seeds(60))
    heights = pitch_of(shifted) / 500
    assert 2 ** (-4.5 / 12) < float(heights.min()) < 0.9
    assert 1.1 < float(heights.max()) < 2 ** (4.5 / 12)
    assert (shifted[:, -1000:].std(1) > 0.2).all(), "it is as long as before"


def test_recordings_of_different_lengths_stay_silent_behind_their_end_and_faster_ones_are_shorter() -> None:
    sound = Ragged.of([tones(num=1)[0, : 1000 + 40 * row] for row in range(50)]).padded(slice(None), slice(None))
    for augmentation in (Noise(0.5), Gain(12), Speed(1.3), Pitch(4)):
        changed = augmentation.apply(sound, seeds(50))
        assert (changed.values[~changed.mask] == 0).all()
        assert not torch.equal(changed.values, sound.values)
    lengths = Speed(1.3).apply(sound, seeds(50)).lengths
    assert (lengths < sound.lengths).any()
    assert (lengths[:10] > sound.lengths[:10]).any(), "a slower one is longer where there is room"


@pytest.mark.parametrize("augmentation", [Noise(0.5), Mask(0.9, of_time=True), Mask(0.9, of_time=False)])
def test_a_short_recording_is_changed_in_the_same_way_beside_a_long_one(augmentation: Noise | Mask) -> None:
    short, long = torch.rand(20, 8) + 5, torch.rand(400, 8)
    alone, beside = (Ragged.of(sounds).padded(slice(None), slice(None)) for sounds in ([short], [short, long]))
    changed = augmentation.apply(alone, seeds(1)).values[0]
    assert not torch.equal(changed, short)
    assert torch.allclose(augmentation.apply(beside, seeds(1).expand(2, 1)).values[0, :20], changed)


@pytest.mark.parametrize("of_time", [True, False])
def test_a_stretch_of_times_or_frequencies_is_covered_with_the_mean(of_time: bool) -> None:
    spectrograms = torch.rand(100, 1, 20, 50, generator=torch.Generator().manual_seed(0))
    covered = Mask(0.4, of_time).apply(spectrograms, seeds(100))
    is_changed = (covered != spectrograms)[:, 0]
    along = is_changed.any(1) if of_time else is_changed.any(2)
    widths = along.sum(1)
    assert int(widths.max()) <= 0.4 * along.shape[1] + 1
    assert len(set(widths.tolist())) > 5
    assert (along.int().diff(dim=1).abs().sum(1) <= 2).all(), "one stretch"
    whole = is_changed.all(1) if of_time else is_changed.all(2)
    assert torch.equal(along, whole)
    ragged = Ragged.of([torch.rand(20 + row, 8) for row in range(30)]).padded(slice(None), slice(None))
    masked = Mask(0.4, of_time).apply(ragged, seeds(30))
    assert torch.equal(masked.values[~ragged.mask], ragged.values[~ragged.mask])
    assert not torch.equal(masked.values, ragged.values)


# --- images with masks and boxes --------------------------------------------------------------------------------------

MOVING = [name for name in OF_IMAGES if isinstance(AUGMENTATIONS[name](1.0), Moving)]


def squares(num: int = 64, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Bright rectangles, their masks and their boxes."""
    draw = torch.Generator().manual_seed(0)
    images, boxes = torch.zeros(num, 1, side, side), torch.zeros(num, 4)
    for row in range(num):
        y, x = torch.randint(7, 17, (2,), generator=draw).tolist()
        height, width = torch.randint(4, 9, (2,), generator=draw).tolist()
        images[row, 0, y : y + height, x : x + width] = 200
        boxes[row] = torch.tensor([x, y, x + width, y + height])
    return images, (images[:, 0] > 0).long(), boxes


def box_around(image: Tensor) -> list[float]:
    rows, columns = (image > 100).any(1).nonzero()[:, 0], (image > 100).any(0).nonzero()[:, 0]
    return [float(columns.min()), float(rows.min()), float(columns.max()) + 1, float(rows.max()) + 1]


def augmented(name: str, targets: Tensor, kind: str, **settings: Any) -> tuple[Tensor, Tensor]:
    images = squares()[0]
    split = Split(images, targets)
    spec = DataSpec((1, 32, 32), ("no", "yes") if kind == "segmentation" else (), kind, (4,) if kind == "box" else ())
    config = TrainConfig(batch_size=64, augment=name, **settings)
    draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    ((inputs, moved),) = build_batches(split, config, spec, order=draw[0], augmentation=draw[1])
    return inputs, moved


@pytest.mark.parametrize("name", MOVING)
def test_a_mask_moves_with_its_image(name: str) -> None:
    images, masks = augmented(name, squares()[1], "segmentation")
    before = squares()[1]
    if name != "contrast":
        wrong = ((images[:, 0] > 100) != masks.bool()).double().mean()
        assert wrong < (1e-9 if name in ("flip", "alternating_flip", "crop") else 0.012), wrong
    assert set(masks.flatten().tolist()) == {0, 1}
    if name not in ("contrast", "colour_jitter"):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
        assert not torch.equal(masks, before[order])


@pytest.mark.parametrize("name", ["flip", "crop", "translation", "rotation", "zoom"])
def test_a_box_moves_with_its_image_and_stays_around_its_object(name: str) -> None:
    images, boxes = augmented(name, squares()[2], "box", augment_strength=0.5)
    found = torch.tensor([box_around(image[0]) for image in images])
    exact = name in ("flip", "crop")
    assert (boxes - found).abs().max() <= (0 if exact else 3.0), "a turned box is larger than its object"
    assert (boxes - found).abs().mean() <= (0 if exact else 1.0)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert (boxes - found).abs().mean() < 0.8 * (squares()[2][order] - found).abs().mean(), "it moved"


def test_a_label_that_is_ignored_stays_so_and_a_box_that_leaves_the_image_keeps_a_pixel() -> None:
    masks = squares()[1].to(torch.uint8)
    masks[:, 14:16, 14:16] = 255
    _, moved = augmented("rotation+translation", masks, "segmentation")
    assert set(moved.flatten().tolist()) == {0, 1, 255}
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [30.0, 30.0, 32.0, 32.0]])
    moved = AUGMENTATIONS["crop"](1.0).move_boxes(boxes, torch.tensor([[8, 8], [0, 0]]), (32, 32))  # type: ignore[attr-defined]
    assert moved.tolist() == [[0, 0, 1, 1], [31, 31, 32, 32]]


# --- new examples -----------------------------------------------------------------------------------------------------


def unbalanced() -> Split:
    draw = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 100 + [1] * 12 + [2])
    inputs = torch.randn(113, 3, generator=draw) + 5 * labels[:, None]
    return Split(inputs * torch.tensor([1.0, 100.0, 0.01]), labels)


def test_smote_makes_classes_equal_by_examples_between_neighbours() -> None:
    split, more = unbalanced(), oversample(unbalanced(), seed=3)
    assert isinstance(split.inputs, Tensor)
    assert isinstance(more.inputs, Tensor)
    assert isinstance(more.targets, Tensor)
    assert torch.bincount(more.targets).tolist() == [100, 100, 100]
    assert torch.equal(more.inputs[:113], split.inputs)
    assert (more.inputs[more.targets == 2] == split.inputs[-1]).all(), "an only example is repeated"
    scale = split.inputs.std(0, correction=0)
    members = split.inputs[100:112] / scale
    nearest = NearestNeighbors(n_neighbors=6).fit(members.numpy()).kneighbors(members.numpy())[1][:, 1:]
    pairs = [(members[row], members[other]) for row in range(12) for other in nearest[row].tolist()]
    one, other = (torch.stack(part) for part in zip(*pairs, strict=True))
    for made in more.inputs[113:][more.targets[113:] == 1] / scale:
        along = ((made - one) * (other - one)).sum(1) / (other - one).square().sum(1)
        off = (one + along[:, None] * (other - one) - made).norm(dim=1)
        assert ((off < 1e-4) & (along >= -1e-4) & (along <= 1 + 1e-4)).any()
    made = more.inputs[113:][more.targets[113:] == 1]
    assert len({tuple(row) for row in made.tolist()}) == len(made), "each is another"
    again, other_seed = oversample(unbalanced(), seed=3), oversample(unbalanced(), seed=4)
    assert torch.equal(again.inputs, more.inputs)  # type: ignore[arg-type]
    assert not torch.equal(other_seed.inputs, more.inputs)  # type: ignore[arg-type]


def test_neighbours_are_the_nearest_ones_however_far_the_features_are_from_zero() -> None:
    split = unbalanced()
    assert isinstance(split.inputs, Tensor)
    made, moved = (oversample(Split(split.inputs.double() + far, split.targets), seed=3).inputs for far in (0.0, 1e6))
    torch.testing.assert_close(moved - 1e6, made, rtol=0, atol=1e-6)  # type: ignore[operator]


# --- trainings --------------------------------------------------------------------------------------------------------


def words() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    table = torch.arange(12)[:, None].repeat(1, 8).roll(1, 0)
    sequences = [torch.randint(1, 12, (3 + row % 6,), generator=draw) for row in range(60)]
    return hold_out(Ragged.of(sequences, synonyms=table), torch.arange(60) % 2, ["a", "b"], vocabulary=12)


def sounds() -> Dataset:
    draw = torch.Generator().manual_seed(0)
    sequences = [torch.randn(20 + row % 9, 1, generator=draw)[:, 0] for row in range(60)]
    return hold_out(Ragged.of(sequences), torch.arange(60) % 2, ["a", "b"])


def vectors() -> Dataset:
    return hold_out(torch.randn(60, 4), torch.tensor([0] * 45 + [1] * 15), ["a", "b"])


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, inputs: Any) -> Tensor:
        values = inputs.values[:, :4] if isinstance(inputs, Padded) else inputs
        return self.layer(values)


TRAININGS: dict[str, tuple[Callable[[], Dataset], Callable[[DataSpec], nn.Module], dict[str, Any]]] = {
    "texts": (
        words,
        lambda spec: recurrent(spec, width=8),
        {"augment": "delete_words+swap_words+replace_synonyms+drop_tokens", "unknown_token": 1},
    ),
    "sound": (sounds, lambda spec: Flat(), {"augment": "noise+gain+speed+pitch"}),
    "smote": (vectors, lambda spec: Flat(), {"sampling": "smote"}),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_was_stopped_is_bit_equal_and_each_epoch_is_new(name: str, tmp_path: Path) -> None:
    load, network, settings = TRAININGS[name]
    torch.manual_seed(1)
    splits = split_dataset(load(), seed=0)
    config = TrainConfig(max_epochs=3, batch_size=8, compile="off", **settings)

    def model() -> PreprocessedModel:
        torch.manual_seed(0)
        return PreprocessedModel(network(splits.spec), splits.spec)

    expected_model, resumed_model = model(), model()
    expected = [without_time(result) for result in fit(expected_model, splits, config)]
    folder = CheckpointFolder(tmp_path)
    for result in fit(model(), splits, config, checkpoint=folder):
        if result.epoch == 1:
            break
    resumed = [without_time(result) for result in fit(resumed_model, splits, config, checkpoint=folder)]
    assert resumed == expected
    assert_equal_weights(resumed_model.state_dict(), expected_model.state_dict())
    plain = [without_time(r) for r in fit(model(), splits, TrainConfig(max_epochs=3, batch_size=8, compile="off"))]
    assert plain[0]["metrics"]["train/loss"] != expected[0]["metrics"]["train/loss"]
