"""What people read of their studies: tables for the terminal, and the same facts as plain data for --json."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hpo.errors import HpoError
from hpo.home import Home, find_storage
from hpo.plugins import OBJECTIVES, load_task, registered
from hpo.provenance import describe as describe_provenance
from hpo.provenance import sessions
from hpo.records import Winner, ranked, to_plain
from hpo.search.findings import findings
from hpo.search.importances import describe_share, importances
from hpo.search.lease import living_sessions
from hpo.search.storage import read_storage
from hpo.search.study import Study, list_studies
from hpo.search.winner import describe_comparison, find_winner, front_rows
from hpo.space import Group, Parameter, Space, describe_conditions, format_value

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.checks.checklist import Checklist
    from hpo.checks.verdicts import State, Verdict
    from hpo.records import SearchOutcome, TrialState


STYLES: dict[State, str] = {"ok": "green", "warning": "yellow", "wrong": "red"}
"""Of what a check says."""


def print_outcome(console: Console, outcome: SearchOutcome) -> None:
    """The last words of `hpo search`: the winner, its scores, where everything is and what to type next."""
    ending = "Done" if outcome.is_done else "Interrupted" if outcome.interrupted else "Time is up"
    console.print(f"{ending}: {describe_counts(outcome.counts)}.")
    if outcome.winner is not None:
        _print_winner(console, outcome.winner)
    if outcome.front:
        _print_front(console, outcome.front)
    console.print(f"Runs, curves and checkpoints are in {outcome.home}", soft_wrap=True)
    home = "" if outcome.home == Home.find().path else f" --home {shlex.quote(str(outcome.home))}"
    if outcome.is_done and outcome.counts["queued"]:
        console.print("Some configurations are still queued; raise --trials to run them.")
    if not outcome.is_done:
        console.print(_what_is_missing(outcome))
    elif outcome.all_diverged:
        console.print(
            f"Every trial diverged, so there is no winner: try smaller learning rates in a new --study; "
            f"hpo show {outcome.study}{home}"
        )
    elif outcome.winner is None:
        console.print(f"No trial has a result, so there is no winner; the reasons: hpo show {outcome.study}{home}")
    else:
        console.print(f"Next: hpo ui {outcome.study}{home}", soft_wrap=True)


def _what_is_missing(outcome: SearchOutcome) -> str:
    pending = ", ".join(f"trial {number}" for number in outcome.to_continue)
    if pending:
        return f"Go on with the same command: {pending}, pruned, may yet win and is then continued to its end."
    return "Go on with the same command."


def task_rows() -> list[dict[str, Any]]:
    """The registered tasks; a broken one says why."""
    return [_task_row(name) for name in registered(OBJECTIVES)]


def _task_row(name: str) -> dict[str, Any]:
    try:
        task = load_task(name)
    except HpoError as error:
        return {"task": name, "broken": str(error)}
    return {
        "task": name,
        "description": task.objective.description,
        "metric": task.objective.metric,
        "direction": task.objective.direction,
        "epochs": task.train_config({}).max_epochs,
        "parameters": len(task.space.parameters),
    }


def print_tasks(console: Console, rows: list[dict[str, Any]]) -> None:
    table = _table("task", "what it is", "optimises", "epochs", "parameters")
    for row in rows:
        if "broken" in row:
            table.add_row(row["task"], f"broken: {row['broken']}", style="red")
        else:
            goal = f"{row['metric']} ({row['direction']})"
            table.add_row(row["task"], row["description"], goal, str(row["epochs"]), str(row["parameters"]))
    console.print(table)


def print_space(console: Console, space: Space, closed_groups: Sequence[Group]) -> None:
    """The groups in the order in which they are tuned, then what is closed and can be opened."""
    for priority, group in enumerate(space.groups, start=1):
        console.print(_parameter_table(f"{priority}. {group.name}", group.parameters))
    for group in closed_groups:
        closed = {name: parameter for name, parameter in group.parameters.items() if name not in space.parameters}
        if closed:
            console.print(_parameter_table(f"{group.name}: closed, -p NAME=VALUES opens a parameter", closed))


def _parameter_table(title: str, parameters: Mapping[str, Parameter]) -> Table:
    table = _table("parameter", "range", "default", "active when", title=title)
    for name, parameter in parameters.items():
        table.add_row(name, parameter.describe(), format_value(parameter.default), describe_conditions(parameter.when))
    return table


def study_rows(home: Path | None, storage: str | None = None) -> list[dict[str, Any]]:
    """The studies of a home, or of a shared database, the oldest first, and who searches them now."""
    database = read_storage(Home.find(home).path, find_storage(storage))
    return [
        _study_row(study, [session.name for session in living_sessions(database, study.name)])
        for study in list_studies(database)
    ]


def _study_row(study: Study, searchers: list[str]) -> dict[str, Any]:
    best = study.best()
    return {
        "study": study.name,
        "task": study.settings.task,
        "trials": f"{study.num_finished}/{study.num_trials}",
        "now": f"searched by {', '.join(searchers)}" if searchers else "done" if study.is_done else "stopped",
        "metric": study.settings.metric,
        "best": best and best.value,
        "best trial": best and best.number,
        "strategy": study.settings.strategy,
        "seed": study.settings.seed,
    }


def print_studies(console: Console, rows: list[dict[str, Any]]) -> None:
    if not rows:
        console.print("There is no study yet. Start one with: hpo search digits --trials 20")
        return
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*("" if cell is None else _short(cell) for cell in row.values()))
    console.print(table)


def study_facts(name: str, home: Path | None, storage: str | None = None, top: int | None = None) -> dict[str, Any]:
    """Settings and trials of a study, and what it has learned; the best `top` trials, or all in order."""
    study = Study.load(read_storage(Home.find(home).path, find_storage(storage)), name)
    trials = study.trials()
    if top is not None:
        trials = ranked(trials, study.settings.direction)[:top]
    rated = importances(study)
    facts: dict[str, Any] = to_plain(
        {
            "study": name,
            "task": study.settings.task,
            "metric": study.settings.metric,
            "direction": study.settings.direction,
            "objectives": study.settings.objectives,
            "strategy": study.settings.strategy,
            "pruner": study.settings.pruner,
            "epochs": study.settings.max_epochs,
            "seed": study.settings.seed,
            "limit": study.settings.limit,
            "folds": study.settings.folds,
            "fixed": study.settings.fixed,
            "counts": study.counts(),
            "provenance": [asdict(session) for session in sessions(study)],
            "made_with": describe_provenance(study),
            "pruned_winner": _describe_pruned_winner(find_winner(study), study),
            "importances": {group: asdict(each) for group, each in rated.groups.items()},
            "importances_note": rated.note,
            "findings": [asdict(finding) for finding in findings(study)],
            "trials": [asdict(trial) for trial in trials],
        }
    )
    return facts


def _describe_pruned_winner(winner: Winner | None, study: Study) -> str | None:
    if winner is None or winner.pruned is None:
        return None
    return (
        f"Trial {winner.trial}, the best so far, was {winner.pruned}; "
        f"it is continued when {study.num_trials} trials have run."
    )


def print_study(console: Console, facts: dict[str, Any]) -> None:
    console.print(
        f"{facts['study']}: {_goal(facts)}, "
        f"strategy {facts['strategy']}, "
        f"pruner {facts['pruner']}, {facts['epochs']} epochs, seed {facts['seed']}; {describe_counts(facts['counts'])}"
    )
    if facts["fixed"]:
        console.print(f"Fixed with --set: {', '.join(facts['fixed'])}")
    for line in facts["made_with"]:
        console.print(line, soft_wrap=True)
    costs = facts["objectives"][1:]
    is_estimated = [bool(facts["folds"]) and trial["state"] == "pruned" for trial in facts["trials"]]
    steps = "folds" if facts["folds"] else "epochs"
    table = _table("trial", "state", facts["metric"], *costs, "best epoch", steps, "configuration")
    for trial, estimated in zip(facts["trials"], is_estimated, strict=True):
        table.add_row(
            str(trial["number"]),
            trial["state"],
            "-" if trial["state"] == "failed" else _score(trial["value"], estimated=estimated),
            *(_cost(name, trial["costs"].get(name)) for name in costs),
            str(trial["best_epoch"] or ""),
            str(len(trial["curve"])),
            trial["reason"] if trial["state"] == "failed" else _configuration(trial),
        )
    console.print(table)
    if any(is_estimated):
        console.print(f"{ESTIMATED}: estimated from the folds that were trained")
    if facts["pruned_winner"]:
        console.print(facts["pruned_winner"])
    _print_importances(console, facts["importances"], facts["importances_note"])
    for finding in facts["findings"]:
        console.print(f"- {finding['text']}")


def print_verdict(console: Console, verdict: Verdict) -> None:
    """What a check has found, as soon as it is known."""
    console.print(f"{verdict.state:<8} {verdict.check:<15} {verdict.text}", style=STYLES[verdict.state], soft_wrap=True)
    if verdict.advice:
        console.print(f"{'':<24} {verdict.advice}", soft_wrap=True)


def print_checklist(console: Console, checklist: Checklist) -> None:
    """The last words of `hpo check`."""
    counts = Counter(verdict.state for verdict in checklist.verdicts)
    console.print(", ".join(f"{counts[state]} {state}" for state in STYLES if counts[state]) + ".")
    console.print(f"Picture: {checklist.picture}", soft_wrap=True)


def print_submitted(console: Console, facts: dict[str, Any]) -> None:
    console.print(f"Study '{facts['study']}' is queued: {facts['missing']} of {facts['trials']} trials still to run.")
    console.print(f"On each machine: hpo worker {facts['study']} --storage ...", soft_wrap=True)


def print_cleaned(console: Console, facts: dict[str, Any]) -> None:
    """What `hpo gc` has removed, or would remove."""
    if not facts["removed"]:
        console.print(f"Nothing to remove: study '{facts['study']}' keeps the weights of its best {facts['keep']}.")
        return
    table = _table("what", "size")
    for removed in facts["removed"]:
        table.add_row(removed["what"], format_bytes(removed["bytes"]))
    console.print(table)
    verb = "Would remove" if facts["dry_run"] else "Removed"
    console.print(f"{verb} {format_bytes(sum(removed['bytes'] for removed in facts['removed']))}.")


def _print_importances(console: Console, importances: dict[str, dict[str, Any]], note: str | None) -> None:
    if importances:
        table = _table("group", "importance", "by parameter (90 % interval)")
        for group, importance in importances.items():
            known = [(name, each) for name, each in importance["parameters"].items() if each["share"] is not None]
            ranked = sorted(known, key=lambda item: -item[1]["share"])
            table.add_row(group, _share(importance), ", ".join(f"{name} {_share(each)}" for name, each in ranked))
        console.print(table)
    if note:
        console.print(note, soft_wrap=True)


def _share(importance: dict[str, Any]) -> str:
    return describe_share(*(importance[field] for field in ("share", "low", "high", "condition")))


def best_facts(name: str, home: Path | None, storage: str | None = None) -> dict[str, Any]:
    """The winner of a study, as far as it is known."""
    study = Study.load(read_storage(Home.find(home).path, find_storage(storage)), name)
    winner = find_winner(study)
    facts = {
        "study": name,
        "home": str(Home.find(home).path),
        "winner": winner and to_plain(asdict(winner)),
        "made_with": describe_provenance(study),
    }
    return facts | ({"front": to_plain(front_rows(study))} if study.settings.costs else {})


def print_best(console: Console, facts: dict[str, Any]) -> None:
    if facts["winner"] is None:
        console.print(f"Study '{facts['study']}' has no finished trial yet; resume it with `hpo search`.")
        return
    _print_winner(console, Winner(**facts["winner"]))
    for line in facts["made_with"]:
        console.print(line, soft_wrap=True)
    home = "" if facts["home"] == str(Home.find().path) else f", home={facts['home']!r}"
    console.print(f'Load it: model = hpo.load_best("{facts["study"]}"{home})', soft_wrap=True)
    if facts.get("front"):
        _print_front(console, facts["front"])
        console.print(f'Load another: model = hpo.load_best("{facts["study"]}", trial=N{home})', soft_wrap=True)


def _print_front(console: Console, rows: list[dict[str, Any]]) -> None:
    """The trials that no other one beats in all objectives."""
    metric, *costs = (name for name in rows[0] if name not in ("trial", "configuration"))
    table = _table("trial", metric, *costs, "configuration", title="Pareto front")
    for row in rows:
        figures = _score(row[metric]), *(_cost(name, row[name]) for name in costs)
        table.add_row(str(row["trial"]), *figures, format_configuration(row["configuration"]))
    console.print(table)


def _print_winner(console: Console, winner: Winner) -> None:
    table = Table.grid(padding=(0, 2))
    epoch = f"trained on all examples for {winner.best_epoch} epochs" if winner.folds else f"epoch {winner.best_epoch}"
    pruned = f", {winner.pruned}" if winner.pruned else ""
    table.add_row("Best", f"trial {winner.trial}, {epoch}{pruned}")
    table.add_row("Configuration", format_configuration(winner.configuration))
    table.add_row("Validation", f"{winner.metric} {winner.validation:.4f}{_over_folds(winner.folds)}")
    if winner.comparison:
        table.add_row("Default", describe_comparison(winner))
    table.add_row("Test", _describe_test(winner))
    console.print(table)


def _over_folds(num_folds: int | None) -> str:
    return f", mean of {num_folds} folds" if num_folds else ""


def _describe_test(winner: Winner) -> str:
    if winner.test is None:
        return "not evaluated yet: the test split is read once, when the search is complete"
    scores = ", ".join(f"{name} {_score(value)}" for name, value in winner.test.items())
    times = (
        "once" if winner.num_test_readings == 1 else f"{winner.num_test_readings} times, once for each winner so far"
    )
    return f"{scores} (the test split was read {times})"


def format_configuration(configuration: Mapping[str, Any]) -> str:
    """`lr=0.00123 optimizer=sgd`: short enough to read; --json has all digits."""
    return " ".join(f"{name}={_short(value)}" for name, value in configuration.items())


def format_duration(seconds: float) -> str:
    """`8 s`, `2 min 5 s` or `3 h 20 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def format_bytes(num_bytes: int) -> str:
    """`512 B`, `3.4 kB`, `1.2 GB`."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def describe_counts(counts: Mapping[TrialState, int]) -> str:
    """`12 complete, 7 pruned (pruned trials were stopped early to save epochs)`."""
    text = ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "no trial yet"
    return f"{text} (pruned trials were stopped early to save epochs)" if counts["pruned"] else text


def _configuration(trial: dict[str, Any]) -> str:
    return format_configuration({k: v for k, v in trial["values"].items() if k not in trial["inactive"]})


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else format_value(value)


def _goal(facts: dict[str, Any]) -> str:
    """`accuracy (maximize), mean of 5 folds` or `accuracy (maximize) and params (minimize)`."""
    costs = "".join(f" and {cost} (minimize)" for cost in facts["objectives"][1:])
    return f"{facts['metric']} ({facts['direction']}){costs}{_over_folds(facts['folds'])}"


ESTIMATED = "≈"
"""Marks the mean of a trial that was pruned before all its folds were trained."""


def _score(value: float | None, *, estimated: bool = False) -> str:
    if value is None:
        return "-"
    return f"{ESTIMATED if estimated else ''}{value:.4f}"


def _cost(name: str, cost: float | None) -> str:
    """`8970`, `0.0438 ms`."""
    if cost is None:
        return "-"
    return f"{cost:.3g} ms" if name == "latency" else f"{cost:.0f}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table
