"""Augmentation of whole batches, drawn for each image by itself.

torchvision's v2 transforms draw once for a whole batch; these draw once an image. All draws of an epoch are made at
once from a CPU generator: that is one transfer an epoch, a small state that is the same on every device, and no batch
that waits for the device. Images are (B, C, H, W) of any type; raw uint8 moves the fewest bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from hpo.config import augmentation_names
from hpo.data.audio_augment import Gain, Mask, Noise, Pitch, Speed
from hpo.data.parts import Ragged
from hpo.data.text_augment import DeleteWords, DropTokens, ReplaceSynonyms, SwapWords
from hpo.errors import UsageError


class Augmentation(Protocol):
    """A change of images that keeps their labels."""

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        """What is random about it, (N, ...) on the CPU, for the images of these indices (N,) and `size` (H, W)."""

    def apply(self, images: Any, draws: Tensor) -> Any:
        """The changed images, given the draws of each (on the images' device)."""


@runtime_checkable
class Moving(Protocol):
    """An augmentation that moves pixels, and what is known of them."""

    def move_masks(self, masks: Tensor, draws: Tensor) -> Tensor:
        """Masks (B, H, W) of any type moved as the images are."""

    def move_boxes(self, boxes: Tensor, draws: Tensor, size: Sequence[int]) -> Tensor:
        """Boxes (B, 4), x1 y1 x2 y2, moved as the images of this size (H, W) are; what leaves an image is cut off."""


class _Rearranged:
    """Masks are moved as the images are: pixel by pixel."""

    def move_masks(self, masks: Tensor, draws: Tensor) -> Tensor:
        moved: Tensor = self.apply(masks[:, None], draws)[:, 0]  # type: ignore[attr-defined]
        return moved


class Flip(_Rearranged):
    """Mirrors an image left to right, with probability 1/2."""

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2, (len(images), 1, 1, 1), generator=generator, dtype=torch.bool)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        return torch.where(draws, images.flip(-1), images)

    def move_boxes(self, boxes: Tensor, draws: Tensor, size: Sequence[int]) -> Tensor:
        x1, y1, x2, y2 = boxes.unbind(1)
        mirrored = torch.stack((size[1] - x2, y1, size[1] - x1, y2), dim=1)
        return torch.where(draws.view(-1, 1), mirrored, boxes)


class AlternatingFlip(Flip):
    """Mirrors a random half of the images in one epoch and the other half in the next, so that two epochs see each
    image both ways (Jordan 2024, arXiv:2404.00498, section 3.6). The halves are the same in every training."""

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        # A middle bit of the product: Fibonacci hashing (Knuth, The Art of Computer Programming 3, section 6.4).
        bits = (images * 0x9E3779B1 >> 16) + epoch
        return (bits % 2 == 0).view(-1, 1, 1, 1)


