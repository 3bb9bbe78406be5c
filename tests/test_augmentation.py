"""Augmentation and mixing: what each may change, that torchvision does the same, that each image has its own draw."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_saturation, affine

from hpo import config
from hpo.data.augment import AUGMENTATIONS, AlternatingFlip, Crop, Cutout, Distortion, Flip, build_augmentations
from hpo.data.examples import Split
from hpo.data.mixing import Mixing
from hpo.errors import UsageError

# --- Augmentation


def random_images(count: int, channels: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(height * width)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def augmented(name: str, images: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    for augmentation in build_augmentations(name, strength=0.5):
        images = augmentation.apply(
            images, augmentation.draw(torch.arange(len(images)), images.shape[-2:], 1, generator)
        )
    return images


def test_every_augmentation_of_the_settings_is_there() -> None:
    assert tuple(AUGMENTATIONS) == config.AUGMENTATIONS


@pytest.mark.parametrize("name", ["none", *AUGMENTATIONS, "crop+flip+cutout"])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (8, 8), (28, 28), (33, 40)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_augmentation_keeps_shape_and_type_and_leaves_its_input_alone(
    name: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    images = random_images(6, 3, *size).to(dtype)
    before = images.clone()
    changed = augmented(name, images)
    assert (changed.shape, changed.dtype) == (images.shape, images.dtype)
    assert torch.equal(images, before)


@given(height=st.integers(1, 40), width=st.integers(1, 40), channels=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_a_crop_is_a_window_of_the_reflected_image(height: int, width: int, channels: int, seed: int) -> None:
    images = random_images(4, channels, height, width)
    draws = Crop().draw(torch.arange(4), (height, width), 1, torch.Generator().manual_seed(seed))
    vertical, horizontal = height // 8, width // 8
    padded = functional.pad(images.float(), (horizontal, horizontal, vertical, vertical), mode="reflect")
    for image, window, (top, left) in zip(padded, Crop().apply(images, draws), draws.tolist(), strict=True):
        assert torch.equal(window.float(), image[:, top : top + height, left : left + width])


def test_a_crop_reaches_every_position_and_one_of_them_is_the_image_itself() -> None:
    draws = Crop().draw(torch.arange(4000), (32, 32), 1, torch.Generator().manual_seed(0))
    assert len(draws.unique(dim=0)) == 9 * 9
    assert draws.min() == 0
    assert draws.max() == 8
    images = random_images(1, 3, 32, 32)
    assert torch.equal(Crop().apply(images, torch.tensor([[4, 4]])), images)


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_a_flip_mirrors_an_image_or_leaves_it_and_never_changes_its_counts(height: int, width: int, seed: int) -> None:
    images = random_images(8, 2, height, width)
    draws = Flip().draw(torch.arange(8), (height, width), 1, torch.Generator().manual_seed(seed))
    for image, flipped, drawn in zip(images, Flip().apply(images, draws), draws.flatten().tolist(), strict=True):
        assert torch.equal(flipped, image.flip(-1) if drawn else image)
        assert torch.equal(flipped.flatten().bincount(), image.flatten().bincount())


def test_half_of_the_images_are_flipped() -> None:
    assert Flip().draw(
        torch.arange(10_000), (8, 8), 1, torch.Generator().manual_seed(0)
    ).float().mean() == pytest.approx(0.5, abs=0.02)


def test_an_alternating_flip_mirrors_one_half_in_one_epoch_and_the_other_half_in_the_next() -> None:
    generator = torch.Generator()
    shuffled = torch.randperm(10_000)
    first, second, third = (
        AlternatingFlip().draw(torch.arange(10_000), (8, 8), epoch, generator).flatten() for epoch in (1, 2, 3)
    )
    assert torch.equal(first, ~second)
    assert torch.equal(first, third)
    assert first.float().mean() == pytest.approx(0.5, abs=0.02)
    assert (first[1:] == first[:-1]).float().mean() == pytest.approx(0.5, abs=0.05), "no pattern along the indices"
    assert torch.equal(AlternatingFlip().draw(shuffled, (8, 8), 1, generator).flatten(), first[shuffled])


@given(side=st.integers(4, 40), seed=st.integers(0, 2**32 - 1))
def test_a_cutout_covers_one_square_with_the_mean_colour_and_nothing_else(side: int, seed: int) -> None:
    images = random_images(4, 3, side, side)
    draws = Cutout().draw(torch.arange(4), (side, side), 1, torch.Generator().manual_seed(seed))
    for image, cut, centre in zip(images, Cutout().apply(images, draws), draws.tolist(), strict=True):
        (top, bottom), (left, right) = ((max(0, c - side // 4), c - side // 4 + side // 2) for c in centre)
        colour = image.float().mean((1, 2)).to(torch.uint8)
        assert torch.equal(
            cut[:, top:bottom, left:right], colour[:, None, None].expand_as(cut[:, top:bottom, left:right])
        )
        cut[:, top:bottom, left:right] = image[:, top:bottom, left:right]
        assert torch.equal(cut, image)


@pytest.mark.parametrize("name", [*AUGMENTATIONS, "crop+flip+cutout"])
def test_each_image_of_a_batch_is_drawn_by_itself(name: str) -> None:
    images = random_images(1, 3, 32, 32).expand(64, -1, -1, -1)
    distinct = {augmented_image.numpy().tobytes() for augmented_image in augmented(name, images)}
    assert len(distinct) == 2 if name.endswith("flip") and "+" not in name else len(distinct) > 30


@pytest.mark.parametrize("name", [*sorted({*AUGMENTATIONS} - {"alternating_flip"}), "crop+flip+cutout"])
def test_an_augmentation_follows_from_its_seed(name: str) -> None:
    images = random_images(16, 3, 32, 32)
    assert torch.equal(augmented(name, images, seed=1), augmented(name, images, seed=1))
    assert not torch.equal(augmented(name, images, seed=1), augmented(name, images, seed=2))


@pytest.mark.parametrize(
    ("column", "amount", "arguments"),
    [
        (0, math.radians(25), {"angle": 25.0}),
        (1, math.log(1.3), {"scale": 1.3}),
        (2, 0.2, {"shear": [-math.degrees(math.atan(0.2)), 0.0]}),
        (4, 0.125, {"translate": [4, 0]}),
        (5, -0.25, {"translate": [0, -6]}),
    ],
)
def test_a_warp_is_torchvisions(column: int, amount: float, arguments: dict[str, Any]) -> None:
    """Away from the edge, where torchvision fills in black and ours reflects."""
    images = random_images(2, 3, 24, 32).float()
    amounts = torch.zeros(2, 9)
    amounts[:, column] = amount
    ours = Distortion(rotation=90, zoom=1, shear=1, translation=1).apply(images, amounts)
    given = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]} | arguments
    theirs = affine(images, **given, interpolation=InterpolationMode.BILINEAR)
    torch.testing.assert_close(ours[:, :, 8:-8, 9:-9], theirs[:, :, 8:-8, 9:-9], atol=0.05, rtol=0)


@pytest.mark.parametrize(("column", "change"), [(6, adjust_brightness), (7, adjust_contrast), (8, adjust_saturation)])
@pytest.mark.parametrize("amount", [-1.0, -0.4, 0.0, 0.3])
def test_a_change_of_colour_is_torchvisions(column: int, change: Callable[..., Tensor], amount: float) -> None:
    images = random_images(3, 3, 12, 10)
    amounts = torch.zeros(3, 9)
    amounts[:, column] = amount
    ours = Distortion(brightness=1, contrast=1, saturation=1).apply(images, amounts)
    torch.testing.assert_close(ours.float(), change(images, 1 + amount).float(), atol=2, rtol=0)  # theirs truncates


@given(st.sampled_from([*AUGMENTATIONS]), st.integers(0, 2**32 - 1))
def test_a_distortion_of_no_amount_changes_nothing(name: str, seed: int) -> None:
    images = random_images(3, 3, 17, 30)
    augmentation = AUGMENTATIONS[name](1.0)
    if isinstance(augmentation, Distortion):
        assert torch.equal(augmentation.apply(images, torch.zeros(3, 9)), images)


@given(
    name=st.sampled_from(["rotation", "zoom", "translation"]),
    strength=st.floats(0.01, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_warp_shows_nothing_that_the_image_does_not_have(name: str, strength: float, seed: int) -> None:
    images = random_images(4, 2, 9, 14) // 4 + 64  # between 64 and 127
    augmentation = AUGMENTATIONS[name](strength)
    draws = augmentation.draw(torch.arange(4), (9, 14), 1, torch.Generator().manual_seed(seed))
    warped = augmentation.apply(images, draws)
    assert warped.min() >= 64
    assert warped.max() <= 127


def test_amounts_keep_to_the_strength_and_reach_it() -> None:
    augmentation = AUGMENTATIONS["rotation"](0.5)
    draws = augmentation.draw(torch.arange(5000), (8, 8), 1, torch.Generator().manual_seed(0))
    assert draws[:, 0].abs().max().item() == pytest.approx(math.radians(15), rel=0.01)
    assert abs(draws[:, 0].mean().item()) < 0.01
    assert not draws[:, 1:].any()


def test_randaugment_does_two_operations_by_the_strength_and_a_trivial_one_does_one_by_any() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = {
        name: AUGMENTATIONS[name](0.5).draw(torch.arange(5000), (8, 8), 1, generator)
        for name in AUGMENTATIONS
        if "augment" in name
    }
    num_done = {name: (draws != 0).sum(1) for name, draws in drawn.items()}
    assert {name: counts.max().item() for name, counts in num_done.items()} == {"randaugment": 2, "trivial_augment": 1}
    assert (num_done["trivial_augment"] == 0).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert drawn["randaugment"][:, 0].abs().unique().tolist() == pytest.approx([0, math.radians(30)])
    assert len(drawn["trivial_augment"][:, 0].unique()) > 400


# --- Mixing


def mixed(images: Tensor, targets: Tensor, mixing: Mixing, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = mixing.draw(torch.arange(len(images)), images.shape[-2:], 1, torch.Generator().manual_seed(seed))
    return mixing.apply(images, targets, draws)


def test_mixup_adds_up_two_images_and_their_classes_by_the_same_share() -> None:
    images, targets = random_images(63, 3, 5, 4), torch.arange(63) % 7
    inputs, shares = mixed(images, targets, Mixing(0.4, 0.0, 7))
    assert shares.sum(1).tolist() == pytest.approx([1.0] * 63)
    for index in range(63):
        own = shares[index, targets[index]].item()
        by_hand = own * images[index].float() + (1 - own) * images[index - 1].float()
        torch.testing.assert_close(inputs[index], by_hand, atol=1e-3, rtol=1e-5)
        assert shares[index, targets[index - 1]].item() == pytest.approx(1 - own, abs=1e-6)
    assert len(shares.amax(1).unique()) > 50, "each pair has its share"


@given(height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_cutmix_puts_a_rectangle_of_another_image_in_and_counts_its_pixels(height: int, width: int, seed: int) -> None:
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(-1, 2, height, width)
    inputs, shares = mixed(images, torch.arange(6), Mixing(0.0, 1.0, 6), seed)
    for index in range(6):
        is_other = (inputs[index] == (index - 1) % 6)[0]
        assert torch.equal(inputs[index], torch.where(is_other, float((index - 1) % 6), float(index)).expand(2, -1, -1))
        assert shares[index, index - 1].item() == pytest.approx(is_other.float().mean().item(), abs=1e-6)
        rows, columns = is_other.any(1), is_other.any(0)
        assert torch.equal(is_other, rows[:, None] & columns[None, :]), "one rectangle"
        assert rows.int().diff().abs().sum() <= 2


def test_the_values_of_a_regression_are_mixed_as_its_inputs_are() -> None:
    inputs, targets = torch.randn(50, 3), torch.randn(50)
    line = torch.tensor([1.0, -2.0, 0.5])
    new_inputs, new_targets = mixed(inputs, inputs @ line, Mixing(0.3, 0.0, 0))
    torch.testing.assert_close(new_targets, new_inputs @ line)
    assert not torch.allclose(new_inputs, inputs)
    with pytest.raises(UsageError, match=r"cutmix=1\.0 is for images"):
        Mixing(0.0, 1.0, 0).check(Split(inputs, targets))


def test_with_both_an_example_gets_one_of_the_two_by_chance() -> None:
    draws = Mixing(0.2, 1.0, 10).draw(torch.arange(4000), (8, 8), 1, torch.Generator().manual_seed(0))
    assert draws[:, 1].mean().item() == pytest.approx(0.5, abs=0.03)
    shares = {cut: draws[draws[:, 1] == cut, 0] for cut in (0, 1)}
    assert [share.var().item() for share in shares.values()] == pytest.approx([0.25 / 1.4, 1 / 12], rel=0.1)
