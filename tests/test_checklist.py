"""The checklist: each check passes a sound task, and tells what is really broken."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from torch import Tensor, nn
from torch.nn import functional

from hpo.checks.checklist import quick_part
from hpo.checks.compatibility import check_task
from hpo.checks.data import check_duplicates, check_inputs, check_leak, check_normalised, check_targets
from hpo.checks.learning import check_baseline, check_learning_rate, check_one_batch
from hpo.checks.network import check_first_loss, check_forward, check_gradients
from hpo.checks.speed import check_speed
from hpo.checks.verdicts import Subject, in_few_lines
from hpo.cli import main
from hpo.data.datasets import Splits, hold_out, split_dataset
from hpo.data.examples import Dataset, DataSpec, SealedSplit, Split
from hpo.errors import UsageError
from hpo.execution.observer import Observer
from hpo.models.layers import initialize_output
from hpo.models.mlp import MLP
from hpo.objective import Objective
from hpo.parameters import Choice, Float
from hpo.session.search import run_search
from hpo.space import Group, Space
from hpo.task import Task
from hpo.tracking.store import open_store

CLASSES = ("a", "b", "c", "d")
SPACE = Space(
    Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), batch_size=Choice(20, 40, default=20)),
)


def points(number: int = 300, *, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> Split:
    """Points whose class is the largest of their first coordinates, or whose value is a sum of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 3 + 2 * torch.randn(number, 8, generator=generator)
    targets = inputs[:, : len(classes)].argmax(1) if classes else 50 + 10 * inputs[:, :3].sum(1)
    return Split(inputs, targets)


def mlp(spec: DataSpec, **parameters: Any) -> nn.Module:
    return MLP(spec, **{"depth": 1, "width": 32, **parameters})


def subject(
    model: Callable[..., nn.Module] = mlp,
    *,
    train: Split | None = None,
    validation: Split | None = None,
    classes: tuple[str, ...] = CLASSES,
    metric: str | None = None,
    space: Space = SPACE,
    **settings: Any,
) -> Subject:
    train = train or points(classes=classes)
    validation = validation or points(200, seed=1, classes=classes)
    of_kind: dict[str, Any] = (
        {"loss": "cross_entropy", "metric": "accuracy"} if classes else {"loss": "mse", "metric": "r2"}
    )
    objective = Objective(
        name="points",
        description="",
        load=lambda data_dir: Dataset(train, SealedSplit(lambda: train, 1), classes),
        model=model,
        **of_kind | ({"metric": metric} if metric else {}),
        settings={"max_epochs": 15, "optimizer": "adam", **settings},
    )
    splits = Splits(train, validation, DataSpec(tuple(train.inputs.shape[1:]), classes))
    return Subject.of(Task(reference="points", objective=objective, space=space), splits, "cpu")


def images(number: int = 100, high: int = 256) -> Split:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, high, (number, 1, 4, 4), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.arange(number) % 4)


def changed(split: Split, change: Callable[[Tensor, Tensor], Any]) -> Split:
    inputs, targets = split.inputs.clone(), split.targets.clone()
    change(inputs, targets)
    return Split(inputs, targets)


# --- a sound task -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [CLASSES, ()], ids=["classes", "regression"])
def test_a_sound_task_passes_every_check(classes: tuple[str, ...]) -> None:
    sound = subject(classes=classes)
    checks = [check_duplicates, check_one_batch, check_baseline, check_learning_rate, check_speed]
    verdicts = [*quick_part(sound), *(check(sound) for check in checks)]
    assert [verdict.text for verdict in verdicts if verdict.state != "ok"] == []


def test_a_quick_part_without_complaint_is_one_line_and_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    verdicts = quick_part(subject())
    assert torch.equal(torch.get_rng_state(), state)
    assert in_few_lines(verdicts, "points") == [
        "checked: inputs, targets, normalisation, forward pass, first loss, gradients (more: hpo check points)"
    ]


# --- data -------------------------------------------------------------------------------------------------------------


def one_and_the_same(inputs: Tensor, targets: Tensor) -> None:
    inputs[:] = inputs[0].clone()


