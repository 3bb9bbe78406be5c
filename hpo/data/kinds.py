"""Kinds of target: what they are called, what targets of each must look like, and by what their examples are divided.

classification   one of several classes             int64 (N,)
soft_labels      a share for each class             floats (N, classes) that add up to 1
multilabel       any number of the classes          bool, 0/1 integers or floats (N, classes)
regression       one number, or several             floats (N,) or (N, values)
segmentation     a class for each pixel             int64 or uint8 (N, H, W)
box              one box, x1 y1 x2 y2               floats (N, 4)
tagging          a class for each element           int64 (N, L), or Ragged int64
transcription    a sequence of classes, shorter than the input (CTC)       Ragged int64
embedding        what is to be close and what apart int64 (N,): examples with the same number are alike
instances        the same without labels            int64 (N,), a number of its own for each example
reconstruction   the inputs themselves              None
several          of several named targets, a kind for each      a mapping
own              whatever the task's own loss takes, or nothing
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpo.data.parts import Examples, Ragged, parts
from hpo.errors import DataError, UnknownNameError

if TYPE_CHECKING:
    from numpy.typing import NDArray

KINDS = (
    "classification",
    "soft_labels",
    "multilabel",
    "regression",
    "segmentation",
    "box",
    "tagging",
    "transcription",
    "embedding",
    "instances",
    "reconstruction",
    "own",
)

OF_CLASSES = ("classification", "soft_labels", "multilabel", "segmentation", "tagging", "transcription")
"""Those whose task names classes."""

EMBEDDING_SIZE = 64
"""Values of an embedding by a network of hpo's; a model of the task's own may return any number."""

IGNORED = -100
"""A label that is not counted, neither in losses nor in metrics: torch's own `ignore_index`."""

IGNORED_IN_BYTES = 255
"""The same in masks of uint8."""


def infer_kind(targets: Examples | None, classes: Sequence[str]) -> str:
    """The kind that targets look like. Boxes and transcriptions look like others, so a task must name them."""
    if targets is None or not isinstance(targets, Tensor | Ragged):
        return "own"
    if not classes:
        return "regression"
    if isinstance(targets, Ragged):
        return "tagging"
    if targets.ndim == 2 and targets.shape[1] == len(classes) and _is_binary(targets):
        return "multilabel"
    return {1: "classification", 2: "tagging", 3: "segmentation"}.get(targets.ndim, "classification")


def num_outputs(kind: str, num_classes: int, target_shape: Sequence[int]) -> int:
    """Outputs of a network for each example, pixel or element; 0 where only the task's own loss can say."""
    if kind == "transcription":
        return num_classes + 1  # the last is CTC's blank
    if kind in OF_CLASSES:
        return num_classes
    if kind in ("embedding", "instances"):
        return EMBEDDING_SIZE
    return {"regression": target_shape[0] if target_shape else 1, "box": 4}.get(kind, 0)


def require_sound_targets(kind: str, targets: Examples | None, classes: Sequence[str]) -> None:
    """Raise DataError for targets that do not fit their kind, which would end every trial."""
    if kind not in KINDS:
        raise UnknownNameError("kind of target", str(kind), KINDS)
    _require_sound_classes(kind, classes)
    if kind == "own":
        return
    if kind == "reconstruction":
        if targets is not None:
            raise DataError("the targets of a reconstruction are the inputs themselves: give None as targets.")
        return
    if not isinstance(targets, Tensor | Ragged):
        raise DataError(f"targets of the kind {kind} must be a tensor, not {_described(targets)}.")
    _CHECKS[kind](targets, classes)


def require_a_tag_for_each_element(inputs: Examples, tags: Examples | None) -> None:
    """Raise DataError if a sequence has more or fewer tags than elements; with several sequences nothing is known."""
    sequences = [part for part in parts(inputs) if isinstance(part, Ragged)]
    if len(sequences) != 1 or not isinstance(tags, Tensor | Ragged):
        return
    lengths = sequences[0].lengths
    num_tags = tags.lengths if isinstance(tags, Ragged) else torch.full_like(lengths, tags.shape[1])
    if not torch.equal(num_tags, lengths):
        row = int((num_tags != lengths).nonzero()[0])
        raise DataError(
            f"example {row} has a sequence of length {lengths[row]}, but tags of length {num_tags[row]}; give a tag "
            f"for each element, and {IGNORED} where none is counted."
        )


