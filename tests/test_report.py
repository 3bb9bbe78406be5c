"""The report of a study, and studies side by side: whole, safe to open, and linked to their trials."""

from __future__ import annotations

import json
import math
import re
import threading
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import studies

from hpo.errors import UnknownNameError, UsageError
from hpo.parameters import Choice, Float, Int
from hpo.report.comparison import progress
from hpo.report.content import Content
from hpo.search.lease import Session
from hpo.search.storage import open_storage
from hpo.search.study import Study
from hpo.session import report
from hpo.session.report import compare_studies, describe_differences, write_report
from hpo.space import Group, Space

NASTY = "</script><b>"

SPACE = Space(
    Group(
        "step size",
        lr=Float(1e-4, 1.0, log=True, default=0.1),
        depth=Int(1, 8, default=2),
        width=Int(16, 64, log=True, default=32),  # no power of ten to mark on its axis
    ),
    Group(
        "optimizer",
        optimizer=Choice("sgd", NASTY, default="sgd"),
        momentum=Float(0.5, 0.9, default=0.9, when={"optimizer": "sgd"}),
    ),
)
SETTINGS = replace(studies.SETTINGS, space=SPACE, strategy="random", planned_trials=5)


def make_study(home: Path, name: str = "s", **changes: Any) -> Study:
    """Two complete trials, and one each that was pruned, diverged and failed; the best two were confirmed."""
    study = Study.open(open_storage(home), name, replace(SETTINGS, **changes))
    study.remember_session(num_trials=4, task_reference="digits", tracking_uri=None, confirm="2x2")
    ends = ("complete", 0.8), ("complete", 0.9), ("pruned", 0.5), ("diverged", math.nan), ("failed", 0.1)
    for state, value in ends:
        number, last = study.ask().number, 3 if state == "complete" else 1
        for epoch in range(1, last + 1):
            study.report(number, epoch, value - 0.1 * (last - epoch))
        study.tell(number, state, value=value, best_epoch=last, reason=NASTY)  # type: ignore[arg-type]
    while repeat := study.ask_repeat():
        study.tell(repeat.number, "complete", value=0.85 if repeat.repeats == 0 else 0.82, best_epoch=3)
    return study


