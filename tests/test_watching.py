"""Watching a run: each symptom is seen in a network that has it, and not in one that is well."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.config import TrainConfig
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.models.mlp import MLP
from hpo.training.losses import least_training_loss
from hpo.training.probe import VANISHED, Probe, relative_gradients
from hpo.training.symptoms import Symptoms
from hpo.training.trainer import EpochResult, fit

SPEC = DataSpec((16,), classes=("a", "b", "c", "d"))


def classes_of_points(number: int = 200, *, random_labels: bool = False) -> Split:
    """Points whose class is the largest of their first four coordinates, or has nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(number, 16, generator=generator)
    labels = torch.randint(4, (number,), generator=generator) if random_labels else points[:, :4].argmax(1)
    return Split(points, labels)


def network(seed: int = 0, **parameters: Any) -> MLP:
    torch.manual_seed(seed)
    return MLP(SPEC, **{"width": 32, "depth": 3, **parameters})


def probed(model: nn.Module, split: Split | None = None) -> dict[str, float]:
    measured = Probe(split or classes_of_points(), functional.cross_entropy).measure(model)
    return {name: float(value) for name, value in measured.items()}


# --- the probe --------------------------------------------------------------------------------------------------------


def test_a_relative_gradient_is_a_layers_gradient_beside_its_weights_and_the_error_at_the_outputs() -> None:
    model, split = network(depth=1), classes_of_points(60)
    outputs = model(split.inputs)
    outputs.retain_grad()
    functional.cross_entropy(outputs, split.targets).backward()  # type: ignore[arg-type]
    error = (functional.softmax(outputs, 1) - functional.one_hot(split.targets, 4)).norm(dim=1).mean()  # type: ignore[arg-type]
    expected = [p.grad.norm() / p.norm() / error for p in model.parameters() if p.ndim > 1 and p.grad is not None]

    for num_at_a_time in (60, 17):
        measured = relative_gradients(model, split, functional.cross_entropy, num_at_a_time=num_at_a_time)
        torch.testing.assert_close(measured, torch.stack(expected).detach())


def test_a_relative_gradient_does_not_depend_on_the_units_of_a_regression() -> None:
    points = classes_of_points().inputs
    measured = []
    for scale in (1.0, 1e4):
        torch.manual_seed(0)
        line = nn.Linear(16, 1)

        class InUnits(nn.Module):
            def __init__(self, line: nn.Linear, scale: float) -> None:
                super().__init__()
                self.line, self.scale = line, scale

            def forward(self, points: Tensor) -> Tensor:
                return self.line(points).squeeze(1) * self.scale

        def loss(outputs: Tensor, targets: Tensor, scale: float = scale) -> Tensor:
            return functional.mse_loss(outputs / scale, targets / scale)

        split = Split(points, points[:, 0] * scale)  # type: ignore[call-overload]
        measured.append(relative_gradients(InUnits(line, scale), split, loss, target_scale=scale))
    torch.testing.assert_close(*measured)


@pytest.mark.parametrize("depth", [2, 20])
@pytest.mark.parametrize("activation", ["relu", "tanh", "selu"])
def test_networks_with_the_right_initialisation_are_well(depth: int, activation: str) -> None:
    measured = probed(network(depth=depth, activation=activation))
    assert measured["vanishing_layers"] == 0
    assert measured["gradient_first"] < 1
    assert measured.get("dead_units", 0.0) < 0.3


def test_gradients_that_vanish_towards_the_first_layers_are_seen() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(16 if i == 0 else 32, 32), nn.Sigmoid()) for i in range(10)]
    measured = probed(nn.Sequential(*layers, nn.Linear(32, 4)))
    assert 2 <= measured["vanishing_layers"] <= 9
    assert measured["gradient_first"] < VANISHED < measured["gradient_last"]


def test_a_network_without_any_error_left_has_no_vanishing_gradients() -> None:
    class Knows(nn.Linear):
        def forward(self, points: Tensor) -> Tensor:
            return 1e7 * points[:, :4] + 0 * super().forward(points)

    measured = probed(Knows(16, 4), classes_of_points(9))
    assert measured["vanishing_layers"] == 0
    assert math.isnan(measured["gradient_first"])


def test_gradients_that_explode_are_seen() -> None:
    model = network(depth=12)
    with torch.no_grad():
        for layer in model.hidden:
            layer[0].weight *= 3
    symptoms = Symptoms().update(1, as_metrics(probed(model)), peak_lr=0.1)
    assert symptoms["exploding"] > 100


