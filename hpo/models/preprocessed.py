"""A network together with the preprocessing of its data: what is trained is what is deployed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from hpo.config import SEVERAL
from hpo.data.dtypes import of_usual_type
from hpo.data.examples import DataSpec, InputSpec, Split
from hpo.data.kinds import OF_CLASSES, read_greedily
from hpo.data.loaded import Loaded
from hpo.data.parts import (
    Padded,
    Ragged,
    map_parts,
    map_tensors,
    named_parts,
    tensors_of,
    to_device,
    values_and_lengths,
)
from hpo.errors import UsageError
from hpo.models.pretrained import PretrainedNetwork, find_pretrained
from hpo.models.weighing import Weighing
from hpo.objective import NOTHING_OWN, Objective, Own
from hpo.records import Certainty

if TYPE_CHECKING:
    from hpo.data.parts import Batch, Part

SAMPLE_SIZE = 4096
"""Images that the statistics of those in a file are taken from; a split is in random order."""

DATASET_SAMPLE_SIZE = 1024
"""Examples that the statistics of a torch Dataset are taken from."""

CLEARLY = 0.5
"""By how much the logarithm of the deviations is lower if the features are the last side of (N, A, B), and not A."""


class PreprocessedModel(nn.Module):
    """Raw examples in, predictions in the data's own terms out.

    Takes a batch as the task's splits have it: (B, *input_shape) uint8 images as they are stored or features in their
    own units, sequences as `Padded`, or a mapping or tuple of several inputs. Floats and images are normalised by
    channel or by feature, integers are not. Returns what the network does: logits (B, num_classes) of classes or
    labels; numbers (B,) or (B, values) in the targets' units. The statistics are buffers: they are saved, loaded and
    moved with the weights, and so are the parameters of a loss of the task's own.
    """

    target_mean: Tensor  # () or (values,)
    target_std: Tensor
    thresholds: Tensor  # (num_classes,) logits from which on an example has each of several labels

    def __init__(self, network: nn.Module, spec: DataSpec, own: Own = NOTHING_OWN) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.certainty: Certainty | None = None
        """How sure it may be: the winner of a study has it."""
        self.own = own
        if isinstance(own.loss, nn.Module):
            self.own_loss = own.loss
        if own.losses:
            self.weighing = Weighing(own)
            self.own = replace(own, weigh=self.weighing)
        for name, of_input in spec.input_specs.items():
            if of_input.is_normalised:
                self.register_buffer(_buffer("input_mean", name), torch.zeros(_statistics_shape(of_input)))
                self.register_buffer(_buffer("input_std", name), torch.ones(_statistics_shape(of_input)))
        for name, target in self._targets.items():
            shape = target.target_shape if target.kind in _KINDS_OF_NUMBERS else ()
            self.register_buffer(_buffer("target_mean", name), torch.zeros(shape))
            self.register_buffer(_buffer("target_std", name), torch.ones(shape))
        if spec.kind == "multilabel":
            self.register_buffer("thresholds", torch.zeros(len(spec.classes)))
        self.register_load_state_dict_pre_hook(_fill_sides)  # type: ignore[no-untyped-call]

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, in the order of the logits; empty if targets are not classes."""
        return self.spec.classes

    def forward(self, inputs: Batch) -> Any:
        outputs = self.network(self._normalised(inputs))
        if self.own.loss is None and self.spec.kind not in _KINDS_OF_SEVERAL_OUTPUTS:
            outputs = _main_output(outputs)
        if self.spec.kind == "reconstruction":
            return self._restored(outputs)
        if self.spec.kind == SEVERAL and isinstance(outputs, Mapping):  # else whoever checks a task says so
            return {name: self._in_units(name, of_target) for name, of_target in outputs.items()}
        return self._in_units("", outputs)

    @property
    def _targets(self) -> dict[str, DataSpec]:
        """Each of several targets by name; "" for an only one."""
        return {name: self.spec.of(name) for name in self.spec.targets} or {"": self.spec}

    @property
    def _device(self) -> torch.device:
        return next(self.buffers()).device

    def _in_units(self, name: str, outputs: Any) -> Any:
        """Numbers in the units of their target; all others as they are."""
        target = self.spec.of(name) if name in self.spec.targets else self.spec
        if target.kind not in _KINDS_OF_NUMBERS:
            return outputs
        outputs = outputs if target.target_shape else outputs.squeeze(-1)
        if outputs.dtype in (torch.bfloat16, torch.float16):  # which have two or three digits of 2000, and end at 65504
            outputs = outputs.float()
        return outputs * getattr(self, _buffer("target_std", name)) + getattr(self, _buffer("target_mean", name))

    def _restored(self, outputs: Any) -> Any:
        """Reconstructions in the inputs' units: the outputs, or the first of several tensors."""
        std = getattr(self, "input_std", None)
        if std is None:
            return outputs
        first, shape = tensors_of(outputs)[0], self.spec.input_shape
        if first[0].numel() != prod(shape):
            return outputs  # whoever checks a task says so
        restored = (first.reshape(-1, *shape) * std + self.input_mean).view_as(first)
        return map_tensors(lambda tensor: restored if tensor is first else tensor, outputs)

    def _normalised(self, inputs: Batch) -> Any:
        if isinstance(self.spec.inputs, InputSpec):
            return self._one_normalised("", inputs)
        names = iter(self.spec.input_specs)
        return map_parts(lambda batch: self._one_normalised(next(names), batch), inputs)

    def _one_normalised(self, name: str, batch: Tensor | Padded) -> Tensor | Padded:
        mean = getattr(self, _buffer("input_mean", name), None)
        if mean is None:
            return batch
        std = getattr(self, _buffer("input_std", name))
        if isinstance(batch, Padded):
            values = (batch.values - mean).to(mean.dtype).div_(std)
            mask = batch.mask.view(*batch.mask.shape, *[1] * (values.ndim - 2))
            return replace(batch, values=values * mask)  # what fills sequences up stays 0
        # The subtraction converts integers on its way; dividing in place spares a tensor as large as the batch.
        return cast(Tensor, (batch - mean).to(mean.dtype).div_(std))

    def fit_statistics(self, train: Split) -> None:
        """Take mean and standard deviation from the training split; what does not vary is only centred.

        A pretrained network keeps to the inputs' statistics that its weights were trained with. Of images that are not
        in memory a random sample is taken. A network with a method `initialize_from_data` is then shown the first 512
        normalised examples.
        """
        sample = train.select(slice(0, DATASET_SAMPLE_SIZE)).in_memory() if isinstance(train.inputs, Loaded) else train
        for name, part in named_parts(sample.inputs).items():
            if hasattr(self, _buffer("input_mean", name)):
                for of_part, statistic in zip(("input_mean", "input_std"), self._input_statistics(part), strict=True):
                    buffer = getattr(self, _buffer(of_part, name))
                    buffer.copy_(statistic.view_as(buffer))
        for name, target in self._targets.items():
            if target.kind in _KINDS_OF_NUMBERS:
                numbers = cast(Any, train.targets)[name] if name else train.targets
                assert isinstance(numbers, Tensor), "they are numbers"
                for of_part, statistic in zip(
                    ("target_mean", "target_std"), _statistics(numbers.view(len(train), -1)), strict=True
                ):
                    buffer = getattr(self, _buffer(of_part, name))
                    buffer.copy_(statistic.view_as(buffer))
        if initialize := getattr(self.network, "initialize_from_data", None):
            inputs, _ = train.first(512, self._device)
            initialize(self._normalised(inputs))

    def _input_statistics(self, part: Part) -> tuple[Tensor, Tensor]:
        if isinstance(self.network, PretrainedNetwork) and self.network.weights != "none":
            return torch.tensor(self.network.input_mean), torch.tensor(self.network.input_std)
        if isinstance(part, Tensor):
            return _known_statistics.of(part)
        if isinstance(part, Ragged):
            return _input_statistics(part.values)
        return _input_statistics(part[:SAMPLE_SIZE])

    def as_batch(self, inputs: Any) -> Batch:
        """The inputs as a batch on the model's device; raw examples are preprocessed.

        Raises UsageError for examples of another shape.
        """
        if self.spec.preprocessing and self.spec.preprocessing.is_raw(inputs):
            inputs = Split(self.spec.preprocessing.encode(inputs), None).batch(slice(None))[0]
        if isinstance(self.spec.inputs, InputSpec):
            return _as_batch(inputs, self.spec.inputs, self._device)
        specs = cast(Any, self.spec.inputs)
        same = (
            inputs.keys() == specs.keys()
            if isinstance(inputs, Mapping) and isinstance(specs, Mapping)
            else (isinstance(inputs, tuple | list) and isinstance(specs, tuple) and len(inputs) == len(specs))
        )
        if not same:
            raise UsageError(f"the model takes several inputs: {', '.join(named_parts(specs))}.")
        given = inputs if isinstance(inputs, Mapping) else tuple(inputs)
        device = self._device
        return cast("Batch", map_parts(lambda spec, each: _as_batch(each, spec, device), specs, given))

    @torch.no_grad()
    def predict(self, inputs: Any) -> list[Any]:
        """What the model says of each of a batch of raw examples, in evaluation mode.

        A class name; the names of all labels that an example has; a number or several; a mask (H, W) of class indices;
        a box x1 y1 x2 y2; the class name of each element; the classes that were read; an embedding (size,) of length 1;
        a reconstruction; a mapping of these by target. Sequences are given as a list. A task of tables takes a data
        frame or rows as mappings, one of texts a list of texts.
        Raises UsageError for examples of another shape, and for a task whose outputs only its own loss understands.
        """
        if self.spec.kind == "own":
            raise UsageError("only the task's own loss knows what its outputs mean; call the model itself.")
        if has_no_examples(inputs):
            return []
        self.eval()
        batch = self.as_batch(inputs)
        outputs = self(batch)
        if self.spec.kind != SEVERAL:
            return self._predicted(self.spec, outputs, batch)
        of_targets = {name: self._predicted(spec, outputs[name], batch) for name, spec in self._targets.items()}
        return [dict(zip(of_targets, each, strict=True)) for each in zip(*of_targets.values(), strict=True)]

    def _predicted(self, spec: DataSpec, outputs: Any, batch: Batch) -> list[Any]:
        match spec.kind:
            case "classification" | "soft_labels":
                return _named(spec, outputs.argmax(1).tolist())
            case "multilabel":
                given = (outputs > getattr(self, "thresholds", 0.0)).tolist()
                return [[name for name, has in zip(spec.classes, row, strict=True) if has] for row in given]
            case "segmentation":
                return list(outputs.argmax(1).unbind())
            case "embedding" | "instances":
                return list(normalize(outputs, dim=1).unbind())
            case "reconstruction":
                return list(tensors_of(outputs)[0].unbind())
            case "tagging":
                return [_named(spec, row) for row in _without_padding(outputs, batch)]
            case "transcription":
                logits, lengths = values_and_lengths(outputs)
                return [_named(spec, row) for row in read_greedily(logits.argmax(-1), lengths, len(spec.classes))]
            case _:
                return cast(list[Any], outputs.tolist())

    @torch.no_grad()
    def probabilities(self, inputs: Any, *, dropout_samples: int = 0) -> Tensor:
        """The probability of each class for a batch of raw examples, in evaluation mode: (B, num_classes), for masks
        (B, num_classes, H, W), for elements (B, L, num_classes). Those of several labels do not add up to 1.

        With `dropout_samples` it is the mean over that many passes, in which the dropout layers alone act as in
        training: Monte-Carlo dropout (Gal and Ghahramani 2016, arXiv:1506.02142), often slower to be sure of a mistake.
        Raises UsageError if targets are not classes, and for examples of another shape.
        """
        if self.spec.kind not in OF_CLASSES:
            raise UsageError(f"a {self.spec.kind} has no probabilities; call the model itself for its values.")
        self.eval()
        batch = self.as_batch(inputs)
        if not dropout_samples:
            return self._shares(batch)
        for module in self.modules():
            module.training = isinstance(module, _DROPOUTS) or type(module).__name__ in _DROPOUTS_BY_NAME
        mean = torch.stack([self._shares(batch) for _ in range(dropout_samples)]).mean(0)
        self.eval()
        return mean

    def calibrated(self, inputs: Any) -> Tensor:
        """The probabilities (B, num_classes) at the temperature that the validation split chose.

        Raises UsageError for a model without one: see `certainty`.
        """
        temperature = self._require_certainty("calibrated probabilities", "classification").temperature
        assert temperature is not None, "classes have one"
        self.eval()
        with torch.no_grad():
            logits: Tensor = self(self.as_batch(inputs))
        return (logits / temperature).softmax(1)

    def predict_sets(self, inputs: Any, *, coverage: float = 0.9) -> list[list[str]]:
        """The classes that may be right of each of a batch of raw examples, the most probable first.

        The right one is among them for a share `coverage` of new examples of the same kind (least ambiguous sets,
        Sadinle et al. 2019, arXiv:1609.00451). Raises UsageError for a coverage that is not one of COVERAGES, and for a
        model without `certainty`.
        """
        quantile = self._quantile("sets of classes", "classification", coverage)
        probabilities = self.calibrated(inputs)
        sets = in_sets(probabilities, quantile).tolist()
        order = probabilities.argsort(1, descending=True).tolist()
        return [_named(self.spec, [each for each in row if has[each]]) for row, has in zip(order, sets, strict=True)]

    def predict_intervals(self, inputs: Any, *, coverage: float = 0.9) -> Tensor:
        """Between which numbers each target lies, (B, 2), for a share `coverage` of new examples of the same kind.

        All have the same width (split conformal prediction, Lei et al. 2018, arXiv:1604.04173). Raises UsageError as
        `predict_sets` does.
        """
        quantile = self._quantile("intervals", "regression", coverage)
        self.eval()
        with torch.no_grad():
            values = self(self.as_batch(inputs))
        return torch.stack((values - quantile, values + quantile), 1)

    def _quantile(self, what: str, kind: str, coverage: float) -> float:
        quantiles = self._require_certainty(what, kind).quantiles
        if coverage not in quantiles:
            raise UsageError(f"coverage={coverage} is not allowed: use {', '.join(map(str, quantiles))}.")
        return quantiles[coverage]

    def _require_certainty(self, what: str, kind: str) -> Certainty:
        if self.spec.kind != kind:
            raise UsageError(f"{what} are for a task of the kind {kind}, and this one is of the kind {self.spec.kind}.")
        if self.certainty is None:
            raise UsageError(
                f"this model has no {what}: they come with the tested winner of a study, which load_best returns, "
                "unless it was trained on all examples (--folds, --refit)."
            )
        return self.certainty

    def _shares(self, batch: Batch) -> Tensor:
        logits, _ = values_and_lengths(self(batch))
        if self.spec.kind == "multilabel":
            return logits.sigmoid()
        return logits.softmax(1 if self.spec.kind in ("classification", "soft_labels", "segmentation") else -1)


