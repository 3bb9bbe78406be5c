"""Augmentation of whole batches, drawn for each image by itself.

torchvision's v2 transforms draw once for a whole batch; these draw once an image. All draws of an epoch are made at
once from a CPU generator: that is one transfer an epoch, a small state that is the same on every device, and no batch
that waits for the device. Images are (B, C, H, W) of any type; raw uint8 moves the fewest bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from hpo.config import augmentation_names


class Augmentation(Protocol):
    """A change of images that keeps their labels."""

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        """What is random about it, (N, ...) on the CPU, for the images of these indices (N,) and `size` (H, W)."""

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """The changed images, given the draws of each (on the images' device)."""


class Flip:
    """Mirrors an image left to right, with probability 1/2."""

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(2, (len(images), 1, 1, 1), generator=generator, dtype=torch.bool)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        return torch.where(draws, images.flip(-1), images)


class AlternatingFlip(Flip):
    """Mirrors a random half of the images in one epoch and the other half in the next, so that two epochs see each
    image both ways (Jordan 2024, arXiv:2404.00498, section 3.6). The halves are the same in every training."""

    def draw(self, images: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        # A middle bit of the product: Fibonacci hashing (Knuth, The Art of Computer Programming 3, section 6.4).
        bits = (images * 0x9E3779B1 >> 16) + epoch
        return (bits % 2 == 0).view(-1, 1, 1, 1)


class Crop:
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


def _warp(images: Tensor, amounts: Tensor) -> Tensor:
    """Shear, zoom, turn, then shift each image: amounts (B, 6) of radians, logarithm, tangents and shares."""
    angle, log_zoom, shear_x, shear_y, shift_x, shift_y = amounts.unbind(1)
    height, width = images.shape[-2:]
    ones = torch.ones_like(angle)
    # For each pixel of the result, where it comes from: everything backwards.
    turn = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), 1).view(-1, 2, 2)
    shear = torch.stack((ones, -shear_x, -shear_y, ones), 1).view(-1, 2, 2)
    origin = shear @ turn / (log_zoom.exp() * (1 - shear_x * shear_y))[:, None, None]
    # A grid's coordinates reach from -1 to 1 on both sides, however long these are.
    origin[:, 0, 1] *= height / width
    origin[:, 1, 0] *= width / height
    shift = -origin @ (2 * torch.stack((shift_x, shift_y), 1)[:, :, None])
    grid = functional.affine_grid(torch.cat((origin, shift), 2), list(images.shape), align_corners=False)
    values = images.to(torch.promote_types(images.dtype, torch.float32))
    warped = functional.grid_sample(values, grid.to(values.dtype), padding_mode="reflection", align_corners=False)
    return _stored_as(warped, images.dtype)


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


def build_augmentations(augment: str, strength: float) -> tuple[Augmentation, ...]:
    """What `TrainConfig.augment` and `augment_strength` ask for. Raises UnknownNameError."""
    return tuple(AUGMENTATIONS[name](strength) for name in augmentation_names(augment))


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
