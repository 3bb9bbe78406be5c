"""What a task brings of its own: a loss, metrics and an optimizer, in trainings and in a whole search."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import LR_SPACE
from torch import Tensor, nn
from torch.nn import functional

from hpo import (
    Choice,
    DataSpec,
    Float,
    Group,
    Objective,
    Space,
    Split,
    TrainConfig,
    UsageError,
    hold_out,
    load_best,
    mlp,
    run_search,
    split_dataset,
)
from hpo.checks.checklist import quick_part
from hpo.checks.compatibility import check_task
from hpo.checks.verdicts import Subject
from hpo.config import Direction
from hpo.models.preprocessed import build_model
from hpo.task import Task, check_parameters
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.costs import measure_costs
from hpo.training.trainer import EpochResult, fit

INPUTS = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
DATA = hold_out(INPUTS, (INPUTS[:, 0] > 0).long(), ["low", "high"])


def task_of(space: Space = LR_SPACE, data: Any = DATA, **given: Any) -> Task:
    given = {"name": "mine", "description": "mine", "load": lambda _: data, "model": mlp, "space": space} | given
    settings = {"max_epochs": 3, "patience": 3, "batch_size": 16, "compile": "off"} | given.pop("settings", {})
    return Task(reference="mine", objective=Objective(settings=settings, **given), space=space)  # type: ignore[arg-type]


def trained(task: Task, folder: Path | None = None, epochs: int | None = None) -> tuple[Any, list[EpochResult]]:
    values = task.space.defaults()
    splits = split_dataset(task.objective.load(Path()), seed=0)  # type: ignore[misc]
    check_parameters(task)
    check_task(task, splits)
    model = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0)
    model.fit_statistics(splits.train)
    results: list[EpochResult] = []
    training = fit(model, splits, task.train_config(values), checkpoint=CheckpointFolder(folder) if folder else None)
    for result in training:
        results.append(result)
        if result.epoch == epochs:
            training.close()
    return model, results


def test_a_loss_that_is_a_function_gives_what_the_named_one_gives() -> None:
    _, named = trained(task_of())
    _, own = trained(task_of(loss=functional.cross_entropy))
    assert [result.value for result in own] == [result.value for result in named]
    assert own[-1].metrics["train/loss"] == named[-1].metrics["train/loss"]


class Centres(nn.Module):
    """Cross-entropy of the distance to a centre for each class, which is a parameter of the loss."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(2, 2))
        self.scale = scale

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(-self.scale * torch.cdist(outputs, self.centres).square(), targets)


def test_the_parameters_of_a_loss_are_trained_and_survive_an_interruption(tmp_path: Path) -> None:
    task = task_of(loss=Centres, metric="loss")
    whole, results = trained(task)
    begun, _ = trained(task, tmp_path, epochs=1)
    continued, later = trained(task, tmp_path)
    assert results[-1].value < results[0].value
    assert [result.value for result in later] == [result.value for result in results]
    fresh = build_model(task.objective, DataSpec((6,), ("low", "high")), {}, seed=0)
    assert not torch.equal(whole.own_loss.centres, fresh.own_loss.centres)  # type: ignore[arg-type]
    assert torch.equal(whole.own_loss.centres, continued.own_loss.centres)
    assert begun.own_loss is not continued.own_loss


def test_an_instance_of_a_loss_is_copied_for_each_trial() -> None:
    loss = Centres()
    before = loss.centres.detach().clone()
    first, _ = trained(task_of(loss=loss, metric="loss"))
    second, _ = trained(task_of(loss=loss, metric="loss"))
    assert torch.equal(loss.centres, before)
    assert torch.equal(first.own_loss.centres, second.own_loss.centres)


def test_the_parameters_of_a_loss_are_no_cost_of_the_model() -> None:
    plain, _ = trained(task_of())
    with_loss, _ = trained(task_of(loss=Centres, metric="loss"))
    costs = [measure_costs(model, torch.zeros(1, 6), ["params"])["params"] for model in (plain, with_loss)]
    assert costs[0] == costs[1] > 0


def margin_loss(outputs: Tensor, targets: Tensor, *, margin: float = 0.0) -> Tensor:
    return functional.multi_margin_loss(outputs, targets, margin=margin)


@pytest.mark.parametrize(("loss", "keyword"), [(margin_loss, "margin"), (Centres, "scale")])
def test_keywords_of_a_loss_are_searched_like_those_of_the_model(loss: Any, keyword: str) -> None:
    def space(default: float) -> Space:
        return Space(Group("loss", **{keyword: Float(0.5, 2.0, default=default), "width": Choice(8, 16, default=8)}))  # type: ignore[arg-type]

    values = [trained(task_of(space(default), loss=loss, metric="loss"))[1][0].value for default in (0.5, 2.0)]
    assert values[0] != values[1]


