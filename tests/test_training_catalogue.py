"""Each technique that docs/training.md names does what it says there, judged by hand-made formulas and small data."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_training import (
    NUM_CLASSES,
    ImageNet,
    Line,
    image_splits,
    line_splits,
    quick_config,
    rates,
    regression_config,
    scripted,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from hpo.config import OPTIMIZERS, TrainConfig
from hpo.data.batches import TrainingBatches
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.errors import UsageError
from hpo.training.averaging import AveragedWeights
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.compiled import settle_compile_mode
from hpo.training.losses import loss_function, target_scale, training_loss
from hpo.training.metrics import ConfusionMetrics
from hpo.training.optimizers import Lamb, Muon, build_optimizer
from hpo.training.step import TrainingStep
from hpo.training.trainer import evaluate, fit

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


def test_a_compiled_step_is_another_for_another_rate_of_alpha_dropout_alone() -> None:
    def mode(wanted: str, dropout: nn.Module) -> str:
        model = nn.Sequential(nn.Linear(7, 7), dropout)
        step = TrainingStep(model, functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1))
        return settle_compile_mode(wanted, step, batch_shape=(3, 7), seconds_a_step=1e-3, steps_left=10)

    for kind, other_rate in ((nn.Dropout, "step"), (nn.AlphaDropout, "off")):
        assert mode("step", kind(0.1)) == "step"  # it is compiled by now
        assert mode("auto", kind(0.1)) == "step"
        assert mode("auto", kind(0.2)) == other_rate


# Schedules.


def steps_at(**changes: Any) -> list[float]:
    """The rate of each of 40 steps at a peak of 0.1, and the one after them."""
    return rates(quick_config(lr=0.1, **({"warmup_fraction": 0.0} | changes)), 40)[0]


def test_step_lowers_the_rate_at_one_half_and_at_three_quarters() -> None:
    assert steps_at(schedule="step", decay_factor=0.2) == pytest.approx([0.1] * 20 + [0.02] * 10 + [0.004] * 11)


def test_exponential_loses_the_same_share_in_each_step_and_ends_at_its_factor() -> None:
    lrs = steps_at(schedule="exponential", decay_factor=0.01)
    shares = [after / before for before, after in pairwise(lrs)]
    assert shares == pytest.approx([shares[0]] * 40)
    assert lrs[-1] == pytest.approx(0.1 * 0.01)


def test_cosine_restarts_begins_again_at_the_peak_in_cycles_that_double() -> None:
    lrs = rates(quick_config(schedule="cosine_restarts", num_cycles=3, warmup_fraction=0.0, lr=0.1), 70)[0]
    peaks = [step for step, lr in enumerate(lrs) if lr == pytest.approx(0.1, rel=1e-9)]
    assert peaks == [0, 10, 30]
    assert lrs[20] == lrs[50] == pytest.approx(0.05)
    assert lrs[-1] == 0.0


def test_one_cycle_of_cosine_restarts_is_cosine() -> None:
    assert steps_at(schedule="cosine_restarts", num_cycles=1) == pytest.approx(steps_at(schedule="cosine"))


@pytest.mark.parametrize("num_steps", [1, 2, 7, 41, 1000])
@pytest.mark.parametrize("num_cycles", [2, 3, 6])
def test_cosine_restarts_takes_no_step_at_a_rate_of_zero(num_steps: int, num_cycles: int) -> None:
    config = quick_config(schedule="cosine_restarts", num_cycles=num_cycles, warmup_fraction=0.0, lr=0.1)
    assert all(lr > 1e-9 for lr in rates(config, num_steps)[0][:-1])


@pytest.mark.parametrize("schedule", ["step", "exponential", "cosine", "cosine_restarts", "plateau"])
def test_a_warm_up_comes_before_the_curve_which_then_begins_at_the_peak(schedule: str) -> None:
    lrs = steps_at(schedule=schedule, warmup_fraction=0.1)
    assert lrs[:5] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1])


def test_plateau_lowers_the_rate_after_its_patience_without_improvement() -> None:
    _, results = scripted(
        [0.2, 0.4, 0.4, 0.3, 0.6, 0.6, 0.6, 0.6, 0.6], schedule="plateau", plateau_patience=2, decay_factor=0.5, lr=0.1
    )
    # `lr` is the rate of an epoch's last step: the epoch after the patience is over is the first at the lower rate.
    expected = [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025]
    assert [result.metrics["lr"] for result in results] == pytest.approx(expected)


def test_plateau_knows_a_metric_to_be_minimised_and_the_least_change_that_counts() -> None:
    def rates_of(**changes: Any) -> list[float]:
        config = quick_config(schedule="plateau", plateau_patience=1, max_epochs=5, warmup_fraction=0.0, **changes)
        return [result.metrics["lr"] for result in fit(ImageNet(), image_splits(), config)]

    falls = rates_of(metric="loss")  # it falls in all five epochs
    assert falls == [0.01] * 5
    assert rates_of(metric="loss", min_delta=10.0) == pytest.approx([0.01, 0.01, 1e-3, 1e-4, 1e-5])


def test_plateau_does_not_count_the_epochs_of_the_warm_up() -> None:
    _, results = scripted([0.5] * 6, schedule="plateau", plateau_patience=1, warmup_fraction=0.5, lr=0.1)
    # Three epochs of warm-up; the third ends it and is the first that counts.
    assert [result.metrics["lr"] for result in results][3:] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"decay_factor": 1.0}, r"in \(0, 1\)"),
        ({"num_cycles": 0}, "at least 1"),
        ({"plateau_patience": 0}, "at least 1"),
    ],
)
def test_settings_of_a_schedule_out_of_range_are_refused(change: dict[str, Any], allowed: str) -> None:
    (name,) = change
    with pytest.raises(UsageError, match=rf"{name}={change[name]} is not allowed: it must be {allowed}"):
        quick_config(**change)


# Losses.


def logits_and_targets(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(12, 3, generator=generator), torch.randint(3, (12,), generator=generator)


@given(gamma=st.floats(0, 5), seed=st.integers(0, 100))
def test_focal_loss_is_cross_entropy_times_the_power_of_what_the_share_lacks(gamma: float, seed: int) -> None:
    outputs, targets = logits_and_targets(seed)
    loss = loss_function(quick_config(loss="focal", focal_gamma=gamma), 3, 1.0)(outputs, targets)
    shares = outputs.softmax(1)[range(12), targets]
    torch.testing.assert_close(loss, (-((1 - shares) ** gamma) * shares.log()).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"label_smoothing": 0.1},
        {"loss": "focal", "class_weights": "balanced"},
        {"loss": "binary_cross_entropy", "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_the_loss_of_a_mixed_example_is_that_of_its_classes_by_their_shares(changes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    outputs, first, second = torch.randn(12, 3), torch.randint(3, (12,)), torch.randint(3, (12,))
    loss = training_loss(quick_config(**changes), Split(outputs, torch.tensor([0, 0, 1, 1, 1, 2])), 3)
    shares = 0.3 * functional.one_hot(first, 3) + 0.7 * functional.one_hot(second, 3)
    torch.testing.assert_close(loss(outputs, shares), 0.3 * loss(outputs, first) + 0.7 * loss(outputs, second))


def test_a_mixed_example_counts_for_each_of_its_classes_by_its_share() -> None:
    metrics = ConfusionMetrics(3, "cpu")
    outputs = torch.tensor([[9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])
    metrics.update(outputs, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0]]))
    values = metrics.compute()
    assert values["accuracy"].item() == pytest.approx((0.75 + 0 + 1) / 3)
    # Of class 1 there are 1.75 examples, 1 of which is found; of class 0 all, of class 2 none.
    assert values["recall"].item() == pytest.approx((1 + 1 / 1.75 + 0) / 3)


@pytest.mark.parametrize("compile_mode", ["off", "step"])
def test_a_training_on_mixed_examples_learns_what_it_is_validated_on(compile_mode: str) -> None:
    config = quick_config(mixup=0.3, cutmix=1.0, max_epochs=8, lr=0.03, batch_size=16, compile=compile_mode)
    results = list(fit(ImageNet(), image_splits(), config))
    assert results[-1].settled["compile"] == compile_mode
    assert max(result.value for result in results) > 0.9
    assert results[-1].metrics["train/accuracy"] < results[-1].metrics["val/accuracy"], "the mixed are harder"


@pytest.mark.parametrize(
    "changes",
    [{"loss": "focal"}, {"loss": "binary_cross_entropy"}, {"class_weights": "balanced"}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_losses_of_outputs_in_half_precision_are_computed_in_fp32(changes: dict[str, Any]) -> None:
    outputs, targets = logits_and_targets(0)
    loss = training_loss(quick_config(**changes), Split(outputs, targets), 3)
    with torch.autocast("cpu", torch.float16):
        measured = loss(outputs.half(), targets)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, loss(outputs.half().float(), targets))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_a_sure_and_right_answer_has_a_finite_gradient(gamma: float) -> None:
    outputs = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = loss_function(quick_config(loss="focal", focal_gamma=gamma), 3, 1.0)(outputs, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0.0
    assert outputs.grad is not None
    assert outputs.grad.isfinite().all()


@given(smoothing=st.sampled_from([0.0, 0.1, 0.5]), seed=st.integers(0, 100))
def test_binary_cross_entropy_is_torchs_on_one_hot_targets(smoothing: float, seed: int) -> None:
    outputs, targets = logits_and_targets(seed)
    config = quick_config(loss="binary_cross_entropy", label_smoothing=smoothing)
    wanted = (1 - smoothing) * functional.one_hot(targets, 3).float() + smoothing / 3
    expected = functional.binary_cross_entropy_with_logits(outputs, wanted)
    torch.testing.assert_close(loss_function(config, 3, 1.0)(outputs, targets), expected)


def test_binary_cross_entropy_learns_each_class_against_all_others() -> None:
    model, splits = ImageNet(), image_splits()
    model.output.bias.data.fill_(3.0)  # a softmax would not mind it
    list(fit(model, splits, quick_config(loss="binary_cross_entropy", lr=0.1, max_epochs=20, metric="loss")))
    says_yes = model(splits.validation.inputs).sigmoid() > 0.5
    assert (says_yes == functional.one_hot(splits.validation.targets, 4)).float().mean() > 0.9


def test_balanced_weights_give_each_class_the_same_part_of_the_loss() -> None:
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    train = Split(torch.zeros(10, 1), targets)
    loss = training_loss(quick_config(class_weights="balanced"), train, 3)
    each = torch.stack([loss(torch.zeros(1, 3), target[None]) for target in targets])
    parts = torch.stack([each[targets == label].sum() for label in range(3)])
    torch.testing.assert_close(parts, parts[:1].expand(3))
    torch.testing.assert_close(each.mean(), torch.tensor(3.0).log())
    sklearn_weights = 10 / (3 * torch.tensor([6.0, 3.0, 1.0]))
    torch.testing.assert_close(each[[0, 6, 9]], sklearn_weights * torch.tensor(3.0).log())


def test_class_weights_are_for_the_training_loss_alone() -> None:
    outputs, targets = logits_and_targets(0)
    config = quick_config(class_weights="balanced")
    assert loss_function(config, 3, 1.0)(outputs, targets) == functional.cross_entropy(outputs, targets)


@pytest.mark.parametrize("loss", ["focal", "binary_cross_entropy"])
def test_a_weighted_batch_in_two_parts_has_the_gradient_of_the_whole(loss: str) -> None:
    splits = image_splits()
    config = quick_config(class_weights="balanced", loss=loss, label_smoothing=0.1, optimizer="sgd", lr=1.0)
    weights = []
    for num_parts in (1, 2):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        nn.init.zeros_(model[1].weight)
        nn.init.zeros_(model[1].bias)
        step = TrainingStep(model, training_loss(config, splits.train, 4), build_optimizer(model, config))
        step.num_parts = num_parts
        step(splits.train.inputs[:31].float() / 255, splits.train.targets[:31])
        weights.append(model[1].weight.detach())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(
    ("loss", "torchs"),
    [
        ("mae", functional.l1_loss),
        ("huber", functional.huber_loss),
        ("log_cosh", lambda outputs, targets: (outputs - targets).double().cosh().log().mean().float()),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_losses_of_a_regression_are_measured_in_deviations_of_the_target(loss: str, torchs: Any, scale: float) -> None:
    torch.manual_seed(0)
    targets, outputs = 3 * torch.randn(50), 3 * torch.randn(50)
    measured = loss_function(regression_config(loss=loss), 0, scale)(scale * outputs.unsqueeze(1), scale * targets)
    torch.testing.assert_close(measured, torchs(outputs, targets), rtol=1e-4, atol=1e-5)


def test_log_cosh_does_not_overflow() -> None:
    loss = loss_function(regression_config(loss="log_cosh"), 0, 1.0)
    for error in (-1e4, 1e4):
        assert loss(torch.tensor([error]), torch.zeros(1)).item() == pytest.approx(1e4, rel=1e-4)


@pytest.mark.parametrize("loss", ["mae", "huber", "log_cosh"])
def test_outliers_spoil_the_mean_squared_error_and_leave_the_robust_losses_alone(loss: str) -> None:
    splits = line_splits()
    splits.train.targets[::10] += 30.0  # one example in ten is wrong
    scale = target_scale(splits.train)

    def r2_of(loss: str) -> float:
        *_, last = fit(Line(3, deviation=scale), splits, regression_config(loss=loss, max_epochs=15))
        return last.metrics["val/r2"]

    assert r2_of(loss) > 0.0 > r2_of("mse")


# Rare classes.


def rare_class_splits() -> Splits:
    """Two overlapping clouds of points; one in 25 is of the second."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.arange(4000) % 25 == 0).long()
    points = torch.randn(4000, 2, generator=generator) + 1.5 * targets[:, None]
    train, validation = (Split(points[part], targets[part]) for part in (slice(2000), slice(2000, None)))
    return Splits(train, validation, DataSpec((2,), ("usual", "rare")))


