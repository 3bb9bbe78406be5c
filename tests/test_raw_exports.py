"""Models for tables and texts leave the house with their preprocessing: they take rows and texts without hpo."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_wine

from hpo import load_best, load_table, load_texts, run_search, split_dataset
from hpo.data import values
from hpo.data.parts import Ragged
from hpo.deploy.exported import VALUES, encode
from hpo.deploy.predict import find_files, predict_files
from hpo.session.export import export_best


def wine(folder: Path) -> Path:
    """A table with numbers, a category and missing values."""
    frame = load_wine(as_frame=True).frame
    frame["maker"] = np.where(frame["alcohol"] > 13, "north", "south")
    frame.loc[::7, "ash"] = np.nan
    frame["target"] = frame["target"].map({0: "a", 1: "b", 2: "c"})
    frame.to_csv(folder / "wine.csv", index=False)
    return folder / "wine.csv"


def test_an_export_encodes_rows_as_training_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = wine(tmp_path)
    preprocessing = split_dataset(load_table(path, label="target"), seed=0).spec.preprocessing
    monkeypatch.setitem(sys.modules, VALUES, values)  # beside the loader, in an export
    frame = pd.read_csv(path)
    found = encode(json.loads(json.dumps(preprocessing.to_dict())), frame)
    expected = preprocessing.encode(frame)
    assert isinstance(expected, dict)
    assert found.keys() == expected.keys() == {"numbers", "categories"}
    assert all(np.array_equal(found[name], expected[name].numpy()) for name in found)
    with pytest.raises(ValueError, match="the rows lack the column 'ash'; the model takes"):
        encode(preprocessing.to_dict(), frame.drop(columns="ash"))


def test_an_export_encodes_texts_as_training_did(tmp_path: Path) -> None:
    texts = [f"{adjective} {noun}" for adjective in ("good", "bad", "warm") for noun in ("soup", "soup and bread") * 5]
    frame = pd.DataFrame({"text": texts, "label": ["a", "b"] * 15})
    frame.to_csv(tmp_path / "texts.csv", index=False)
    preprocessing = split_dataset(load_texts(tmp_path / "texts.csv"), seed=0).spec.preprocessing
    found = encode(json.loads(json.dumps(preprocessing.to_dict())), frame)
    expected = preprocessing.encode(frame)
    assert isinstance(expected, Ragged)
    padded = expected.padded(slice(None), slice(None))
    assert np.array_equal(found["values"], padded.values.numpy())
    assert np.array_equal(found["lengths"], padded.lengths.numpy())
    with pytest.raises(ValueError, match="a text is empty"):
        encode(preprocessing.to_dict(), pd.DataFrame({"text": ["good", ""]}))


THEN = """
import json, sys
print(json.dumps([each["prediction"] for each in answers]))
assert "hpo" not in sys.modules
"""
REFUSED = """
try:
    model.predict(rows.drop(columns="ash"))
except mlflow.exceptions.MlflowException as error:
    print(error.message)
"""


def test_a_model_for_a_table_takes_rows_in_mlflow_and_in_hpo_predict(tmp_path: Path, home: Path) -> None:
    path = wine(tmp_path)
    run_search(
        "table", trials=1, epochs=3, workers=1, home=home, data_dir=path, data_options=("label=target",), confirm="none"
    )
    done = export_best("table", format="mlflow", home=home)  # which knows where the data lie
    assert done.difference is not None
    assert done.difference <= 1e-5
    few = tmp_path / "few.csv"
    pd.read_csv(path).drop(columns="target").tail(20).to_csv(few, index=False)
    model = load_best("table", home=home)
    asked = [
        each.prediction for batch in predict_files(model, find_files([few], model.spec), batch_size=8) for each in batch
    ]
    assert asked == model.predict(pd.read_csv(few))
    for folder in (done.folder, export_best("table", format="pt2", home=home).folder):
        shutil.copy(few, folder / "new.csv")
        (code,) = re.findall(r"^```python\n(.*?)^```", (folder / "MODEL_CARD.md").read_text(), re.MULTILINE | re.DOTALL)
        code += THEN + (REFUSED if folder == done.folder else "")
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [sys.executable, "-Bc", code]
        shown = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=environment, check=False, timeout=200
        )
        assert shown.returncode == 0, shown.stderr
        said, *refused = shown.stdout.splitlines()
        assert json.loads(said) == asked
        if folder == done.folder:
            assert "the rows lack the column 'ash'; the model takes alcohol" in refused[0]
