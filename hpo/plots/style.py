"""How every figure looks: its axes, and what stands where there is nothing to show."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from hpo.plots.colours import GREY

DPI = 110


def new_figure(title: str, *, width: float, height: float, grid: str = "y") -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    figure.suptitle(title, fontweight="bold")
    axes = figure.subplots()
    style_axes(axes, grid)
    return figure, axes


def style_axes(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis=grid, color="#e5e5e5", linewidth=0.8)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def say_nothing_to_show(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_yticks([])


def log_ticks(ratio: float) -> Locator:
    """Ticks at powers of ten; in a range of less than three decades also at 2 and 5, in less than one even."""
    if ratio < 10:
        return MaxNLocator(nbins=4)
    return LogLocator(subs=(1.0,) if ratio >= 1000 else (1.0, 2.0, 5.0), numticks=4 if ratio >= 1000 else 12)
