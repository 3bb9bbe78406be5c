"""The tables and last words of each command, for the terminal."""

from __future__ import annotations

import json
import math
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hpo.home import Home
from hpo.parameters import Parameter, describe_default
from hpo.records import OUT_OF_BUDGET, Winner
from hpo.search.confirmation import PLANS
from hpo.search.forecast import Forecast
from hpo.search.importances import describe_share
from hpo.search.winner import (
    describe_baselines,
    describe_certainty,
    describe_comparison,
    describe_confirmation,
    describe_training,
)
from hpo.space import Group, Space
from hpo.terminal.words import (
    ESTIMATED,
    describe_counts,
    format_bytes,
    format_cell,
    format_configuration,
    format_cost,
    format_duration,
    format_score,
)
from hpo.values import describe_conditions

if TYPE_CHECKING:
    from rich.console import Console

    from hpo.checks.checklist import Checklist
    from hpo.checks.verdicts import State, Verdict
    from hpo.deploy.predict import Prediction
    from hpo.deploy.results import Export, Formats, Registration
    from hpo.records import Rerun, SearchOutcome, Training
    from hpo.training.trainer import EpochResult


WATCH_S = 5.0
"""Seconds between two looks at a study that is searched."""

STYLES: dict[State, str] = {"ok": "green", "warning": "yellow", "wrong": "red"}
"""Of what a check says."""


def print_outcome(console: Console, outcome: SearchOutcome) -> None:
    """The last words of `hpo search`: the winner, its scores, where everything is and what to type next."""
    ending = "Done" if outcome.is_done else "Interrupted" if outcome.interrupted else "Time is up"
    console.print(f"{ending}: {describe_counts(outcome.counts)}.")
    if outcome.stopped_at is not None and outcome.num_finished < outcome.num_trials:
        console.print(
            f"A trial has reached {outcome.stopped_at:g}, so no new one is started. --stop-at none continues."
        )
    if outcome.flat_gain is not None and outcome.num_finished < outcome.num_trials:
        console.print(
            f"More trials promise less than {outcome.flat_gain:g}, so no new one is started. --stop-when-flat none "
            "continues."
        )
    if outcome.spent_budget_s is not None:
        _print_spent_budget(console, outcome, outcome.spent_budget_s)
    if outcome.winner is not None:
        _print_winner(console, outcome.winner)
    if outcome.front:
        _print_front(console, outcome.front)
    console.print(f"Runs, curves and checkpoints are in {outcome.home}", soft_wrap=True)
    home = _home_option(str(outcome.home))
    if outcome.is_done and outcome.counts["queued"]:
        console.print("Some configurations are still queued; raise --trials to run them.")
    if not outcome.is_done:
        console.print(_what_is_missing(outcome))
    elif outcome.all_diverged:
        of_losses = any((trial.reason or "the loss").startswith("the loss") for trial in outcome.trials)
        advice = "try smaller learning rates in a new --study;" if of_losses else "is the metric defined here?"
        console.print(f"Every trial diverged, so there is no winner: {advice} hpo show {outcome.study}{home}")
    elif outcome.all_too_costly:
        console.print(
            f"Each model costs more than --constraint allows, so there is no winner: allow more in a new --study, or "
            f"start with a small model by --try; hpo show {outcome.study}{home}"
        )
    elif outcome.winner is None:
        console.print(f"No trial has a result, so there is no winner; the reasons: hpo show {outcome.study}{home}")
    else:
        if outcome.winner.confirmation is None:
            console.print(_how_to_confirm(outcome, home), soft_wrap=True)
        console.print(f"Next: hpo ui {outcome.study}{home} shows the curves and plots;", soft_wrap=True)
        console.print(f"      hpo best {outcome.study}{home} says how to use the winner", soft_wrap=True)


def _print_spent_budget(console: Console, outcome: SearchOutcome, budget_s: float) -> None:
    cut_off = [trial.number for trial in outcome.trials if trial.reason == OUT_OF_BUDGET]
    if not cut_off and outcome.num_finished >= outcome.num_trials:
        return
    after = f" after {outcome.num_finished} of {outcome.num_trials} trials"
    cut = f", and cut off trial {', '.join(map(str, cut_off))}" if cut_off else ""
    console.print(
        f"The training time of {format_duration(budget_s)} is used up{after}{cut}; a larger --budget continues."
    )


def _home_option(home: str) -> str:
    """What a command needs to find the home; nothing where it looks by itself."""
    return "" if home == str(Home.find().path) else f" --home {shlex.quote(home)}"


