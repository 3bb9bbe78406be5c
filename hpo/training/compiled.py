"""The step as one compiled function: forward, backward, clipping and the optimizer's formula in a single graph.

Everything that differs from trial to trial but not from architecture to architecture (learning rate, momentum, weight
decay, dropout, label smoothing) is a tensor in that graph. So the next trial of the same architecture, batch size and
optimizer finds it compiled; torch's own optimizers, compiled, would be compiled again for each weight decay.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW

from hpo.errors import UsageError, first_line
from hpo.training.device import free_memory
from hpo.training.precision import autocast
from hpo.training.schedules import Point
from hpo.training.step import StepResult, TrainingStep

if TYPE_CHECKING:
    from torch import Tensor

    from hpo.training.losses import LossFunction

_logger = logging.getLogger(__name__)

OLDEST_TRACING = "2.11"
"""The first version of torch that takes the backward pass into a graph (`torch._dynamo.config.trace_autograd_ops`)."""

OLDEST_CAPTURING = "2.15"
"""The oldest version of torch that is known to leave a capture which CUDA has refused as if it had not begun. torch 2.9
stays on the capture's stream, and its allocator and its random numbers take it for one that is still under way."""

MAX_GRAPHS = 32
"""Graphs that are kept: each step looks through them for its own, and they hold memory."""

# Measured on one core of a CPU with torch 2.15; see benchmarks/trainer.py.
SECONDS_TO_COMPILE = 5.0
SECONDS_TO_COMPILE_A_PARAMETER = 0.5
SECONDS_SAVED_A_PARAMETER = 50e-6

_compiled: list[Callable[..., tuple[Tensor, Tensor, Tensor]]] = []
_known: set[tuple[Any, ...]] = set()


class FormulaStep:
    """Takes over from a TrainingStep that has made at least one step, and continues with the same optimizer state.

    The base of steps that are made by the formulas of this module. Its `mode` is "off" once it has given up.
    """

    def __init__(self, step: TrainingStep, mode: str) -> None:
        self.mode = mode
        self.precision = step.precision
        self._eager = step
        self._formulas = Formulas(step)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training continues with. The optimizer is given the number of steps it has made."""
        self._formulas.complete_optimizer()
        return self._eager.state_dict()

    def prepare(self, points: Sequence[Point]) -> None:
        """Bring the settings of an epoch's next steps to the device, all at once."""
        self._formulas.prepare(points)


class CompiledStep(FormulaStep):
    """A compiled step. A model that cannot be compiled is stepped as before, which is logged."""

    def __init__(self, step: TrainingStep) -> None:
        let_dropout_vary(step.model)
        super().__init__(step, "step")
        self._run = _compiled_step()

    def __call__(self, inputs: Tensor, targets: Tensor, *, measures_norm: bool = True) -> StepResult:
        """Take in a batch (B, ...) with targets (B,). What is compiled computes the gradients' norm in any case."""
        if self.mode == "off":
            return self._eager(inputs, targets, measures_norm=measures_norm)
        from torch._dynamo.exc import TorchDynamoException

        settings = self._formulas.next_settings()
        try:
            results = self._run(*self._formulas.fixed, settings, inputs, targets, **self._formulas.choices)
            self._formulas.count_step()
            return StepResult(*results)
        except (TorchDynamoException, RuntimeError) as error:  # torch.OutOfMemoryError is one
            reason = first_line(error)
        # Out here the failed attempt's tensors are gone.
        _logger.warning("the step cannot be compiled and continues without: %s", reason)
        self._formulas.complete_optimizer()
        self.mode = "off"
        free_memory(inputs.device)
        return self._eager(inputs, targets)


