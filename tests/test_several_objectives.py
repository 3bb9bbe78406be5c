"""Several objectives: a metric and what a model costs, from the study to the models on the Pareto front."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import studies
from hypothesis import given
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from rich.console import Console

import hpo
from hpo.config import COSTS, Direction
from hpo.errors import StudyMismatchError, UsageError
from hpo.parameters import Choice, Float, Int
from hpo.plots.study import plot_front
from hpo.records import EndState, pareto_front
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.strategies import STRATEGIES
from hpo.search.study import Study
from hpo.session.clean import clean_study
from hpo.session.options import checked
from hpo.session.request import agree, this_machine
from hpo.session.search import run_search
from hpo.space import Group, Space
from hpo.terminal.facts import best_facts, study_facts
from hpo.terminal.tables import print_outcome, print_study
from hpo.tracking.store import open_store
from hpo.training.costs import measure_costs

SPACE = Space(
    Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2)),
    Group("architecture", depth=Int(1, 20, default=8), norm=Choice("none", "batch", default="none")),
)
SETTINGS = replace(studies.SETTINGS, space=SPACE, planned_trials=40, objectives=("val/accuracy", "params"))


# --- the front --------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), max_size=12))
def test_the_front_is_what_no_other_trial_beats(points: list[tuple[int, ...]]) -> None:
    front = pareto_front(dict(enumerate(points)))

    def is_beaten(number: int) -> bool:
        return any(
            all(one <= own for one, own in zip(other, points[number], strict=True))
            and (other != points[number] or earlier < number)
            for earlier, other in enumerate(points)
            if earlier != number
        )

    assert sorted(front) == [number for number in range(len(points)) if not is_beaten(number)]
    assert [points[number] for number in front] == sorted(points[number] for number in front)


@given(st.lists(st.tuples(st.integers(0, 4)), min_size=1, max_size=12))
def test_with_one_objective_the_front_is_the_best_trial(points: list[tuple[int]]) -> None:
    assert pareto_front(dict(enumerate(points))) == [points.index(min(points))]


def test_of_trials_with_the_same_metric_the_one_that_costs_less_wins() -> None:
    study = Study.open(InMemoryStorage(), "s", SETTINGS)
    ends: list[tuple[EndState, float | None]] = [("complete", 500.0), ("pruned", None), ("complete", 100.0)]
    for state, params in ends:
        number = study.ask().number
        study.report(number, 1, 0.9)
        study.tell(number, state, value=0.9, best_epoch=1, costs={"params": params} if params else {})

    best = study.best()
    assert best is not None
    assert best.number == 2
    assert [trial.number for trial in study.front()] == [2]


# --- the study --------------------------------------------------------------------------------------------------------


def run_trials(study: Study, count: int) -> None:
    """Deep models are better up to a depth of 10, and cost more; every fifth trial diverges."""
    for _ in range(count):
        suggestion = study.ask()
        depth = int(suggestion.values["depth"])
        accuracy = 0.9 - (depth - 10) ** 2 / 200 - (math.log10(float(suggestion.values["lr"])) + 2) ** 2 / 10
        for epoch in (1, 2):
            assert study.report(suggestion.number, epoch, accuracy - 0.1 / epoch) is False
        if suggestion.number % 5 == 4:
            study.tell(suggestion.number, "diverged", best_epoch=2, reason="not finite")
        else:
            costs = {"params": 100.0 * depth}
            study.tell(suggestion.number, "complete", value=accuracy - 0.05, best_epoch=2, costs=costs)


@pytest.mark.parametrize("strategy", [strategy for strategy in STRATEGIES if strategy != "cmaes"])
def test_every_strategy_searches_for_several_objectives(strategy: str) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, strategy=strategy))

    run_trials(study, 25)

    trials = study.trials()
    assert (study.counts()["complete"], study.counts()["diverged"]) == (20, 5)
    assert {trial.number for trial in study._optuna.best_trials} >= {trial.number for trial in study.front()}
    assert study.front()[0] == study.best()
    assert all(trial.costs == {"params": 100.0 * trial.values["depth"]} for trial in trials if trial.number % 5 != 4)
    assert [trial.costs for trial in trials if trial.state == "diverged"] == [{}] * 5
    assert list(trials[0].curve) == [1, 2]


def test_priority_opens_its_groups_in_stages_with_several_objectives_too() -> None:
    study = Study.open(InMemoryStorage(), "s", SETTINGS)

    run_trials(study, 13)

    staged = [trial for trial in study.trials() if trial.stage == "step size"]
    assert [trial.number for trial in staged] == [2, 4]
    assert all(trial.values["depth"] == SPACE.defaults()["depth"] for trial in staged)


def test_an_interrupted_trial_keeps_its_curve(tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "s", SETTINGS)
    first = study.ask()
    study.report(first.number, 1, 0.5)
    study.tell(first.number, "interrupted")

    study = Study.open(open_storage(tmp_path), "s", SETTINGS)
    again = study.ask()
    study.report(again.number, 1, 0.9)
    study.report(again.number, 2, 0.6)
    study.tell(again.number, "complete", value=0.6, best_epoch=2, costs={"params": 7.0})

    (record,) = Study.load(open_storage(tmp_path), "s").trials()
    assert (again.attempt, record.curve, record.value, record.costs) == (2, {1: 0.5, 2: 0.6}, 0.6, {"params": 7.0})


def test_a_study_from_before_there_were_several_objectives_is_read() -> None:
    stored = json.loads(json.dumps(replace(SETTINGS, objectives=()).to_dict()))
    del stored["objectives"]

    assert StudySettings.from_dict(stored).costs == ()
    assert StudySettings.from_dict(json.loads(json.dumps(SETTINGS.to_dict()))).objectives == SETTINGS.objectives


@pytest.mark.parametrize(
    ("made", "asked", "message"),
    [
        (("val/accuracy", "params"), (), "--objective val/accuracy params, not none"),
        ((), ("val/accuracy", "params"), "no --objective, not val/accuracy params"),
        (("val/accuracy", "params"), ("val/accuracy", "latency"), "params, not val/accuracy latency"),
    ],
)
def test_other_objectives_under_the_same_name_are_refused(
    made: tuple[str, ...], asked: tuple[str, ...], message: str
) -> None:
    storage = InMemoryStorage()
    Study.open(storage, "s", replace(SETTINGS, objectives=made))

    with pytest.raises(StudyMismatchError, match=message):
        Study.open(storage, "s", replace(SETTINGS, objectives=asked))


# --- costs ------------------------------------------------------------------------------------------------------------


def test_params_are_the_trainable_parameters() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)

    assert measure_costs(model, torch.zeros(1, 3), ["params"]) == {"params": 3 * 4 + 4 * 2 + 2}


def test_latency_is_in_milliseconds_of_one_pass_without_gradients() -> None:
    class Slow(torch.nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert not torch.is_grad_enabled()
            assert len(inputs) == 1
            time.sleep(0.003)
            return inputs

    assert 3 <= measure_costs(Slow().eval(), torch.zeros(1, 3), ["latency"])["latency"] < 1000


def test_every_cost_can_be_measured_and_asking_for_none_measures_none() -> None:
    assert measure_costs(torch.nn.Linear(3, 4), torch.zeros(1, 3), COSTS).keys() == set(COSTS)
    assert measure_costs(torch.nn.Linear(3, 4), torch.zeros(1, 3), ()) == {}


def test_the_first_objective_names_the_metric_where_none_was_given(home: Path) -> None:
    _, _, settings = agree(this_machine(checked({"home": home})), "digits", {"objectives": ("val/f1", "latency")})

    assert (settings.metric, settings.objectives) == ("f1", ("val/f1", "latency"))


# --- a search ---------------------------------------------------------------------------------------------------------


@pytest.mark.figures
def test_a_search_gives_a_front_whose_models_can_all_be_loaded(home: Path) -> None:
    options: dict[str, Any] = {"home": home, "epochs": 1, "workers": 1, "keep": 1, "strategy": "random"}
    outcome = run_search("digits", trials=6, objectives=("val/accuracy", "params", "latency"), **options)

    console = Console(record=True, width=300, file=StringIO())
    print_outcome(console, outcome)
    print_study(console, study_facts("digits", home))
    text = console.export_text()
    assert "Pareto front" in text
    assert "digits: accuracy (maximize) and params (minimize) and latency (minimize), strategy" in text

    study = Study.load(open_storage(home), "digits")
    front = {trial.number: trial for trial in study.front()}
    assert len(front) > 1
    assert outcome.winner is not None
    assert outcome.winner.trial == next(iter(front))
    store = open_store(home)
    for trial in study.trials():
        run = store.client.get_run(store.find_trial_run("digits", trial.number))
        assert {name: run.data.metrics[f"cost/{name}"] for name in ("params", "latency")} == trial.costs
        assert (run.data.tags.get("hpo.front") == "yes") == (trial.number in front)
        is_kept = "checkpoint/best.pt" in store.file_sizes(run.info.run_id, "checkpoint")
        assert is_kept == (trial.number in front or trial.number == 0), "the winner is compared with the default"
    for number, trial in front.items():
        model = hpo.load_best("digits", home=home, trial=number)
        assert sum(parameter.numel() for parameter in model.parameters()) == trial.costs["params"]
    with pytest.raises(UsageError, match="study 'digits' has no trial 99"):
        hpo.load_best("digits", home=home, trial=99)

    assert clean_study("digits", home=home, keep=1, dry_run=True)["removed"] == []
    assert [row["trial"] for row in best_facts("digits", home)["front"]] == list(front)
    (experiment,) = store.client.search_experiments(filter_string="name = 'hpo/digits'")
    columns = json.loads(experiment.tags["mlflow.sharedViewState.hpo"])["selectedColumns"]
    assert {"metrics.`cost/params`", "metrics.`cost/latency`", "tags.`hpo.front`"} <= set(columns)
    (summary,) = store.client.search_runs([experiment.experiment_id], "tags.`hpo.kind` = 'study'")
    plots = {file.path for file in store.client.list_artifacts(summary.info.run_id, "plots")}
    assert "plots/pareto_front.png" in plots
    written = json.loads(Path(store.client.download_artifacts(summary.info.run_id, "front.json")).read_text())
    assert written["front"] == best_facts("digits", home)["front"]
    # The same command goes on, with what it had: its objectives and without a pruner.
    assert run_search("digits", trials=6, **options).winner == outcome.winner


@pytest.mark.parametrize("costs", [("params",), ("params", "latency")])
def test_the_front_is_drawn_against_each_cost(costs: tuple[str, ...], tmp_path: Path) -> None:
    study = Study.open(InMemoryStorage(), "s", replace(SETTINGS, objectives=("val/accuracy", *costs)))
    for value in (0.5, 0.7):
        number = study.ask().number
        study.tell(number, "complete", value=value, best_epoch=1, costs=dict.fromkeys(costs, 10.0 * (number + 1)))
    front = [trial.number for trial in study.front()]

    figure = plot_front(study.trials(), front, metric="accuracy", direction=Direction.MAXIMIZE, costs=costs)

    figure.savefig(tmp_path / "front.png")
    assert [axes.get_xlabel().split()[0] for axes in figure.axes] == list(costs)
    assert all({text.get_text() for text in axes.texts} == {"0", "1"} for axes in figure.axes)