def a_feature_that_never_varies(inputs: Tensor, targets: Tensor) -> None:
    inputs[:, 3] = 7.0


def a_value_far_out(inputs: Tensor, targets: Tensor) -> None:
    inputs[5, 2] = 1e4


@pytest.mark.parametrize(
    ("train", "state", "advice"),
    [
        (changed(points(), one_and_the_same), "wrong", "all examples are the same"),
        (changed(points(), a_feature_that_never_varies), "warning", r"1 of 8 features never vary \(3\)"),
        (images(high=2), "warning", "pixels from 0 to 255"),
        (images(), "ok", ""),
    ],
)
def test_inputs_that_cannot_be_right_are_reported(train: Split, state: str, advice: str) -> None:
    verdict = check_inputs(subject(train=train))
    assert verdict.state == state
    assert re.search(advice, verdict.advice)


def rare(inputs: Tensor, targets: Tensor) -> None:
    targets[:] = 0
    targets[:45] = torch.arange(45) % 3 + 1


def test_rare_classes_are_reported_unless_they_are_dealt_with() -> None:
    train = changed(points(), rare)
    verdict = check_targets(subject(train=train))
    assert verdict.state == "warning"
    assert "'b' is 17.0 times as rare as 'a'" in verdict.advice
    assert verdict.data["counts"] == [255, 15, 15, 15]
    assert check_targets(subject(train=train, metric="f1", class_weights="balanced")).state == "ok"
    assert check_targets(subject(train=train, class_weights="balanced")).state == "warning", "accuracy misleads still"


def test_targets_of_a_regression_that_cannot_be_learned_are_reported() -> None:
    train = points(classes=())
    assert check_targets(subject(classes=(), train=Split(train.inputs, torch.ones(300)))).state == "wrong"
    far = changed(train, lambda inputs, targets: targets[0].fill_(1e6))
    assert "loss=huber" in check_targets(subject(classes=(), train=far)).advice


def test_what_the_network_gets_to_see_is_reported() -> None:
    assert check_normalised(subject()).data["mean"] == pytest.approx(0, abs=1e-3)
    assert (
        "feature 2 has values far from all others"
        in check_normalised(subject(train=changed(points(1000), a_value_far_out))).advice
    )
    other = Split(points().inputs + 3, points().targets)  # type: ignore[arg-type]
    assert "look different from the training" in check_normalised(subject(validation=other)).advice


def test_repeated_examples_are_counted_and_contradictory_labels_are_reported() -> None:
    train = points()
    twice = changed(train, lambda inputs, targets: inputs[:30].copy_(inputs[30:60]))
    verdict = check_duplicates(subject(train=twice))
    contradictory = int((train.targets[:30] != train.targets[30:60]).sum())
    assert verdict.data == {"in_training": 30, "in_validation": 0, "contradictory": contradictory}
    assert f"{contradictory} of them have different classes" in verdict.advice
    assert (
        "memorised examples count"
        in check_duplicates(subject(validation=Split(train.inputs[:9], train.targets[:9]))).advice
    )


def leak_of(train: Split, test: Split) -> tuple[str, int]:
    sealed = SealedSplit(lambda: test, len(test))
    verdict = check_leak(subject(train=train), sealed)
    assert sealed.times_opened == 0
    assert verdict.data.keys() == {"in_test", "test_examples"}, "a count, and nothing of the examples"
    return verdict.state, verdict.data["in_test"]


def test_training_examples_in_the_test_split_are_counted_without_opening_it() -> None:
    train, test = points(), points(200, seed=2)
    assert leak_of(train, test) == ("ok", 0)
    assert leak_of(train, changed(test, lambda inputs, _: inputs[:1].copy_(train.inputs[:1]))) == ("warning", 1)  # type: ignore[arg-type]
    assert leak_of(train, changed(test, lambda inputs, _: inputs[:50].copy_(train.inputs[:50]))) == ("wrong", 50)  # type: ignore[arg-type]


