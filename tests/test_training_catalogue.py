"""Each technique that docs/training.md names does what it says there, judged by hand-made formulas and small data."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from test_training import ImageNet, image_splits, quick_config
from torch import Tensor, nn

from hpo.config import OPTIMIZERS, TrainConfig
from hpo.errors import UsageError
from hpo.training.optimizers import Lamb, build_optimizer
from hpo.training.trainer import fit

# Optimizers.


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


def test_muon_goes_on_from_its_saved_state_in_both_of_its_parts() -> None:
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


@pytest.mark.parametrize("optimizer", ["adamax", "adagrad", "lamb", "muon"])
def test_what_has_no_compiled_formula_stays_eager(optimizer: str) -> None:
    results = list(fit(ImageNet(), image_splits(), quick_config(optimizer=optimizer, compile="step", max_epochs=2)))
    assert [result.settled["compile"] for result in results] == ["off", "off"]
