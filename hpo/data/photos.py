"""A user's own photographs, of any size, in a folder for each class, or with labels in a CSV.

    photos/<class>/**/*.jpg|png|...                 a fifth is held out as the test split
    photos/{train,test}/<class>/**/*.jpg|png|...    test/ is the test split; val/ is added to train/
    photos/{train,val}/<class>/**/*.jpg|png|...     val/ is the test split
    photos/labels.csv and photos/**/*.jpg|png|...   labels or numbers of each photo; a fifth is held out

Each photo is decoded once: the square out of its middle, SIDE pixels wide, goes into a file in `photos/hpo-cache/` that
trainings map into memory. So an epoch decodes nothing, workers share one copy, and what does not fit into memory is
read from the disk as it is needed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from filelock import FileLock
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from hpo.data.datasets import hold_out
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.folders import files_below, folders_in
from hpo.data.labels import MIN_ROWS, RARE
from hpo.data.mapped import MappedImages
from hpo.data.photo_files import SUFFIXES, Original, open_photo
from hpo.data.photo_labels import LABELS, read_photo_labels
from hpo.errors import DataError, UnknownNameError
from hpo.files import allocate, write_atomically
from hpo.machine import num_cores

_logger = logging.getLogger(__name__)

SIDE = 256
"""Pixels that most pretrained networks' photos are resized to before they are cropped."""

MAX_DAMAGED = 0.05
"""Share of the photos that may be damaged and left out; more look like a mistake."""

_VERSION = 2  # of how photos are decoded: what another one has kept is read again
_CACHE = "hpo-cache"
_NUM_NAMED = 5  # damaged files that a message names


def load_image_folder(
    data_dir: Path, side: int = SIDE, *, label: str = "", kind: str = "auto", rare: str = "refuse"
) -> Dataset:
    """The photos of a folder with a folder for each class, (N, 3, side, side) uint8; the classes are sorted by name.

    If the folder has a `labels.csv`, that says what each photo shows; `label` names the columns that are learned, and
    `kind` whether a single one is a "class" or a "number". Pixels of more than 8 bits are scaled by the range of their
    type, and what is transparent shows white. Hidden folders, folders of the system and, below a class, thumbnails are
    passed over. With `rare="drop"` classes with one or two photos are left out; in a table "refuse" and "train" do
    what they do in `load_table`. Photos that are damaged, or of pixels without a known range, are left out, and named
    in a warning each time. Raises DataError if more than MAX_DAMAGED of them are, and where there are fewer than two
    classes or a class without photos.
    """
    if (data_dir / LABELS).is_file():
        return _with_labels_in_a_table(data_dir, side, label, kind, rare)
    if label:
        raise DataError(f"label={label} names a column, but {data_dir / LABELS} is missing; put it there, or omit it.")
    if rare not in RARE:
        raise UnknownNameError("way with rare classes", rare, RARE, "(--data-option rare=...)")
    train_folders, test_folder = _find_splits(data_dir)
    classes = sorted({folder.name for parent in train_folders for folder in _folders(parent)})
    if len(classes) < 2:
        raise DataError(
            f"{data_dir} must hold a folder of photos for each of two or more classes, but holds "
            f"{len(classes) or 'none'}; name the right folder with --data-dir."
        )
    photos = [photo for parent in train_folders for photo in _list_photos(parent, classes)]
    all_classes = classes
    if rare == "drop":
        classes, photos = _without_rare(data_dir, classes, photos)
    num_train = len(photos)
    if test_folder:
        photos += _list_photos(test_folder, classes, left_out=set(all_classes) - set(classes))
    _require_all_classes(data_dir, photos[:num_train], classes)
    album = _Album(data_dir, [path for path, _ in photos], side)
    sound = album.open()
    targets = torch.tensor([label for _, label in photos])

    def split(rows: Tensor) -> Split:
        return Split(album.images(rows), targets[rows])

    if test_folder is None:
        return hold_out(album.images(sound), targets[sound], classes)
    train, test = sound[sound < num_train], sound[sound >= num_train]
    return Dataset(split(train), SealedSplit(lambda: split(test), len(test)), tuple(classes))


def _with_labels_in_a_table(data_dir: Path, side: int, label: str, kind: str, rare: str) -> Dataset:
    photos = read_photo_labels(data_dir, label, kind, rare)
    album = _Album(data_dir, photos.paths, side)
    sound = album.open()
    return hold_out(album.images(sound), photos.targets[sound], photos.classes)