def test_coarse_features_repeat_by_themselves_but_images_do_not() -> None:
    coarse, new = (Split(points(seed=seed).inputs.sign(), points(seed=seed).targets) for seed in (0, 1))
    assert leak_of(coarse, new)[0] == "warning"
    twice = Split(images().inputs[:50].repeat(2, 1, 1, 1), images().targets)
    assert leak_of(twice, images()) == ("wrong", 50)


# --- the network ------------------------------------------------------------------------------------------------------


class Changed(nn.Module):
    """A network whose outputs are changed."""

    def __init__(self, spec: DataSpec, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.change = mlp(spec), change

    def forward(self, inputs: Tensor) -> Tensor:
        return self.change(self.net(inputs))


def with_outputs(change: Callable[[Tensor], Tensor]) -> Callable[..., nn.Module]:
    return lambda spec: Changed(spec, change)


def frozen(spec: DataSpec) -> nn.Module:
    return mlp(spec).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (with_outputs(lambda outputs: outputs / 0), "not finite before any training"),
        (with_outputs(lambda outputs: outputs.flip(0)), "changes with the others in its batch"),
        (with_outputs(lambda outputs: outputs - outputs.mean(0)), "changes with the others in its batch"),
        (frozen, "no parameter is trained"),
    ],
)
def test_a_forward_pass_that_is_wrong_is_reported(model: Callable[..., nn.Module], advice: str) -> None:
    verdict = check_forward(subject(model))
    assert verdict.state == "wrong"
    assert advice in verdict.advice


def test_batch_norms_do_not_count_as_mixing_examples() -> None:
    assert check_forward(subject(lambda spec: mlp(spec, norm="batch"))).state == "ok"


def scaled_output(factor: float) -> Callable[..., nn.Module]:
    def model(spec: DataSpec) -> nn.Module:
        net = MLP(spec, depth=2, width=32)
        nn.init.normal_(net.output.weight, std=factor)
        return net

    return model


@pytest.mark.parametrize("classes", [CLASSES, ()], ids=["classes", "regression"])
@pytest.mark.parametrize(("factor", "state"), [(0.01, "ok"), (10.0, "wrong")])
def test_an_initialisation_with_large_outputs_is_reported(classes: tuple[str, ...], factor: float, state: str) -> None:
    verdict = check_first_loss(subject(scaled_output(factor), classes=classes))
    assert verdict.state == state
    assert verdict.data["expected_loss"] == pytest.approx(torch.tensor(4.0).log().item() if classes else 1.0, rel=0.3)


