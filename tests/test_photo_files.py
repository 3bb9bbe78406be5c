"""Photos of strangers: pixels of any type, transparency, folders of other programs, classes that another tool saved."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hpo.checks.checklist import checks_of_files
from hpo.checks.verdicts import Subject
from hpo.data.datasets import split_dataset
from hpo.data.examples import DataSpec, InputSpec
from hpo.data.photos import load_image_folder, read_photos
from hpo.data.vision import CIFAR10_CLASSES, list_images, read_images
from hpo.deploy.predict import _read_photos
from hpo.errors import DataError
from hpo.plugins import load_task

RAMP = np.linspace(0, 255, 64).round().astype(np.uint8).reshape(8, 8)
"""Grey values from 0 to 255."""


def write_tiff_of_12_bits(path: Path, values: np.ndarray) -> None:  # type: ignore[type-arg]
    """Two values in three bytes, as cameras and microscopes do; Pillow reads it, but writes none."""
    pairs = values.astype(np.uint32).reshape(-1, 2)
    packed = (pairs[:, :1] << 12) | pairs[:, 1:]
    data = np.concatenate([(packed >> shift) & 255 for shift in (16, 8, 0)], axis=1).astype(np.uint8).tobytes()
    height, width = values.shape
    tags = {256: width, 257: height, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(
        tag.to_bytes(2, "little") + (4).to_bytes(2, "little") + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    ifd = len(tags).to_bytes(2, "little") + entries + bytes(4)
    path.write_bytes(b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data + ifd)


@pytest.fixture(params=["16 bits", "16 bits, tiff", "12 bits", "fractions", "palette", "one bit"])
def photo(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, np.ndarray]:  # type: ignore[type-arg]
    """A photo of 8x8 pixels of a strange type, and what it shows as bytes."""
    path, shown = tmp_path / "photo.tiff", RAMP
    match request.param:
        case "16 bits":
            path = tmp_path / "photo.png"
            Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
        case "16 bits, tiff":
            Image.fromarray(RAMP.astype(np.uint16) * 257).save(path)
        case "12 bits":
            write_tiff_of_12_bits(path, np.rint(RAMP * (4095 / 255)))
        case "fractions":
            Image.fromarray(RAMP.astype(np.float32) / 255).save(path)
        case "palette":
            path = tmp_path / "photo.png"
            Image.fromarray(RAMP).convert("P").save(path)
        case "one bit":
            shown = np.where(RAMP < 128, 0, 255).astype(np.uint8)
            Image.fromarray(RAMP >= 128).save(path)
    return path, shown


def test_pixels_of_any_type_are_scaled_by_its_range(photo: tuple[Path, np.ndarray]) -> None:  # type: ignore[type-arg]
    path, shown = photo
    (colour,) = read_photos([path], side=8)
    assert torch.equal(colour, torch.from_numpy(shown).expand(3, 8, 8))
    grey = _read_photos(DataSpec(InputSpec((1, 8, 8), "uint8")), [path])
    assert torch.equal(grey, torch.from_numpy(shown).view(1, 1, 8, 8))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (RAMP.astype(np.float32), "the mode F and are from 0 to 255, not from 0 to 1"),
        (np.full((8, 8), np.nan, np.float32), "the mode F and are from nan to nan, not from 0 to 1"),
        (RAMP.astype(np.int32) * 1000, "the mode I, whose range is not known"),
    ],
    ids=["floats", "nan", "int32"],
)
def test_pixels_of_unknown_range_are_refused_with_file_and_mode(
    values: np.ndarray,
    message: str,
    tmp_path: Path,  # type: ignore[type-arg]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        Image.fromarray(values).save(tmp_path / name / "1.tif")
    with pytest.raises(DataError, match=rf"1\.tif cannot be read \(its pixels have {message}"):
        read_photos([tmp_path / "cat" / "1.tif"], side=8)
    with pytest.raises(DataError, match=rf"2 of 2 photos .*cannot be used.* cat/1\.tif \(its pixels have {message}"):
        load_image_folder(tmp_path, side=8)


@pytest.mark.parametrize("suffix", ["tif", "webp", "png"])
def test_several_pages_or_frames_are_refused(suffix: str, tmp_path: Path) -> None:
    frames = [Image.fromarray(RAMP), Image.fromarray(RAMP.T.copy())]
    frames[0].save(tmp_path / f"photo.{suffix}", save_all=True, append_images=frames[1:])
    with pytest.raises(
        DataError, match=r"photo\.\w+.*it has 2 pages or frames, not one; save each as a file of its own"
    ):
        read_photos([tmp_path / f"photo.{suffix}"], side=8)


def test_a_thumbnail_within_a_tiff_is_no_page(tmp_path: Path) -> None:
    thumbnail = Image.fromarray(RAMP[::4, ::4].copy())
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(RAMP).save(tmp_path / "photo.tif", save_all=True, append_images=[thumbnail])
    assert np.array_equal(read_photos([tmp_path / "photo.tif"], side=8)[0, 0], RAMP)


def test_colours_of_print_become_those_of_a_screen(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "photo.tif")
    red = read_photos([tmp_path / "photo.tif"], side=8)[0, :, 0, 0].tolist()
    assert red == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L"])
def test_what_is_transparent_shows_white(mode: str, tmp_path: Path) -> None:
    """The hidden colour is red, or grey; the lower half of the photo is opaque and black."""
    hidden = np.zeros((8, 8, 4), np.uint8)
    hidden[:4, :, 0], hidden[4:, :, 3] = 200, 255
    image, path = Image.fromarray(hidden), tmp_path / "1.png"
    if mode in ("RGBA", "LA"):
        image.convert(mode).save(path)
    else:
        indices = Image.fromarray(np.repeat(np.array([7, 0], np.uint8), 32).reshape(8, 8))
        if mode == "P":
            indices.putpalette([0] * 21 + [200, 0, 0])
        indices.save(path, transparency=7)
    (found,) = read_photos([path], side=8)
    assert (found[:, :4] == 255).all()
    assert (found[:, 4:] == 0).all()


def test_folders_of_other_programs_are_passed_over_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, name in enumerate(("cat", "dog", "thumbs")):  # which may well be a class
        for folder in (name, f"{name}/more", f"{name}/@eaDir", f"{name}/.ipynb_checkpoints", f"{name}/Thumbnails"):
            (tmp_path / folder).mkdir()
            for index in range(3):
                grey = Image.new("L", (8, 8), 50 * number + index)
                grey.save(tmp_path / folder / f"{index}.png")
        grey.save(tmp_path / name / "._1.png")
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        dataset = load_image_folder(tmp_path, side=8)
    assert dataset.classes == ("cat", "dog", "thumbs")
    assert len(dataset.train) + len(dataset.test) == 18
    told = "27 files in .* are passed over, because they are hidden, thumbnails or the system's: 9 in"
    assert any(re.search(told, record.getMessage()) for record in caplog.records)


def test_images_of_cifar10_are_read_alike(tmp_path: Path) -> None:
    for name in (*CIFAR10_CLASSES, "__MACOSX"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(tmp_path / name / "1.png")
        (tmp_path / name / "._1.png").write_bytes(b"of a Mac")
    images = read_images(list_images(tmp_path, CIFAR10_CLASSES), CIFAR10_CLASSES, (32, 32))
    assert (images.inputs == 255).all()  # type: ignore[union-attr, operator]
    assert len(images) == 10


def write_class(
    folder: Path, seed: int, *, mode: str = "RGB", side: int = 0, suffix: str = "png", add: int = 0
) -> None:
    """Twenty photos of different sizes, or of this one."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(20):
        size = (side, side) if side else (20 + int(rng.integers(20)), 20 + int(rng.integers(20)))
        pixels = rng.integers(0, 120, (*size, 3)) + add
        Image.fromarray(pixels.astype(np.uint8)).convert(mode).save(folder / f"{index}.{suffix}")