def strata(kind: str, targets: Examples | None, num_classes: int) -> NDArray[Any] | None:
    """For each example the group (N,) that both splits shall have in proportion; None where there is none.

    It is its class, or of several labels the rarest that it has, or the class with the largest share.
    """
    if kind == "classification" and isinstance(targets, Tensor):
        return targets.numpy()
    if kind == "soft_labels" and isinstance(targets, Tensor):
        return targets.argmax(1).numpy()
    if kind == "multilabel" and isinstance(targets, Tensor):
        has_label = targets.bool()
        rarity = has_label.sum(0).argsort(stable=True)
        ordered = has_label[:, rarity]
        return torch.where(ordered.any(1), rarity[ordered.int().argmax(1)], num_classes).numpy()
    return None


def labels_of(targets: Any) -> Tensor:
    """A batch of labels as int64, with IGNORED where there is none: of masks, and of padded sequences."""
    if not isinstance(targets, Tensor):
        return torch.where(targets.mask, targets.values, IGNORED).long()
    if targets.dtype == torch.uint8:
        return torch.where(targets == IGNORED_IN_BYTES, IGNORED, targets.long())
    return targets


def read_greedily(best: Tensor, lengths: Tensor | None, blank: int) -> list[list[int]]:
    """The classes that the best outputs (B, T) stand for: repeats are one, and blanks are left out."""
    rows = best.tolist()
    ends = [best.shape[1]] * len(rows) if lengths is None else lengths.tolist()
    return [
        [label for label, _ in itertools.groupby(row[:end]) if label != blank]
        for row, end in zip(rows, ends, strict=True)
    ]


def _require_sound_classes(kind: str, classes: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(classes).items() if count > 1]
    if repeated:
        raise DataError(f"the class name '{repeated[0]}' is given twice; each class needs a name of its own.")
    if kind in OF_CLASSES and not classes:
        raise DataError(f"targets of the kind {kind} need the names of their classes: give classes=[...].")
    if kind not in (*OF_CLASSES, "own") and classes:
        raise DataError(f"targets of the kind {kind} have no classes; leave classes out, or name another kind.")
    if kind == "classification" and len(classes) == 1:
        raise DataError(f"there is only the class '{classes[0]}': a classification needs two, a regression none.")


