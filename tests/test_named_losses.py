"""Losses of embeddings, of reconstructions and of soft labels: what they compute, and that networks learn by them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import kinds
from helpers.data import LR_SPACE
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.nn import functional

from hpo import (
    Choice,
    Dataset,
    DataSpec,
    Float,
    Group,
    Objective,
    Space,
    TrainConfig,
    hold_out,
    mlp,
    split_dataset,
)
from hpo.checks.checklist import whole_list
from hpo.checks.compatibility import check_comparable, check_task
from hpo.checks.verdicts import Subject
from hpo.config import USUAL
from hpo.data.batches import build_batches, evaluation_views
from hpo.data.kinds import KINDS
from hpo.errors import SpaceError
from hpo.models.preprocessed import build_model
from hpo.plots.checks import plot_checklist
from hpo.plugins import OBJECT
from hpo.task import Task
from hpo.training.comparison import compare_models
from hpo.training.embeddings import RetrievalMetrics
from hpo.training.losses import loss_function
from hpo.training.trainer import EpochResult, fit

NUM = 400


def loss_of(kind: str, loss: str, *, classes: str = "", scale: float = 1.0, **changes: Any) -> Any:
    spec = DataSpec((4,), tuple(classes), kind)
    return loss_function(TrainConfig(loss=loss, **changes), spec, scale)


def embedded() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(12, 5, generator=draw), torch.randint(4, (12,), generator=draw)


def distance(one: Tensor, other: Tensor) -> float:
    return float((functional.normalize(one, dim=0) - functional.normalize(other, dim=0)).norm())


def alike_and_other(targets: Tensor, row: int) -> tuple[list[int], list[int]]:
    others = [each for each in range(len(targets)) if each != row]
    return [e for e in others if targets[e] == targets[row]], [e for e in others if targets[e] != targets[row]]


def test_triplet_loss_takes_the_hardest_pair_of_each_example() -> None:
    outputs, targets = embedded()
    wanted = []
    for row in range(len(targets)):
        alike, other = alike_and_other(targets, row)
        if alike and other:
            farthest = max(distance(outputs[row], outputs[each]) for each in alike)
            nearest = min(distance(outputs[row], outputs[each]) for each in other)
            wanted.append(max(0.0, farthest - nearest + 0.3))
    assert loss_of("embedding", "triplet", margin=0.3)(outputs, targets).item() == pytest.approx(
        sum(wanted) / len(wanted), abs=1e-5
    )


def test_contrastive_loss_pulls_what_is_alike_and_pushes_others_up_to_the_margin() -> None:
    outputs, targets = embedded()
    pulled, pushed = [], []
    for row in range(len(targets)):
        alike, other = alike_and_other(targets, row)
        pulled += [distance(outputs[row], outputs[each]) ** 2 for each in alike]
        pushed += [max(0.0, 1.5 - distance(outputs[row], outputs[each])) ** 2 for each in other]
    wanted = (sum(pulled) / len(pulled) + sum(pushed) / len(pushed)) / 2
    assert loss_of("embedding", "contrastive", margin=1.5)(outputs, targets).item() == pytest.approx(wanted, abs=1e-5)


def test_info_nce_with_two_views_is_the_cross_entropy_of_finding_the_other_one() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(8, 5), torch.arange(4).repeat_interleave(2)
    unit = functional.normalize(outputs, dim=1)
    similarities = (unit @ unit.T / 0.5).fill_diagonal_(-math.inf)
    partners = torch.arange(8) ^ 1
    wanted = functional.cross_entropy(similarities, partners)
    assert loss_of("instances", "info_nce", temperature=0.5)(outputs, targets).item() == pytest.approx(wanted.item())


def test_info_nce_of_labels_is_the_mean_over_what_is_alike_and_passes_over_what_is_alone() -> None:
    outputs, targets = embedded()
    targets[0] = 99
    unit = functional.normalize(outputs, dim=1)
    wanted = []
    for row in range(len(targets)):
        alike, _ = alike_and_other(targets, row)
        others = [each for each in range(len(targets)) if each != row]
        total = torch.logsumexp(unit[others] @ unit[row] / 0.1, 0)
        if alike:
            wanted.append(float((total - unit[alike] @ unit[row] / 0.1).mean()))
    ours = loss_of("embedding", "info_nce")(outputs, targets)
    assert ours.item() == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


@pytest.mark.parametrize("loss", ["triplet", "contrastive", "info_nce"])
def test_a_batch_in_which_nothing_is_alike_has_a_finite_gradient(loss: str) -> None:
    outputs = torch.randn(4, 3, requires_grad=True)
    value = loss_of("embedding", loss)(outputs, torch.arange(4))
    value.backward()
    assert value.isfinite()
    assert outputs.grad.isfinite().all()


@pytest.mark.parametrize("loss", ["triplet", "contrastive", "info_nce"])
def test_embeddings_are_compared_in_fp32_whatever_the_precision(loss: str) -> None:
    outputs, targets = embedded()
    outputs = outputs.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        within = loss_of("embedding", loss)(outputs, targets)
    assert within.item() == loss_of("embedding", loss)(outputs.float(), targets).item()


def test_the_divergence_of_soft_labels_is_torchs() -> None:
    torch.manual_seed(0)
    outputs, shares = torch.randn(6, 3), torch.rand(6, 3).softmax(1)
    wanted = functional.kl_div(outputs.log_softmax(1), shares, reduction="batchmean")
    assert loss_of("soft_labels", "kl_divergence", classes="abc")(outputs, shares).item() == pytest.approx(
        wanted.item()
    )
    crossed = loss_of("soft_labels", "cross_entropy", classes="abc")(outputs, shares)
    assert crossed.item() == pytest.approx(functional.cross_entropy(outputs, shares).item())


def test_the_bound_of_a_vae_is_that_of_torchs_distributions_without_its_constant() -> None:
    torch.manual_seed(0)
    inputs, again, mean, log_variance = torch.randn(7, 4), torch.randn(7, 4), torch.randn(7, 2), torch.randn(7, 2)
    latent = Normal(mean, (log_variance / 2).exp())
    divergence = kl_divergence(latent, Normal(torch.zeros(2), torch.ones(2))).sum(1)
    surprise = -Normal(again, 2.0).log_prob(inputs).sum(1) - 4 * math.log(2.0 * math.sqrt(2 * math.pi))
    ours = loss_of("reconstruction", "vae", scale=2.0, kl_weight=3.0)((again, mean, log_variance), inputs)
    assert ours.item() == pytest.approx((surprise + 3 * divergence).mean().item(), rel=1e-5)


def test_recall_counts_neighbours_among_all_batches_without_the_example_itself() -> None:
    outputs = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.7, 0.8], [-1.0, 0.0], [0.5, 0.5], [-1.0, -0.1]])
    targets = torch.tensor([0, 0, 1, 1, 2, 0, 3])
    metrics = RetrievalMetrics()
    for rows in (slice(0, 3), slice(3, 7)):
        metrics.update(outputs[rows], targets[rows])
    # 0 and 1 find each other; 5 finds 3; 2 finds 3; 3 finds 5; 4 and 6 have nothing alike.
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found == {"recall_at_1": pytest.approx(3 / 5), "recall_at_5": 1.0}


def noisy_groups() -> Dataset:
    """Twenty groups that differ in two of twelve values, while the other ten are larger noise."""
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(NUM) % 8
    angles = labels * (2 * math.pi / 8)
    signal = torch.stack((angles.cos(), angles.sin()), 1) + 0.1 * torch.randn(NUM, 2, generator=draw)
    return hold_out(torch.cat((signal, torch.randn(NUM, 10, generator=draw)), 1), labels, kind="embedding")


def unlabelled() -> Dataset:
    """Handwritten digits, each to be found again after it was shifted and turned."""
    images = torch.from_numpy(load_digits().images[:NUM]).to(torch.uint8).unsqueeze(1)
    return hold_out(images, None, kind="instances")


def shared() -> Dataset:
    inputs = torch.randn(NUM, 4, generator=torch.Generator().manual_seed(0))
    return hold_out(inputs, (2 * inputs[:, :3]).softmax(1), ["a", "b", "c"], kind="soft_labels")


def on_a_plane(scale: float = 1.0) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    plane = torch.randn(NUM, 2, generator=draw) @ torch.randn(2, 8, generator=draw)
    return hold_out(scale * (plane + 3), None, kind="reconstruction")


class Bottleneck(nn.Module):
    def __init__(self, spec: DataSpec, *, is_variational: bool = False) -> None:
        super().__init__()
        self.is_variational = is_variational
        self.encoder, self.decoder = nn.Linear(spec.num_outputs, 4), nn.Linear(2, spec.num_outputs)

    def forward(self, inputs: Tensor) -> Any:
        mean, log_variance = self.encoder(inputs).chunk(2, dim=1)
        if not self.is_variational:
            return self.decoder(mean)
        noise = torch.randn_like(mean) if self.training else 0.0
        return {"again": self.decoder(mean + noise * (log_variance / 2).exp()), "latent": (mean, log_variance)}


def variational(spec: DataSpec) -> nn.Module:
    return Bottleneck(spec, is_variational=True)


CASES: dict[str, tuple[Callable[[], Dataset], Any, str, float, dict[str, Any]]] = {
    "triplet": (noisy_groups, mlp, "recall_at_1", 0.8, {}),  # the inputs themselves have 0.33
    "contrastive": (noisy_groups, mlp, "recall_at_1", 0.8, {"margin": 1.0}),
    "info_nce": (noisy_groups, mlp, "recall_at_1", 0.8, {}),
    "info_nce of views": (unlabelled, mlp, "recall_at_1", 0.35, {"augment": "crop+rotation"}),  # untrained 0.1
    "kl_divergence": (shared, mlp, "kl_divergence", 0.02, {}),  # equal shares have 0.5
    "cross_entropy of shares": (shared, mlp, "accuracy", 0.9, {}),
    "mse of inputs": (on_a_plane, Bottleneck, "mse", 0.02, {}),  # the mean has 2
    "vae": (on_a_plane, variational, "mse", 0.6, {"kl_weight": 0.3}),
}


def task_of(name: str) -> tuple[Task, Dataset]:
    load, model, metric, _, settings = CASES[name]
    settings = {"max_epochs": 30, "patience": 30, "batch_size": 32, "compile": "off"} | settings
    objective = Objective(
        name="made", description="made", load=lambda _: load(), model=model, loss=name.partition(" ")[0], metric=metric,
        space=LR_SPACE, settings=settings,
    )  # fmt: skip
    return Task(reference=OBJECT, objective=objective, space=LR_SPACE), load()


def trained(task: Task, data: Dataset) -> tuple[Any, EpochResult]:
    splits = split_dataset(data, seed=0)
    check_task(task, splits)
    model = build_model(task.objective, splits.spec, {}, seed=0)
    model.fit_statistics(splits.train)
    lr = 0.05 if splits.spec.kind == "reconstruction" else 0.01
    *_, last = fit(model, splits, task.train_config({"lr": lr}))
    return model, last


@pytest.mark.parametrize("name", CASES)
def test_a_network_learns_by_each_loss(name: str) -> None:
    task, data = task_of(name)
    _, last = trained(task, data)
    assert last.best_value is not None
    assert task.objective.better.gain(last.best_value, over=CASES[name][3]) > 0, last.best_value


def test_the_inputs_of_the_groups_say_little_by_themselves() -> None:
    metrics, split = RetrievalMetrics(), split_dataset(noisy_groups(), seed=0).validation
    metrics.update(split.inputs, split.targets)  # type: ignore[arg-type]
    assert metrics.compute()["recall_at_1"] < 0.5


@pytest.mark.parametrize(
    ("name", "searched", "refused"),
    [
        ("triplet", {"batch_size": Choice(16, 64, default=64)}, "batch_size"),
        ("vae", {"kl_weight": Float(0.1, 1.0, default=0.3)}, "kl_weight"),
        ("mse of inputs", {"loss": Choice("mse", "mae", default="mse")}, "loss"),
        ("mse of inputs", {"batch_size": Choice(16, 64, default=64)}, None),
    ],
)
def test_a_search_by_the_loss_does_not_search_what_it_is_measured_in(
    name: str, searched: dict[str, Any], refused: str | None
) -> None:
    task, data = task_of(name)
    space = Space(Group("g", **searched))
    by_loss = replace(task, objective=replace(task.objective, metric="loss", space=space), space=space)
    told = f"{refused} is searched and changes the scale of the loss, which is the metric.*-p {refused}="
    with pytest.raises(SpaceError, match=told) if refused else nullcontext():
        check_comparable(by_loss, data.spec)
    check_comparable(replace(by_loss, objective=replace(task.objective, space=space)), data.spec)


@pytest.mark.parametrize("name", ["info_nce", "info_nce of views", "kl_divergence", "mse of inputs", "vae"])
def test_the_checklist_finds_nothing_wrong(name: str) -> None:
    task, data = task_of(name)
    subject = Subject.of(task, split_dataset(data, seed=0), "cpu")
    verdicts = list(whole_list(subject, data.test))
    assert plot_checklist("made", {verdict.check: verdict.data for verdict in verdicts}).axes
    assert [f"{v.check}: {v.text}: {v.advice}" for v in verdicts if v.state == "wrong"] == []


def test_the_views_of_an_example_follow_each_other_and_differ_and_those_of_an_evaluation_stay_the_same() -> None:
    task, data = task_of("info_nce of views")
    splits, config = split_dataset(data, seed=0), task.train_config({})
    draw = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    inputs, targets = next(iter(build_batches(splits.train, config, splits.spec, order=draw[0], augmentation=draw[1])))
    assert len(inputs) == len(targets) == 64
    assert torch.equal(targets[::2], targets[1::2])
    assert len(set(targets.tolist())) == 32
    assert not torch.equal(inputs[::2], inputs[1::2])
    once, again, smaller = (
        [torch.cat(parts) for parts in zip(*evaluation_views(splits.validation, config, size), strict=True)]
        for size in (32, 32, 7)
    )
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[0], smaller[0])
    assert torch.equal(once[1], splits.validation.targets.repeat_interleave(2))


def test_an_alternating_flip_shows_an_example_and_its_mirror_image_as_its_two_views() -> None:
    task, data = task_of("info_nce of views")
    splits, config = split_dataset(data, seed=0), task.train_config({}, augment="alternating_flip")
    draw = torch.Generator().manual_seed(0)
    in_training = next(iter(build_batches(splits.train, config, splits.spec, order=draw, augmentation=draw)))
    in_evaluation = next(evaluation_views(splits.validation, config, 32))
    for inputs, _ in (in_training, in_evaluation):
        assert torch.equal(inputs[::2], inputs[1::2].flip(-1))
        assert not torch.equal(inputs[::2], inputs[1::2])


def test_a_reconstruction_is_in_the_units_of_its_inputs_and_learned_as_well_in_any() -> None:
    task, _ = task_of("mse of inputs")
    small, large = (trained(task, on_a_plane(scale)) for scale in (1.0, 1000.0))
    assert large[1].best_value == pytest.approx(1e6 * small[1].best_value, rel=0.05)
    assert large[1].metrics["val/loss"] == pytest.approx(small[1].metrics["val/loss"], rel=0.05)
    inputs = on_a_plane(1000.0).test.open().inputs
    again = torch.stack(large[0].predict(inputs))
    assert isinstance(inputs, Tensor)
    assert float((again - inputs).std() / inputs.std()) < 0.15


def test_predictions_of_embeddings_have_length_1_and_those_of_shares_are_class_names() -> None:
    task, data = task_of("info_nce")
    model, _ = trained(replace(task, objective=replace(task.objective, settings={"max_epochs": 1})), data)
    found = model.predict(data.test.open().inputs)
    assert torch.stack(found).norm(dim=1).tolist() == pytest.approx([1.0] * len(found))
    task, data = task_of("kl_divergence")
    model, _ = trained(replace(task, objective=replace(task.objective, settings={"max_epochs": 1})), data)
    assert set(model.predict(data.test.open().inputs)) <= set("abc")
    assert model.probabilities(data.test.open().inputs).sum(1).tolist() == pytest.approx([1.0] * 80)


@pytest.mark.parametrize("name", ["info_nce", "info_nce of views"])
def test_two_models_of_embeddings_are_compared_over_examples_that_are_there_once(name: str) -> None:
    task, data = task_of(name)
    splits, config = split_dataset(data, seed=0), task.train_config({})
    model, _ = trained(task, data)
    untrained = build_model(task.objective, splits.spec, {}, seed=1).eval()
    untrained.fit_statistics(splits.train)
    found = compare_models(
        (model, config), (untrained, config), splits.validation, spec=splits.spec, target_scale=1.0, seed=0
    )
    assert 0 < found.low <= found.value <= 1
    assert found.value <= found.high


def test_the_loss_of_embeddings_is_measured_in_batches_of_the_training(tmp_path: Path) -> None:
    task, data = task_of("info_nce")
    splits = split_dataset(data, seed=0)
    model = build_model(task.objective, splits.spec, {}, seed=0)
    _, last = trained(task, data)
    assert last.metrics["val/loss"] < math.log(32) < math.log(len(splits.validation)), "of 31 others, not of 63"
    assert model.spec.num_outputs == 64


OF_ONE_KIND = {name: case for name, case in kinds.CASES.items() if case.data.spec.kind in USUAL and case.loss != "vae"}


@pytest.mark.parametrize("name", OF_ONE_KIND)
def test_a_task_that_leaves_loss_and_metric_to_its_data_trains_with_the_usual_ones(name: str) -> None:
    case = OF_ONE_KIND[name]
    objective = Objective(
        name="usual", description="", load=lambda _: case.data, model=case.model, loss="auto", metric="auto",
        space=LR_SPACE, settings={"max_epochs": 1, "batch_size": 8, "compile": "off"} | case.settings,
    )  # fmt: skip
    task = Task(reference="usual", objective=objective, space=LR_SPACE).suited_to_data(Path())
    config, splits = task.train_config({}), split_dataset(case.data, seed=0)
    assert (config.loss, config.metric) == USUAL[case.data.spec.kind]
    model = build_model(task.objective, splits.spec, case.parameters, seed=0)
    model.fit_statistics(splits.train)
    [epoch] = fit(model, splits, config)
    assert math.isfinite(epoch.metrics[f"val/{config.metric}"])


def test_every_kind_has_a_usual_loss_except_one_with_a_loss_of_its_own() -> None:
    assert {case.data.spec.kind for case in OF_ONE_KIND.values()} == USUAL.keys() == set(KINDS) - {"own"}
