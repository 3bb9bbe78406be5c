"""The task `table`: what is found in a CSV or Parquet file, what is learned from it, and what is given wrong."""

from __future__ import annotations

import csv
import itertools
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import r2_score

from hpo import DataSpec, HpoError, hold_out, load_best, load_table, run_search, split_dataset
from hpo.checks.table_models import BOOSTED, LINEAR, is_table, table_scores
from hpo.cli import cli
from hpo.data.examples import Split
from hpo.data.fingerprint import data_fingerprint
from hpo.data.labels import read_labels
from hpo.data.parts import named_parts
from hpo.data.rows import read_rows
from hpo.data.tables import Column, TablePreprocessing
from hpo.data.values import category_texts, encode_table
from hpo.errors import DataError


def diabetes() -> pd.DataFrame:
    """442 patients; `target` is the progression of their disease."""
    return load_diabetes(scaled=False, as_frame=True).frame


def messy() -> pd.DataFrame:
    """The same as such tables come: an ID, a date, words for numbers, a constant, and values that are missing."""
    frame, random = diabetes(), np.random.RandomState(0)
    frame.insert(0, "patient", [f"P{number:04}" for number in range(len(frame))])
    frame["row_id"] = np.arange(len(frame)) + 1000
    frame["seen"] = pd.Timestamp("2020-01-01") + pd.to_timedelta(frame.pop("age"), unit="D")
    frame["sex"] = np.where(frame["sex"] == 1, "female", "male")
    frame["pressure"] = pd.cut(frame.pop("bp"), [0, 85, 95, 105, 200], labels=["low", "normal", "raised", "high"])
    frame["hospital"] = "north"
    frame["pressure"] = frame["pressure"].astype(object).where(random.rand(len(frame)) > 0.1, None)
    frame["bmi"] = frame["bmi"].where(random.rand(len(frame)) > 0.1)
    return frame


def written(frame: pd.DataFrame, path: Path) -> Path:
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_csv(path, index=False)
    return path


def found(path: Path, label: str = "target", **options: Any) -> tuple[Any, TablePreprocessing]:
    splits = split_dataset(load_table(path, label=label, **options), seed=0)
    preprocessing = splits.spec.preprocessing
    assert isinstance(preprocessing, TablePreprocessing)
    return splits, preprocessing


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_what_a_column_holds_is_found_and_what_is_of_no_use_is_left_out(tmp_path: Path, suffix: str) -> None:
    splits, preprocessing = found(written(messy(), tmp_path / f"patients{suffix}"))

    kinds = {column.name: column.kind for column in preprocessing.columns}
    assert kinds == dict.fromkeys(["bmi", "s1", "s2", "s3", "s4", "s5", "s6"], "number") | {
        "sex": "category",
        "seen": "date",
        "pressure": "category",
    }
    assert {name: why.split()[0] for name, why in preprocessing.left_out.items()} == {
        "patient": "282", "row_id": "its", "hospital": "it",
    }  # fmt: skip
    assert [column.name for column in preprocessing.columns if column.has_missing] == ["bmi", "pressure"]
    assert splits.train.inputs["numbers"].shape == (282, 9)  # seven, the date, and where bmi is missing
    assert splits.spec.inputs["categories"].categories == (4, 6)  # the names, "missing" and "other"


def test_medians_and_categories_are_those_of_the_training_split_alone(tmp_path: Path) -> None:
    frame = diabetes().assign(place="town", other="x")
    path = tmp_path / "patients.csv"
    splits, _ = found(written(frame, path))
    train = torch.isin(torch.tensor(frame["target"].to_numpy()).float(), splits.train.targets).numpy()
    values = torch.tensor(frame["bmi"].to_numpy())
    # What is changed below is in no training row, so the splits stay the same.
    frame.loc[~train, "place"] = "village"
    frame.loc[~train, "bmi"] = 1000.0
    frame.loc[frame.index[train][:40], "place"] = "city"
    splits, preprocessing = found(written(frame, path))

    columns = {column.name: column for column in preprocessing.columns}
    assert columns["place"].categories == ("city", "town")
    assert columns["bmi"].center < 40 < float(values.max())
    _, categories = named_parts(splits.validation.inputs).values()
    assert 0 in categories.unique().tolist()  # a village is what no training row had