def _require_classification(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 1:
        raise DataError(f"targets must be the classes' indices, int64 of shape (N,), not {_described(targets)}.")
    _require_indices(targets, classes)


def _require_soft_labels(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    wanted = f"floats of shape (N, {len(classes)}), a share for each class"
    if not isinstance(targets, Tensor) or not targets.is_floating_point() or targets.shape[1:] != (len(classes),):
        raise DataError(f"soft labels must be {wanted}, not {_described(targets)}.")
    sums = targets.sum(1)
    if not (targets >= 0).all() or not torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        row = int((~((targets >= 0).all(1) & ((sums - 1).abs() <= 1e-3))).nonzero()[0])
        raise DataError(
            f"soft labels must be {wanted}, at least 0 and 1 in all; those of example {row} add up to {sums[row]:g}."
        )


def _require_embedding(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 1:
        raise DataError(
            "the targets of an embedding must be int64 of shape (N,), the same number for examples that are alike, "
            f"not {_described(targets)}."
        )
    if len(targets) and _num_different(targets) == len(targets):
        raise DataError(
            "no two examples have the same target, so nothing says which are alike; without labels use "
            "kind='instances'."
        )


def _require_instances(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 1:
        raise DataError(
            f"targets of the kind instances must be torch.arange(N), not {_described(targets)}; with None, "
            "hpo.hold_out makes them."
        )
    if _num_different(targets) < len(targets):
        raise DataError("two examples have the same target; what has labels is of kind='embedding'.")


def _require_multilabel(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.shape[1] != len(classes):
        raise DataError(
            f"targets of several labels must have the shape (N, {len(classes)}), a column for each class, not "
            f"{_described(targets)}."
        )
    if not _is_binary(targets):
        raise DataError("targets of several labels must be 1 where an example has the label and 0 elsewhere.")


def _require_regression(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Tensor) or not targets.is_floating_point() or targets.ndim not in (1, 2):
        is_deep = isinstance(targets, Tensor) and targets.is_floating_point() and targets.ndim > 2
        advice = "flatten each example's, as targets.flatten(1)" if is_deep else "or name the classes"
        raise DataError(
            f"a regression's targets must be floats of shape (N,) or (N, values), not {_described(targets)}; {advice}."
        )
    if not targets.isfinite().all():
        raise DataError("the data's targets hold NaN or infinite values; leave those examples out.")


def _require_box(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Tensor) or targets.ndim != 2 or targets.shape[1] != 4:
        raise DataError(f"boxes must have the shape (N, 4), x1 y1 x2 y2 in pixels, not {_described(targets)}.")
    _require_regression(targets, classes)
    if not (targets[:, :2] < targets[:, 2:]).all():
        row = int((targets[:, :2] >= targets[:, 2:]).any(1).nonzero()[0])
        raise DataError(
            f"boxes must be x1 y1 x2 y2 with x1 < x2 and y1 < y2; that of example {row} is "
            f"{' '.join(f'{value:g}' for value in targets[row].tolist())}."
        )


def _require_segmentation(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Tensor) or targets.dtype not in (torch.int64, torch.uint8) or targets.ndim != 3:
        raise DataError(f"masks must be int64 or uint8 of shape (N, H, W), not {_described(targets)}.")
    ignored = IGNORED_IN_BYTES if targets.dtype == torch.uint8 else IGNORED
    _require_indices(targets, classes, ignored)


def _require_tagging(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    values = targets.values if isinstance(targets, Ragged) else targets
    if values.dtype != torch.int64 or values.ndim != (1 if isinstance(targets, Ragged) else 2):
        raise DataError(
            f"a class for each element must be int64 of shape (N, L), or Ragged int64, not {_described(targets)}."
        )
    _require_indices(values, classes, IGNORED)


def _require_transcription(targets: Tensor | Ragged, classes: Sequence[str]) -> None:
    if not isinstance(targets, Ragged) or targets.dtype != torch.int64 or targets.values.ndim != 1:
        raise DataError(f"transcriptions must be Ragged int64, a sequence for each example, not {_described(targets)}.")
    if len(targets) and int(targets.lengths.min()) == 0:
        row = int(targets.lengths.argmin())
        raise DataError(f"the transcription of example {row} is empty; remove that example.")
    _require_indices(targets.values, classes)


def _require_indices(labels: Tensor, classes: Sequence[str], ignored: int | None = None) -> None:
    """Raise DataError if a label is not the index of a class."""
    counted = labels if ignored is None else labels[labels != ignored]
    if not counted.numel():
        raise DataError("all labels are ignored, so there is nothing to learn.")
    if counted.min() < 0 or counted.max() >= len(classes):
        besides = f", and {ignored} is ignored" if ignored is not None else ""
        raise DataError(
            f"the targets are from {int(counted.min())} to {int(counted.max())}; {len(classes)} classes have the "
            f"indices from 0{besides}."
        )


def _num_different(targets: Tensor) -> int:
    return len(set(targets.tolist()))


def _is_binary(targets: Tensor) -> bool:
    return bool(((targets == 0) | (targets == 1)).all())


def _described(targets: object) -> str:
    if isinstance(targets, Ragged):
        return f"Ragged {targets.dtype}"
    if isinstance(targets, Tensor):
        return f"{targets.dtype} of shape {tuple(targets.shape)}"
    return "None" if targets is None else f"a {type(targets).__name__}"


_CHECKS = {
    "classification": _require_classification,
    "soft_labels": _require_soft_labels,
    "embedding": _require_embedding,
    "instances": _require_instances,
    "multilabel": _require_multilabel,
    "regression": _require_regression,
    "segmentation": _require_segmentation,
    "box": _require_box,
    "tagging": _require_tagging,
    "transcription": _require_transcription,
}
