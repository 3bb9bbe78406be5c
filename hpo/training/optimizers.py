"""Optimizers by name: torch's own, fused where torch has a fused kernel (SGD, Adam and AdamW), and LAMB and Muon."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import optim

from hpo.config import OWN
from hpo.errors import UsageError
from hpo.methods import OPTIMIZERS
from hpo.models.pretrained import find_pretrained
from hpo.objective import NOTHING_OWN

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.config import TrainConfig
    from hpo.objective import Own


def build_optimizer(model: nn.Module, config: TrainConfig, own: Own = NOTHING_OWN) -> optim.Optimizer:
    """The optimizer that `config` names, over all parameters of `model`, which must be on its device already.

    Raises UsageError if a task's own is wanted and there is none, or it is not an optimizer.

    The weight decay of AdamW, LAMB and Muon is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101): it shrinks the
    weights, and the averages do not see it. Elsewhere it is L2, a part of the gradient.
    """
    groups = _parameter_groups(model, config)
    if config.optimizer == OWN:
        return _build_own(groups, config, own)
    method = OPTIMIZERS[config.optimizer]
    offered = {
        "momentum": config.momentum,
        "nesterov": config.nesterov and config.momentum > 0,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": _can_be_fused(groups),
    }
    built: optim.Optimizer = method.load()(groups, lr=config.lr, **{name: offered[name] for name in method.settings})
    return built


def _can_be_fused(groups: list[dict[str, Any]]) -> bool:
    """Whether torch's fused kernels take the parameters: they refuse complex ones."""
    return all(parameter.is_floating_point() for group in groups for parameter in group["params"])


def _build_own(groups: list[dict[str, Any]], config: TrainConfig, own: Own) -> optim.Optimizer:
    if own.optimizer is None:
        raise UsageError("optimizer='own' needs an Objective with an optimizer.")
    built = own.optimizer(groups, config)
    if not isinstance(built, optim.Optimizer):
        raise UsageError(f"the task's optimizer must return a torch.optim.Optimizer, not a {type(built).__name__}.")
    return built


def load_optimizer_state(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict into an optimizer of `build_optimizer`, whatever device it was saved from."""
    optimizer.load_state_dict(state)
    if isinstance(optimizer, optim.NAdam):
        for of_parameter in optimizer.state.values():
            # torch 2.15 moves it to the parameter's device, where NAdam reads it twice a step: a wait each.
            of_parameter["mu_product"] = of_parameter["mu_product"].cpu()


class FusedStep:
    """The step of torch's fused SGD, Adam or AdamW without all that torch does around it.

    In each step torch collects parameters, gradients and state, sorts them by device and type, and makes a record for
    its profiler: on a CPU that takes several times as long as the kernel does for a few small layers. Here the
    parameters and their state are collected once. Weights and state are the same, bit by bit.
    """

    def __init__(self, optimizer: optim.Optimizer) -> None:
        """`optimizer` has made a step, and every parameter has a gradient: see `suits`."""
        self._optimizer = optimizer
        self._kernel = _KERNELS[type(optimizer)]
        self._groups = [
            (parameters, [optimizer.state.get(p, {}) for p in parameters])
            for parameters in (group["params"] for group in optimizer.param_groups)
        ]
        self._num_parameters = sum(len(parameters) for parameters, _ in self._groups)

    @staticmethod
    def suits(optimizer: optim.Optimizer) -> bool:
        """Whether an optimizer that has made a step can be stepped like this.

        A parameter without a gradient, such as a frozen one, has no state, and may get both later.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return (
            type(optimizer) in _KERNELS
            and bool(optimizer.defaults.get("fused"))
            and all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in parameters)
        )

    @torch.no_grad()
    def __call__(self) -> None:
        gradients = [[p.grad for p in parameters if p.grad is not None] for parameters, _ in self._groups]
        if sum(map(len, gradients)) < self._num_parameters:
            self._optimizer.step()  # the model has passed over a layer in this step
            return
        for group, found, (parameters, states) in zip(
            self._optimizer.param_groups, gradients, self._groups, strict=True
        ):
            if parameters:
                self._kernel(group, parameters, found, states)


def _fused_sgd(
    group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
) -> None:
    torch._fused_sgd_(
        parameters,
        gradients,
        [state["momentum_buffer"] for state in states] if group["momentum"] else [],
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=group["lr"],
        dampening=group["dampening"],
        nesterov=group["nesterov"],
        maximize=False,
        is_first_step=False,
    )


def _fused_adam(
    group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], states: list[dict[str, Tensor]]
) -> None:
    steps = [state["step"] for state in states]
    torch._foreach_add_(steps, 1)
    kernel = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    kernel(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        steps,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )


_KERNELS: dict[
    type[optim.Optimizer], Callable[[dict[str, Any], list[Tensor], list[Tensor], list[dict[str, Tensor]]], None]
] = {optim.SGD: _fused_sgd, optim.Adam: _fused_adam, optim.AdamW: _fused_adam}


