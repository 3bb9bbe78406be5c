"""The figures of a study: what they show is what was measured, and nothing is cut off."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hpo.config import Direction
from hpo.parameters import Choice, Float, Int
from hpo.plots import study as plots
from hpo.records import EndState, TrialRecord
from hpo.space import Group, Space

SPACE = Space(
    Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), batch_size=Choice(64, 128, 256, default=128)),
    Group(
        "architecture and optimizer",
        depth=Int(2, 20, default=8),
        width=Int(16, 512, log=True, default=64),
        optimizer=Choice("sgd", "adamw", default="sgd"),
        momentum=Float(0.5, 0.99, default=0.9, when={"optimizer": "sgd"}),
        nesterov=Choice(True, False, default=True),
        norm=Choice("batch", default="batch"),
    ),
    Group("regularization", dropout=Float(0.0, 0.5, default=0.0), weight_decay=Float(0.1, 0.2, log=True, default=0.1)),
)
FIXED = {"norm"}


def record(number: int, state: EndState, curve: dict[int, float], best: Callable[..., float] = max) -> TrialRecord:
    draw = random.Random(number)
    values = {
        "lr": 10 ** draw.uniform(-4, 0),
        "batch_size": draw.choice([64, 128, 256]),
        "depth": draw.randint(2, 20),
        "width": draw.randint(16, 512),
        "optimizer": draw.choice(["sgd", "adamw"]),
        "momentum": draw.uniform(0.5, 0.99),
        "nesterov": draw.choice([True, False]),
        "norm": "batch",
        "dropout": draw.uniform(0, 0.5),
        "weight_decay": draw.uniform(0.1, 0.2),
    }
    finite = {epoch: value for epoch, value in curve.items() if math.isfinite(value)}
    best_epoch = best(finite, key=finite.__getitem__) if finite else None
    return TrialRecord(
        number=number,
        state=state,
        value=None if best_epoch is None else finite[int(best_epoch)],
        values=values,
        inactive=() if values["optimizer"] == "sgd" else ("momentum",),
        curve=curve,
        best_epoch=None if best_epoch is None else int(best_epoch),
        stage="step size",
        reason=None,
    )


def some_study(num_trials: int) -> list[TrialRecord]:
    states: list[EndState] = ["complete", "pruned", "complete", "failed", "diverged", "interrupted"]
    lengths = {"complete": 10, "pruned": 3, "failed": 0, "diverged": 2, "interrupted": 4}
    records = []
    for number in range(num_trials):
        state = states[number % len(states)]
        curve = {epoch: 0.9 - 0.8 / epoch + number / 1000 for epoch in range(1, lengths[state] + 1)}
        records.append(record(number, state, curve | ({3: math.nan} if state == "diverged" else {})))
    return records


STUDIES = {
    "no trial": [],
    "one trial": [record(0, "complete", {1: 0.5})],
    "all pruned": [record(number, "pruned", {1: 0.1 * number}) for number in range(5)],
    "all failed": [record(number, "failed", {}) for number in range(3)],
    "nothing but NaN": [record(0, "diverged", {1: math.nan, 2: math.nan})],
    "equal values": [record(number, "complete", {1: 0.0, 2: 0.0}) for number in range(3)],
    "two hundred": some_study(200),
}


def all_plots(records: list[TrialRecord], direction: Direction = Direction.MAXIMIZE) -> dict[str, Figure]:
    named: dict[str, Any] = {"metric": "accuracy", "direction": direction}
    return {
        "history": plots.plot_history(records, **named),
        "curves": plots.plot_curves(records, **named),
        "slices": plots.plot_slices(records, SPACE, **named),
    }


@pytest.mark.parametrize("num_classes", [2, 30])
def test_a_confusion_matrix_shows_shares_of_the_class_and_its_counts_while_they_fit(num_classes: int) -> None:
    counts = [[3 if row == column else 1 for column in range(num_classes)] for row in range(num_classes)]
    counts[1] = [0] * num_classes  # a class that no example has
    axes = plots.plot_confusion([f"class {label}" for label in range(num_classes)], counts).axes[0]
    shares = axes.images[0].get_array()
    assert shares is not None
    assert shares[0, 0] == pytest.approx(3 / (2 + num_classes))
    assert shares[1].sum() == 0
    assert [text.get_text() for text in axes.texts] == (["3", "1"] if num_classes == 2 else [])


@pytest.mark.parametrize("direction", [*Direction])
@pytest.mark.parametrize("study", STUDIES)
def test_every_plot_can_be_drawn_and_nothing_is_cut_off(study: str, direction: str, tmp_path: Path) -> None:
    for name, figure in all_plots(STUDIES[study], direction).items():  # type: ignore[arg-type]
        figure.savefig(tmp_path / f"{name}.png")
        renderer = FigureCanvasAgg(figure).get_renderer()
        for legend in figure.legends:
            box = legend.get_window_extent(renderer)
            assert box.x0 >= 0, name
            assert box.x1 <= figure.bbox.x1, name


def legend_of(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_the_history_tells_the_states_and_the_default_apart() -> None:
    figure = plots.plot_history(some_study(12), metric="accuracy", direction=Direction.MAXIMIZE)
    assert legend_of(figure) == [
        "4 complete",
        "2 pruned",
        "2 diverged",
        "2 failed",
        "2 interrupted",
        "best so far",
        "default configuration",
        "best: trial 8",
    ]


def test_the_history_is_stretched_where_most_trials_are_and_says_so() -> None:
    values = [0.5, 0.6, 0.7, 0.8, 0.9, 0.95, *(0.98 + n / 1000 for n in range(10))]
    crowded = [record(number, "complete", {1: value}) for number, value in enumerate(values)]
    [axes] = plots.plot_history(crowded, metric="accuracy", direction=Direction.MAXIMIZE).axes

    low, high = axes.get_ylim()
    assert low < 0.7 < 0.989 < high
    assert axes.get_ylabel().endswith("stretched near the best")
    middle = axes.transAxes.inverted().transform(axes.transData.transform((0, 0.98)))[1]
    assert 0.2 < middle < 0.8, "on a linear axis it would be at the top"
    ticks = axes.get_yticks()
    assert len(set(ticks)) == len(ticks) >= 5
    spread = [record(number, "complete", {1: number / 12}) for number in range(12)]
    [even] = plots.plot_history(spread, metric="accuracy", direction=Direction.MAXIMIZE).axes
    assert "stretched" not in even.get_ylabel()


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=30), st.sampled_from([*Direction]))
@settings(max_examples=20)
def test_the_best_so_far_never_gets_worse_and_ends_at_the_best(values: list[float], direction: Any) -> None:
    records = [record(number, "complete", {1: value}) for number, value in enumerate(values)]
    [axes] = plots.plot_history(records, metric="accuracy", direction=direction).axes
    line, _star = axes.lines
    heights = [float(height) for height in line.get_ydata()]  # type: ignore[arg-type, union-attr]
    assert heights == sorted(heights, reverse=direction == "minimize")
    assert heights[-1] == (max(values) if direction == "maximize" else min(values))


def test_one_trial_that_went_astray_does_not_flatten_the_others() -> None:
    records = [record(number, "complete", {1: 0.5 + number / 100}) for number in range(10)]
    astray = record(10, "complete", {1: -1e6})
    [axes] = plots.plot_history([*records, astray], metric="R2", direction=Direction.MAXIMIZE).axes
    low, high = axes.get_ylim()
    assert high - low < 1
    assert [text.get_text() for text in axes.texts] == ["1 trial has values below this axis"]


def test_curves_show_the_values_that_were_measured() -> None:
    """The axis is limited, never the data: a bad first epoch is not drawn at the edge."""
    curves = [{1: 0.1 * number, 2: 0.8, 3: 0.9 + number / 100} for number in range(1, 5)]
    records = [record(number, "complete", curve) for number, curve in enumerate(curves)]
    [axes] = plots.plot_curves(records, metric="accuracy", direction=Direction.MAXIMIZE).axes
    drawn = sorted(list(map(float, line.get_ydata())) for line in axes.lines if line.get_marker() == "o")  # type: ignore[arg-type]
    assert drawn == sorted(list(curve.values()) for curve in curves)


def test_curves_name_the_best_first_and_count_the_stopped() -> None:
    records = some_study(12)
    figure = plots.plot_curves(records, metric="accuracy", direction=Direction.MAXIMIZE, num_best=2)
    left_out = "2 more, complete, not shown"
    assert legend_of(figure) == ["trial 8: 0.828", "trial 6: 0.826", "2 pruned", "2 diverged", left_out, "best epoch"]
    lowest = plots.plot_curves(records, metric="accuracy", direction=Direction.MINIMIZE, num_best=1)
    number, value = min(
        (
            (record.number, record.value)
            for record in records
            if record.state in ("complete", "pruned") and record.value
        ),
        key=lambda pair: pair[1],
    )
    assert legend_of(lowest)[:2] == [f"trial {number}: {value:.4g}", "1 pruned"], "one of the two pruned has the name"


def test_slices_show_every_parameter_that_is_searched_and_active_trials_alone() -> None:
    records = some_study(60)
    figure = plots.plot_slices(records, SPACE, metric="accuracy", direction=Direction.MAXIMIZE)
    panels = {axes.get_xlabel(): axes for axes in figure.axes if axes.get_visible()}
    assert list(panels) == [name for name in SPACE.parameters if name not in FIXED]
    scales = {name: axes.get_xscale() for name, axes in panels.items()}
    assert {name for name, scale in scales.items() if scale == "log"} == {"lr", "width", "weight_decay"}
    drawn = {name: sum(len(points.get_offsets()) for points in axes.collections) for name, axes in panels.items()}  # type: ignore[arg-type, misc]
    valued = [record for record in records if record.value is not None]
    assert drawn["lr"] == len(valued)
    assert drawn["momentum"] == sum(not record.inactive for record in valued) < len(valued)


def test_the_points_of_a_choice_stay_with_their_choice() -> None:
    records = [record(number, "complete", {1: 0.5}) for number in range(50)]
    figure = plots.plot_slices(records, SPACE, metric="accuracy", direction=Direction.MAXIMIZE)
    axes = next(axes for axes in figure.axes if axes.get_xlabel() == "nesterov")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["true", "false"]
    positions = [float(x) for points in axes.collections for x, _ in points.get_offsets()]  # type: ignore[arg-type, misc, str-unpack]
    assert sorted(round(x) for x in positions) == sorted(0 if r.values["nesterov"] else 1 for r in records)


def test_importances_keep_the_groups_in_order_and_have_error_bars() -> None:
    step_size = {"batch_size": (0.1, 0.0, 0.3), "lr": (0.5, 0.4, 0.7)}
    figure = plots.plot_importances(
        {"step size": step_size, "regularization": {"dropout": (0.3, 0.1, 0.4), "weight_decay": (0.1, 0.05, 0.2)}},
        note="Too uncertain to report: depth (about 40 more trials).",
    )
    [axes] = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lr", "batch_size", "dropout", "weight_decay"]
    colours = [patch.get_facecolor() for patch in axes.patches]
    assert colours[0] == colours[1] != colours[2] == colours[3]
    [bar] = axes.containers[1].lines[2]  # type: ignore[attr-defined]
    assert [round(float(x), 2) for x, _ in bar.get_segments()[0]] == [0.4, 0.7]
    assert legend_of(figure) == ["step size", "regularization"]
    assert "about 40 more trials" in str(figure.get_supxlabel())