def _how_to_confirm(outcome: SearchOutcome, home: str) -> str:
    """What it takes to know whether the winner was lucky, and how long about."""
    plan = PLANS["quick"]
    times = [trial.duration_s for trial in outcome.trials if trial.state == "complete" and trial.duration_s]
    about = f" of about {format_duration(fmean(times))}" if times else ""
    return (
        f"To see whether the winner was lucky: hpo confirm {outcome.study}{home}, which trains the best "
        f"{plan.configurations} configurations again with {plan.seeds} new seeds each (at most {plan.num_trainings} "
        f"trainings{about})"
    )


def _what_is_missing(outcome: SearchOutcome) -> str:
    pending = ", ".join(f"trial {number}" for number in outcome.to_continue)
    if pending:
        return (
            f"Run the same command again to finish: {pending}, pruned, may still win and is then continued to its end."
        )
    return "Run the same command again to resume."


def print_tasks(console: Console, rows: list[dict[str, Any]]) -> None:
    table = _table("task", "what it is", "optimises", "epochs", "parameters")
    for row in rows:
        if "broken" in row:
            table.add_row(row["task"], f"broken: {row['broken']}", style="red")
        else:
            goal = f"{row['metric']} ({row['direction']})" if row["direction"] else "depends on the data"
            options = f"; --data-option {', '.join(row['data_options'])}" if row["data_options"] else ""
            table.add_row(row["task"], row["description"] + options, goal, str(row["epochs"]), str(row["parameters"]))
    console.print(table)


def print_space(console: Console, space: Space, closed_groups: Sequence[Group]) -> None:
    """The groups in the order in which they are tuned, then what is closed and can be opened."""
    for priority, group in enumerate(space.groups, start=1):
        console.print(_parameter_table(f"{priority}. {group.name}", group.parameters))
    for rule in space.describe_rules():
        console.print(rule, markup=False, highlight=False)
    for group in closed_groups:
        closed = {name: parameter for name, parameter in group.parameters.items() if name not in space.parameters}
        if closed:
            console.print(_parameter_table(f"{group.name}: closed, -p NAME=VALUES opens a parameter", closed))


def _parameter_table(title: str, parameters: Mapping[str, Parameter]) -> Table:
    table = _table("parameter", "range", "default", "active when", title=title)
    for name, parameter in parameters.items():
        table.add_row(name, parameter.describe(), describe_default(parameter), describe_conditions(parameter.when))
    return table


def print_studies(console: Console, rows: list[dict[str, Any]]) -> None:
    if not rows:
        console.print("There is no study yet. Start one with: hpo search digits --trials 20")
        return
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*("" if cell is None else format_cell(cell) for cell in row.values()))
    console.print(table)


def print_study(console: Console, facts: dict[str, Any]) -> None:
    console.print(
        f"{facts['study']}: {_goal(facts)}, "
        f"strategy {facts['strategy']}, "
        f"pruner {facts['pruner']}, {facts['epochs']} epochs, seed {facts['seed']}; {describe_counts(facts['counts'])}"
    )
    if facts["data_options"]:
        console.print(f"Data options: {', '.join(facts['data_options'])}", soft_wrap=True)
    if facts["fixed"]:
        console.print(f"Fixed with --set: {', '.join(facts['fixed'])}")
    if facts["trained_s"]:
        console.print(_describe_training_time(facts))
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
            "-" if trial["state"] == "failed" else format_score(trial["value"], estimated=estimated),
            *(format_cost(name, trial["costs"].get(name)) for name in costs),
            str(trial["best_epoch"] or ""),
            str(len(trial["curve"])),
            trial["reason"] if trial["state"] == "failed" else _configuration(trial),
        )
    console.print(table)
    if any(is_estimated):
        console.print(f"{ESTIMATED}: estimated from the folds that were trained")
    if facts["pruned_winner"]:
        console.print(facts["pruned_winner"])
    if facts["confirmation"]:
        _print_confirmation(console, facts["confirmation"], facts["metric"])
    _print_importances(console, facts["importances"], facts["importances_note"])
    for finding in facts["findings"]:
        console.print(f"- {finding['text']}")
    if facts["forecast"]:
        console.print(Forecast(**facts["forecast"]).describe(facts["metric"]), soft_wrap=True)