class Links(HTMLParser):
    """Everything that a browser would fetch, and the places for figures."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name in ("src", "href") and value and not value.startswith("data:"):
                self.fetched.append(value)
            if name == "id" and value:
                self.ids.append(value)


def read(page: str) -> tuple[dict[str, Any], Links]:
    """The figures in a page by name, and its links."""
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    links = Links()
    links.feed(page)
    return json.loads(found[1]), links


def test_a_report_is_whole_fetches_nothing_and_its_figures_know_their_trials(tmp_path: Path) -> None:
    make_study(tmp_path)

    page = write_report("s", tmp_path / "out" / "s.html", home=tmp_path).read_text()

    figures, links = read(page)
    assert links.fetched == []
    expected = ["confirmation", "history", "curves", "coordinates", *(f"slice-{number}" for number in range(5))]
    assert list(figures) == expected
    assert set(figures) <= set(links.ids)
    pointed = {number for trace in figures["history"]["data"] for number in trace.get("customdata", [])}
    assert pointed == {0, 1, 2, 4}, "the diverged one has no value"
    assert {trace["marker"]["symbol"] for trace in figures["history"]["data"] if "marker" in trace} >= {
        "circle",
        "triangle-down",
    }, "states differ in shape"
    assert [trace["meta"] for trace in figures["curves"]["data"]][-1] == 1, "the best is drawn last"
    axes = {axis["label"]: axis for axis in figures["coordinates"]["data"][0]["dimensions"]}
    assert list(axes) == [*SPACE.parameters, "<b>accuracy</b>"]
    assert axes["optimizer"]["ticktext"] == ["sgd", NASTY]
    for text in ("used once, when the search is complete", "a repeat of trial 0", "mean 0.8500", "Seed 0", "4 of 4"):
        assert text in page
    assert page.count(NASTY) == 0, "what a stranger named stays text"
    assert 'http-equiv="refresh"' not in page


def test_a_report_of_several_objectives_has_their_front_costs_constraints_and_rules(tmp_path: Path) -> None:
    group = Group("g", width=Int(4, 64, default=8), depth=Int(1, 4, default=1))
    space = Space(group, forbid=[{"width": 64, "depth": 4}])
    settings = replace(SETTINGS, space=space, objectives=("val/accuracy", "params"), constraints=("params<=500",))
    study = Study.open(open_storage(tmp_path), "s", settings)
    for value, params in ((0.8, 100.0), (0.9, 300.0), (0.85, 400.0)):
        number = study.ask().number
        study.report(number, 1, value)
        study.tell(number, "complete", value=value, best_epoch=1, costs={"params": params})

    page = write_report("s", tmp_path / "s.html", home=tmp_path).read_text()

    figures, _ = read(page)
    front = next(trace for trace in figures["front"]["data"] if trace["name"] == "Pareto front")
    assert (front["x"], front["y"]) == ([100.0, 300.0], [0.8, 0.9])
    assert "objectives val/accuracy and params, constraints params&lt;=500" in page
    assert "never: width is 64 and depth is 4." in page
    assert "<th>params</th>" in page


def test_trials_outside_of_the_shown_range_are_counted(tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "s", SETTINGS)
    for number in range(24):
        value = 0.1 if number % 6 == 5 else 0.9 + number / 1000
        study.report(study.ask().number, 1, value)
        study.tell(number, "complete", value=value, best_epoch=1)

    page = write_report("s", tmp_path / "s.html", home=tmp_path).read_text()

    figures, _ = read(page)
    low, high = figures["history"]["layout"]["yaxis"]["range"]
    hidden = sum(not low <= trial.value <= high for trial in study.trials() if trial.value)
    assert hidden >= 4
    assert f"{hidden} trials lie outside of the range that is shown; double-click to see all." in page


def test_a_study_without_a_result_has_a_report_too(tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "s", SETTINGS)
    study.remember_session(num_trials=4, task_reference="digits", tracking_uri=None)

    figures, _ = read(write_report("s", tmp_path / "s.html", home=tmp_path).read_text())

    assert figures == {}


def test_a_live_report_is_written_until_nobody_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_study(tmp_path)
    monkeypatch.setattr(report, "LIVE_S", 0.01)
    said: list[str] = []
    out = tmp_path / "s.html"
    with Session(open_storage(tmp_path), "s"):
        writing = threading.Thread(
            target=write_report, args=("s", out), kwargs={"home": tmp_path, "live": True, "tell": said.append}
        )
        writing.start()
        while not said:
            writing.join(0.01)
        assert 'http-equiv="refresh"' in out.read_text()
    writing.join(60)
    assert 'http-equiv="refresh"' not in out.read_text()
    assert len(said) == 1


def test_studies_of_one_metric_are_compared(tmp_path: Path) -> None:
    make_study(tmp_path)
    make_study(tmp_path, "other", seed=1)
    make_study(tmp_path, "by-f1", metric="f1")

    rows = compare_studies(["s", "other"], tmp_path / "both.html", home=tmp_path)

    known = [(row["study"], row["seed"], row["validation accuracy"]) for row in rows]
    assert known == [("s", 0, 0.85), ("other", 1, 0.85)]
    figures, links = read((tmp_path / "both.html").read_text())
    assert [trace["name"] for trace in figures["progress"]["data"]] == ["s", "other"]
    assert links.fetched == []
    assert "Compare with care: seed differs, so" in (tmp_path / "both.html").read_text()
    assert describe_differences([rows[0], rows[0]]) is None
    with pytest.raises(UsageError, match="study 's' optimises accuracy and study 'by-f1' f1"):
        compare_studies(["s", "by-f1"], home=tmp_path)
    with pytest.raises(UsageError, match="two studies or more, not 1"):
        compare_studies(["s"], home=tmp_path)
    with pytest.raises(UnknownNameError, match="no study 'ohter'; did you mean 'other'"):
        compare_studies(["s", "ohter"], home=tmp_path)


def test_a_trial_that_was_continued_reaches_its_value_when_it_was_continued(tmp_path: Path) -> None:
    study = Study.open(open_storage(tmp_path), "s", replace(SETTINGS, planned_trials=3))
    pruned, *others = [study.ask().number for _ in range(3)]
    for number, value in ((pruned, 0.5), (others[0], 0.7), (others[1], 0.6)):
        for epoch in (1, 2):
            study.report(number, epoch, value)
        study.tell(number, "pruned" if number == pruned else "complete", value=value, best_epoch=1)
    content = Content.of(study, made_with=[], commands=[])
    ended = replace(
        content.trials[pruned], state="complete", value=0.9, curve={1: 0.5, 2: 0.4, 3: 0.9, 4: 0.8}, pruned_after=2
    )

    found = list(progress(replace(content, trials=[ended, *content.trials[1:]])))

    assert found == [(2, 0.5), (4, 0.7), (6, 0.6), (8, 0.9)]


def test_without_plotly_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_study(tmp_path)
    monkeypatch.setattr(report, "find_spec", lambda name: None)

    with pytest.raises(UsageError, match=r"pip install 'hpo-torch\[report\]'"):
        write_report("s", tmp_path / "s.html", home=tmp_path)
