"""Runs in MLflow: of trials, and the summary of a study."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.tracking import BrokenClient, curve, find_trial, open_runs, spooled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.config import Direction
from hpo.plots import study as plots
from hpo.records import EndState
from hpo.tracking import server, spool
from hpo.tracking.runs import StudyRuns
from hpo.tracking.store import TrackingStore


@pytest.mark.parametrize(
    ("state", "status"),
    [
        ("complete", "FINISHED"),
        ("pruned", "FINISHED"),
        ("diverged", "FINISHED"),
        ("failed", "FAILED"),
        ("interrupted", "KILLED"),
    ],
)
def test_a_trial_is_a_run_with_parameters_curves_and_its_end(runs: StudyRuns, state: EndState, status: str) -> None:
    params = {"lr": 1e-05, "momentum": 0.1 + 0.2, "depth": 3, "optimizer": "sgd", "nesterov": True}
    run = runs.trial_run(7, params=params, tags={"hpo.stage": "step size"})
    for epoch in range(1, 4):
        run.log_epoch(epoch, {"train/loss": 1 / epoch, "val/accuracy": epoch / 4})
    run.finish(state, value=0.75, reason="because")
    assert runs.flush()
    found = find_trial(runs.store, 7)
    assert found.info.run_name == "trial-0007"
    assert found.info.status == status
    assert found.data.params == {
        "lr": "1e-05",
        "momentum": "0.3",
        "depth": "3",
        "optimizer": "sgd",
        "nesterov": "True",
    }
    assert json.loads(found.data.tags["hpo.parameters"]) == params, "with all digits"
    expected = {"hpo.kind": "trial", "hpo.trial": "7", "hpo.state": state, "hpo.stage": "step size"}
    assert (expected | {"hpo.reason": "because"}).items() <= found.data.tags.items()
    assert {"mlflow.user", "mlflow.source.name"} <= set(found.data.tags)
    assert found.data.metrics["best/accuracy"] == 0.75
    assert curve(runs.store, 7) == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert spooled(runs.store.home) == []


def test_a_short_trial_is_told_in_one_batch(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_PAUSE_S", 60.0)  # on a busy machine it may be over before the trial is
    client = NotingClient(store.client)
    with open_runs(replace(store, client=client)) as runs:  # type: ignore[arg-type]
        run = runs.trial_run(0, params={"lr": 0.1}, tags={"hpo.stage": "step size"})
        client.calls.clear()
        run.log_epoch(1, {"val/accuracy": 0.5})
        run.set_tags({"hpo.precision": "fp32"})
        run.log_epoch(2, {"val/accuracy": 0.75})
        run.finish("complete", value=0.75)
    assert [call for call in client.calls if call != "search_runs"] == ["create_run", "log_batch", "set_terminated"]
    told = find_trial(store, 0)
    assert (told.data.params, told.data.metrics["best/accuracy"]) == ({"lr": "0.1"}, 0.75)
    tags = {"hpo.stage": "step size", "hpo.precision": "fp32", "hpo.state": "complete"}
    assert tags.items() <= told.data.tags.items()


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_run_is_looked_at_before_it_is_told_more_where_others_may_have_taken_it_over(
    store: TrackingStore, is_shared: bool
) -> None:
    client = NotingClient(store.client)
    with open_runs(replace(store, client=client), is_shared=is_shared) as runs:  # type: ignore[arg-type]
        run = runs.trial_run(0, params={})
        assert runs.flush()
        client.calls.clear()
        run.log_epoch(1, {"val/accuracy": 0.5})
        assert runs.flush()
        assert client.calls == (["get_run", "log_batch"] if is_shared else ["log_batch"])


class NotingClient:
    """The store's client, which notes what is called."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.calls.append(name)
        return getattr(self._client, name)


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_trial_without_a_finite_value_stands_in_no_sort_by_value(runs: StudyRuns, value: float | None) -> None:
    runs.trial_run(0, params={}).finish("failed", value=value, reason="x" * 10_000)
    assert runs.flush()
    assert find_trial(runs.store, 0).data.metrics == {}


def test_the_runs_table_sorts_by_the_best_value(runs: StudyRuns) -> None:
    for number, value in enumerate((0.2, 0.9, 0.5)):
        runs.trial_run(number, params={}).finish("complete", value=value)
    assert runs.flush()
    found = runs.store.client.search_runs([runs.experiment_id], order_by=["metrics.`best/accuracy` DESC"])
    assert [run.info.run_name for run in found] == ["trial-0001", "trial-0002", "trial-0000"]

    runs.trial_run(1, params={}, attempt=2).finish("diverged", value=math.nan)  # continued after it was pruned
    assert runs.flush()
    found = runs.store.client.search_runs([runs.experiment_id], order_by=["metrics.`best/accuracy` DESC"])
    assert [run.info.run_name for run in found] == ["trial-0002", "trial-0000", "trial-0001"]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.floats(), min_size=1, max_size=5))