def _describe_training_time(facts: dict[str, Any]) -> str:
    """`Training time: 3 h 20 min of 8 h 0 min, at most 20 min 0 s per trial`."""
    text = f"Training time: {format_duration(facts['trained_s'])}"
    if facts["budget_s"] is not None:
        text += f" of {format_duration(facts['budget_s'])}"
    if facts["trial_timeout_s"] is not None:
        text += f", at most {format_duration(facts['trial_timeout_s'])} per trial"
    return text


def _print_confirmation(console: Console, race: dict[str, Any], metric: str) -> None:
    """The best configurations with the values that the search saw, and those of the new trainings."""
    title = f"Confirmation with {race['seeds']} new seeds" + ("" if race["is_done"] else ", not finished")
    table = _table(
        "trial", f"{metric} in the search", "mean of new seeds", "standard deviation", "values", "", title=title
    )
    for row in race["configurations"]:
        diverged = f"{row['num_diverged']} diverged" if row["num_diverged"] else ""
        table.add_row(
            str(row["trial"]),
            *(format_score(row[name]) for name in ("searched", "mean", "std")),
            " ".join(map(format_score, row["values"])),
            ", ".join(filter(None, (diverged, "dropped" if row["is_behind"] else ""))),
        )
    console.print(table)


def watch_study(console: Console, read: Callable[[], dict[str, Any]]) -> None:
    """Print a study again and again, until nobody searches it or Ctrl-C; `read` returns its facts."""
    try:
        while True:
            facts = read()
            console.clear()
            print_study(console, facts)
            if not facts["searched_by"]:
                return
            console.print(f"{facts['now']}; shown again every {WATCH_S:.0f} s, Ctrl-C to stop")
            time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return


def print_verdict(console: Console, verdict: Verdict) -> None:
    """What a check has found, as soon as it is known."""
    console.print(f"{verdict.state:<8} {verdict.check:<15} {verdict.text}", style=STYLES[verdict.state], soft_wrap=True)
    if verdict.advice:
        console.print(f"{'':<24} {verdict.advice}", soft_wrap=True)


def print_checklist(console: Console, checklist: Checklist) -> None:
    """The last words of `hpo check`."""
    counts = Counter(verdict.state for verdict in checklist.verdicts)
    console.print(", ".join(f"{counts[state]} {state}" for state in STYLES if counts[state]) + ".")
    if checklist.data_options:
        console.print(f"Data options: {', '.join(checklist.data_options)}", soft_wrap=True)
    if checklist.picture:
        console.print(f"Picture: {checklist.picture}", soft_wrap=True)


def print_submitted(console: Console, facts: dict[str, Any]) -> None:
    console.print(f"Study '{facts['study']}' is queued: {facts['missing']} of {facts['trials']} trials still to run.")
    console.print(
        f"On each machine, with the same HPO_STORAGE and MLFLOW_TRACKING_URI: hpo worker {facts['study']}",
        soft_wrap=True,
    )


def print_epoch(console: Console, result: EpochResult) -> None:
    """An epoch of `hpo train` or `hpo rerun`."""
    fold = f"fold {result.fold}, " if result.fold else ""
    best = "" if result.best_value is None else f"   best {result.best_value:.4f}"
    console.print(f"{fold}epoch {result.epoch:<4} {result.value:.4f}{best}", soft_wrap=True)


def print_training(console: Console, training: Training) -> None:
    """The last words of `hpo train`."""
    console.print(f"Configuration  {format_configuration(training.configuration)}", soft_wrap=True)
    if training.best_value is None:
        console.print(f"The training diverged: no epoch had a finite {training.metric}.")
    else:
        diverged = f"; it diverged in epoch {max(training.curve)}" if training.diverged else ""
        console.print(
            f"Best           {training.metric} {training.best_value:.4f} at epoch {training.best_epoch}{diverged}"
        )
    console.print(f"Run            {training.run_id}, in {training.home}", soft_wrap=True)
    if training.has_model:
        home = "" if training.home == Home.find().path else f", home={str(training.home)!r}"
        console.print(
            f'Load it: model = hpo.load_run("{training.run_id}", task="{training.task}"{home})', soft_wrap=True
        )


def print_rerun(console: Console, found: Rerun) -> None:
    """The last words of `hpo rerun`."""
    again, before = (format_score(value) for value in (found.value, found.earlier_value))
    console.print(f"Trial {found.trial} again: {found.metric} {again}; before {before}.")
    console.print(_describe_comparison(found), soft_wrap=True)
    if found.changes:
        console.print(f"Changed since then: {', '.join(found.changes)}.", soft_wrap=True)


