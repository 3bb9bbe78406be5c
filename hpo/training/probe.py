"""A look into a network at the end of an epoch: whether its errors reach every layer, and which units are dead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpo.data.batches import evaluation_batches
from hpo.data.parts import tensors_of, to_device
from hpo.models.layers import SquaredReLU
from hpo.training.device import in_fitting_batches

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.data.examples import Split
    from hpo.training.losses import LossFunction, Scale

NUM_EXAMPLES = 128
VANISHED = 1e-4
"""Relative gradient (see `relative_gradients`) below which a layer hardly learns. Right after their initialisation
healthy networks of 2 to 20 layers have 2e-3 and more, and those whose signal dies out 1e-5 (Fashion-MNIST)."""

EXPLODED = 30.0
"""Relative gradient of a hidden layer above which a step tears it apart; healthy networks have less than 1."""


LEAST_ERROR = 1e-6
"""What is right up to rounding says nothing."""


class Probe:
    """Measures a network on the same training examples each time, in evaluation mode.

    So it draws no random numbers, leaves batch norms and gradients alone, and needs no sync with the device. It costs
    about as much as a step with 128 examples. `num_at_a_time` keeps it within the memory of a training step;
    `target_scale` is that of the losses, and each example is there as often as in a batch.
    """

    def __init__(
        self,
        train: Split,
        loss_function: LossFunction,
        *,
        target_scale: Scale = 1.0,
        num_at_a_time: int = NUM_EXAMPLES,
        num_views: int = 1,
        device: str = "cpu",
    ) -> None:
        # A split that is streamed is not on the device.
        self._examples = train.sample(NUM_EXAMPLES, device, num_views)
        self._loss_function = loss_function
        self._target_scale = to_device(target_scale, device)
        self._num_at_a_time = max(1, num_at_a_time)

    def measure(self, model: nn.Module) -> dict[str, Tensor]:
        """Scalars on the device, by name; what a model does not have is left out.

        gradient_first, gradient_middle, gradient_last   relative gradients of these layers, see `relative_gradients`
        vanishing_layers    the highest layer, from 1, whose relative gradient is below VANISHED; 0 where none is
        dead_units          share of the units behind an activation that do not answer to any of the examples
        """

        def attempt(num_at_a_time: int) -> dict[str, Tensor]:
            self._num_at_a_time = num_at_a_time  # what fits in one epoch fits in the next
            return self._measure(model)

        return in_fitting_batches(attempt, self._num_at_a_time)

    def _measure(self, model: nn.Module) -> dict[str, Tensor]:
        model.eval()
        with _units_watched(model) as units, backward_in_evaluation_mode(model):
            gradients = relative_gradients(
                model, self._examples, self._loss_function, self._target_scale, self._num_at_a_time
            )
        measured = {}
        if len(gradients):
            layers = torch.arange(1, len(gradients) + 1, device=gradients.device)
            measured = {
                "gradient_first": gradients[0],
                "gradient_middle": gradients[(len(gradients) - 1) // 2],
                "gradient_last": gradients[-1],
                "vanishing_layers": (layers * (gradients < VANISHED)).max(),
            }
        if units:
            dead = torch.cat([~is_alive.flatten() for is_alive in units])
            measured["dead_units"] = dead.double().mean()
        return measured


def layers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are trained, by name: all matrices and kernels, in the order in which the model lists them."""
    return {name: p for name, p in model.named_parameters() if p.ndim > 1 and p.requires_grad}


