"""Optimizers by name; torch's own but for LAMB, fused where torch has a fused kernel (SGD, Adam and AdamW)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import optim

from hpo.models.pretrained import find_pretrained

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> optim.Optimizer:
    """The optimizer that `config` names, over all parameters of `model`, which must be on its device already.

    The weight decay of AdamW, LAMB and Muon is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101): it shrinks the
    weights, and the averages do not see it. Elsewhere it is L2, a part of the gradient.
    """
    groups = _parameter_groups(model, config)
    nesterov = config.nesterov and config.momentum > 0
    betas = (config.beta1, config.beta2)
    match config.optimizer:
        case "sgd":
            return optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)
        case "adam":
            return optim.Adam(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        case "adamw":
            return optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
        case "nadam":
            return optim.NAdam(groups, lr=config.lr, betas=betas, eps=config.eps)
        case "adamax":
            return optim.Adamax(groups, lr=config.lr, betas=betas, eps=config.eps)
        case "adagrad":
            return optim.Adagrad(groups, lr=config.lr, eps=config.eps)
        case "rmsprop":
            return optim.RMSprop(groups, lr=config.lr, momentum=config.momentum, eps=config.eps)
        case "lamb":
            return Lamb(groups, lr=config.lr, betas=betas, eps=config.eps)
        case "muon":
            matrices, others = _split_off_matrices(groups)
            return MuonWithAdamW(
                # Scaled to AdamW's root mean square, so that both go well with one rate (arXiv:2502.16982, 2.2).
                optim.Muon(
                    matrices, config.lr, momentum=config.momentum, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
                ),
                optim.AdamW(others, lr=config.lr, betas=betas, eps=config.eps, fused=True),
            )
    raise AssertionError(f"TrainConfig let optimizer {config.optimizer!r} pass")


def load_optimizer_state(optimizer: optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state dict into an optimizer of `build_optimizer`, whatever device it was saved from."""
    optimizer.load_state_dict(state)
    if isinstance(optimizer, optim.NAdam):
        for of_parameter in optimizer.state.values():
            # torch 2.15 moves it to the parameter's device, where NAdam reads it twice a step: a wait each.
            of_parameter["mu_product"] = of_parameter["mu_product"].cpu()


class Lamb(optim.Optimizer):
    """Adam whose step for each layer is as long, relative to the layer's weights, as the rate says.

    You et al. 2020, arXiv:1904.00962, algorithm 2, with the identity as phi. Biases and norms keep Adam's step.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, self.state[parameter], group)

    @staticmethod
    def _step(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        assert parameter.grad is not None
        beta1, beta2 = group["betas"]
        state["step"] += 1
        average = state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).addcmul_(parameter.grad, parameter.grad, value=1 - beta2)
        deviation = (square / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = average / (1 - beta1 ** state["step"]) / deviation + group["weight_decay"] * parameter
        if parameter.ndim > 1:
            trust = parameter.norm() / update.norm()
            # Weights or an update of 0 have no direction to be scaled: the ratio is 1 then.
            update *= torch.where(trust.isfinite() & (trust > 0), trust, 1.0)
        parameter.sub_(update, alpha=group["lr"])


class MuonWithAdamW(optim.Optimizer):
    """Muon for the matrices of hidden layers and AdamW for all else, as one optimizer.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon: momentum whose matrix is made nearly orthogonal.
    """

    def __init__(self, muon: optim.Muon, adamw: optim.AdamW) -> None:
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
        self._muon.step()  # type: ignore[no-untyped-call]
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

    The last matrix is the output layer's, which Muon's authors leave to AdamW; torch's Muon takes no kernels of
    convolutions.
    """
    decayed = groups[::2]
    matrices = [[p for p in group["params"] if p.ndim == 2] for group in decayed]
    del matrices[0][-1:]
    own = {id(p) for of_group in matrices for p in of_group}
    return (
        [group | {"params": of_group} for group, of_group in zip(decayed, matrices, strict=True)],
        [group | {"params": [p for p in group["params"] if id(p) not in own]} for group in groups],
    )
