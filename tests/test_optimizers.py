"""Optimizers: those of torch, LAMB and Muon, by hand-made formulas and small data."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.training import ImageNet, assert_equal_weights, image_splits, quick_config, weights_of
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.config import TrainConfig
from hpo.errors import UsageError
from hpo.methods import OPTIMIZERS
from hpo.training.compiled import settle_compile_mode
from hpo.training.optimizers import FusedStep, Lamb, Muon, build_optimizer
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weight_decay_shrinks_matrices_and_leaves_biases_and_norms_alone(optimizer: str) -> None:
    model = ImageNet()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
        parameter.data.fill_(1.0)
    build_optimizer(model, quick_config(optimizer=optimizer, weight_decay=0.5, lr=0.1)).step()
    for name, parameter in model.named_parameters():
        assert torch.all(parameter < 1) if parameter.ndim > 1 else torch.all(parameter == 1), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_model_without_biases_can_be_optimised(optimizer: str) -> None:
    model = nn.Linear(2, 2, bias=False)
    model.weight.grad = torch.ones(2, 2)
    before = model.weight.clone()
    build_optimizer(model, quick_config(optimizer=optimizer)).step()
    assert not torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("sgd", lambda p, c: torch.optim.SGD(p, c.lr, momentum=c.momentum, nesterov=True)),
        ("adam", lambda p, c: torch.optim.Adam(p, c.lr)),
        ("adamw", lambda p, c: torch.optim.AdamW(p, c.lr, weight_decay=0)),
        ("nadam", lambda p, c: torch.optim.NAdam(p, c.lr)),
        ("adamax", lambda p, c: torch.optim.Adamax(p, c.lr)),
        ("adagrad", lambda p, c: torch.optim.Adagrad(p, c.lr)),
        ("rmsprop", lambda p, c: torch.optim.RMSprop(p, c.lr, momentum=c.momentum)),
    ],
)
def test_each_name_is_the_optimizer_of_torch_with_the_given_momentum(optimizer: str, expected: Any) -> None:
    config = quick_config(optimizer=optimizer, momentum=0.7, lr=0.1)
    ours, theirs = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(3, 1))
    model = nn.Module()
    model.register_parameter("weight", ours)
    for optimizer_, parameter in ((build_optimizer(model, config), ours), (expected([theirs], config), theirs)):
        for step in range(1, 4):
            parameter.grad = torch.full((3, 1), 1.0 / step)
            optimizer_.step()
    assert torch.allclose(ours, theirs)


def test_nesterov_changes_the_step_and_does_not_matter_without_momentum() -> None:
    def after(**changes: Any) -> Tensor:
        model = nn.Linear(2, 1, bias=False)
        nn.init.ones_(model.weight)
        optimizer = build_optimizer(model, quick_config(optimizer="sgd", **changes))
        for _ in range(2):
            model.weight.grad = torch.ones(1, 2)
            optimizer.step()
        return model.weight.detach()

    assert not torch.equal(after(nesterov=True), after(nesterov=False))
    assert torch.equal(after(nesterov=True, momentum=0.0), after(nesterov=False, momentum=0.0))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_fused_kernel_is_used_where_torch_has_one(optimizer: str) -> None:
    assert build_optimizer(ImageNet(), quick_config(optimizer=optimizer)).defaults["fused"]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_fused_step_equals_torchs_bit_by_bit(optimizer: str, momentum: float) -> None:
    config = quick_config(optimizer=optimizer, momentum=momentum, weight_decay=0.01)
    gradients = [[torch.randn_like(p) for p in ImageNet().parameters()] for _ in range(6)]
    after = []
    for is_ours in (True, False):
        model = ImageNet()
        stepper = build_optimizer(model, config)
        own: Callable[[], Any] = stepper.step
        for number, of_step in enumerate(gradients):
            for group in stepper.param_groups:
                group["lr"] = 0.01 * (number + 1)  # as a schedule sets it
            for parameter, gradient in zip(model.parameters(), of_step, strict=True):
                parameter.grad = gradient.clone()
            own()
            if is_ours and number == 0:
                assert FusedStep.suits(stepper)
                own = FusedStep(stepper)
        after.append((weights_of(model), stepper.state_dict()["state"]))
    assert_equal_weights(after[0][0], after[1][0])
    for number, state in after[0][1].items():
        assert_equal_weights(
            {k: v for k, v in state.items() if v is not None},
            {k: v for k, v in after[1][1][number].items() if v is not None},
        )


def test_a_parameter_that_trains_later_is_left_to_torch() -> None:
    """It has no state until then."""
    model = ImageNet()
    model.hidden.weight.requires_grad_(False)
    step = TrainingStep(model, functional.cross_entropy, build_optimizer(model, quick_config(optimizer="adamw")))
    inputs, targets = image_splits().train.inputs[:8], image_splits().train.targets[:8]
    step(inputs, targets)
    frozen = model.hidden.weight.clone()
    step(inputs, targets)
    assert torch.equal(model.hidden.weight, frozen)
    model.hidden.weight.requires_grad_(True)
    step(inputs, targets)
    assert not torch.equal(model.hidden.weight, frozen)


class TwoMatrices(nn.Module):
    """A hidden and an output matrix, a bias, and a kernel, all ones; with a gradient each once `descend` was called."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"kernel": (2, 1, 3, 3), "hidden": (4, 3), "bias": (4,), "output": (2, 4)}.items():
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))

    def descend(self, config: TrainConfig, *gradients: float) -> dict[str, Tensor]:
        """The parameters after a step for each of `gradients`, which all elements share."""
        optimizer = build_optimizer(self, config)
        for gradient in gradients:
            for parameter in self.parameters():
                parameter.grad = torch.full_like(parameter, gradient)
            optimizer.step()
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


