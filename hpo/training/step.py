"""One step: the innermost part of the trainer, free of syncs with the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch.nn.utils import clip_grads_with_norm_, get_total_norm

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from hpo.training.losses import LossFunction


class StepResult(NamedTuple):
    """What a step measured, on the device and without a graph."""

    outputs: Tensor  # (B, num_outputs)
    loss: Tensor  # () mean over the batch
    grad_norm: Tensor  # () before clipping


def train_step(
    model: nn.Module,
    loss_function: LossFunction,
    optimizer: Optimizer,
    schedule: LRScheduler,
    inputs: Tensor,
    targets: Tensor,
    *,
    clip_norm: float,
) -> StepResult:
    """Forward, backward, clip, step. A `clip_norm` of 0 leaves the gradients as they are."""
    outputs = model(inputs)
    loss = loss_function(outputs, targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    grad_norm = _clip_gradients(optimizer, clip_norm)
    optimizer.step()
    schedule.step()
    return StepResult(outputs.detach(), loss.detach(), grad_norm)


def _clip_gradients(optimizer: Optimizer, clip_norm: float) -> Tensor:
    """The global norm of all gradients, which are scaled down to `clip_norm` where they exceed it."""
    # The optimizer's lists, because walking a deep model for its parameters takes as long as a small layer.
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = get_total_norm([p.grad for p in parameters])
    if clip_norm > 0:
        clip_grads_with_norm_(parameters, clip_norm, grad_norm)
    return grad_norm


def evaluation_step(
    model: nn.Module, loss_function: LossFunction, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs (B, num_outputs) and their mean loss; the caller sets evaluation and inference mode."""
    outputs = model(inputs)
    return outputs, loss_function(outputs, targets)
