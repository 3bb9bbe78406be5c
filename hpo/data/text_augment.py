"""Augmentation of texts: words are left out, swapped, replaced or hidden, in each text by itself.

A batch is `Padded` ids (B, L). What is random about a text follows from one number that is drawn for it, so that the
draws of an epoch are few, and the same on every device. Wei and Zou 2019, arXiv:1901.11196.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from hpo.data.parts import Padded
from hpo.errors import DataError

MAX_SYNONYMS = 8
"""Of a word; the file's first ones."""


class Seeded:
    """An augmentation whose randomness follows from one number for each example."""

    keeps_positions = True
    """Whether each element stays where it is, so that labels of elements stay right."""

    def draw(self, examples: Tensor, size: Sequence[int], epoch: int, generator: torch.Generator) -> Tensor:
        """The numbers, (N, 1) int64 below 2**31."""
        return torch.randint(2**31, (len(examples), 1), generator=generator)


def uniform(seeds: Tensor, length: int, purpose: int = 0) -> Tensor:
    """For each position of an example a number in [0, 1) that follows from its seed: (B, 1) to (B, length).

    Positions and seeds are mixed as in 32-bit hash functions; each product stays below 2**63.
    """
    mixed = _mixed(_mixed(seeds + 0x9E3779B1 * (purpose + 1) & _BITS) ^ torch.arange(length, device=seeds.device))
    return (mixed >> 8).float() / 2**24


_BITS = 2**32 - 1


def _mixed(numbers: Tensor) -> Tensor:
    for factor in (0x7FEB352D, 0x2C1B3C6D, 0x297A2D39):
        numbers = (numbers ^ (numbers >> 15)) * factor & _BITS
    return numbers ^ (numbers >> 16)


@dataclass(frozen=True)
class DeleteWords(Seeded):
    """Leaves out each word with probability `rate`, but never all of a text."""

    rate: float
    padding: int = 0
    keeps_positions = False

    def apply(self, texts: Padded, seeds: Tensor) -> Padded:
        is_kept = (uniform(seeds, texts.values.shape[1]) >= self.rate) & texts.mask
        is_kept[:, 0] |= ~is_kept.any(1)
        order = (~is_kept).to(torch.uint8).argsort(dim=1, stable=True)
        shorter = Padded(texts.values.gather(1, order), is_kept.sum(1))
        return replace(shorter, values=torch.where(shorter.mask, shorter.values, self.padding))


@dataclass(frozen=True)
class SwapWords(Seeded):
    """Swaps neighbours: each pair, with the first or the second word as the first of all, with probability `rate`."""

    rate: float
    keeps_positions = False

    def apply(self, texts: Padded, seeds: Tensor) -> Padded:
        length = texts.values.shape[1]
        positions = torch.arange(length, device=seeds.device).expand(len(texts), -1)
        is_first = (positions - seeds % 2) % 2 == 0
        left = torch.where(is_first, positions, positions - 1)
        is_pair = (left >= 0) & (left + 1 < texts.lengths[:, None])
        chance = uniform(seeds, length, 1).gather(1, left.clamp(min=0))
        is_swapped = is_pair & (chance < self.rate)
        partner = torch.where(is_first, positions + 1, positions - 1)
        return replace(texts, values=texts.values.gather(1, torch.where(is_swapped, partner, positions)))


@dataclass(frozen=True)
class DropTokens(Seeded):
    """Replaces each token by the `unknown` one with probability `rate`."""

    rate: float
    unknown: int = 0

    def apply(self, texts: Padded, seeds: Tensor) -> Padded:
        is_dropped = (uniform(seeds, texts.values.shape[1], 2) < self.rate) & texts.mask
        return replace(texts, values=torch.where(is_dropped, self.unknown, texts.values))


@dataclass(frozen=True, eq=False)
class ReplaceSynonyms(Seeded):
    """Replaces each word that has synonyms by one of them with probability `rate`."""

    rate: float
    synonyms: Tensor
    """(vocabulary, choices) int64; a word without any has itself."""

    def apply(self, texts: Padded, seeds: Tensor) -> Padded:
        length, (_, num_choices) = texts.values.shape[1], self.synonyms.shape
        choice = (uniform(seeds, length, 3) * num_choices).long()
        others = self.synonyms[texts.values, choice]
        is_replaced = (uniform(seeds, length, 4) < self.rate) & texts.mask
        return replace(texts, values=torch.where(is_replaced, others, texts.values))


def read_synonyms(file: Path | str, ids: Mapping[str, int], vocabulary: int | None = None) -> Tensor:
    """The synonyms of each id, for `Ragged.of(..., synonyms=...)`: (vocabulary, 8) int64.

    A line of the file is a word and its synonyms, with tabs between them, as WordNet's are written; words that are not
    among `ids` are passed over. The vocabulary is by default one more than the largest id. Raises DataError if the
    file is missing or knows none of the words.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"{path} is missing; it has a word and its synonyms in each line, with tabs between them.")
    size = max(ids.values(), default=-1) + 1 if vocabulary is None else vocabulary
    table = torch.arange(size)[:, None].repeat(1, MAX_SYNONYMS)
    num_known = 0
    for line in path.read_text(encoding="utf-8").splitlines():
        word, *synonyms = line.split("\t")
        known = [ids[synonym] for synonym in synonyms if synonym in ids][:MAX_SYNONYMS]
        if word in ids and known:
            num_known += 1
            repeated = known * -(-MAX_SYNONYMS // len(known))
            table[ids[word]] = torch.tensor(repeated[:MAX_SYNONYMS])
    if not num_known:
        raise DataError(f"{path} has no synonyms for any of the {len(ids)} words; it must have tabs between the words.")
    return table