class Crop(_Rearranged):
    """Shifts each image by up to an eighth of its size; what is missing at the edge is reflected.

    On 32 pixels it is the usual crop out of an image padded by 4 (He et al. 2016, arXiv:1512.03385, section 4.2).
    """

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        shifts = [torch.randint(2 * (side // 8) + 1, (len(images),), generator=generator) for side in size]
        return torch.stack(shifts, dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        rows = _window(height, draws[:, 0])
        columns = _window(width, draws[:, 1])
        pixels = (rows[:, :, None] * width + columns[:, None, :]).flatten(1)
        # Reading the window through reflected indices spares the padded copy of the batch.
        return images.flatten(2).gather(2, pixels[:, None].expand(-1, images.shape[1], -1)).view_as(images)

    def move_boxes(self, boxes: Tensor, draws: Tensor, size: Sequence[int]) -> Tensor:
        shift_y, shift_x = (side // 8 - draws[:, axis] for axis, side in enumerate(size))
        shifts = torch.stack((shift_x, shift_y, shift_x, shift_y), dim=1)
        return _within(boxes + shifts, size)


def _window(side: int, shifts: Tensor) -> Tensor:
    """Indices in [0, side) of the windows that begin at `shifts` (B,) of a reflected side: (B, side)."""
    padding = side // 8
    positions = torch.arange(-padding, side + padding, device=shifts.device).abs()
    reflected = side - 1 - (side - 1 - positions).abs()
    return reflected.unfold(0, side, 1)[shifts]


class Cutout:
    """Covers a square of half the image's side with the image's mean colour; the centre may lie anywhere.

    DeVries and Taylor 2017, arXiv:1708.04552: 16 of CIFAR-10's 32 pixels, and less where the square leaves the image.
    """

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        return torch.stack([torch.randint(side, (len(images),), generator=generator) for side in size], dim=1)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        covered = _near(height, draws[:, 0])[:, :, None] & _near(width, draws[:, 1])[:, None, :]
        colour = images.float().mean((2, 3), keepdim=True).to(images.dtype)
        return torch.where(covered[:, None], colour, images)


def _near(side: int, centres: Tensor) -> Tensor:
    """Whether each position is in the stretch of side // 2 around a centre: (B, side) bool."""
    first = centres[:, None] - side // 4
    positions = torch.arange(side, device=centres.device)
    return (positions >= first) & (positions < first + side // 2)


@dataclass(frozen=True, kw_only=True)
class Distortion:
    """Turns, zooms, shears, shifts and recolours each image by amounts that are uniform up to these, either way.

    What a warp lacks at the edge is reflected; grey is Rec. 601's, and saturation is for images of three channels.
    """

    rotation: float = 0.0
    """Degrees; positive is clockwise."""
    zoom: float = 0.0
    """Natural logarithm of the factor."""
    shear: float = 0.0
    """Tangent, along x and along y."""
    translation: float = 0.0
    """Share of the side, along x and along y."""
    brightness: float = 0.0
    """Share of black, or of twice the light, like the next two."""
    contrast: float = 0.0
    """Share of the image's mean grey that replaces the image, or is taken off it."""
    saturation: float = 0.0
    """Share of each pixel's grey."""

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        """Amounts (N, 9), in the order of `limits`."""
        return (2 * torch.rand(len(images), len(self.limits), generator=generator) - 1) * torch.tensor(self.limits)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        if any(self.limits[:_NUM_WARPS]):
            images = _warp(images, draws[:, :_NUM_WARPS])
        if any(self.limits[_NUM_WARPS:]):
            images = _recolour(images, draws[:, _NUM_WARPS:])
        return images

    def move_masks(self, masks: Tensor, draws: Tensor) -> Tensor:
        if not any(self.limits[:_NUM_WARPS]):
            return masks
        moved = _sampled(masks[:, None].float(), draws[:, :_NUM_WARPS], mode="nearest")
        return moved[:, 0].round().to(masks.dtype)

    def move_boxes(self, boxes: Tensor, draws: Tensor, size: Sequence[int]) -> Tensor:
        """The boxes around the moved corners."""
        if not any(self.limits[:_NUM_WARPS]):
            return boxes
        (a, b, shift_x), (c, d, shift_y) = (row.unbind(1) for row in _origins(draws[:, :_NUM_WARPS], size).unbind(1))
        height, width = size
        x1, y1, x2, y2 = boxes.unbind(1)
        x, y = torch.stack((x1, x2, x1, x2), 1), torch.stack((y1, y1, y2, y2), 1)  # (B, 4) corners
        x, y = 2 * x / width - 1, 2 * y / height - 1
        x, y = x - shift_x[:, None], y - shift_y[:, None]
        scale = (a * d - b * c)[:, None]  # the inverse of where each pixel comes from
        moved_x = (d[:, None] * x - b[:, None] * y) / scale
        moved_y = (a[:, None] * y - c[:, None] * x) / scale
        columns, rows = (moved_x + 1) * width / 2, (moved_y + 1) * height / 2
        around = torch.stack((columns.amin(1), rows.amin(1), columns.amax(1), rows.amax(1)), dim=1)
        return _within(around.to(boxes.dtype), size)

    @property
    def limits(self) -> tuple[float, ...]:
        """The largest amount of each, angles in radians; shear and translation along x, then along y."""
        warps = (math.radians(self.rotation), self.zoom, *[self.shear] * 2, *[self.translation] * 2)
        return (*warps, self.brightness, self.contrast, self.saturation)


_NUM_WARPS = 6  # amounts that move pixels, before those that recolour them


@dataclass(frozen=True, kw_only=True)
class RandomOperations(Distortion):
    """Does `num_operations` of a distortion's nine to each image, drawn with replacement, each by its limit.

    That is RandAugment (Cubuk et al. 2020, arXiv:1909.13719), without the operations that need the range of the values
    (posterise, solarise, equalise, auto-contrast). With `is_trivial` each is done by an amount of its own, up to the
    limit: TrivialAugment (Mueller and Hutter 2021, arXiv:2103.10158) has one of these.
    """

    num_operations: int
    is_trivial: bool

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        amounts = torch.tensor(self.limits).expand(len(images), -1)
        if self.is_trivial:
            amounts = amounts * torch.rand(amounts.shape, generator=generator)
        signs = 2 * torch.randint(2, amounts.shape, generator=generator) - 1
        # One more than there are: doing nothing is an operation, too.
        chosen = torch.randint(len(self.limits) + 1, (len(images), self.num_operations), generator=generator)
        is_done = functional.one_hot(chosen, len(self.limits) + 1).amax(1)[:, :-1]
        return amounts * signs * is_done


def _within(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes cut off where the image ends; what is outside keeps a pixel at the edge."""
    height, width = size
    x1, y1, x2, y2 = boxes.unbind(1)
    x1, y1 = x1.clamp(0, width - 1), y1.clamp(0, height - 1)
    return torch.stack(
        (x1, y1, torch.maximum(x2.clamp(max=width), x1 + 1), torch.maximum(y2.clamp(max=height), y1 + 1)), 1
    )


def _warp(images: Tensor, amounts: Tensor) -> Tensor:
    """Shear, zoom, turn, then shift each image: amounts (B, 6) of radians, logarithm, tangents and shares."""
    values = images.to(torch.promote_types(images.dtype, torch.float32))
    return _stored_as(_sampled(values, amounts, mode="bilinear"), images.dtype)


def _sampled(values: Tensor, amounts: Tensor, *, mode: str) -> Tensor:
    origins = _origins(amounts, values.shape[-2:])
    grid = functional.affine_grid(origins, list(values.shape), align_corners=False)
    return functional.grid_sample(
        values, grid.to(values.dtype), mode=mode, padding_mode="reflection", align_corners=False
    )


def _origins(amounts: Tensor, size: Sequence[int]) -> Tensor:
    """Where each place of a warped image comes from, in coordinates from -1 to 1: (B, 2, 3)."""
    angle, log_zoom, shear_x, shear_y, shift_x, shift_y = amounts.unbind(1)
    height, width = size
    ones = torch.ones_like(angle)
    # For each pixel of the result, where it comes from: everything backwards.
    turn = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    shear = torch.stack((ones, -shear_x, -shear_y, ones), 1).view(-1, 2, 2)
    origin = shear @ turn / (log_zoom.exp() * (1 - shear_x * shear_y))[:, None, None]
    # A grid's coordinates reach from -1 to 1 on both sides, however long these are.
    origin[:, 0, 1] *= height / width
    origin[:, 1, 0] *= width / height
    shift = -origin @ (2 * torch.stack((shift_x, shift_y), 1)[:, :, None])
    return torch.cat((origin, shift), 2)


def _recolour(images: Tensor, amounts: Tensor) -> Tensor:
    """Brightness, contrast, then saturation by amounts (B, 3): 0 changes nothing, -1 leaves none of it."""
    brightness, contrast, saturation = (1 + amounts)[:, :, None, None, None].unbind(1)
    values = images.to(torch.promote_types(images.dtype, torch.float32)) * brightness
    values = torch.lerp(_grey(values).mean((1, 2, 3), keepdim=True), values, contrast)
    if images.shape[1] == 3:
        values = torch.lerp(_grey(values), values, saturation)
    return _stored_as(values, images.dtype)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != 3:
        return images
    return 0.299 * images[:, :1] + 0.587 * images[:, 1:2] + 0.114 * images[:, 2:]


def _stored_as(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values if dtype.is_floating_point else values.round().clamp(0, 255).to(dtype)


def build_augmentations(
    augment: str,
    strength: float,
    *,
    words: Ragged | None = None,
    unknown_token: int = 0,
    device: torch.device | str | None = None,
) -> tuple[Augmentation, ...]:
    """What `TrainConfig.augment` and `augment_strength` ask for, of batches on `device`; texts as `words` allow.

    Raises UnknownNameError, and UsageError for synonyms that the words do not have.
    """
    return tuple(_build(name, strength, words, unknown_token, device) for name in augmentation_names(augment))


def _build(
    name: str, strength: float, words: Ragged | None, unknown_token: int, device: torch.device | str | None
) -> Augmentation:
    match name:
        case "delete_words":
            return DeleteWords(0.2 * strength, padding=int(words.padding) if words else 0)
        case "swap_words":
            return SwapWords(0.2 * strength)
        case "drop_tokens":
            return DropTokens(0.2 * strength, unknown_token)
        case "replace_synonyms":
            if words is None or words.synonyms is None:
                raise UsageError(
                    "augment='replace_synonyms' needs synonyms: Ragged.of(..., synonyms=hpo.read_synonyms(FILE, ids))."
                )
            return ReplaceSynonyms(0.4 * strength, words.synonyms.to(device or words.device))
        case "noise":
            return Noise(0.5 * strength)
        case "gain":
            return Gain(12 * strength)
        case "speed":
            return Speed(1.3**strength)
        case "pitch":
            return Pitch(4 * strength)
        case "time_mask" | "frequency_mask":
            return Mask(0.4 * strength, of_time=name == "time_mask")
        case _:
            return AUGMENTATIONS[name](strength)


def _randomly(num_operations: int, strength: float, *, is_trivial: bool) -> RandomOperations:
    return RandomOperations(
        num_operations=num_operations,
        is_trivial=is_trivial,
        rotation=60 * strength,
        zoom=math.log(1.5) * strength,
        shear=0.6 * strength,
        translation=0.4 * strength,
        brightness=0.9 * strength,
        contrast=0.9 * strength,
        saturation=0.9 * strength,
    )


AUGMENTATIONS: dict[str, Callable[[float], Augmentation]] = {
    "flip": lambda strength: Flip(),
    "alternating_flip": lambda strength: AlternatingFlip(),
    "crop": lambda strength: Crop(),
    "rotation": lambda strength: Distortion(rotation=30 * strength),
    "zoom": lambda strength: Distortion(zoom=math.log(1.5) * strength),
    "translation": lambda strength: Distortion(translation=0.25 * strength),
    "contrast": lambda strength: Distortion(contrast=0.8 * strength),
    "colour_jitter": lambda s: Distortion(brightness=0.8 * s, contrast=0.8 * s, saturation=0.8 * s),
    "cutout": lambda strength: Cutout(),
    "randaugment": lambda strength: _randomly(2, strength, is_trivial=False),
    "trivial_augment": lambda strength: _randomly(1, 1.0, is_trivial=True),
}
"""What each name in `TrainConfig.augment` does, given `TrainConfig.augment_strength` in (0, 1]."""
