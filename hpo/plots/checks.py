"""The picture of `hpo check`: a panel for each check that measured something."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpo.plots.colours import BLUE, GREEN, GREY, SKY
from hpo.plots.style import DPI, say_nothing_to_show, style_axes


def plot_checklist(task: str, data: Mapping[str, Mapping[str, Any]]) -> Figure:
    """What the checks of a task measured, by check; a panel stays empty where a check has not come to its end."""
    figure = Figure(figsize=(13.0, 7.0), dpi=DPI, layout="constrained")
    figure.suptitle(f"hpo check {task}", fontweight="bold")
    panels: dict[str, Callable[[Axes, Mapping[str, Any]], None]] = {
        "targets": _draw_targets,
        "gradients": _draw_gradients,
        "one batch": _draw_one_batch,
        "baseline": _draw_baseline,
        "learning rate": _draw_range_test,
        "speed by batch": _draw_speed,
    }
    for axes, (check, draw) in zip(figure.subplots(2, 3).flatten(), panels.items(), strict=True):
        style_axes(axes)
        axes.set_title(check, fontsize=10)
        if any(isinstance(values, list) and values for values in data[check].values()) or check == "baseline":
            draw(axes, data[check])
        else:
            say_nothing_to_show(axes, "nothing was measured")
    return figure


def _draw_targets(axes: Axes, data: Mapping[str, Any]) -> None:
    if "values" in data:
        axes.hist(data["values"], bins=30, color=BLUE)
        axes.set_xlabel("target")
    elif "means" in data:
        numbers = range(len(data["means"]))
        axes.errorbar(numbers, data["means"], yerr=data["deviations"], fmt="o", color=BLUE, capsize=3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("number of the target")
        axes.set_ylabel("mean and standard deviation")
        return
    else:
        axes.bar(range(len(data["counts"])), data["counts"], color=BLUE)
        names, crowded = data["classes"], len("".join(data["classes"])) > 40
        if len(names) <= 30:
            axes.set_xticks(
                range(len(names)), names, rotation=30 if crowded else 0, ha="right" if crowded else "center"
            )
    axes.set_ylabel("training examples")


def _draw_gradients(axes: Axes, data: Mapping[str, Any]) -> None:
    axes.semilogy(range(1, len(data["gradients"]) + 1), [g or math.nan for g in data["gradients"]], "o-", color=BLUE)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("gradient-to-weight ratio")


def _draw_one_batch(axes: Axes, data: Mapping[str, Any]) -> None:
    axes.plot(range(1, len(data["losses"]) + 1), data["losses"], color=BLUE)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step")
    axes.set_ylabel("loss on the batch")


def _draw_baseline(axes: Axes, data: Mapping[str, Any]) -> None:
    if not data:
        say_nothing_to_show(axes, "nothing was measured")
        return
    others = {"no network": ("naive", GREY), "linear": ("linear", SKY)}  # which not every kind of target has
    scores = {name: (data[key], colour) for name, (key, colour) in others.items() if key in data}
    scores[f"network,\nepoch {data['epochs']}"] = data["network"], BLUE
    values, colours = zip(*scores.values(), strict=True)
    bars = axes.bar(list(scores), values, color=colours)
    if len(scores) < 3:
        axes.set_xlim(-1.0, len(scores))  # or a single bar would be as wide as the panel
    axes.bar_label(bars, fmt="%.3f", fontsize=9)
    axes.margins(y=0.1)
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel(f"validation {data['metric']}")


def _draw_range_test(axes: Axes, data: Mapping[str, Any]) -> None:
    axes.semilogx(data["rates"], data["losses"], color=SKY, linewidth=1, label="loss")
    axes.semilogx(data["rates"], data["smoothed"], color=BLUE, label="smoothed")
    if "low" in data:
        axes.axvspan(data["low"], data["high"], color=GREEN, alpha=0.15, label=f"{data['low']:g} to {data['high']:g}")
    lowest, first = min(data["smoothed"]), data["smoothed"][0]
    axes.set_ylim(lowest - 0.3 * (first - lowest) - 0.02 * first, first + 0.6 * (first - lowest) + 0.02 * first)
    axes.set_xlabel("learning rate")
    axes.set_ylabel("loss of the step")
    axes.legend(frameon=False, fontsize=8)


def _draw_speed(axes: Axes, data: Mapping[str, Any]) -> None:
    axes.plot(data["batch_sizes"], data["examples_a_second"], "o-", color=BLUE)
    for size, rate, memory in zip(data["batch_sizes"], data["examples_a_second"], data["memory"], strict=True):
        axes.annotate(memory, (size, rate), (0, 7), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks(data["batch_sizes"], [str(size) for size in data["batch_sizes"]])
    axes.margins(x=0.12, y=0.15)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("batch size")
    axes.set_ylabel("examples a second")
