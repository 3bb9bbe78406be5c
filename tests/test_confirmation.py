"""The end of a search: the best configurations are confirmed with new seeds, refit if asked, and tested once."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from helpers.data import of_classes
from rich.console import Console
from scipy.stats import binomtest, t, ttest_ind
from torch import nn

import hpo
from hpo.config import Direction, TrainConfig
from hpo.data.examples import DataSpec
from hpo.errors import UsageError
from hpo.execution.observer import Observer
from hpo.objective import NOTHING_OWN
from hpo.parameters import Choice, Float, Int
from hpo.records import SearchOutcome, TrialRecord, TrialState, Winner
from hpo.search.confirmation import Plan, Race, find_plan
from hpo.search.settings import StudySettings
from hpo.search.storage import open_storage
from hpo.search.strategies import grid_size
from hpo.search.study import Study
from hpo.search.winner import describe_confirmation
from hpo.session.search import resume_study, run_search
from hpo.space import Group, Space
from hpo.terminal.facts import best_facts, study_facts
from hpo.terminal.tables import print_best, print_outcome
from hpo.tracking.store import open_store
from hpo.training.comparison import score_interval

# --- the race ---------------------------------------------------------------------------------------------------------


def record(
    number: int, value: float | None, *, repeats: int | None = None, state: TrialState = "complete", x: int = 0
) -> TrialRecord:
    return TrialRecord(
        number=number,
        state=state,
        value=value,
        values={"x": x or number},
        inactive=(),
        curve={},
        best_epoch=1,
        stage="",
        reason=None,
        repeats=repeats,
    )


def race(*repeats: TrialRecord, direction: Direction = Direction.MAXIMIZE) -> Race:
    trials = [record(0, 0.7), record(1, 0.9), record(2, 0.8), record(3, 0.6), record(4, 0.9, x=1)]
    return Race.of(Plan(3, 3), trials, repeats, direction)


def repeated(trial: int, *values: float) -> list[TrialRecord]:
    return [record(10 * (trial + 1) + i, value, repeats=trial) for i, value in enumerate(values)]


def numbers(contenders: Any) -> list[int]:
    return [contender.trial.number for contender in contenders]


def test_the_best_configurations_take_turns_and_each_counts_once() -> None:
    start = race()

    assert numbers(start.contenders) == [1, 2, 0], "trial 4 has the configuration of trial 1"
    assert numbers(race(direction=Direction.MINIMIZE).contenders) == [3, 0, 2]
    assert (start.next.trial.number, start.winner, start.is_done) == (1, None, False)
    assert race(*repeated(1, 0.8)).next.trial.number == 2
    running = record(9, None, repeats=2, state="running")
    assert race(*repeated(1, 0.8), running).next.trial.number == 0


def test_the_mean_of_the_new_trainings_decides_and_not_the_value_that_the_search_saw() -> None:
    over = race(*repeated(1, 0.80, 0.82, 0.81), *repeated(2, 0.84, 0.79, 0.83), *repeated(0, 0.6, 0.61, 0.6))

    assert over.is_done
    assert over.winner.trial.number == 2
    assert over.winner.mean == pytest.approx(0.82)


def test_a_configuration_that_is_clearly_behind_gets_no_further_seed() -> None:
    two_each = race(*repeated(1, 0.80, 0.81), *repeated(2, 0.82, 0.80), *repeated(0, 0.6, 0.61))

    assert numbers(two_each.running) == [1, 2]
    assert not two_each.is_done
    assert two_each.next.trial.number == 1
    noisy = race(*repeated(1, 0.80, 0.90), *repeated(2, 0.95, 0.80), *repeated(0, 0.7, 0.85))
    assert numbers(noisy.running) == [1, 2, 0], "the seeds differ as much as the configurations"
    assert numbers(race(*repeated(1, 0.9), *repeated(2, 0.1)).running) == [1, 2, 0], "one seed says nothing"


def test_a_configuration_that_diverges_with_a_new_seed_loses_to_one_that_does_not() -> None:
    diverged = record(30, None, repeats=2, state="diverged")
    over = race(*repeated(1, 0.5, 0.6, 0.5), *repeated(2, 0.9, 0.9), diverged, *repeated(0, 0.4, 0.4, 0.4))
    assert (over.is_done, over.winner.trial.number) == (True, 1)
    all_failed = [record(number, None, repeats=0, state="failed") for number in (20, 21, 22)]
    assert race(*all_failed).next.trial.number == 1, "a failure is not repeated for ever"
    assert Race.of(Plan(1, 3), [record(0, 0.7)], all_failed, Direction.MAXIMIZE).winner is None


def test_a_confirmed_winner_is_compared_with_the_default_by_means_over_new_seeds() -> None:
    searched, best, default = [record(0, 0.7), record(2, 0.8)], (0.84, 0.79, 0.83), (0.75, 0.8, 0.79)
    for direction, of_winner, other in ((Direction.MAXIMIZE, best, default), (Direction.MINIMIZE, default, best)):
        over = Race.of(Plan(2, 3), searched, [*repeated(2, *of_winner), *repeated(0, *other)], direction)
        found = over.compared(searched[0])
        interval = ttest_ind(best, default).confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert found.gain == pytest.approx(0.04)
        assert (found.num_seeds, found.is_distinct) == ((3, 3), False)
    assert over.compared(searched[1]) is None, "the winner itself"

    alone = Race.of(Plan(1, 3), searched, repeated(2, *best), Direction.MAXIMIZE)
    once = alone.compared(searched[0])
    assert once.gain == pytest.approx(0.12)
    assert (once.value, once.num_seeds) == (0.7, (3, 1))
    assert once.high - once.gain == pytest.approx(t.ppf(0.975, 2) * stdev(best) * math.sqrt(1 / 3 + 1))
    assert alone.compared(record(0, 0.3, state="pruned")) is None, "it was not trained to its end"
    lost = [record(number, None, repeats=0, state="diverged") for number in (30, 31, 32)]
    unreliable = Race.of(Plan(2, 3), searched, [*repeated(2, *best), *lost], Direction.MAXIMIZE).compared(searched[0])
    assert (unreliable.state, unreliable.value, unreliable.gain) == ("diverged", None, None)
    one_seed = Race.of(Plan(1, 1), searched, repeated(2, 0.8), Direction.MAXIMIZE)
    assert one_seed.compared(searched[0]) is None, "nothing tells the variance"


@pytest.mark.parametrize("written", ["fast", "3", "0x3", "3x0", "3 x 3", "-1x3", "1000x3", ""])
def test_a_plan_that_is_none_is_refused(written: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"the plan '{written}' of a confirmation is not allowed: use none, quick"):
        run_search("digits", home=tmp_path, confirm=written)
    assert not list(tmp_path.iterdir())


def test_a_plan_can_be_a_size() -> None:
    assert (find_plan("4x10"), find_plan("none").num_trainings) == (Plan(4, 10), 0)


# --- a study ----------------------------------------------------------------------------------------------------------

SETTINGS = StudySettings(
    task="digits",
    space=Space(Group("step size", lr=Float(1e-3, 1.0, log=True, default=0.1))),
    seed=0,
    strategy="priority",
    pruner="model",
    max_epochs=10,
    metric="accuracy",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=3,
)


def run_trials(study: Study, count: int) -> None:
    for _ in range(count):
        number = study.ask().number
        study.report(number, 1, number / 100)
        study.tell(number, "complete", value=number / 100, best_epoch=1)


def remember(study: Study, trials: int, confirm: str | None = None) -> None:
    study.remember_session(num_trials=trials, task_reference="digits", tracking_uri=None, confirm=confirm)


def test_repeats_have_seeds_of_their_own_belong_to_no_search_and_go_back_to_the_queue(tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "s", SETTINGS)
    remember(study, 3, "2x2")
    run_trials(study, 3)
    study.enqueue([{"lr": 0.5}], "by hand")  # left over: it would be tried with a larger total

    first = study.ask_repeat("me")
    assert (first.number, first.repeats, first.values) == (4, 2, study.trial(2).values)
    assert first.seed not in [study.trial_seed(number) for number in range(4)]
    assert not study.report(4, 1, 0.0), "a repeat is not pruned"
    study.release("me")
    other = Study.load(open_storage(tmp_path), "s")
    again, second = other.ask_repeat("them"), other.ask_repeat("them")
    assert [(each.number, each.repeats, each.attempt) for each in (again, second)] == [(4, 2, 2), (5, 1, 1)]
    for number in (4, 5):
        other.tell(number, "complete", value=0.5, best_epoch=1)
    assert (other.num_finished, len(other.trials()), [each.number for each in other.repeats()]) == (3, 4, [4, 5])
    assert not other.is_done
    for number in (other.ask_repeat("them").number, other.ask_repeat("them").number):
        other.tell(number, "complete", value=0.5, best_epoch=1)
    assert other.ask_repeat("them") is None
    assert (other.is_done, other.best().number) == (True, 2)
    remember(other, 5)
    assert (other.is_done, other.remaining(5)) == (False, 2)
    assert other.ask().number == 3, "the one that was left over"


def test_a_grid_that_is_extended_after_a_confirmation_still_visits_each_point_once(tmp_path: Path) -> None:
    space = Space(Group("step size", a=Int(1, 3, default=1), b=Choice("x", "y", default="x")))
    study = Study.open(open_storage(tmp_path), "s", replace(SETTINGS, space=space, strategy="grid", pruner="none"))
    remember(study, 4, "1x1")
    run_trials(study, 4)
    study.tell(study.ask_repeat().number, "complete", value=0.5, best_epoch=1)
    remember(study, 100)
    assert study.remaining(100) == grid_size(space) - 4

    run_trials(study, 2)

    assert len({tuple(trial.values.items()) for trial in study.trials()}) == grid_size(space) == 6
    assert study.remaining(100) == 0


# --- real searches ----------------------------------------------------------------------------------------------------

# The first training of the lucky network has a small error, and each later one a large error; the error is in the
# checkpoint. A training of the steady one can be killed in its second epoch.
TASK = """
import os
import signal
from pathlib import Path

