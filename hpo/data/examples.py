"""Examples of a task: a split in memory, the sealed test split, the data set, and what a model must know about it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from math import prod
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import Tensor

from hpo.config import SEVERAL
from hpo.data.conversion import TargetConversion, convert_inputs, same_parts
from hpo.data.kinds import infer_kind, num_outputs, require_a_tag_for_each_element, require_sound_targets
from hpo.data.loaded import Loaded
from hpo.data.mapped import MappedImages
from hpo.data.parts import (
    Examples,
    Padded,
    Ragged,
    is_image_or_number,
    map_parts,
    named_parts,
    parts,
    select,
    taken,
    to_device,
)
from hpo.data.preprocessing import Preprocessing, preprocessing_from_dict
from hpo.errors import DataError, UsageError

if TYPE_CHECKING:
    from hpo.data.parts import Batch, Part, Rows
    from hpo.data.preprocessing import RawExamples


SAMPLE_SIZE = 256
"""Examples of a torch Dataset that its inputs are known by."""

Vocabulary = int | tuple[int, ...]
"""How many different integers there are, or how many in each column."""

Groups = Tensor | np.ndarray[Any, Any] | Sequence[Any]
"""A name or a number for each example."""


@dataclass(frozen=True)
class Split:
    """Examples of one split, in memory; images that do not fit there stay in a file, and are read when indexed."""

    inputs: Examples
    """One part or several (see hpo.data.parts), such as (N, C, H, W) uint8 images or (N, F) float32 features."""

    targets: Examples | None
    """What is to be learned (see hpo.data.kinds), such as (N,) int64 class indices; None where there is nothing."""

    def __len__(self) -> int:
        return next(map(len, parts(self.inputs)), 0)

    @property
    def parts(self) -> list[Part]:
        """All that inputs and targets are made of."""
        return parts(self.inputs) + ([] if self.targets is None else parts(self.targets))

    @property
    def is_plain(self) -> bool:
        """Whether inputs and targets are a tensor each, so that batches of one size have one shape."""
        return isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor)

    @property
    def device(self) -> torch.device:
        """Where the examples are; images in a file count as on the CPU."""
        return next((part.device for part in self.parts if isinstance(part, Tensor | Ragged)), torch.device("cpu"))

    @property
    def num_bytes(self) -> int:
        """Size of all that is in memory; images that stay in their file are not."""
        return sum(part.nbytes for part in self.parts if isinstance(part, Tensor | Ragged))

    def select(self, rows: Rows) -> Split:
        """The split of some of the examples; nothing is read of images in a file."""
        return Split(select(self.inputs, rows), None if self.targets is None else select(self.targets, rows))

    def to(self, device: torch.device | str) -> Split:
        """The split on a device. No part may be images in a file, which have none."""

        def move(part: Part) -> Part:
            return cast("Part", part.to(device))  # type: ignore[union-attr]

        def moved(examples: Examples) -> Examples:
            return cast("Examples", map_parts(move, examples))

        return Split(moved(self.inputs), None if self.targets is None else moved(self.targets))

    def in_memory(self) -> Split:
        """The split with images that were in a file read, and the examples of a torch Dataset as they are."""
        if isinstance(self.inputs, Loaded):
            inputs, targets = self.inputs.read(slice(None))
            return Split(*(map_parts(_stored, part) for part in (inputs, targets)))

        def read(part: Part) -> Part:
            return part[:] if isinstance(part, MappedImages) else part

        return Split(map_parts(read, self.inputs), self.targets)

    def batch(self, rows: Rows, rows_there: Rows | None = None) -> tuple[Batch, Batch]:
        """Inputs and targets of these rows as a batch, where the split is; without targets the inputs stand for them.

        `rows` are on the CPU; `rows_there` are the same where the split is, if that is elsewhere.
        """
        if isinstance(self.inputs, Loaded):
            return self.inputs.read(rows)
        there = rows if rows_there is None else rows_there
        inputs = taken(self.inputs, rows, there)
        return inputs, inputs if self.targets is None else taken(self.targets, rows, there)

    def sample(self, num_examples: int, device: torch.device | str, num_copies: int = 1) -> Split:
        """A split of the first examples alone, on a device; with several copies each of them follows itself."""
        if num_copies > 1:
            rows = torch.arange(min(len(self), max(1, num_examples // num_copies))).repeat_interleave(num_copies)
            return self.select(rows).in_memory().to(device)
        return self.select(slice(0, num_examples)).in_memory().to(device)

    def first(self, num_examples: int, device: torch.device | str) -> tuple[Batch, Batch]:
        """The first examples as a batch, on a device."""
        return to_device(self.batch(slice(0, num_examples)), device)

    def require_sound(self, spec: DataSpec) -> None:
        """Raise DataError for what would end every trial, and on a GPU without a word about the cause."""
        sample = self._looked_at()
        for name, part in named_parts(sample.inputs).items():
            _require_sound_input(f"the data's inputs{f' ({name})' if name else ''}", part)
        spec.require_sound_targets(self.targets)
        kinds = {name: target.kind for name, target in spec.targets.items()} or {"": spec.kind}
        for name, tags in named_parts({} if sample.targets is None else sample.targets).items():
            if kinds.get(name) == "tagging":
                require_a_tag_for_each_element(sample.inputs, tags)
        if spec.kind == "reconstruction" and not (
            isinstance(self.inputs, Tensor) and is_image_or_number(self.inputs.dtype)
        ):
            raise DataError(
                "a reconstruction is of one tensor of images or floats; other inputs need a loss of their own."
            )

    def _looked_at(self) -> Split:
        """The examples whose inputs are looked at before a search: of a torch Dataset the first ones alone."""
        return self.select(slice(0, SAMPLE_SIZE)).in_memory() if isinstance(self.inputs, Loaded) else self

    def require_like(self, spec: DataSpec) -> None:
        """Raise DataError if the examples of a test split are not of the kind that a model was made for, or not
        sound."""
        sample = self._looked_at()
        given, wanted = named_parts(sample.inputs), spec.input_specs
        if given.keys() != wanted.keys():
            raise DataError(f"the test split has the inputs {', '.join(given)}, not {', '.join(wanted)}.")
        for name, part in given.items():
            found, known = InputSpec.of(part), wanted[name]
            of_name = f" of the input {name}" if name else ""
            if not found.is_like(known):
                raise DataError(
                    f"the examples{of_name} of the test split are {found.dtype} {found.describe()}, but those of the "
                    f"training split {known.dtype} {known.describe()}."
                )
            if found.vocabulary and known.vocabulary and found.vocabulary > known.vocabulary:
                raise DataError(
                    f"the examples{of_name} of the test split hold the integer {found.vocabulary - 1}, which no other "
                    "example has; give the Dataset a larger vocabulary."
                )
        try:
            _require_rows(sample)
            self.require_sound(spec)
        except DataError as error:
            raise DataError(f"in the test split, {error}") from error

    def fingerprints(self) -> list[bytes]:
        """A hash of the inputs of each example: equal inputs have equal hashes."""
        if isinstance(self.inputs, Loaded):
            batches = (self.select(slice(first, first + SAMPLE_SIZE)) for first in range(0, len(self), SAMPLE_SIZE))
            return [digest for batch in batches for digest in batch.in_memory().fingerprints()]
        digests = [blake2b(digest_size=16) for _ in range(len(self))]
        for part in parts(self.inputs):
            for digest, content in zip(digests, _bytes_of_examples(part), strict=True):
                digest.update(content)
        return [digest.digest() for digest in digests]


def _require_sound_input(name: str, part: Part) -> None:
    values = part.values if isinstance(part, Ragged) else part
    if not isinstance(values, Tensor):
        return
    if values.is_complex():
        raise DataError(f"{name} are complex numbers; give torch.view_as_real of them.")
    if values.is_floating_point() and not values.isfinite().all():
        raise DataError(f"{name} hold NaN or infinite values; fill them in or leave those examples out.")
    if not values.is_floating_point() and values.dtype != torch.uint8 and values.numel() and values.min() < 0:
        raise DataError(
            f"{name} hold the integer {int(values.min())}; integers are ids (tokens, categories) and count from 0. "
            "Numbers become floats with .float()."
        )
    if isinstance(part, Ragged) and len(part) and int(part.lengths.min()) == 0:
        raise DataError(f"{name} have an empty sequence (example {int(part.lengths.argmin())}); leave it out.")


def _stored(part: Any) -> Any:
    """What a split holds of a part of a batch: sequences without what fills them up."""
    if not isinstance(part, Padded):
        return part
    return Ragged.of([row[:length] for row, length in zip(part.values, part.lengths.tolist(), strict=True)])


def _bytes_of_examples(part: Part) -> Any:
    if isinstance(part, Ragged):
        for example in torch.split(part.values, part.lengths.tolist()):
            yield example.numpy().tobytes() + len(example).to_bytes(8, "little")
        return
    for first in range(0, len(part), 1024):
        for example in part[first : first + 1024].numpy():
            yield np.ascontiguousarray(example).tobytes()


def converted(split: Split, convert: TargetConversion) -> Split:
    """The split as the trainer takes it; the split itself where nothing is to be converted."""
    inputs = convert_inputs(split.inputs)
    targets = convert(split.targets)
    is_as_it_was = same_parts(inputs, split.inputs) and same_parts(targets, split.targets)
    return split if is_as_it_was else Split(inputs, targets)


class SealedSplit:
    """The test split: opened once, for the winner of a study.

    Before that only its size is visible, and whether a winner can be tested; `times_opened` lets a test check this.
    """

    def __init__(
        self, read: Callable[[], Split], size: int, texts: Callable[[Tensor], list[str]] | None = None
    ) -> None:
        self._read = read
        self._size = size
        self._texts = texts
        self.times_opened = 0

    def __len__(self) -> int:
        return self._size

    def open(self) -> Split:
        """The examples. Only the final report of a study calls this."""
        self.times_opened += 1
        return self._read()

    def texts(self, rows: Tensor) -> list[str] | None:
        """Some examples by row (M,) int64 as a person reads them; None where they are tensors from the beginning."""
        return self._texts(rows) if self._texts else None

    def converted(self, convert: TargetConversion) -> SealedSplit:
        """The same split, still sealed, with targets converted as those of the training split were."""
        return SealedSplit(lambda: converted(self._read(), convert), self._size, self._texts)

    def require_like(self, spec: DataSpec) -> None:
        """Raise DataError for examples that a model for this spec cannot be tested with. The split stays sealed."""
        self._read().require_like(spec)

    def count_known(self, fingerprints: Collection[bytes]) -> int:
        """Number of examples whose fingerprint is among these. The split stays sealed."""
        return sum(fingerprint in fingerprints for fingerprint in self._read().fingerprints())


@dataclass(frozen=True)
class Dataset:
    """All examples of a task."""

    train: Split
    test: SealedSplit
    classes: tuple[str, ...] | Mapping[str, Sequence[str]] = ()
    """The name of each class, by index; empty where there are none. By name where targets are several."""

    kind: str | Mapping[str, str] | None = None
    """The kind of target, one of hpo.data.kinds.KINDS; None for what the targets look like. By name where targets are
    several: with classes or kinds by name, each target has a kind, and a loss and metrics of its own."""

    vocabulary: Vocabulary | Mapping[str, Vocabulary] | None = None
    """How many different integers (token ids, categories) the inputs may hold, or a column of them each; by name where
    inputs are several. None for as many as the training examples need."""

    normalise: bool | Mapping[str, bool] = True
    """Whether floats and images are given to the network with mean 0 and deviation 1; by name where inputs are several.
    Integers other than uint8 never are."""

    raw: RawExamples | None = None
    """Rows of a table or texts as they came; the inputs are then row numbers, until the examples are divided and
    `encoded` makes tensors of them."""

    groups: Groups | None = None
    """(N,) names or numbers: training examples with the same one belong together, as those of a patient do. None of
    them is validated on while others are trained on. Becomes int64."""

    is_ordered: bool = False
    """Whether the training examples are in the order of time: the last fifth of them is then validated on."""

    def __post_init__(self) -> None:
        if not isinstance(self.train, Split):
            return
        if self.groups is not None:
            object.__setattr__(self, "groups", numbered_groups(self.groups, len(self.train)))
            if self.is_ordered:
                raise DataError(
                    "examples are divided by groups or by their order, not by both: omit groups or is_ordered (of a "
                    "table, group or order)."
                )
        if isinstance(self.train.inputs, Loaded):
            return
        convert = TargetConversion.of(self.train.targets, self.classes, self.kind)
        train = converted(self.train, convert)
        if train is self.train and not convert.first and convert.names == self.classes:
            return
        object.__setattr__(self, "train", train)
        object.__setattr__(self, "classes", convert.names)
        if isinstance(self.test, SealedSplit):
            object.__setattr__(self, "test", self.test.converted(convert))

    def encoded(self, train: Split, validation: Split) -> tuple[Split, Split, DataSpec]:
        """The splits as tensors, with what a model must know: preprocessing is fitted on the training split alone."""
        if self.raw is None:
            return train, validation, self.spec
        assert isinstance(train.inputs, Tensor), "they are row numbers"
        preprocessing = self.raw.fit(train.inputs)
        train, validation = (self._encode(split, preprocessing) for split in (train, validation))
        spec = replace(self, train=train, vocabulary=preprocessing.vocabulary, raw=None, groups=None).spec
        return train, validation, replace(spec, preprocessing=preprocessing)

    def test_for(self, spec: DataSpec) -> SealedSplit:
        """The test split as a model with this spec takes it, still sealed."""
        preprocessing = spec.preprocessing
        if self.raw is None or preprocessing is None:
            return self.test
        raw = self.raw

        def texts(rows: Tensor) -> list[str]:
            inputs = self.test.open().inputs
            assert isinstance(inputs, Tensor), "they are row numbers"
            return raw.texts(inputs[rows], preprocessing)

        return SealedSplit(lambda: self._encode(self.test.open(), preprocessing), len(self.test), texts)

    def _encode(self, split: Split, preprocessing: Preprocessing) -> Split:
        assert self.raw is not None, "there are raw examples"
        assert isinstance(split.inputs, Tensor), "they are row numbers"
        return Split(self.raw.encode(split.inputs, preprocessing), split.targets)

    @cached_property  # integer inputs are scanned for it
    def spec(self) -> DataSpec:
        """Raises DataError if the data are not made of tensors and the like, one row for each example.

        Of raw examples the inputs are not known before they are divided.
        """
        if isinstance(self.train.inputs, Loaded):
            return self._spec_of_sample()
        _require_rows(self.train)
        targets = self.train.targets
        if isinstance(self.classes, Mapping) or isinstance(self.kind, Mapping):
            return DataSpec(inputs=self._input_specs(), kind=SEVERAL, targets=self._target_specs())
        return DataSpec(
            inputs=self._input_specs(),
            classes=tuple(self.classes),
            kind=self.kind or infer_kind(targets, self.classes),
            target_shape=tuple(targets.shape[1:]) if isinstance(targets, Tensor) else (),
        )

    def _spec_of_sample(self) -> DataSpec:
        """What some examples of a torch Dataset say of all. Raises DataError for ids without a vocabulary."""
        kind = self.kind or ("own" if self.train.targets is None else None)
        sample = self.train.select(slice(0, SAMPLE_SIZE)).in_memory()
        spec = replace(self, train=sample, kind=kind, groups=None).spec
        for name, each in spec.input_specs.items():
            if each.vocabulary is not None and _for_input(self.vocabulary, name) is None:
                raise DataError(
                    f"the inputs{f' ({name})' if name else ''} of the Dataset are {each.dtype}, which are ids; give "
                    "from_torch a vocabulary=, or give floats."
                )
        return spec

    def _target_specs(self) -> dict[str, TargetSpec]:
        targets = self.train.targets
        if not isinstance(targets, Mapping):
            raise DataError("classes or kinds by name are for several targets: give a mapping of them.")
        classes: Any = self.classes or {}
        kinds: Any = self.kind or {}
        for given, what in ((classes, "classes"), (kinds, "kind")):
            if not isinstance(given, Mapping):
                raise DataError(f"the targets are several ({', '.join(targets)}), so {what} must be a mapping.")
            if unknown := sorted(given.keys() - targets.keys()):
                raise DataError(f"{what} names the target '{unknown[0]}'; the targets are {', '.join(targets)}.")
        return {
            name: TargetSpec(
                kind=kinds.get(name) or infer_kind(part, classes.get(name, ())),
                classes=tuple(classes.get(name, ())),
                shape=tuple(part.shape[1:]) if isinstance(part, Tensor) else (),
            )
            for name, part in targets.items()
        }

    def _input_specs(self) -> Any:
        named = named_parts(self.train.inputs)
        for given, what in ((self.vocabulary, "vocabulary"), (self.normalise, "normalise")):
            if isinstance(given, Mapping) and (unknown := sorted(given.keys() - named.keys())):
                raise DataError(f"{what} names the input '{unknown[0]}'; the inputs are {', '.join(named) or 'one'}.")
        specs = {
            name: InputSpec.of(part, _for_input(self.vocabulary, name), bool(_for_input(self.normalise, name, True)))
            for name, part in named.items()
        }
        names = iter(named)
        return map_parts(lambda part: specs[next(names)], self.train.inputs)


def _require_rows(split: Split) -> None:
    """Raise DataError if inputs and targets are not made of tensors and the like, one row for each example."""
    named = {f"input {name}" if name else "inputs": part for name, part in named_parts(split.inputs).items()}
    if split.targets is not None:
        named |= {f"target {name}" if name else "targets": part for name, part in named_parts(split.targets).items()}
    if not named:
        raise DataError("the data have no inputs.")
    for name, part in named.items():
        if not isinstance(part, Tensor | MappedImages | Ragged):
            raise DataError(
                f"the data's {name} must be a torch tensor, hpo.Ragged or hpo.MappedImages, or a mapping or tuple of "
                f"them, not a {type(part).__name__}."
            )
        if isinstance(part, Tensor) and part.ndim == 0:
            raise DataError(f"the data's {name} must have a row for each example, but have no dimension.")
    (first, part), *others = named.items()
    for name, other in others:
        if len(other) != len(part):
            raise DataError(f"the data have {len(part)} {first} for {len(other)} {name}.")


def numbered_groups(groups: Groups, num_examples: int) -> Tensor:
    """The number of each example's group, (N,) int64. Raises DataError if there is not one for each example."""
    known = np.asarray(groups)
    missing = [row for row, name in enumerate(known.tolist()) if name is None or name != name]
    if missing:
        raise DataError(f"groups have no entry for example {missing[0]}; an example that stands alone needs its own.")
    if known.shape != (num_examples,):
        raise DataError(f"groups must have one entry for each of the {num_examples} examples, not {known.shape}.")
    return torch.from_numpy(np.unique(known, return_inverse=True)[1].reshape(-1).astype(np.int64))


