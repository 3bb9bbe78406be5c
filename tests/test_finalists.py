"""A winner has run to its end: who is never pruned, and who is continued when a search has its trials."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hpo.config import Direction
from hpo.execution.observer import Observer
from hpo.parameters import Float
from hpo.records import SearchOutcome, TrialRecord, TrialState
from hpo.search.finalists import MAX_FINALISTS, finalists, is_spared
from hpo.search.lease import Session
from hpo.search.priority import DEFAULT_CONFIGURATION, EVERYTHING, TRIED_BY_HAND
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.search.winner import find_winner
from hpo.session.search import run_search
from hpo.space import Group, Space
from hpo.terminal.facts import best_facts, study_facts
from hpo.terminal.tables import print_best, print_outcome, print_study
from hpo.tracking.store import open_store

SETTINGS = StudySettings(
    task="digits",
    space=Space(Group("step size", lr=Float(1e-3, 1.0, log=True, default=0.1))),
    seed=0,
    strategy="random",
    pruner="sha",
    max_epochs=10,
    metric="accuracy",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=4,
)


def record(number: int, state: TrialState, *curve: float, stage: str = EVERYTHING) -> TrialRecord:
    return TrialRecord(
        number=number,
        state=state,
        value=max(curve),
        values={},
        inactive=(),
        curve=dict(enumerate(curve, start=1)),
        best_epoch=1,
        stage=stage,
        reason=None,
    )


# --- who is never pruned ----------------------------------------------------------------------------------------------


def test_a_trial_continues_while_none_was_better_in_any_epoch() -> None:
    slow_winner = record(0, "complete", 0.5, 0.6, 0.9)

    assert not is_spared(record(1, "running", 0.8), [slow_winner], SETTINGS)
    assert is_spared(record(1, "running", 0.9), [slow_winner], SETTINGS)
    assert is_spared(record(1, "running", 0.95, 0.1), [slow_winner], SETTINGS), "its best epoch is what counts"
    assert not is_spared(record(1, "running", 0.1), [slow_winner], replace(SETTINGS, direction=Direction.MAXIMIZE))
    assert is_spared(record(1, "running", 0.1), [slow_winner], replace(SETTINGS, direction=Direction.MINIMIZE))


@pytest.mark.parametrize("stage", [DEFAULT_CONFIGURATION, TRIED_BY_HAND])
def test_what_the_user_asked_for_continues_until_another_was_better_by_the_same_epoch(stage: str) -> None:
    others = [record(2, "complete", 0.5, 0.6, 0.9), record(3, "diverged", 0.99), record(4, "failed", 0.99)]

    assert is_spared(record(1, "running", 0.55, stage=stage), others, SETTINGS)
    assert not is_spared(record(1, "running", 0.55, 0.58, stage=stage), others, SETTINGS)


def test_with_folds_means_over_the_same_folds_are_compared() -> None:
    folds = replace(SETTINGS, folds=3, pruner="wilcoxon")
    complete = record(0, "complete", 0.5, 0.9, 0.9)

    assert is_spared(record(1, "running", 0.6, 0.85), [complete], folds)
    assert not is_spared(record(1, "running", 0.6, 0.7), [complete], folds)


# --- who is continued -------------------------------------------------------------------------------------------------


def test_the_best_and_those_that_would_win_with_the_gains_of_others_are_continued_and_three_at_most() -> None:
    complete = record(0, "complete", 0.3, 0.5, 0.9)
    ahead = [record(number, "pruned", 0.3 + number / 100) for number in range(1, 6)]
    behind, best = record(6, "pruned", 0.3, 0.49), record(7, "pruned", 0.2, 0.95)

    assert finalists([complete, behind], SETTINGS) == []
    assert finalists([complete, behind, *ahead], SETTINGS) == ahead[::-1][:MAX_FINALISTS]
    assert finalists([complete, behind, *ahead, best], SETTINGS, num_continued=2) == [best]
    assert finalists([complete, *ahead], SETTINGS, num_continued=MAX_FINALISTS) == []
    assert finalists([complete, *ahead, best], SETTINGS, num_continued=MAX_FINALISTS) == [best], "a winner is finished"
    assert finalists([behind, *ahead[:1]], SETTINGS) == [behind, ahead[0]], "nothing is complete"
    late_riser = record(8, "complete", 0.1, 0.1, 0.8)
    assert finalists([complete, late_riser, behind], SETTINGS) == [behind], "0.49 and the 0.7 that it gained are enough"
    folds = replace(SETTINGS, folds=3, pruner="wilcoxon")
    assert finalists([complete, late_riser, record(9, "pruned", 0.3, 0.49)], folds) == []


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_a_continued_trial_keeps_its_number_and_its_curve_in_every_session_and_the_total_stays(
    database: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres").new_database() if database == "postgresql" else None
    study = Study.open(open_storage(tmp_path, url), "s", SETTINGS)
    for value in (0.5, 0.9, 0.4):
        suggestion = study.ask()
        study.report(suggestion.number, 1, value)
        study.tell(suggestion.number, "pruned" if value == 0.9 else "complete", value=value, reason="a reason")
    other_storage = open_storage(tmp_path, url)
    other = Study.load(other_storage, "s")
    assert other.trials()[1].state == "pruned", "another session has read it"
    study.remember_session(num_trials=3, task_reference="digits", tracking_uri=None)
    assert (study.remaining(3), study.is_done) == (0, False)

    with Session(other_storage, "s") as session:
        session.exclusively(other.continue_finalists)
        session.exclusively(other.continue_finalists)

    assert study.remaining(3) == other.remaining(3) == 1
    again = study.ask()
    assert (again.number, again.attempt, again.pruned) == (1, 2, "pruned after 1 of 10 epochs")
    assert not any(study.report(1, epoch, 0.1) for epoch in range(1, 10)), "it is not pruned again"
    study.tell(1, "complete", value=0.9, best_epoch=1)
    for seen in (study, other, Study.load(open_storage(tmp_path, url), "s")):
        trial = seen.trials()[1]
        assert (trial.number, trial.state, trial.value, trial.pruned_after) == (1, "complete", 0.9, 1)
        assert trial.reason is None
        assert trial.curve == {1: 0.9} | dict.fromkeys(range(2, 10), 0.1)
        assert [trial.number for trial in seen.trials()] == [0, 1, 2]
        assert (seen.is_done, seen.num_finished) == (True, 3)
    assert other.ask().number == 3


def test_before_the_search_is_done_every_output_says_that_the_best_trial_was_pruned(tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "s", SETTINGS)
    study.remember_session(num_trials=2, task_reference="digits", tracking_uri=None)
    for value in (0.5, 0.9):
        suggestion = study.ask()
        study.report(suggestion.number, 1, value)
        study.tell(suggestion.number, "pruned" if value == 0.9 else "complete", value=value)
    console = Console(record=True, width=200, file=StringIO())
    outcome = SearchOutcome(
        study="s",
        home=tmp_path,
        counts=study.counts(),
        num_trials=2,
        is_done=study.is_done,
        interrupted=False,
        winner=find_winner(study),
        to_continue=(1,),
    )

    print_outcome(console, outcome)
    print_best(console, best_facts("s", tmp_path))
    print_study(console, study_facts("s", tmp_path))

    said = console.export_text()
    assert said.count("trial 1, epoch 1, pruned after 1 of 10 epochs") == 2
    assert "Time is up: 1 complete, 1 pruned (pruned trials were stopped early to save epochs)." in said
    assert "same command again to finish: trial 1, pruned, may still win and is then continued to its end." in said
    assert "Trial 1, the best so far, was pruned after 1 of 10 epochs; it is continued when 2 trials have run." in said


# --- a real search ----------------------------------------------------------------------------------------------------

# The model adds to the target what its curve says for the epoch; it notes each epoch that is trained.
TASK = """
import os
import signal
from pathlib import Path

