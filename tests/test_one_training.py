"""One training without a study, a trial that is run again, and results that leave hpo as text."""

from __future__ import annotations

import csv
import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from hpo.objectives.digits import load

import hpo
from hpo.cli import cli
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session.rerun import rerun_trial
from hpo.session.training import train_once
from hpo.tracking.store import open_store

EXAMPLE = str(Path(__file__).parent.parent / "examples" / "own_loop.py")


def invoke(home: Path, *words: object) -> Result:
    return CliRunner().invoke(cli, [*map(str, words), "--home", str(home)], catch_exceptions=False)


def facts(home: Path, *words: object) -> Any:
    return json.loads(invoke(home, *words, "--json").stdout)


def trials(home: Path, study: str = "digits") -> list[Any]:
    return Study.load(open_storage(home), study).trials()


def test_a_trial_is_equal_in_every_bit_when_it_is_run_again_or_trained_alone(home: Path) -> None:
    hpo.run_search("digits", home=home, trials=1, epochs=2, workers=2)
    before = trials(home)
    again = facts(home, "rerun", "digits", "--trial", 0)
    assert (again["is_equal"], again["is_same_seed"], again["changes"]) == (True, True, [])
    assert "Equal in every bit" in invoke(home, "rerun", "digits", "--trial", 0).stdout
    options = shlex.split(invoke(home, "best", "digits", "--as-options").stdout)
    trained = facts(home, "train", "digits", "--epochs", 2, *options)
    assert trained["configuration"] == before[0].values
    assert trained["curve"] == pytest.approx({str(epoch): value for epoch, value in before[0].curve.items()}, abs=0.02)
    assert trials(home) == before, "the study has not changed"

    model = hpo.load_run(trained["run_id"], task="digits", home=home)
    assert model.predict(load(Path()).train.inputs[:1])[0] in model.classes
    run = open_store(home).client.get_run(trained["run_id"])
    assert (run.info.status, run.data.tags["hpo.kind"]) == ("FINISHED", "training")
    assert run.data.metrics["best/accuracy"] == pytest.approx(trained["best_value"])


def test_another_seed_gives_a_difference_with_an_interval(home: Path) -> None:
    hpo.run_search("digits", home=home, trials=1, epochs=2, workers=1)
    told = invoke(home, "rerun", "digits", "--trial", 0, "--seed", 5).stdout
    assert "The curves differ from step 1 (seed 5); the difference is" in told
    found = rerun_trial("digits", trial=0, seed=5, home=home)
    assert found.difference is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.difference <= found.high
    assert found.is_within_spread == (found.low <= 0 <= found.high)


def test_folds_and_own_loops_are_run_again_and_a_change_of_the_source_is_named(home: Path, tmp_path: Path) -> None:
    hpo.run_search("digits", home=home, study="folds", trials=1, epochs=1, folds=2, workers=1)
    found = rerun_trial("folds", trial=0, home=home)
    assert found.is_equal
    assert found.value == found.earlier_value

    task = tmp_path / "own.py"
    task.write_text(Path(EXAMPLE).read_text())
    hpo.run_search(str(task), home=home, trials=1, epochs=2, workers=1)
    assert rerun_trial("own_loop", trial=0, home=home).is_equal
    task.write_text(Path(EXAMPLE).read_text().replace("momentum=0.9", "momentum=0.8"))
    found = rerun_trial("own_loop", trial=0, home=home)
    assert (found.first_difference, found.is_within_spread, found.changes) == (1, None, ["own.py"])
    assert found.difference == pytest.approx((found.value or 0) - (found.earlier_value or 0))


def test_an_own_loop_is_trained_once_and_what_it_raises_is_reported(home: Path, tmp_path: Path) -> None:
    trained = train_once(EXAMPLE, overrides=("lr=0.2",), epochs=2, home=home)
    assert (sorted(trained.curve), trained.configuration["lr"], trained.has_model) == ([1, 2], 0.2, True)
    assert isinstance(hpo.load_run(trained.run_id, task=EXAMPLE, home=home)["0.weight"], torch.Tensor)

    task = tmp_path / "broken.py"
    task.write_text(Path(EXAMPLE).read_text().replace("model, epoch = build", "raise ValueError('no')\n    x = build"))
    with pytest.raises(hpo.SearchError, match="the training failed: ValueError: no"):
        train_once(str(task), home=home)
    client = open_store(home).client
    experiment = client.get_experiment_by_name("hpo/own_loop")
    assert {run.info.status for run in client.search_runs([experiment.experiment_id])} == {"FINISHED", "FAILED"}


def test_what_a_training_or_a_rerun_cannot_do_is_reported_before_anything_is_written(home: Path) -> None:
    with pytest.raises(hpo.UsageError, match=r"-p lr=0.01:0.1 is more than one value; .* give -p lr=VALUE"):
        train_once("digits", overrides=("lr=0.01:0.1",), home=home)
    with pytest.raises(hpo.UsageError, match="--epochs 0 is not allowed: it must be at least 1"):
        train_once("digits", epochs=0, home=home)
    with pytest.raises(hpo.UsageError, match=r"--limit 5 is for the shared trainer"):
        train_once(EXAMPLE, limit=5, home=home)
    with pytest.raises(hpo.UnknownNameError, match="no study 'digits'"):
        rerun_trial("digits", trial=0, home=home)
    assert not (home / "optuna.db").exists()


def test_csv_yaml_and_options_hold_all_digits(home: Path) -> None:
    hpo.run_search("digits", home=home, trials=3, epochs=1, workers=1, overrides=("weight_decay=1e-6:2e-5",))
    rows = list(csv.DictReader(io.StringIO(invoke(home, "show", "digits", "--csv").stdout)))
    for row, trial in zip(rows, trials(home), strict=True):
        assert (int(row["number"]), row["state"], float(row["accuracy"])) == (trial.number, trial.state, trial.value)
        shown = {name: row[name] for name in trial.values}
        assert {name for name, text in shown.items() if not text} == set(trial.inactive)
        assert float(shown["lr"]) == trial.values["lr"]
    winner = facts(home, "best", "digits")["winner"]["configuration"]
    assert yaml.safe_load(invoke(home, "best", "digits", "--yaml").stdout) == winner
    options = shlex.split(invoke(home, "best", "digits", "--as-options").stdout)[1::2]
    assert dict(option.split("=") for option in options) == {name: str(value) for name, value in winner.items()}
    told = CliRunner().invoke(cli, ["best", "digits", "--yaml", "--json", "--home", str(home)]).exception
    assert "--yaml, --as-options and --json cannot be combined" in str(told)