def relative_gradients(
    model: nn.Module,
    examples: Split,
    loss_function: LossFunction,
    target_scale: Scale = 1.0,
    num_at_a_time: int = NUM_EXAMPLES,
) -> Tensor:
    """For each of the model's `layers` (L,), how much of the error at the outputs reaches it.

    It is the norm of the layer's gradient, divided by the norm of its weights and by the mean norm of the gradient that
    the loss of an example has at the outputs. So it depends neither on how well the network does already nor on the
    scale of its weights. NaN where there is no error left, empty where no gradient leads to any layer. The mode of the
    model is the caller's.
    """
    weights = list(layers(model).values())
    gradients = [torch.zeros_like(weight) for weight in weights]
    error, target_scale = torch.zeros((), device=examples.device), to_device(target_scale, examples.device)
    for inputs, targets in evaluation_batches(examples, num_at_a_time):
        outputs = model(inputs)
        loss = loss_function(outputs, targets)
        leaving = [each for each in tensors_of(outputs) if each.requires_grad]
        if not (weights and leaving and loss.requires_grad):
            return torch.empty(0)
        found = torch.autograd.grad(loss, [*leaving, *weights], allow_unused=True, materialize_grads=True)
        size = len(tensors_of(targets)[0])
        share = size / len(examples)
        for gradient, part in zip(gradients, found[len(leaving) :], strict=True):
            gradient += share * part
        # The loss is a mean over the batch, and its gradient at an example's outputs has 1 / B in it.
        at_leaves = [
            (size * scale * at_outputs).reshape(size if at_outputs.ndim else 1, -1).norm(dim=1).mean()
            for scale, at_outputs in zip(_scales(outputs, target_scale), found[: len(leaving)], strict=True)
        ]
        error += share * torch.stack(at_leaves).norm()
    norms, sizes = (torch.stack([tensor.detach().norm() for tensor in tensors]) for tensors in (gradients, weights))
    relative = norms / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)  # the weights may all be 0
    return torch.where(error > LEAST_ERROR, relative / error, math.nan)


def _scales(outputs: Any, target_scale: Scale) -> list[float | Tensor]:
    """For each of the outputs that has a gradient, what its target is learned in units of."""
    if not isinstance(target_scale, Mapping):
        return [target_scale for each in tensors_of(outputs) if each.requires_grad]
    return [
        target_scale.get(name, 1.0) for name, part in outputs.items() for each in tensors_of(part) if each.requires_grad
    ]


_ANSWERS: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    **dict.fromkeys((nn.ReLU, nn.ReLU6, SquaredReLU), lambda outputs: outputs > 0),
    **dict.fromkeys((nn.GELU, nn.SiLU, nn.Mish), lambda outputs: outputs.abs() > 1e-3),
    nn.Tanh: lambda outputs: outputs.abs() < 0.99,
    nn.Sigmoid: lambda outputs: (outputs - 0.5).abs() < 0.495,
}
"""Where the outputs of an activation still change with its inputs. Others, such as leaky ReLU, have no dead end."""


@contextmanager
def _units_watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects for each activation, as often as it is called in a pass, which of its units have answered so far."""
    alive: list[Tensor] = []
    position = 0

    def begin(module: nn.Module, inputs: object) -> None:
        nonlocal position
        position = 0

    def watch(module: nn.Module, inputs: object, outputs: Tensor) -> None:
        nonlocal position
        if outputs.ndim == 3:
            return  # of a sequence, whose units may be its second or its third dimension
        answers = _ANSWERS[type(module)](outputs.detach())
        # The unit of an image is a channel; any of its pixels may answer.
        found = answers.any(0).flatten(1).any(1) if answers.ndim > 3 else answers.any(0)
        if position == len(alive):
            alive.append(found)
        else:
            alive[position] = alive[position] | found
        position += 1

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(begin).remove)
        for module in model.modules():
            if type(module) in _ANSWERS:
                hooks.callback(module.register_forward_hook(watch).remove)
        yield alive


@contextmanager
def backward_in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Gradients of a model in evaluation mode: cuDNN's recurrent layers refuse them there, torch's own do not."""
    cudnn = torch.backends.cudnn
    before = cudnn.enabled
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        cudnn.enabled = False
    try:
        with torch.enable_grad():
            yield
    finally:
        cudnn.enabled = before
