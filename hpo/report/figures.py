"""The figures of a report, by plotly: they can be zoomed, hovered, brushed and filtered in the page.

States differ in shape as well as in colour (Okabe and Ito, 2008), so that the report reads without colour. Points carry
the number of their trial, by which page.js links the figures: what is selected in one is selected in all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from plotly import graph_objects as go

from hpo.config import Direction
from hpo.parameters import Choice, Parameter
from hpo.plots.colours import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED
from hpo.records import ELIGIBLE, TrialRecord, TrialState, ranked
from hpo.values import format_value

if TYPE_CHECKING:
    from hpo.report.content import Content
    from hpo.space import Space

_LOOKS: dict[TrialState, tuple[str, str]] = {
    "complete": (BLUE, "circle"),
    "pruned": (ORANGE, "triangle-down"),
    "diverged": (PURPLE, "diamond"),
    "infeasible": (BLACK, "star-triangle-up"),
    "failed": (RED, "x"),
    "running": (GREEN, "cross"),
    "interrupted": (GREY, "square"),
}
MAX_CURVES = 60
"""Learning curves of that many of the best trials; more could not be told from each other."""

_FEWEST_TO_ZOOM = 20  # trials


def plot_history(content: Content) -> go.Figure:
    """The value of each trial, and the best so far."""
    figure = blank("trial", content.settings.metric)
    for trace in _by_state(content.trials, lambda trial: trial.number):
        figure.add_trace(trace)
    candidates = sorted(ranked(content.trials, content.settings.direction), key=lambda trial: trial.number)
    if candidates:
        best = accumulate((record.known_value for record in candidates), content.settings.direction.best)
        figure.add_trace(_staircase([trial.number for trial in candidates], best, name="best so far"))
    figure.update_yaxes(range=_zoomed(content.trials, content.settings.direction))
    return figure


def plot_front(content: Content) -> go.Figure:
    """The metric of each complete trial against the first cost, and the Pareto front: with one cost as a line, with
    several as points, of which some are there for the sake of another cost."""
    cost = content.settings.costs[0]
    figure = blank(cost, content.settings.metric)
    for trace in _by_state([trial for trial in content.trials if cost in trial.costs], lambda trial: trial.costs[cost]):
        figure.add_trace(trace)
    line = sorted((row[cost], row[content.settings.metric]) for row in content.front)
    front = _staircase([x for x, _ in line], [y for _, y in line], name="Pareto front")
    if len(content.settings.costs) > 1:
        front.update(mode="markers", marker={"color": GREEN, "size": 14, "symbol": "circle-open", "line": {"width": 2}})
    figure.add_trace(front)
    return figure


def _staircase(x: Sequence[float], y: Iterable[float], *, name: str) -> go.Scatter:
    line = {"shape": "hv", "color": GREEN, "width": 2}
    return go.Scatter(x=x, y=list(y), mode="lines", line=line, name=name, hoverinfo="skip")


def num_hidden(content: Content) -> int:
    """Trials whose value is outside of the range that the value axes show at first."""
    shown = _zoomed(content.trials, content.settings.direction)
    values = [trial.known_value for trial in content.trials if trial.has_value]
    return sum(not shown[0] <= value <= shown[1] for value in values) if shown else 0


def plot_curves(content: Content) -> go.Figure:
    """The learning curves of the best trials; the best one thick."""
    steps = "fold" if content.settings.folds else "epoch"
    figure = blank(steps, content.settings.metric)
    best = [trial for trial in ranked(content.trials, content.settings.direction) if trial.curve][:MAX_CURVES]
    for rank, trial in reversed(list(enumerate(best))):
        points = {step: value for step, value in sorted(trial.curve.items()) if math.isfinite(value)}
        colour, _ = _LOOKS[trial.state]
        figure.add_trace(
            go.Scatter(
                x=list(points),
                y=list(points.values()),
                mode="lines+markers" if len(points) == 1 or steps == "fold" else "lines",
                line={
                    "color": GREEN if rank == 0 else colour,
                    "width": 3 if rank == 0 else 1.2,
                    "dash": "dot" if trial.state == "pruned" else "solid",
                },
                opacity=1.0 if rank == 0 else 0.6,
                name=f"trial {trial.number}",
                meta=trial.number,
                showlegend=False,
                hovertemplate=f"trial {trial.number}, {steps} %{{x}}: %{{y:.4f}}<extra></extra>",
            )
        )
    figure.update_yaxes(range=_zoomed(content.trials, content.settings.direction))
    return figure


def plot_coordinates(content: Content) -> go.Figure | None:
    """Parallel coordinates of every trial with a value: an axis can be brushed. None with fewer than two of them."""
    direction = content.settings.direction
    trials = ranked(content.trials, direction)
    searched = _searched(content.settings.space)
    if len(trials) < 2 or not searched:
        return None
    values = [trial.known_value for trial in trials]
    low, high = _zoomed(trials, direction) or (min(values), max(values))
    dimensions = [_dimension(name, parameter, trials) for name, parameter in searched.items()]
    ticks = _ticks(min(values), max(values), log=False)
    axis = {"tickvals": list(ticks.values()), "ticktext": list(ticks), "values": values}
    dimensions.append({"label": f"<b>{content.settings.metric}</b>", **axis})
    shown = {"cmin": max(low, min(values)), "cmax": min(high, max(values))}
    is_best_high = direction is Direction.MAXIMIZE
    line = {"color": values, "colorscale": "Viridis", "reversescale": not is_best_high, "showscale": True, **shown}
    numbers = [trial.number for trial in trials]
    parallel = go.Parcoords(line=line, dimensions=dimensions, customdata=numbers, labelangle=-25)
    return go.Figure(parallel, layout=_layout(height=440, margin={"l": 70, "r": 40, "t": 90, "b": 30}))


def _dimension(name: str, parameter: Parameter, trials: Sequence[TrialRecord]) -> dict[str, Any]:
    """An axis of the parallel coordinates; what is inactive lies below the others."""
    if isinstance(parameter, Choice):
        positions = {format_value(choice): float(index) for index, choice in enumerate(parameter.choices)}
        ticks = dict(positions)
    else:
        ends = (float(parameter.low), float(parameter.high))
        positions, ticks = {}, _ticks(*ends, log=parameter.log)
    span = max(ticks.values()) - min(ticks.values())
    below = min(ticks.values()) - (0.12 * span or 1.0)

    def at(trial: TrialRecord) -> float:
        if name in trial.inactive:
            return below
        value = trial.values[name]
        if positions:
            return positions[format_value(value)]
        assert not isinstance(parameter, Choice), "numbers have a scale"
        return math.log10(value) if parameter.log else float(value)

    found = [at(trial) for trial in trials]
    if below in found:
        ticks = {"inactive": below, **ticks}
    return {
        "label": name,
        "values": found,
        "tickvals": list(ticks.values()),
        "ticktext": list(ticks),
        "range": [min(ticks.values()), max(ticks.values())],
    }


def _ticks(low: float, high: float, *, log: bool) -> dict[str, float]:
    """A few values of a range and where they lie."""
    if not log:
        return {f"{value:.4g}": value for value in (low + share * (high - low) for share in (0, 0.25, 0.5, 0.75, 1))}
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    step = 1 + max(0, last - first) // 5  # a range such as 16:64 holds no power
    powers = [10.0**power for power in range(first, last + 1, step)]
    inner = [power for power in powers if 1.5 * low < power < high / 1.5]
    return {f"{value:.3g}": math.log10(value) for value in (low, *inner, high)}


def plot_slices(content: Content) -> dict[str, go.Figure]:
    """The value against each parameter that is searched, by its name; without the trials in which it is inactive."""
    figures = {}
    for name, parameter in _searched(content.settings.space).items():
        active = [trial for trial in content.trials if name not in trial.inactive and name in trial.values]
        figure = blank("", "", height=230)
        place = _as_text(name) if isinstance(parameter, Choice) else _as_number(name)
        for trace in _by_state(active, place, size=6):
            trace.showlegend = False
            figure.add_trace(trace)
        if isinstance(parameter, Choice):
            names = [format_value(choice) for choice in parameter.choices]
            figure.update_xaxes(type="category", categoryorder="array", categoryarray=names)
        elif parameter.log:
            ticks = _ticks(float(parameter.low), float(parameter.high), log=True)
            figure.update_xaxes(type="log", tickvals=[10**power for power in ticks.values()], ticktext=list(ticks))
        else:
            figure.update_xaxes(nticks=5)
        figure.update_yaxes(range=_zoomed(content.trials, content.settings.direction), nticks=4)
        figure.update_layout(margin={"l": 45, "r": 10, "t": 8, "b": 32}, dragmode="select")
        figures[name] = figure
    return figures


def _as_text(name: str) -> Callable[[TrialRecord], Any]:
    return lambda trial: format_value(trial.values[name])


def _as_number(name: str) -> Callable[[TrialRecord], Any]:
    return lambda trial: trial.values[name]


def plot_importances(content: Content) -> go.Figure | None:
    """The share of each parameter with its 90% interval, the largest on top; None if none is known."""
    known = [(name, *each) for shares in content.importances.known().values() for name, each in shares.items()]
    if not known:
        return None
    known.sort(key=lambda row: row[1])
    names, shares, lows, highs = zip(*known, strict=True)
    bars = go.Bar(
        x=shares,
        y=names,
        orientation="h",
        marker={"color": BLUE},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [high - share for high, share in zip(highs, shares, strict=True)],
            "arrayminus": [share - low for share, low in zip(shares, lows, strict=True)],
            "color": GREY,
        },
        hovertemplate="%{y}: %{x:.0%}<extra></extra>",
    )
    figure = blank("share of the variance, with a 90% interval", "", height=max(220, 60 + 30 * len(known)))
    figure.add_trace(bars)
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(automargin=True)
    return figure


def plot_confirmation(content: Content) -> go.Figure | None:
    """The new trainings of each of the best configurations, their mean, and what the search had seen."""
    if content.race is None:
        return None
    rows = content.race["configurations"]
    figure = blank("", content.settings.metric, height=320)
    names = [f"trial {row['trial']}" for row in rows]
    figure.add_trace(
        go.Scatter(
            x=names,
            y=[row["searched"] for row in rows],
            mode="markers",
            marker={"symbol": "star-open", "size": 12, "color": ORANGE},
            name="in the search",
        )
    )
    points = [(name, value) for name, row in zip(names, rows, strict=True) for value in row["values"]]
    figure.add_trace(
        go.Scatter(
            x=[name for name, _ in points],
            y=[value for _, value in points],
            mode="markers",
            marker={"color": BLUE, "size": 8, "opacity": 0.7},
            name="new seeds",
        )
    )
    figure.add_trace(
        go.Scatter(
            x=names,
            y=[row["mean"] for row in rows],
            mode="markers",
            marker={"symbol": "line-ew", "size": 26, "line": {"width": 3, "color": GREEN}},
            error_y={"type": "data", "array": [row["std"] or 0.0 for row in rows], "color": GREEN},
            name="mean, standard deviation",
        )
    )
    figure.update_xaxes(type="category")
    return figure


def plot_confusion(content: Content) -> go.Figure | None:
    """What the classes of the test split are taken for; None if that was not counted."""
    winner = content.winner
    if winner is None or not winner.confusion:
        return None
    classes, counts = winner.confusion["classes"], winner.confusion["counts"]
    shares = [[count / (sum(row) or 1) for count in row] for row in counts]
    is_small = len(classes) <= 20
    heat = go.Heatmap(
        z=shares,
        x=classes,
        y=classes,
        colorscale="Blues",
        zmin=0,
        zmax=1,
        text=counts,
        texttemplate="%{text}" if is_small else None,
        customdata=counts,
        hovertemplate="%{y} taken for %{x}: %{customdata}<extra></extra>",
        colorbar={"tickformat": ".0%", "title": {"text": "of the true class", "side": "right"}},
    )
    figure = blank("predicted class", "true class", height=min(760, 200 + 34 * len(classes)))
    figure.add_trace(heat)
    figure.update_xaxes(type="category", showgrid=False)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    return figure


def _searched(space: Space) -> dict[str, Parameter]:
    return {name: parameter for name, parameter in space.parameters.items() if not parameter.is_fixed}


def _by_state(trials: Sequence[TrialRecord], place: Callable[[TrialRecord], Any], *, size: int = 8) -> list[go.Scatter]:
    """A trace of points for each state of the trials that have a value."""
    traces = []
    for state, (colour, symbol) in _LOOKS.items():
        own = [trial for trial in trials if trial.state == state and trial.has_value]
        if not own:
            continue
        traces.append(
            go.Scatter(
                x=[place(trial) for trial in own],
                y=[trial.known_value for trial in own],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": size, "line": {"width": 0}},
                unselected={"marker": {"opacity": 0.12}},
                name=state,
                customdata=[trial.number for trial in own],
                text=[_describe(trial) for trial in own],
                hovertemplate="%{text}<extra></extra>",
            )
        )
    return traces


def _describe(trial: TrialRecord) -> str:
    """The trial and its configuration, for whoever points at it."""
    active = (f"{name} {format_value(value)}" for name, value in trial.configuration.items())
    return "<br>".join([f"<b>trial {trial.number}</b>, {trial.state}: {trial.known_value:.4f}", *active])


def _zoomed(trials: Sequence[TrialRecord], direction: Direction) -> list[float] | None:
    """The range of the value axis at first: the better three quarters of the trials. None shows all of few trials."""
    losses = sorted(
        direction.loss(trial.known_value) for trial in trials if trial.state in ELIGIBLE and trial.value is not None
    )
    if len(losses) < _FEWEST_TO_ZOOM:
        return None
    best, worst = losses[0], losses[math.ceil(0.75 * len(losses)) - 1]
    margin = 0.08 * (worst - best) or 0.01
    ends = direction.loss(best - margin), direction.loss(worst + margin)
    return [min(ends), max(ends)]


def blank(x: str, y: str, *, height: int = 380) -> go.Figure:
    """A figure with these titles of its axes and nothing in it yet."""
    figure = go.Figure(layout=_layout(height=height, margin={"l": 60, "r": 20, "t": 20, "b": 48}))
    grid = {"gridcolor": "rgba(128,128,128,0.25)", "zeroline": False}
    figure.update_xaxes(title={"text": x}, **grid)
    figure.update_yaxes(title={"text": y}, **grid)
    return figure


def _layout(*, height: int, margin: dict[str, int]) -> dict[str, Any]:
    """Transparent, so that the page's own colours, light or dark, are behind it."""
    return {
        "height": height,
        "margin": margin,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "legend": {"orientation": "h", "y": 1.12, "x": 0},
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "hoverlabel": {"align": "left"},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "rgba(128,128,128,0.6)", "activecolor": BLUE},
        "template": None,
    }