def test_a_network_that_knows_the_answer_before_training_is_reported() -> None:
    verdict = check_first_loss(subject(with_outputs(lambda outputs: outputs)))
    assert verdict.state == "ok"

    class Reads(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 10 * inputs[:, :4] + 0 * super().forward(inputs)

    assert "knows something before training" in check_first_loss(subject(lambda spec: Reads(8, 4))).advice


@pytest.mark.parametrize(("loss", "text"), [("cross_entropy", "ln(4) is 1.386"), ("focal", "equal chances have 0.780")])
def test_the_first_loss_is_compared_with_that_of_equal_chances_under_the_same_loss(loss: str, text: str) -> None:
    verdict = check_first_loss(subject(loss=loss, label_smoothing=0.1))
    assert verdict.state == "ok"
    assert text in verdict.text


class Cut(nn.Module):
    """A network with a layer that gets no gradient."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(3, 3)
        self.output = nn.Linear(16, spec.num_outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.second(self.first(inputs).relu().detach()).relu())


def test_layers_that_no_gradient_reaches_are_named() -> None:
    verdict = check_gradients(subject(Cut))
    assert verdict.state == "wrong"
    assert verdict.text == "they do not reach first.weight, unused.weight"


def test_a_network_without_a_parameter_to_train_is_reported() -> None:
    verdict = check_gradients(subject(lambda spec: Cut(spec).requires_grad_(False)))
    assert (verdict.state, verdict.text) == ("wrong", "no parameter of the model can be trained")


def test_layers_that_are_frozen_or_begin_at_0_are_no_fault() -> None:
    def model(spec: DataSpec) -> nn.Module:
        net = MLP(spec, depth=2, width=16)
        net.hidden[0].requires_grad_(False)
        nn.init.zeros_(net.output.weight)
        return net

    verdict = check_gradients(subject(model))
    assert len(verdict.data["gradients"]) == 2
    assert verdict.data["unreached"] == []


def test_gradients_that_vanish_or_explode_are_reported() -> None:
    def sigmoids(spec: DataSpec) -> nn.Module:
        hidden = [layer for _ in range(10) for layer in (nn.Linear(8, 8), nn.Sigmoid())]
        return nn.Sequential(*hidden, nn.Linear(8, 4))

    def large(spec: DataSpec) -> nn.Module:
        net = MLP(spec, depth=10, width=32)
        for layer in net.hidden:
            nn.init.normal_(layer[0].weight, std=1.0)
        initialize_output(net.output)
        return net

    assert "vanish up to layer" in check_gradients(subject(sigmoids)).text
    assert "explode" in check_gradients(subject(large)).text
    assert {check_gradients(subject(model)).state for model in (sigmoids, large)} == {"warning"}


# --- a short training -------------------------------------------------------------------------------------------------


def test_a_network_that_cannot_learn_a_batch_by_heart_is_reported() -> None:
    blind = subject(lambda spec: nn.Sequential(nn.Linear(8, 1), nn.Hardtanh(0, 1e-9), nn.Linear(1, 4)))
    assert check_one_batch(blind).state == "wrong"
    assert check_one_batch(subject(classes=(), train=changed(points(classes=()), one_and_the_same))).state == "wrong"
    verdict = check_one_batch(subject(lambda spec: mlp(spec, dropout=0.9, norm="batch")))
    assert verdict.state == "ok"
    assert "on 32 examples" in verdict.text


def shuffled(split: Split) -> Split:
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(3))
    return Split(split.inputs, split.targets[order])


@pytest.mark.parametrize("classes", [CLASSES, ()], ids=["classes", "regression"])
def test_labels_that_have_nothing_to_do_with_the_inputs_do_not_beat_the_baseline(classes: tuple[str, ...]) -> None:
    train, validation = (shuffled(points(200, seed=seed, classes=classes)) for seed in (0, 1))
    verdict = check_baseline(subject(train=train, validation=validation, classes=classes))
    assert verdict.state == "wrong"
    assert "are the labels right" in verdict.advice


def test_a_network_that_is_worse_than_a_linear_model_is_reported() -> None:
    narrow = subject(lambda spec: nn.Sequential(nn.Linear(8, 1), nn.Tanh(), nn.Linear(1, 4)))
    verdict = check_baseline(narrow)
    assert verdict.data["naive"] < verdict.data["network"] < verdict.data["linear"]
    assert verdict.state == "warning"


def test_a_training_that_had_no_time_is_not_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpo.checks.learning.TRAINING_S", 1e-9)
    train, validation = (shuffled(points(200, seed=seed)) for seed in (0, 1))
    verdict = check_baseline(subject(train=train, validation=validation))
    assert verdict.state == "warning"
    assert verdict.advice.startswith("only 1 steps fit into the time limit, too few to tell")


def test_rare_classes_are_compared_by_the_metric_of_the_task() -> None:
    verdict = check_baseline(subject(metric="f1"))
    assert verdict.data["metric"] == "f1"
    assert verdict.data["naive"] < 0.15, "the commonest of four classes"


def test_the_range_test_proposes_a_window_in_which_training_goes_well() -> None:
    verdict = check_learning_rate(subject())
    low, high = verdict.data["low"], verdict.data["high"]
    assert 1e-4 <= low < 1e-2 < high <= 1.0
    assert f"-p lr={low:g}:{high:g}" in verdict.text
    SPACE.narrow([f"lr={low:g}:{high:g}"])


@pytest.mark.parametrize(("lr", "word"), [(1e-6, "small"), (1e3, "large")])
def test_a_default_rate_outside_the_window_is_reported(lr: float, word: str) -> None:
    verdict = check_learning_rate(subject(space=Space(Group("g", lr=Float(1e-6, 1e3, log=True, default=lr)))))
    assert verdict.state == "warning"
    assert f"the default is too {word}" in verdict.advice


def test_a_loss_that_falls_at_no_rate_or_is_not_finite_is_reported() -> None:
    nothing_to_see = Split(torch.zeros(200, 8), points(200).targets)
    assert "no learning rate lowers the loss" in check_learning_rate(subject(train=nothing_to_see)).advice
    broken = check_learning_rate(subject(with_outputs(lambda outputs: outputs / 0)))
    assert (broken.state, broken.text) == ("wrong", "the loss is not finite")


def judged_otherwise(given: Subject, **of_objective: Any) -> Subject:
    task = replace(given.task, objective=replace(given.task.objective, **of_objective))
    return Subject.of(task, given.splits, "cpu")


def test_the_range_test_knows_a_loss_that_is_below_zero() -> None:
    def likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs, targets) - 5

    above, below = (check_learning_rate(each) for each in (subject(), judged_otherwise(subject(), loss=likelihood)))
    assert below.state == above.state == "ok"
    assert len(below.data["rates"]) > 50
    assert below.data["high"] == pytest.approx(above.data["high"], rel=0.5)


def of_kind(kind: str, split: Split, model: Callable[[DataSpec], nn.Module], **settings: Any) -> Subject:
    data = hold_out(split.inputs, split.targets, CLASSES[:2] if kind == "tagging" else (), kind=kind)
    settings = {"max_epochs": 20, "optimizer": "adam", "lr": 0.1, "batch_size": 20, **settings}
    loss, metric = ("triplet", "recall_at_1") if kind == "embedding" else ("cross_entropy", "accuracy")
    judged: dict[str, Any] = {"loss": loss, "metric": metric, "settings": settings}
    objective = Objective(name=kind, description="", load=lambda data_dir: data, model=model, **judged)
    return Subject.of(Task(reference=kind, objective=objective, space=Space()), split_dataset(data, seed=0), "cpu")


def test_an_embedding_of_many_small_groups_is_learned_by_heart_in_pairs() -> None:
    pairs = Split(torch.randn(800, 8), torch.arange(800) // 2)
    small, large = (of_kind("embedding", pairs, mlp, batch_size=size) for size in (20, 200))
    assert check_one_batch(small).state == "ok"
    assert check_targets(small).state == "warning"
    assert "pairs of them in a batch of 20" in check_targets(small).text
    assert check_targets(large).state == "ok"


def test_a_baseline_of_tags_counts_the_labels_and_not_the_sequences() -> None:
    inputs = torch.randn(60, 100, 2)
    often_right = torch.where(torch.rand(60, 100) < 0.4, inputs[..., 0] > 0, torch.rand(60, 100) < 0.5).long()
    verdict = check_baseline(of_kind("tagging", Split(inputs, often_right), lambda spec: nn.Linear(2, 2)))
    assert verdict.state == "ok", verdict.text
    assert 0.6 < verdict.data["network"] < 0.75


def test_a_validation_split_of_one_class_is_refused_for_auroc() -> None:
    one_class = Split(points(30).inputs, torch.zeros(30, dtype=torch.long))
    given = subject(validation=one_class, metric="auroc")
    with pytest.raises(UsageError, match="all 30 validation examples are of the class 'a', so there is no auroc"):
        check_task(given.task, given.splits)


# --- speed ------------------------------------------------------------------------------------------------------------


def test_speed_and_memory_are_measured_for_the_batch_sizes_of_the_space() -> None:
    verdict = check_speed(subject(space=Space(Group("g", batch_size=Choice(8, 64, 512, default=8)))))
    assert verdict.data["batch_sizes"] == [8, 64], "512 are more than there are"
    small, large = verdict.data["bytes"]
    assert 2 * small < large < 9 * small
    assert min(verdict.data["examples_a_second"]) > 0


def test_a_batch_that_does_not_fit_into_memory_is_reported() -> None:
    class Hungry(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            if len(inputs) > 20:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().forward(inputs)

    verdict = check_speed(
        subject(lambda spec: Hungry(8, 4), space=Space(Group("g", batch_size=Choice(20, 80, default=20))))
    )
    assert verdict.state == "warning"
    assert "batches of 80 do not fit" in verdict.advice


# --- the commands -----------------------------------------------------------------------------------------------------

BROKEN = """
import torch
from dataclasses import replace
from hpo.objective import Objective
from hpo.data.examples import SealedSplit, Split
from hpo.models.networks import mlp as model
from hpo.objectives.digits import load


def broken(data_dir):
    data = load(data_dir)
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(0))
    train = Split(data.train.inputs, data.train.targets[order])
    test = Split(train.inputs[:90], train.targets[:90])
    return replace(data, train=train, test=SealedSplit(lambda: test, 90))


