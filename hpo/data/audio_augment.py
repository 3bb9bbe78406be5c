"""Augmentation of sound, for each recording by itself: waveforms (B, T) or (B, C, T), and spectrograms (B, ..., F, T).

Recordings of different lengths are `Padded`: (B, L) waveforms, (B, L, F) spectrograms. As with texts, what is random
about a recording follows from one number that is drawn for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from hpo.data.parts import Padded
from hpo.data.text_augment import Seeded, uniform

Sound = TypeVar("Sound", Tensor, Padded)

GRAIN = 512
"""Samples between two grains of a pitch shift."""


@dataclass(frozen=True)
class Noise(Seeded):
    """Adds white noise of up to `level` times the recording's own deviation."""

    level: float

    def apply(self, sound: Sound, seeds: Tensor) -> Sound:
        values = _values(sound)
        length = values[0].numel()
        angle, radius = uniform(seeds, length, 1), (1 - uniform(seeds, length, 2)).log().mul(-2).sqrt()
        normal = (radius * (2 * math.pi * angle).cos()).view_as(values)  # Box and Muller 1958
        deviation = _per_example(_mean_and_deviation(sound)[1], values)
        amount = _per_example(uniform(seeds, 1)[:, 0], values) * self.level
        return _with_values(sound, values + (amount * deviation * normal).to(values.dtype))


@dataclass(frozen=True)
class Gain(Seeded):
    """Makes the recording louder or quieter by up to `decibels`."""

    decibels: float

    def apply(self, sound: Sound, seeds: Tensor) -> Sound:
        values = _values(sound)
        factor = 10 ** (self.decibels * (2 * uniform(seeds, 1)[:, 0] - 1) / 20)
        return _with_values(sound, values * _per_example(factor, values).to(values.dtype))


@dataclass(frozen=True)
class Speed(Seeded):
    """Plays the recording up to `factor` times as fast, or as slowly: the pitch changes, too.

    A faster one ends in silence, or is shorter where recordings have lengths; a slower one is cut off.
    """

    factor: float
    keeps_positions = False

    def apply(self, sound: Sound, seeds: Tensor) -> Sound:
        values = _values(sound)
        factors = self.factor ** (2 * uniform(seeds, 1)[:, 0] - 1)
        positions = torch.arange(values.shape[-1], device=values.device) * factors[:, None]
        changed = _read_at(values, positions)
        if not isinstance(sound, Padded):
            return changed
        lengths = (sound.lengths / factors).long().clamp(min=1, max=values.shape[-1])
        faster = Padded(changed, lengths)
        return replace(faster, values=changed * faster.mask)


@dataclass(frozen=True)
class Pitch(Seeded):
    """Shifts the pitch by up to `semitones`, either way; the speed stays.

    The recording is played in overlapping grains, each at another speed from where it begins (Roads 1988,
    https://doi.org/10.2307/3679937).
    """

    semitones: float

    def apply(self, sound: Sound, seeds: Tensor) -> Sound:
        values = _values(sound)
        factors = 2 ** (self.semitones / 12 * (2 * uniform(seeds, 1)[:, 0] - 1))
        hop = min(GRAIN, max(1, values.shape[-1] // 4))
        positions = torch.arange(values.shape[-1], device=values.device)
        begins = positions // hop * hop
        share = ((positions - begins) / hop).to(values.dtype)
        first, second = (
            _read_at(values, centre + (positions - centre) * factors[:, None]) for centre in (begins, begins + hop)
        )
        shifted = (1 - share) * first + share * second
        return _with_values(sound, shifted * sound.mask if isinstance(sound, Padded) else shifted)


@dataclass(frozen=True)
class Mask(Seeded):
    """Covers a stretch of up to `share` of all times, or frequencies, with the spectrogram's mean.

    SpecAugment (Park et al. 2019, arXiv:1904.08779, section 2), without warping.
    """

    share: float
    of_time: bool

    def apply(self, sound: Sound, seeds: Tensor) -> Sound:
        values = _values(sound)
        is_padded = isinstance(sound, Padded)
        axis = (1 if self.of_time else 2) if is_padded else values.ndim - (1 if self.of_time else 2)
        size = values.shape[axis]
        lengths = sound.lengths[:, None] if isinstance(sound, Padded) and self.of_time else size
        width = uniform(seeds, 1, 0) * self.share * lengths
        begin = uniform(seeds, 1, 1) * (lengths - width)
        positions = torch.arange(size, device=values.device)
        is_covered = (positions >= begin.round()) & (positions < (begin + width).round())
        is_covered = is_covered.view(len(values), *[size if at == axis else 1 for at in range(1, values.ndim)])
        mean = _per_example(_mean_and_deviation(sound)[0], values)
        return _with_values(sound, torch.where(is_covered, mean, values))


def _values(sound: Tensor | Padded) -> Tensor:
    return sound.values if isinstance(sound, Padded) else sound


def _with_values(sound: Sound, values: Tensor) -> Sound:
    if not isinstance(sound, Padded):
        return values
    return replace(sound, values=torch.where(_is_own(sound), values, sound.values))


def _is_own(sound: Padded) -> Tensor:
    """(B, L, 1 ...) bool: False for what fills a recording up."""
    return sound.mask.view(*sound.mask.shape, *[1] * (sound.values.ndim - 2))


def _mean_and_deviation(sound: Tensor | Padded) -> tuple[Tensor, Tensor]:
    """Those of each recording's own values, (B,) each; what fills it up does not count."""
    if not isinstance(sound, Padded):
        values = sound.flatten(1)
        return values.mean(1), values.std(1, correction=0)
    own = sound.values.float().masked_fill(~_is_own(sound), math.nan).flatten(1)
    mean = own.nanmean(1)
    deviation = (own - mean[:, None]).square().nanmean(1).sqrt()
    return mean.to(sound.values.dtype), deviation.to(sound.values.dtype)


def _per_example(numbers: Tensor, values: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (values.ndim - 1))


def _read_at(values: Tensor, positions: Tensor) -> Tensor:
    """Waveforms (B, ..., T) at positions (B, T) between samples, linearly; silence beyond the ends."""
    last = values.shape[-1] - 1
    before = positions.floor()
    share = (positions - before).to(values.dtype)
    shape = (len(values), *[1] * (values.ndim - 2), values.shape[-1])

    def at(index: Tensor) -> Tensor:
        is_inside = ((index >= 0) & (index <= last)).view(shape)
        rows = index.clamp(0, last).long().view(shape).expand_as(values)
        return values.gather(-1, rows) * is_inside

    return (1 - share).view(shape) * at(before) + share.view(shape) * at(before + 1)
