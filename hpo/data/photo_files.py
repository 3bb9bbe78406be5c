"""Files with photos: how one is decoded, whatever its type of pixels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from hpo.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")

BACKGROUND = "white"
"""What shows through where a photo is transparent."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
_KIND_OF_PAGE, _BITS_PER_SAMPLE = 254, 258  # tags of TIFF


@dataclass(frozen=True)
class Original:
    """What is known of a photo's file, apart from what it shows."""

    width: int
    height: int
    """In pixels, as they are stored."""
    mode: str
    """The type of its pixels, as Pillow calls it: RGB, L, I;16."""
    format: str
    """JPEG, PNG, ..."""


def open_photo(path: Path, mode: Literal["RGB", "L"] = "RGB", *, draft: int = 0) -> tuple[Image.Image, Original]:
    """A photo upright, of 8 bits in this mode, and what its file was.

    Whole numbers of more bits are scaled from the range of their type, fractions from 0 to 1, to 0 to 255. What is
    transparent shows BACKGROUND. With `draft` a JPEG is decoded at a half or a quarter of its size, but with at least
    `draft` pixels per side. Raises DataError for pixels without a known range and for several pages or frames, and
    whatever Pillow raises for a damaged file.
    """
    # Whatever it is called, Pillow would hand a file that begins as PostScript to Ghostscript.
    with Image.open(path, formats=_FORMATS) as photo:
        original = Original(*photo.size, photo.mode, photo.format or "")
        if (num_pages := _num_pages(photo)) > 1:
            raise DataError(f"it has {num_pages} pages or frames, not one; save each as a file of its own")
        if draft:
            photo.draft(None, (draft, draft))
        return _in_8_bits(ImageOps.exif_transpose(photo), photo, mode), original


def _num_pages(photo: Image.Image) -> int:
    """Pages of a TIFF without its thumbnails, or frames of an animated WebP or PNG; phones put more into a JPEG."""
    num_pages = int(getattr(photo, "n_frames", 1)) if photo.format in ("TIFF", "WEBP", "PNG") else 1
    if num_pages == 1 or photo.format != "TIFF":
        return num_pages
    num_thumbnails = 0
    for page in range(num_pages):
        photo.seek(page)
        num_thumbnails += int(getattr(photo, "tag_v2", {}).get(_KIND_OF_PAGE, 0)) & 1
    photo.seek(0)
    return num_pages - num_thumbnails


def _in_8_bits(upright: Image.Image, photo: Image.Image, mode: Literal["RGB", "L"]) -> Image.Image:
    if upright.mode.startswith("I;16"):
        return _scaled(upright, 2 ** _bits(photo) - 1).convert(mode)
    if upright.mode == "F":
        return _scaled(upright, 1).convert(mode)
    if upright.mode not in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "RGBA", "LA", "PA", "La", "RGBa"):
        raise DataError(f"its pixels have the mode {upright.mode}, whose range is not known; save it with 8 or 16 bits")
    if upright.has_transparency_data:
        coloured = upright.convert("RGBA")
        ground = Image.new("RGBA", coloured.size, BACKGROUND)
        return Image.alpha_composite(ground, coloured).convert(mode)
    return upright.convert(mode)


def _bits(photo: Image.Image) -> int:
    """Bits of a pixel: 16, except in a TIFF that says otherwise."""
    tags = getattr(photo, "tag_v2", {})
    (bits, *_) = tags.get(_BITS_PER_SAMPLE, (16,))
    return int(bits)


def _scaled(grey: Image.Image, largest: int) -> Image.Image:
    """Grey values from 0 to `largest` as bytes."""
    values = np.asarray(grey, dtype=np.float32)
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= largest):
        raise DataError(
            f"its pixels have the mode {grey.mode} and are from {low:g} to {high:g}, not from 0 to {largest}; save it "
            "with 8 or 16 bits"
        )
    return Image.fromarray(np.rint(values * (255 / largest)).astype(np.uint8))
