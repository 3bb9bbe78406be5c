"""The page of a report: one HTML file with its styles, its script and plotly inside, so that it needs no network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from plotly.offline import get_plotlyjs

from hpo.parameters import describe_default
from hpo.records import ELIGIBLE, TrialRecord, count_finished, ranked
from hpo.report import figures
from hpo.search.importances import describe_share
from hpo.search.winner import describe_certainty, describe_comparison, describe_confirmation, describe_training
from hpo.values import describe_conditions, format_value

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from hpo.records import Mistake, Winner
    from hpo.report.content import Content

MAX_ROWS = 200
"""Trials in the table, the best first."""

_MAX_TEXT = 400


def draw_page(content: Content, *, refresh_s: int | None) -> str:
    """The report as HTML; with `refresh_s` a browser that shows it reloads it after that many seconds."""
    drawn: dict[str, Figure] = {}
    body = "\n".join(_sections(content, drawn))
    return as_page(content.study, body, drawn, refresh_s=refresh_s)


def as_page(title: str, body: str, drawn: Mapping[str, Figure], *, refresh_s: int | None = None) -> str:
    """A whole page of HTML that has a place for each figure that is `drawn`, by its name."""
    refresh = f'<meta http-equiv="refresh" content="{refresh_s}">' if refresh_s else ""
    plain = {name: json.loads(figure.to_json()) for name, figure in drawn.items()}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}: hyperparameter search</title>
<style>{_file("page.css")}</style></head><body><main>
{body}
<div id="selection"><span></span><button id="clear">show all</button></div>
</main>
<script>{get_plotlyjs()}</script>
<script type="application/json" id="figures">{_as_script(plain)}</script>
<script>{_file("page.js")}</script>
</body></html>
"""


def _file(name: str) -> str:
    return files("hpo.report").joinpath(name).read_text(encoding="utf-8")


def _as_script(data: Any) -> str:
    """JSON that cannot end the element it stands in."""
    return json.dumps(data).replace("<", "\\u003c")


def _sections(content: Content, drawn: dict[str, Figure]) -> Iterator[str]:
    """The parts of the page in their order; the figures that they have room for are put into `drawn`."""
    settings = content.settings
    yield _head(content)
    if content.winner:
        yield section("Best configuration", _winner(content, content.winner))
    if content.front:
        drawn["front"] = figures.plot_front(content)
        yield section("Pareto front", place("front"), _front(content))
    if figure := figures.plot_confirmation(content):
        drawn["confirmation"] = figure
        yield section("Spread over new seeds", _confirmation(content), place("confirmation"))
    yield section("What was searched, in order of priority", _space(content))
    if any(trial.value is not None for trial in content.trials):
        drawn["history"] = figures.plot_history(content)
        zoom = '<p class="dim hint">Drag to zoom, double-click to see all, select with the box tool.</p>'
        yield section("History", zoom, _hidden(content), place("history"))
        drawn["curves"] = figures.plot_curves(content)
        shown = f"The best {figures.MAX_CURVES} trials at most; the best one is thick, dotted ones were pruned."
        title = "Values by fold" if settings.folds else "Learning curves"
        yield section(title, f'<p class="dim">{shown}</p>', place("curves"))
    if figure := figures.plot_coordinates(content):
        drawn["coordinates"] = figure
        hint = "Drag along an axis to keep only the trials in that range; all figures and the table follow."
        yield section("Parallel coordinates", f'<p class="dim hint">{hint}</p>', place("coordinates", is_wide=True))
        yield section(f"{settings.metric} by parameter", _slices(content, drawn))
    yield section("Importance of the parameters", _importances(content, drawn))
    if content.findings:
        items = "".join(f"<li>{escape(finding.text)}</li>" for finding in content.findings)
        yield section("Findings", f"<ul>{items}</ul>")
    if figure := figures.plot_confusion(content):
        drawn["confusion"] = figure
        yield section("Confusion matrix of the test split", place("confusion"))
    if content.mistakes:
        yield section("Most confident mistakes on the test split", _mistakes(content.mistakes))
    yield section("Trials", _trials(content))
    yield section("How to reproduce it", _reproduce(content))


def section(title: str, *parts: str) -> str:
    name = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
    return f'<section id="s-{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def place(name: str, *, is_wide: bool = False) -> str:
    """Where page.js draws a figure; a wide one scrolls on a small screen."""
    inner = f'<div id="{name}"{" class=wide" if is_wide else ""}></div>'
    return f'<div class="scroll">{inner}</div>' if is_wide else inner


