"""Image data sets: found below the data directory or downloaded, verified, and read into uint8 tensors.

Where each one is looked for:

    cifar10/{train,test}/<class>/*.jpg|png    an image folder; it goes first
    cifar-10-batches-py/                      as torchvision downloads it
    FashionMNIST/raw/*-ubyte                  as torchvision downloads it

What is there is never changed; what it was converted to is kept beside it in `hpo-cache/`.
"""

from __future__ import annotations

import logging
import math
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torchvision.datasets import CIFAR10, FashionMNIST

from hpo.data.cache import cached_split, ensure_converted
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.folders import folders_in, is_hidden
from hpo.data.photo_files import open_photo
from hpo.errors import DataError

_logger = logging.getLogger(__name__)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_TEST_SIZE = 10_000  # of torchvision's file, known without opening it
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
_IMAGE_FORMATS = ("JPEG", "PNG")
NETWORK_TIMEOUT_SECONDS = 10.0
_DELETE_IT = "delete it and run again to download it."


@dataclass(frozen=True)
class _Originals:
    """The files that a split is made of, and how."""

    files: Sequence[Path]
    convert: Callable[[], Split]


def load_cifar10(data_dir: Path) -> Dataset:
    """CIFAR-10: 50 000 training and 10 000 test images of ten classes, (N, 3, 32, 32) uint8.

    Raises DataError if it is damaged, or neither there nor to be downloaded.
    """
    if (data_dir / "cifar10").is_dir():
        return _cifar10_from_images(data_dir)
    return _cifar10_from_batches(data_dir)


def _cifar10_from_images(data_dir: Path) -> Dataset:
    def originals(name: str) -> _Originals:
        paths = list_images(data_dir / "cifar10" / name, CIFAR10_CLASSES)
        return _Originals(paths, partial(read_images, paths, CIFAR10_CLASSES, size=(32, 32)))

    train, test = originals("train"), originals("test")
    return _dataset(data_dir, "cifar10", CIFAR10_CLASSES, train, test, test_size=len(test.files))


def _cifar10_from_batches(data_dir: Path) -> Dataset:
    folder = data_dir / CIFAR10.base_folder

    def convert(train: bool) -> Split:
        try:
            original = CIFAR10(data_dir, train=train)
        except RuntimeError:
            raise DataError(f"{folder} is damaged (wrong MD5); {_DELETE_IT}") from None
        images = torch.from_numpy(original.data).permute(0, 3, 1, 2).contiguous()
        return Split(images, torch.tensor(original.targets))

    train = _Originals([folder / name for name, _md5 in CIFAR10.train_list], partial(convert, train=True))
    test = _Originals([folder / name for name, _md5 in CIFAR10.test_list], partial(convert, train=False))
    if not _are_there(train, test):
        _download(CIFAR10, data_dir, f"cifar10/train/<class>/*.jpg and {CIFAR10.base_folder}/")
    return _dataset(data_dir, "cifar10", CIFAR10_CLASSES, train, test, test_size=CIFAR10_TEST_SIZE)


def load_fashion_mnist(data_dir: Path) -> Dataset:
    """Fashion-MNIST: 60 000 training and 10 000 test images of ten classes, (N, 1, 28, 28) uint8.

    Raises DataError if it is damaged, or neither there nor to be downloaded.
    """
    folder = data_dir / "FashionMNIST" / "raw"

    def originals(prefix: str) -> _Originals:
        files = [folder / f"{prefix}-images-idx3-ubyte", folder / f"{prefix}-labels-idx1-ubyte"]
        return _Originals(files, partial(convert, train=prefix == "train"))

    def convert(train: bool) -> Split:
        original = FashionMNIST(data_dir, train=train)
        if original.targets.max() >= len(FashionMNIST.classes):
            raise DataError(f"{folder} is damaged: it has the label {original.targets.max()}; {_DELETE_IT}")
        return Split(original.data.unsqueeze(1), original.targets)

    train, test = originals("train"), originals("t10k")
    if not _are_there(train, test):
        _download(FashionMNIST, data_dir, "FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte")
    _verify_idx_pair(*train.files, size=(28, 28))
    test_size = _verify_idx_pair(*test.files, size=(28, 28))
    return _dataset(data_dir, "fashion-mnist", FashionMNIST.classes, train, test, test_size)


def _dataset(
    data_dir: Path, name: str, classes: Sequence[str], train: _Originals, test: _Originals, test_size: int
) -> Dataset:
    def kept_as(split_name: str, originals: _Originals) -> tuple[Path, str, Sequence[Path], Callable[[], Split]]:
        return data_dir / "hpo-cache", f"{name}-{split_name}", originals.files, originals.convert

    # The test split stays sealed, but a damaged file of it must not show after the search only.
    ensure_converted(*kept_as("test", test))
    sealed = SealedSplit(lambda: cached_split(*kept_as("test", test)), test_size)
    return Dataset(cached_split(*kept_as("train", train)), sealed, tuple(classes))


