"""Several targets at once: each has its kind, loss and metrics, and weights say how much each counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpo import Choice, Dataset, DataSpec, Float, Group, HpoError, Objective, Space, hold_out, run_search, split_dataset
from hpo.checks.checklist import whole_list
from hpo.checks.compatibility import check_task
from hpo.checks.verdicts import Subject
from hpo.data.datasets import load_splits, save_splits
from hpo.deploy.load import load_best
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.models.weighing import Weighing
from hpo.objective import Own
from hpo.plots.checks import plot_checklist
from hpo.plugins import OBJECT
from hpo.task import Task, check_parameters, check_ranges, load_dataset
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.losses import loss_function, target_scale
from hpo.training.trainer import EpochResult, fit

NUM = 300
LOSSES = {"price": "mse", "kind": "cross_entropy", "tags": "binary_cross_entropy"}
SPACE = Space(
    Group("step size", lr=Float(1e-4, 1e-1, log=True, default=1e-2)),
    Group(
        "targets",
        weighting=Choice("fixed", "uncertainty", default="fixed"),
        weight_price=Float(0.0, 10.0, default=1.0),
    ),
)


def made(scale: float = 1000.0) -> Dataset:
    inputs = torch.randn(NUM, 6, generator=torch.Generator().manual_seed(0))
    targets = {
        "price": scale * (inputs[:, 0] - inputs[:, 1]) + 5 * scale,
        "kind": inputs[:, 2:5].argmax(1),
        "tags": inputs[:, 3:5] > 0,
    }
    return hold_out(inputs, targets, {"kind": ["a", "b", "c"], "tags": ["x", "y"]})


class Heads(nn.Module):
    def __init__(self, spec: DataSpec, *, width: int = 32) -> None:
        super().__init__()
        (features,) = spec.input_shape
        self.hidden = nn.Sequential(nn.Linear(features, width), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(width, spec.of(name).num_outputs) for name in spec.targets})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        hidden = self.hidden(inputs)
        return {name: head(hidden) for name, head in self.heads.items()}


def objective_of(**changes: Any) -> Objective:
    given: dict[str, Any] = {
        "name": "made", "description": "made", "load": lambda _: made(), "model": Heads, "loss": LOSSES,
        "metric": "price/r2", "space": SPACE,
        "settings": {"max_epochs": 15, "patience": 15, "batch_size": 16, "compile": "off"},
    }  # fmt: skip
    return Objective(**given | changes)


def task_of(**changes: Any) -> Task:
    objective = objective_of(**changes)
    return Task(reference=OBJECT, objective=objective, space=objective.space or SPACE)


def trained(task: Task, data: Dataset, **parameters: Any) -> tuple[PreprocessedModel, EpochResult]:
    splits = split_dataset(data, seed=0)
    check_task(task, splits)
    model = build_model(task.objective, splits.spec, parameters, seed=0)
    model.fit_statistics(splits.train)
    *_, last = fit(model, splits, task.train_config({"lr": 1e-2}))
    return model, last


@pytest.mark.parametrize("weighting", ["fixed", "uncertainty"])
def test_each_target_is_learned_and_measured(weighting: str) -> None:
    _, last = trained(task_of(), made(), weighting=weighting)
    assert last.metrics["val/price/r2"] > 0.95
    assert last.metrics["val/kind/accuracy"] > 0.85
    assert last.metrics["val/tags/f1"] > 0.85
    assert last.metrics["val/kind/auroc"] > 0.9
    assert last.value == last.metrics["val/price/r2"]
    assert not [name for name in last.metrics if name in ("val/r2", "val/accuracy")]


def test_a_prediction_has_each_target_in_its_own_terms() -> None:
    model, _ = trained(task_of(), made())
    test = made().test.open()
    answers = model.predict(test.inputs)
    assert answers[0].keys() == LOSSES.keys()
    wanted: Any = test.targets
    right = ["abc"[row] == each["kind"] for row, each in zip(wanted["kind"], answers, strict=True)]
    assert sum(right) > 0.8 * len(answers)
    prices = torch.tensor([each["price"] for each in answers])
    assert ((prices - wanted["price"]).abs() / 1000).mean() < 0.4
    assert {label for each in answers for label in each["tags"]} <= {"x", "y"}


def test_numbers_are_learned_in_their_own_units_beside_classes() -> None:
    small, large = (trained(task_of(), made(scale))[1] for scale in (0.001, 1000.0))
    assert large.metrics["val/loss"] == pytest.approx(small.metrics["val/loss"], rel=1e-3)
    assert large.metrics["watch/gradient_first"] == pytest.approx(small.metrics["watch/gradient_first"], rel=1e-2)


def test_a_weight_of_0_leaves_a_target_unlearned() -> None:
    _, last = trained(task_of(), made(), weight_price=0.0)
    assert last.metrics["val/price/r2"] < 0.5
    assert last.metrics["val/kind/accuracy"] > 0.85


def test_the_loss_is_the_weighed_sum_of_each_targets_own() -> None:
    splits = split_dataset(made(), seed=0)
    task = task_of()
    config, own = task.train_config({}), task.objective.own({"weight_price": 3.0, "weight_kind": 0.5})
    model = build_model(task.objective, splits.spec, {}, seed=0)
    model.fit_statistics(splits.train)
    inputs, targets = splits.train.batch(slice(0, 20))
    outputs = model(inputs)
    scale: Any = target_scale(splits.train, splits.spec)
    price = ((outputs["price"] - targets["price"]) / scale["price"]).square().mean()
    kind = nn.functional.cross_entropy(outputs["kind"], targets["kind"])
    tags = nn.functional.binary_cross_entropy_with_logits(outputs["tags"], targets["tags"].float())
    total = loss_function(config, splits.spec, scale, own)(outputs, targets)
    assert total.item() == pytest.approx((3 * price + 0.5 * kind + tags).item(), rel=1e-5)


def test_uncertainty_settles_where_each_variance_is_twice_its_loss() -> None:
    weigh = Weighing(Own(losses={"one": "mse", "other": "mse"}, weighting="uncertainty"))
    losses = {"one": torch.tensor(0.02), "other": torch.tensor(3.0)}
    optimizer = torch.optim.Adam(weigh.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        weigh(losses).backward()
        optimizer.step()
    assert weigh.log_variances is not None
    assert weigh.log_variances.exp().tolist() == pytest.approx([0.04, 6.0], rel=1e-2)


def test_learned_weights_are_saved_and_a_training_is_continued_bit_by_bit(tmp_path: Path) -> None:
    task, splits = task_of(), split_dataset(made(), seed=0)
    config = task.train_config({"lr": 1e-2}, max_epochs=4)

    def run(stop: int | None = None, folder: CheckpointFolder | None = None) -> dict[str, Tensor]:
        model = build_model(task.objective, splits.spec, {"weighting": "uncertainty"}, seed=0)
        model.fit_statistics(splits.train)
        for result in fit(model, splits, config, checkpoint=folder):
            if result.epoch == stop:
                break
        return model.state_dict()

    expected = run()
    folder = CheckpointFolder(tmp_path)
    run(2, folder)
    resumed = run(folder=folder)
    assert expected["weighing.log_variances"].abs().sum() > 0.1
    assert {name: tensor.tolist() for name, tensor in resumed.items()} == {
        name: tensor.tolist() for name, tensor in expected.items()
    }


def test_the_description_of_the_data_survives_the_file_of_the_splits(tmp_path: Path) -> None:
    splits = split_dataset(made(), seed=0)
    save_splits(splits, tmp_path / "splits.pt")
    assert load_splits(tmp_path / "splits.pt").spec == splits.spec
    assert splits.spec.of("kind").num_outputs == 3


def test_the_checklist_finds_nothing_wrong() -> None:
    data = made()
    verdicts = list(whole_list(Subject.of(task_of(), split_dataset(data, seed=0), "cpu"), data.test))
    assert plot_checklist("made", {verdict.check: verdict.data for verdict in verdicts}).axes
    assert [f"{v.check}: {v.text}: {v.advice}" for v in verdicts if v.state == "wrong"] == []


def test_a_search_tunes_the_weights_and_its_winner_is_tested_and_loaded(home: Path) -> None:
    objective = objective_of(settings={"max_epochs": 2, "batch_size": 16, "compile": "off"})
    outcome = run_search(objective, trials=2, home=home)
    assert outcome.winner is not None
    assert "weight_price" in outcome.winner.configuration
    assert set(outcome.winner.test or {}) >= {"price/r2", "kind/accuracy", "tags/f1"}
    model = load_best("made", task=objective, home=home)
    assert model.predict(made().test.open().inputs)[0].keys() == LOSSES.keys()


def prepared(**changes: Any) -> None:
    task = task_of(**changes)
    check_parameters(task)
    check_ranges(task)
    check_task(task, split_dataset(load_dataset(task, Path()), seed=0))


def data_with(**changes: Any) -> Any:
    data = made()
    targets: Any = data.train.targets

    def load(_: Path) -> Dataset:
        return hold_out(
            data.train.inputs, targets | changes.get("targets", {}),
            changes.get("classes", {"kind": ["a", "b", "c"], "tags": ["x", "y"]}), kind=changes.get("kind"),
        )  # fmt: skip

    return load


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a loss for a target that is not there": (
        {"loss": {**LOSSES, "size": "mse"}},
        "losses for the targets price, kind, tags, size, but the data have price, kind, tags",
    ),
    "a target without a loss": (
        {"loss": {"price": "mse", "kind": "cross_entropy"}},
        "losses for the targets price, kind, but the data have price, kind, tags",
    ),
    "a loss that does not fit its target": (
        {"loss": LOSSES | {"kind": "mse"}},
        "the target kind: loss 'mse' does not fit data with 3 classes",
    ),
    "an unknown loss": ({"loss": LOSSES | {"kind": "cross_entropi"}}, "did you mean 'cross_entropy'"),
    "a name that no parameter can have": (
        {"loss": {"the price": "mse"}, "metric": "loss"},
        "must have a name of",
    ),
    "a metric without its target": ({"metric": "r2"}, "no metric 'r2'"),
    "a metric of another kind": ({"metric": "price/accuracy"}, "no several metric 'price/accuracy'"),
    "one loss for several targets": (
        {"loss": "mse", "metric": "loss", "space": Space(SPACE.groups[0])},
        "loss 'mse' does not fit data with targets of the kind several; give the Objective a mapping",
    ),
    "losses by name for one target": (
        {"load": lambda _: hold_out(torch.randn(90, 3), torch.arange(90) % 2, ["a", "b"]), "metric": "loss"},
        "but the data have no targets with names and kinds",
    ),
    "classes for a target that is not there": (
        {"load": data_with(classes={"sort": ["a", "b", "c"]})},
        "classes names the target 'sort'; the targets are price, kind, tags",
    ),
    "classes of which one has no name": (
        {"load": data_with(classes={"kind": ["a", "b"], "tags": ["x", "y"]})},
        "the target kind: the targets are from 0 to 2; 2 classes have the indices from 0",
    ),
    "a kind that does not go with others": (
        {"load": data_with(kind={"price": "own"})},
        "the target price is of the kind own, which cannot be combined with others",
    ),
    "a list of classes for several targets": (
        {"load": data_with(classes=["a", "b", "c"], kind={"price": "regression"})},
        r"the targets are several \(price, kind, tags\), so classes must be a mapping",
    ),
    "a model that returns a tensor": (
        {"model": lambda spec: nn.Linear(6, 3)},
        "fails with|it must return a mapping of price, kind, tags",
    ),
    "outputs that do not fit their target": (
        {"model": lambda spec: Wide(spec)},
        r"the target kind: the model of task 'made' returns outputs of shape \(2, 4\) for 2 examples, not \(2, 3\)",
    ),
    "an unknown weighting": (
        {"space": Space(Group("targets", weighting=Choice("learned", "fixed", default="learned")))},
        "no weighting 'learned'",
    ),
    "a weight of nothing": (
        {"space": Space(Group("targets", weight_prise=Float(0.0, 1.0, default=0.5)))},
        "did you mean 'weight_price'",
    ),
    "a weight below 0": (
        {"space": Space(Group("targets", weight_price=Float(-1.0, 1.0, default=-0.5)))},
        "weight_price=-0.5 is not allowed: it must be at least 0",
    ),
    "balanced classes": (
        {"settings": {"batch_size": 8, "class_weights": "balanced"}},
        "class_weights='balanced' is",
    ),
    "mixing": ({"settings": {"batch_size": 8, "mixup": 0.2}}, "do not work with targets of the kind several"),
    "a curriculum by losses": ({"settings": {"batch_size": 8, "curriculum": "loss"}}, "curriculum='loss' needs a loss"),
}


class Wide(Heads):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__(spec)
        self.heads["kind"] = nn.Linear(32, 4)


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_in_one_line_before_the_first_trial(name: str) -> None:
    changes, message = WRONG[name]
    with pytest.raises(HpoError, match=message) as raised:
        prepared(**changes)
    assert "\n" not in str(raised.value)
