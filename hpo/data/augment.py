"""Augmentation of whole batches, drawn for each image by itself.

torchvision's v2 transforms draw once for a whole batch; these draw once an image. All draws of an epoch are made at
once from a CPU generator: that is one transfer an epoch, a small state that is the same on every device, and no batch
that waits for the device. Images are (B, C, H, W) of any type; raw uint8 moves the fewest bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Augmentation(Protocol):
    """A change of images that keeps their labels."""

    def draw(self, num_images: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
        """What is random about it, (num_images, ...) on the CPU, for images of `size` (H, W)."""

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        """The changed images, given the draws of each (on the images' device)."""


class Flip:
    """Mirrors an image left to right, with probability 1/2."""

    def draw(self, num_images: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randint(2, (num_images, 1, 1, 1), generator=generator, dtype=torch.bool)

    def apply(self, images: Tensor, draws: Tensor) -> Tensor:
        return torch.where(draws, images.flip(-1), images)


class Crop:
    """Shifts each image by up to an eighth of its size; what is missing at the edge is reflected.

    On 32 pixels it is the usual crop out of an image padded by 4 (He et al. 2016, arXiv:1512.03385, section 4.2).
    """

    def draw(self, num_images: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
        shifts = [torch.randint(2 * (side // 8) + 1, (num_images,), generator=generator) for side in size]
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

    def draw(self, num_images: int, size: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.stack([torch.randint(side, (num_images,), generator=generator) for side in size], dim=1)

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


AUGMENTATIONS: dict[str, tuple[Augmentation, ...]] = {
    "none": (),
    "flip": (Flip(),),
    "crop": (Crop(),),
    "crop_flip": (Crop(), Flip()),
    "crop_flip_cutout": (Crop(), Flip(), Cutout()),
}
"""What each value of `TrainConfig.augment` does, in this order."""