objective = Objective(name="digits", description="", load=broken, model=model, settings={"max_epochs": 3})
"""


def answer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["hpo", "check", *arguments])
    with pytest.raises(SystemExit) as exited:
        main()
    return int(exited.value.code or 0), capsys.readouterr().out


def test_check_says_what_is_wrong_and_ends_with_1(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "digits.py"
    path.write_text(BROKEN)
    code, output = answer(monkeypatch, capsys, str(path), "--home", str(home))
    assert code == 1
    lines = output.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("wrong")] == ["test", "baseline"]
    assert any("the test result would be too good" in line for line in lines)
    (run,) = check_runs(home)
    assert run.info.status == "FAILED"


def check_runs(home: Path) -> list[Any]:
    client: MlflowClient = open_store(home).client
    experiment = client.get_experiment_by_name("hpo/digits")
    return list(client.search_runs([experiment.experiment_id], "tags.`hpo.kind` = 'check'"))


def test_check_of_a_sound_task_is_logged_with_its_figures_and_a_picture(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output = answer(monkeypatch, capsys, "digits", "--home", str(home), "--json")
    facts = json.loads(output)
    assert code == 0
    assert {verdict["state"] for verdict in facts["verdicts"]} <= {"ok", "warning"}
    assert Path(facts["picture"]).read_bytes().startswith(b"\x89PNG")
    (run,) = check_runs(home)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["check/first_loss"] == pytest.approx(2.3, abs=0.1)
    assert "| ok | gradients |" in run.data.tags["mlflow.note.content"]


def test_a_check_that_raises_is_wrong_and_says_why() -> None:
    class NoWayBack(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, inputs: Tensor) -> Tensor:
            return inputs

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            raise RuntimeError("no way back")

    *others, gradients = quick_part(subject(with_outputs(NoWayBack.apply)))
    assert {verdict.state for verdict in others} == {"ok"}
    assert (gradients.state, gradients.text) == ("wrong", "RuntimeError: no way back")


def test_a_search_runs_the_quick_part_first_and_says_what_it_found(tmp_path: Path, home: Path) -> None:
    class Heard(Observer):
        def __init__(self) -> None:
            self.lines: list[str] = []

        def found(self, line: str) -> None:
            self.lines.append(line)

    path = tmp_path / "digits.py"
    path.write_text(
        BROKEN.replace("load=broken, model=model", "load=load, model=cut").replace(
            "objective = ",
            "def cut(spec):\n    net = model(spec)\n    net.hidden[0].register_forward_hook(lambda *a: a[2].detach())\n"
            "    return net\n\n\nobjective = ",
        )
    )
    space = tmp_path / "lr.py"
    space.write_text(
        "from hpo import Float, Group, Space\n"
        "space = Space(Group('g', lr=Float(1e-3, 0.1, log=True, default=1e-2, confidence='high')))"
    )
    heard = Heard()
    run_search(str(path), space=str(space), strategy="random", trials=1, epochs=1, home=home, observer=heard)
    note, line = heard.lines
    assert note == "note: the confidence in the default of lr changes nothing with --strategy random."
    assert line.startswith("wrong: gradients: they do not reach hidden.0.0.weight: ")
    client = open_store(home).client
    experiment = client.get_experiment_by_name("hpo/digits")
    (summary,) = client.search_runs([experiment.experiment_id], "tags.`hpo.kind` = 'study'")
    logged = Path(client.download_artifacts(summary.info.run_id, "checklist.md")).read_text()
    assert "| wrong | gradients | they do not reach hidden.0.0.weight |" in logged
