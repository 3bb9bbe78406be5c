"""Clipping, L1 and the maximum norm."""

from __future__ import annotations

import pytest
import torch
from helpers.training import ImageNet, Line, image_splits, quick_config, regression_config
from torch import Tensor, nn

from hpo.config import TrainConfig
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.training.optimizers import build_optimizer
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit


def stepped(config: TrainConfig, model: nn.Module, gradient: float) -> None:
    """Take a step with a loss whose gradient is the same for every weight."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return gradient * sum(parameter.sum() for parameter in model.parameters())  # type: ignore[return-value]

    settings = {name: getattr(config, name) for name in ("clip_norm", "clip_value", "l1", "max_norm")}
    TrainingStep(model, loss, build_optimizer(model, config), **settings)(torch.ones(1, 3), torch.zeros(1))


def test_clipping_by_value_cuts_each_element_of_a_gradient_off() -> None:
    model = nn.Linear(3, 2)
    before = model.weight.detach().clone()
    model.weight.register_hook(lambda gradient: gradient * torch.tensor([0.1, 5.0, -5.0]))
    stepped(quick_config(optimizer="sgd", momentum=0.0, lr=1.0, clip_value=0.5), model, 1.0)
    torch.testing.assert_close(before - model.weight, torch.tensor([[0.1, 0.5, -0.5]] * 2))


def test_a_norm_is_clipped_after_the_values() -> None:
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    model.weight.register_hook(lambda gradient: gradient * torch.tensor([0.0, 0.0, 100.0]))
    stepped(quick_config(optimizer="sgd", momentum=0.0, lr=1.0, clip_value=3.0, clip_norm=1.0), model, 1.0)
    assert (before - model.weight).norm().item() == pytest.approx(1.0)


def test_l1_pulls_weights_towards_zero_at_a_constant_rate_and_spares_biases() -> None:
    model = nn.Linear(3, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, -2.0, 0.0]]))
        model.bias.fill_(1.0)
    stepped(quick_config(optimizer="sgd", momentum=0.0, lr=0.1, l1=0.5), model, 0.0)
    assert model.weight.tolist() == [pytest.approx([0.95, -1.95, 0.0])]
    assert model.bias.item() == 1.0


def test_l1_leaves_only_the_features_that_matter() -> None:
    def weights(l1: float) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        features = torch.randn(400, 20, generator=generator)
        targets = features[:, 0] - features[:, 1] + 0.5 * torch.randn(400, generator=generator)
        splits = Splits(Split(features[:300], targets[:300]), Split(features[300:], targets[300:]), DataSpec((20,)))
        model = Line(20)
        config = regression_config(optimizer="sgd", momentum=0.0, lr=0.02, l1=l1, max_epochs=20, metric="loss")
        list(fit(model, splits, config))
        return model.linear.weight.detach()[0].abs()

    free, pulled = weights(0.0), weights(0.1)
    assert pulled[2:].max() < 0.01 < free[2:].max()
    assert pulled[:2].min() > 0.5


def test_max_norm_bounds_the_weights_into_each_unit() -> None:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0, 0.0], [0.3, 0.4, 0.0]]))
        model.bias.fill_(9.0)
    stepped(quick_config(optimizer="sgd", lr=0.1, max_norm=2.0), model, 0.0)
    torch.testing.assert_close(model.weight.detach(), torch.tensor([[1.2, 1.6, 0.0], [0.3, 0.4, 0.0]]))
    assert model.bias.tolist() == [9.0, 9.0]


@pytest.mark.compiled_step
@pytest.mark.parametrize("changes", [{"clip_value": 0.1}, {"l1": 0.01}, {"max_norm": 1.0}], ids=str)
def test_what_the_compiled_step_does_not_have_keeps_it_eager(changes: dict[str, float]) -> None:
    config = quick_config(compile="step", max_epochs=2, **changes)
    assert [result.settled["compile"] for result in fit(ImageNet(), image_splits(), config)] == ["off", "off"]
