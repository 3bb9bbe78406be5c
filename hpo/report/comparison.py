"""Studies side by side: what each came to, how fast, and with which configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from html import escape
from itertools import accumulate
from typing import TYPE_CHECKING

from plotly import graph_objects as go

from hpo.plots.colours import BLUE, GREEN, ORANGE, PURPLE, RED
from hpo.records import ranked
from hpo.report import figures
from hpo.report.page import as_page, place, section, short, table

if TYPE_CHECKING:
    from hpo.report.content import Content

_LINES = (
    (BLUE, "solid"),
    (ORANGE, "dash"),
    (GREEN, "dot"),
    (RED, "dashdot"),
    (PURPLE, "longdash"),
)


def draw_comparison(contents: Sequence[Content], note: str | None) -> str:
    """Studies of one metric as an HTML page: scores, the best value by epochs spent, and the best configurations.

    `note` says what keeps the scores from being compared.
    """
    names = [content.study for content in contents]
    body = [
        f"<h1>{escape(' and '.join(names))}</h1>",
        section("Scores", f'<div class="scroll">{_scores(contents)}</div>', f"<p>{escape(note)}</p>" if note else ""),
        section("Best value by epochs spent", place("progress")),
        section("Best configurations", f'<div class="scroll">{_configurations(contents)}</div>'),
    ]
    return as_page(" and ".join(names), "\n".join(body), {"progress": plot_progress(contents)})


def plot_progress(contents: Sequence[Content]) -> go.Figure:
    """The best value so far against the epochs, or folds, that all trials up to then have trained."""
    figure = figures.blank("epochs spent, in the order of the trials", contents[0].settings.metric)
    for index, content in enumerate(contents):
        spent, values = zip(*progress(content), strict=True) if content.winner else ((), ())
        colour, dash = _LINES[index % len(_LINES)]
        figure.add_trace(
            go.Scatter(
                x=list(spent),
                y=list(accumulate(values, content.settings.direction.best)),
                mode="lines",
                line={"shape": "hv", "color": colour, "dash": dash, "width": 2.5},
                name=content.study,
            )
        )
    return figure


def progress(content: Content) -> Iterator[tuple[int, float]]:
    """The epochs, or folds, spent until each trial was over, and its value; those that were continued come again last.

    A pruned trial that was continued at the end of the search had then only the value of its first epochs. What its
    first folds said of all of them is not known any more.
    """
    direction, spent = content.settings.direction, 0
    eligible = {trial.number for trial in ranked(content.trials, direction)}
    continued = [trial for trial in content.trials if trial.pruned_after]
    for trial in content.trials:
        values = list(trial.curve.values())[: trial.pruned_after]
        spent += len(values)
        if trial.number in eligible and not trial.pruned_after:
            yield spent, trial.known_value
        elif trial.number in eligible and not content.settings.folds:
            yield spent, reduce(direction.best, filter(math.isfinite, values))
    for trial in continued:
        spent += len(trial.curve) - (trial.pruned_after or 0)
        if trial.number in eligible:
            yield spent, trial.known_value


def _scores(contents: Sequence[Content]) -> str:
    metric = contents[0].settings.metric
    head = (
        "study",
        "task",
        "strategy",
        "pruner",
        "seed",
        "folds",
        "limit",
        "trials",
        "epochs",
        f"validation {metric}",
        f"test {metric}",
        "95% interval",
    )
    rows = []
    for content in contents:
        winner = content.winner
        test = winner.test.get(metric) if winner and winner.test else None
        interval = winner.test_interval if winner else None
        rows.append(
            (
                escape(content.study),
                escape(content.settings.task),
                escape(content.settings.strategy),
                escape(content.settings.pruner),
                f"{content.settings.seed}",
                "-" if content.settings.folds is None else f"{content.settings.folds}",
                "-" if content.settings.limit is None else f"{content.settings.limit}",
                f"{len(content.trials)}",
                f"{content.num_epochs + content.num_epochs_repeated}",
                "-" if winner is None else f"{winner.validation:.4f}",
                "-" if test is None else f"{test:.4f}",
                "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            )
        )
    return table(head, rows)


def _configurations(contents: Sequence[Content]) -> str:
    """A row for each parameter; those that differ are bold."""
    known = [content.winner.configuration if content.winner else {} for content in contents]
    rows = []
    for name in dict.fromkeys(name for configuration in known for name in configuration):
        values = [short(configuration[name]) if name in configuration else "-" for configuration in known]
        mark = "{}" if len(set(values)) == 1 else "<b>{}</b>"
        rows.append((escape(name), *(mark.format(escape(value)) for value in values)))
    return table(("parameter", *(content.study for content in contents)), rows)