def read_photos(paths: Iterable[str | Path], side: int = SIDE) -> Tensor:
    """Photos of any size as a model that was trained on a folder takes them, (N, 3, side, side) uint8.

    Raises DataError for one that is missing or damaged.
    """
    images = []
    for path in paths:
        try:
            images.append(_read(Path(path), side)[0])
        except Exception as problem:  # a user's file: its decoder may raise anything
            raise DataError(f"{path} cannot be read ({problem}); choose another photo.") from problem
    return torch.stack(images)


def _find_splits(data_dir: Path) -> tuple[list[Path], Path | None]:
    """The folders that hold training photos, and the one with test photos where there is one."""
    if not data_dir.is_dir():
        raise DataError(
            f"there is no directory {data_dir}; use one that holds a subdirectory of photos for each class."
        )
    names = {folder.name for folder in _folders(data_dir)}
    if not ("train" in names and len(names) > 1 and names <= {"train", "val", "test"}):
        return [data_dir], None
    test = "test" if "test" in names else "val"
    return [data_dir / name for name in ("train", "val") if name in names - {test}], data_dir / test


def _folders(parent: Path) -> list[Path]:
    return list(folders_in(parent, besides=(_CACHE,)))


def _list_photos(parent: Path, classes: Sequence[str], left_out: Collection[str] = ()) -> list[tuple[Path, int]]:
    """Every photo below `parent/<class>/` with the index of its class, by name."""
    photos, num_others, passed_over = [], 0, Counter[str]()
    for folder in _folders(parent):
        if folder.name in left_out:
            continue
        if folder.name not in classes:
            raise DataError(f"{folder} is not a class of the training photos; they have {', '.join(classes)}.")
        label = classes.index(folder.name)
        files = files_below(folder)
        found = [(path, label) for path in files.found if path.suffix.lower() in SUFFIXES]
        photos += found
        num_others += len(files.found) - len(found)
        passed_over += files.passed_over
    if num_others:
        _logger.warning("%d files in %s are skipped: photos are %s.", num_others, parent, ", ".join(SUFFIXES))
    if passed_over:
        listed = ", ".join(f"{count} in '{name}'" for name, count in passed_over.most_common(_NUM_NAMED))
        _logger.warning(
            "%d files in %s are passed over, because they are hidden, thumbnails or the system's: %s.",
            passed_over.total(), parent, listed,
        )  # fmt: skip
    return photos


def _without_rare(
    data_dir: Path, classes: Sequence[str], photos: Sequence[tuple[Path, int]]
) -> tuple[list[str], list[tuple[Path, int]]]:
    """The classes that have at least MIN_ROWS photos, and their photos."""
    counts = Counter(label for _, label in photos)
    kept = [label for label in range(len(classes)) if counts[label] >= MIN_ROWS]
    if few := [f"'{name}' ({counts[label]})" for label, name in enumerate(classes) if label not in kept]:
        _logger.warning("classes in %s with one or two photos are left out: %s.", data_dir, ", ".join(few))
    if len(kept) < 2:
        raise DataError(f"{data_dir} has fewer than two classes with {MIN_ROWS} photos; omit rare=drop.")
    return [classes[label] for label in kept], [(path, kept.index(label)) for path, label in photos if label in kept]


def _require_all_classes(data_dir: Path, photos: Sequence[tuple[Path, int]], classes: Sequence[str]) -> None:
    there = {label for _, label in photos}
    empty = [name for label, name in enumerate(classes) if label not in there]
    if empty:
        raise DataError(f"class '{empty[0]}' in {data_dir} has no photos ({', '.join(SUFFIXES)}); put some there.")


