"""Studies side by side: what each came to, how fast, and with which configuration."""

from __future__ import annotations

from collections.abc import Sequence
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


def draw_comparison(contents: Sequence[Content]) -> str:
    """Studies of one metric as an HTML page: scores, the best value by epochs spent, and the best configurations."""
    names = [content.study for content in contents]
    body = [
        f"<h1>{escape(' and '.join(names))}</h1>",
        section("Scores", f'<div class="scroll">{_scores(contents)}</div>'),
        section("Best value by epochs spent", place("progress")),
        section("Best configurations", f'<div class="scroll">{_configurations(contents)}</div>'),
    ]
    return as_page(" and ".join(names), "\n".join(body), {"progress": plot_progress(contents)})


def plot_progress(contents: Sequence[Content]) -> go.Figure:
    """The best value so far against the epochs, or folds, that all trials up to then have trained."""
    figure = figures.blank("epochs spent, in the order of the trials", contents[0].settings.metric)
    for index, content in enumerate(contents):
        direction = content.settings.direction
        spent = dict(zip([trial.number for trial in content.trials], _epochs_spent(content), strict=True))
        known = sorted(ranked(content.trials, direction), key=lambda trial: trial.number)
        values = [trial.value for trial in known if trial.value is not None]  # which the ranked ones have
        colour, dash = _LINES[index % len(_LINES)]
        figure.add_trace(
            go.Scatter(
                x=[spent[trial.number] for trial in known],
                y=list(accumulate(values, direction.best)),
                mode="lines",
                line={"shape": "hv", "color": colour, "dash": dash, "width": 2.5},
                name=content.study,
            )
        )
    return figure


def _epochs_spent(content: Content) -> list[int]:
    return list(accumulate(len(trial.curve) for trial in content.trials))


def _scores(contents: Sequence[Content]) -> str:
    metric = contents[0].settings.metric
    head = (
        "study",
        "strategy",
        "pruner",
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
                escape(content.settings.strategy),
                escape(content.settings.pruner),
                f"{len(content.trials)}",
                f"{content.num_epochs}",
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