def _for_input(given: Any, name: str, default: Any = None) -> Any:
    return given.get(name, default) if isinstance(given, Mapping) else given


@dataclass(frozen=True)
class InputSpec:
    """What a model must know about one input."""

    shape: tuple[int, ...]
    """Of one example, (C, H, W) or (F,); of one element where it is a sequence of any length."""

    dtype: str = "float32"

    is_ragged: bool = False
    """Whether examples are sequences of different lengths, so that a batch is `Padded`."""

    vocabulary: int | None = None
    """How many different integers there are, the largest being one less; None for what is not an integer."""

    categories: tuple[int, ...] = ()
    """The same for each column of integers (N, F)."""

    is_normalised: bool = True
    """Whether the network gets it with mean 0 and deviation 1."""

    @classmethod
    def of(cls, part: Part, vocabulary: Vocabulary | None = None, normalise: bool = True) -> Self:
        """Raises DataError if the examples hold more than a vocabulary that is given."""
        values = part.values if isinstance(part, Ragged) else part
        found = _largest(values) if isinstance(values, Tensor) else None
        columns: tuple[int, ...] = ()
        if found is not None and isinstance(part, Tensor) and part.ndim == 2:
            columns = tuple((part.amax(0).long() + 1).tolist())
        if found is not None and vocabulary is not None:
            columns = _require_within(found, columns, vocabulary)
            found = (max(vocabulary) if isinstance(vocabulary, tuple) else vocabulary) - 1
        return cls(
            shape=tuple(values.shape[1:]),
            dtype=str(values.dtype).removeprefix("torch."),
            is_ragged=isinstance(part, Ragged),
            vocabulary=None if found is None else found + 1,
            categories=columns,
            is_normalised=normalise and found is None,
        )

    def is_like(self, other: InputSpec) -> bool:
        """Whether a model for the other takes it: floats of any precision are alike."""
        types = {"float" if "float" in each.dtype else each.dtype for each in (self, other)}
        return len(types) == 1 and (self.shape, self.is_ragged) == (other.shape, other.is_ragged)

    def describe(self) -> str:
        """As in messages: "int64 (B, length)"."""
        sides = ["B", *(["length"] if self.is_ragged else []), *map(str, self.shape)]
        return f"({', '.join(sides)})"