def _describe_comparison(found: Rerun) -> str:
    if found.is_equal:
        return "Equal in every bit: all values of its curve are the same."
    why = "" if found.is_same_seed else f" (seed {found.seed})"
    differs = f"The curves differ from step {found.first_difference}{why}"
    if found.difference is None:
        return f"{differs}; one of them has no finite value."
    if found.is_within_spread is None:
        return f"{differs}; the difference is {found.difference:.4f}, without an interval: no model of before was kept."
    verdict = "within the spread" if found.is_within_spread else "more than chance explains"
    if not found.is_within_spread and not found.is_same_seed:
        verdict = "the two models differ on these examples, which another seed alone can do"
    interval = f"95% interval {found.low:.4f} to {found.high:.4f}"
    return f"{differs}; the difference is {found.difference:.4f}, {interval}: {verdict}."


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


def print_export(console: Console, done: Export) -> None:
    """What `hpo export` has written, and how it was checked."""
    console.print(f"{done.folder} ({format_bytes(done.num_bytes)})", soft_wrap=True)
    if done.difference is None:
        console.print("Equal to the checkpoint in every bit.")
    else:
        checked = f"over {done.num_checked} validation examples, run without hpo"
        console.print(f"Largest difference from the checkpoint: {done.difference:.1e} of its outputs, {checked}.")


def print_predictions(console: Console, predictions: Sequence[Prediction]) -> None:
    """The table of `hpo predict`: what the model says, and how sure it is where there are classes."""
    table = _table("file", "row", "prediction", "probability")
    for each in predictions:
        row = "" if each.row is None else str(each.row)
        said = each.to_dict()["prediction"]
        shares = each.probabilities or {}
        sure = f"{shares[said]:.3f}" if isinstance(said, str) and said in shares else ""
        table.add_row(each.file, row, _said(said), sure)
    console.print(table)


