"""The test examples that a model is most sure of and wrong about, as a report shows them."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hpo.data.examples import Split
from hpo.data.mapped import MappedImages
from hpo.records import Mistake

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hpo.data.examples import SealedSplit
    from hpo.data.parts import Examples

NUM_MISTAKES = 12
_SIDE = 64
"""Pixels of a picture at most: they are kept in the study's database."""


def worst_mistakes(
    logits: Tensor, targets: Tensor, *, inputs: Examples, test: SealedSplit, classes: Sequence[str]
) -> list[Mistake]:
    """The mistakes with the largest probabilities, by logits (N, classes) and classes (N,) of the test split.

    `inputs` are those of the split; images that are uint8 become pictures, and what came as a text or a row is one.
    """
    probabilities, answers = logits.cpu().softmax(1).max(1)
    targets = targets.cpu()
    wrong = (answers != targets).nonzero().squeeze(1)
    rows = wrong[probabilities[wrong].argsort(descending=True, stable=True)][:NUM_MISTAKES]
    nothing: list[str | None] = [None] * len(rows)
    pictures = _pictures(inputs, rows) or nothing
    texts = test.texts(rows) or nothing
    return [
        Mistake(
            example=row,
            truth=classes[int(targets[row])],
            answer=classes[int(answers[row])],
            probability=float(probabilities[row]),
            picture=picture,
            text=text,
        )
        for row, picture, text in zip(rows.tolist(), pictures, texts, strict=True)
    ]


def _pictures(inputs: Examples, rows: Tensor) -> list[str] | None:
    """Images (N, C, H, W) uint8 as PNGs in base64, at most `_SIDE` pixels wide and high; None for anything else."""
    if not isinstance(inputs, Tensor | MappedImages) or inputs.dtype != torch.uint8:
        return None
    images = Split(inputs, None).select(rows).in_memory().inputs
    assert isinstance(images, Tensor), "one part, in memory"
    images = images.cpu()
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return None
    share = _SIDE / max(images.shape[2:])
    if share < 1:
        size = [max(1, round(side * share)) for side in images.shape[2:]]
        small = interpolate(images.float(), size=size, mode="bilinear", antialias=True)
        images = small.round().clamp(0, 255).to(torch.uint8)
    return [_as_png(image) for image in images]


def _as_png(image: Tensor) -> str:
    """An image (C, H, W) uint8 of one or three channels, in base64."""
    from PIL import Image

    shown = Image.fromarray(image.squeeze(0).numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy())
    file = BytesIO()
    shown.save(file, "PNG")
    return b64encode(file.getvalue()).decode()