@pytest.mark.parametrize(("activation", "bias"), [("relu", -100.0), ("gelu", -100.0), ("tanh", 100.0)])
def test_units_that_answer_to_no_example_are_counted(activation: str, bias: float) -> None:
    model = network(activation=activation)
    before = probed(model)["dead_units"]
    with torch.no_grad():
        model.hidden[0][0].bias[:24] = bias  # 24 of the 96 hidden units
    assert before < 0.02
    assert probed(model)["dead_units"] == pytest.approx(before + 0.25, abs=0.03)


def test_a_channel_is_dead_where_no_pixel_answers_and_one_activation_may_serve_many_layers() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
            self.activation, self.output = nn.ReLU(), nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.activation(self.second(self.activation(self.first(images))))
            return self.output(hidden.mean((2, 3)))

    model = Shared()
    with torch.no_grad():
        model.first.bias.fill_(100.0)
        model.second.bias.copy_(torch.tensor([1e4, 1e4, -1e4, -1e4]))
    images = torch.zeros(20, 1, 8, 8)
    images[::2, :, 4, 4] = 1.0
    assert probed(model, Split(images, torch.arange(20) % 4))["dead_units"] == 0.25


def test_the_probe_leaves_no_trace() -> None:
    model = network(norm="batch", dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    probed(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_model_without_layers_or_gradients_has_no_figures() -> None:
    class Constant(nn.Module):
        def forward(self, points: Tensor) -> Tensor:
            return torch.zeros(len(points), 4)

    class Answers(nn.Sequential):
        def forward(self, points: Tensor) -> Tensor:
            outputs = super().forward(points)
            return outputs if self.training else functional.one_hot(outputs.argmax(1), 4).float()

    assert probed(Constant()) == {}
    assert probed(Answers(nn.Linear(16, 4))) == {}


def test_a_recurrent_network_is_probed() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.output = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, points: Tensor) -> Tensor:
            return self.output(self.recurrent(points.unflatten(1, (4, 4)))[0][:, -1])

    assert probed(Recurrent())["gradient_first"] > VANISHED


# --- the symptoms -----------------------------------------------------------------------------------------------------


def as_metrics(
    measured: dict[str, float], train_loss: float = 1.0, val_loss: float = 1.0, lr: float = 0.1
) -> dict[str, float]:
    losses = {"train/loss": train_loss, "val/loss": val_loss, "lr": lr}
    return losses | {f"watch/{name}": value for name, value in measured.items()}


def watched(
    train_losses: list[float], val_losses: list[float], lrs: list[float] | None = None, least_loss: float = 0.0
) -> list[dict[str, float]]:
    """The symptoms after each epoch of a run with these losses."""
    symptoms, rates = Symptoms(least_loss=least_loss), lrs or [0.1] * len(train_losses)
    return [
        symptoms.update(epoch, as_metrics({}, *losses), peak_lr=0.1)
        for epoch, losses in enumerate(zip(train_losses, val_losses, rates, strict=True), start=1)
    ]


def test_a_run_overfits_from_the_epoch_after_the_lowest_validation_loss_and_is_said_to_after_three() -> None:
    train, val = [0.9, 0.7, 0.5, 0.4, 0.3, 0.2], [0.9, 0.8, 0.9, 0.95, 1.0, 1.1]
    assert watched(train, val) == [{}] * 4 + [{"overfits_from": 3}] * 2


def test_losses_below_zero_are_watched_like_others() -> None:
    falling = [-5.0 - epoch for epoch in range(6)]
    assert watched(falling, [-5.0, -4.99, -4.98, -4.97, -4.96, -4.95]) == [{}] * 6, "a rise of a hundredth is none"
    assert watched(falling, [-5.0, *[-4.0] * 5])[-1] == {"overfits_from": 2}
    assert watched([-5.0] * 12, [-5.0] * 12)[-1] == {"stalls_from": 2}


@pytest.mark.parametrize(
    ("train", "val", "why"),
    [
        ([0.9, 0.7, 0.5, 0.4, 0.3], [0.9, 0.8, 0.82, 0.85, 0.86], "it has hardly risen"),
        ([0.9, 0.7, 0.8, 0.9, 0.8], [0.9, 0.7, 0.9, 1.0, 0.9], "the training loss has risen too"),
        ([0.9, 0.7, 0.5, 0.4, 0.3], [0.9, 0.7, 0.9, 0.7, 0.9], "it comes and goes"),
        ([0.9, math.nan], [0.9, math.nan], "it diverged"),
    ],
)
def test_a_run_does_not_overfit_where(train: list[float], val: list[float], why: str) -> None:
    assert watched(train, val)[-1] == {}, why


def test_a_validation_loss_that_is_noisy_and_flat_is_no_overfitting_and_one_that_rises_is_though_it_is_noisy() -> None:
    draw, epochs = random.Random(0), range(1, 61)
    falling = [0.9**epoch for epoch in epochs]
    flat = [[0.5 * (1 + 0.08 * draw.gauss(0, 1)) for _ in epochs] for _ in range(50)]
    assert [watched(falling, losses)[-1] for losses in flat] == [{}] * 50
    rising = [0.5 * (1 + 0.02 * max(0, epoch - 5)) * (1 + 0.02 * draw.gauss(0, 1)) for epoch in epochs]
    assert "overfits_from" in watched(falling, rising)[-1]


def test_a_run_whose_smoothed_or_mixed_labels_leave_nothing_to_learn_does_not_stand_still() -> None:
    config, losses = TrainConfig(label_smoothing=0.2), [1.4, *[0.72] * 9]
    least = least_training_loss(config, SPEC)
    smoothed = torch.tensor([0.85, 0.05, 0.05, 0.05])
    assert least == pytest.approx(-(smoothed * smoothed.log()).sum().item())
    assert watched(losses, losses)[-1] == {"stalls_from": 3}
    assert watched([1.4, *[least + 0.03] * 9], losses, least_loss=least)[-1] == {}
    assert watched(losses, losses, least_loss=least_training_loss(replace(config, mixup=0.2), SPEC))[-1] == {}
    labels = replace(config, loss="binary_cross_entropy")
    of_label = torch.tensor(0.9)
    assert least_training_loss(labels, DataSpec((1,), ("a", "b"), "multilabel")) == pytest.approx(
        functional.binary_cross_entropy(of_label, of_label).item()
    )
    assert math.isinf(least_training_loss(replace(config, loss="focal"), SPEC))


def test_a_run_stands_still_where_its_training_loss_does_though_the_rate_is_high() -> None:
    losses = [2.3, 1.0, *[0.999] * 6]
    still = watched(losses, losses)
    assert still[5:] == [{}, {"stalls_from": 3}, {"stalls_from": 3}]
    assert watched(losses, losses, [0.1, 0.1, *[0.005] * 6])[-1] == {}, "the schedule has ended it"
    assert watched([2.3, *[0.1] * 8], [1.0] * 9)[-1] == {}, "it has learned all there is"
    assert watched([0.99**n for n in range(9)], [1.0] * 9)[-1] == {}, "it goes on"


def splits_of(train: Split) -> Splits:
    return Splits(train, classes_of_points(100), SPEC)


def last_result(model: nn.Module, train: Split, **settings: Any) -> EpochResult:
    quick: dict[str, Any] = {
        "max_epochs": 12,
        "batch_size": 20,
        "optimizer": "adam",
        "lr": 0.01,
        "schedule": "constant",
        "compile": "off",
    }
    *_, last = fit(model, splits_of(train), TrainConfig(**quick | {"patience": 50} | settings))
    return last


def test_a_real_run_that_learns_by_heart_overfits() -> None:
    last = last_result(network(width=128), classes_of_points(60, random_labels=True), max_epochs=10)
    assert 2 <= last.symptoms["overfits_from"] <= 8
    assert last.metrics["watch/gap"] > 1
    assert last.symptoms.keys() == {"overfits_from"}


def test_a_real_run_that_goes_well_has_no_symptoms() -> None:
    last = last_result(network(), classes_of_points(1000), max_epochs=5, batch_size=100)
    assert last.symptoms == {}
    assert last.metrics["watch/epochs_without_progress"] == 0


def test_a_real_run_whose_gradients_vanish_says_so_and_stands_still() -> None:
    model = network(depth=12, activation="relu", init="lecun", width=16)
    last = last_result(model, classes_of_points(), optimizer="sgd", lr=0.001, max_epochs=7)
    assert last.symptoms["vanishing_layers"] >= 10
    assert last.symptoms["stalls_from"] == 2


def test_a_real_run_with_dead_units_says_so() -> None:
    model = network()
    with torch.no_grad():
        for layer in list(model.hidden)[:2]:
            layer[0].bias.fill_(-100.0)
    last = last_result(model, classes_of_points(), max_epochs=1)
    assert last.symptoms["dead_units"] > 0.6
