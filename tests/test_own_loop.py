"""Training loops of a task's own: what they are promised, and what they are told when they break the rules."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hpo
from hpo.cli import cli
from hpo.config import TrainConfig
from hpo.execution.observer import Observer
from hpo.imports import import_module
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.tracking.store import open_store
from hpo.training.loop import RunningTrial, run_loop

EXAMPLE = Path(__file__).parent.parent / "examples" / "own_loop.py"
PLAIN = hpo.Space(hpo.Group("step size", lr=hpo.Float(1e-3, 1.0, log=True, default=0.1)))


class AtEpoch(Observer):
    """Does something once, while the coordinator handles the result of an epoch of trial 0."""

    def __init__(self, epoch: int, act: Callable[[], None]) -> None:
        self._epoch, self._act = epoch, act
        self.has_acted = False

    def epoch_done(self, suggestion: Any, result: Any) -> None:
        if suggestion.number == 0 and result.epoch == self._epoch and not self.has_acted:
            self.has_acted = True
            self._act()


def kill_the_workers() -> None:
    for worker in multiprocessing.active_children():
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)


def example_module() -> ModuleType:
    hpo.plugins.load_objective(str(EXAMPLE))
    return import_module("hpo_task_own_loop")


def trials_of(home: Path, study: str = "own_loop") -> list[Any]:
    return Study.load(open_storage(home), study).trials()


def curves_in_mlflow(home: Path, study: str, number: int) -> list[int]:
    store = open_store(home)
    run = store.find_trial_run(study, number, Study.load(open_storage(home), study).id)
    return [metric.step for metric in store.client.get_metric_history(run, "val/accuracy")]


def test_the_example_resumes_after_kill_9_and_its_best_model_is_tested_once_and_loads(home: Path) -> None:
    killing = AtEpoch(3, kill_the_workers)
    outcome = hpo.run_search(str(EXAMPLE), home=home, trials=6, workers=1, observer=killing)
    assert killing.has_acted
    trials = trials_of(home)
    assert (trials[0].state, trials[0].attempts) == ("complete", 2)
    assert list(trials[0].curve) == curves_in_mlflow(home, "own_loop", 0) == list(range(1, 11))
    assert "pruned" in {trial.state for trial in trials}

    winner, example = outcome.winner, example_module()
    assert winner is not None
    assert winner.num_test_readings == 1
    model = example.build(winner.configuration["width"])
    model.load_state_dict(hpo.load_best("own_loop", home=home))
    assert example.accuracy(model, example.VALIDATION) == pytest.approx(winner.validation)
    assert example.accuracy(model, example.TEST) == pytest.approx(winner.test["accuracy"])


def test_an_interrupted_loop_continues_where_it_was_with_the_same_command(home: Path) -> None:
    def press_ctrl_c() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    first = hpo.run_search(str(EXAMPLE), home=home, trials=1, workers=1, observer=AtEpoch(4, press_ctrl_c))
    assert first.interrupted
    again = AtEpoch(1, lambda: None)
    assert hpo.run_search(str(EXAMPLE), home=home, trials=1, workers=1, observer=again).is_done
    assert not again.has_acted, "epoch 1 was not trained again"
    assert curves_in_mlflow(home, "own_loop", 0) == list(range(1, 11))


MOODS = """
import hpo


def train(trial):
    mood = trial.parameters["mood"]
    if mood == "raises":
        raise RuntimeError("the cat is on the keyboard")
    for epoch in range(1, trial.max_epochs + 1):
        metrics = {"train/loss": 1.0 if mood == "forgets" else 0.5, "f1 of cats": 0.5 + epoch / 10}
        if mood == "diverges" and epoch == 2:
            metrics["f1 of cats"] = float("nan")
        if mood == "forgets":
            del metrics["f1 of cats"]
        if not trial.report(epoch, metrics):
            return