def test_a_search_tells_what_other_models_reach_and_its_model_takes_rows_as_they_came(
    tmp_path: Path, home: Path
) -> None:
    frame = messy()
    path = written(frame, tmp_path / "patients.csv")
    outcome = run_search(
        "table", data_dir=path, data_options={"label": "target"}, trials=1, workers=1, epochs=30, device="cpu",
        home=home,
    )  # fmt: skip

    assert outcome.winner is not None
    assert outcome.winner.metric == "r2"
    assert outcome.winner.validation > 0.35
    _, preprocessing = found(path)
    scores = {LINEAR: pytest.approx(0.38, abs=0.1), BOOSTED: pytest.approx(0.38, abs=0.12)}
    baselines = outcome.winner.baselines
    assert baselines is not None
    assert (baselines["metric"], baselines["scores"]) == ("r2", scores)
    assert outcome.winner.test is not None
    against = baselines["test"]
    assert against["low"] < against["gain"] < against["high"]
    assert against["num_examples"] == 89
    shown = CliRunner().invoke(cli, ["best", "table", "--home", str(home)]).output
    assert "Baselines" in shown
    assert "r2 on the same splits: a linear model 0." in shown

    model = load_best("table", home=home)
    assert model.spec.preprocessing == preprocessing
    predicted = model.predict(pd.read_csv(path))
    assert r2_score(frame["target"], predicted) > 0.4
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert model.predict(rows) == pytest.approx(predicted, abs=1e-3)
    shuffled = frame[sorted(frame.columns)].drop(columns="target")
    assert model.predict(shuffled) == pytest.approx(predicted, abs=1e-3)
    unknown = shuffled.head(2).assign(pressure=["unheard of", None], bmi=[None, "?"])
    assert all(50 < value < 350 for value in model.predict(unknown))
    with pytest.raises(HpoError, match="the rows lack the column 'bmi'; the model takes sex, bmi, s1"):
        model.predict(shuffled.drop(columns="bmi"))


def test_rows_of_a_group_stay_together_and_an_order_puts_the_last_rows_into_validation_and_test(tmp_path: Path) -> None:
    frame = diabetes()
    frame["clinic"] = np.arange(len(frame)) % 30
    frame["seen"] = pd.Timestamp("2024-06-01") - pd.to_timedelta(np.arange(len(frame)), unit="D")  # the newest first
    path = written(frame, tmp_path / "patients.csv")

    dataset = load_table(path, label="target", group="clinic")
    splits = split_dataset(dataset, seed=0)
    preprocessing = splits.spec.preprocessing
    assert isinstance(preprocessing, TablePreprocessing)
    assert "clinic" in preprocessing.left_out
    clinics = {value: set(rows["clinic"]) for value, rows in frame.groupby("target")}

    def of(split: Split) -> set[int]:
        return set.union(*(clinics[value] for value in split.targets.tolist() if len(clinics[value]) == 1))

    parts = [of(part) for part in (splits.train, splits.validation, dataset.test.open())]
    assert [len(one & other) for one, other in itertools.combinations(parts, 2)] == [0, 0, 0]

    ordered = load_table(path, label="target", order="seen")
    assert ordered.test.open().targets.tolist() == frame["target"].iloc[88::-1].tolist()
    with pytest.raises(DataError, match="column 'sex' has values that are neither numbers nor dates, such as 'male'"):
        load_table(written(messy(), tmp_path / "messy.csv"), label="target", order="sex")


def test_the_models_that_are_no_networks_are_scikit_learns_on_the_same_splits(tmp_path: Path) -> None:
    splits, _ = found(written(messy(), tmp_path / "patients.csv"))

    def columns(split: Any) -> Any:
        return np.concatenate([part.numpy() for part in split.inputs.values()], axis=1)

    boosting = HistGradientBoostingRegressor(categorical_features=[False] * 9 + [True] * 2, random_state=0)
    boosting.fit(columns(splits.train), splits.train.targets.numpy())
    expected = r2_score(splits.validation.targets.numpy(), boosting.predict(columns(splits.validation)))
    assert table_scores(splits, "r2")[BOOSTED] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("load", "reached"), [(load_wine, 0.9), (load_breast_cancer, 0.9)])
