"""MixUp and CutMix: pairs of examples, and of their targets, mixed into one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from hpo.config import TrainConfig
from hpo.data.mapped import MappedImages
from hpo.data.parts import is_image_or_number
from hpo.errors import UsageError

if TYPE_CHECKING:
    from hpo.data.examples import DataSpec, Split


@dataclass(frozen=True)
class Mixing:
    """Mixes each example of a batch with the one before it, by a share of its own.

    MixUp (Zhang et al. 2018, arXiv:1710.09412) adds the two up; CutMix (Yun et al. 2019, arXiv:1905.04899) puts a
    rectangle of the other image into the first. The share of each follows the beta distribution with both parameters
    `mixup` or `cutmix`; 0 turns it off, and where both are on each example gets one of them by chance. torchvision's
    draw one share for a whole batch.
    """

    mixup: float
    cutmix: float
    num_classes: int
    """0 where targets are numbers."""

    def check(self, split: Split) -> None:
        """Raise UsageError if the examples cannot be mixed so."""
        inputs, targets = split.inputs, split.targets
        if not isinstance(inputs, Tensor | MappedImages) or not is_image_or_number(inputs.dtype):
            raise UsageError("mixup and cutmix are for one input of images or numbers: use 0.")
        if not isinstance(targets, Tensor) or (targets.ndim > 1 and not targets.is_floating_point()):
            raise UsageError("mixup and cutmix are for targets of one class or of numbers: use 0.")
        if self.cutmix > 0 and inputs.ndim != 4:
            raise UsageError(f"cutmix={self.cutmix} is for images (C, H, W); this task's examples are vectors: use 0.")

    def draw(self, examples: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        """For each example, on the CPU: its own share, whether it is cut (0 or 1), and the cut's centre (y, x)."""
        # RandomState's stream is frozen (NEP 19); torch draws no beta from a generator.
        stream = np.random.RandomState(int(torch.randint(2**31, (), generator=generator)))
        chance = 0.5 if self.mixup > 0 and self.cutmix > 0 else float(self.cutmix > 0)
        is_cut = stream.uniform(size=len(examples)) < chance
        shares = [stream.beta(alpha, alpha, len(examples)) if alpha > 0 else 0 for alpha in (self.mixup, self.cutmix)]
        draws = (np.where(is_cut, shares[1], shares[0]), is_cut, *stream.uniform(size=(2, len(examples))))
        return torch.from_numpy(np.stack(draws, axis=1)).float()

    def apply(self, inputs: Tensor, targets: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Mixed inputs of the same shape, floats; and targets: (B, num_classes) shares, or (B,) values."""
        own_share, is_cut, *centre = draws.unbind(1)
        own = own_share.view(-1, *[1] * (inputs.ndim - 1))  # of each pixel, or of all of them
        if self.cutmix > 0:
            kept = ~_rectangles(inputs.shape[-2:], 1 - own_share, centre)[:, None]
            own = torch.where(is_cut.view_as(own) > 0, kept.to(own.dtype), own)
            own_share = own.expand(-1, 1, *inputs.shape[-2:]).mean((1, 2, 3))  # a rectangle may leave the image
        values = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        mixed = torch.lerp(values.roll(1, 0), values, own.to(values.dtype))
        if not self.num_classes:
            share = own_share.to(targets.dtype).view(-1, *[1] * (targets.ndim - 1))
            return mixed, torch.lerp(targets.roll(1, 0), targets, share)
        # Not functional.one_hot, which looks at the values and so waits for a GPU.
        shares = (targets[:, None] == torch.arange(self.num_classes, device=targets.device)).to(own_share.dtype)
        return mixed, torch.lerp(shares.roll(1, 0), shares, own_share[:, None])


def build_mixing(config: TrainConfig, spec: DataSpec) -> Mixing | None:
    """What `config` asks for; None where examples stay as they are. Raises UsageError for targets that do not mix."""
    if not (config.mixup > 0 or config.cutmix > 0):
        return None
    if spec.kind not in ("classification", "regression"):
        raise UsageError(f"mixup and cutmix do not work with targets of the kind {spec.kind}: use 0.")
    return Mixing(config.mixup, config.cutmix, len(spec.classes))


def _rectangles(size: Sequence[int], area: Tensor, centre: Sequence[Tensor]) -> Tensor:
    """Whether each pixel lies in the rectangle of that share of the image, as wide as the image is: (B, H, W) bool."""
    near = []
    for side, position in zip(size, centre, strict=True):
        first = ((position - area.sqrt() / 2) * side).round()[:, None]
        last = ((position + area.sqrt() / 2) * side).round()[:, None]
        pixels = torch.arange(side, device=area.device)
        near.append((pixels >= first) & (pixels < last))
    return near[0][:, :, None] & near[1][:, None, :]
