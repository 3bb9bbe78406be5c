"""Kinds of target: each is learned and predicted in its own terms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import LR_SPACE
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import generalized_box_iou_loss

import hpo
from hpo import (
    Dataset,
    DataSpec,
    Objective,
    Padded,
    Ragged,
    TrainConfig,
    hold_out,
    mlp,
    split_dataset,
)
from hpo.checks.checklist import whole_list
from hpo.checks.compatibility import check_task
from hpo.checks.verdicts import Subject
from hpo.data.datasets import class_counts
from hpo.models.preprocessed import build_model
from hpo.plots.checks import plot_checklist
from hpo.plugins import OBJECT
from hpo.task import Task
from hpo.training.class_metrics import best_thresholds
from hpo.training.losses import iou_of_pairs, loss_function
from hpo.training.trainer import EpochResult, fit

NUM_EXAMPLES = 500


class Recurrent(nn.Module):
    """A class for each element, or for the whole sequence."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.embedding = nn.Embedding(spec.only_input.vocabulary or 0, 16)
        self.layer = nn.GRU(16, 32, batch_first=True)
        self.output = nn.Linear(32, spec.num_outputs)
        self.is_of_elements = spec.kind == "tagging"

    def forward(self, words: Padded) -> Tensor:
        states, _ = self.layer(self.embedding(words.values))
        last = states[torch.arange(len(words)), words.lengths - 1]
        return self.output(states if self.is_of_elements else last)


class Reader(nn.Module):
    """A class or a blank for each step."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.layer = nn.GRU(spec.only_input.shape[0], 48, batch_first=True, bidirectional=True)
        self.output = nn.Linear(96, spec.num_outputs)

    def forward(self, strokes: Padded) -> Padded:
        return Padded(self.output(self.layer(strokes.values)[0]), strokes.lengths)


class Pixels(nn.Module):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        channels = spec.input_shape[0]
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, spec.num_outputs, 3, padding=1)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def words(seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (NUM_EXAMPLES,), generator=draw).tolist()
    return [torch.randint(1, 20, (length,), generator=draw) for length in lengths]


def squares() -> tuple[Tensor, Tensor, Tensor]:
    """Images with a bright square, its mask and its box."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(60, (NUM_EXAMPLES, 1, 12, 12), generator=draw, dtype=torch.uint8)
    masks, boxes = torch.zeros(NUM_EXAMPLES, 12, 12, dtype=torch.uint8), torch.zeros(NUM_EXAMPLES, 4)
    for row, (y, x) in enumerate(torch.randint(7, (NUM_EXAMPLES, 2), generator=draw).tolist()):
        images[row, 0, y : y + 5, x : x + 5] = 200
        masks[row, y : y + 5, x : x + 5] = 1
        boxes[row] = torch.tensor([x, y, x + 5, y + 5])
    masks[:, 0, 0] = 255  # not known
    return images, masks, boxes


def features() -> Tensor:
    return torch.randn(NUM_EXAMPLES, 6, generator=torch.Generator().manual_seed(0))


def labelled() -> Dataset:
    inputs = features()
    return hold_out(inputs, inputs[:, :3] > 0.7, ["a", "b", "c"])


def several_numbers() -> Dataset:
    inputs = features()
    return hold_out(inputs, torch.stack([1000 * inputs[:, 0], inputs[:, 1] - inputs[:, 2]], dim=1))


def masks() -> Dataset:
    images, masks, _ = squares()
    return hold_out(images, masks, ["background", "square"])


def boxes() -> Dataset:
    images, _, boxes = squares()
    return hold_out(images, boxes, kind="box")


def tagged() -> Dataset:
    return hold_out(Ragged.of(words()), Ragged.of([each % 3 for each in words()]), ["x", "y", "z"])


def classified_sequences() -> Dataset:
    return hold_out(Ragged.of(words()), torch.tensor([int((each == 3).any()) for each in words()]), ["no", "yes"])


def transcribed() -> Dataset:
    """Each class is a level of the signal that is held for three steps, and then falls to 0."""
    draw = torch.Generator().manual_seed(0)
    written = [torch.randint(3, (2 + row % 3,), generator=draw) for row in range(NUM_EXAMPLES)]
    signals = [
        torch.cat([torch.tensor([level + 1.0, level + 1.0, 0.0]) for level in each.tolist()])[:, None]
        for each in written
    ]
    return hold_out(Ragged.of(signals), Ragged.of(written), ["a", "b", "c"], kind="transcription")


KINDS: dict[str, tuple[Callable[[], Dataset], Any, str, str, float]] = {
    "multilabel": (labelled, mlp, "binary_cross_entropy", "f1", 0.85),
    "multilabel, focal": (labelled, mlp, "focal", "average_precision", 0.9),
    "regression": (several_numbers, mlp, "mse", "r2", 0.95),
    "segmentation": (masks, Pixels, "cross_entropy", "mean_iou", 0.95),
    "segmentation, dice": (masks, Pixels, "dice", "dice", 0.95),
    "segmentation, focal": (masks, Pixels, "focal", "mean_iou", 0.95),
    "box": (boxes, mlp, "huber", "mean_iou", 0.6),
    "box, giou": (boxes, mlp, "giou", "mean_iou", 0.6),
    "box, iou": (boxes, mlp, "iou", "mean_iou", 0.6),
    "tagging": (tagged, Recurrent, "cross_entropy", "perplexity", 1.2),
    "classification of sequences": (classified_sequences, Recurrent, "cross_entropy", "accuracy", 0.95),
    "transcription": (transcribed, Reader, "ctc", "character_error_rate", 0.1),
}


def task_of(load: Callable[[], Dataset], model: Any, loss: Any, metric: str, **given: Any) -> Task:
    settings = {"max_epochs": 12, "patience": 12, "batch_size": 16, "lr": 1e-2, "compile": "off"}
    objective = Objective(
        name="made", description="made", load=lambda _: load(), model=model, loss=loss, metric=metric, space=LR_SPACE,
        settings=settings, **given,
    )  # fmt: skip
    return Task(reference=OBJECT, objective=objective, space=LR_SPACE)


def trained(task: Task, data: Dataset) -> tuple[Any, EpochResult]:
    splits = split_dataset(data, seed=0)
    check_task(task, splits)
    model = build_model(task.objective, splits.spec, {}, seed=0)
    model.fit_statistics(splits.train)
    *_, last = fit(model, splits, task.train_config({}))
    return model, last


@pytest.mark.parametrize("name", KINDS)
def test_a_network_learns_every_kind_of_target_by_each_of_its_losses(name: str) -> None:
    load, model, loss, metric, reached = KINDS[name]
    task, data = task_of(load, model, loss, metric), load()
    assert data.spec.kind == name.partition(",")[0].removesuffix(" of sequences")
    _, last = trained(task, data)
    assert last.best_value is not None
    assert task.objective.better.gain(last.best_value, over=reached) > 0


@pytest.mark.parametrize("name", ["multilabel", "regression", "segmentation", "box", "tagging", "transcription"])
def test_the_checklist_finds_nothing_wrong_with_any_kind(name: str) -> None:
    load, model, loss, metric, _ = KINDS[name]
    data = load()
    subject = Subject.of(task_of(load, model, loss, metric), split_dataset(data, seed=0), "cpu")
    verdicts = list(whole_list(subject, data.test))
    assert plot_checklist("made", {verdict.check: verdict.data for verdict in verdicts}).axes
    found = [f"{verdict.check}: {verdict.text}: {verdict.advice}" for verdict in verdicts if verdict.state == "wrong"]
    # Squares of two dozen places repeat each other, and so do short transcriptions.
    assert [line for line in found if not line.startswith("test leak")] == []


PREDICTIONS: dict[str, Callable[[Dataset], list[Any]]] = {
    "multilabel": lambda data: [[n for n, has in zip("abc", row, strict=True) if has] for row in targets(data)],
    "tagging": lambda data: [["xyz"[label] for label in row] for row in targets(data)],
    "transcription": lambda data: [["abc"[label] for label in row] for row in targets(data)],
    "segmentation": lambda data: [[int(v == 1) for v in torch.tensor(mask).flatten()] for mask in targets(data)],
}


def targets(data: Dataset) -> list[Any]:
    part = data.test.open().targets
    if isinstance(part, Ragged):
        return [row.tolist() for row in torch.split(part.values, part.lengths.tolist())]
    assert isinstance(part, Tensor)
    return part.tolist()


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_prediction_is_in_the_terms_of_its_kind(name: str) -> None:
    load, network, loss, metric, _ = KINDS[name]
    data = load()
    model, _ = trained(task_of(load, network, loss, metric), data)
    predicted = model.predict(data.test.open().inputs)
    wanted = PREDICTIONS[name](data)
    if name == "segmentation":
        predicted = [mask.flatten().tolist() for mask in predicted]
    assert len(predicted) == len(wanted)
    assert sum(one == other for one, other in zip(predicted, wanted, strict=True)) >= 0.6 * len(wanted)
    if name != "transcription":
        shares = model.probabilities(data.test.open().inputs)
        assert 0 <= float(shares.min()) <= float(shares.max()) <= 1


def loss_of(kind: str, loss: str, classes: str = "", **changes: Any) -> Any:
    spec = DataSpec((1,), tuple(classes), kind, (4,) if kind == "box" else ())
    return loss_function(TrainConfig(loss=loss, **changes), spec)


def test_the_loss_of_masks_is_torchs_with_an_ignored_label() -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(4, 3, 5, 5), torch.randint(3, (4, 5, 5))
    labels[0] = -100
    for smoothing in (0.0, 0.1):
        ours = loss_of("segmentation", "cross_entropy", "abc", label_smoothing=smoothing)(outputs, labels)
        assert ours.item() == pytest.approx(functional.cross_entropy(outputs, labels, label_smoothing=smoothing).item())


def test_the_loss_of_transcriptions_is_torchs_with_the_last_output_as_the_blank() -> None:
    torch.manual_seed(0)
    outputs = Padded(torch.randn(3, 8, 4), torch.tensor([8, 6, 7]))
    written = Padded(torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 0]]), torch.tensor([3, 2, 1]))
    wanted = functional.ctc_loss(
        outputs.values.log_softmax(-1).transpose(0, 1), written.values, outputs.lengths, written.lengths, blank=3
    )
    assert loss_of("transcription", "ctc", "abc")(outputs, written).item() == pytest.approx(wanted.item())


def test_losses_of_boxes_are_zero_for_the_box_itself_and_grow_with_the_distance() -> None:
    box = torch.tensor([[1.0, 1.0, 3.0, 3.0]])
    near, far = box + 1, box + 9
    boxes, others = (torch.rand(2, 50, 4) * 2 + torch.tensor([0, 0, 2, 2])).unbind()
    wanted = generalized_box_iou_loss(boxes, others, reduction="mean").item()
    assert loss_of("box", "giou")(boxes, others).item() == pytest.approx(wanted)
    assert iou_of_pairs(near, box).item() == pytest.approx(1 / 7)
    assert iou_of_pairs(box[:, [2, 3, 0, 1]], box).item() == 1  # corners in the other order are the same box
    for loss in ("iou", "giou", "huber"):
        of_box = loss_of("box", loss)
        assert of_box(box, box).item() == pytest.approx(0, abs=1e-6)
        assert of_box(near, box).item() > 0.1
    assert loss_of("box", "iou")(far, box).item() == 1
    assert loss_of("box", "giou")(far, box).item() > loss_of("box", "giou")(box + 4, box).item() > 1


def test_thresholds_are_those_of_the_best_f1_of_each_label() -> None:
    torch.manual_seed(0)
    outputs, labels = torch.randn(60, 4).round(decimals=1), torch.rand(60, 4) > 0.5
    labels[:, 3] = False
    chosen = best_thresholds(outputs, labels)

    def f1(label: int, threshold: float) -> float:
        given, has = outputs[:, label] > threshold, labels[:, label]
        return 2 * int((given & has).sum()) / max(1, int(given.sum() + has.sum()))

    for label in range(3):
        best = max(f1(label, float(value) - 0.05) for value in outputs[:, label])
        assert f1(label, chosen[label].item()) == pytest.approx(best)
    assert chosen[3] == 0


@pytest.mark.parametrize("metric", ["f1", "exact_match"])
def test_a_model_of_several_labels_is_judged_with_the_thresholds_that_it_gets(metric: str, home: Path) -> None:
    task = task_of(labelled, mlp, "binary_cross_entropy", metric).objective
    options: dict[str, Any] = {"trials": 1, "epochs": 2, "workers": 1, "device": "cpu", "home": home}
    winner = hpo.run_search(task, **options).winner
    assert winner is not None
    model = hpo.load_best("made", home=home, task=task)
    assert bool(model.thresholds.any()) is (metric == "f1")

    validation = split_dataset(labelled(), seed=0).validation
    has = validation.targets.bool()
    given = torch.tensor([[name in labels for name in "abc"] for labels in model.predict(validation.inputs)])
    f1 = (2 * (given & has).sum(0) / (given.sum(0) + has.sum(0))).mean()
    expected = f1 if metric == "f1" else (given == has).all(1).float().mean()
    assert winner.validation == pytest.approx(expected.item())

    hpo.run_search(task, **options, refit=True)
    refit = hpo.load_best("made", home=home, task=task)
    assert not torch.equal(next(refit.parameters()), next(model.parameters()))
    assert torch.equal(refit.thresholds, model.thresholds)


def test_rare_labels_are_in_both_splits() -> None:
    inputs, labels = torch.randn(200, 3), torch.zeros(200, 2)
    labels[:100, 0] = 1
    labels[:10, 1] = 1  # each has the common label, too
    splits = split_dataset(hold_out(inputs, labels, ["common", "rare"]), seed=3)
    counts = [class_counts(split, splits.spec)["rare"] for split in (splits.train, splits.validation)]
    assert counts == [6, 2]


def test_the_numbers_of_a_regression_are_learned_each_in_its_own_units() -> None:
    model, _ = trained(task_of(several_numbers, mlp, "mse", "r2"), several_numbers())
    data = several_numbers().test.open()
    predicted = torch.tensor(model.predict(data.inputs))
    assert isinstance(data.targets, Tensor)
    error = (predicted - data.targets).abs().mean(0) / data.targets.std(0)
    assert (error < 0.25).all()