def _largest(values: Tensor) -> int | None:
    """The largest of integers that are ids; None for floats and images."""
    if values.is_floating_point() or values.is_complex() or values.dtype == torch.uint8:
        return None
    return int(values.max()) if values.numel() else 0


def _require_within(largest: int, columns: tuple[int, ...], given: Vocabulary) -> tuple[int, ...]:
    """The number of categories in each column. Raises DataError if the examples hold more than was given."""
    if isinstance(given, tuple):
        for column, (needed, allowed) in enumerate(zip(columns, given, strict=True)):
            if needed > allowed:
                raise DataError(f"column {column} holds the integer {needed - 1}, but its vocabulary is {allowed}.")
        return given
    if largest >= given:
        raise DataError(
            f"the inputs hold the integer {largest}, but a vocabulary of {given} ends at {given - 1}; give a larger "
            "one, or replace what is rare."
        )
    return (given,) * len(columns)


@dataclass(frozen=True)
class TargetSpec:
    """What a model must know about one of several targets."""

    kind: str
    classes: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class DataSpec:
    """What a model must know about the data: plain values, stored beside each checkpoint."""

    inputs: InputSpec | Mapping[str, Any] | tuple[Any, ...]
    """One input, or a mapping or tuple of several, as in the split. A shape such as (1, 8, 8) stands for floats."""

    classes: tuple[str, ...] = ()

    kind: str = ""
    """The kind of target, one of hpo.data.kinds.KINDS; by default a classification if there are classes, else a
    regression."""

    target_shape: tuple[int, ...] = ()
    """Of one example's target, where all have the same."""

    preprocessing: Preprocessing | None = None
    """What makes tensors of raw examples, such as rows of a table; None if the inputs are tensors anyway."""

    targets: Mapping[str, TargetSpec] = field(default_factory=dict)
    """Each of several targets that have a loss and metrics of their own."""

    def __post_init__(self) -> None:
        if isinstance(self.inputs, tuple) and all(isinstance(side, int) for side in self.inputs):
            object.__setattr__(self, "inputs", InputSpec(self.inputs))
        if not self.kind:
            object.__setattr__(self, "kind", "classification" if self.classes else "regression")

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) or (F,) of the numbers of an example, for a network that takes nothing else.

        Raises UsageError if there are several inputs, sequences of different lengths, or ids.
        """
        only = self.only_input
        if only.is_ragged:
            raise UsageError("this network takes examples of one shape; the inputs are sequences of different lengths.")
        if only.vocabulary is not None:
            raise UsageError(
                f"this network takes numbers; the inputs are {only.dtype}, which are ids (tokens, categories) and need "
                "an embedding. Numbers become floats with .float()."
            )
        return only.shape

    @property
    def only_input(self) -> InputSpec:
        """Raises UsageError if there are several inputs."""
        if not isinstance(self.inputs, InputSpec):
            names = ", ".join(named_parts(cast(Any, self.inputs)))
            raise UsageError(f"this network takes one input; the task has several ({names}), so it needs its own.")
        return self.inputs

    @property
    def input_specs(self) -> dict[str, InputSpec]:
        """All inputs by name: "" for a single one."""
        return cast(dict[str, InputSpec], named_parts(cast(Any, self.inputs)))

    def of(self, target: str) -> DataSpec:
        """The same for one of several targets, so that `spec.of("price").num_outputs` outputs are for it."""
        found = self.targets[target]
        return replace(self, classes=found.classes, kind=found.kind, target_shape=found.shape, targets={})

    def require_sound_targets(self, targets: Examples | None) -> None:
        """Raise DataError for targets that do not fit their kind, which would end every trial."""
        if self.kind != SEVERAL:
            require_sound_targets(self.kind, targets, self.classes)
            return
        if not isinstance(targets, Mapping) or targets.keys() != self.targets.keys():
            raise DataError(f"the targets must be a mapping of {', '.join(self.targets)}.")
        for name, found in self.targets.items():
            if found.kind in _ALONE:
                raise DataError(
                    f"the target {name} is of the kind {found.kind}, which cannot be combined with others; use a loss "
                    "of your own, without classes or kinds by name."
                )
            try:
                require_sound_targets(found.kind, targets[name], found.classes)
            except DataError as error:
                raise DataError(f"the target {name}: {error}") from error

    @property
    def num_outputs(self) -> int:
        """One logit per class (and one more for a transcription's blank), one value per number, or per value of the
        inputs for a reconstruction. Embeddings have 64, but a model of the task's own may return any number.

        Raises UsageError if only the task's own loss can say.
        """
        if self.kind == "reconstruction":
            return prod(self.input_shape)
        count = num_outputs(self.kind, len(self.classes), self.target_shape)
        if self.kind == SEVERAL:
            raise UsageError("several targets have outputs each: spec.of(NAME).num_outputs, in a mapping by name.")
        if not count:
            raise UsageError(
                "the loss of this task is its own, so its model must know the number of outputs by itself."
            )
        return count

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "inputs": map_parts(asdict, self.inputs),
            "classes": list(self.classes),
            "kind": self.kind,
            "target_shape": list(self.target_shape),
            "preprocessing": self.preprocessing and self.preprocessing.to_dict(),
            "targets": {name: asdict(target) for name, target in self.targets.items()},
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `to_dict` described, after JSON too."""
        if "input_shape" in plain:  # as version 0.1 wrote it
            return cls(InputSpec(tuple(plain["input_shape"])), tuple(plain["classes"]))
        inputs, shape = _input_specs_from(plain["inputs"]), tuple(plain["target_shape"])
        preprocessing = preprocessing_from_dict(plain.get("preprocessing"))
        targets = {
            name: TargetSpec(target["kind"], tuple(target["classes"]), tuple(target["shape"]))
            for name, target in plain.get("targets", {}).items()
        }
        return cls(inputs, tuple(plain["classes"]), plain["kind"], shape, preprocessing, targets)


_ALONE = ("own", "instances", "reconstruction", SEVERAL)
"""Kinds that one of several targets cannot have."""


def _input_specs_from(plain: Any) -> Any:
    if isinstance(plain, list | tuple):
        return tuple(map(_input_specs_from, plain))
    if isinstance(plain.get("shape"), list | tuple) and "is_ragged" in plain:
        return InputSpec(**plain | {name: tuple(plain[name]) for name in ("shape", "categories")})
    return {name: _input_specs_from(each) for name, each in plain.items()}