def test_accuracy_misleads_where_a_class_is_rare_and_macro_recall_shows_it() -> None:
    def trained(**changes: Any) -> dict[str, float]:
        torch.manual_seed(0)
        config = quick_config(max_epochs=6, batch_size=50, lr=0.03, metric="recall", **changes)
        *_, last = fit(nn.Linear(2, 2), rare_class_splits(), config)
        return last.metrics

    plain = trained()
    assert plain["val/accuracy"] > 0.95
    assert plain["val/recall"] < 0.65, "it hardly ever finds the rare class"
    for remedy in ({"class_weights": "balanced"}, {"sampling": "balanced"}):
        balanced = trained(**remedy)
        assert balanced["val/recall"] > 0.8, remedy
        assert balanced["val/accuracy"] < plain["val/accuracy"], remedy


def batches_of(split: Split, sampling: str, seed: int = 0) -> TrainingBatches:
    generators = {name: torch.Generator().manual_seed(seed) for name in ("order", "augmentation")}
    return TrainingBatches(split, 50, augment="none", sampling=sampling, **generators)


def test_balanced_sampling_draws_every_class_equally_often_and_uniform_every_example_once() -> None:
    train = rare_class_splits().train
    numbered = Split(torch.arange(2000)[:, None], train.targets)
    drawn = {name: list(batches_of(numbered, name)) for name in ("uniform", "balanced")}
    shares = {name: torch.cat([targets for _, targets in batches]).float().mean() for name, batches in drawn.items()}
    assert shares["uniform"].item() == pytest.approx(0.04)
    assert shares["balanced"].item() == pytest.approx(0.5, abs=0.05)
    assert len(drawn["balanced"]) == len(drawn["uniform"]) == 40
    seen = torch.cat([inputs[:, 0] for inputs, _ in drawn["balanced"]])
    assert train.targets[seen].equal(torch.cat([targets for _, targets in drawn["balanced"]]))
    rare = seen[train.targets[seen] == 1].unique()
    assert len(rare) == 80, "all of the rare examples are used"