def _head(content: Content) -> str:
    settings = content.settings
    finished = count_finished(content.counts)
    states = ", ".join(f"{number} {state}" for state, number in content.counts.items() if number) or "no trial yet"
    planned = sum(content.counts[state] for state in (*ELIGIBLE, "diverged")) * settings.num_steps
    steps = "folds" if settings.folds else "epochs"
    saved = [f"{1 - content.num_epochs / planned:.0%} less than {planned}"] if planned > content.num_epochs else []
    saved += [f"{content.num_epochs_repeated} more to confirm"] if content.repeats else []
    standing = "" if content.is_done else ", not finished"
    cards = [*_winner_cards(content), ("trials", f"{finished} of {content.num_trials}{standing}", states)]
    cards.append((f"{steps} trained", str(content.num_epochs), "; ".join(saved)))
    cards.append(("time of training", _duration(content.seconds), "summed over all trials"))
    drawn = "".join(
        f'<div class="card"><span>{escape(name)}</span><b>{escape(value)}</b><span>{escape(more)}</span></div>'
        for name, value, more in cards
    )
    what = f"{settings.task}: {settings.metric} ({settings.direction}), strategy {settings.strategy}, "
    what += f"pruner {settings.pruner}, {settings.max_epochs} epochs, seed {settings.seed}"
    what += f", objectives {' and '.join(settings.objectives)}" if settings.objectives else ""
    what += f", constraints {' and '.join(settings.constraints)}" if settings.constraints else ""
    return f'<h1>{escape(content.study)}</h1><p class="dim">{escape(what)}</p><div class="cards">{drawn}</div>'


def _winner_cards(content: Content) -> Iterator[tuple[str, str, str]]:
    winner = content.winner
    if winner is None:
        yield f"best {content.settings.metric}", "none", "no trial has a result yet"
        return
    of = f"mean of {winner.folds} folds" if winner.folds else "validation split"
    yield f"{winner.metric}, {of}", f"{winner.validation:.4f}", describe_training(winner)
    if winner.test is not None and winner.metric in winner.test:
        low, high = winner.test_interval or (None, None)
        interval = "" if low is None else f"95% interval {low:.4f} to {high:.4f}; "
        yield f"{winner.metric}, test split", f"{winner.test[winner.metric]:.4f}", f"{interval}{_readings(winner)}"
    elif winner.test is None and winner.has_test:
        yield f"{winner.metric}, test split", "not used yet", "it is used once, when the search is complete"


def _readings(winner: Winner) -> str:
    return "used once" if winner.num_test_readings == 1 else f"used {winner.num_test_readings} times, once per winner"


def _winner(content: Content, winner: Winner) -> str:
    default = {name: parameter.default for name, parameter in content.settings.space.parameters.items()}
    rows = [
        (escape(name), f"<b>{escape(short(value))}</b>", escape(short(default[name])) if name in default else "")
        for name, value in winner.configuration.items()
    ]
    said = [describe_comparison(winner)] if winner.comparison else []
    said += [f"Confirmation: {describe_confirmation(winner)}"] if winner.confirmation else []
    if winner.test:
        said.append("Test: " + ", ".join(f"{name} {value:.4f}" for name, value in winner.test.items()))
        if winner.metric in winner.test:
            said.append(f"Validation minus test: {winner.validation - winner.test[winner.metric]:.4f}")
    said += [f"Certainty: {describe_certainty(winner)}"] if winner.certainty else []
    return table(("parameter", "best", "default"), rows) + "".join(f"<p>{escape(line)}.</p>" for line in said)


def _confirmation(content: Content) -> str:
    assert content.race is not None, "there is a confirmation"
    return table(
        ("trial", "in the search", "mean of new seeds", "standard deviation", ""),
        [
            (
                str(row["trial"]),
                *(("-" if row[name] is None else f"{row[name]:.4f}") for name in ("searched", "mean", "std")),
                "dropped" if row["is_behind"] else "",
            )
            for row in content.race["configurations"]
        ],
    )


def _space(content: Content) -> str:
    rows = [
        (
            f"{priority}. {escape(group.name)}" if position == 0 else "",
            escape(name),
            escape(parameter.describe()),
            escape(describe_default(parameter)),
            escape(describe_conditions(parameter.when)),
        )
        for priority, group in enumerate(content.settings.space.groups, start=1)
        for position, (name, parameter) in enumerate(group.parameters.items())
    ]
    rules = "".join(f"<p>{escape(rule)}.</p>" for rule in content.settings.space.describe_rules())
    return f'<div class="scroll">{table(("group", "parameter", "range", "default", "active when"), rows)}</div>{rules}'


def _slices(content: Content, drawn: dict[str, Figure]) -> str:
    places = []
    for number, (name, figure) in enumerate(figures.plot_slices(content).items()):
        drawn[f"slice-{number}"] = figure
        places.append(f"<div><h3>{escape(name)}</h3>{place(f'slice-{number}')}</div>")
    hint = '<p class="dim hint">Drag a box to select trials; all figures and the table follow.</p>'
    return f'{hint}{_hidden(content)}<div class="slices">{"".join(places)}</div>'