def test_every_number_arrives_as_it_was_and_what_is_not_finite_as_nan(runs: StudyRuns, values: list[float]) -> None:
    number = runs.__dict__.setdefault("examples", 0)
    runs.__dict__["examples"] += 1
    run = runs.trial_run(number, params={})
    for epoch, value in enumerate(values):
        run.log_epoch(epoch, {"train/loss": value, "lr": 0.1})
    assert run.flush()
    arrived = [value for _, value in curve(runs.store, number, "train/loss")]
    expected = [value if math.isfinite(value) else math.nan for value in values]
    assert arrived == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    tag = find_trial(runs.store, number).data.tags.get("hpo.nonfinite")
    assert tag == (None if all(map(math.isfinite, values)) else "train/loss")


def test_a_long_story_goes_in_batches_of_whole_epochs(store: TrackingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    log_batch = store.client.log_batch

    def noted(run_id: str, metrics: Any = (), **others: Any) -> None:
        sizes.append(len(metrics))
        log_batch(run_id, metrics, **others)

    monkeypatch.setattr(store.client, "log_batch", noted)
    client = BrokenClient(store.client)
    with open_runs(replace(store, client=client)) as runs:  # type: ignore[arg-type]
        client.broken = True
        run = runs.trial_run(0, params={})
        for epoch in range(600):
            run.log_epoch(epoch, {"val/accuracy": epoch / 600, "lr": 0.1, "train/loss": math.nan})
        client.broken = False
    assert [step for step, _ in curve(store, 0)] == list(range(600))
    assert sum(sizes) == 1800
    assert all(size % 3 == 0 and size < 1000 for size in sizes)


def test_files_and_texts_become_artifacts(runs: StudyRuns, tmp_path: Path) -> None:
    (tmp_path / "best.pt").write_bytes(b"weights")
    run = runs.trial_run(0, params={})
    run.log_text('{"lr": 0.1}', "config.json")
    run.log_file(tmp_path / "best.pt", "checkpoint")
    assert run.flush()
    run_id = runs.store.find_trial_run("digits", 0)
    assert runs.store.download(run_id, "config.json").read_text() == '{"lr": 0.1}'
    assert (runs.store.download(run_id, "checkpoint") / "best.pt").read_bytes() == b"weights"


def test_a_file_that_is_gone_is_reported_and_holds_nothing_up(
    runs: StudyRuns, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = runs.trial_run(0, params={})
    run.log_file(tmp_path / "gone.pt")
    run.finish("complete", value=0.5)
    assert runs.flush()
    assert "gone.pt is gone" in caplog.text
    assert find_trial(runs.store, 0).info.status == "FINISHED"


def test_a_resumed_trial_continues_in_its_run_and_repeats_no_epoch(runs: StudyRuns) -> None:
    first = runs.trial_run(0, params={"lr": 0.1}, attempt=1)
    for epoch in (1, 2):
        first.log_epoch(epoch, {"val/accuracy": epoch / 10})
    first.finish("interrupted", value=0.2, reason="stopped by hand")
    assert runs.flush()
    run_id = runs.store.find_trial_run("digits", 0)

    with open_runs(runs.store) as later:
        second = later.trial_run(0, params={"lr": 0.1, "depth": 2}, attempt=2)
        assert later.flush()
        running = find_trial(runs.store, 0)
        assert (running.info.status, running.data.tags["hpo.state"]) == ("RUNNING", "running")
        assert "hpo.reason" not in running.data.tags
        for epoch in (2, 3):
            second.log_epoch(epoch, {"val/accuracy": epoch / 10})
        second.finish("complete", value=0.3)
    ended = find_trial(runs.store, 0)
    assert ended.info.run_id == run_id
    assert ended.data.params == {"lr": "0.1", "depth": "2"}
    assert (ended.data.tags["hpo.attempt"], ended.data.metrics["best/accuracy"]) == ("2", 0.3)
    assert curve(runs.store, 0) == [(1, 0.1), (2, 0.2), (3, 0.3)]


def test_the_summary_is_one_run_that_is_found_again(runs: StudyRuns) -> None:
    summary = runs.summary_run()
    assert runs.store.client.get_run(summary.run_id).info.status == "RUNNING"
    summary.log_dict({"step size": {"lr": [0.1, 1.0]}}, "space.json")
    summary.log_figure("plots/history.png", plots.plot_history([], metric="accuracy", direction=Direction.MAXIMIZE))
    summary.log_metrics({"best/accuracy": 0.9, "test/accuracy": 0.8})
    summary.set_tags({"hpo.best_trial": "3"})
    summary.set_note("The winner is **trial 3**.")
    summary.finish("complete")
    again = runs.summary_run()
    again.log_metrics({"best/accuracy": 0.9, "test/accuracy": 0.8})
    assert len(runs.store.client.get_metric_history(summary.run_id, "best/accuracy")) == 1
    assert again.run_id == summary.run_id
    assert runs.store.client.get_run(summary.run_id).info.status == "RUNNING"
    again.finish("interrupted")
    found = runs.store.client.get_run(summary.run_id)
    assert (found.info.run_name, found.info.status) == ("study summary", "KILLED")
    assert found.data.metrics == {"best/accuracy": 0.9, "test/accuracy": 0.8}
    assert found.data.tags["mlflow.note.content"] == "The winner is **trial 3**."
    assert json.loads(runs.store.download(summary.run_id, "space.json").read_text())["step size"] == {"lr": [0.1, 1.0]}
    assert runs.store.download(summary.run_id, "plots/history.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_runs_while_its_search_does(runs: StudyRuns) -> None:
    """A search first ends what earlier ones have left RUNNING, and leaves its own summary alone."""
    summary = runs.summary_run()
    runs.recover()
    found = runs.store.client.get_run(summary.run_id)
    assert (found.info.status, found.data.tags["hpo.state"]) == ("RUNNING", "running")


def test_a_running_trial_stands_in_the_table_with_its_best_value_so_far(runs: StudyRuns) -> None:
    run = runs.trial_run(0, params={})
    for epoch, value in ((1, 0.5), (2, 0.75)):
        run.log_epoch(epoch, {"val/accuracy": value, "best/accuracy": value})
    assert runs.flush()
    assert find_trial(runs.store, 0).data.metrics["best/accuracy"] == 0.75
    run.finish("complete", value=0.7123456789)
    assert runs.flush()
    assert find_trial(runs.store, 0).data.metrics["best/accuracy"] == 0.712346
    run = runs.trial_run(1, params={})
    run.log_epoch(1, {"best/accuracy": 0.9})
    run.finish("failed")
    assert runs.flush()
    assert math.isnan(find_trial(runs.store, 1).data.metrics["best/accuracy"]), "it sorts last"


def test_the_ui_names_the_address_of_each_study(store: TrackingStore) -> None:
    for study in ("digits", "wine"):
        StudyRuns(store, study, metric="accuracy", direction=Direction.MAXIMIZE, session="one").close()
    base = "http://127.0.0.1:5000"
    one, several = (server._addresses(store, study, base) for study in ("wine", None))
    curves = store.study_url("wine", base, "hpo-curves")
    assert one == [f"MLflow is at {store.study_url('wine', base)}", f"Curves of the best 10 trials: {curves}"]
    assert several[1:] == [f"  {name}  {store.study_url(name, base)}" for name in ("wine", "digits")]


@pytest.mark.parametrize(("direction", "ascending"), [(Direction.MAXIMIZE, False), (Direction.MINIMIZE, True)])
def test_the_saved_view_of_the_runs_table_puts_the_best_on_top(
    store: TrackingStore, direction: Any, ascending: bool
) -> None:
    with StudyRuns(
        store, "digits", metric="rmse", direction=direction, session="one", columns=["lr"], note="What this is."
    ) as runs:
        tags = store.client.get_experiment(runs.experiment_id).tags
    view = json.loads(tags["mlflow.sharedViewState.hpo"])
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`best/rmse`", ascending)
    assert view["columnOrder"] == ["tags.`hpo.state`", "metrics.`best/rmse`", "params.`lr`"]
    assert view["searchFilter"] == "tags.`hpo.kind` = 'trial'", "the summary is no trial"
    assert [chart.get("selectedMetricKeys") for chart in view["compareRunCharts"]] == [
        ["train/loss", "val/loss"],
        ["val/rmse"],
        None,
    ]
    assert tags["mlflow.note.content"] == "What this is."
    shown = [json.loads(tags[f"mlflow.sharedViewState.{name}"])["runsHiddenMode"] for name in ("hpo", "hpo-curves")]
    assert shown == ["SHOW_ALL", "FIRST_10_RUNS"]
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == {
        section["uuid"] for section in view["compareRunSections"]
    }
    assert store.study_url("digits", "http://127.0.0.1:5000/").endswith(
        f":5000/#/experiments/{runs.experiment_id}/runs?viewStateShareKey=hpo&workflowType=machine_learning"
    )
    assert store.study_url("digits", "", "hpo-curves").endswith(
        "viewStateShareKey=hpo-curves&workflowType=machine_learning&compareRunsMode=CHART"
    )
    assert tags["mlflow.experimentKind"] == "custom_model_development"
