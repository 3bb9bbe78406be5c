"""Files with photos: which ones a folder holds, and how one is decoded, whatever its type of pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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
_BITS_PER_SAMPLE = 258  # a tag of TIFF
_OF_SYSTEMS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
_THUMBNAILS = ("thumbnails", "thumbnail", "thumbs", "_thumbs")


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
    transparent shows BACKGROUND. With `draft` a JPEG is decoded at a half or a quarter of its size, of at least so many
    pixels. Raises DataError for pixels without a known range, and whatever Pillow raises for a damaged file.
    """
    # Whatever it is called, Pillow would hand a file that begins as PostScript to Ghostscript.
    with Image.open(path, formats=_FORMATS) as photo:
        original = Original(*photo.size, photo.mode, photo.format or "")
        if draft:
            photo.draft(None, (draft, draft))
        return _in_8_bits(ImageOps.exif_transpose(photo), photo, mode), original


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


@dataclass(frozen=True)
class Files:
    """The files below a folder."""

    found: list[Path]
    """By name; without those of the next two."""
    passed_over: Counter[str]
    """Files in hidden folders, folders of the system and folders of thumbnails, by the folder's name."""


def files_below(folder: Path) -> Files:
    """All files below a folder of one class, but none that is hidden, or that another program made."""
    found, passed_over = [], Counter[str]()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        inside = path.relative_to(folder).parts[:-1]
        strange = next((name for name in inside if is_hidden(name) or name.lower() in _THUMBNAILS), None)
        if strange is not None:
            passed_over[strange] += 1
        elif not is_hidden(path.name):
            found.append(path)
    return Files(found, passed_over)


def folders_in(parent: Path, *, besides: Sequence[str] = ()) -> Iterator[Path]:
    """The folders in another one, by name, but none that is hidden or that the system made."""
    for path in sorted(parent.iterdir()):
        if path.is_dir() and path.name not in besides and not is_hidden(path.name):
            yield path


def is_hidden(name: str) -> bool:
    """Whether a file or a folder of this name is hidden, or belongs to the system: `.git`, `__MACOSX`, `@eaDir`."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS
