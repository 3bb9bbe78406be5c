"""Metrics equal those of torchmetrics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.data import of_classes
from helpers.training import NUM_CLASSES, ImageNet, image_splits, quick_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hpo import DataSpec, Padded, Ragged
from hpo.config import TrainConfig
from hpo.data.examples import Split
from hpo.training.class_metrics import ConfusionMetrics, auroc
from hpo.training.evaluation import evaluate, evaluate_classes
from hpo.training.metrics import EpochMetrics
from hpo.training.value_metrics import RegressionMetrics


def measured(metrics: Any, outputs: Tensor, targets: Tensor, batch_size: int) -> dict[str, float]:
    for batch in zip(outputs.split(batch_size), targets.split(batch_size), strict=True):
        metrics.update(*batch)
    return {name: value.item() for name, value in metrics.compute().items()}


@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(2, 12),
    num_examples=st.integers(1, 60),
    batch_size=st.integers(1, 60),
)
def test_classification_metrics_equal_torchmetrics(
    seed: int, num_classes: int, num_examples: int, batch_size: int
) -> None:
    from torchmetrics import functional as reference

    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(num_examples, num_classes, generator=generator)
    # Classes that are missing in targets, predictions or both are frequent with so few examples.
    num_targets = int(torch.randint(1, num_classes + 1, (), generator=generator))
    targets = torch.randint(num_targets, (num_examples,), generator=generator)
    ours = measured(ConfusionMetrics(num_classes, "cpu"), outputs, targets, batch_size)
    theirs = {
        "accuracy": reference.accuracy(outputs, targets, "multiclass", num_classes=num_classes, average="micro"),
        "precision": reference.precision(outputs, targets, "multiclass", num_classes=num_classes, average="macro"),
        "recall": reference.recall(outputs, targets, "multiclass", num_classes=num_classes, average="macro"),
        "f1": reference.f1_score(outputs, targets, "multiclass", num_classes=num_classes, average="macro"),
        "precision_weighted": reference.precision(
            outputs, targets, "multiclass", num_classes=num_classes, average="weighted"
        ),
        "f1_weighted": reference.f1_score(outputs, targets, "multiclass", num_classes=num_classes, average="weighted"),
    }
    assert ours == pytest.approx({name: value.item() for name, value in theirs.items()}, abs=1e-6)


@given(
    seed=st.integers(0, 10**6),
    num_classes=st.integers(2, 12),
    num_examples=st.integers(2, 60),
    num_ties=st.integers(0, 30),
)
@pytest.mark.filterwarnings("ignore:(No|Average precision) .*:UserWarning")
def test_auroc_equals_torchmetrics_with_ties_and_missing_classes(
    seed: int, num_classes: int, num_examples: int, num_ties: int
) -> None:
    from torchmetrics import functional as reference

    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(num_examples, num_classes, generator=generator)
    outputs[:num_ties] = outputs[0]
    targets = torch.randint(num_classes, (num_examples,), generator=generator)
    targets[:2] = torch.tensor([0, 1])
    theirs = reference.auroc(outputs.double().softmax(1), targets, "multiclass", num_classes=num_classes, average=None)
    assert theirs is not None
    counts = targets.bincount(minlength=num_classes)
    is_defined = (counts > 0) & (counts < num_examples)  # torchmetrics says 0 for the others
    assert auroc(outputs, targets).item() == pytest.approx(theirs[is_defined].mean().item(), abs=1e-6)


def test_auroc_tells_sure_answers_apart() -> None:
    outputs = torch.tensor([[0.0, 20.0], [0.0, 25.0], [0.0, 30.0], [0.0, 35.0]])
    assert outputs.softmax(1)[:, 1].unique().item() == 1.0
    assert auroc(outputs, torch.tensor([0, 0, 1, 1])) == 1.0


def test_the_confusion_matrix_has_a_row_for_each_class_and_a_column_for_what_it_is_taken_for() -> None:
    splits, model = image_splits(), ImageNet().eval()
    counts = torch.tensor(evaluate_classes(model, splits.validation, quick_config(), of_classes(NUM_CLASSES))[1])
    assert counts.sum(1).equal(splits.validation.targets.bincount(minlength=NUM_CLASSES))
    by_hand = torch.zeros_like(counts)
    for target, prediction in zip(splits.validation.targets, model(splits.validation.inputs).argmax(1), strict=True):  # type: ignore[arg-type]
        by_hand[target, prediction] += 1
    assert counts.equal(by_hand)


@given(
    seed=st.integers(0, 10**6),
    num_examples=st.integers(2, 60),
    batch_size=st.integers(1, 60),
    mean=st.sampled_from([0.0, -5.0, 1e3]),
    column=st.booleans(),
)
def test_regression_metrics_equal_torchmetrics(
    seed: int, num_examples: int, batch_size: int, mean: float, column: bool
) -> None:
    from torchmetrics import functional as reference

    generator = torch.Generator().manual_seed(seed)
    targets = mean + torch.randn(num_examples, generator=generator)
    targets[:2] = torch.tensor([mean - 1, mean + 1])  # torchmetrics takes a variance near 0 for 0, and loses digits
    outputs = targets + torch.randn(num_examples, generator=generator)
    ours = measured(RegressionMetrics("cpu"), outputs.unsqueeze(1) if column else outputs, targets, batch_size)
    exact = outputs.double(), targets.double()
    theirs = {
        "mse": reference.mean_squared_error(*exact),
        "rmse": reference.mean_squared_error(*exact, squared=False),
        "mae": reference.mean_absolute_error(*exact),
        "r2": reference.r2_score(*exact),
    }
    assert ours == pytest.approx({name: value.item() for name, value in theirs.items()}, rel=1e-6, abs=1e-6)


def test_r2_keeps_its_digits_far_from_zero() -> None:
    """Sums of squares of targets around 1e6 would leave no digit of a deviation of 0.1 even in float64."""
    targets = 1e6 + torch.tensor([0.0, 0.125, 0.25, 0.375]) * 1.0
    ours = measured(RegressionMetrics("cpu"), targets + 0.0625, targets, 2)
    assert ours["r2"] == pytest.approx(1 - 4 * 0.0625**2 / (0.125**2 * 5), rel=1e-9)


def test_r2_of_equal_targets_is_one_for_exact_predictions_and_zero_otherwise() -> None:
    targets = torch.full((5,), 0.1)
    assert measured(RegressionMetrics("cpu"), targets.clone(), targets, 2)["r2"] == 1.0
    assert measured(RegressionMetrics("cpu"), targets + 1, targets, 2)["r2"] == 0.0


# --- other kinds of target -------------------------------------------------------------------------------------------


def measured_of_kind(spec: DataSpec, outputs: Any, targets: Any, batches: list[slice]) -> dict[str, float]:
    metrics = EpochMetrics(spec, "cpu", is_complete=True)
    for rows in batches:
        metrics.update(outputs[rows], targets[rows], torch.zeros(()))
    return {name: float(value) for name, value in metrics.compute().items()}


BATCHES = [slice(0, 7), slice(7, 40)]


def test_metrics_of_several_labels_equal_torchmetrics() -> None:
    import torchmetrics.classification as reference

    torch.manual_seed(0)
    outputs, labels = torch.randn(40, 5), torch.rand(40, 5) > 0.6
    ours = measured_of_kind(DataSpec((1,), tuple("abcde"), "multilabel"), outputs, labels, BATCHES)
    args = (outputs.sigmoid(), labels.long())
    assert ours["f1"] == pytest.approx(reference.MultilabelF1Score(5)(*args).item())
    assert ours["precision"] == pytest.approx(reference.MultilabelPrecision(5)(*args).item())
    assert ours["recall"] == pytest.approx(reference.MultilabelRecall(5)(*args).item())
    assert ours["accuracy"] == pytest.approx(reference.MultilabelAccuracy(5, average="micro")(*args).item())
    assert ours["exact_match"] == pytest.approx(reference.MultilabelExactMatch(5)(*args).item())
    assert ours["average_precision"] == pytest.approx(reference.MultilabelAveragePrecision(5)(*args).item())
    coarse = (outputs * 1.5).round()  # with ties, and one label whose outputs are all equal
    coarse[:, 2] = 1.0
    ours = measured_of_kind(DataSpec((1,), tuple("abcde"), "multilabel"), coarse, labels, BATCHES)
    args = (coarse.sigmoid(), labels.long())
    assert ours["average_precision"] == pytest.approx(reference.MultilabelAveragePrecision(5)(*args).item())


def test_metrics_of_masks_equal_torchmetrics_without_the_pixels_that_are_not_known() -> None:
    import torchmetrics.classification as reference

    torch.manual_seed(0)
    outputs, labels = torch.randn(40, 3, 6, 6), torch.randint(3, (40, 6, 6))
    labels[torch.rand(40, 6, 6) < 0.2] = -100
    ours = measured_of_kind(DataSpec((1,), tuple("abc"), "segmentation"), outputs, labels, BATCHES)
    args = (outputs.argmax(1), labels)
    options: dict[str, Any] = {"ignore_index": -100, "average": "macro"}
    assert ours["mean_iou"] == pytest.approx(reference.MulticlassJaccardIndex(3, **options)(*args).item())
    assert ours["dice"] == pytest.approx(reference.MulticlassF1Score(3, **options)(*args).item())
    in_bytes = torch.where(labels == -100, 255, labels).to(torch.uint8)
    assert measured_of_kind(DataSpec((1,), tuple("abc"), "segmentation"), outputs, in_bytes, BATCHES) == ours


def test_metrics_of_elements_equal_torchmetrics() -> None:
    from torchmetrics.text import Perplexity

    torch.manual_seed(0)
    outputs, labels = torch.randn(40, 9, 4), torch.randint(4, (40, 9))
    lengths = torch.randint(1, 10, (40,))
    padded = Padded(labels, lengths)
    ignored = torch.where(padded.mask, labels, -100)
    metrics = EpochMetrics(DataSpec((1,), tuple("abcd"), "tagging"), "cpu")
    metrics.update(outputs, padded, torch.zeros(()))
    ours = metrics.compute()
    assert float(ours["perplexity"]) == pytest.approx(Perplexity(ignore_index=-100)(outputs, ignored).item())
    accuracy = (outputs.argmax(-1) == labels)[padded.mask].double().mean()
    assert float(ours["accuracy"]) == pytest.approx(accuracy.item())


@pytest.mark.parametrize("loss", ["cross_entropy", "dice"])
def test_the_loss_of_masks_does_not_depend_on_the_batch_size(loss: str) -> None:
    """Some pixels have no label, and the examples not equally many; one has none at all."""
    torch.manual_seed(0)
    outputs, labels = torch.randn(6, 3, 40, 40), torch.randint(3, (6, 40, 40))
    labels[torch.rand(6, 40, 40) < torch.linspace(0, 1, 6)[:, None, None]] = -100
    spec = DataSpec((3, 40, 40), tuple("abc"), "segmentation")
    whole, *parts = (
        evaluate(nn.Identity(), Split(outputs, labels), TrainConfig(loss=loss, batch_size=size), spec)["loss"]
        for size in (6, 4, 1)
    )
    assert parts == pytest.approx([whole, whole])
    if loss == "cross_entropy":
        assert whole == pytest.approx(functional.cross_entropy(outputs, labels).item())


def test_the_loss_of_elements_does_not_depend_on_the_batch_size() -> None:
    torch.manual_seed(0)
    lengths = (8, 1, 5)
    split = Split(
        Ragged.of([torch.randn(num, 9) for num in lengths]), Ragged.of([torch.arange(num) for num in lengths])
    )
    spec = DataSpec((9,), tuple("abcdefghi"), "tagging")
    measured = [evaluate(nn.Identity(), split, TrainConfig(batch_size=size), spec) for size in (3, 2, 1)]
    assert [each["loss"] for each in measured] == pytest.approx([math.log(measured[0]["perplexity"])] * 3)


def test_transcriptions_are_read_greedily_and_measured_by_edits() -> None:
    from torchmetrics.text import CharErrorRate

    best = torch.tensor([[0, 0, 3, 1, 1], [3, 2, 2, 3, 2], [1, 1, 1, 1, 1]])
    outputs = functional.one_hot(best, 4).float()
    written = Padded(torch.tensor([[0, 1, 0], [2, 2, 0], [2, 0, 1]]), torch.tensor([2, 2, 3]))
    metrics = EpochMetrics(DataSpec((1,), tuple("abc"), "transcription"), "cpu", is_complete=True)
    metrics.update(outputs, written, torch.zeros(()))
    ours = metrics.compute()
    assert float(ours["character_error_rate"]) == pytest.approx(
        CharErrorRate()(["ab", "cc", "b"], ["ab", "cc", "cab"]).item()
    )
    assert float(ours["exact_match"]) == pytest.approx(2 / 3)