class Formulas:
    """What a step by the formulas of this module takes, from a TrainingStep that has made at least one."""

    def __init__(self, step: TrainingStep) -> None:
        self._optimizer = step.optimizer
        self._clip_norm = step.clip_norm
        groups = [group for group in step.optimizer.param_groups if _trained(group)]
        self._groups = [_Group.of(step.optimizer, group) for group in groups]
        # Layers that were frozen at first have made fewer steps than the others.
        self._steps_before = [_steps_so_far(step.optimizer, group) for group in groups]
        self._ahead: list[Tensor] = []  # settings, the next step's last
        self.device = self._groups[0].parameters[0].device
        self._num_steps = self._num_told = 0  # since then
        self.fixed = (step.model, step.loss_function, type(step.optimizer), self._groups)
        """The first arguments of a step, the same in each."""
        self.choices: dict[str, Any] = {
            "clips": step.clip_norm > 0,
            "is_nesterov": _is_nesterov(step.optimizer),
            "precision": step.precision,
        }
        for parameter in step.model.parameters():
            parameter.grad = None  # the last eager step's, which would only take memory

    def prepare(self, points: Sequence[Point]) -> None:
        """Bring the settings of the next steps to the device, all at once."""
        rows = [self._settings(point, self._num_steps + number) for number, point in enumerate(points, start=1)]
        settings = torch.tensor(rows)
        if self.device.type == "cuda":
            settings = settings.pin_memory()  # from there it is copied without a wait
        self._ahead = list(settings.to(self.device, non_blocking=True).unbind())[::-1]

    def next_settings(self) -> Tensor:
        """Of the next step, (groups, settings); with the rates of now if they were not prepared."""
        if not self._ahead:
            self.prepare([Point(tuple(group["lr"] for group in self._optimizer.param_groups), None)])
        return self._ahead.pop()

    def eager(self, settings: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A step that is not compiled: it changes only `state`, and takes every number that varies from `settings`."""
        return _step(*self.fixed, settings, inputs, targets, **self.choices, on_lists=True)

    @property
    def state(self) -> list[list[Tensor]]:
        """What a step changes in place, by kind: weights, buffers, and what the optimizer keeps."""
        model, kept = self.fixed[0], [tensor for group in self._groups for tensor in (*group.averages, *group.squares)]
        return [list(model.parameters()), list(model.buffers()), kept]

    def count_step(self, *, by_optimizer: bool = False) -> None:
        """Count a step that was made by these formulas, or by the optimizer, which has counted it as well."""
        self._num_steps += 1
        self._num_told += by_optimizer

    def complete_optimizer(self) -> None:
        """Tell the optimizer how many steps it has made."""
        if self._num_told == self._num_steps:
            return
        self._num_told = self._num_steps
        for group, before in zip(self._groups, self._steps_before, strict=True):
            for parameter in group.parameters:
                if "step" in (state := self._optimizer.state.get(parameter, {})):
                    state["step"].fill_(before + self._num_steps)

    def _settings(self, point: Point, step: int) -> list[list[float]]:
        """For each group that has trained parameters, its row of numbers in the order of _Settings."""
        pairs = zip(self._optimizer.param_groups, point.rates, strict=True)
        trained = [(group, rate) for group, rate in pairs if _trained(group)]
        return [
            self._row(group, rate, point.momentum, before + step)
            for (group, rate), before in zip(trained, self._steps_before, strict=True)
        ]

    def _row(self, group: dict[str, Any], rate: float, momentum: float | None, step: int) -> list[float]:
        beta1, beta2 = group.get("betas") or (group["momentum"], 0.0)
        beta1 = beta1 if momentum is None else momentum
        # The corrections in double precision, for beta2 ** step is near 1 for long.
        corrections = (1 - beta1**step, math.sqrt(1 - beta2**step))
        return [rate, beta1, beta2, group["weight_decay"], group.get("eps", 0.0), *corrections, self._clip_norm]


def check_compile_mode(wanted: str, precision: str, device: str) -> None:
    """Raise UsageError if `--compile step` or `graph` was asked for and cannot be had."""
    reason = None
    if wanted == "step" and not can_trace():
        reason = f"needs torch {OLDEST_TRACING} or later, not {torch.__version__}"
    elif wanted == "graph" and not can_capture():
        reason = f"needs torch {OLDEST_CAPTURING} or later, not {torch.__version__}"
    elif wanted in ("step", "graph") and precision == "fp16":
        reason = "does not work with --precision fp16"
    elif wanted == "graph" and not device.startswith("cuda"):
        reason = f"needs a CUDA device, not {device}"
    if reason:
        raise UsageError(
            f"--compile {wanted} {reason}; use --compile auto, which compiles when that is possible and faster."
        )


def has_formula(step: TrainingStep) -> bool:
    """Whether the steps that come can be made by the formulas of this module: see `Formulas`."""
    has_formulas = type(step.optimizer) in _FORMULAS and all(p.is_floating_point() for p in step.model.parameters())
    return has_formulas and step.is_plain and step.num_parts == 1 and step.precision != "fp16"


def settle_compile_mode(
    wanted: str,
    step: TrainingStep,
    *,
    batch_shape: tuple[int, ...],
    is_mixed: bool = False,
    seconds_a_step: float,
    steps_left: int,
) -> str:
    """Whether the remaining steps are compiled, "step", or not, "off": where that is impossible or not wanted, or for
    "auto" where it does not pay.

    `is_mixed` says that the batches have shares of classes as their targets (hpo.data.mixing).
    """
    trains_all = all(p.requires_grad for p in step.model.parameters())
    if wanted in ("off", "graph") or not has_formula(step) or not trains_all:
        return "off"
    signature = (*_signature(step, batch_shape), is_mixed)
    if wanted == "auto":
        is_on_cpu = next(step.model.parameters()).device.type == "cpu"  # the figures are a CPU's
        if not is_on_cpu or (signature not in _known and not _pays(step, seconds_a_step, steps_left)):
            return "off"
        if not can_trace():
            return "off"
    if signature not in _known and len(_known) >= MAX_GRAPHS:
        torch.compiler.reset()
        _known.clear()
    _known.add(signature)
    return "step"


def _signature(step: TrainingStep, batch_shape: tuple[int, ...]) -> tuple[Any, ...]:
    """What a graph depends on: trials that agree in it share one."""
    architecture = re.sub(r"\bDropout\(p=.*?\)", "_Dropout()", str(step.model))
    loss = step.loss_function
    if isinstance(loss, partial):
        loss_form = (loss.func, *(isinstance(argument, torch.Tensor) or argument for argument in loss.args))
    else:
        loss_form = (loss,)
    is_nesterov = _is_nesterov(step.optimizer)
    groups = tuple(len(group["params"]) for group in step.optimizer.param_groups)
    return (
        architecture, loss_form, type(step.optimizer), groups, is_nesterov, batch_shape, step.precision,
        step.clip_norm > 0,
    )  # fmt: skip


def _pays(step: TrainingStep, seconds_a_step: float, steps_left: int) -> bool:
    """Whether the remaining steps save more than compiling costs.

    What is saved is what eager execution spends on each parameter beside the arithmetic, at most half of a step.
    """
    num_parameters = sum(1 for _ in step.model.parameters())
    saving_s = min(SECONDS_SAVED_A_PARAMETER * num_parameters, seconds_a_step / 2)
    return saving_s * steps_left > SECONDS_TO_COMPILE + SECONDS_TO_COMPILE_A_PARAMETER * num_parameters


def can_trace() -> bool:
    """Whether this torch can compile a whole step."""
    return torch.__version__ >= OLDEST_TRACING


def can_capture() -> bool:
    """Whether a capture as a CUDA graph that fails does no harm with this torch."""
    return torch.__version__ >= OLDEST_CAPTURING


def _trained(group: dict[str, Any]) -> list[nn.Parameter]:
    """The parameters of a group that are not frozen."""
    return [p for p in group["params"] if p.requires_grad]


def _is_nesterov(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.param_groups[0].get("nesterov"))


def _steps_so_far(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> int:
    """Steps that Adam has made with the parameters of a group; SGD does not count them."""
    states = [optimizer.state.get(parameter, {}) for parameter in _trained(group)]
    return next((int(state["step"]) for state in states if "step" in state), 0)


# --- what is compiled -------------------------------------------------------------------------------------------------


class _Settings(NamedTuple):
    """What a group's parameters are stepped with, as scalars on the device."""

    lr: Tensor
    momentum: Tensor
    second_momentum: Tensor
    weight_decay: Tensor
    eps: Tensor
    correction: Tensor
    second_correction: Tensor
    clip_norm: Tensor


class _Group(NamedTuple):
    """Parameters that share their settings, and what the optimizer keeps of each."""

    parameters: list[Tensor]
    averages: list[Tensor]
    """Of the gradients: momentum."""
    squares: list[Tensor]
    """Averages of the squared gradients; empty for SGD."""

    @classmethod
    def of(cls, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> _Group:
        averages, squares = ("exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer", "")
        states = [(p, optimizer.state[p]) for p in _trained(group)]
        if group.get("momentum") != 0:
            # What never has a gradient has no state.
            states = [(p, state) for p, state in states if state.get(averages) is not None]
        return cls(
            [p for p, _ in states],
            [state[averages] for _, state in states if state.get(averages) is not None],
            [state[squares] for _, state in states if squares],
        )


def _compiled_step() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if not _compiled:
        import torch._dynamo
        import torch._inductor.config

        torch._dynamo.config.trace_autograd_ops = True  # the backward pass belongs to the graph
        torch._dynamo.config.recompile_limit = MAX_GRAPHS + 1
        torch._inductor.config.compile_threads = 1  # by itself it starts processes, which would outlive a killed worker
        _compiled.append(torch.compile(_step, fullgraph=True, dynamic=False))
    return _compiled[0]


def _step(
    model: nn.Module,
    loss_function: LossFunction,
    optimizer: type[torch.optim.Optimizer],
    groups: list[_Group],
    settings: Tensor,
    inputs: Tensor,
    targets: Tensor,
    *,
    clips: bool,
    is_nesterov: bool,
    precision: str,
    on_lists: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """A whole step. With `on_lists` an operation takes all parameters of a group, as a compiler arranges by itself."""
    with autocast(precision, inputs.device):
        outputs = model(inputs)
        loss = loss_function(outputs, targets)
    parameters = [p for group in groups for p in group.parameters]
    gradients = list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    with torch.no_grad():
        grad_norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
        for group, row in zip(groups, settings.unbind(), strict=True):
            of_group = _Settings(*row.unbind())
            own, gradients = gradients[: len(group.parameters)], gradients[len(group.parameters) :]
            if clips:
                scale = (of_group.clip_norm / (grad_norm + 1e-6)).clamp(max=1.0)
                own = [g * scale for g in own]
            formula = (_FORMULAS_ON_LISTS if on_lists else _FORMULAS)[optimizer]
            formula(group, own, of_group, is_nesterov)
    return outputs.detach(), loss.detach(), grad_norm


def _sgd(group: _Group, gradients: list[Tensor], settings: _Settings, is_nesterov: bool) -> None:
    """Sutskever et al. 2013 as torch.optim.SGD has it: the rate multiplies the momentum."""
    for index, (parameter, gradient) in enumerate(zip(group.parameters, gradients, strict=True)):
        step = gradient + settings.weight_decay * parameter
        if group.averages:
            average = group.averages[index].mul_(settings.momentum).add_(step)
            step = step + settings.momentum * average if is_nesterov else average
        parameter.sub_(settings.lr * step)


def _adam(group: _Group, gradients: list[Tensor], settings: _Settings, _: bool) -> None:
    """Kingma and Ba 2015, arXiv:1412.6980, with weight decay as a part of the gradient."""
    decayed = [g + settings.weight_decay * p for p, g in zip(group.parameters, gradients, strict=True)]
    _adam_update(group, decayed, settings)


def _adamw(group: _Group, gradients: list[Tensor], settings: _Settings, _: bool) -> None:
    """Loshchilov and Hutter 2019, arXiv:1711.05101: the decay is decoupled from the gradient."""
    for parameter in group.parameters:
        parameter.mul_(1 - settings.lr * settings.weight_decay)
    _adam_update(group, gradients, settings)


def _adam_update(group: _Group, gradients: list[Tensor], settings: _Settings) -> None:
    for parameter, gradient, average, square in zip(
        group.parameters, gradients, group.averages, group.squares, strict=True
    ):
        average.lerp_(gradient, 1 - settings.momentum)
        square.mul_(settings.second_momentum).add_((1 - settings.second_momentum) * gradient.square())
        deviation = square.sqrt() / settings.second_correction + settings.eps
        parameter.sub_(settings.lr / settings.correction * average / deviation)


_FORMULAS: dict[type[torch.optim.Optimizer], Callable[[_Group, list[Tensor], _Settings, bool], None]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adamw,
}


def _sgd_on_lists(group: _Group, gradients: list[Tensor], settings: _Settings, is_nesterov: bool) -> None:
    steps = list(torch._foreach_mul(group.parameters, settings.weight_decay))
    torch._foreach_add_(steps, gradients)
    if group.averages:
        torch._foreach_mul_(group.averages, settings.momentum)
        torch._foreach_add_(group.averages, steps)
        momenta = torch._foreach_mul(group.averages, settings.momentum)
        steps = list(torch._foreach_add(steps, momenta)) if is_nesterov else group.averages
    torch._foreach_sub_(group.parameters, torch._foreach_mul(steps, settings.lr))


def _adam_on_lists(group: _Group, gradients: list[Tensor], settings: _Settings, _: bool) -> None:
    decay = torch._foreach_mul(group.parameters, settings.weight_decay)
    _adam_update_on_lists(group, list(torch._foreach_add(decay, gradients)), settings)


def _adamw_on_lists(group: _Group, gradients: list[Tensor], settings: _Settings, _: bool) -> None:
    torch._foreach_mul_(group.parameters, 1 - settings.lr * settings.weight_decay)
    _adam_update_on_lists(group, gradients, settings)


def _adam_update_on_lists(group: _Group, gradients: list[Tensor], settings: _Settings) -> None:
    torch._foreach_mul_(group.averages, settings.momentum)
    torch._foreach_add_(group.averages, torch._foreach_mul(gradients, 1 - settings.momentum))
    torch._foreach_mul_(group.squares, settings.second_momentum)
    squares = torch._foreach_mul(gradients, gradients)
    torch._foreach_add_(group.squares, torch._foreach_mul(squares, 1 - settings.second_momentum))
    deviations = torch._foreach_sqrt(group.squares)
    torch._foreach_div_(deviations, settings.second_correction)
    # By its full name: the short one would read the number from the device, to add it as a plain one.
    torch.ops.aten._foreach_add_.Tensor(deviations, settings.eps)
    updates = list(torch._foreach_div(group.averages, deviations))
    torch._foreach_mul_(updates, settings.lr / settings.correction)
    torch._foreach_sub_(group.parameters, updates)


_FORMULAS_ON_LISTS: dict[type[torch.optim.Optimizer], Callable[[_Group, list[Tensor], _Settings, bool], None]] = {
    SGD: _sgd_on_lists,
    Adam: _adam_on_lists,
    AdamW: _adamw_on_lists,
}


# --- dropout ----------------------------------------------------------------------------------------------------------


class _Dropout(nn.Module):
    """nn.Dropout with its rate in a tensor, which a compiled graph does not depend on."""

    rate: Tensor

    def __init__(self, rate: float, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate, device=device), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training:
            return inputs
        return torch.where(torch.rand_like(inputs) < self.rate, 0.0, inputs / (1 - self.rate))


def let_dropout_vary(model: nn.Module) -> None:
    device = next(model.parameters()).device
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, _Dropout(child.p, device).train(child.training))
