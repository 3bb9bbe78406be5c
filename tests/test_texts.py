"""The task `text_folder`: texts in folders and tables, their tokenizer, and what is given wrong."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pandas as pd
import pytest
import torch

from hpo import DataSpec, HpoError, Ragged, UsageError, find_data_dir, load_best, load_texts, run_search, split_dataset
from hpo.data.texts import TextPreprocessing
from hpo.models.preprocessed import build_model
from hpo.plugins import load_task
from hpo.training.trainer import fit

KINDS = ("animal", "food", "person", "plant")


def definitions(num_each: int) -> pd.DataFrame:
    """WordNet's definitions of words of four kinds, in the order of the file."""
    lines = (find_data_dir() / "wordnet" / "glosses.tsv").read_text(encoding="utf-8").splitlines()
    frame = pd.DataFrame([line.split("\t") for line in lines], columns=["kind", "definition"])
    return frame[frame["kind"].isin(KINDS)].groupby("kind").head(num_each)


def found(path: Path, **options: Any) -> tuple[Any, TextPreprocessing]:
    splits = split_dataset(load_texts(path, **options), seed=0)
    preprocessing = splits.spec.preprocessing
    assert isinstance(preprocessing, TextPreprocessing)
    return splits, preprocessing


def folder_of(tmp_path: Path, texts: dict[str, list[str]]) -> Path:
    for name, each in texts.items():
        (tmp_path / name).mkdir(parents=True)
        for number, text in enumerate(each):
            (tmp_path / name / f"{number:03}.txt").write_text(text, encoding="utf-8")
    return tmp_path


ANIMALS = {"cat": [f"a small cat number {n}" for n in range(20)], "dog": [f"the big dog of {n}" for n in range(20)]}


@pytest.mark.real_data
def test_a_search_learns_definitions_and_its_model_takes_strings(tmp_path: Path, home: Path) -> None:
    frame = definitions(150)
    path = tmp_path / "definitions.csv"
    frame.to_csv(path, index=False)
    outcome = run_search(
        "text_folder", data_dir=path, data_options={"text": "definition", "label": "kind", "vocabulary": 2000},
        trials=1, epochs=6, workers=1, device="cpu", home=home,
    )  # fmt: skip

    assert outcome.winner is not None
    assert outcome.winner.test is not None
    assert outcome.winner.test["accuracy"] > 0.7  # by chance 0.25
    model = load_best("text_folder", home=home)
    new = [
        "any of various trees that bear edible nuts",
        "small bird or fish of tropical America having long tail feathers",
        "a soup made of beans and meat",
    ]
    assert model.predict(new) == ["plant", "animal", "food"]
    assert model.predict(pd.DataFrame({"definition": new})) == model.predict(new)
    assert model.probabilities(new).shape == (3, 4)


@pytest.mark.real_data
@pytest.mark.parametrize("network", ["transformer", "convnet1d"])
def test_the_other_networks_learn_definitions_too(network: str, tmp_path: Path) -> None:
    frame = definitions(300)
    path = tmp_path / "definitions.tsv"
    frame.to_csv(path, index=False, header=False, sep="\t", quoting=3)
    task = load_task("text_folder").with_data_options({"columns": "label,text"}).suited_to_data(path)
    splits = split_dataset(task.dataset, seed=0)
    values = task.space.active(task.space.defaults()) | {"network": network, "lr": 1e-3}
    model = build_model(task.objective, splits.spec, task.model_parameters(values), seed=0)
    *_, last = fit(model, splits, task.train_config(values, max_epochs=8, schedule="constant"))

    assert last.best_value is not None
    assert last.best_value > 0.7


def test_the_tokenizer_knows_the_training_split_alone_and_is_the_same_each_time(tmp_path: Path) -> None:
    random = Random(0)
    words = ["".join(random.choices("abcdefghijklmnop", k=8)) for _ in range(60)]
    path = folder_of(tmp_path, {"one": [f"{w} {w}" for w in words[:30]], "two": [f"{w}, {w}" for w in words[30:]]})
    splits, preprocessing = found(path)
    again, repeated = found(path)

    assert preprocessing.tokenizer == repeated.tokenizer
    assert torch.equal(splits.train.inputs.values, again.train.inputs.values)
    is_one_token = [len(preprocessing.encode([word]).values) == 1 for word in words]
    assert sum(is_one_token) == len(splits.train) == 38  # 60 less 12 for the test and 10 for validation