objective = hpo.Objective(
    name="moody", description="a loop with moods", train=train, metric="f1 of cats", direction="maximize",
    settings={"max_epochs": 3},
    space=hpo.Space(hpo.Group("all", mood=hpo.Choice("calm", "diverges", "raises", "forgets", default="calm"))),
)
"""


def test_each_trial_ends_as_its_loop_did_and_a_loop_without_model_and_test_is_no_failure(
    home: Path, tmp_path: Path
) -> None:
    task = tmp_path / "moody.py"
    task.write_text(MOODS)
    outcome = hpo.run_search(str(task), home=home, strategy="grid", pruner="none", workers=1)
    found = {trial.values["mood"]: (trial.state, trial.reason) for trial in trials_of(home, "moody")}
    assert found == {
        "calm": ("complete", None),
        "diverges": ("diverged", "f1 of cats was not finite in epoch 2"),
        "raises": ("failed", "RuntimeError: the cat is on the keyboard (moody.py:8)"),
        "forgets": (
            "failed",
            "UsageError: epoch 1 was reported without 'f1 of cats', the metric of task 'moody', but with 'train/loss'. "
            "(moody.py:15)",
        ),
    }
    assert outcome.winner is not None
    assert (outcome.winner.validation, outcome.winner.test) == (0.8, None)
    told = CliRunner().invoke(cli, ["best", "moody", "--home", str(home)]).output
    assert "none: the task's Objective has no test=" in told
    with pytest.raises(hpo.UsageError, match="its training loop saved no model: it did not call"):
        hpo.load_best("moody", home=home)


class Killed(BaseException):
    """Stands for the end of a process."""


def reads_in_processes(trial: hpo.Trial) -> None:
    loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=4, num_workers=1)
    trial.report(1, {"accuracy": float(sum(batch.sum() for (batch,) in loader))})


def test_a_loop_may_read_its_data_in_processes_of_its_own(home: Path) -> None:
    objective = loop_objective(reads_in_processes)
    outcome = hpo.run_search(objective, home=home, trials=1, workers=1)
    assert outcome.winner is not None
    assert outcome.winner.validation == 28


def loop_objective(train: Callable[[hpo.Trial], None], **fields: Any) -> hpo.Objective:
    return hpo.Objective(
        **{"name": "x", "description": "", "train": train, "direction": "maximize", "space": PLAIN, **fields}
    )


def attempt(
    train: Callable[[hpo.Trial], None], folder: Path, *, dies_in: int | None = None, stops_in: int = 99
) -> tuple[RunningTrial, list[Any]]:
    """One attempt at a trial, and what it reported."""
    told = []

    def report(result: Any) -> bool:
        told.append(result)
        if result.epoch == dies_in:
            raise Killed
        return result.epoch < stops_in

    config = TrainConfig(max_epochs=5, seed=2**62)
    trial = RunningTrial(loop_objective(train), 0, {"lr": 0.1}, config, folder, report)
    try:
        run_loop(trial)
    except Killed:
        assert dies_in is not None
    return trial, told


def test_the_best_model_is_that_of_the_best_epoch_over_all_attempts(tmp_path: Path) -> None:
    values = [0.1, 0.9, 0.3, 0.2, 0.4]

    def train(trial: hpo.Trial) -> None:
        assert 0 <= trial.seed < 2**31
        state = trial.resume() or {"epoch": 0}
        for epoch in range(state["epoch"] + 1, trial.max_epochs + 1):
            trial.save_model({"weight": torch.tensor(float(epoch)), "name": "linear"})
            go_on = trial.report(epoch, {"accuracy": torch.tensor(values[epoch - 1])})  # type: ignore[dict-item]
            trial.save({"epoch": epoch})
            if not go_on:
                return

    _, first = attempt(train, tmp_path, dies_in=3)  # before it saved epoch 3
    trial, second = attempt(train, tmp_path)
    assert [result.epoch for result in first] == [1, 2, 3]
    # The last result is repeated; epoch 3 is trained again and keeps what it had.
    assert [result.epoch for result in second] == [3, 3, 4, 5]
    assert {result.best_epoch for result in second} == {2}
    assert trial.conclude()
    assert hpo.training.checkpoint.load_weights(
        tmp_path / "best.pt", hpo.training.trained.TrialDescription.read(tmp_path).weights_sha256
    ) == {"weight": torch.tensor(2.0), "name": "linear"}
    assert not [result for result in second if result.settled or result.symptoms]


def test_a_trial_whose_every_epoch_was_reported_is_not_trained_again(tmp_path: Path) -> None:
    starts = []

    def train(trial: hpo.Trial) -> None:
        starts.append(trial.number)
        for epoch in range(1, trial.max_epochs + 1):
            trial.report(epoch, {"accuracy": 0.5})

    attempt(train, tmp_path, dies_in=5)
    trial, told = attempt(train, tmp_path)
    assert len(starts) == 1
    assert [result.epoch for result in told] == [5]
    assert not trial.conclude(), "it has no model"


def reports(*epochs: Any, metrics: Any = None) -> Callable[[hpo.Trial], None]:
    def train(trial: hpo.Trial) -> None:
        for epoch in epochs:
            trial.report(epoch, {"accuracy": 0.5} if metrics is None else metrics)

    return train


def saves(state: Any) -> Callable[[hpo.Trial], None]:
    return lambda trial: trial.save(state)


def saves_model_too_late(trial: hpo.Trial) -> None:
    trial.report(1, {"accuracy": 0.5})
    trial.save_model(nn.Linear(1, 1))


def saves_model_sometimes(trial: hpo.Trial) -> None:
    trial.save_model(nn.Linear(1, 1))
    trial.report(1, {"accuracy": 0.5})
    trial.report(2, {"accuracy": 0.6})


def saves_a_class(trial: hpo.Trial) -> None:
    trial.save_model({"model": Path()})
    trial.report(1, {"accuracy": 0.5})


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (reports(2), "epoch 2 was reported as the first one: report each epoch once and in order"),
        (reports(1, 3), "epoch 3 was reported after epoch 1: report each epoch once and in order"),
        (reports(1, 1), "epoch 1 was reported after epoch 1"),
        (reports(0), "epoch 0 cannot be reported: epochs go from 1 to trial.max_epochs, here 5"),
        (reports(1, 2, 3, 4, 5, 6), "epoch 6 cannot be reported"),
        (reports("one"), "takes the number of an epoch first, not 'one'"),
        (reports(), "returned without a result: call trial.report"),
        (
            reports(1, metrics={"loss": 1.0}),
            "epoch 1 was reported without 'accuracy', the metric of task 'x', but with",
        ),
        (reports(1, metrics={"accuracy": "high"}), "metric 'accuracy' must be a number, not a str"),
        (reports(1, metrics={"accuracy": 1, "a?": 1}), "a metric cannot be named 'a\\?'"),
        (reports(1, metrics=0.5), "takes a dictionary of metrics after the epoch, not a float"),
        (saves({"model": Path()}), "trial.save takes tensors and plain values .*: .*Path"),
        (saves(1), "trial.save takes a dictionary of tensors and plain values, not a int"),
        (saves_a_class, "trial.save_model takes tensors and plain values .*: .*Path"),
        (saves_model_too_late, "epoch 1 was reported before its model was saved"),
        (saves_model_sometimes, "epoch 2 was reported before its model was saved"),
        (lambda trial: trial.save_model(3), "save_model takes a module or a dictionary of tensors, not a int"),
    ],
)
def test_what_breaks_a_rule_is_reported_in_one_line(train: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(hpo.UsageError, match=told) as raised:
        attempt(train, tmp_path)
    assert "\n" not in str(raised.value)


def test_a_loop_that_continues_after_it_was_stopped_is_reported(tmp_path: Path) -> None:
    with pytest.raises(hpo.UsageError, match=r"continued to epoch 3 after trial.report returned False"):
        attempt(reports(1, 2, 3), tmp_path, stops_in=2)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"direction": None}, 'direction="maximize" or direction="minimize", not None'),
        ({"direction": "up"}, "not 'up'"),
        ({"model": lambda spec: None}, "both train= and model=; its loop reads its own data"),
        ({"metric": "f1?"}, "metric 'f1\\?' of task 'x' may have letters, digits"),
        ({"settings": {"patience": 3}}, "may only have max_epochs, not patience"),
        ({"train": None}, "needs load= and model=, or a training loop of its own"),
    ],
)
def test_an_objective_says_what_its_loop_needs(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(hpo.UsageError, match=told):
        loop_objective(**{"train": reports(1), **fields})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"folds": 3}, "--folds 3 is for the shared trainer"),
        ({"fixed": ["patience=3"]}, "--set patience=3 is for"),
        ({"metric": "f1"}, "--metric f1 is for"),
        ({"objectives": ["params"]}, "--objective params is for"),
        ({"deterministic": True}, "--deterministic is for the shared trainer, and task 'own_loop' has a training loop"),
        ({"overrides": ["seed=1"]}, "seed cannot be searched; give --seed"),
    ],
)
def test_options_of_the_shared_trainer_are_refused(options: dict[str, Any], told: str, home: Path) -> None:
    with pytest.raises(hpo.UsageError, match=told):
        hpo.run_search(str(EXAMPLE), home=home, **options)


def test_check_runs_the_loop_and_says_that_it_neither_resumes_nor_repeats_itself(home: Path, tmp_path: Path) -> None:
    def states(task: Path) -> dict[str, str]:
        shown = CliRunner().invoke(cli, ["check", str(task), "--home", str(home), "--json"])
        return {verdict["check"]: verdict["state"] for verdict in json.loads(shown.stdout)["verdicts"]}

    assert states(EXAMPLE) == dict.fromkeys(("report", "model", "resume", "seed"), "ok")
    careless = tmp_path / "careless.py"

    careless.write_text(MOODS.replace("0.5 + epoch", "__import__('time').time() + epoch"))
    assert states(careless) == {"report": "ok", "model": "warning", "resume": "warning", "seed": "warning"}
    careless.write_text(MOODS.replace('if mood == "raises"', "if True"))
    assert states(careless) == {"loop": "wrong"}
