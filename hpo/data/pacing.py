"""What grows over the epochs: the share of examples that are drawn (a curriculum), and the size of the examples."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hpo.data.parts import Padded, Ragged, map_parts
from hpo.errors import UsageError

if TYPE_CHECKING:
    from hpo.config import TrainConfig
    from hpo.data.examples import DataSpec, Split
    from hpo.data.parts import Batch

Difficulty = Callable[[Any, Any], Tensor]
"""From the inputs and targets of a split, as it holds them, to a number for each example (N,), larger for harder."""

NUM_STAGES = 4
"""Sizes before the full one: each new size costs a GPU the choice of its algorithms again."""

MEASURED_KINDS = ("classification", "soft_labels", "multilabel", "regression", "segmentation", "box")
"""Those whose loss of a batch is the mean of one for each example."""


@dataclass(frozen=True)
class Pace:
    """A share that grows from `start` in the first epoch to 1 after `until` of all epochs.

    It grows linearly, or with `pacing` "root" by the square root, which is faster at first (Platanios et al. 2019,
    arXiv:1903.09848, equation 8).
    """

    start: float
    until: float
    max_epochs: int
    pacing: str = "linear"

    def share(self, epoch: int) -> float:
        """In (0, 1], for an epoch from 1."""
        passed = self.passed(epoch)
        if self.pacing == "root":
            return math.sqrt(self.start**2 + (1 - self.start**2) * passed)
        return self.start + (1 - self.start) * passed

    def passed(self, epoch: int) -> float:
        """How far it is on its way, in [0, 1]."""
        length = self.until * self.max_epochs
        return 1.0 if epoch - 1 >= length else (epoch - 1) / length


class Curriculum:
    """The examples that an epoch draws from: the easiest first, more of them from epoch to epoch.

    Bengio et al. 2009, https://doi.org/10.1145/1553374.1553380. Where `difficulty` (N,) is None, as it is in the first
    epoch of one that goes by the losses, the examples are drawn at random.
    """

    def __init__(self, pace: Pace, num_examples: int, least: int, difficulty: Tensor | None) -> None:
        """Draws from no fewer than `least` examples."""
        self.difficulty = difficulty
        self.pace = pace
        self._num_examples = num_examples
        self._least = least

    def pool(self, epoch: int, generator: torch.Generator) -> Tensor | None:
        """The rows of the examples, on the CPU; None for all."""
        size = max(self._least, math.ceil(self.pace.share(epoch) * self._num_examples))
        if size >= self._num_examples:
            return None
        if self.difficulty is None:
            return torch.randperm(self._num_examples, generator=generator)[:size]
        return self.difficulty.argsort(stable=True)[:size]


def build_curriculum(
    config: TrainConfig, split: Split, spec: DataSpec, difficulty: Difficulty | None
) -> Curriculum | None:
    """What `config` asks for; None where every epoch draws from all examples. Raises UsageError if it cannot be."""
    if config.curriculum == "none":
        return None
    least = min(len(split), config.batch_size * config.accumulate)
    pace = Pace(config.curriculum_start, config.curriculum_until, config.max_epochs, config.curriculum_pacing)
    if config.curriculum == "loss":
        if spec.kind not in MEASURED_KINDS or config.loss in ("own", "dice") or not split.is_plain:
            raise UsageError(
                "curriculum='loss' needs a loss of hpo's that is known for each example; give the Objective a "
                "difficulty= and use curriculum='given'."
            )
        return Curriculum(pace, len(split), least, None)
    if difficulty is None:
        raise UsageError(
            "curriculum='given' needs an Objective with difficulty=, a function (inputs, targets) -> a number for each "
            "example; or use curriculum='loss'."
        )
    return Curriculum(pace, len(split), least, _measured(difficulty, split))


def _measured(difficulty: Difficulty, split: Split) -> Tensor:
    try:
        found = difficulty(split.inputs, split.targets)
    except Exception as error:  # user code may raise anything
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UsageError(f"the task's difficulty fails with the training split: {reason}") from error
    if not isinstance(found, Tensor) or found.shape != (len(split),):
        given = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise UsageError(f"the task's difficulty must give a tensor of shape ({len(split)},), not {given}.")
    found = found.double().cpu()
    if not found.isfinite().all():
        raise UsageError("the task's difficulty must be finite for every example.")
    return found


@dataclass(frozen=True)
class Growth:
    """Examples that are smaller at first: images are shrunk, and sequences end earlier.

    In four stages of equal length, then in full (Karras et al. 2018, arXiv:1710.10196; of sequences Li et al. 2022,
    arXiv:2108.06084).
    """

    pace: Pace
    longest: int
    """Elements of the longest sequence; 0 for images."""

    def share(self, epoch: int) -> float:
        stage = math.floor(self.pace.passed(epoch) * NUM_STAGES) / NUM_STAGES
        return self.pace.start + (1 - self.pace.start) * stage

    def apply(self, inputs: Batch, targets: Batch, epoch: int) -> tuple[Batch, Batch]:
        """The batch as it is in this epoch; targets of pixels or elements are cut alike."""
        share = self.share(epoch)
        if share == 1:
            return inputs, targets
        if self.longest:
            length = max(1, math.ceil(share * self.longest))
            return _shortened(inputs, length), _shortened(targets, length)
        height, width = (max(1, round(share * side)) for side in inputs.shape[-2:])
        return _resized(inputs, height, width), _with_fewer_pixels(targets, height, width)

    def describe(self, epoch: int, split: Split) -> str:
        """The size of the examples in this epoch, in words."""
        share = self.share(epoch)
        if self.longest:
            return f"sequences of at most {max(1, math.ceil(share * self.longest))} elements"
        assert not isinstance(split.inputs, Ragged), "they are images"
        return "images of " + "x".join(str(max(1, round(share * side))) for side in split.inputs.shape[-2:])  # type: ignore[union-attr]


def build_growth(config: TrainConfig, split: Split, spec: DataSpec) -> Growth | None:
    """What `config` asks for; None where examples have their full size. Raises UsageError if they have none."""
    if config.progressive_start == 1:
        return None
    pace = Pace(config.progressive_start, config.progressive_until, config.max_epochs)
    inputs = split.inputs
    if isinstance(inputs, Ragged) and spec.kind not in ("transcription", "own", "several"):
        return Growth(pace, int(inputs.lengths.max()))
    is_of_images = not isinstance(inputs, Ragged | dict | tuple) and getattr(inputs, "ndim", 0) == 4
    if is_of_images and spec.kind in (*MEASURED_KINDS[:-1], "embedding", "instances"):
        return Growth(pace, 0)
    raise UsageError(
        f"progressive_start={config.progressive_start} is for one input of images or of sequences, and targets that do "
        f"not depend on their size (here {spec.kind}): use 1."
    )


def _shortened(batch: Batch, length: int) -> Batch:
    def shorten(part: Tensor | Padded) -> Tensor | Padded:
        if not isinstance(part, Padded):
            return part
        return Padded(part.values[:, :length], part.lengths.clamp(max=length))

    return map_parts(shorten, batch)


def _resized(images: Tensor, height: int, width: int) -> Tensor:
    values = images if images.dtype.is_floating_point else images.float()
    smaller = functional.interpolate(values, (height, width), mode="bilinear", antialias=True, align_corners=False)
    return smaller if images.dtype.is_floating_point else smaller.round().clamp(0, 255).to(images.dtype)


def _with_fewer_pixels(masks: Batch, height: int, width: int) -> Batch:
    """Masks (B, H, W) by their nearest pixels; other targets as they are."""
    if not isinstance(masks, Tensor) or masks.ndim != 3:
        return masks
    rows, columns = (
        ((torch.arange(size, device=masks.device) + 0.5) * full / size).long()
        for size, full in zip((height, width), masks.shape[1:], strict=True)
    )
    return masks[:, rows][:, :, columns]
