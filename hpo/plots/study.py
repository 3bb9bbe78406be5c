"""Plots of a study, from plain records: history, learning curves, parameter slices, importances, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle, product
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from numpy.typing import NDArray

from hpo.config import Direction
from hpo.parameters import Choice, Parameter
from hpo.plots.colours import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, YELLOW
from hpo.plots.style import DPI, log_ticks, new_figure, say_nothing_to_show, style_axes
from hpo.records import TrialRecord, TrialState, ranked
from hpo.space import Space
from hpo.values import format_value

Array = NDArray[np.float64]

_LOOKS: dict[TrialState, tuple[str, str]] = {  # colour, marker
    "complete": (BLUE, "o"),
    "pruned": (ORANGE, "v"),
    "diverged": (PURPLE, "D"),
    "infeasible": (BLACK, "^"),
    "failed": (RED, "X"),
    "interrupted": (GREY, "s"),
    "running": (SKY, "P"),
    "queued": (GREY, "d"),
}
_CURVE_COLOURS = (BLUE, RED, GREEN, PURPLE, BLACK)
_GROUP_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, SKY, YELLOW, GREY)
_SLICE_COLUMNS = 4
_FEWEST_TO_STRETCH = 8  # trials
_NO_VALUES = "no trial has finished an epoch yet"


def plot_history(records: Sequence[TrialRecord], *, metric: str, direction: Direction) -> Figure:
    """The value of each trial, the best so far, and the best trial as a star.

    Where most trials crowd near the best, the axis is stretched there, and says so.

    A diverged or interrupted trial never counts as the best. A trial without a value, such as a failed one, is a mark
    below the plot.
    """
    figure, axes = new_figure("Objective value by trial", width=9, height=5)
    valued = [record for record in records if record.has_value]
    limits = _shown_range([record.known_value for record in valued], direction)
    _scatter(axes, [(record.number, record) for record in valued])
    for record in records:
        if not record.has_value:
            colour, marker = _LOOKS[record.state]
            at_the_foot = axes.get_xaxis_transform()
            axes.plot(record.number, 0.0, marker, color=colour, markersize=7, clip_on=False, transform=at_the_foot)
    candidates = sorted(ranked(valued, direction), key=lambda record: record.number)
    best_so_far = list(accumulate((record.known_value for record in candidates), direction.best))
    axes.step([r.number for r in candidates], best_so_far, where="post", color=GREEN, linewidth=2, zorder=1)
    _mark_default(axes, valued)
    winner = next(iter(ranked(valued, direction)), None)
    if winner:
        axes.plot(winner.number, winner.known_value, "*", color=GREEN, markersize=15, markeredgecolor="white", zorder=4)
    axes.set_xlabel("trial")
    axes.set_xlim(-0.5, max([1, *(record.number for record in records)]) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    values = [record.known_value for record in valued]
    _finish_value_axis(axes, metric, direction, limits, [[value] for value in values])
    _stretch_near_the_best(axes, values, limits, direction)
    _legend(
        figure,
        records,
        best_so_far=bool(candidates),
        default=any(r.number == 0 for r in valued),
        best_trial=winner,
    )
    return figure


def plot_curves(
    records: Sequence[TrialRecord],
    *,
    metric: str,
    direction: Direction,
    num_best: int = len(_CURVE_COLOURS),
    has_folds: bool = False,
) -> Figure:
    """Learning curves, or values by fold: the best trials by name, other pruned and diverged ones in the background."""
    figure, axes = new_figure("Folds" if has_folds else "Learning curves", width=9, height=5)
    best = ranked(records, direction)[:num_best]
    stopped = [r for r in records if r.state in ("pruned", "diverged") and r.curve and r not in best]
    shown = [value for record in stopped + best for value in record.curve.values() if math.isfinite(value)]
    limits = _shown_range(shown, direction)
    handles = []
    for record in stopped:
        _draw_curve(axes, record, is_joined=not has_folds, color=_LOOKS[record.state][0], alpha=0.45, markersize=3)
    for rank, (colour, record) in enumerate(zip(cycle(_CURVE_COLOURS), best, strict=False)):
        _draw_curve(
            axes, record, is_joined=not has_folds, color=colour, linewidth=2, markersize=4, zorder=4 - rank / len(best)
        )
        handles.append(_curve_handle(colour, f"trial {record.number}: {record.value:.4g}", is_joined=not has_folds))
        if record.best_epoch in record.curve and not has_folds:
            best_value = record.curve[record.best_epoch]
            axes.plot(
                record.best_epoch, best_value, "*", color=colour, markersize=13, markeredgecolor="white", zorder=5
            )
    for state in ("pruned", "diverged"):
        count = sum(record.state == state for record in stopped)
        if count:
            handles.append(_curve_handle(_LOOKS[state][0], f"{count} {state}", is_joined=not has_folds))
    if num_left_out := len(ranked(records, direction)) - len(best) - sum(r.state == "pruned" for r in stopped):
        handles.append(Line2D([], [], linestyle="", label=f"{num_left_out} more, complete, not shown"))
    axes.set_xlabel("fold" if has_folds else "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish_value_axis(axes, metric, direction, limits, [list(record.curve.values()) for record in stopped + best])
    if best and not has_folds:
        handles.append(Line2D([], [], color=GREY, marker="*", linestyle="", markersize=11, label="best epoch"))
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def plot_slices(records: Sequence[TrialRecord], space: Space, *, metric: str, direction: Direction) -> Figure:
    """The value against each parameter that is searched, in the order of the space.

    A trial is left out of the plots of its inactive parameters. Choices are spread sideways, so that points that fall
    together can be distinguished.
    """
    searched = {name: parameter for name, parameter in space.parameters.items() if not parameter.is_fixed}
    valued = [record for record in records if record.has_value]
    if not (searched and valued):
        figure, axes = new_figure("Objective value by parameter", width=9, height=3)
        say_nothing_to_show(axes, _NO_VALUES if searched else "every parameter is fixed")
        return figure
    limits = _shown_range([record.known_value for record in valued], direction)
    columns = min(_SLICE_COLUMNS, len(searched))
    rows = math.ceil(len(searched) / columns)
    figure = Figure(figsize=(max(7.0, 3.2 * columns), 1.2 + 2.7 * rows), dpi=DPI, layout="constrained")
    figure.suptitle("Objective value by parameter", fontweight="bold")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    cells = grid.flatten()
    best = next(iter(ranked(valued, direction)), None)
    for axes, (name, parameter) in zip(cells, searched.items(), strict=False):
        active = [record for record in valued if name in record.values and name not in record.inactive]
        points = [(_position(parameter, record, name), record) for record in active]
        _scatter(axes, points, size=26)
        for x, record in points:
            if record is best:
                axes.plot(x, record.known_value, "*", color=GREEN, markersize=15, markeredgecolor="white")
        axes.set_xlabel(name)
        _scale_parameter_axis(axes, parameter)
        style_axes(axes)
        _limit_value_axis(axes, limits)
    for axes in cells[len(searched) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel(f"validation {metric}")
    _legend(figure, valued, best_trial=best)
    return figure


def plot_importances(
    importances: Mapping[str, Mapping[str, tuple[float, float, float]]], *, note: str | None = None
) -> Figure:
    """How much each parameter matters, by group: the groups in order of priority, the parameters by importance.

    Importances are a share in [0, 1] with the ends of its interval, such as `{"step size": {"lr": (0.6, 0.4, 0.8)}}`;
    there is at least one. The note stands below.
    """
    count = sum(map(len, importances.values()))
    figure, axes = new_figure("Importance of the parameters", width=9, height=1.6 + 0.34 * max(3, count), grid="x")
    names: list[str] = []
    handles = []
    for colour, (group, shares) in zip(cycle(_GROUP_COLOURS), importances.items(), strict=False):
        for name, (share, low, high) in sorted(shares.items(), key=lambda item: -item[1][0]):
            row = len(names)
            axes.barh(row, share, color=colour, height=0.72)
            axes.errorbar(
                share,
                row,
                xerr=[[max(0.0, share - low)], [max(0.0, high - share)]],
                color=BLACK,
                capsize=3,
                linewidth=1,
            )
            axes.annotate(
                f"{share:.0%}", (max(share, high), row), (5, 0), textcoords="offset points", va="center", fontsize=9
            )
            names.append(name)
        if shares:
            handles.append(Line2D([], [], color=colour, linewidth=8, label=group))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, min(1.1, 1.12 * max(high for shares in importances.values() for _, _, high in shares.values())))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel("share of the variance explained alone (main effect), with 90% interval")
    figure.legend(handles=handles, loc="outside right upper", frameon=False, title="group", alignment="left")
    if note:
        figure.supxlabel(fill(note, 120), x=0.01, ha="left", color=GREY, fontsize=9)
    return figure


_MAX_COUNTED = 20
"""Classes in a confusion matrix with room for its counts."""

_COST_UNITS = {"latency": "ms", "params": "trainable"}


def plot_front(
    records: Sequence[TrialRecord], front: Sequence[int], *, metric: str, direction: Direction, costs: Sequence[str]
) -> Figure:
    """The value of each complete trial against each of its costs; the trials in `front` by number.

    With one cost steps join them; with two a trial may be on the front for the sake of the other one. A star marks the
    winner.
    """
    measured = [record for record in records if record.costs and record.has_value]
    winner = next(iter(ranked([record for record in measured if record.number in front], direction)), None)
    limits = _shown_range([record.known_value for record in measured], direction)
    figure = Figure(figsize=(max(7.0, 5.0 * len(costs)), 4.5), dpi=DPI, layout="constrained")
    figure.suptitle("Pareto front", fontweight="bold")
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        style_axes(axes)
        _scatter(axes, [(record.costs[cost], record) for record in measured if record.number not in front])
        chosen = sorted((r for r in measured if r.number in front), key=lambda record: record.costs[cost])
        points = [(record.costs[cost], record.known_value) for record in chosen]
        axes.plot(*zip(*points, strict=True), "o", color=GREEN, markersize=8, markeredgecolor="white")
        if len(costs) == 1:  # between two trials of the front there is nothing better than the cheaper one
            axes.step(*zip(*points, strict=True), where="post", color=GREEN, zorder=1)
        for record, point in zip(chosen, points, strict=True):
            if record is winner:
                axes.plot(*point, "*", color=GREEN, markersize=16, markeredgecolor="white", zorder=4)
            axes.annotate(str(record.number), point, (6, -12), textcoords="offset points", fontsize=9)
        axes.set_xscale("log")
        amounts = [record.costs[cost] for record in measured]
        axes.xaxis.set_major_locator(log_ticks(max(amounts) / min(amounts)))
        axes.xaxis.set_major_formatter(lambda value, _: format_value(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(f"{cost} ({_COST_UNITS[cost]}, lower is better)")
        _finish_value_axis(axes, metric, direction, limits, [[record.known_value] for record in measured])
    looks = [("o", 8, "front"), ("*", 13, "winner")]
    handles = [Line2D([], [], color=GREEN, marker=m, markersize=s, linestyle="", label=text) for m, s, text in looks]
    if others := len(measured) - len(front):
        colour, marker = _LOOKS["complete"]
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=f"{others} others"))
    figure.legend(handles=handles, loc="outside right upper", frameon=False)
    return figure


def plot_confusion(classes: Sequence[str], counts: Sequence[Sequence[int]]) -> Figure:
    """Predicted classes, the columns, of each true class, a row: as shares of it, with the counts where they fit."""
    side = max(4.5, 1.5 + 0.45 * len(classes))
    figure = Figure(figsize=(side + 1, side), dpi=DPI, layout="constrained")
    figure.suptitle("Confusion matrix of the winner on the test split", fontweight="bold")
    axes = figure.subplots()
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    ticks = range(len(classes))
    crowded = sum(map(len, classes)) > 30
    axes.set_xticks(ticks, classes, rotation=90 if crowded else 0)
    axes.set_yticks(ticks, classes)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(classes) <= _MAX_COUNTED:
        for row, column in product(ticks, ticks):
            if count := counts[row][column]:
                colour = "white" if shares[row][column] > 0.5 else BLACK
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=9)
    return figure


Limits = tuple[float, float]


def _shown_range(values: Sequence[float], direction: Direction) -> Limits:
    """The part of the value axis worth showing: everything but what is far worse than most.

    The worst value shown is three interquartile ranges beyond the worse quartile, so that one trial that went astray
    does not flatten all the others. Values beyond it are outside of the picture, which says how many there are.
    """
    if not values:
        return 0.0, 1.0
    ordered = sorted(values)
    low_quartile, high_quartile = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    spread = 3 * (high_quartile - low_quartile)
    if direction is Direction.MAXIMIZE:
        low, high = max(ordered[0], low_quartile - spread), ordered[-1]
    else:
        low, high = ordered[0], min(ordered[-1], high_quartile + spread)
    return (low, high) if low < high else (low - abs(low) * 0.05 - 1e-9, high + abs(high) * 0.05 + 1e-9)


def _limit_value_axis(axes: Axes, limits: Limits) -> None:
    margin = 0.06 * (limits[1] - limits[0])
    axes.set_ylim(limits[0] - margin, limits[1] + margin)


def _finish_value_axis(
    axes: Axes, metric: str, direction: Direction, limits: Limits, trials: Sequence[Sequence[float]]
) -> None:
    """Label and limit the axis; `trials` has the values of each trial, and those that leave the axis are counted."""
    axes.set_ylabel(f"validation {metric} ({'higher' if direction is Direction.MAXIMIZE else 'lower'} is better)")
    _limit_value_axis(axes, limits)
    finite = [[value for value in values if math.isfinite(value)] for values in trials]
    if not any(finite):
        say_nothing_to_show(axes, _NO_VALUES)
    elif num_outside := sum(any(not limits[0] <= value <= limits[1] for value in values) for values in finite):
        side, height = ("below", 0.02) if direction is Direction.MAXIMIZE else ("above", 0.94)
        text = f"{num_outside} {'trial has' if num_outside == 1 else 'trials have'} values {side} this axis"
        axes.text(0.99, height, text, transform=axes.transAxes, ha="right", color=GREY, fontsize=9)


def _scatter(axes: Axes, points: Sequence[tuple[float, TrialRecord]], size: float = 36) -> None:
    for state, (colour, marker) in _LOOKS.items():
        chosen = [(x, record) for x, record in points if record.state == state]
        axes.scatter(
            [x for x, _ in chosen],
            [record.known_value for _, record in chosen],
            s=size,
            c=colour,
            marker=marker,
            edgecolors="white",
            linewidths=0.6,
            zorder=2,
        )


def _mark_default(axes: Axes, valued: Sequence[TrialRecord]) -> None:
    for record in valued:
        if record.number == 0:
            axes.scatter([0], [record.known_value], s=150, facecolors="none", edgecolors=BLACK, zorder=3)


def _stretch_near_the_best(axes: Axes, values: Sequence[float], limits: Limits, direction: Direction) -> None:
    """Give the best quarter of the trials more room where it has less than a tenth of the axis."""
    best = limits[1] if direction is Direction.MAXIMIZE else limits[0]
    gaps = sorted(abs(best - value) for value in values)
    near = gaps[len(gaps) // 4] if len(gaps) >= _FEWEST_TO_STRETCH else 0.0
    if not 0 < near < 0.1 * (limits[1] - limits[0]):
        return
    sign = 1.0 if direction is Direction.MAXIMIZE else -1.0

    def forward(shown: Array) -> Array:
        return -sign * np.arcsinh(sign * (best - shown) / near)

    def inverse(drawn: Array) -> Array:
        return best - sign * near * np.sinh(-sign * drawn)

    low, high = axes.get_ylim()
    low, high = (low, best + near / 2) if direction is Direction.MAXIMIZE else (best - near / 2, high)
    axes.set_yscale("function", functions=(forward, inverse))
    axes.set_ylim(low, high)
    ends = forward(np.array([low, high]))
    at = inverse(np.linspace(ends[0], ends[1], 9))
    digits = [max(0, -math.floor(math.log10(step))) for step in np.diff(at)]
    axes.set_yticks(sorted({round(float(tick), digit) for tick, digit in zip(at[1:-1], digits[1:], strict=True)}))
    axes.yaxis.set_major_formatter(lambda value, _: format_value(value))
    axes.set_ylabel(f"{axes.get_ylabel()}\nstretched near the best")


def _curve_handle(colour: str, label: str, *, is_joined: bool) -> Line2D:
    return Line2D([], [], color=colour, marker="o", markersize=4, linestyle="-" if is_joined else "", label=label)


def _draw_curve(axes: Axes, record: TrialRecord, *, is_joined: bool, **looks: float | str) -> None:
    """A learning curve; folds have no order, so their values are not joined."""
    epochs = sorted(record.curve)
    values = [v if math.isfinite(v) else math.nan for v in (record.curve[epoch] for epoch in epochs)]
    axes.plot(epochs, values, marker="o", linestyle="-" if is_joined else "", **looks)  # type: ignore[arg-type]


def _legend(
    figure: Figure,
    records: Sequence[TrialRecord],
    *,
    best_so_far: bool = False,
    default: bool = False,
    best_trial: TrialRecord | None,
) -> None:
    handles = []
    for state, (colour, marker) in _LOOKS.items():
        count = sum(record.state == state for record in records)
        if count:
            handles.append(Line2D([], [], color=colour, marker=marker, linestyle="", label=f"{count} {state}"))
    if best_so_far:
        handles.append(Line2D([], [], color=GREEN, linewidth=2, label="best so far"))
    if default:
        ring = Line2D([], [], color=BLACK, marker="o", linestyle="", markersize=10, markerfacecolor="none")
        ring.set_label("default configuration")
        handles.append(ring)
    if best_trial:
        label = f"best: trial {best_trial.number}"
        handles.append(Line2D([], [], color=GREEN, marker="*", linestyle="", markersize=12, label=label))
    if handles:
        figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _position(parameter: Parameter, record: TrialRecord, name: str) -> float:
    value = record.values[name]
    if not isinstance(parameter, Choice):
        return float(value)
    # Multiples of the golden ratio fill a range evenly, in whatever order the trials come.
    jitter = (record.number * 0.6180339887) % 1 - 0.5
    return [format_value(choice) for choice in parameter.choices].index(format_value(value)) + 0.5 * jitter


def _scale_parameter_axis(axes: Axes, parameter: Parameter) -> None:
    if isinstance(parameter, Choice):
        labels = [format_value(choice) for choice in parameter.choices]
        crowded = len(labels) * max(map(len, labels)) > 30
        axes.set_xticks(range(len(labels)), labels, rotation=30 if crowded else 0, ha="right" if crowded else "center")
        axes.set_xlim(-0.6, len(labels) - 0.4)
        return
    low, high = parameter.low, parameter.high
    if parameter.log:
        axes.set_xscale("log")
        margin = (high / low) ** 0.04
        axes.set_xlim(low / margin, high * margin)
        axes.xaxis.set_major_locator(log_ticks(high / low))
        axes.xaxis.set_major_formatter(lambda value, _: format_value(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
        return
    axes.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=isinstance(low, int) and isinstance(high, int)))
