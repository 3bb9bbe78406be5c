"""Searches from beginning to end, in real processes that are really interrupted and killed."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from helpers.moody import (
    ALONE,
    PLOTS,
    assert_nothing_is_left_running,
    curve,
    runs,
    study,
)
from helpers.postgres import Postgres
from mlflow import MlflowClient
from rich.console import Console

import hpo
from hpo.cli import cli
from hpo.config import Direction
from hpo.errors import SearchError, StoreError, StudyMismatchError, UsageError
from hpo.execution.observer import Observer, Standing
from hpo.home import Home
from hpo.records import SearchOutcome, TrialState, Winner
from hpo.search.lease import Session
from hpo.search.storage import open_storage
from hpo.search.study import Study, Suggestion
from hpo.session import conclude
from hpo.session import search as session_search
from hpo.session.clean import clean_study
from hpo.session.opening import extensions_alone
from hpo.session.options import StudyOptions, checked
from hpo.session.request import agree, request_for, this_machine
from hpo.session.search import run_search
from hpo.terminal.facts import study_rows
from hpo.terminal.progress import ProgressLines
from hpo.terminal.tables import print_outcome
from hpo.tracking.runs import SummaryRun
from hpo.tracking.store import open_store
from hpo.training.trainer import EpochResult


def test_a_search_that_has_reached_the_value_to_stop_at_is_done_and_continues_without_it(home: Path) -> None:
    options: Any = {"home": home, "workers": 1, "device": "cpu", "epochs": 1}
    outcome = run_search("digits", trials=20, stop_at="accuracy=0.2", stop_when_flat="accuracy=0.003", **options)
    assert study(home, "digits").stop_when_flat == 0.003
    assert (outcome.is_done, outcome.counts["complete"], outcome.stopped_at) == (True, 1, 0.2)
    assert outcome.winner is not None
    assert outcome.winner.test is not None

    outcome = run_search("digits", trials=2, stop_at="none", **options)
    assert (outcome.counts["complete"], outcome.stopped_at) == (2, None)


SLOWLY: Any = {"trials": 1, "epochs": 8, "overrides": ("mood=slow",)}  # an epoch takes a quarter of a second or more


def test_a_search_whose_budget_is_used_up_has_a_winner_and_a_larger_budget_continues_it(
    search: Callable[..., SearchOutcome], home: Path
) -> None:
    outcome = search(**SLOWLY, budget=1.0)
    (trial,) = outcome.trials
    assert (trial.state, trial.reason) == ("pruned", "the study's --budget is used up")
    assert trial.trained_s >= 1.0
    assert (outcome.is_done, outcome.spent_budget_s) == (True, 1.0)
    assert outcome.winner is not None
    assert outcome.winner.test is not None
    shown = CliRunner().invoke(cli, ["show", "moody", "--home", str(home)]).output
    assert re.search(r"Training time: \d+ s of 1 s", shown)
    told = Console(file=StringIO(), width=200)
    print_outcome(told, outcome)
    assert "The training time of 1 s is used up after 1 of 1 trials, and cut off trial 0; a la" in told.file.getvalue()  # type: ignore[attr-defined]

    outcome = search(**SLOWLY, budget="none")
    (continued,) = outcome.trials
    assert (continued.state, len(continued.curve), outcome.spent_budget_s) == ("complete", 8, None)
    assert outcome.winner is not None
    assert outcome.winner.num_test_readings == 2, "the model is another one"
    assert outcome.winner.comparison is not None
    assert outcome.winner.comparison["pruned"] is None
    assert continued.trained_s > trial.trained_s


class CtrlC(hpo.Observer):
    """Interrupts this process in the third epoch of a trial."""

    def epoch_done(self, suggestion: Any, result: EpochResult) -> None:
        if result.epoch == 3:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("limit", "state"),
    [({"stop_at": "accuracy=0.05"}, "complete"), ({"budget": 0.1}, "pruned")],
    ids=["stop_at", "budget"],
)
def test_an_interrupted_trial_runs_on_although_a_limit_lets_no_new_one_begin(
    limit: dict[str, Any], state: str, search: Callable[..., SearchOutcome]
) -> None:
    options = SLOWLY | {"trials": 3}
    first, *_ = search(**options, tries=("lr=0.05",), observer=CtrlC()).trials
    assert first.state == "interrupted"
    assert first.curve
    outcome = search(**options, **limit)

    resumed, *others = outcome.trials
    assert (resumed.state, [trial.state for trial in others]) == (state, ["queued"])
    assert len(resumed.curve) == 8 if state == "complete" else len(resumed.curve) <= len(first.curve) + 1
    assert outcome.is_done
    assert outcome.winner is not None
    assert outcome.winner.test is not None


def test_a_trial_ends_complete_when_all_its_attempts_together_have_trained_for_as_long_as_it_may(
    search: Callable[..., SearchOutcome],
) -> None:
    interrupted = search(**SLOWLY | {"epochs": 200}, timeout=3.0).trials[0]
    assert interrupted.state == "interrupted"
    ended = search(**SLOWLY | {"epochs": 200}, trial_timeout=interrupted.trained_s).trials[0]

    assert (ended.state, ended.attempts) == ("complete", 2)
    assert ended.reason == f"reached --trial-timeout in epoch {len(ended.curve)}"
    assert len(ended.curve) == len(interrupted.curve), "the time of the first attempt counts"
    assert ended.value == max(ended.curve.values())


def test_a_study_is_widened_once_and_continues_without_being_told_again(task: str, home: Path) -> None:
    options: Any = {"home": home, "workers": 1, "epochs": 1, "overrides": ("mood=calm",)}
    run_search(task, trials=1, **options)
    wider: Any = options | {"overrides": ("width=64", "lr=1e-3:8"), "extend": True}
    for trials in (2, 3):
        run_search(task, trials=trials, **wider)
    outcome = run_search(task, trials=4, home=home, workers=1)

    assert outcome.counts["complete"] + outcome.counts["pruned"] + outcome.counts["diverged"] == 4
    settings = study(home).settings
    assert settings.extensions == ("width=64", "lr=1e-3:8")
    assert settings.space.parameters["width"].describe() == "16, 32, 64"
    assert settings.space.parameters["lr"].describe() == "0.001:8 (log)"


def test_a_study_is_not_widened_while_others_search_it(task: str, home: Path) -> None:
    run_search(task, home=home, trials=1, epochs=1, overrides=("mood=calm",), workers=1)
    asked = checked({"home": home, "overrides": ("width=64",), "extend": True})
    request = request_for(this_machine(asked), task, asked)
    database = open_storage(home)
    with Session(database, "moody"), pytest.raises(UsageError, match="cannot widen study 'moody' while it is being"):
        extensions_alone(request, Session(database, "moody"))


@pytest.mark.figures
def test_a_search_leaves_runs_curves_checkpoints_and_a_summary(
    search: Callable[..., SearchOutcome], home: Path
) -> None:
    outcome = search()
    assert not outcome.interrupted
    assert outcome.counts["complete"] == 3
    client: MlflowClient = open_store(home).client
    for number, run in enumerate(runs(home)):
        assert run.info.status == "FINISHED"
        assert run.info.run_name == f"trial-{number:04d}"
        assert run.data.params.keys() == {"lr", "width", "mood"}
        assert curve(home, run) == curve(home, run, "train/loss") == [1, 2, 3]
        assert run.data.metrics["best/accuracy"] == pytest.approx(study(home).trials()[number].value, rel=1e-5)
        artifacts = {file.path for file in client.list_artifacts(run.info.run_id, "checkpoint")}
        assert artifacts == {"checkpoint/best.pt", "checkpoint/trial.json"}
    (summary,) = runs(home, "tags.`hpo.kind` = 'study'")
    assert summary.info.status == "FINISHED"
    plots = {file.path for file in client.list_artifacts(summary.info.run_id, "plots")}
    assert {f"plots/{name}.png" for name in PLOTS} == plots
    assert outcome.winner is not None
    assert summary.data.tags["hpo.winner"] == str(outcome.winner.trial)
    assert outcome.winner.test is not None
    assert summary.data.metrics["test/accuracy"] == outcome.winner.test["accuracy"]
    assert "report.html" in {file.path for file in client.list_artifacts(summary.info.run_id)}
    assert_nothing_is_left_running(home)
    assert list(home.glob("checkpoints/moody/*")) == []


def test_the_same_seed_finds_the_same_and_another_seed_something_else(task: str, home: Path) -> None:
    found = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        run_search(task, home=home, study=name, seed=seed, overrides=("mood=calm",), **ALONE)
        found[name] = [(trial.values, trial.curve) for trial in study(home, name).trials()]
    assert found["a"] == found["b"] != found["c"]


def test_more_trials_are_added_and_settings_that_are_not_given_again_stay_as_they_are(task: str, home: Path) -> None:
    run_search(task, home=home, trials=2, seed=5, strategy="random", pruner="none", epochs=2, overrides=("mood=calm",))
    before = study(home).trials()
    outcome = run_search(task, home=home, trials=3)
    settings = study(home).settings
    assert outcome.counts["complete"] == 3
    assert study(home).trials()[:2] == before
    assert len(runs(home)) == 3
    assert (settings.seed, settings.strategy, settings.max_epochs, settings.overrides) == (
        5,
        "random",
        2,
        ("mood=calm",),
    )


@pytest.mark.parametrize(
    ("given", "pruner"),
    [
        ({}, "sha"),
        ({"folds": 5}, "wilcoxon"),
        ({"objectives": ("val/accuracy", "params")}, "none"),
        ({"pruner": "model"}, "model"),
    ],
)
def test_the_pruner_suits_the_search_unless_it_is_named(given: Any, pruner: str, task: str, home: Path) -> None:
    _, _, settings = agree(this_machine(checked({"home": home})), task, StudyOptions(**given))  # type: ignore[typeddict-item]

    assert settings.pruner == pruner


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"seed": 1}, "--seed 0, not 1"),
        ({"overrides": ("mood=calm", "lr=0.01:0.1")}, r"lr \(in 'step size'\) 0.001:1 \(log\), not 0.01:0.1 \(log\)"),
        ({"strategy": "random"}, "--strategy priority, not random"),
        ({"epochs": 9}, "--epochs 3, not 9"),
    ],
)
def test_another_space_or_seed_under_the_same_name_is_refused_and_nothing_changes(
    finished: Callable[..., SearchOutcome], home: Path, option: dict[str, Any], message: str
) -> None:
    before = study(home).trials(), [run.to_dictionary() for run in runs(home)]
    with pytest.raises(StudyMismatchError, match=f"study 'moody' was made with {message}.*--study"):
        finished(trials=2, **option)
    assert (study(home).trials(), [run.to_dictionary() for run in runs(home)]) == before


def test_the_runs_of_a_study_stay_where_they_began(
    search: Callable[..., SearchOutcome], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(trials=1)
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    with pytest.raises(StudyMismatchError, match=r"runs of study 'moody' are in sqlite:.*home/mlflow\.db, not"):
        search(trials=2, tracking_uri=elsewhere)
    with monkeypatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", elsewhere)
        search(trials=2)
        assert hpo.load_best("moody", home=home).classes
    assert not (tmp_path / "elsewhere.db").exists()
    assert len(runs(home)) == 2


def test_a_search_in_which_every_trial_diverged_fails_and_says_so(task: str, home: Path) -> None:
    options = ["--trials", "2", "-p", "mood=nan", "--workers", "1", "--home", str(home)]

    answer = CliRunner().invoke(cli, ["search", task, *options])

    assert answer.exit_code == 1
    assert "Every trial diverged, so there is no winner" in answer.output


def test_runs_of_a_database_that_was_lost_are_marked_and_never_added_to(
    search: Callable[..., SearchOutcome], home: Path
) -> None:
    search(trials=2)
    lost = [run.info.run_id for kind in ("trial", "study") for run in runs(home, f"tags.`hpo.kind` = '{kind}'")]
    for file in home.glob("optuna.db*"):
        file.unlink()

    outcome = search(trials=1, seed=1)

    new = [run for run in runs(home) if run.info.run_id not in lost]
    assert [curve(home, run) for run in new] == [[1, 2, 3]]
    old = [run for kind in ("trial", "study") for run in runs(home, f"tags.`hpo.kind` = '{kind}'") if run not in new]
    marked = {run.info.run_id for run in old if run.data.tags.get("hpo.state") == "orphaned"}
    assert marked == set(lost)
    assert all(curve(home, run) == [1, 2, 3] for run in old if "hpo.trial" in run.data.tags)
    assert open_store(home).find_trial_run("moody", 0) == new[0].info.run_id
    assert outcome.winner is not None
    assert hpo.load_best("moody", home=home).classes


def test_the_lines_of_a_search_with_a_budget_say_how_much_of_it_is_used() -> None:
    shown = StringIO()
    counts = dict.fromkeys(get_args(TrialState), 0) | {"complete": 1}
    standing = Standing(
        study="s",
        metric="r2",
        direction=Direction.MAXIMIZE,
        num_trials=9,
        counts=counts,
        best=(0, 0.5),
        budget_s=3600.0,
        trained_s=600.0,
    )
    ProgressLines(Console(file=shown, width=200)).search_started(standing)
    assert "1/9 trials, 10 min 0 s of 1 h 0 min training, best r2" in shown.getvalue()


def test_a_failed_trial_shows_its_reason_and_a_pruned_one_of_folds_that_its_mean_is_estimated() -> None:
    shown = StringIO()
    lines = ProgressLines(Console(file=shown, width=200))
    counts = dict.fromkeys(get_args(TrialState), 0)
    lines.search_started(
        Standing(study="s", metric="r2", direction=Direction.MAXIMIZE, num_trials=9, counts=counts, best=None)
    )
    result = EpochResult(
        epoch=1,
        metrics={},
        value=0.5,
        best_value=0.5,
        best_epoch=1,
        is_best=True,
        diverged=False,
        settled={},
        symptoms={},
    )
    suggestion = Suggestion(number=0, attempt=1, values={}, active_values={}, stage="everything", seed=0)

    lines.trial_ended(suggestion, "failed", result, "RuntimeError: the cat is on the keyboard")
    lines.trial_ended(suggestion, "pruned", replace(result, fold=2), "a reason")
    lines.trial_started(replace(suggestion, number=14, pruned="pruned after 3 of 20 epochs"))

    failed, pruned, continued = shown.getvalue().splitlines()
    assert "failed      RuntimeError: the cat is on the keyboard" in failed
    assert "r2 ≈0.5000 estimated from 2 folds" in pruned
    assert continued == "continuing trial 14, pruned after 3 of 20 epochs, to its end"


def test_trials_that_kill_every_worker_at_once_fail_one_by_one(
    search: Callable[..., SearchOutcome], home: Path
) -> None:
    with pytest.raises(
        SearchError, match=r"5 trials failed in a row; .* killed by SIGKILL .*4 workers died in epoch 1"
    ):
        search(overrides=("mood=dies",))
    assert [(trial.state, trial.attempts) for trial in study(home).trials()] == [("failed", 4)] * 5
    assert_nothing_is_left_running(home)


def test_a_home_is_not_shared_by_studies_of_one_name_in_two_databases(
    finished: Callable[..., SearchOutcome], home: Path, postgres: Postgres
) -> None:
    elsewhere = {"storage": postgres.new_database(), "tracking_uri": f"http://127.0.0.1:{postgres.port}"}
    with pytest.raises(UsageError, match=r"keeps files of the study 'moody' in the home, not of the one in postgresql"):
        finished(trials=1, **elsewhere)
    assert finished(trials=2).counts["complete"] == 2


def test_what_the_trainer_settled_is_a_tag_of_the_run(search: Callable[..., SearchOutcome], home: Path) -> None:
    search(trials=1, precision="auto", compile="auto", limit=500)
    [run] = runs(home, "tags.`hpo.kind` = 'trial'")
    assert {name: run.data.tags[f"hpo.{name}"] for name in ("precision", "compile")} == {
        "precision": "fp32",
        "compile": "off",
    }


def test_when_time_is_up_the_trial_is_kept_and_nothing_is_tested_until_the_search_is_done(
    search: Callable[..., SearchOutcome], home: Path, task: str
) -> None:
    timeout_s = 2.0
    hold = Path(task).with_name("hold")
    hold.touch()

    class LetsGoWhenTimeIsUp(Observer):
        def trial_started(self, suggestion: Suggestion) -> None:
            threading.Timer(timeout_s, hold.unlink).start()

    outcome = search(trials=3, timeout=timeout_s, overrides=("mood=held",), observer=LetsGoWhenTimeIsUp())
    assert outcome.counts["interrupted"] == 1
    assert not outcome.is_done
    assert not outcome.interrupted
    assert outcome.winner is None or outcome.winner.test is None
    assert [run.info.status for run in runs(home, "tags.`hpo.kind` = 'study'")] == ["KILLED"]
    later = search(trials=3, overrides=("mood=held",))
    assert later.is_done
    assert later.counts["complete"] == 3
    assert later.winner is not None
    assert later.winner.num_test_readings == 1
    assert_nothing_is_left_running(home)


def test_a_signal_while_a_trial_is_written_down_puts_it_back_into_the_queue(
    search: Callable[..., SearchOutcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Study, "tell", interrupted)
        with pytest.raises(KeyboardInterrupt):
            search(trials=2)
    assert_nothing_is_left_running(home)
    assert [run.info.status for run in runs(home, "tags.`hpo.kind` = 'study'")] == ["KILLED"]
    assert search(trials=2).counts["complete"] == 2
    assert len(study(home).trials()) == 2
    assert list(home.glob("checkpoints/moody/*")) == []


def test_a_store_that_fails_at_the_end_loses_no_trial(
    search: Callable[..., SearchOutcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("MLflow at http://away refused: no route.")

    with monkeypatch.context() as patched:
        patched.setattr("hpo.tracking.runs.SummaryRun.log_text", refuse)
        with pytest.raises(SearchError, match="run the same command again to finish the study"):
            search(trials=2)
    outcome = search(trials=2)
    assert outcome.counts["complete"] == 2
    assert outcome.winner is not None
    assert outcome.winner.num_test_readings == 1


@pytest.mark.figures
def test_plots_and_findings_are_there_while_a_search_runs(
    search: Callable[..., SearchOutcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that does not take them for a while does not end the search."""
    seen: list[str] = []
    write = session_search.write_summary  # type: ignore[attr-defined]

    def watched(study: Study, summary: SummaryRun, winner: Winner | None) -> None:
        write(study, summary, winner)
        seen.append(open_store(home).client.get_run(summary.run_id).info.status)
        if len(seen) == 1:
            assert open_store(home).download(summary.run_id, "plots/history.png").is_file()
            raise StoreError("MLflow is away.")

    monkeypatch.setattr(session_search, "write_summary", watched)
    monkeypatch.setattr(conclude, "write_summary", watched)
    monkeypatch.setattr(session_search, "RENEWAL_S", 0.0)
    assert search(trials=3, overrides=("mood=slow",)).is_done
    assert len(seen) >= 2
    assert set(seen) == {"RUNNING"}