def _hidden(content: Content) -> str:
    """How many trials are outside of the range that figures show at first."""
    number = figures.num_hidden(content)
    if not number:
        return ""
    lie = "trial lies" if number == 1 else "trials lie"
    return f'<p class="dim">{number} {lie} outside of the range that is shown; double-click to see all.</p>'


def _front(content: Content) -> str:
    names = [name for name in content.front[0] if name not in ("trial", "configuration")]
    rows = [
        (
            str(row["trial"]),
            *(f"{row[name]:{'.4f' if name == content.settings.metric else '.6g'}}" for name in names),
            escape(", ".join(f"{name}={short(value)}" for name, value in row["configuration"].items())),
        )
        for row in content.front
    ]
    return f'<div class="scroll">{table(("trial", *map(escape, names), "configuration"), rows)}</div>'


def _importances(content: Content, drawn: dict[str, Figure]) -> str:
    rated = content.importances
    figure = figures.plot_importances(content)
    if figure:
        drawn["importances"] = figure
    rows = [
        (escape(group), escape(name), escape(describe_share(each.share, each.low, each.high, each.condition)))
        for group, name, each in rated.rows()
    ]
    note = f'<p class="dim">{escape(rated.note)}</p>' if rated.note else ""
    shares = table(("group", "parameter", "share (90% interval)"), rows) if rows else ""
    return (place("importances") if figure else "") + note + shares


def _trials(content: Content) -> str:
    names, costs = list(content.settings.space.parameters), list(content.settings.costs)
    best = ranked(content.trials, content.settings.direction)
    numbers = {trial.number for trial in best}
    others = [trial for trial in content.trials if trial.number not in numbers]
    shown = [*best, *others][:MAX_ROWS]
    head = ("trial", "state", content.settings.metric, *costs, "best epoch", "stage", *names)
    rows = "".join(
        f'<tr data-trial="{trial.number}">{"".join(f"<td>{cell}</td>" for cell in _cells(trial, names, costs))}</tr>'
        for trial in shown
    )
    more = len(content.trials) - len(shown)
    note = f'<p class="dim">{more} more, not shown; <code>hpo show --csv</code> has all.</p>' if more > 0 else ""
    return f'<div class="scroll"><table>{_head_row(head)}{rows}</table></div>{note}'


def _cells(trial: TrialRecord, names: Sequence[str], costs: Sequence[str]) -> list[str]:
    value = "-" if trial.value is None else f"{trial.value:.4f}"
    cells = [
        str(trial.number),
        trial.state,
        value,
        *(f"{trial.costs[name]:.6g}" if name in trial.costs else "-" for name in costs),
    ]
    cells += [str(trial.best_epoch or ""), escape(trial.stage)]
    active = trial.configuration
    return [*cells, *(escape(short(active[name])) if name in active else "" for name in names)]


def _mistakes(mistakes: Sequence[Mistake]) -> str:
    """What the best model is most sure of and wrong about, as pictures or texts."""
    pictures = []
    for mistake in mistakes:
        said = (
            f"example {mistake.example}: <b>{escape(mistake.truth)}</b> taken for <b>{escape(mistake.answer)}</b> "
            f"({mistake.probability:.1%})"
        )
        shown = f"<blockquote>{escape(_cut(mistake.text))}</blockquote>" if mistake.text else ""
        if mistake.picture:
            named = escape(f"{mistake.truth} taken for {mistake.answer}", quote=True)
            shown = f'<img src="data:image/png;base64,{mistake.picture}" alt="{named}">'
        pictures.append(f"<figure>{shown}<figcaption>{said}</figcaption></figure>")
    is_text = any(mistake.text for mistake in mistakes)
    return f'<div class="{"texts" if is_text else "pictures"}">{"".join(pictures)}</div>'


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} ..."


def _reproduce(content: Content) -> str:
    lines = "".join(f"<p>{escape(line)}</p>" for line in content.made_with)
    commands = "".join(f"<pre>{escape(command)}</pre>" for command in content.commands)
    return (
        f"{commands}<p>Seed {content.settings.seed}. With one worker on a CPU, <code>--compile off</code> and no limit "
        "of time, the same commands with the same versions and data give the same trials; with several workers, or on "
        "a GPU, trials differ from run to run. Load the model: "
        f'<code>hpo.load_best("{escape(content.study)}")</code></p>{lines}'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>{_head_row(head)}{body}</table>"


def _head_row(names: Sequence[str]) -> str:
    return f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>"


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_value(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
