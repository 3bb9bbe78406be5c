"""Losses, by hand-made formulas and small data."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.data import of_classes
from helpers.training import ImageNet, Line, image_splits, line_splits, quick_config, regression_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hpo.config import TrainConfig
from hpo.data.examples import DataSpec, Split
from hpo.objective import NOTHING_OWN
from hpo.training.class_metrics import ConfusionMetrics
from hpo.training.comparison import metric_of
from hpo.training.evaluation import evaluate
from hpo.training.losses import loss_function, target_scale, training_loss
from hpo.training.optimizers import build_optimizer
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit


@given(smoothing=st.floats(0, 0.9), seed=st.integers(0, 100))
def test_cross_entropy_is_torchs_with_the_label_smoothing_of_the_config(smoothing: float, seed: int) -> None:
    torch.manual_seed(seed)
    outputs, targets = torch.randn(8, 3), torch.randint(3, (8,))
    loss = loss_function(quick_config(label_smoothing=smoothing), of_classes(3), 1.0)(outputs, targets)
    torch.testing.assert_close(loss, functional.cross_entropy(outputs, targets, label_smoothing=smoothing))


@given(scale=st.floats(1e-3, 1e6), seed=st.integers(0, 100))
def test_the_mse_is_one_for_predicting_the_mean_in_any_units(scale: float, seed: int) -> None:
    targets = scale * torch.randn(50, generator=torch.Generator().manual_seed(seed))
    split = Split(torch.zeros(50, 1), targets)
    loss = loss_function(regression_config(), of_classes(0), target_scale(split, of_classes(0)))
    assert loss(targets.mean().expand(50, 1), targets).item() == pytest.approx(1.0, rel=1e-3)
    assert loss(targets.unsqueeze(1), targets).item() == 0.0


def test_the_scale_of_equal_targets_and_of_class_indices_is_one() -> None:
    assert target_scale(Split(torch.zeros(3, 1), torch.full((3,), 7.0)), of_classes(0)) == 1.0
    assert target_scale(Split(torch.zeros(3, 1), torch.tensor([0, 5, 9])), of_classes(10)) == 1.0


def logits_and_targets(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(12, 3, generator=generator), torch.randint(3, (12,), generator=generator)


@given(gamma=st.floats(0, 5), seed=st.integers(0, 100))
def test_focal_loss_is_cross_entropy_times_the_power_of_what_the_share_lacks(gamma: float, seed: int) -> None:
    outputs, targets = logits_and_targets(seed)
    loss = loss_function(quick_config(loss="focal", focal_gamma=gamma), of_classes(3), 1.0)(outputs, targets)
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
    loss = training_loss(quick_config(**changes), Split(outputs, torch.tensor([0, 0, 1, 1, 1, 2])), of_classes(3))
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


def test_a_training_on_mixed_examples_learns_what_it_is_validated_on() -> None:
    config = quick_config(mixup=0.3, cutmix=1.0, max_epochs=8, lr=0.03, batch_size=16, compile="off")
    results = list(fit(ImageNet(), image_splits(), config))
    assert max(result.value for result in results) > 0.9
    assert results[-1].metrics["train/accuracy"] < results[-1].metrics["val/accuracy"], "the mixed are harder"


@pytest.mark.parametrize(
    "changes",
    [{"loss": "focal"}, {"loss": "binary_cross_entropy"}, {"class_weights": "balanced"}, {"label_smoothing": 0.1}],
    ids=str,
)
def test_losses_of_outputs_in_half_precision_are_computed_in_fp32(changes: dict[str, Any]) -> None:
    outputs, targets = logits_and_targets(0)
    loss = training_loss(quick_config(**changes), Split(outputs, targets), of_classes(3))
    with torch.autocast("cpu", torch.float16):
        measured = loss(outputs.half(), targets)
    assert measured.dtype == torch.float32
    torch.testing.assert_close(measured, loss(outputs.half().float(), targets))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_loss_of_a_sure_and_right_answer_has_a_finite_gradient(gamma: float) -> None:
    outputs = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = loss_function(quick_config(loss="focal", focal_gamma=gamma), of_classes(3), 1.0)(outputs, torch.tensor([0]))
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
    torch.testing.assert_close(loss_function(config, of_classes(3), 1.0)(outputs, targets), expected)


def test_binary_cross_entropy_learns_each_class_against_all_others() -> None:
    model, splits = ImageNet(), image_splits()
    model.output.bias.data.fill_(3.0)  # a softmax would not mind it
    list(fit(model, splits, quick_config(loss="binary_cross_entropy", lr=0.1, max_epochs=20, metric="loss")))
    says_yes = model(splits.validation.inputs).sigmoid() > 0.5
    assert (says_yes == functional.one_hot(splits.validation.targets, 4)).float().mean() > 0.9  # type: ignore[arg-type]


def test_balanced_weights_give_each_class_the_same_part_of_the_loss() -> None:
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    train = Split(torch.zeros(10, 1), targets)
    loss = training_loss(quick_config(class_weights="balanced"), train, of_classes(3))
    each = torch.stack([loss(torch.zeros(1, 3), target[None]) for target in targets])
    parts = torch.stack([each[targets == label].sum() for label in range(3)])
    torch.testing.assert_close(parts, parts[:1].expand(3))
    torch.testing.assert_close(each.mean(), torch.tensor(3.0).log())
    sklearn_weights = 10 / (3 * torch.tensor([6.0, 3.0, 1.0]))
    torch.testing.assert_close(each[[0, 6, 9]], sklearn_weights * torch.tensor(3.0).log())


@pytest.mark.parametrize("sampling", ["balanced", "smote"])
def test_classes_that_are_drawn_equally_often_have_no_weights_besides(sampling: str) -> None:
    outputs = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0] * 6 + [1] * 3 + [2])
    config = quick_config(class_weights="balanced", sampling=sampling)
    loss = training_loss(config, Split(outputs, targets), of_classes(3))
    assert loss(outputs, targets) == functional.cross_entropy(outputs, targets)


def test_class_weights_are_for_the_training_loss_alone() -> None:
    outputs, targets = logits_and_targets(0)
    config = quick_config(class_weights="balanced")
    assert loss_function(config, of_classes(3), 1.0)(outputs, targets) == functional.cross_entropy(outputs, targets)


REGULARIZED = [{"label_smoothing": 0.2}, {"loss": "focal", "focal_gamma": 3.0, "label_smoothing": 0.1}]


@pytest.mark.parametrize("changes", REGULARIZED, ids=str)
def test_a_measured_loss_has_neither_label_smoothing_nor_focal_gamma_in_it(changes: dict[str, Any]) -> None:
    outputs, targets = logits_and_targets(0)
    config, plain = quick_config(metric="loss", **changes), functional.cross_entropy(outputs, targets).item()
    measured = evaluate(nn.Identity(), Split(outputs, targets), config, of_classes(3))
    assert measured["loss"] == pytest.approx(plain)
    assert metric_of(outputs, targets, config, of_classes(3), 1.0, NOTHING_OWN) == pytest.approx(plain)


@pytest.mark.parametrize("changes", REGULARIZED, ids=str)
def test_the_validation_loss_of_a_training_is_plain_cross_entropy(changes: dict[str, Any]) -> None:
    model, splits = ImageNet(), image_splits()
    (result,) = fit(model, splits, quick_config(max_epochs=1, compile="off", precision="fp32", **changes))
    plain = functional.cross_entropy(model(splits.validation.inputs), splits.validation.targets)  # type: ignore[arg-type]
    assert result.metrics["val/loss"] == pytest.approx(plain.item())


@pytest.mark.parametrize("loss", ["focal", "binary_cross_entropy"])
def test_a_weighted_batch_in_two_parts_has_the_gradient_of_the_whole(loss: str) -> None:
    splits = image_splits()
    config = quick_config(class_weights="balanced", loss=loss, label_smoothing=0.1, optimizer="sgd", lr=1.0)
    weights = []
    for num_parts in (1, 2):
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
        nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(model[1].bias)  # type: ignore[arg-type]
        step = TrainingStep(model, training_loss(config, splits.train, of_classes(4)), build_optimizer(model, config))
        step.num_parts = num_parts
        step(splits.train.inputs[:31].float() / 255, splits.train.targets[:31])
        weights.append(model[1].weight.detach())
    torch.testing.assert_close(*weights)


def test_a_batch_of_masks_in_two_parts_has_the_gradient_of_the_whole() -> None:
    torch.manual_seed(0)
    images, labels = torch.randn(7, 1, 4, 4), torch.randint(3, (7, 4, 4))
    labels[torch.rand(7, 4, 4) < torch.linspace(0, 1, 7)[:, None, None]] = -100  # which do not count
    spec = DataSpec((1, 4, 4), tuple("abc"), "segmentation")
    weights, losses = [], []
    for num_parts in (1, 2):
        model = nn.Conv2d(1, 3, 1)
        model.load_state_dict({"weight": torch.zeros(3, 1, 1, 1), "bias": torch.tensor([0.0, 0.1, 0.2])})
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step = TrainingStep(model, loss_function(TrainConfig(), spec), optimizer, num_parts=num_parts)
        losses.append(step(images, labels).loss)
        weights.append(model.weight.detach())
    torch.testing.assert_close(*losses)
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
    measured = loss_function(regression_config(loss=loss), of_classes(0), scale)(
        scale * outputs.unsqueeze(1), scale * targets
    )
    torch.testing.assert_close(measured, torchs(outputs, targets), rtol=1e-4, atol=1e-5)


def test_log_cosh_does_not_overflow() -> None:
    loss = loss_function(regression_config(loss="log_cosh"), of_classes(0), 1.0)
    for error in (-1e4, 1e4):
        assert loss(torch.tensor([error]), torch.zeros(1)).item() == pytest.approx(1e4, rel=1e-4)


@pytest.mark.parametrize("loss", ["mae", "huber", "log_cosh"])
def test_outliers_spoil_the_mean_squared_error_and_leave_the_robust_losses_alone(loss: str) -> None:
    splits = line_splits()
    splits.train.targets[::10] += 30.0  # one example in ten is wrong
    scale = target_scale(splits.train, splits.spec)

    def r2_of(loss: str) -> float:
        *_, last = fit(Line(3, deviation=scale), splits, regression_config(loss=loss, max_epochs=15))  # type: ignore[arg-type]
        return last.metrics["val/r2"]

    assert r2_of(loss) > 0.0 > r2_of("mse")
