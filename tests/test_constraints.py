"""What a model may cost: a configuration that costs more is not trained, and the search learns from it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.studies import SETTINGS
from optuna.storages import InMemoryStorage

from hpo.cli import cli
from hpo.errors import HpoError, UsageError
from hpo.parameters import Float
from hpo.search.study import Study
from hpo.session.search import run_search
from hpo.space import Group, Space
from hpo.tracking.store import open_store

OVERRIDES = ("depth=1", "width=16:256", "norm=none", "optimizer=sgd", "schedule=constant")


def num_params(width: int) -> int:
    """Of an MLP with one hidden layer for 64 pixels and ten digits."""
    return 64 * width + width + 10 * width + 10


def test_a_model_that_costs_more_is_not_trained_and_never_wins(home: Path) -> None:
    settings: dict[str, Any] = {"home": home, "overrides": OVERRIDES, "epochs": 2, "workers": 2, "strategy": "random"}
    outcome = run_search("digits", trials=10, constraints=("params<=6000",), **settings)

    trials = {trial.number: trial for trial in outcome.trials}
    too_large = {number for number, trial in trials.items() if num_params(trial.values["width"]) > 6000}
    assert too_large
    assert {number for number, trial in trials.items() if trial.state == "infeasible"} == too_large
    assert all(not trials[number].curve and trials[number].attempts == 1 for number in too_large)
    assert outcome.winner is not None
    assert outcome.winner.trial not in too_large
    assert (outcome.is_done, outcome.counts["infeasible"]) == (True, len(too_large))
    one = min(too_large)
    assert trials[one].reason == f"params is {num_params(trials[one].values['width'])}, above 6000"
    runs = open_store(home).client.search_runs(["1"], f"tags.`hpo.trial` = '{one}'")
    assert [(run.info.status, run.data.tags["hpo.state"]) for run in runs] == [("FINISHED", "infeasible")]

    with pytest.raises(HpoError, match="made with --constraint params<=6000, not params<=7000"):
        run_search("digits", trials=11, constraints=("params<=7000",), **settings)
    assert run_search("digits", trials=11, **settings).is_done, "the study keeps them"


@pytest.mark.parametrize("folds", [None, 3])
def test_where_each_model_costs_too_much_there_is_no_winner_and_it_says_so(home: Path, folds: int | None) -> None:
    options = ["--home", str(home), "--trials", "2", "--workers", "1", "--constraint", "latency<=1e-6"]
    options += ["--folds", str(folds)] if folds else []
    result = CliRunner().invoke(cli, ["search", "digits", *options])
    assert result.exit_code == 1
    assert "Done: 2 infeasible." in result.output
    assert "Each model costs more than --constraint allows, so there is no winner: " in result.output


@pytest.mark.parametrize("strategy", ["priority", "tpe"])
def test_a_strategy_learns_where_models_are_small_enough(strategy: str) -> None:
    """The larger the better, and half of the space is too large."""
    space = Space(Group("size", x=Float(0.0, 1.0, default=0.2), y=Float(0.0, 1.0, default=0.2)))
    changes: dict[str, Any] = {"max_epochs": 1, "planned_trials": 60, "constraints": ("params<=5e6",)}
    settings = replace(SETTINGS, space=space, strategy=strategy, **changes)
    study = Study.open(InMemoryStorage(), "toy", settings)
    for _ in range(60):
        suggestion = study.ask()
        x = float(suggestion.values["x"])
        if x > 0.5:
            study.tell(suggestion.number, "infeasible", reason="params is 6e6, above 5e6")
            continue
        study.report(suggestion.number, 1, x)
        study.tell(suggestion.number, "complete", value=x, best_epoch=1)
    late = study.trials()[30:]
    assert sum(trial.state == "infeasible" for trial in late) < len(late) / 2
    best = study.best()
    assert best is not None
    assert best.state == "complete"
    assert best.value is not None
    assert best.value > 0.4


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (
            ["params<5e6"],
            "--constraint must be NAME<=NUMBER with a number above 0, such as params<=5e6; not 'params<5e6'.",
        ),
        (["params<=-1"], "--constraint must be NAME<=NUMBER with a number above 0"),
        (["flops<=1e9"], "no cost 'flops'. Available: params, latency. (--constraint flops<=1e9)"),
        (["params<=1", "params<=2"], "--constraint params is given twice; leave one out."),
    ],
)
def test_a_wrong_constraint_is_one_line_before_any_work(tmp_path: Path, constraints: list[str], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        run_search("digits", home=tmp_path / "home", constraints=constraints)
    assert str(refused.value).startswith(message)
    assert not (tmp_path / "home").exists()
