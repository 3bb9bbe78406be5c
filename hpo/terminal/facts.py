"""What people read of their studies, as plain data: the facts behind the tables, and what --json prints."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hpo.config import AUTO
from hpo.data_options import declared_options
from hpo.errors import HpoError
from hpo.home import Home
from hpo.plugins import OBJECT, OBJECTIVES, load_task, registered
from hpo.provenance import describe as describe_provenance
from hpo.provenance import sessions
from hpo.records import TrialRecord, Winner, ranked, to_plain
from hpo.search.findings import findings
from hpo.search.importances import importances
from hpo.search.lease import searchers_of
from hpo.search.storage import find_studies
from hpo.search.study import Study, list_studies
from hpo.search.winner import find_winner, front_rows, no_winner_yet
from hpo.space import from_stored
from hpo.values import format_value


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
        "direction": None if task.objective.metric == AUTO else task.objective.better,
        "data_options": [each.describe() for each in declared_options(task.objective.load).values()],
        "epochs": task.train_config({}).max_epochs,
        "parameters": len(task.space.parameters),
    }


def study_rows(home: Path | None, storage: str | None) -> list[dict[str, Any]]:
    """The studies of a home, or of a shared database, the oldest first, and who searches them now."""
    database = find_studies(home, storage)
    return [_study_row(study, searchers_of(database, study.name)) for study in list_studies(database)]


def _study_row(study: Study, searchers: list[str]) -> dict[str, Any]:
    winner = find_winner(study)
    return {
        "study": study.name,
        "task": study.settings.task,
        "trials": f"{study.num_finished}/{study.num_trials}",
        "now": _describe_now(study, searchers),
        "metric": study.settings.metric,
        "best": winner and winner.validation,
        "best trial": winner and winner.trial,
        "strategy": study.settings.strategy,
        "seed": study.settings.seed,
    }


def _describe_now(study: Study, searchers: list[str]) -> str:
    if searchers:
        return f"searched by {', '.join(searchers)}"
    if study.is_done and study.num_finished < study.num_trials:
        return "done: budget used up" if study.has_spent_budget else "done early"
    if study.is_done:
        return "done"
    return "stopped" if study.has_begun else "queued"


def study_facts(name: str, home: Path | None, storage: str | None = None, top: int | None = None) -> dict[str, Any]:
    """Settings and trials of a study, and what it has learned; the best `top` trials, or all in order."""
    database = find_studies(home, storage)
    study = Study.load(database, name)
    searchers = searchers_of(database, name)
    trials, repeats, counts = study.trials(), study.repeats(), study.counts()
    if not searchers:  # whoever ran them was killed
        trials, repeats = ([_left_behind(record) for record in records] for records in (trials, repeats))
        counts["interrupted"] += counts["running"]
        counts["running"] = 0
    if top is not None:
        trials = ranked(trials, study.settings.direction)[:top]
    rated, promised = importances(study), study.forecast
    facts: dict[str, Any] = to_plain(
        {
            "study": name,
            "task": study.settings.task,
            "metric": study.settings.metric,
            "direction": study.settings.direction,
            "objectives": study.settings.objectives,
            "constraints": study.settings.constraints,
            "strategy": study.settings.strategy,
            "pruner": study.settings.pruner,
            "epochs": study.settings.max_epochs,
            "seed": study.settings.seed,
            "limit": study.settings.limit,
            "folds": study.settings.folds,
            "fixed": study.settings.fixed,
            "data_options": study.settings.data_options,
            "trained_s": study.trained_s(),
            "budget_s": study.budget_s,
            "trial_timeout_s": study.trial_timeout_s,
            "searched_by": searchers,
            "now": _describe_now(study, searchers),
            "counts": counts,
            "provenance": [asdict(session) for session in sessions(study)],
            "made_with": describe_provenance(study),
            "pruned_winner": _describe_pruned_winner(find_winner(study), study),
            "importances": {group: asdict(each) for group, each in rated.groups.items()},
            "importances_note": rated.note,
            "findings": [asdict(finding) for finding in findings(study)],
            "forecast": asdict(promised) if promised else None,
            "trials": [asdict(trial) for trial in trials],
            "confirmation": study.race.to_dict() if study.race.contenders else None,
            "repeats": [asdict(repeat) for repeat in repeats],
        }
    )
    return facts


def _left_behind(record: TrialRecord) -> TrialRecord:
    return replace(record, state="interrupted") if record.state == "running" else record


def _describe_pruned_winner(winner: Winner | None, study: Study) -> str | None:
    if winner is None or winner.pruned is None or study.is_done:
        return None
    return (
        f"Trial {winner.trial}, the best so far, was {winner.pruned}; "
        f"it is continued when {study.num_trials} trials have run."
    )


def trials_as_csv(facts: Mapping[str, Any]) -> str:
    """The trials of `study_facts`: a row for each, and a column for each parameter, empty where it is inactive."""
    trials = facts["trials"]
    parameters = list(dict.fromkeys(name for trial in trials for name in trial["values"]))
    costs = facts["objectives"][1:]
    fields = ("number", "state", "stage", "value", *costs, "best_epoch", "epochs", "attempts", "duration_s", "reason")
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow([facts["metric"] if field == "value" else field for field in fields] + parameters)
    for trial in trials:
        known = trial | trial["costs"] | {"epochs": len(trial["curve"])}
        active = {name: value for name, value in trial["values"].items() if name not in trial["inactive"]}
        rows.writerow([known.get(field) for field in fields] + [active.get(name) for name in parameters])
    return text.getvalue()


def winner_as_yaml(facts: Mapping[str, Any]) -> str:
    """The winner's configuration, under a comment that says whose it is."""
    winner = _require_winner(facts)
    lines = [f"# study {facts['study']}, trial {winner['trial']}: {winner['metric']} {winner['validation']:.4f}"]
    return "\n".join([*lines, *(f"{name}: {_in_yaml(value)}" for name, value in winner["configuration"].items())])


def winner_as_options(facts: Mapping[str, Any]) -> str:
    """The winner's configuration as options for `hpo train` and `hpo search`, quoted for a shell."""
    configuration = _require_winner(facts)["configuration"]
    return " ".join(f"-p {shlex.quote(f'{name}={_exactly(value)}')}" for name, value in configuration.items())


def _in_yaml(value: Any) -> str:
    """As JSON, which YAML contains; but YAML 1.1 takes 1e-05 for a text, and 1.0e-05 for a number."""
    text = json.dumps(value)
    return text.replace("e", ".0e") if isinstance(value, float) and "e" in text and "." not in text else text


def _exactly(value: Any) -> str:
    if isinstance(value, list):  # a tuple, which JSON does not have
        return format_value(from_stored(value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _require_winner(facts: Mapping[str, Any]) -> Any:
    if facts["winner"] is None:
        raise no_winner_yet(facts["study"])
    return facts["winner"]


def best_facts(name: str, home: Path | None, storage: str | None = None) -> dict[str, Any]:
    """The winner of a study, as far as it is known."""
    study = Study.load(find_studies(home, storage), name)
    winner = find_winner(study)
    facts = {
        "study": name,
        "home": str(Home.find(home).path),
        "counts": study.counts(),
        "winner": winner and to_plain(asdict(winner)),
        "made_with": describe_provenance(study),
        "is_object": study.task_reference == OBJECT,
        "is_loop": study.has_loop,
    }
    return facts | ({"front": to_plain(front_rows(study))} if study.settings.costs else {})