def _said(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def print_registration(console: Console, registered: Registration) -> None:
    """What `hpo register` has registered."""
    console.print(f"{registered.uri} (models:/{registered.model_id})", soft_wrap=True)
    state = "It is the champion" if registered.is_champion else "It is not the champion"
    console.print(f"{state}: {registered.reason}.", soft_wrap=True)
    if registered.is_champion:
        champion = f"models:/{registered.name}@champion"
        console.print(f"Load it: mlflow.set_tracking_uri({json.dumps(registered.tracking_uri)})", soft_wrap=True)
        console.print(f"         mlflow.pyfunc.load_model({json.dumps(champion)})", soft_wrap=True)


def print_formats(console: Console, formats: Formats) -> None:
    """The table of `hpo export --compare`."""
    sizes = sorted({size for row in formats.rows for size in row.latency_ms})
    table = _table("format", formats.metric, "size", *(f"batch {size}" for size in sizes))
    for row in formats.rows:
        if row.problem is None and row.score is not None:
            latencies = [f"{row.latency_ms[size]:.2f} ms" for size in sizes]
            table.add_row(row.name, format_score(row.score), format_bytes(row.num_bytes), *latencies)
    console.print(table)
    for row in formats.rows:
        if row.problem:
            console.print(f"{row.name}: {row.problem}", soft_wrap=True)
    console.print(f"{formats.num_examples} validation examples; CPU, {formats.num_threads} threads, median of a call.")


def _print_importances(console: Console, importances: dict[str, dict[str, Any]], note: str | None) -> None:
    if importances:
        table = _table("group", "importance", "by parameter (90% interval)")
        for group, importance in importances.items():
            known = [(name, each) for name, each in importance["parameters"].items() if each["share"] is not None]
            ranked = sorted(known, key=lambda item: -item[1]["share"])
            table.add_row(group, _share(importance), ", ".join(f"{name} {_share(each)}" for name, each in ranked))
        console.print(table)
    if note:
        console.print(note, soft_wrap=True)


def _share(importance: dict[str, Any]) -> str:
    return describe_share(*(importance[field] for field in ("share", "low", "high", "condition")))


def print_best(console: Console, facts: dict[str, Any]) -> None:
    if facts["winner"] is None:
        so_far = describe_counts(facts["counts"])
        console.print(
            f"Study '{facts['study']}' has no trial with a result ({so_far}); `hpo show {facts['study']}` has the "
            "reasons, and `hpo search` resumes it."
        )
        return
    _print_winner(console, Winner(**facts["winner"]))
    for line in facts["made_with"]:
        console.print(line, soft_wrap=True)
    rest = "" if facts["home"] == str(Home.find().path) else f", home={facts['home']!r}"
    rest += ", task=objective" if facts["is_object"] else ""
    if facts["is_loop"]:
        console.print(f'Load it: state = hpo.load_best("{facts["study"]}"{rest})', soft_wrap=True)
        console.print(
            "         model.load_state_dict(state), for the state dict that the loop has saved", soft_wrap=True
        )
        return
    console.print(f'Load it: model = hpo.load_best("{facts["study"]}"{rest})', soft_wrap=True)
    if facts.get("front"):
        _print_front(console, facts["front"])
        console.print(f'Load another: model = hpo.load_best("{facts["study"]}", trial=N{rest})', soft_wrap=True)
    if not facts["is_object"]:
        study = facts["study"] + _home_option(facts["home"])
        console.print(f"Deploy it: hpo export {study} writes files that need no hpo", soft_wrap=True)
        console.print(f"           hpo serve {study} answers requests", soft_wrap=True)
        console.print(f"           hpo register {study} adds it to MLflow's registry", soft_wrap=True)


def _print_front(console: Console, rows: list[dict[str, Any]]) -> None:
    """The trials that no other one beats in all objectives."""
    metric, *costs = (name for name in rows[0] if name not in ("trial", "configuration"))
    table = _table("trial", metric, *costs, "configuration", title="Pareto front")
    for row in rows:
        figures = format_score(row[metric]), *(format_cost(name, row[name]) for name in costs)
        table.add_row(str(row["trial"]), *figures, format_configuration(row["configuration"]))
    console.print(table)


def _print_winner(console: Console, winner: Winner) -> None:
    table = Table.grid(padding=(0, 2))
    table.add_row("Best", describe_training(winner))
    table.add_row("Configuration", format_configuration(winner.configuration))
    table.add_row("Validation", f"{winner.metric} {_validation(winner)}")
    if winner.confirmation:
        table.add_row("Confirmed", describe_confirmation(winner))
    if winner.comparison:
        table.add_row("Default", describe_comparison(winner))
    if winner.baselines:
        table.add_row("Baselines", describe_baselines(winner))
    table.add_row("Test", _describe_test(winner))
    if winner.certainty:
        table.add_row("Certainty", describe_certainty(winner))
    console.print(table)


def _validation(winner: Winner) -> str:
    """`0.9312`, `0.9312, mean of 5 folds`, or what the folds of a pruned trial say of that mean."""
    if winner.folds and winner.pruned:
        return f"≈{winner.validation:.4f}, estimated for {winner.folds} folds"
    return f"{winner.validation:.4f}{_over_folds(winner.folds)}"


def _over_folds(num_folds: int | None) -> str:
    return f", mean of {num_folds} folds" if num_folds else ""


def _describe_test(winner: Winner) -> str:
    if winner.test is None and not winner.has_test:
        return "none: the task's Objective has no test="
    if winner.test is None:
        return "not evaluated yet: the test split is used once, when the search is complete"
    scores = ", ".join(_describe_score(winner, name, value) for name, value in winner.test.items())
    times = (
        "once" if winner.num_test_readings == 1 else f"{winner.num_test_readings} times, once for each winner so far"
    )
    optimism = winner.validation - winner.test.get(winner.metric, math.nan)
    difference = f"; validation minus test: {optimism:.4f}" if math.isfinite(optimism) else ""
    return f"{scores} (the test split was used {times}{difference})"


def _describe_score(winner: Winner, name: str, value: float) -> str:
    interval = ""
    if name == winner.metric and winner.test_interval:
        interval = " (95% interval {} to {})".format(*map(format_score, winner.test_interval))
    return f"{name} {format_score(value)}{interval}"


def _configuration(trial: dict[str, Any]) -> str:
    return format_configuration({k: v for k, v in trial["values"].items() if k not in trial["inactive"]})


def _goal(facts: dict[str, Any]) -> str:
    """`accuracy (maximize), mean of 5 folds` or `accuracy (maximize) and params (minimize)`."""
    costs = "".join(f" and {cost} (minimize)" for cost in facts["objectives"][1:])
    limits = f", {' and '.join(facts['constraints'])}" if facts["constraints"] else ""
    return f"{facts['metric']} ({facts['direction']}){costs}{_over_folds(facts['folds'])}{limits}"


def _table(*columns: str, title: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(column)
    return table