def test_classes_are_told_from_numbers_by_the_column(tmp_path: Path, load: Callable[..., Any], reached: float) -> None:
    path = written(load(as_frame=True).frame, tmp_path / "table.csv")
    splits, preprocessing = found(path)

    assert splits.spec.classes == tuple(map(str, range(len(set(load().target)))))
    assert preprocessing.label.endswith("classes; --data-option kind=number overrides this")
    assert min(table_scores(splits, "accuracy").values()) > reached
    assert found(path, kind="number")[0].spec.kind == "regression"


def test_preprocessing_and_data_survive_json_and_a_change_of_a_value_is_noticed(tmp_path: Path) -> None:
    frame = messy()
    path = written(frame, tmp_path / "patients.csv")
    splits, preprocessing = found(path)
    again = DataSpec.from_dict(json.loads(json.dumps(splits.spec.to_dict())))

    assert again == splits.spec
    assert again.preprocessing is not None
    encoded: list[Any] = [each.encode(frame.head(9)) for each in (again.preprocessing, preprocessing)]
    assert encoded[0].keys() == {"numbers", "categories"}
    assert all(torch.equal(part, encoded[1][name]) for name, part in encoded[0].items())
    before = data_fingerprint(load_table(path, label="target"))
    frame["s1"] = frame["s1"] + 1
    assert data_fingerprint(load_table(written(frame, path), label="target")) != before


def test_a_test_table_beside_the_training_table_is_the_test_split(tmp_path: Path) -> None:
    frame = messy()
    written(frame[100:], tmp_path / "train.csv")
    written(frame[:100].sample(frac=1, axis=1, random_state=0), tmp_path / "test.csv")  # its columns in another order
    dataset = load_table(tmp_path, label="target")
    splits = split_dataset(dataset, seed=0)
    test = dataset.test_for(splits.spec).open()

    assert len(test) == 100
    assert test.targets.tolist() == frame["target"][:100].tolist()
    test.require_like(splits.spec)


def test_values_are_read_as_people_write_them() -> None:
    column = Column("city", "category", 0.0, True, ("3", "true", "york"))
    preprocessing = TablePreprocessing((column, Column("size", "number", 10.0)))
    cities = ["york", " york ", 3.0, "3", True, "TRUE", None, "oslo"]
    sizes = ["12", 1e1, "NA", None, "7.5", "?", 10, 10]
    rows = [{"city": city, "size": size} for city, size in zip(cities, sizes, strict=True)]
    parts = named_parts(preprocessing.encode(rows))

    assert parts["categories"].flatten().tolist() == [4, 4, 2, 2, 3, 3, 1, 0]
    assert parts["numbers"].flatten().tolist() == [2, 0, 0, 0, -2.5, 0, 0, 0]


def test_a_label_that_is_missing_leaves_its_row_out_and_text_among_numbers_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = diabetes().astype(object)
    frame.loc[:20, "target"] = None
    splits, preprocessing = found(written(frame, tmp_path / "patients.csv"))
    preprocessing.encode(frame.head(3).assign(bmi=["thin", 20, 30]))

    assert len(splits.train) + len(splits.validation) == (442 - 21) * 4 // 5
    assert "21 of 442 rows have no value in 'target' and are left out" in caplog.text
    assert "column 'bmi' holds 'thin', which is not a number; 1 such values count as missing" in caplog.text