@dataclass(frozen=True)
class _Album:
    """The file with all photos of a folder, made where it is missing or the folder has changed."""

    data_dir: Path
    paths: Sequence[Path]
    side: int

    def images(self, rows: Tensor) -> MappedImages:
        return MappedImages(self._file, len(self.paths), (3, self.side, self.side), rows)

    def open(self) -> Tensor:
        """Indices of the photos that are sound; the others are named in a warning."""
        try:
            self._file.parent.mkdir(exist_ok=True)
            with FileLock(self._file.parent / ".photos.lock"):
                if not self._is_made():
                    self._make()
        except OSError as problem:
            raise DataError(
                f"the photos cannot be kept in {self._file.parent} ({problem.strerror}); they need "
                f"{self._num_bytes / 1e6:.0f} MB there. Make room, or name a folder that links to the classes' folders."
            ) from problem
        damaged: dict[str, str] = json.loads(self._index.read_bytes())["damaged"]
        if damaged:
            _logger.warning(
                "%d of %d photos in %s cannot be used and are skipped: %s. The full list is in %s.",
                len(damaged), len(self.paths), self.data_dir, _listed(damaged), self._index,
            )  # fmt: skip
        names = (self._name(path) for path in self.paths)
        return torch.tensor([row for row, name in enumerate(names) if name not in damaged])

    def _is_made(self) -> bool:
        are_there = self._index.is_file() and self._file.is_file()
        return are_there and self._file.stat().st_size == self._num_bytes

    def _make(self) -> None:
        _logger.info("%d photos are read; next time they come from the cache.", len(self.paths))
        for outdated in self._file.parent.glob(f"photos-{self.side}.*"):
            outdated.unlink()
        unfinished = self._file.with_name(f".{self._file.name}.{uuid4().hex}.tmp")
        try:
            with unfinished.open("xb") as file:
                allocate(file.fileno(), self._num_bytes)
                damaged, originals = self._decode_into(unfinished)
                self._require_few(damaged)
                os.fsync(file.fileno())
            unfinished.replace(self._file)
        finally:
            unfinished.unlink(missing_ok=True)
        write_atomically(self._index, json.dumps({"damaged": damaged, "originals": originals}).encode())

    def _decode_into(self, file: Path) -> tuple[dict[str, str], list[list[Any] | None]]:
        """Write each photo to its row; what is wrong with those that could not be read, by name, and what each was."""
        images = torch.from_file(str(file), shared=True, size=self._num_bytes, dtype=torch.uint8)
        images = images.view(len(self.paths), 3, self.side, self.side)

        def decode(row: int) -> str | Original:
            try:
                images[row], original = _read(self.paths[row], self.side)
            except UnidentifiedImageError:
                return "not an image"
            except Exception as problem:  # a user's file: its decoder may raise anything
                return " ".join(str(problem).split()) or type(problem).__name__
            return original

        damaged: dict[str, str] = {}
        originals: list[list[Any] | None] = []
        with ThreadPoolExecutor(num_cores()) as threads:  # Pillow lets go of the GIL while it works
            for row, found in enumerate(threads.map(decode, range(len(self.paths)))):
                originals.append(list(astuple(found)) if isinstance(found, Original) else None)
                if isinstance(found, str):
                    damaged[self._name(self.paths[row])] = found
                if (row + 1) % 10_000 == 0:
                    _logger.info("%d of %d photos read.", row + 1, len(self.paths))
        return damaged, originals

    def _require_few(self, damaged: dict[str, str]) -> None:
        if len(damaged) > MAX_DAMAGED * len(self.paths):
            raise DataError(
                f"{len(damaged)} of {len(self.paths)} photos in {self.data_dir} cannot be used, more than "
                f"{MAX_DAMAGED:.0%} of them: replace or delete them. They are {_listed(damaged)}."
            )

    @property
    def _num_bytes(self) -> int:
        return len(self.paths) * 3 * self.side**2

    @property
    def _file(self) -> Path:
        return self.data_dir / _CACHE / f"photos-{self.side}.{self._fingerprint}.bin"

    @property
    def _index(self) -> Path:
        """Names the photos that cannot be used, and says what each original was."""
        return self._file.with_suffix(".json")

    @cached_property
    def _fingerprint(self) -> str:
        """Changes when a photo is added, removed, renamed, resized or written to."""
        digest = hashlib.sha256(f"{_VERSION}".encode())
        for path in self.paths:
            status = path.stat()
            digest.update(f"{self._name(path)}\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        return digest.hexdigest()[:16]

    def _name(self, path: Path) -> str:
        return os.path.relpath(path, self.data_dir)  # labels.csv may name photos elsewhere


def _listed(damaged: dict[str, str]) -> str:
    named = "; ".join(f"{name} ({problem})" for name, problem in list(damaged.items())[:_NUM_NAMED])
    return f"{named} and {len(damaged) - _NUM_NAMED} more" if len(damaged) > _NUM_NAMED else named


def originals_of(images: MappedImages) -> list[Original]:
    """What the file of each photo was, for photos that `load_image_folder` has read."""
    stored = json.loads(images.file.with_suffix(".json").read_bytes())["originals"]
    return [Original(*stored[row]) for row in images.rows.tolist()]


def _read(path: Path, side: int) -> tuple[Tensor, Original]:
    """The square out of the middle of a photo, upright and in colour, (3, side, side) uint8."""
    upright, original = open_photo(path, draft=side)
    square = ImageOps.fit(upright, (side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1), original
