"""One step: the innermost part of the trainer, free of syncs with the device."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm

from hpo.data.parts import joined, map_tensors, tensors_of
from hpo.errors import DeviceMemoryError
from hpo.training.device import is_out_of_memory
from hpo.training.losses import num_averaged
from hpo.training.optimizers import FusedStep
from hpo.training.precision import autocast

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from hpo.data.parts import Batch
    from hpo.training.losses import LossFunction

_logger = logging.getLogger(__name__)


class StepResult(NamedTuple):
    """What a step measured, on the device and without a graph."""

    outputs: Any  # what the model returned
    loss: Tensor  # () mean over the batch
    grad_norm: Tensor | None  # () before clipping; None where it was not asked for


class TrainingStep:
    """Forward, backward, clip, optimizer.

    If the device's memory does not hold a batch, batches are processed in two halves from then on, whose gradients are
    added; only batch norm and losses that compare the examples of a batch see the difference. Raises DeviceMemoryError
    if a half is too much as well.
    """

    mode = "off"
    """How it is compiled: not at all."""

    def __init__(
        self,
        model: nn.Module,
        loss_function: LossFunction,
        optimizer: Optimizer,
        *,
        clip_norm: float = 0.0,
        clip_value: float = 0.0,
        l1: float = 0.0,
        max_norm: float = 0.0,
        precision: str = "fp32",
        num_parts: int = 1,
    ) -> None:
        """Numbers of 0 leave gradients and weights as they are; TrainConfig says what others do.

        A batch is taken in `num_parts` parts, whose gradients are added up by their share of the examples, or of the
        labels if the loss is the mean over these.
        """
        self.model = model
        self.loss_function = loss_function
        self.optimizer = optimizer
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.clip_norm = clip_norm
        self.clip_value = clip_value
        self.l1 = l1
        self.max_norm = max_norm
        self.precision = precision
        self.num_parts = self._wanted_parts = num_parts
        """Parts that a batch is taken in."""
        self.may_halve = True
        """Whether it may be taken in twice as many."""
        self.share = 1.0
        """What the gradients of a batch count."""
        self.num_averaged: Callable[[Batch], int | Tensor] = partial(num_averaged, loss_function)
        """From targets the number of examples, or of labels, that the loss is the mean over."""
        self.forward: Callable[[Batch, Batch], tuple[Any, Tensor]] | None = None
        """What is called instead of model and loss, for outputs and loss."""
        self.scaler = _scaler(model, precision)
        self.has_stepped = False
        self._fused_step: FusedStep | None = None
        self._one: Tensor | None = None  # what a loss is differentiated by itself
        self._measures_norm = True

    @property
    def is_plain(self) -> bool:
        """Whether nothing but `clip_norm` comes between the gradients and the optimizer, or after it."""
        return self.clip_value == self.l1 == self.max_norm == 0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training continues with, as plain data."""
        return {"precision": self.precision, "num_parts": self.num_parts, "scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue in the same precision and in as many parts as before."""
        self.precision, self.num_parts = state["precision"], state["num_parts"]
        self.scaler = _scaler(self.model, self.precision)
        self.scaler.load_state_dict(state["scaler"])

    def thaw(self) -> None:
        """Let the optimizer make the state of parameters that were frozen so far, in the next step."""
        self.has_stepped = False
        self._fused_step = None

    def __call__(self, inputs: Batch, targets: Batch, *, measures_norm: bool = True) -> StepResult:
        """Take in a batch.

        Without `measures_norm` the gradients' norm is computed only where clipping needs it.
        """
        self._measures_norm = measures_norm or self.clip_norm > 0 or self.clip_value > 0
        result = self._try(inputs, targets)
        if result is None and self.may_halve and self.num_parts == self._wanted_parts:
            # Out here the failed attempt's tensors are gone; in an except block the traceback would hold them.
            self.num_parts *= 2
            _logger.warning(
                "the device's memory does not hold a batch of %d; it is processed in two halves from now on",
                _size(targets) // self._wanted_parts,
            )
            gc.collect()
            torch.cuda.empty_cache()
            result = self._try(inputs, targets)
        if result is None:
            tried = "even with half of batch_size=" if self.may_halve else "with a part of the batch of "
            raise DeviceMemoryError(
                f"out of memory (oom) {tried}{_size(targets) // self._wanted_parts} at a time; "
                "choose a smaller batch or model."
            )
        return result

    def _try(self, inputs: Batch, targets: Batch) -> StepResult | None:
        known = set() if self.has_stepped else {*self.optimizer.state}
        try:
            result = self._step(inputs, targets)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if not self.has_stepped:
                # An optimizer makes its state in its first step, and takes a half-made one for a whole one.
                for parameter in {*self.optimizer.state} - known:
                    del self.optimizer.state[parameter]
            # A new one lets the gradients be unscaled once more; the state of this one may be that of half a step.
            state, self.scaler = self.scaler.state_dict(), _scaler(self.model, self.precision)
            self.scaler.load_state_dict(state)
            return None
        self.has_stepped = True
        return result

    def _step(self, inputs: Batch, targets: Batch) -> StepResult:
        for parameter in self._parameters:  # what zero_grad does, without its record for the profiler
            parameter.grad = None
        outputs, loss = (
            self._backward_in_parts(inputs, targets) if self.num_parts > 1 else self._backward(inputs, targets)
        )
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
        grad_norm = None
        if self._measures_norm:
            grad_norm = _clip_gradients(self._parameters, self.clip_norm, self.clip_value)
        if self.scaler.is_enabled() and grad_norm is not None:
            grad_norm = grad_norm.nan_to_num(0.0, 0.0, 0.0)  # the scaler passes over a step that overflowed
        if self.l1 > 0:
            _add_l1(self.optimizer, self.l1)
        self._step_optimizer()
        if self.max_norm > 0:
            _limit_weights(self.optimizer, self.max_norm)
        return StepResult(outputs, loss, grad_norm)

    def _step_optimizer(self) -> None:
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self._fused_step:
            self._fused_step()
        else:
            self.optimizer.step()
            if not self.has_stepped and FusedStep.suits(self.optimizer):
                self._fused_step = FusedStep(self.optimizer)

    def _backward_in_parts(self, inputs: Batch, targets: Batch) -> tuple[Any, Tensor]:
        batch, size = (inputs, targets), _size(targets)
        bounds = [size * part // self.num_parts for part in range(self.num_parts + 1)]
        whole = self.num_averaged(targets)
        whole = whole if isinstance(whole, int) else whole.clamp(min=1)  # a batch may have no label
        results = []
        for begin, end in pairwise(bounds):
            part = map_tensors(lambda tensor, begin=begin, end=end: tensor[begin:end], batch)
            results.append(self._backward(*part, share=self.num_averaged(part[1]) / whole))
        outputs, losses = zip(*results, strict=True)
        return joined(outputs), torch.stack(losses).sum()

    def _backward(self, inputs: Batch, targets: Batch, *, share: float | Tensor | None = None) -> tuple[Any, Tensor]:
        """Outputs and loss of the batch, or of a part of it, which counts with its share."""
        with autocast(self.precision, self._parameters[0].device):
            if self.forward:
                outputs, loss = self.forward(inputs, targets)
            else:
                outputs = self.model(inputs)
                loss = self.loss_function(outputs, targets)
        loss = loss if share is None else loss * share
        counted = loss if self.share == 1 else loss * self.share
        self._backpropagate(self.scaler.scale(counted) if self.scaler.is_enabled() else counted)
        return outputs.detach() if type(outputs) is torch.Tensor else map_tensors(_detached, outputs), loss.detach()

    def _backpropagate(self, loss: Tensor) -> None:
        """`loss.backward()`; on a CPU without what torch does before it, which takes as long as a small layer.

        It makes a gradient of 1, and lets threads of other devices see the settings of this one.
        """
        if self._one is None:
            self._one = torch.ones_like(loss)
        if not loss.is_cpu or loss.dtype != self._one.dtype or loss.shape != self._one.shape:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        torch.autograd.Variable._execution_engine.run_backward(
            (loss,), (self._one,), False, False, (), allow_unreachable=True, accumulate_grad=True
        )


def _size(batch: Batch) -> int:
    """Examples in a batch."""
    return len(tensors_of(batch)[0])


def _detached(tensor: Tensor) -> Tensor:
    return tensor.detach()


def _scaler(model: nn.Module, precision: str) -> torch.amp.GradScaler:
    """Keeps small gradients from vanishing in fp16; does nothing in other types."""
    return torch.amp.GradScaler(next(model.parameters()).device.type, enabled=precision == "fp16")


def _clip_gradients(parameters: list[Tensor], clip_norm: float, clip_value: float) -> Tensor:
    """The global norm of all gradients; elements beyond `clip_value`, then a norm beyond `clip_norm`, are cut down."""
    gradients = [_values(parameter.grad) for parameter in parameters if parameter.grad is not None]
    grad_norm = get_total_norm(gradients)
    if clip_value > 0:
        clip_grad_value_(parameters, clip_value)
    if clip_norm > 0:
        clip_grads_with_norm_(parameters, clip_norm, get_total_norm(gradients) if clip_value > 0 else grad_norm)
    return grad_norm


def _values(gradient: Tensor) -> Tensor:
    """What a gradient has beside zeros. torch 2.9 has no norm of a sparse one, which an embedding may have."""
    return gradient.coalesce().values() if gradient.is_sparse else gradient


def _matrices(optimizer: Optimizer) -> list[Tensor]:
    """Matrices and kernels that are trained: all that is neither a bias nor of a norm, nor frozen."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1 and p.requires_grad]


def _add_l1(optimizer: Optimizer, l1: float) -> None:
    """The gradient of the lasso's penalty (Tibshirani 1996), after clipping, as the optimizers add L2."""
    for parameter in _matrices(optimizer):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach().sgn(), alpha=l1)


@torch.no_grad()
def _limit_weights(optimizer: Optimizer, max_norm: float) -> None:
    """Bring the weights into each unit to this norm at most (Srivastava et al. 2014, JMLR 15, section 5.1)."""
    for parameter in _matrices(optimizer):
        parameter.renorm_(p=2, dim=0, maxnorm=max_norm)
