"""Images to be divided into objects and background, made of real ones: Fashion-MNIST's clothes on CIFAR-10's photos."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.vision import load_cifar10, load_fashion_mnist
from hpo.errors import DataError

SIDE = 20
"""Pixels of a piece of clothing that is pasted."""

VISIBLE = 32
"""Brightness, of 255, from which on a pixel belongs to the clothing."""


def load_pasted_clothes(data_dir: Path, *, num_images: int = 10_000) -> Dataset:
    """Photographs with a piece of clothing each, (N, 3, 32, 32) uint8, and masks (N, 32, 32) of what each pixel shows.

    0 is the background, and 1 to 10 are the ten kinds of clothes. Training images are made of the training splits of
    both data sets, and a fifth as many test images of their test splits; always the same ones. Raises DataError if
    `num_images` is not from 10 to 50 000, and as `load_cifar10` does.
    """
    if not 10 <= num_images <= 50_000:
        raise DataError(f"num_images={num_images} is not allowed: it must be from 10 to 50000.")
    photos, clothes = load_cifar10(data_dir), load_fashion_mnist(data_dir)
    num_test = num_images // 5
    test = SealedSplit(lambda: _paste(clothes.test.open(), photos.test.open(), num_test, seed=1), num_test)
    train = _paste(clothes.train, photos.train, num_images, seed=0)
    return Dataset(train, test, ("background", *clothes.classes), kind="segmentation")


def _paste(clothes: Split, photos: Split, num_images: int, *, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images, (pieces, kinds) = _drawn(photos, num_images, generator)[0], _drawn(clothes, num_images, generator)
    pieces = functional.interpolate(pieces.float(), size=(SIDE, SIDE), mode="area")
    colours = 0.3 + 0.7 * torch.rand(num_images, 3, 1, 1, generator=generator)
    places = torch.randint(images.shape[-1] - SIDE + 1, (num_images, 2), generator=generator).tolist()
    masks = torch.zeros(num_images, *images.shape[-2:], dtype=torch.uint8)
    for row, (top, left) in enumerate(places):
        window = (..., slice(top, top + SIDE), slice(left, left + SIDE))
        is_visible = pieces[row, 0] >= VISIBLE
        coloured = (pieces[row] * colours[row]).round().to(torch.uint8)
        images[row][window] = torch.where(is_visible, coloured, images[row][window])
        masks[row][window] = torch.where(is_visible, kinds[row] + 1, 0).to(torch.uint8)
    return Split(images, masks)


def _drawn(split: Split, num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Some images in a random order, with their classes."""
    assert isinstance(split.inputs, Tensor), "they are in memory"
    assert isinstance(split.targets, Tensor), "each has a class"
    rows = torch.randperm(len(split), generator=generator)[:num_images]
    return split.inputs[rows], split.targets[rows]
