"""Inputs and targets as strangers have them: converted where nothing has to be guessed, refused where it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from hpo.data.datasets import hold_out, split_dataset
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.data.fingerprint import data_fingerprint
from hpo.data.parts import Ragged
from hpo.errors import DataError

LABELS = torch.arange(60) % 3
NAMES = np.array(["ash", "beech", "cedar"])
FEATURES = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))


def data_of(targets: Any, classes: Any = ("ash", "beech", "cedar"), inputs: Any = FEATURES, **given: Any) -> Dataset:
    """The first 40 examples for training, and the others as the test split."""
    train, test = Split(inputs[:40], targets[:40]), Split(inputs[40:], targets[40:])
    return Dataset(train, SealedSplit(lambda: test, 20), classes, **given)


@pytest.mark.parametrize(
    "targets",
    [
        LABELS.int(),
        LABELS.to(torch.uint8),
        LABELS.double(),
        LABELS + 1,
        (LABELS + 1).to(torch.int16),
        LABELS.numpy(),
        LABELS.numpy().astype(">i4"),
        LABELS.tolist(),
        NAMES[LABELS],
        NAMES[LABELS].astype(object),
        NAMES[LABELS].tolist(),
        pd.Series(NAMES[LABELS]),
        pd.Series(LABELS.numpy() + 1),
    ],
    ids=lambda targets: f"{type(targets).__name__} {getattr(targets, 'dtype', '')}",
)
def test_labels_of_any_type_are_indices_of_the_classes(targets: Any) -> None:
    for data in (data_of(targets), hold_out(FEATURES, targets, ("ash", "beech", "cedar"))):
        found = torch.cat([data.train.targets, data.test.open().targets])  # type: ignore[list-item]
        assert found.dtype == torch.int64
        assert found.bincount().tolist() == [20, 20, 20]
        assert (data.spec.kind, data.spec.classes) == ("classification", ("ash", "beech", "cedar"))
        assert data.test.times_opened == 1
        split_dataset(data, seed=0)
    assert torch.equal(data_of(targets).test.open().targets, LABELS[40:])  # type: ignore[arg-type]


def test_names_and_truth_values_say_which_classes_there_are() -> None:
    named = data_of(NAMES[2 - LABELS], classes=())
    assert named.classes == ("ash", "beech", "cedar")
    assert torch.equal(named.train.targets, 2 - LABELS[:40])  # type: ignore[arg-type]
    truth = data_of(LABELS == 1, classes=())
    assert truth.classes == ("false", "true")
    assert torch.equal(truth.test.open().targets, (LABELS[40:] == 1).long())  # type: ignore[arg-type]
    several = data_of(LABELS == 1, classes=("no", "yes"))
    assert several.classes == ("no", "yes")
    both = Dataset(
        Split(FEATURES, {"tree": NAMES[LABELS], "height": FEATURES[:, 0].double()}),  # type: ignore[dict-item]
        SealedSplit(lambda: Split(FEATURES, {}), 60),
        kind={"tree": "classification", "height": "regression"},
    )
    assert both.spec.targets["tree"].classes == ("ash", "beech", "cedar")
    assert both.train.targets["height"].dtype == torch.float32  # type: ignore[call-overload, index]


@pytest.mark.parametrize("inputs", [FEATURES.double(), FEATURES.numpy(), pd.DataFrame(FEATURES.numpy().astype(float))])
def test_features_are_floats_of_32_bits(inputs: Any) -> None:
    data = data_of(LABELS, inputs=inputs)
    assert data.spec.only_input.dtype == "float32"
    found = torch.cat([data.train.inputs, data.test.open().inputs])  # type: ignore[list-item]
    assert torch.equal(found, FEATURES)


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint32, torch.uint64, torch.bfloat16])
def test_inputs_of_a_type_that_torch_hardly_supports_become_those_of_a_usual_one(dtype: torch.dtype) -> None:
    whole = (10 * FEATURES).abs().round()
    data = data_of(LABELS, inputs=whole.to(dtype))
    found = torch.cat([data.train.inputs, data.test.open().inputs])  # type: ignore[list-item]
    assert found.dtype in (torch.int32, torch.int64, torch.float32)
    assert torch.equal(found.float(), whole)
    assert data_fingerprint(data)
    sequences = Ragged(whole.flatten().to(dtype), torch.full((len(whole),), whole.shape[1]))
    assert hold_out(sequences, LABELS, tuple(NAMES)).train.inputs.dtype == found.dtype  # type: ignore[union-attr]


def test_numbers_are_floats_where_a_kind_says_so_and_nothing_is_guessed_else() -> None:
    counts = data_of(LABELS * 10, classes=(), kind="regression")
    assert counts.train.targets.dtype == torch.float32  # type: ignore[union-attr]
    with pytest.raises(DataError, match="or name the classes"):
        split_dataset(data_of(LABELS * 10, classes=()), seed=0)
    with pytest.raises(DataError, match="the targets are from 1 to 4; 4 classes have the indices from 0"):
        split_dataset(data_of(torch.where(LABELS == 2, 4, LABELS + 1), classes="abcd"), seed=0)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (np.array(["ash", "oak"] * 30), "the target 'oak' is not one of the classes ash, beech, cedar"),
        (
            np.array(["ash", None] * 30, dtype=object),
            "the target of example 1 is None, but others are",
        ),
        (LABELS + 0.5, "targets must be the classes' indices"),
        (LABELS + 2, "the targets are from 2 to 4; 3 classes have the indices from 0"),
    ],
)
def test_what_would_have_to_be_guessed_is_refused(targets: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_dataset(data_of(targets), seed=0)


def test_what_needs_no_conversion_stays_the_same_object() -> None:
    train = Split(FEATURES, LABELS)
    test = SealedSplit(lambda: train, 60)
    data = Dataset(train, test, ("a", "b", "c"))
    assert data.train is train
    assert data.test is test
    assert isinstance(data.train.targets, Tensor)