WRONG: dict[str, tuple[Callable[[pd.DataFrame], pd.DataFrame], dict[str, str], str]] = {
    "no such column": (lambda f: f, {"label": "tarjet"}, "no column 'tarjet'; did you mean 'target'"),
    "no such column to ignore": (lambda f: f, {"ignore": "bmi,bpp"}, r"no column 'bpp'.*\(--data-option ignore="),
    "no such category": (lambda f: f, {"categories": "seks"}, r"no column 'seks'\. Available: age, sex, "),
    "no such kind": (lambda f: f, {"kind": "klass"}, "no kind of label 'klass'; did you mean 'class'"),
    "one class": (lambda f: f.assign(target="ill"), {}, "column 'target' has only the value 'ill'"),
    "a class in one row": (
        lambda f: f.assign(target=["a"] * 200 + ["b"] * 241 + ["c"]),
        {},
        r"has classes with one or two rows, too few for three splits: 'c' \(1\)\. Join",
    ),
    "two thousand classes": (
        lambda f: pd.DataFrame({"x": range(4000), "target": [f"c{n % 2000}" for n in range(4000)]}),
        {},
        "has 2000 classes, more than 1000; use --data-option another column as label=",
    ),
    "two thousand categories": (
        lambda f: pd.DataFrame({"zip": [f"z{n % 2000}" for n in range(9000)], "target": np.arange(9000) % 11 / 2}),
        {},
        "column 'zip' has [0-9]+ categories, more than 1000; group them, or leave it out with --data-option ignore=zip",
    ),
    "no label at all": (lambda f: f.assign(target=""), {}, "all rows lack a value in 'target'; name another column"),
    "a word among numbers": (
        lambda f: f.assign(target=["much", *f["target"][1:]]),
        {"kind": "number"},
        "holds 'much', which is not a number; leave such rows out, or use kind=class",
    ),
    "no column to learn from": (
        lambda f: f[["target"]].assign(same=1),
        {},
        r"no column to learn from \(same: it is constant\)",
    ),
    "a header alone": (lambda f: f.head(0), {}, "holds no rows; it must have a line with the names of the columns"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_table_that_cannot_be_learned_is_told_in_one_line(case: str, tmp_path: Path) -> None:
    change, options, message = WRONG[case]
    path = written(change(diabetes()), tmp_path / "patients.csv")

    with pytest.raises(HpoError, match=message) as told:
        found(path, **{"label": "target"} | options)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "gone.csv", "there is no file .*gone.csv; name a .csv, .tsv or .parquet file with"),
        (lambda folder: folder, "holds no .csv, .tsv or .parquet file; name the one for task 'table'"),
        (
            lambda folder: (folder / "a.csv").write_bytes(b"a,b\n1,\xff\xfe\n") and folder,
            "a.csv is not a text in UTF-8 .* save it as UTF-8",
        ),
        (lambda folder: (folder / "a.parquet").write_bytes(b"PAR") and folder, "a.parquet cannot be read"),
        (lambda folder: (folder / "a.csv").write_text("a,b\n1,2\n1,2,3\n") and folder, "a.csv: line 3 has 3 fields"),
        (
            lambda folder: (folder / "a.csv").write_text("a,b\n1,2,3\n1,2,3\n") and folder,
            "rows have 3 fields, and the f",
        ),
        (lambda folder: (folder / "a.csv").touch() or folder, "a.csv is empty; it must have a line"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_one_line(
    make: Callable[[Path], Path], message: str, tmp_path: Path
) -> None:
    with pytest.raises(HpoError, match=message) as told:
        load_table(make(tmp_path), label="b")
    assert "\n" not in str(told.value)


def test_two_tables_are_told_apart_by_the_user(tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(diabetes(), tmp_path / f"{name}.csv")
    with pytest.raises(HpoError, match=r"holds 2 \.csv, \.tsv or \.parquet files; name the one for task 'table'"):
        load_table(tmp_path, label="target")


def test_a_parquet_file_without_its_library_names_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(diabetes(), tmp_path / "patients.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(HpoError, match="needs the library pyarrow: pip install pyarrow, or save it as a CSV"):
        load_table(path, label="target")


def test_check_says_what_was_found_and_left_out(tmp_path: Path, home: Path) -> None:
    path = written(messy(), tmp_path / "patients.csv")
    options = ["--data-option", "label=target", "--data-option", "ignore=hospital", "--device", "cpu"]
    told = CliRunner().invoke(cli, ["check", "table", "--data-dir", str(path), "--home", str(home), *options]).output

    assert "target: a number; --data-option kind=class overrides this; 7 numbers (bmi, s1," in told
    assert "2 categories (sex 2, pressure 4); 1 date (seen); missing values in bmi, pressure" in told
    assert "left out: patient: 282 different texts in 282 rows look like an ID or a free text; row_id:" in told
    assert "hospital:" not in told
    assert "gradient boosting 0." in told


def test_rows_that_end_with_a_delimiter_keep_their_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("age,city\n20,Rome,\n30,Oslo,\n")
    assert read_rows(tmp_path / "t.csv").to_dict("list") == {"age": ["20", "30"], "city": ["Rome", "Oslo"]}


@pytest.mark.parametrize(("told", "expected"), [(["3", "3.0", "03"], "3"), (["0.50", ".5", "0.5"], "0.5")])
def test_a_number_is_one_category_however_it_is_written(told: list[str], expected: str) -> None:
    assert category_texts(pd.Series([*told, float(expected)], dtype=object)).tolist() == [expected] * (len(told) + 1)
    assert category_texts(pd.Series(["-0.0", "red", None])).tolist() == ["0", "red", pd.NA]


def test_a_date_in_another_form_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    column = Column("sold", "date", center=10.0)
    encoded = encode_table([column], pd.DataFrame({"sold": ["1970-01-21", "21.01.1970"]}))
    assert encoded["numbers"].tolist() == [[10.0], [0.0]]
    assert "column 'sold' holds '21.01.1970', which is not a date such as 2026-01-31; 1 such values" in caplog.text


@pytest.mark.parametrize("written_as", ["{:.2f} €", "{:.3f}", "{:.1f}%"])
def test_numbers_that_are_not_read_as_such_are_named(written_as: str, tmp_path: Path) -> None:
    frame = diabetes()
    frame["s1"] = [written_as.format(value + row / 7).replace(".", ",") for row, value in enumerate(frame["s1"])]
    _, preprocessing = found(written(frame, tmp_path / "patients.csv"))
    assert preprocessing.left_out["s1"].startswith("its texts look like numbers such as ")


def test_dates_that_are_not_read_as_such_are_named(tmp_path: Path) -> None:
    rows = [f"{day % 30 + 1:02}.{day % 12 + 1:02}.2024,{day / 4},{day % 7 + 0.5}" for day in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["sold,area,price", *rows]))
    preprocessing = split_dataset(load_table(tmp_path / "t.csv", label="price"), seed=0).spec.preprocessing
    assert isinstance(preprocessing, TablePreprocessing)
    ((name, why),) = preprocessing.not_used
    assert name == "sold"
    assert re.fullmatch(r"it looks like dates such as \d\d\.\d\d\.2024; write them as 2026-01-31 and .*", why)


def test_numbers_that_seven_digits_cannot_tell_apart_are_refused() -> None:
    with pytest.raises(DataError, match=r"holds numbers such as 1700000000 .*subtract a number from all of them first"):
        read_labels(
            pd.Series([f"{1_700_000_000 + each}" for each in range(100)]), "column 'y'", "number", "label", "drop"
        )


def test_token_ids_are_no_table_to_fit_a_linear_model_to() -> None:
    ids = torch.arange(200).reshape(50, 4) % 7
    few, many = (
        split_dataset(hold_out(ids, torch.arange(50) % 2, ("a", "b"), vocabulary=size), seed=0) for size in (7, 10**7)
    )
    assert is_table(few)
    assert not is_table(many)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_table_is_read_in_the_encoding_that_its_first_bytes_tell(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("naïve;größe\nä;1\nö;2\n".encode(encoding))
    assert read_rows(tmp_path / "t.csv").to_dict("list") == {"naïve": ["ä", "ö"], "größe": ["1", "2"]}


def test_a_table_in_another_encoding_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("name;größe\nä;1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"t\.csv is not a text in UTF-8 \(.* at byte \d+\); save it as UTF-8\."):
        read_rows(tmp_path / "t.csv")