import torch

from hpo.objective import Objective
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.parameters import Choice, Float
from hpo.space import Group, Space

CURVES = {
    "winner so far": [0.9, 0.45, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1],
    "early": [0.5, 0.35, 0.34, 0.33, 0.32, 0.31, 0.3, 0.3, 0.3, 0.3],
    "doomed": [0.6, 0.4, 0.05, float("nan")],
    "late": [0.6, 0.4, 0.3, 0.2, 0.15, 0.12, 0.09, 0.08, 0.06, 0.05],
}


def load(data_dir):
    values = torch.linspace(-1, 1, 100)[:, None]
    split = Split(values, values[:, 0])
    return Dataset(split, SealedSplit(lambda: split, size=100))


class Scripted(torch.nn.Module):
    def __init__(self, curve):
        super().__init__()
        self.curve = curve
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("epoch", torch.tensor(0))

    def train(self, mode=True):
        if mode:
            self.epoch += 1
            with Path(__file__).with_name(f"{self.curve}.epochs").open("a") as file:
                file.write(f"{int(self.epoch)}\\n")
            to_kill = Path(__file__).with_name("kill-in-epoch-5")
            if int(self.epoch) == 5 and self.curve == "late" and to_kill.exists():
                to_kill.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().train(mode)

    def forward(self, inputs):
        offset = CURVES[self.curve][max(0, int(self.epoch) - 1)]
        return inputs[:, 0] * (1 + 1e-9 * self.weight) + offset


def model(spec, *, curve="winner so far"):
    return Scripted(curve)


