"""What a task may give wrong: each is told in one line, before the first trial, with what is wanted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import LR_SPACE
from torch import Tensor, nn
from torch.nn import functional

from hpo import (
    Dataset,
    Float,
    Group,
    HpoError,
    Objective,
    Ragged,
    SealedSplit,
    Space,
    Split,
    hold_out,
    mlp,
    run_search,
    split_dataset,
)
from hpo.checks.compatibility import check_task
from hpo.task import Task, check_parameters, check_ranges, load_dataset

NUM = 60
FEATURES = torch.randn(NUM, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(NUM) % 3
IMAGES = torch.randint(256, (NUM, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
WORDS = [[1 + row % 5, 2] for row in range(NUM)]
NAMES = ["a", "b", "c"]


class Shaped(nn.Module):
    """Gives outputs of a fixed shape for each example, whatever it gets."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(shape))

    def forward(self, inputs: Any) -> Tensor:
        return self.values.expand(len(inputs), *self.values.shape)


def prepared(
    inputs: Any = FEATURES,
    targets: Any = CLASSES,
    classes: Any = NAMES,
    *,
    model: Any = mlp,
    loss: Any = "cross_entropy",
    metric: str = "accuracy",
    settings: Any = None,
    data: Any = None,
    given: Any = None,
    **of_task: Any,
) -> None:
    """What a search does before its first trial, as far as the task is concerned."""

    def load(folder: Path) -> Any:
        if data is not None:
            return data
        return hold_out(
            inputs() if callable(inputs) else inputs,
            targets() if callable(targets) else targets,
            classes,
            **given or {},
        )

    space = of_task.pop("space", LR_SPACE)
    objective = Objective(
        name="mine", description="mine", load=load, model=model, loss=loss, metric=metric, space=space,
        settings={"batch_size": 8} | (settings or {}), **of_task,
    )  # fmt: skip
    task = Task(reference="mine", objective=objective, space=space)
    check_parameters(task)
    check_ranges(task)
    assert task.objective.better
    check_task(task, split_dataset(load_dataset(task, Path()), seed=0))


def fixed(*shape: int) -> Callable[..., nn.Module]:
    return lambda spec: Shaped(*shape)


class Falling:
    higher_is_better = True

    def update(self, outputs: Any, targets: Any) -> None:
        raise ZeroDivisionError("no positives")

    def compute(self) -> float:
        return 0.0


class Vector(Falling):
    def update(self, outputs: Any, targets: Any) -> None:
        pass

    def compute(self) -> Any:
        return torch.zeros(3)


def own(loss: Any, **changes: Any) -> dict[str, Any]:
    return {"loss": loss, "metric": "loss"} | changes