def test_a_study_is_shown_again_while_it_is_searched(
    finished: Callable[..., SearchOutcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(open_storage(home), "moody")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            session.__exit__(None, None, None)

    monkeypatch.setattr("hpo.terminal.tables.time", SimpleNamespace(sleep=wait))
    with session:
        shown = CliRunner().invoke(cli, ["show", "moody", "--watch", "--home", str(home)])
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("1 complete") == 3
    assert shown.output.count("searched by") == 2


def test_a_study_whose_winner_is_tested_is_still_searched_and_keeps_its_data(
    search: Callable[..., SearchOutcome], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    test = conclude.tested_winner

    def looked_at(prepared: Any, opened: Any) -> Winner | None:
        (row,) = study_rows(home, None)
        seen.append(row["now"].rpartition(":")[2])
        removed = clean_study("moody", keep=1, dry_run=False, home=home)["removed"]
        seen.extend(each["what"] for each in removed if "data" in each["what"])
        seen.append(len(list(home.glob("splits/moody/*.pt"))))
        return test(prepared, opened)

    monkeypatch.setattr(conclude, "tested_winner", looked_at)
    assert search(trials=1).winner is not None
    assert seen == [str(os.getpid()), 1]
    assert [row["now"] for row in study_rows(home, None)] == ["done"]
    assert list(home.glob("splits/moody/*.pt")) == []


def test_a_study_that_is_taken_or_has_other_settings_is_reported_before_the_data_is_read(
    finished: Callable[..., SearchOutcome], home: Path
) -> None:
    class Notes(Observer):
        def note(self, text: str) -> None:
            pytest.fail(f"it began: {text}")

    with pytest.raises(StudyMismatchError, match="--seed 0, not 1"):
        finished(trials=1, seed=1, observer=Notes())
    home_files = Home(home).study("moody")
    with home_files.locked(), pytest.raises(UsageError, match="is being searched by another process"):
        finished(trials=1, observer=Notes())