@pytest.mark.parametrize(
    ("strange", "told"),
    [
        ({}, ""),
        ({"mode": "L"}, "'c': 100% have the type of pixels L, of the others 0%"),
        ({"suffix": "jpg"}, "'c': 100% have the format JPEG, of the others 0%"),
        ({"side": 30}, "'c': 100% have the size 30x30, of the others"),
        ({"side": 50}, "'c': a width around 50, the others around"),
        ({"add": 100}, "'c': a brightness around 1[56]., the others around [56]."),
    ],
    ids=["nothing", "mode", "format", "same size", "larger", "brighter"],
)
def test_the_check_says_if_the_files_of_a_class_differ_from_all_others(
    strange: dict[str, Any], told: str, tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        write_class(tmp_path / name, seed)
    write_class(tmp_path / "c", 2, **strange)
    dataset = load_image_folder(tmp_path, side=8)
    subject = Subject.of(load_task("digits"), split_dataset(dataset, seed=0), "cpu")
    (verdict,) = checks_of_files(subject, dataset)
    assert verdict.check == "files"
    assert verdict.state == ("warning" if told else "ok"), verdict
    assert "most have format PNG, type of pixels RGB" in verdict.text
    assert re.search(told, verdict.advice)
    assert not told or "a network may learn the tool" in verdict.advice