BOXES = torch.tensor([[1.0, 1.0, 4.0, 4.0]]).repeat(NUM, 1)
MASKS = torch.zeros(NUM, 8, 8, dtype=torch.int64)
LABELS = torch.stack([label == CLASSES for label in range(3)], dim=1)  # type: ignore[misc]
LETTERS = [[row % 3, 1] for row in range(NUM)]

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    # inputs
    "inputs of texts": ({"inputs": np.array(["a"] * NUM)}, "inputs must be a torch tensor, hpo.Ragged or .* a ndarray"),
    "a list of sequences": ({"inputs": {"words": WORDS}}, "input words must be a torch tensor, hpo.Ragged"),
    "fewer inputs than targets": ({"inputs": FEATURES[:50]}, "have 50 inputs for 60 targets"),
    "one of two inputs too short": (
        {"inputs": {"one": FEATURES, "other": FEATURES[:9]}},
        "have 60 input one for 9 input other",
    ),
    "no inputs": ({"inputs": {}}, "have no training examples"),
    "a number as inputs": ({"inputs": torch.tensor(3.0)}, "must have a row for each example, but have no dimension"),
    "NaN in inputs": ({"inputs": FEATURES / 0 * 0}, "inputs hold NaN or infinite values"),
    "NaN in one of two inputs": (
        {"inputs": {"one": FEATURES, "other": FEATURES * torch.inf}},
        r"inputs \(other\) hold NaN",
    ),
    "complex inputs": ({"inputs": FEATURES.to(torch.complex64)}, "are complex numbers; give torch.view_as_real"),
    "negative ids": ({"inputs": CLASSES[:, None] - 1}, "hold the integer -1; integers are ids"),
    "an empty sequence": ({"inputs": lambda: Ragged.of([[], *WORDS[1:]])}, r"have an empty sequence \(example"),
    "sequences of several types": (
        {"inputs": lambda: Ragged.of([torch.ones(2), *map(torch.tensor, WORDS[1:])])},
        r"the sequences have several types \(torch.float32, torch.int64\)",
    ),
    "sequences of several shapes": (
        {"inputs": lambda: Ragged.of([torch.ones(2, 3), *[torch.ones(2, 4)] * 59])},
        "the sequences cannot be combined",
    ),
    "lengths that do not add up": (
        {"inputs": lambda: Ragged(torch.arange(10), torch.tensor([3, 3]))},
        "add up to 6, but there are 10 values",
    ),
    "a vocabulary that is too small": (
        {"inputs": lambda: Ragged.of(WORDS), "given": {"vocabulary": 4}},
        "hold the integer 5, but a vocabulary of 4 ends at 3",
    ),
    "a column with more categories than were said": (
        {"inputs": torch.stack([CLASSES, CLASSES], 1), "given": {"vocabulary": (3, 2)}},
        "column 1 holds the integer 2, but its vocabulary is 2",
    ),
    "a vocabulary for an input that is not there": (
        {"inputs": {"words": CLASSES}, "given": {"vocabulary": {"word": 9}}},
        "vocabulary names the input 'word'; the inputs are words",
    ),
    "ids for a network of numbers": (
        {"inputs": CLASSES[:, None].repeat(1, 2)},
        r"the inputs are int64, which are ids \(tokens, categories\) and need an embedding",
    ),
    "sequences for a network of one shape": (
        {"inputs": lambda: Ragged.of([torch.ones(row % 3 + 1) for row in range(NUM)])},
        "takes examples of one shape; the inputs are sequences of different lengths",
    ),
    "several inputs for a network of one": (
        {"inputs": {"one": FEATURES, "other": FEATURES}},
        r"takes one input; the task has several \(one, other\)",
    ),
    # targets
    "an unknown kind": ({"given": {"kind": "clasification"}}, "did you mean 'classification'"),
    "classes of floats": ({"targets": CLASSES + 0.5}, "must be the classes' indices, int64 of shape .*float32"),
    "a class that has no name": ({"classes": ["a", "b"]}, "targets are from 0 to 2; 2 classes have the indices from 0"),
    "one class": ({"classes": ["a"], "targets": CLASSES * 0}, "there is only the class 'a'"),
    "a class name twice": ({"classes": ["a", "b", "a"]}, "the class name 'a' is given twice"),
    "classes without names": (
        {"classes": [], "given": {"kind": "classification"}},
        r"kind classification need the names of their classes",
    ),
    "names for numbers": (
        {"targets": FEATURES[:, 0], "given": {"kind": "regression"}},
        "kind regression have no classes; leave classes out",
    ),
    "NaN in numbers": (
        {"targets": FEATURES[:, 0] / 0, "classes": [], "loss": "mse", "metric": "r2"},
        "targets hold NaN or infinite values",
    ),
    "numbers that are integers": ({"classes": []}, "a regression's targets must be floats"),
    "labels with a column too few": (
        {"targets": LABELS[:, :2], "given": {"kind": "multilabel"}},
        r"must have the shape \(N, 3\), a column for each class, not torch.bool of shape \(60, 2\)",
    ),
    "labels that are shares": (
        {"targets": LABELS / 2, "given": {"kind": "multilabel"}},
        "must be 1 where an example has the label and 0 elsewhere",
    ),
    "masks of floats": (
        {"inputs": IMAGES, "targets": MASKS.float(), "given": {"kind": "segmentation"}},
        "masks must be int64 or uint8",
    ),
    "masks with a label that has no name": (
        {"inputs": IMAGES, "targets": MASKS + 7},
        "targets are from 7 to 7; 3 classes have the indices from 0, and -100 is ignored",
    ),
    "masks without any label": ({"inputs": IMAGES, "targets": MASKS - 100}, "all labels are ignored"),
    "boxes of three numbers": (
        {"targets": BOXES[:, :3], "classes": [], "given": {"kind": "box"}},
        r"must have the shape \(N, 4\), x1 y1 x2 y2 in pixels, not torch.float32 of shape \(60, 3\)",
    ),
    "boxes as width and height": (
        {"targets": BOXES[:, [2, 3, 0, 1]], "classes": [], "given": {"kind": "box"}},
        "x1 < x2 and y1 < y2; that of example 0 is 4 4 1 1",
    ),
    "more tags than elements": (
        {"inputs": lambda: Ragged.of(WORDS), "targets": lambda: Ragged.of([*LETTERS[:2], [1, 1, 1], *LETTERS[3:]])},
        "example 2 has a sequence of length 2, but tags of length 3; give a tag for each element, and -100 where none",
    ),
    "tags of one shape for sequences of several lengths": (
        {"inputs": lambda: Ragged.of([[1], *WORDS[1:]]), "targets": torch.tensor(LETTERS)},
        "example 0 has a sequence of length 1, but tags of length 2",
    ),
    "tags of one of several targets": (
        {
            "inputs": lambda: Ragged.of(WORDS),
            "targets": lambda: {"word": Ragged.of([[0], *LETTERS[1:]]), "whole": CLASSES},
            "classes": {"word": NAMES, "whole": NAMES},
        },
        "example 0 has a sequence of length 2, but tags of length 1",
    ),
    "an empty transcription": (
        {"targets": lambda: Ragged.of([[], *LETTERS[1:]]), "given": {"kind": "transcription"}},
        "the transcription of example .* is empty",
    ),
    "a transcription of one shape": (
        {"targets": torch.tensor(LETTERS), "given": {"kind": "transcription"}},
        "transcriptions must be Ragged int64",
    ),
    "targets in a list": ({"targets": CLASSES[:, None].tolist()}, "targets must be a torch tensor"),
    "several targets with a named loss": (
        {"targets": {"one": CLASSES, "other": CLASSES}},
        "loss 'cross_entropy' does not fit data with targets of the kind own; give the Objective a loss of its own",
    ),
    "no targets with a named loss": ({"targets": None}, "targets of the kind own; give the Objective a loss"),
    # data sets
    "load gives a tuple": ({"data": (FEATURES, CLASSES)}, "must return a Dataset, but returned a tuple"),
    "no sealed test": (
        {"data": Dataset(hold_out(FEATURES, CLASSES, NAMES).train, test=hold_out(FEATURES, CLASSES, NAMES).train)},  # type: ignore[arg-type]
        "have a Split as test; it must be a SealedSplit",
    ),
    # losses and metrics that do not fit
    "a loss of numbers for classes": (
        {"loss": "mse"},
        "loss 'mse' does not fit data with 3 classes; use cross_entropy",
    ),
    "a loss of classes for masks": (
        {"inputs": IMAGES, "targets": MASKS, "loss": "binary_cross_entropy", "metric": "mean_iou"},
        "does not fit data with targets of the kind segmentation; use cross_entropy or dice or focal",
    ),
    "a metric of numbers for classes": ({"metric": "r2"}, "no classification metric 'r2'"),
    "mixing several labels": (
        {"targets": LABELS, "loss": "binary_cross_entropy", "metric": "f1", "settings": {"mixup": 0.2}},
        "mixup and cutmix do not work with targets of the kind multilabel",
    ),
    "augmentation of masked images": (
        {"inputs": {"image": IMAGES, "more": FEATURES}, "model": fixed(3), "settings": {"augment": "flip"}},
        "augment='flip' is for images",
    ),
    "balanced weights for several labels": (
        {
            "targets": LABELS,
            "loss": "binary_cross_entropy",
            "metric": "f1",
            "settings": {"class_weights": "balanced"},
        },
        "class_weights='balanced' is for classification with one of hpo's losses; this task has a multilabel",
    ),
    "balanced sampling of numbers": (
        {"targets": FEATURES, "classes": [], "loss": "mse", "metric": "r2", "settings": {"sampling": "balanced"}},
        "sampling='balanced' is for classes",
    ),
    # models
    "outputs for the wrong number of classes": ({"model": fixed(4)}, r"outputs of shape \(2, 4\) .* not \(2, 3\)"),
    "outputs of a mask too small": (
        {"inputs": IMAGES, "targets": MASKS, "metric": "mean_iou", "model": fixed(3, 4, 4)},
        r"outputs of shape \(2, 3, 4, 4\) for 2 examples, not \(2, 3, 8, 8\)",
    ),
    "outputs of a transcription without a blank": (
        {
            "targets": lambda: Ragged.of(LETTERS),
            "given": {"kind": "transcription"},
            "loss": "ctc",
            "metric": "character_error_rate",
            "model": fixed(9, 3),
        },
        r"outputs of shape \(2, 9, 3\) for 2 examples, not \(2, 9, 4\)",
    ),
    "num_outputs of a loss of its own": (
        own(functional.mse_loss, targets=None),
        "so its model must know",
    ),
    # losses, metrics and optimizers of the task's own
    "a loss that is a number": (own(0.5), "loss=0.5 is not allowed: it must be the name of a loss, a function or"),
    "a loss that raises": (own(lambda outputs, targets: outputs @ targets), "the loss of task 'mine' fails with"),
    "a loss for each example": (
        own(lambda outputs, targets: functional.cross_entropy(outputs, targets, reduction="none")),
        r"returns a tensor of shape \(2,\); it must be the mean over the batch, one number",
    ),
    "a loss without a gradient": (
        own(lambda outputs, targets: functional.cross_entropy(outputs.detach(), targets)),
        "has no gradient: compute it from the model's outputs",
    ),
    "a loss that is no tensor": (
        own(lambda outputs, targets: functional.cross_entropy(outputs, targets).item()),
        "returns float; it must be the mean over the batch",
    ),
    "a loss that is not finite": (
        own(lambda outputs, targets: outputs.sum() / 0),
        "is (nan|inf|-inf) for the first two",
    ),
    "a metric that raises": (
        {"metrics": {"mine": Falling}, "metric": "mine"},
        "a metric of task 'mine' fails with the outputs of the model: ZeroDivisionError: no positives",
    ),
    "a metric of several numbers": (
        {"metrics": {"mine": Vector}},
        r"the metric mine must return one number, but returned the shape \(3,\)",
    ),
    "a metric that is an object": (
        {"metrics": {"mine": Vector()}},
        r"metrics\['mine'\] is a Vector; it must be a class",
    ),
    "a metric that is not there": ({"metrics": {"mine": Vector}, "metric": "mina"}, "did you mean 'mine'"),
    "a metric with a name that MLflow refuses": ({"metrics": {"a:b": Vector}}, "metric 'a:b' of task 'mine' may have"),
    "an optimizer that is none": (
        {"optimizer": lambda groups, config: None},
        "the task's optimizer must return a torch.optim.Optimizer, not a NoneType",
    ),
    "an optimizer that is not there": (
        {"settings": {"optimizer": "own"}},
        "optimizer='own' needs an Objective with an",
    ),
    "a loss that is not there": (
        {"settings": {"loss": "own"}},
        "loss='own' needs an Objective whose loss is a callable",
    ),
    "a parameter that nobody takes": (
        {"space": Space(Group("loss", margn=Float(0.1, 1.0, default=0.5))), **own(lambda o, t, *, margin=1.0: o.sum())},
        "did you mean 'margin'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_a_task_gives_wrong_is_reported_in_one_line_before_the_first_trial(name: str) -> None:
    given, message = WRONG[name]
    with pytest.raises(HpoError, match=message) as raised:
        prepared(**given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (
            FEATURES[:, :3],
            CLASSES,
            r"test split are float32 \(B, 3\), but those of the training split float32 \(B, 4\)",
        ),
        (FEATURES.byte(), CLASSES, r"test split are uint8 \(B, 4\), but those of the training split float32"),
        ({"one": FEATURES}, CLASSES, "the test split has the inputs one, not "),
        (FEATURES, CLASSES + 1, "in the test split, the targets are from 1 to 3; 3 classes have the indices from 0"),
        (FEATURES / 0, CLASSES, "in the test split, the data's inputs hold NaN or infinite values"),
        (FEATURES, CLASSES[1:], "in the test split, the data have .* inputs for .* targets"),
    ],
)
def test_a_test_split_of_another_kind_is_reported_when_it_is_opened(inputs: Any, targets: Tensor, message: str) -> None:
    spec = hold_out(FEATURES, CLASSES, NAMES).spec
    with pytest.raises(HpoError, match=message):
        Split(inputs, targets).require_like(spec)