def test_a_character_that_no_training_text_has_is_unknown_and_case_does_not_count(tmp_path: Path) -> None:
    _, preprocessing = found(folder_of(tmp_path, ANIMALS))
    encoded = preprocessing.encode(["A SMALL cat", "a small cat", "☃ cat"])

    first, second, third = torch.split(encoded.values, encoded.lengths.tolist())
    assert torch.equal(first, second)
    assert third[0] == 1
    assert encoded.dtype == torch.int64


def test_a_text_is_cut_and_preprocessing_survives_json(tmp_path: Path) -> None:
    splits, preprocessing = found(folder_of(tmp_path, ANIMALS), max_length=3)
    again = DataSpec.from_dict(json.loads(json.dumps(splits.spec.to_dict())))

    assert splits.train.inputs.lengths.max() == 3
    assert "texts are cut after 3" in preprocessing.describe()
    assert again.preprocessing is not None
    encoded = again.preprocessing.encode(["the big dog"])
    assert isinstance(encoded, Ragged)
    assert torch.equal(encoded.values, preprocessing.encode(["the big dog"]).values)


def test_a_folder_with_test_texts_is_the_test_split(tmp_path: Path) -> None:
    folder_of(tmp_path / "train", ANIMALS)
    folder_of(tmp_path / "test", {"cat": ["one cat"] * 3, "dog": ["one dog"] * 2})
    dataset = load_texts(tmp_path)
    splits = split_dataset(dataset, seed=0)
    test = dataset.test_for(splits.spec)

    assert (len(test), dataset.classes) == (5, ("cat", "dog"))
    test.open().require_like(splits.spec)


def csv_of(frame: dict[str, list[Any]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        pd.DataFrame(frame).to_csv(folder / "texts.csv", index=False)
        return folder / "texts.csv"

    return make


def undecodable(folder: Path) -> Path:
    folder_of(folder, ANIMALS)
    (folder / "cat" / "bad.txt").write_bytes(b"caf\xe9")
    return folder


TEXTS = ["some words"] * 30
WRONG: dict[str, tuple[Callable[[Path], Path], dict[str, Any], str]] = {
    "an empty file": (lambda f: folder_of(f, ANIMALS | {"fox": ["a fox", " \n"]}), {}, "fox/001.txt is empty; leave"),
    "a file that is no text": (undecodable, {}, "bad.txt cannot be read .*it must be a text in UTF-8"),
    "a class without texts": (lambda f: folder_of(f, ANIMALS | {"fox": []}), {}, r"class 'fox' .* has no texts \("),
    "one class": (lambda f: folder_of(f, {"cat": ANIMALS["cat"]}), {}, "has only the value 'cat'"),
    "an empty text in a table": (
        csv_of({"text": [*TEXTS[1:], " "], "label": ["a", "b"] * 15}),
        {},
        "the text of row 30 is empty, as 1 in all are; leave them out",
    ),
    "no such column of texts": (csv_of({"words": TEXTS, "label": TEXTS}), {}, r"no column 'text'.*--data-option text="),
    "no such label": (csv_of({"text": TEXTS, "labels": TEXTS}), {}, "no column 'label'; did you mean 'labels'"),
    "no such file": (lambda f: f / "gone.csv", {}, "there is no file .*gone.csv; name a"),
    "a vocabulary of nothing": (lambda f: folder_of(f, ANIMALS), {"vocabulary": 0}, "vocabulary=0 is not allowed"),
    "no length": (lambda f: folder_of(f, ANIMALS), {"max_length": 0}, "max_length=0 is not allowed"),
    "a label of the test alone": (
        lambda f: folder_of(f, {f"train/{name}": each for name, each in ANIMALS.items()} | {"test/fox": ["a fox"]}),
        {},
        "fox is not a class of the training texts",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_texts_that_cannot_be_learned_are_told_in_one_line(case: str, tmp_path: Path) -> None:
    make, options, message = WRONG[case]
    with pytest.raises(HpoError, match=message) as told:
        found(make(tmp_path), **options)
    assert "\n" not in str(told.value)


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"need the library tokenizers: pip install 'hpo-torch\[text\]'"):
        load_texts(folder_of(tmp_path, ANIMALS))


def test_an_empty_text_is_refused_by_a_model(tmp_path: Path) -> None:
    _, preprocessing = found(folder_of(tmp_path, ANIMALS))
    with pytest.raises(UsageError, match="text 1 is empty; leave it out"):
        preprocessing.encode(["a cat", " "])