def test_balanced_sampling_follows_from_the_seed_of_the_order() -> None:
    train = rare_class_splits().train
    first, again, other = (next(iter(batches_of(train, "balanced", seed)))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("setting", ["class_weights", "sampling"])
def test_a_regression_has_no_classes_to_balance(setting: str) -> None:
    with pytest.raises(UsageError, match=f"{setting}='balanced' is for classes; this task is a regression"):
        next(iter(fit(Line(3), line_splits(), regression_config(**{setting: "balanced"}))))


# Regularisation.


def stepped(config: TrainConfig, model: nn.Module, gradient: float) -> None:
    """Take a step with a loss whose gradient is the same for every weight."""

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return gradient * sum(parameter.sum() for parameter in model.parameters())

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


@pytest.mark.parametrize("changes", [{"clip_value": 0.1}, {"l1": 0.01}, {"max_norm": 1.0}], ids=str)
def test_what_the_compiled_step_does_not_have_keeps_it_eager(changes: dict[str, float]) -> None:
    config = quick_config(compile="step", max_epochs=2, **changes)
    assert [result.settled["compile"] for result in fit(ImageNet(), image_splits(), config)] == ["off", "off"]


# Averaged weights.


def test_an_average_keeps_its_share_of_itself_in_each_step_and_takes_the_buffers_as_they_are() -> None:
    model = ImageNet()
    expected = model.output.weight.detach().clone()
    average = AveragedWeights(model, quick_config(ema_decay=0.9))
    for step in range(1, 4):
        with torch.no_grad():
            model.output.weight += step
        average.end_step()
        expected = 0.9 * expected + 0.1 * model.output.weight.detach()
    torch.testing.assert_close(average.model.output.weight, expected)

    plain = nn.Sequential(nn.Linear(2, 2))
    plain.register_buffer("count", torch.tensor(1))
    average = AveragedWeights(plain, quick_config(ema_decay=0.9))
    plain.count += 4
    assert average.settle(plain, (), "fp32").count == 5


def test_the_averaged_weights_are_those_that_are_measured_and_kept() -> None:
    splits = image_splits()
    config = quick_config(max_epochs=5, ema_decay=0.9, metric="loss", lr=0.05)
    model = ImageNet(dropout=0.2)
    results = list(fit(model, splits, config))
    best = results[results[-1].best_epoch - 1]
    measured = evaluate(model, splits.validation, config, 4)
    assert measured == {name: best.metrics[f"val/{name}"] for name in measured}
    plain = ImageNet(dropout=0.2)
    others = list(fit(plain, splits, replace(config, ema_decay=0.0)))
    assert [result.metrics["train/loss"] for result in results] == [result.metrics["train/loss"] for result in others]
    assert not torch.equal(model.output.weight, plain.output.weight)


def test_batch_norms_see_the_training_split_through_the_averaged_weights() -> None:
    splits, model = image_splits(), ImageNet()
    list(fit(model, splits, quick_config(max_epochs=1, ema_decay=0.99, lr=0.1)))
    hidden = model.hidden(splits.train.inputs.flatten(1) / 255.0)
    torch.testing.assert_close(model.norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert model.norm.momentum == 0.1


def test_averaging_steadies_a_training_with_a_rate_that_is_too_high() -> None:
    def losses(ema_decay: float) -> list[float]:
        config = quick_config(
            optimizer="sgd", schedule="constant", lr=0.5, batch_size=8, max_epochs=8, ema_decay=ema_decay
        )
        return [result.metrics["val/loss"] for result in fit(ImageNet(), image_splits(), config)][4:]

    assert sum(losses(0.95)) < 0.9 * sum(losses(0.0))


def test_a_compiled_step_is_averaged_as_the_eager_one() -> None:
    weights = []
    for mode in ("off", "step"):
        model = ImageNet(dropout=0.0)
        model.dropout = nn.Dropout(1e-9)  # which a compiled step replaces by a module with a buffer
        model.hidden.bias = None
        list(fit(model, image_splits(), quick_config(optimizer="sgd", max_epochs=3, ema_decay=0.9, compile=mode)))
        weights.append(model.output.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-4)


def test_swa_is_the_mean_of_the_weights_at_the_ends_of_the_late_epochs(tmp_path: Path) -> None:
    config = quick_config(max_epochs=5, swa_start=0.6, metric="loss", lr=0.02, optimizer="sgd")
    model, ends = ImageNet(dropout=0.0), []
    folder = CheckpointFolder(tmp_path)
    for result in fit(model, image_splits(), config, checkpoint=folder):
        ends.append(deepcopy(model.state_dict()))
        assert result.is_best, "so that the last average is what is kept"
        measured = evaluate(deepcopy(model), image_splits().validation, config, NUM_CLASSES)["loss"]
        assert (measured == pytest.approx(result.metrics["val/loss"], abs=1e-6)) == (result.epoch < 3)
    for name in ("hidden.weight", "output.bias"):
        by_hand = torch.stack([weights[name] for weights in ends[2:]]).mean(0)
        torch.testing.assert_close(model.state_dict()[name], by_hand)
        assert not torch.allclose(by_hand, ends[-1][name])


def test_two_ways_of_averaging_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match=r"swa_start=0\.5 is not allowed: it must be 0 where ema_decay"):
        quick_config(swa_start=0.5, ema_decay=0.9)
