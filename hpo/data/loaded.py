"""Examples of a map-style torch Dataset, read when a batch is made, with its own transforms and collate function.

Everything random in reading an example follows from the epoch's seed and the example's number, and in collating from
those of the batch: the global generators of Python, numpy and torch are seeded for it. So batches are the same whatever
the number of workers, and after a resume.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from hpo.config import derive_seed
from hpo.data.dtypes import of_usual_type
from hpo.errors import DataError, HpoError, in_one_line

Rows = Tensor | slice
"""Indices (B,) int64, or a slice."""

_TARGETS_PER_BATCH = 64


@dataclass(frozen=True, eq=False)
class Source:
    """A Dataset, and how its examples become batches."""

    training: Any
    """Gives (inputs, target) of an example by its index, with what is random in a training."""
    evaluation: Any
    """Gives the same examples as they are."""
    collate: Callable[[list[Any]], Any]
    """Makes (inputs, targets) of a batch out of a list of examples."""
    num_workers: int
    """Processes that read ahead in a training; 0 reads in the training's own."""


class Loaded:
    """Some examples of a Dataset: nothing of them is in memory."""

    def __init__(self, source: Source, rows: Tensor) -> None:
        """`rows` (N,) int64 are indices of the Dataset."""
        self.source = source
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: Rows) -> Loaded:
        return Loaded(self.source, self.rows[rows])

    def join(self, others: Loaded) -> Loaded:
        """These examples and then others of the same Dataset."""
        return Loaded(self.source, torch.cat((self.rows, others.rows)))

    def read(self, rows: Rows) -> tuple[Any, Any]:
        """Inputs and targets of some examples as they are, as one batch; read in this process."""
        batch = [self.rows[rows].tolist()]
        return next(self._batches(batch, self.source.evaluation, seed=0, num_workers=0))

    def batches(self, rows: Iterable[Rows], *, seed: int | None) -> Iterator[tuple[Any, Any]]:
        """The batch of each of these rows, read ahead by workers. With a `seed`, as a training gets them."""
        batches = [self.rows[some].tolist() for some in rows]
        dataset = self.source.evaluation if seed is None else self.source.training
        return self._batches(batches, dataset, seed=seed or 0, num_workers=self.source.num_workers)

    def _batches(
        self, batches: list[list[int]], dataset: Any, *, seed: int, num_workers: int
    ) -> Iterator[tuple[Any, Any]]:
        if num_workers:
            allow_children()
        loader: DataLoader[Any] = DataLoader(
            _Reader(dataset, seed),
            batch_sampler=batches,
            collate_fn=_Collator(self.source.collate, seed),
            num_workers=num_workers,
            multiprocessing_context="fork" if num_workers else None,
            generator=torch.Generator(),  # or it would draw from the global one
        )
        return iter(loader)


class _Reader(Dataset[Any]):
    """Reads an example after seeding whatever it may draw from."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, row: int) -> tuple[int, Any]:
        try:
            with _seeded(derive_seed(self._seed, row)):
                return row, self._dataset[row]
        except HpoError:
            raise
        except Exception as error:  # user code may raise anything
            raise DataError(f"example {row} of the Dataset cannot be read: {in_one_line(error)}") from error


class _Collator:
    def __init__(self, collate: Callable[[list[Any]], Any], seed: int) -> None:
        self._collate = collate
        self._seed = seed

    def __call__(self, read: list[tuple[int, Any]]) -> tuple[Any, Any]:
        rows, examples = zip(*read, strict=True)
        try:
            with _seeded(derive_seed(self._seed, "batch", rows[0])):
                batch = self._collate(list(examples))
        except Exception as error:  # user code may raise anything
            raise DataError(
                f"examples {rows[0]}, ... of the Dataset do not make a batch: {in_one_line(error)}; give a collate_fn."
            ) from error
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            held = f"{len(batch)} parts" if isinstance(batch, tuple | list) else f"a {type(batch).__name__}"
            raise DataError(f"a batch of the Dataset must be (inputs, targets), but has {held}; give a collate_fn.")
        inputs, targets = (_as_tensors(part) for part in batch)
        return inputs, targets


def _as_tensors(part: Any) -> Any:
    """Lists as tuples, and tensors of a usual type: Python's and numpy's numbers become float64."""
    if isinstance(part, Tensor):
        return of_usual_type(part)
    if isinstance(part, dict):
        return {name: _as_tensors(each) for name, each in part.items()}
    return tuple(map(_as_tensors, part)) if isinstance(part, list | tuple) else part


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The global generators begin with a seed, and are afterwards as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs as well
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def allow_children() -> None:
    """A trial's process is a daemon, which Python lets have no children. These end by themselves when it is gone: torch
    has them watch it."""
    multiprocessing.current_process()._config.pop("daemon", None)  # type: ignore[attr-defined]


def read_targets(source: Source, rows: Sequence[int]) -> list[Any]:
    """The targets of some examples, one after the other."""
    num_workers = source.num_workers if len(rows) > _TARGETS_PER_BATCH else 0
    loader: DataLoader[Any] = DataLoader(
        _Reader(source.evaluation, 0),
        batch_size=_TARGETS_PER_BATCH,
        sampler=rows,
        collate_fn=_targets_of,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,
        generator=torch.Generator(),
    )
    return [target for batch in loader for target in batch]


def _targets_of(read: list[tuple[int, Any]]) -> list[Any]:
    found = []
    for row, example in read:
        if not isinstance(example, tuple | list) or len(example) != 2:
            raise DataError(f"example {row} of the Dataset must be (inputs, target), not a {type(example).__name__}.")
        found.append(example[1])
    return found


def make_source(
    dataset: Any, evaluation: Any, collate: Callable[[list[Any]], Any] | None, num_workers: int
) -> tuple[Source, Tensor]:
    """The source of all examples, with their indices. Raises DataError for what has no length or cannot be indexed."""
    for each, name in ((dataset, "train"), (evaluation, "evaluation")):
        if not hasattr(each, "__getitem__") or not hasattr(each, "__len__"):
            raise DataError(
                f"{name} is a {type(each).__name__} without __getitem__ or __len__; it must be a map-style Dataset."
            )
    if len(dataset) != len(evaluation):
        raise DataError(f"evaluation has {len(evaluation)} examples, but train {len(dataset)}: they must be the same.")
    if num_workers < 0:
        raise DataError(f"num_workers={num_workers} is not allowed: it must be at least 0.")
    return Source(dataset, evaluation, collate or default_collate, num_workers), torch.arange(len(dataset))