_DROPOUTS = (_DropoutNd, nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Layers that drop something in training; an encoder's layer passes over its dropouts if it is not in training."""

_DROPOUTS_BY_NAME = ("DropBlock", "DropConnectLinear", "StochasticDepth")
"""Those of hpo's networks and of torchvision, which is not imported for them."""

_KINDS_OF_NUMBERS = ("regression", "box")
_KINDS_OF_SEVERAL_OUTPUTS = ("own", "reconstruction", SEVERAL)

MAIN_OUTPUTS = ("logits", "out")
"""The key, or attribute, of the outputs that are trained where a network returns several, as the models of transformers
and torchvision do. Others are ignored."""


def _main_output(outputs: Any) -> Any:
    """The tensor among the outputs that a loss takes; all of them where it is not known, and whoever checks a task says
    so."""
    if isinstance(outputs, Tensor | Padded):
        return outputs
    of_name = outputs.get if isinstance(outputs, Mapping) else partial(_attribute, outputs)
    found = [output for output in map(of_name, MAIN_OUTPUTS) if isinstance(output, Tensor | Padded)]
    return found[0] if found else outputs


def _attribute(outputs: Any, name: str) -> Any:
    return getattr(outputs, name, None)


def in_sets(probabilities: Tensor, quantile: float) -> Tensor:
    """Which classes (N, classes) belong to each example's set; the most probable one always does."""
    sets = probabilities >= 1 - quantile
    return sets.scatter(1, probabilities.argmax(1, keepdim=True), value=True)


def _named(spec: DataSpec, indices: list[int]) -> list[str]:
    return [spec.classes[index] for index in indices]


def _buffer(statistic: str, input_name: str) -> str:
    """Name of the buffer: that of an only input has no suffix."""
    return f"{statistic}_{input_name.replace('.', '_')}" if input_name else statistic


def _statistics_shape(of_input: InputSpec) -> tuple[int, ...]:
    """(C, 1, 1) for images (C, H, W), (F,) for features, () for single numbers; of sequences, for their elements.

    The whole shape for arrays (A, B), of which either side may be the features.
    """
    if not of_input.shape or _has_two_sides(of_input.shape):
        return of_input.shape
    return of_input.shape[0], *[1] * (len(of_input.shape) - 1)


def _fill_sides(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Statistics as they are now, of those that 0.1.0 kept of arrays (A, B): (A, 1)."""
    for name in ("input_mean", "input_std"):
        if isinstance(saved := state_dict.get(prefix + name), Tensor) and saved.ndim == 2:
            state_dict[prefix + name] = saved.expand_as(cast(Tensor, getattr(model, name)))


def _has_two_sides(shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and min(shape) > 1


def has_no_examples(inputs: Any) -> bool:
    """Whether these are an empty list: nothing says what it would hold."""
    return isinstance(inputs, list | Ragged) and len(inputs) == 0


def _as_batch(inputs: Any, spec: InputSpec, device: torch.device) -> Tensor | Padded:
    if spec.is_ragged:
        if not isinstance(inputs, Padded):
            sequences = inputs if isinstance(inputs, Ragged) else Ragged.of(list(inputs))
            inputs = sequences.padded(slice(None), slice(None))
        inputs = replace(inputs, values=_of_type(spec, inputs.values))
        if len(inputs) and int(inputs.lengths.min()) == 0:
            raise UsageError(f"example {int(inputs.lengths.argmin())} is an empty sequence; leave it out.")
        batch, shape = inputs.values, tuple(inputs.values.shape[2:])
        moved: Tensor | Padded = to_device(inputs, device)
    else:
        moved = batch = _of_type(spec, torch.as_tensor(inputs)).to(device)
        shape = tuple(batch.shape[1:])
    if shape != spec.shape:
        raise UsageError(f"the model takes a batch of shape {spec.describe()}, not {tuple(batch.shape)}.")
    if spec.vocabulary is not None and batch.is_floating_point():
        raise UsageError(f"the model takes integers ({spec.dtype}), not {str(batch.dtype).removeprefix('torch.')}.")
    if (
        spec.vocabulary is not None
        and batch.numel()
        and not 0 <= int(batch.min()) <= int(batch.max()) < spec.vocabulary
    ):
        raise UsageError(
            f"the model takes integers from 0 to {spec.vocabulary - 1}, not {int(batch.min())} to {int(batch.max())}."
        )
    return moved


def _of_type(spec: InputSpec, values: Tensor) -> Tensor:
    """Truth values as the numbers or ids of training, and others of a type that torch supports well."""
    return values.to(getattr(torch, spec.dtype)) if values.dtype == torch.bool else of_usual_type(values)


def _without_padding(outputs: Any, batch: Batch) -> list[list[int]]:
    """The best class of each element that a sequence has."""
    best = values_and_lengths(outputs)[0].argmax(-1).tolist()
    lengths = next((each.lengths.tolist() for each in _padded_in(batch)), [None] * len(best))
    return [row[:length] for row, length in zip(best, lengths, strict=True)]


def _padded_in(batch: Batch) -> list[Padded]:
    found: list[Padded] = []
    map_parts(lambda part: found.append(part) if isinstance(part, Padded) else None, batch)
    return found


class MirrorAveraged(nn.Module):
    """A classifier of images whose logits are the mean of those for an image and for its mirror image.

    Test-time augmentation (Krizhevsky et al. 2012, https://doi.org/10.1145/3065386, section 4.1): it suits models that
    were trained on mirror images, too, and takes twice the time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.own = own_of(model)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images) + self.model(images.flip(-1))) / 2


def own_of(model: nn.Module) -> Own:
    """What the model's task brings of its own; nothing where the model is not a task's."""
    own = getattr(model, "own", NOTHING_OWN)
    assert isinstance(own, Own), "a model of a task"
    return own


def build_model(
    objective: Objective, spec: DataSpec, parameters: Mapping[str, Any], seed: int, *, pretrained: bool = True
) -> PreprocessedModel:
    """The task's model with weights that follow from the seed, on the CPU; torch's global generator is left alone.

    Lazy layers get their weights from a batch of zeros. The statistics are those of no data: call `fit_statistics`, or
    load a state dict that has them. Who loads one has no need of `pretrained` weights, which may have to be downloaded;
    DataError says where that fails.
    """
    assert objective.model is not None, "the task has a model"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs as well
        of_loss = objective.loss_parameters() - objective.model_parameters()
        network = objective.model(spec, **{n: value for n, value in parameters.items() if n not in of_loss})
        model = PreprocessedModel(network, spec, objective.own(parameters))
        _materialise(model)
    if pretrained and (found := find_pretrained(model)):
        found.load_pretrained()
    return model


def _materialise(model: PreprocessedModel) -> None:
    """Let lazy layers find out their sizes, so that weights exist before an optimizer or a checkpoint takes them.

    Raises UsageError if one is not reached.
    """
    if not _lazy_weights(model):
        return
    with torch.no_grad():
        model.eval()(_zeros(model.spec))
    model.train()
    if left := _lazy_weights(model):
        raise UsageError(f"the lazy layer {left[0].removeprefix('network.')} is not used in forward: leave it out.")


def _lazy_weights(model: nn.Module) -> list[str]:
    return [name for name, each in (*model.named_parameters(), *model.named_buffers()) if is_lazy(each)]


def _zeros(spec: DataSpec) -> Batch:
    """A batch of two examples of the right types and shapes."""

    def of_input(each: InputSpec) -> Tensor | Padded:
        length = [_LENGTH] if each.is_ragged else []
        zeros = torch.zeros(2, *length, *each.shape, dtype=getattr(torch, each.dtype))
        return Padded(zeros, torch.full((2,), _LENGTH)) if each.is_ragged else zeros

    return cast("Batch", map_parts(of_input, cast(Any, spec.inputs)))


_LENGTH = 8
"""Of the sequences in such a batch."""


class _KnownStatistics:
    """Those of the last inputs, for the next trial of this process, which has the same ones.

    The inputs are not kept alive.
    """

    def __init__(self) -> None:
        self._inputs: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._statistics: tuple[Tensor, Tensor]

    def of(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, computed again if the inputs have changed in place."""
        if inputs.is_inference():  # torch does not count their changes
            return _input_statistics(inputs)
        if self._inputs() is not inputs or self._version != inputs._version:
            self._statistics = _input_statistics(inputs)
            self._inputs, self._version = weakref.ref(inputs), inputs._version
        return self._statistics


_known_statistics = _KnownStatistics()


def _input_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel or feature; of single numbers (N,) one of each."""
    inputs = inputs if inputs.ndim > 1 else inputs[:, None]
    of_second = _uint8_statistics if inputs.dtype == torch.uint8 else _statistics
    if not _has_two_sides(shape := tuple(inputs.shape[1:])):
        return of_second(inputs)
    first, last = of_second(inputs), of_second(inputs.transpose(1, 2))
    if _mean_log(last[1]) < _mean_log(first[1]) - CLEARLY:
        return last[0].expand(shape), last[1].expand(shape)
    return first[0][:, None].expand(shape), first[1][:, None].expand(shape)


def _mean_log(std: Tensor) -> Tensor:
    """How far values are from the means of their channels, of those that vary: the others have 1 (`_safe`)."""
    return std[std != 1].log().mean()


def _uint8_statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, exact: from counts of the 256 values, 0.1 s for CIFAR-10."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in inputs.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64, device=inputs.device)
    mean = shares @ values
    deviations = values - mean[:, None]
    return mean, _safe((shares * deviations.square()).sum(1).sqrt())


def _statistics(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over all dimensions but the second."""
    values = inputs.double().view(len(inputs), *(inputs.shape[1:] or (1,))).transpose(0, 1).flatten(1)
    return values.mean(1), _safe(values.std(1, correction=0))


def _safe(std: Tensor) -> Tensor:
    return torch.where(std > 0, std, 1.0)