def test_a_test_split_may_hold_no_id_that_the_model_has_no_room_for() -> None:
    words = hold_out(Ragged.of(WORDS), CLASSES, NAMES)
    words.test.open().require_like(words.spec)
    Split(FEATURES.double(), CLASSES).require_like(hold_out(FEATURES, CLASSES, NAMES).spec)
    with pytest.raises(HpoError, match="hold the integer 9, which no other example has; give the Dataset a larger"):
        Split(Ragged.of([[9]]), CLASSES[:1]).require_like(words.spec)
    with pytest.raises(HpoError, match=r"in the test split, .* have an empty sequence \(example 1\)"):
        Split(Ragged.of([[1], []]), CLASSES[:2]).require_like(words.spec)


def unreadable() -> Split:
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda: Split(FEATURES / 0, CLASSES), "in the test split, the data's inputs hold NaN"),
        (unreadable, "the test split cannot be read: OSError: the disk is gone"),
    ],
)
def test_a_test_split_that_could_not_be_used_is_refused_before_the_first_trial(
    read: Callable[[], Split], message: str, home: Path
) -> None:
    data = Dataset(Split(FEATURES, CLASSES), SealedSplit(read, NUM), tuple(NAMES))
    objective = Objective(
        name="mine", description="", load=lambda folder: data, model=mlp, loss="cross_entropy", metric="accuracy",
        space=LR_SPACE, settings={"batch_size": 8},
    )  # fmt: skip
    with pytest.raises(HpoError, match=message):
        run_search(objective, home=home, trials=1)
    assert not (home / "optuna.db").exists()
    assert data.test.times_opened == 0


def test_a_right_task_gets_no_complaint() -> None:
    prepared()
    prepared(targets=LABELS, loss="binary_cross_entropy", metric="f1")
    prepared(targets=None, **own(lambda outputs, inputs: (outputs - inputs).abs().mean(), model=fixed(4)))