@dataclasses.dataclass
class Answer:
    image: Tensor
    means: Tensor


class Autoencoder(nn.Module):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(spec.input_shape[0], 4), nn.Linear(4, spec.input_shape[0])

    def forward(self, inputs: Tensor) -> Answer:
        means = self.encode(inputs)
        return Answer(self.decode(means), means)


def reconstruction(outputs: Answer, inputs: Tensor) -> Tensor:
    return (outputs.image - inputs).square().mean() + 1e-3 * outputs.means.square().mean()


def test_without_targets_the_loss_gets_the_inputs_and_outputs_of_any_structure() -> None:
    data = hold_out(INPUTS, None)
    task = task_of(data=data, model=Autoencoder, loss=reconstruction, metric="loss", settings={"max_epochs": 8})
    _, results = trained(task)
    assert results[-1].value < 0.7 * results[0].value
    verdicts = quick_part(Subject.of(task, split_dataset(data, seed=0), "cpu"))
    assert {verdict.state for verdict in verdicts} == {"ok"}


class Regret:
    """No torchmetrics class, and it does not say whether more is better."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.seen.append(outputs.softmax(1).gather(1, targets[:, None]))

    def compute(self) -> float:
        return 1 - torch.cat(self.seen).mean().item()


def calibration() -> Any:
    import torchmetrics

    return torchmetrics.CalibrationError("multiclass", num_classes=2)


def test_metrics_of_a_task_are_measured_beside_the_named_ones_and_may_decide() -> None:
    task = task_of(metrics={"regret": Regret, "calibration": calibration}, metric="regret", direction="minimize")
    _, results = trained(task)
    last = results[-1].metrics
    assert last["val/regret"] == results[-1].value
    assert {"val/accuracy", "val/calibration"} <= last.keys()
    assert "train/regret" not in last
    assert results[-1].best_value == min(result.value for result in results)


def test_a_metric_says_itself_whether_more_is_better_or_the_task_does() -> None:
    given = {"metrics": {"regret": Regret, "calibration": calibration}}
    assert task_of(**given, metric="calibration").objective.better is Direction.MINIMIZE  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='must say whether a larger or a smaller regret is better: direction="max'):
        assert task_of(**given, metric="regret").objective.better  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="it is known for accuracy: omit it"):
        task_of(**given, metric="accuracy", direction="minimize")  # type: ignore[arg-type]


def rprop(groups: Any, config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.Rprop(groups, lr=config.lr)


def test_an_optimizer_of_the_task_is_its_default_and_stands_beside_the_named_ones() -> None:
    task = task_of(optimizer=rprop)
    assert task.train_config({}).optimizer == "own"
    assert task.train_config({"optimizer": "sgd"}).optimizer == "sgd"
    of_names = trained(task_of())[1][0].value, trained(task_of(settings={"optimizer": "sgd"}))[1][0].value
    assert trained(task)[1][0].metrics["train/loss"] not in of_names


def test_a_search_with_a_loss_a_metric_and_an_optimizer_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    outcome = run_search(
        str(tmp_path / "own_task.py"), trials=3, home=tmp_path / "home", workers=1, epochs=2, strategy="random"
    )
    assert outcome.winner is not None
    assert outcome.winner.metric == "distance"
    assert "margin" in outcome.winner.configuration
    assert outcome.winner.test is not None
    assert outcome.winner.test["distance"] > 0
    model = load_best("own_task", home=tmp_path / "home")
    assert model(torch.zeros(2, 6)).shape == (2, 3)


OWN_TASK = """
import torch
from torch import nn
from hpo import Float, Group, Objective, Space, hold_out

inputs = torch.randn(120, 6, generator=torch.Generator().manual_seed(0))

class Distance:
    higher_is_better = False
    def __init__(self): self.all = []
    def update(self, outputs, targets): self.all.append((outputs - targets).norm(dim=1))
    def compute(self): return torch.cat(self.all).mean()

def loss(outputs, targets, *, margin=0.1):
    return ((outputs - targets).norm(dim=1) - margin).clamp(min=0).mean()

objective = Objective(
    name="own_task", description="own", load=lambda folder: hold_out(inputs, inputs[:, :3].clone(), kind="own"),
    model=lambda spec: nn.Linear(6, 3), loss=loss, metrics={"distance": Distance}, metric="distance",
    optimizer=lambda groups, config: torch.optim.Rprop(groups, lr=config.lr),
    space=Space(Group("loss", margin=Float(0.0, 0.5, default=0.1), lr=Float(1e-4, 1e-1, log=True, default=1e-2))),
    settings={"batch_size": 16},
)
"""


def test_splits_without_targets_are_as_long_as_their_inputs() -> None:
    assert len(Split(INPUTS, None)) == 200