class Lamb(optim.Optimizer):
    """Adam whose step for each layer is as long, relative to the layer's weights, as the rate says.

    You et al. 2020, arXiv:1904.00962, algorithm 2, with the identity as phi. Biases and norms keep Adam's step. All
    parameters of a group are stepped at once, and nothing is read from the device.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                self._step(parameters, group)

    def _step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                real = _as_real(parameter)
                self.state[parameter] |= {
                    "step": torch.zeros((), dtype=torch.float64, device=parameter.device),
                    "exp_avg": torch.zeros_like(real),
                    "exp_avg_sq": torch.zeros_like(real),
                }
        steps, averages, squares = (
            [self.state[parameter][name] for parameter in parameters] for name in ("step", "exp_avg", "exp_avg_sq")
        )
        matrices = [index for index, parameter in enumerate(parameters) if parameter.ndim > 1]
        gradients = [_as_real(parameter.grad) for parameter in parameters if parameter.grad is not None]
        parameters = [_as_real(parameter) for parameter in parameters]
        beta1, beta2 = group["betas"]
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(averages, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        # The parameters of a group have made the same number of steps: what is frozen has groups of its own.
        deviations = torch._foreach_div(squares, (1 - beta2 ** steps[0]).float())
        torch._foreach_sqrt_(deviations)
        torch._foreach_add_(deviations, group["eps"])
        updates = list(torch._foreach_div(averages, (1 - beta1 ** steps[0]).float()))
        torch._foreach_div_(updates, deviations)
        torch._foreach_add_(updates, parameters, alpha=group["weight_decay"])
        _scale_by_trust([parameters[index] for index in matrices], [updates[index] for index in matrices])
        torch._foreach_mul_(updates, group["lr"])
        torch._foreach_sub_(parameters, updates)


def _as_real(tensor: Tensor) -> Tensor:
    """Complex numbers as pairs of real ones, which share their memory."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _scale_by_trust(matrices: list[Tensor], updates: list[Tensor]) -> None:
    """Make the update of each matrix as long as its weights."""
    if not matrices:
        return
    weights, lengths = (torch.stack(torch._foreach_norm(tensors)) for tensors in (matrices, updates))
    trust = weights / lengths
    # Weights or an update of 0 have no direction to be scaled: the ratio is 1 then.
    trust = torch.where(trust.isfinite() & (trust > 0), trust, 1.0)
    torch._foreach_mul_(updates, list(trust.unbind()))


class Muon(optim.Optimizer):
    """Momentum whose matrix is made nearly orthogonal.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with steps of AdamW's root mean square, so that both
    do well with one rate (arXiv:2502.16982, section 2.2). The same as torch.optim.Muon, which takes one matrix after
    the other and reads the rate from the device: here the matrices of one shape are stacked.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, nesterov: bool) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for matrices in by_shape.values():
                self._step(matrices, group)

    def _step(self, matrices: list[Tensor], group: dict[str, Any]) -> None:
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices if matrix.grad is not None]
        averages: list[Tensor] = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            averages = list(torch._foreach_lerp(gradients, averages, group["momentum"]))
        updates = _orthogonalised(torch.stack(averages)).float() * (0.2 * math.sqrt(max(matrices[0].shape)))
        torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(matrices, list((updates * group["lr"]).unbind()))


def _orthogonalised(matrices: Tensor) -> Tensor:
    """Of each of the matrices (N, R, C), in bf16, U V^T roughly, where U S V^T is its singular value decomposition.

    Five steps of a quintic Newton-Schulz iteration, whose coefficients are those of Jordan et al. 2024.
    """
    is_tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.to(torch.bfloat16)
    found = found.mT if is_tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), found, beta=3.4445)
    return found.mT if is_tall else found


def muon_with_adamw(
    groups: list[dict[str, Any]],
    lr: float,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    eps: float,
) -> MuonWithAdamW:
    """Muon for the matrices of hidden layers and AdamW for all else."""
    matrices, others = _split_off_matrices(groups)
    return MuonWithAdamW(
        Muon(matrices, lr, momentum=momentum, nesterov=nesterov),
        optim.AdamW(others, lr=lr, betas=betas, eps=eps, fused=_can_be_fused(others)),
    )


class MuonWithAdamW(optim.Optimizer):
    """Muon for the matrices of hidden layers and AdamW for all else, as one optimizer."""

    def __init__(self, muon: Muon, adamw: optim.AdamW) -> None:
        self._muon, self._adamw = muon, adamw
        # Its momentum is what one-cycle varies; beta1 stays.
        super().__init__([*muon.param_groups, *adamw.param_groups], {"momentum": muon.defaults["momentum"]})
        self._share()

    def _share(self) -> None:
        """Let both work on the groups and the state that schedules and checkpoints see."""
        num_groups = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = (
            self.param_groups[:num_groups],
            self.param_groups[num_groups:],
        )
        self._muon.state = self._adamw.state = self.state

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self._muon.step()
        self._adamw.step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def _parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Matrices and kernels with weight decay; biases and the parameters of norms (one dimension or none) without.

    In a pretrained model the head comes first, then the backbone with its own rate. What is frozen of it has groups of
    its own, because a fused optimizer wants a state for all parameters of a group or for none.
    """
    network = find_pretrained(model)
    backbone = network.backbone_parameters() if network else []
    in_backbone = {id(p) for p in backbone}
    backbone_lr = config.lr * config.backbone_lr_factor
    parts = [
        ([p for p in model.parameters() if id(p) not in in_backbone], config.lr),
        ([p for p in backbone if p.requires_grad], backbone_lr),
        ([p for p in backbone if not p.requires_grad], backbone_lr),
    ]
    return [
        group
        for parameters, lr in parts
        if parameters
        for group in (
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay, "lr": lr},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "lr": lr},
        )
    ]


def _split_off_matrices(groups: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Groups with the matrices that suit Muon, and with all else.

    The last matrix is the output layer's, which Muon's authors leave to AdamW, as they do the kernels of
    convolutions here. So are complex matrices.
    """
    decayed = groups[::2]
    matrices = [[p for p in group["params"] if p.ndim == 2 and p.is_floating_point()] for group in decayed]
    del matrices[0][-1:]
    own = {id(p) for of_group in matrices for p in of_group}
    return (
        [group | {"params": of_group} for group, of_group in zip(decayed, matrices, strict=True)],
        [group | {"params": [p for p in group["params"] if id(p) not in own]} for group in groups],
    )