DECOUPLED = {"adamw", "lamb", "muon"}


@pytest.mark.parametrize("optimizer", sorted({*OPTIMIZERS} - DECOUPLED))
def test_l2_is_a_part_of_the_gradient(optimizer: str) -> None:
    config = quick_config(optimizer=optimizer, lr=0.1)
    decayed = TwoMatrices().descend(quick_config(optimizer=optimizer, lr=0.1, weight_decay=0.5), -0.2)
    # 0.5 of weights of 1, and the gradient of -0.2; the sign turns, and with it the direction of every optimizer.
    by_hand = TwoMatrices().descend(config, 0.3)
    torch.testing.assert_close(decayed["hidden"], by_hand["hidden"])
    torch.testing.assert_close(decayed["bias"], TwoMatrices().descend(config, -0.2)["bias"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decoupled_decay_shrinks_the_weights_beside_the_step(optimizer: str) -> None:
    decayed = TwoMatrices().descend(quick_config(optimizer=optimizer, lr=0.1, weight_decay=0.5), -0.2)
    plain = TwoMatrices().descend(quick_config(optimizer=optimizer, lr=0.1), -0.2)
    for name in ("kernel", "hidden", "output"):
        torch.testing.assert_close(decayed[name], plain[name] - 0.1 * 0.5)
    torch.testing.assert_close(decayed["bias"], plain["bias"])


def test_lambs_decay_joins_the_direction_and_leaves_the_averages_alone() -> None:
    averages = []
    for weight_decay in (0.0, 0.5):
        model = nn.Linear(2, 2)
        model.weight.grad = torch.full((2, 2), 0.3)
        optimizer = build_optimizer(model, quick_config(optimizer="lamb", weight_decay=weight_decay))
        optimizer.step()
        averages.append(optimizer.state[model.weight]["exp_avg"])
    assert torch.equal(*averages)


def test_lamb_steps_as_its_paper_says() -> None:
    """Algorithm 2 of arXiv:1904.00962, written out for two steps of one matrix."""
    torch.manual_seed(0)
    weights, gradients = torch.randn(3, 2), torch.randn(2, 3, 2)
    parameter = nn.Parameter(weights.clone())
    optimizer = Lamb([{"params": [parameter], "weight_decay": 0.1}], lr=0.05, betas=(0.8, 0.95), eps=1e-6)
    m = v = torch.zeros(3, 2)
    for t, gradient in enumerate(gradients, start=1):
        parameter.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.95 * v + 0.05 * gradient**2
        ratio = (m / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-6)
        direction = ratio + 0.1 * weights
        weights = weights - 0.05 * weights.norm() / direction.norm() * direction
    torch.testing.assert_close(parameter.detach(), weights)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_a_step_of_lamb_is_as_long_relative_to_the_layer_as_the_rate(scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 7, bias=False)
    before = (model.weight.data.mul_(scale)).clone()
    model.weight.grad = torch.randn(7, 5)
    build_optimizer(model, quick_config(optimizer="lamb", lr=0.02)).step()
    assert ((model.weight - before).norm() / before.norm()).item() == pytest.approx(0.02, rel=1e-4)


@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_steps_as_torchs_does(nesterov: bool) -> None:
    """To the rounding of bf16; matrices of one shape are taken together."""
    shapes = [(6, 4), (4, 6), (6, 4), (5, 5)]
    ours, theirs = ([torch.nn.Parameter(torch.randn(shape)) for shape in shapes] for _ in range(2))
    for parameter, twin in zip(ours, theirs, strict=True):
        twin.data.copy_(parameter)
    optimizers = [
        Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02, momentum=0.9, nesterov=nesterov),
        torch.optim.Muon(theirs, 0.02, 0.1, 0.9, nesterov, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for parameter, twin in zip(ours, theirs, strict=True):
            parameter.grad = torch.randn(parameter.shape)
            twin.grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for parameter, twin in zip(ours, theirs, strict=True):
        torch.testing.assert_close(parameter, twin, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["lamb", "muon"])
def test_a_step_takes_as_many_operations_for_twenty_layers_as_for_five(optimizer: str) -> None:
    """Where they are of one shape; the lists that an operation takes grow."""

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # Views, and the making of a state, launch nothing or happen once.
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    counts = []
    for depth in (5, 20):
        model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(depth)))
        stepper = build_optimizer(model, quick_config(optimizer=optimizer))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        stepper.step()
        names: list[str] = []
        with Counted():
            stepper.step()
        counts.append(len(names))
    assert counts[0] == counts[1]


def test_lamb_moves_weights_of_zero() -> None:
    model = nn.Linear(2, 2, bias=False)
    nn.init.zeros_(model.weight)
    model.weight.grad = torch.ones(2, 2)
    build_optimizer(model, quick_config(optimizer="lamb", lr=0.1)).step()
    torch.testing.assert_close(model.weight.detach(), torch.full((2, 2), -0.1))


def test_muon_takes_hidden_matrices_and_adamw_all_else() -> None:
    config = quick_config(optimizer="muon", lr=0.1)
    muon, adamw = (TwoMatrices().descend(quick_config(optimizer=name, lr=0.1), 0.3) for name in ("muon", "adamw"))
    assert {name for name in muon if not torch.equal(muon[name], adamw[name])} == {"hidden"}

    model = TwoMatrices()
    torch.manual_seed(0)
    optimizer = build_optimizer(model, config)
    model.hidden.grad = torch.randn(4, 3)
    optimizer.step()
    singular_values = torch.linalg.svdvals(model.hidden.detach() - 1) / (0.1 * 0.2 * 4**0.5)
    assert all(0.5 < value < 1.5 for value in singular_values.tolist()), "its step is nearly orthogonal"


def test_muon_continues_from_its_saved_state_in_both_of_its_parts() -> None:
    def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
        optimizer.step()

    config = quick_config(optimizer="muon", lr=0.1)
    whole, resumed = TwoMatrices(), TwoMatrices()
    first = build_optimizer(whole, config)
    stepped(whole, first, seed=1)
    resumed.load_state_dict(whole.state_dict())
    second = build_optimizer(resumed, config)
    second.load_state_dict(deepcopy(first.state_dict()))
    for optimizer in (first, second):
        for group in optimizer.param_groups:
            group["lr"] = 0.03  # as a schedule sets it
    stepped(whole, first, seed=2)
    stepped(resumed, second, seed=2)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "nadam", "adamax", "lamb"])
