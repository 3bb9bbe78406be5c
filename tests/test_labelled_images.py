"""Images with a class for each pixel, and photos with labels or numbers in a CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hpo import DataSpec, HpoError, find_data_dir, load_image_folder, load_pasted_clothes, split_dataset, unet
from hpo.checks.baselines import baselines
from hpo.checks.compatibility import check_task
from hpo.models.preprocessed import build_model
from hpo.plugins import load_task
from hpo.task import Task
from hpo.training.metrics import EpochMetrics
from hpo.training.trainer import fit

COLOURS = ("red", "green", "blue")
NUM_PHOTOS = 120


def trained(task: Task, splits: Any, changes: dict[str, Any], **settings: Any) -> float:
    check_task(task, splits)
    values = task.space.active(task.space.defaults()) | changes
    model = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0, pretrained=False)
    model.fit_statistics(splits.train)
    *_, last = fit(model, splits, task.train_config(values, precision="fp32", compile="off", **settings))
    assert last.best_value is not None
    return last.best_value


# --- a class for each pixel -------------------------------------------------------------------------------------------


@pytest.mark.real_data
def test_a_unet_finds_pasted_clothes() -> None:
    task = load_task("pasted_clothes").with_data_options({"num_images": 1200})
    dataset = load_pasted_clothes(find_data_dir(), num_images=1200)
    splits = split_dataset(dataset, seed=0)
    naive, _ = baselines(splits)
    metrics = EpochMetrics(splits.spec, "cpu")
    metrics.update(naive, splits.validation.targets, torch.zeros(()))

    reached = trained(task, splits, {"batch_size": 8, "lr": 2e-2, "width": 8, "loss": "dice"}, max_epochs=6)
    assert metrics.compute()["mean_iou"] < 0.1
    assert reached > 0.2, reached
    assert dataset.test.times_opened == 0


@pytest.mark.real_data
def test_pasted_clothes_are_the_same_each_time_and_their_masks_show_what_was_pasted() -> None:
    first, again = (load_pasted_clothes(find_data_dir(), num_images=40) for _ in range(2))
    train: Any = first.train
    test: Any = first.test.open()

    assert torch.equal(train.inputs, again.train.inputs)  # type: ignore[arg-type]
    assert torch.equal(train.targets, again.train.targets)  # type: ignore[arg-type]
    assert all(len(mask.unique()) == 2 for mask in train.targets)  # the background and one piece
    assert (train.targets > 0).float().mean() < 0.4  # it has 400 of 1024 pixels at most
    assert len(test) == 8
    assert not torch.equal(test.inputs, train.inputs[:8])


@pytest.mark.parametrize("size", [(32, 32), (37, 50)])
def test_a_unet_gives_a_class_for_each_pixel_of_images_of_any_size(size: tuple[int, int]) -> None:
    spec = DataSpec((3, *size), ("a", "b"), "segmentation")
    assert unet(spec, width=4, depth=3)(torch.rand(2, 3, *size)).shape == (2, 2, *size)


def test_a_unet_that_halves_an_image_to_nothing_is_refused() -> None:
    with pytest.raises(HpoError, match="depth=5 is not allowed: it halves images of 16x16 pixels to nothing"):
        unet(DataSpec((3, 16, 16), ("a", "b"), "segmentation"), depth=5)


# --- photos with a table ----------------------------------------------------------------------------------------------


def photos(folder: Path) -> pd.DataFrame:
    """Photos of noise with up to three coloured corners, and what each shows."""
    random, rows = np.random.RandomState(0), []
    (folder / "deep").mkdir()
    for number in range(NUM_PHOTOS):
        image = random.randint(0, 60, (48, 48, 3))
        shown = random.rand(3) < 0.5
        for channel, there in enumerate(shown):
            image[24 * (channel // 2) :, 24 * (channel % 2) :, channel][:24, :24] += 180 * there
        name = f"deep/{number}.png" if number % 2 else f"{number}.png"
        Image.fromarray(image.astype(np.uint8)).save(folder / name)
        rows.append([name, *shown.astype(int)])
    return pd.DataFrame(rows, columns=["file", *COLOURS])


def written(frame: pd.DataFrame, folder: Path) -> Path:
    frame.to_csv(folder / "labels.csv", index=False)
    return folder


SMALL = ("architecture=resnet18", "weights=none", "image_size=32", "backbone_lr_factor=1", "augment=none")


def test_photos_with_several_labels_are_learned(tmp_path: Path) -> None:
    folder = written(photos(tmp_path), tmp_path)
    task = load_task("image_folder").narrow(SMALL).suited_to_data(folder)
    splits = split_dataset(task.dataset, seed=0)

    assert (splits.spec.kind, splits.spec.classes) == ("multilabel", COLOURS)
    assert (task.objective.loss, task.objective.metric) == ("binary_cross_entropy", "f1")
    assert trained(task, splits, {}, max_epochs=5) > 0.9  # all labels for each photo have an F1 of 0.67


def test_a_table_of_photos_may_hold_numbers_or_a_class(tmp_path: Path) -> None:
    frame = photos(tmp_path)
    frame["width"], frame["height"] = frame["red"] * 1.5, frame["green"] - 0.25
    frame["colour"] = np.where(frame["blue"] == 1, "blue", "none of it")
    written(frame, tmp_path)

    numbers = load_image_folder(tmp_path, label="width,height")
    assert numbers.spec.kind == "regression"
    assert numbers.spec.num_outputs == 2
    assert load_image_folder(tmp_path, label="colour").classes == ("blue", "none of it")
    assert load_image_folder(tmp_path, label="red").spec.kind == "classification"
    assert load_image_folder(tmp_path, label="red", kind="number").spec.kind == "regression"
    assert [len(numbers.train), len(numbers.test)] == [96, 24]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    written(frame.assign(file=[str(tmp_path / name) for name in frame["file"]]), elsewhere)
    assert load_image_folder(elsewhere, label="colour").classes == ("blue", "none of it")
    for image, values in zip(numbers.train.inputs[:20], numbers.train.targets[:20].tolist(), strict=True):
        assert (image[0].float().mean() > 60) == (values[0] > 0)  # each photo has its own row


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda f: f, {"label": "reed"}, "no column 'reed'; did you mean 'red'"),
        (lambda f: f[["file"]], {}, "must have a column of file names and one or more of labels, but has file alone"),
        (
            lambda f: f.assign(file=["gone.png", *f["file"][1:]]),
            {},
            "names 'gone.png', which is not in .*; 1 photos",
        ),
        (
            lambda f: f.assign(blue=["much", *f["blue"][1:]]),
            {},
            "column 'blue' of .* holds 'much': several columns must",
        ),
        (lambda f: f.assign(blue=["", *f["blue"][1:]]), {}, "row 1 has no value in 'blue'; leave it out"),
        (
            lambda f: f.assign(blue=0),
            {},
            "fewer than three photos have the label 'blue' \\(0\\); leave it out of label=",
        ),
        (lambda f: pd.concat([f, f[:2]]), {}, "names .*png' more than once, as it does 2 of its photos; leave one row"),
        (lambda f: f.assign(blue=1), {"label": "blue"}, "has only the value '1', so there is nothing to learn"),
        (lambda f: f, {"kind": "class"}, "kind=class is for one column, but .* has 3: name it with label="),
    ],
)
def test_a_table_of_photos_that_cannot_be_learned_is_told_in_one_line(
    change: Any, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = written(change(photos(tmp_path)), tmp_path)
    with pytest.raises(HpoError, match=message) as told:
        load_image_folder(folder, **options)
    assert "\n" not in str(told.value)


def test_a_column_without_its_table_is_told(tmp_path: Path) -> None:
    with pytest.raises(HpoError, match=r"label=tree names a column, but .*labels\.csv is missing"):
        load_image_folder(tmp_path, label="tree")
