"""A network together with the preprocessing of its data: what is trained is what is deployed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from hpo.data.examples import DataSpec, Split
from hpo.errors import UsageError
from hpo.models.pretrained import PretrainedNetwork, find_pretrained
from hpo.objective import Objective

SAMPLE_SIZE = 4096
"""Images that the statistics of those in a file are taken from; a split is in random order."""


class PreprocessedModel(nn.Module):
    """Raw examples in, predictions in the data's own terms out.

    Takes (B, *input_shape): uint8 images as they are stored, or features in their own units. Inputs are normalised by
    channel or by feature. Gives logits (B, num_classes), or for a regression values (B,) in the target's units. The
    statistics are buffers: they are saved, loaded and moved with the weights.
    """

    input_mean: Tensor  # (C, 1, 1) or (F,)
    input_std: Tensor
    target_mean: Tensor  # ()
    target_std: Tensor

    def __init__(self, network: nn.Module, spec: DataSpec) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        shape = (spec.input_shape[0], *[1] * (len(spec.input_shape) - 1))
        self.register_buffer("input_mean", torch.zeros(shape))
        self.register_buffer("input_std", torch.ones(shape))
        self.register_buffer("target_mean", torch.zeros(()))
        self.register_buffer("target_std", torch.ones(()))

    @property
    def classes(self) -> tuple[str, ...]:
        """Name of each class, in the order of the logits; empty for a regression."""
        return self.spec.classes

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = cast(Tensor, self.network(self._normalised(inputs)))
        if self.classes:
            return outputs
        return outputs.squeeze(-1) * self.target_std + self.target_mean

    def _normalised(self, inputs: Tensor) -> Tensor:
        # The subtraction converts integers on its way; dividing in place spares a tensor as large as the batch.
        return (inputs - self.input_mean).to(self.input_mean.dtype).div_(self.input_std)

    def fit_statistics(self, train: Split) -> None:
        """Take mean and standard deviation from the training split; what does not vary is only centred.

        A pretrained network keeps to the inputs' statistics that its weights were trained with. Of images that are not
        in memory a random sample is taken. A network with a method `initialize_from_data` is then shown the first 512
        normalised examples.
        """
        mean, std = self._input_statistics(train)
        self.input_mean.copy_(mean.view_as(self.input_mean))
        self.input_std.copy_(std.view_as(self.input_std))
        if not self.classes:
            mean, std = _statistics(train.targets[:, None])
            self.target_mean.copy_(mean.squeeze())
            self.target_std.copy_(std.squeeze())
        if initialize := getattr(self.network, "initialize_from_data", None):
            initialize(self._normalised(train.inputs[:512].to(self.input_mean.device)))

    def _input_statistics(self, train: Split) -> tuple[Tensor, Tensor]:
        if isinstance(self.network, PretrainedNetwork) and self.network.weights != "none":
            return torch.tensor(self.network.input_mean), torch.tensor(self.network.input_std)
        if isinstance(train.inputs, Tensor):
            return _known_statistics.of(train.inputs)
        return _input_statistics(train.inputs[:SAMPLE_SIZE])

    def _as_batch(self, inputs: Tensor | NDArray[Any]) -> Tensor:
        batch = torch.as_tensor(inputs).to(self.input_mean.device)
        if tuple(batch.shape[1:]) != self.spec.input_shape:
            wanted = ", ".join(["B", *map(str, self.spec.input_shape)])
            raise UsageError(f"the model takes a batch of shape ({wanted}), not {tuple(batch.shape)}.")
        return batch

    @torch.inference_mode()
    def predict(self, inputs: Tensor | NDArray[Any]) -> list[str] | list[float]:
        """Class name, or value, of each of a batch of raw examples (B, *input_shape), in evaluation mode.

        Raises UsageError for examples of another shape.
        """
        outputs = self(self._as_batch(inputs))
        if not self.classes:
            return cast(list[float], outputs.tolist())
        return [self.classes[index] for index in outputs.argmax(1).tolist()]

    @torch.inference_mode()
    def probabilities(self, inputs: Tensor | NDArray[Any], *, dropout_samples: int = 0) -> Tensor:
        """The probability of each class for a batch of raw examples: (B, num_classes), in evaluation mode.

        With `dropout_samples` it is the mean over that many passes, in which the dropout layers alone act as in
        training: Monte-Carlo dropout (Gal and Ghahramani 2016, arXiv:1506.02142), often slower to be sure of a mistake.
        Raises UsageError for a regression, and for examples of another shape.
        """
        if not self.classes:
            raise UsageError("a regression has no probabilities; call the model itself for its values.")
        self.eval()
        batch = self._as_batch(inputs)
        if not dropout_samples:
            return cast(Tensor, self(batch).softmax(1))
        for module in self.modules():
            module.training = isinstance(module, _DropoutNd)
        mean = torch.stack([self(batch).softmax(1) for _ in range(dropout_samples)]).mean(0)
        self.eval()
        return mean


class MirrorAveraged(nn.Module):
    """A classifier of images whose logits are the mean of those for an image and for its mirror image.

    Test-time augmentation (Krizhevsky et al. 2012, https://doi.org/10.1145/3065386, section 4.1): it suits models that
    were trained on mirror images, too, and takes twice the time.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(images) + self.model(images.flip(-1))) / 2


def build_model(
    objective: Objective, spec: DataSpec, parameters: Mapping[str, Any], seed: int, *, pretrained: bool = True
) -> PreprocessedModel:
    """The task's model with weights that follow from the seed, on the CPU; torch's global generator is left alone.

    Its statistics are those of no data: call `fit_statistics`, or load a state dict that has them. Who loads one has no
    need of `pretrained` weights, which may have to be downloaded; DataError says where that fails.
    """
    assert objective.model is not None, "the task has a model"
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed the GPUs as well
        model = PreprocessedModel(objective.model(spec, **parameters), spec)
    if pretrained and (network := find_pretrained(model)):
        network.load_pretrained()
    return model


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
    """Mean and standard deviation by channel or feature."""
    return _uint8_statistics(inputs) if inputs.dtype == torch.uint8 else _statistics(inputs)


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
    values = inputs.double().transpose(0, 1).flatten(1)
    return values.mean(1), _safe(values.std(1, correction=0))


def _safe(std: Tensor) -> Tensor:
    return torch.where(std > 0, std, 1.0)