import torch

from hpo.objective import Objective
from hpo.data.examples import Dataset, SealedSplit, Split
from hpo.parameters import Choice
from hpo.space import Group, Space

FOLDER = Path(__file__).parent


def load(data_dir):
    values = torch.linspace(-1, 1, 100)[:, None]
    split = Split(values, values[:, 0])
    return Dataset(split, SealedSplit(lambda: split, size=100))


class Scripted(torch.nn.Module):
    def __init__(self, error):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("error", torch.tensor(error))
        self.register_buffer("epoch", torch.tensor(0))

    def train(self, mode=True):
        if mode:
            self.epoch += 1
            if self.epoch == 2 and (FOLDER / "kill").exists() and self.error == 0.5:
                (FOLDER / "kill").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return super().train(mode)

    def forward(self, inputs):
        return inputs[:, 0] * (1 + 1e-9 * self.weight) + self.error / self.epoch.clamp(min=1)


def model(spec, *, kind="weak"):
    error = {"weak": 0.9, "steady": 0.5, "lucky": 0.1}[kind]
    if kind == "lucky":
        try:
            (FOLDER / "lucky").touch(exist_ok=False)
        except FileExistsError:
            error = 0.7
    return Scripted(error)


objective = Objective(
    name="noisy", description="luck", load=load, model=model, metric="mae",
    settings={"max_epochs": 3, "batch_size": 20, "optimizer": "sgd", "lr": 0.1, "loss": "mse"},
    space=Space(Group("architecture", kind=Choice("weak", "steady", "lucky", default="weak"))),
)
"""


class Interrupting(Observer):
    """Presses Ctrl-C twice in the second epoch of the first repeat; counts what is trained."""

    def __init__(self) -> None:
        self.begun: Counter[int | None] = Counter()
        self.is_armed = True

    def trial_started(self, suggestion: Any) -> None:
        self.begun[suggestion.repeats] += 1

    def epoch_done(self, suggestion: Any, result: Any) -> None:
        if suggestion.repeats is not None and result.epoch == 2 and self.is_armed:
            self.is_armed = False
            raise KeyboardInterrupt


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "noisy.py"
    path.write_text(TASK)
    return path


def search(task: Path, home: Path, **options: Any) -> SearchOutcome:
    """Three trials: the weak default, the steady and the lucky one."""
    chosen: dict[str, Any] = {"trials": 3, "workers": 1, "pruner": "none", "strategy": "random", "home": home}
    tries = ("kind=steady", "kind=lucky")
    return run_search(str(task), **chosen | {"tries": tries, "observer": _LuckyLast(task)} | options)


class _LuckyLast(Observer):
    """Makes the trial of the lucky network the first to build one."""

    def __init__(self, task: Path) -> None:
        self._lucky = task.with_name("lucky")

    def trial_started(self, suggestion: Any) -> None:
        if suggestion.active_values["kind"] == "lucky" and suggestion.repeats is None:
            self._lucky.unlink(missing_ok=True)


def test_the_lucky_trial_wins_the_search_and_the_steady_one_the_confirmation_which_survives_kills(
    task: Path, home: Path
) -> None:
    searched = search(task, home)
    assert (searched.winner.trial, searched.winner.confirmation) == (2, None)
    task.with_name("kill").touch()
    observer = Interrupting()

    with pytest.raises(KeyboardInterrupt):
        resume_study(study="noisy", confirm="2x2", home=home, workers=1, observer=observer)
    half = best_facts("noisy", home)["winner"]
    assert (half["trial"], half["confirmation"]["is_done"]) == (2, False)
    outcome = resume_study(study="noisy", home=home, workers=1, observer=observer)

    assert (outcome.is_done, outcome.counts["complete"], outcome.num_trials) == (True, 3, 3)
    winner = outcome.winner
    assert (winner.searched, winner.configuration, winner.trial in (4, 6)) == (1, {"kind": "steady"}, True)
    lucky, steady = winner.confirmation["configurations"]
    assert (lucky["trial"], steady["trial"], len(steady["values"])) == (2, 1, 2)
    assert lucky["searched"] < steady["searched"] < lucky["mean"]
    assert observer.begun == {2: 3, 1: 3}, "two seeds each, one of them interrupted and one killed"
    assert (winner.num_test_readings, winner.test_interval[0] <= winner.test["mae"]) == (2, True)
    assert winner.comparison["gain"] > 0
    assert winner.comparison["num_seeds"] == (2, 1)
    store = open_store(home)
    tags = store.client.get_run(store.find_trial_run("noisy", winner.trial)).data.tags
    assert (tags["hpo.repeats"], tags["hpo.stage"]) == ("1", "confirms trial 1")
    model = hpo.load_best("noisy", home=home, task=str(task))
    assert float(model.network.error) == 0.5
    kept = [
        number
        for number in range(7)
        if "checkpoint/best.pt" in store.file_sizes(store.find_trial_run("noisy", number), "checkpoint")
    ]
    assert len(kept) == 5, "the three trials and the best repeat of each configuration"
    said = text_of(outcome, home)
    assert "a repeat of trial 1, epoch 3" in said
    assert "over 2 new seeds; trial 2, the best of the search with" in said
    assert "the test split was used 2 times, once for each winner so far; validation minus test" in said


def text_of(outcome: SearchOutcome, home: Path) -> str:
    console = Console(record=True, width=400, file=StringIO())
    print_outcome(console, outcome)
    print_best(console, best_facts(outcome.study, home))
    study_facts(outcome.study, home)
    return console.export_text()


def test_a_refit_is_trained_on_all_examples_for_the_epochs_that_were_found_and_tested_once(
    task: Path, home: Path
) -> None:
    outcome = search(task, home, refit=True)

    winner = outcome.winner
    assert (winner.is_refit, winner.num_test_readings) == (True, 1)
    refitted = hpo.load_best("noisy", home=home, task=str(task))
    judged = hpo.load_best("noisy", home=home, task=str(task), trial=winner.trial)
    assert refitted.input_mean != judged.input_mean, "of more examples"
    assert int(refitted.network.epoch) == winner.best_epoch
    again = search(task, home)
    assert again.winner == winner, "nothing is trained or read twice"
    assert "then trained on training and validation examples together" in text_of(outcome, home)


def test_what_was_cross_validated_is_confirmed_too(task: Path, home: Path) -> None:
    outcome = search(task, home, folds=2, confirm="1x2")

    (row,) = outcome.winner.confirmation["configurations"]
    assert len(row["values"]) == 2
    assert outcome.winner.test is not None
    assert hpo.load_best("noisy", home=home, task=str(task)) is not None


# --- how sure a test score is -----------------------------------------------------------------------------------------


def test_the_interval_of_an_accuracy_is_wilsons_and_of_others_a_bootstraps() -> None:
    targets = torch.arange(40) % 2
    outputs = nn.functional.one_hot(torch.where(torch.arange(40) < 36, targets, 1 - targets), 2).float()
    given: dict[str, Any] = {
        "num_examples": 40,
        "spec": of_classes(2),
        "target_scale": 1.0,
        "own": NOTHING_OWN,
        "seed": 0,
    }
    config = TrainConfig(metric="accuracy")

    found = score_interval((outputs, targets), config, **given)

    expected = binomtest(36, 40).proportion_ci(method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-4)
    by_f1 = replace(config, metric="f1")
    low, high = score_interval((outputs, targets), by_f1, **given)
    assert 0.75 < low < 0.9 < high < 1.0
    assert (low, high) == score_interval((outputs, targets), by_f1, **given)
    right = nn.functional.one_hot(targets, 2).float()
    assert score_interval((right, targets), by_f1, **given) == (-math.inf, math.inf), "40 do not show that f1 is 1"


def test_the_interval_of_a_recall_is_of_the_examples_that_count() -> None:
    targets = torch.tensor([0, 0, 1, 1, *range(2, 38)])  # four have another one of their group
    given: dict[str, Any] = {
        "num_examples": 40,
        "spec": DataSpec((1,), (), "embedding"),
        "target_scale": 1.0,
        "own": NOTHING_OWN,
        "seed": 0,
    }
    config = TrainConfig(metric="recall_at_1", loss="triplet")
    outputs = nn.functional.one_hot(targets, 38).float()

    expected = binomtest(4, 4).proportion_ci(method="wilson")
    assert score_interval((outputs, targets), config, **given) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_the_interval_of_several_labels_is_of_the_thresholds_that_the_score_has() -> None:
    labels = (torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    outputs = labels - 5  # below 0 for all, and right from -4.5 on
    outputs[0] = torch.tensor([5.0, -5.0, 5.0])
    config, spec = TrainConfig(metric="f1", loss="binary_cross_entropy"), DataSpec((1,), tuple("abc"), "multilabel")
    given: dict[str, Any] = {"num_examples": 60, "spec": spec, "target_scale": 1.0, "own": NOTHING_OWN, "seed": 0}

    low, high = score_interval((outputs, labels), config, **given)
    assert 0.0 <= low < high < 0.3
    low, high = score_interval((outputs, labels), config, thresholds=torch.full((3,), -4.5), **given)
    assert 0.8 < low < high <= 1.0


def test_a_best_configuration_whose_new_trainings_all_failed_is_told_of() -> None:
    row = {"searched": 0.9, "std": None, "values": [], "repeats": [4, 5], "num_diverged": 0, "is_behind": False}
    rows = [row | {"trial": 1, "mean": None}, row | {"trial": 2, "mean": 0.8, "values": [0.8]}]
    confirmation = {"seeds": 2, "is_done": True, "configurations": rows}
    winner = Winner(
        trial=6, searched=2, configuration={}, metric="accuracy", validation=0.8, best_epoch=1, folds=None, pruned=None,
        test=None, confusion=None, comparison=None, num_test_readings=0, confirmation=confirmation,
    )  # fmt: skip
    assert describe_confirmation(winner).endswith(
        "trial 1, the best of the search with 0.9000, has no result with new seeds"
    )
    alone = replace(winner, confirmation=confirmation | {"configurations": rows[1:]})
    assert describe_confirmation(alone) == "mean 0.8000 over 1 new seed"
