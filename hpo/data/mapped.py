"""Images that stay in their file: what is read of it is what a batch needs, and the page cache keeps what it can."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor

from hpo.errors import DataError


class MappedImages:
    """Some rows of a file of uint8 images that all have one shape; a slice of it is a tensor.

    It is plain data in which the images are not: a few bytes a row that travel to other processes, which read the same
    pages of memory. Raises DataError if the file is missing or has another length.
    """

    dtype = torch.uint8

    def __init__(self, file: Path, num_images: int, image_shape: tuple[int, ...], rows: Tensor) -> None:
        """`rows` (N,) int64 says which of the file's images are meant, in which order."""
        size = num_images * prod(image_shape)
        if not file.is_file() or file.stat().st_size != size:
            raise DataError(f"{file} is missing or damaged; run the command again to recreate it.")
        self.file = file
        self.rows = rows
        # Shared, though nothing is written: Linux refuses private maps of more than the machine's memory.
        self._images = torch.from_file(str(file), shared=True, size=size, dtype=self.dtype)
        self._images = self._images.view(num_images, *image_shape)

    @property
    def num_images(self) -> int:
        """Images in the file."""
        return len(self._images)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.rows), *self._images.shape[1:]))

    @property
    def ndim(self) -> int:
        return self._images.ndim

    @property
    def nbytes(self) -> int:
        """Size of the images if they were in memory."""
        return self.shape.numel()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice) -> Tensor:
        """The images of a slice, read now."""
        return self._images.index_select(0, self.rows[index])

    def index_select(self, dim: int, index: Tensor, *, out: Tensor | None = None) -> Tensor:
        """The images of indices (B,), read now, into `out` where it is given; `dim` is 0."""
        return torch.index_select(self._images, dim, self.rows[index], out=out)

    def select(self, indices: Tensor | slice) -> MappedImages:
        """Those of them alone; nothing is read."""
        return MappedImages(self.file, self.num_images, tuple(self.shape[1:]), self.rows[indices])

    def join(self, others: MappedImages) -> MappedImages:
        """These and then others of the same file; nothing is read."""
        return MappedImages(self.file, self.num_images, tuple(self.shape[1:]), torch.cat((self.rows, others.rows)))