objective = Objective(
    name="scripted", description="curves as written", load=load, model=model, metric="mae",
    settings={"max_epochs": 10, "batch_size": 64, "optimizer": "sgd", "lr": 0.1, "loss": "mse", "patience": 10},
    space=Space(
        Group("step size", lr=Float(1e-3, 1.0, log=True, default=0.1)),
        Group("architecture", curve=Choice(*CURVES, default="winner so far")),
    ),
)
"""


class Interrupting(Observer):
    """Remembers how trials ended, and presses Ctrl-C twice once a continued trial has trained its fifth epoch."""

    def __init__(self) -> None:
        self.continued: list[tuple[int, str | None]] = []
        self.ends: list[tuple[int, str, str | None]] = []

    def trial_started(self, suggestion: Any) -> None:
        if suggestion.pruned:
            self.continued.append((suggestion.number, suggestion.pruned))

    def epoch_done(self, suggestion: Any, result: Any) -> None:
        if suggestion.pruned and result.epoch == 5 and len(self.continued) == 1:
            raise KeyboardInterrupt

    def trial_ended(self, suggestion: Any, state: str, result: Any, reason: str | None) -> None:
        self.ends.append((suggestion.number, state, reason))


def search(folder: Path, home: Path, last: str, observer: Observer) -> SearchOutcome:
    """Three trials: the default, one with better first epochs, and the `last`, which is pruned because of it."""
    return run_search(
        str(folder / "scripted.py"),
        trials=3,
        workers=1,
        strategy="random",
        pruner="sha",
        tries=("curve=early", f"curve={last}"),
        keep=1,
        home=home,
        observer=observer,
    )


def test_a_continued_trial_that_diverges_counts_as_diverged_and_wins_nothing(tmp_path: Path, home: Path) -> None:
    (tmp_path / "scripted.py").write_text(TASK)

    outcome = search(tmp_path, home, "doomed", Observer())

    assert [outcome.counts[state] for state in ("complete", "pruned", "diverged")] == [1, 1, 1]
    assert (outcome.is_done, outcome.winner.trial) == (True, 0)
    store = open_store(home)
    run = store.client.get_run(store.find_trial_run("scripted", 2))
    assert run.data.tags["hpo.reason"] == "the loss was not finite in epoch 4"
    assert math.isnan(run.data.metrics["best/mae"]), "the table of runs is sorted by it"
    assert "checkpoint/best.pt" not in store.file_sizes(run.info.run_id, "checkpoint")


def test_a_pruned_trial_that_was_ahead_is_continued_from_its_checkpoint_through_ctrl_c_and_wins(
    tmp_path: Path, home: Path
) -> None:
    (tmp_path / "scripted.py").write_text(TASK)
    observer = Interrupting()

    with pytest.raises(KeyboardInterrupt):
        search(tmp_path, home, "late", observer)
    outcome = search(tmp_path, home, "late", observer)

    assert outcome.is_done
    assert (outcome.counts["complete"], outcome.counts["pruned"], outcome.num_trials) == (2, 1, 3)
    assert observer.continued == [(2, "pruned after 2 of 10 epochs")] * 2
    assert observer.ends == [
        (0, "complete", None),
        (1, "pruned", "not among the best third at epoch 6"),
        (2, "pruned", "not among the best third at epoch 2"),
        (2, "complete", None),
    ]
    assert (outcome.winner.trial, outcome.winner.pruned, outcome.winner.best_epoch) == (2, None, 10)
    compared = outcome.winner.comparison
    won_by = outcome.winner.validation  # half of what the default has, in units of the target's deviation
    assert (compared["trial"], compared["value"]) == (0, pytest.approx(2 * won_by, rel=1e-4))
    assert [compared[name] for name in ("gain", "low", "high")] == pytest.approx([won_by] * 3, rel=1e-4)
    trained = Counter((tmp_path / "late.epochs").read_text().split())
    assert [trained[str(epoch)] for epoch in (1, 2)] == [1, 1], "from its checkpoint"
    assert all(trained[str(epoch)] <= 2 for epoch in range(3, 11)), "what was not on disk when its worker was ended"
    assert set(trained) == {str(epoch) for epoch in range(1, 11)}
    store = open_store(home)
    run = store.client.get_run(store.find_trial_run("scripted", 2))
    assert (run.data.tags["hpo.state"], run.data.tags["hpo.attempt"], run.info.status) == ("complete", "3", "FINISHED")
    assert "hpo.reason" not in run.data.tags
    history = store.client.get_metric_history(run.info.run_id, "val/mae")
    assert sorted(row.step for row in history) == list(range(1, 11)), "each epoch once"
    assert not list((home / "checkpoints").glob("scripted/*"))


def test_a_worker_that_is_killed_while_it_continues_a_trial_costs_no_finished_result(
    tmp_path: Path, home: Path
) -> None:
    (tmp_path / "scripted.py").write_text(TASK)
    (tmp_path / "kill-in-epoch-5").touch()
    observer = Interrupting()
    observer.epoch_done = lambda suggestion, result: None  # type: ignore[method-assign]

    outcome = search(tmp_path, home, "late", observer)

    assert not (tmp_path / "kill-in-epoch-5").exists()
    assert [(number, state) for number, state, _ in observer.ends[2:]] == [
        (2, "pruned"),
        (2, "interrupted"),
        (2, "complete"),
    ]
    assert "SIGKILL" in str(observer.ends[3][2])
    assert (outcome.is_done, outcome.winner.trial, outcome.winner.best_epoch) == (True, 2, 10)
    trained = Counter((tmp_path / "late.epochs").read_text().split())
    assert [trained[str(epoch)] for epoch in (1, 2)] == [1, 1], "from its checkpoint"
    assert set(trained) == {str(epoch) for epoch in range(1, 11)}