def _are_there(*splits: _Originals) -> bool:
    return all(path.is_file() for split in splits for path in split.files)


def _download(dataset: type[CIFAR10 | FashionMNIST], data_dir: Path, looked_for: str) -> None:
    """Let torchvision download a data set, one process at a time. Raises DataError if it cannot be reached."""
    _logger.info("%s is not in %s; it is downloaded there.", dataset.__name__, data_dir)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(data_dir / ".download.lock"), _network_timeout(NETWORK_TIMEOUT_SECONDS):
            dataset(data_dir, download=True)
    except (OSError, RuntimeError, HTTPException) as problem:
        reason = " ".join(str(problem).split())
        raise DataError(
            f"no {dataset.__name__} in {data_dir}: looked for {looked_for}, and it could not be downloaded ({reason}). "
            f"Copy the files there, or name the folder that holds them with --data-dir or HPO_DATA_DIR."
        ) from problem


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    """torchvision's downloads set no timeout: a silent network would hold them up for minutes."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def list_images(folder: Path, classes: Sequence[str]) -> list[Path]:
    """The images in `folder/<class>/`, class by class, by name; other files are passed over.

    Raises DataError if the class folders are not the given ones, or one holds no image.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is missing; it must hold a folder of images for each class: {', '.join(classes)}.")
    found = {path.name for path in folders_in(folder)}
    for name in sorted(found ^ set(classes)):
        problem = "is not a class" if name in found else "is missing"
        raise DataError(f"{folder / name} {problem}; the class folders must be {', '.join(classes)}.")
    return [path for name in classes for path in _images_of_class(folder / name)]


def _images_of_class(folder: Path) -> list[Path]:
    images = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(path.name)]
    if not images:
        raise DataError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)}); put those of the class there.")
    return sorted(images, key=lambda path: path.name)


def read_images(paths: Sequence[Path], classes: Sequence[str], size: tuple[int, int]) -> Split:
    """Images of (H, W) pixels as (N, 3, H, W) uint8, each with the class that its folder is named after.

    Raises DataError for an image that is damaged or of another size. A plain loop reads 50 000 images of 32x32 pixels
    in 8 s on one core; a pool of threads was slower.
    """
    inputs = torch.empty(len(paths), 3, *size, dtype=torch.uint8)
    for index, path in enumerate(paths):
        inputs[index] = _read_image(path, size)
        if (index + 1) % 10_000 == 0:
            _logger.info("%d of %d images read.", index + 1, len(paths))
    return Split(inputs, torch.tensor([classes.index(path.parent.name) for path in paths]))


def _read_image(path: Path, size: tuple[int, int]) -> Tensor:
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            width, height = image.size
        if (height, width) == size:  # a small file may unpack into gigabytes
            pixels = np.array(open_photo(path)[0])  # (H, W, 3) uint8
    except Exception as problem:  # a user's file: its decoder may raise anything
        raise DataError(f"{path} is damaged ({problem}); replace it or delete it.") from problem
    if (height, width) != size:
        raise DataError(f"{path} has {_pixels((height, width))} pixels, not {_pixels(size)}; resize it or delete it.")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _pixels(size: Sequence[int]) -> str:
    height, width = size
    return f"{width}x{height}"


def _verify_idx_pair(images: Path, labels: Path, *, size: tuple[int, int]) -> int:
    """Number of examples in two IDX files; raises DataError if one is damaged or they do not belong together."""
    num_images, *image_size = _idx_shape(images, num_dimensions=3)
    (num_labels,) = _idx_shape(labels, num_dimensions=1)
    if tuple(image_size) != size:
        raise DataError(f"{images} has images of {_pixels(image_size)} pixels, not {_pixels(size)}; {_DELETE_IT}")
    if num_images != num_labels:
        raise DataError(f"{labels} has {num_labels} labels for {num_images} images; {_DELETE_IT}")
    return num_labels


def _idx_shape(path: Path, num_dimensions: int) -> tuple[int, ...]:
    """Shape of the uint8 array in an IDX file, from its header and its length; the examples are not read.

    The header is 0, 0, 8 for uint8 and the number of dimensions, each a byte; then each dimension as a big-endian int32
    (http://yann.lecun.com/exdb/mnist).
    """
    length = 4 + 4 * num_dimensions
    with path.open("rb") as file:
        header = file.read(length)
    if len(header) < length or header[:4] != bytes((0, 0, 8, num_dimensions)):
        raise DataError(f"{path} is not an IDX file of {num_dimensions} dimension(s) of uint8; {_DELETE_IT}")
    shape = struct.unpack(f">{num_dimensions}I", header[4:])
    expected, actual = length + math.prod(shape), path.stat().st_size
    if actual != expected:
        raise DataError(f"{path} is damaged: it has {actual} bytes where its header says {expected}; {_DELETE_IT}")
    return shape