@pytest.mark.parametrize("change", [{"beta1": 0.5}, {"beta2": 0.5}, {"eps": 0.1}], ids=str)
def test_betas_and_epsilon_reach_every_optimizer_that_has_them(optimizer: str, change: dict[str, float]) -> None:
    config = quick_config(optimizer=optimizer, lr=0.1)
    changed = quick_config(optimizer=optimizer, lr=0.1, **change)
    # LAMB's matrices move by a given length whatever the betas are; its biases do not.
    assert not torch.equal(*(TwoMatrices().descend(c, 1.0, -0.2)["bias"] for c in (config, changed)))


@pytest.mark.parametrize("optimizer", ["rmsprop", "adagrad"])
def test_epsilon_reaches_the_optimizers_without_betas(optimizer: str) -> None:
    config, changed = (quick_config(optimizer=optimizer, lr=0.1, eps=eps) for eps in (1e-8, 0.1))
    assert not torch.equal(*(TwoMatrices().descend(c, 1.0)["hidden"] for c in (config, changed)))


@pytest.mark.parametrize(
    ("change", "allowed"),
    [({"beta1": 1.0}, r"in \[0, 1\)"), ({"beta2": -0.1}, r"in \[0, 1\)"), ({"eps": 0.0}, "above")],
)
def test_betas_and_epsilon_out_of_range_are_refused(change: dict[str, Any], allowed: str) -> None:
    (name,) = change
    with pytest.raises(UsageError, match=rf"{name}={change[name]} is not allowed: it must be {allowed}"):
        quick_config(**change)


@pytest.mark.compiled_step
@pytest.mark.parametrize("optimizer", ["adamax", "adagrad", "lamb", "muon"])
def test_what_has_no_compiled_formula_stays_eager(optimizer: str) -> None:
    results = list(fit(ImageNet(), image_splits(), quick_config(optimizer=optimizer, compile="step", max_epochs=2)))
    assert [result.settled["compile"] for result in results] == ["off", "off"]


@pytest.mark.compiled_step
def test_a_compiled_step_is_another_for_another_rate_of_alpha_dropout_alone() -> None:
    def mode(wanted: str, dropout: nn.Module) -> str:
        model = nn.Sequential(nn.Linear(7, 7), dropout)
        step = TrainingStep(model, functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
        return settle_compile_mode(wanted, step, batch_shape=(3, 7), seconds_a_step=1e-3, steps_left=10)

    for kind, other_rate in ((nn.Dropout, "step"), (nn.AlphaDropout, "off")):
        assert mode("step", kind(0.1)) == "step"  # it is compiled by now
        assert mode("auto", kind(0.1)) == "step"
        assert mode("auto", kind(0.2)) == other_rate
