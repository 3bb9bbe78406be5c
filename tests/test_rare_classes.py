"""Data in which a class is rare: metrics, class weights, balanced sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import Line, line_splits, quick_config, regression_config
from PIL import Image
from torch import nn

from hpo.data.batches import TrainingBatches
from hpo.data.datasets import Splits, split_dataset
from hpo.data.examples import DataSpec, Split
from hpo.data.photos import load_image_folder
from hpo.data.tables import load_table
from hpo.data.texts import load_texts
from hpo.errors import DataError, UnknownNameError, UsageError
from hpo.training.trainer import fit


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
    generators: dict[str, Any] = {name: torch.Generator().manual_seed(seed) for name in ("order", "augmentation")}
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
    with pytest.raises(
        UsageError, match=f"{setting}='balanced' is for class.* this task (has a regression|does not have)"
    ):
        next(iter(fit(Line(3), line_splits(), regression_config(**{setting: "balanced"}))))


# --- Classes with one or two examples, in files of one's own


def write_table(folder: Path) -> Path:
    """Fifty rows of two classes, and one or two of three others."""
    labels = ["ash", "beech"] * 25 + ["cedar", "elm", "elm", "fir"]
    lines = [f"{name},{index % 7 + len(name) / 10}" for index, name in enumerate(labels)]
    (folder / "trees.csv").write_text("\n".join(["tree,height", *lines]))
    return folder / "trees.csv"


def test_a_table_with_rare_classes_is_refused_with_their_names_and_what_helps(tmp_path: Path) -> None:
    told = r"one or two rows, .*: 'cedar' \(1\), 'elm' \(2\), 'fir' \(1\)\. .* rare=drop .* or rare=train"
    with pytest.raises(DataError, match=told):
        load_table(write_table(tmp_path), label="tree")
    with pytest.raises(UnknownNameError, match="no way with rare classes 'trian'; did you mean 'train'"):
        load_table(write_table(tmp_path), label="tree", rare="trian")


def test_rare_classes_are_left_out_of_a_table_or_of_all_but_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dropped = load_table(write_table(tmp_path), label="tree", rare="drop")
    assert dropped.classes == ("ash", "beech")
    assert len(dropped.train) + len(dropped.test) == 50
    assert "left out: 'cedar' (1), 'elm' (2), 'fir' (1)" in caplog.text
    trained = load_table(write_table(tmp_path), label="tree", rare="train")
    assert trained.classes == ("ash", "beech", "cedar", "elm", "fir")
    splits = split_dataset(trained, seed=0)
    for targets in (splits.validation.targets, trained.test.open().targets):
        assert targets.max() == 1  # type: ignore[union-attr]
    assert splits.train.targets.bincount()[2:].tolist() == [1, 2, 1]  # type: ignore[union-attr]
    assert "no example of 'cedar' (1 for training), 'elm' (2 for training), 'fir' (1 for training)" in caplog.text


def test_rare_classes_of_photos_are_left_out_of_each_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for part, counts in {"train": {"ash": 4, "beech": 3, "cedar": 2}, "test": {"beech": 1, "cedar": 1}}.items():
        for name, count in counts.items():
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                Image.new("L", (8, 8), index).save(tmp_path / part / name / f"{index}.png")
    dataset = load_image_folder(tmp_path, side=8, rare="drop")
    assert dataset.classes == ("ash", "beech")
    assert dataset.train.targets.bincount().tolist() == [4, 3]  # type: ignore[union-attr]
    assert dataset.test.open().targets.tolist() == [1]  # type: ignore[union-attr]
    assert "with one or two photos are left out: 'cedar' (2)" in caplog.text


def test_rare_classes_of_texts_are_left_out(tmp_path: Path) -> None:
    rows = [f"{text} {index},{label}" for index in range(5) for text, label in (("a cat", "cat"), ("a dog", "dog"))]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows, "an eel,eel"]))
    assert load_texts(tmp_path, rare="drop").classes == ("cat", "dog")
