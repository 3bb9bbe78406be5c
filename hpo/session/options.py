"""The options of a search, each declared once: its name and type, its flag, its default and its sentence.

`run_search`, `submit_study`, `join_search` and the command line take theirs from here. None, and an option that is left
out, mean the same: the study's value, or else the default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, get_args, get_origin, get_type_hints

from hpo.data_options import FLAG, as_written
from hpo.errors import UnknownNameError, UsageError


@dataclass(frozen=True)
class Option:
    """How an option is written on the command line, and what it means."""

    flag: str
    """A yes or no that may be left out has another one, `--no-...`."""
    help: str
    """One sentence; what is in brackets names the default."""

    metavar: str | None = None
    """What stands for the value in the help; None for the name of the type."""

    default: Any = None
    """What None stands for in a new study, or in a session. None where the task, the study or the machine decides."""

    kept: str | None = None
    """The field of StudySettings that keeps it for the next session; None if it holds for one session."""

    at_least: int | None = None
    of_trainer: bool = False
    """Whether it is for the shared trainer and its data, and not for a task with a training loop of its own."""

    is_duration: bool = False
    """Whether it is a time: seconds, on the command line also 90s, 30m or 2h."""

    takes_none: bool = False
    """Whether a time may also be "none", which takes back what the study keeps."""


class TrialOptions(TypedDict, total=False):
    """How much is tried."""

    trials: Annotated[
        int | None,
        Option(
            "--trials",
            "Total number of finished trials (complete, pruned, diverged or infeasible). [default: 100]",
            metavar="N",
            default=100,
            kept="planned_trials",
            at_least=1,
        ),
    ]
    epochs: Annotated[
        int | None,
        Option(
            "--epochs",
            "Maximum number of epochs per trial. [default: the task's]",
            metavar="N",
            kept="max_epochs",
            at_least=1,
        ),
    ]
    budget: Annotated[
        float | Literal["none"] | None,
        Option(
            "--budget",
            "Training time of all trials together, on all machines: 90, 90s, 30m or 8h; none has no limit. "
            "[default: none]",
            metavar="TIME",
            is_duration=True,
            takes_none=True,
        ),
    ]
    trial_timeout: Annotated[
        float | Literal["none"] | None,
        Option(
            "--trial-timeout",
            "End a trial after the epoch in which it has trained this long, with its best value so far: 20m; none has "
            "no limit. [default: none]",
            metavar="TIME",
            is_duration=True,
            takes_none=True,
        ),
    ]
    stop_at: Annotated[
        str | None,
        Option(
            "--stop-at",
            "Start no new trial once one has reached this value of the metric: accuracy=0.98; none never stops. "
            "[default: none]",
            metavar="METRIC=VALUE",
        ),
    ]
    stop_when_flat: Annotated[
        str | None,
        Option(
            "--stop-when-flat",
            "Start no new trial once there is an 80% chance that 30 more gain less than this: accuracy=0.002; none "
            "never stops. [default: none]",
            metavar="METRIC=GAIN",
        ),
    ]


class SpaceOptions(TypedDict, total=False):
    """What is searched, with which examples."""

    study: Annotated[str | None, Option("--study", "Name of the study. [default: the task's name]", metavar="NAME")]
    space: Annotated[
        str | None,
        Option("--space", "Search this space instead of the task's own.", metavar="NAME|FILE", kept="space_reference"),
    ]
    overrides: Annotated[
        Sequence[str],
        Option(
            "-p",
            "Narrow a parameter: lr=1e-3:1e-1, optimizer=sgd,adamw or batch_size=256. Repeatable.",
            metavar="NAME=VALUES",
            kept="overrides",
        ),
    ]
    extend: Annotated[
        bool,
        Option("--extend", "Let -p widen a parameter of the study, such as lr=1e-4:3; its trials are kept."),
    ]
    fixed: Annotated[
        Sequence[str],
        Option(
            "--set",
            "Fix a setting of the trainer, searched or not: patience=20, optimizer=lamb. Repeatable.",
            metavar="NAME=VALUE",
            kept="fixed",
            of_trainer=True,
        ),
    ]
    tries: Annotated[
        Sequence[str],
        Option(
            "--try",
            "First try this configuration, with defaults for the rest: lr=0.1,optimizer=sgd. Repeatable.",
            metavar="NAME=VALUE,...",
        ),
    ]
    warm_starts: Annotated[
        Sequence[str],
        Option(
            "--warm-start",
            "Learn from an earlier study, of another task too: its best configurations are tried first. Repeatable.",
            metavar="STUDY",
        ),
    ]
    limit: Annotated[
        int | None,
        Option(
            "--limit",
            "Use only N training examples. [default: all]",
            metavar="N",
            kept="limit",
            at_least=1,
            of_trainer=True,
        ),
    ]
    data_options: Annotated[
        Sequence[str] | Mapping[str, object],
        Option(
            FLAG,
            "Option that the task's data declare, such as label=price; hpo tasks lists them. Repeatable.",
            metavar="NAME=VALUE",
            kept="data_options",
            of_trainer=True,
        ),
    ]


class GoalOptions(TypedDict, total=False):
    """What is optimised."""

    metric: Annotated[
        str | None,
        Option(
            "--metric",
            "Metric to optimise on the validation split: f1, auroc, ... [default: the task's]",
            metavar="NAME",
            kept="metric",
            of_trainer=True,
        ),
    ]
    folds: Annotated[
        int | None,
        Option(
            "--folds",
            "K-fold cross-validation, for small data sets: a trial's score is its mean over K folds. [default: off]",
            metavar="K",
            kept="folds",
            at_least=2,
            of_trainer=True,
        ),
    ]
    objectives: Annotated[
        Sequence[str],
        Option(
            "--objective",
            "Optimise several numbers: val/METRIC, then params or latency. Repeatable. [default: the metric]",
            metavar="NAME",
            kept="objectives",
            of_trainer=True,
        ),
    ]
    constraints: Annotated[
        Sequence[str],
        Option(
            "--constraint",
            "Train no model that costs more: params<=5e6, or latency<=2 in milliseconds. Repeatable.",
            metavar="NAME<=NUMBER",
            kept="constraints",
            of_trainer=True,
        ),
    ]


class StrategyOptions(TypedDict, total=False):
    """How configurations are chosen, and which trials are stopped early."""

    strategy: Annotated[
        str | None,
        Option(
            "--strategy",
            "priority, tpe, gp, random, grid, qmc, cmaes, or any Optuna sampler as module:factory. [default: priority]",
            metavar="NAME",
            default="priority",
            kept="strategy",
        ),
    ]
    pruner: Annotated[
        str | None,
        Option(
            "--pruner",
            "sha, model, median, hyperband, wilcoxon, none, or any Optuna pruner as module:factory. [default: sha; "
            "wilcoxon with --folds; none with several objectives]",
            metavar="NAME",
            kept="pruner",
        ),
    ]
    first_rung: Annotated[
        int | None,
        Option(
            "--first-rung",
            "Epochs a trial runs before model or sha may prune it. [default: 1/6 or 1/5 of --epochs]",
            metavar="N",
            kept="first_rung",
        ),
    ]
    seed: Annotated[
        int | None,
        Option("--seed", "Seed of everything random. [default: 0]", metavar="N", default=0, kept="seed", at_least=0),
    ]


class WinnerOptions(TypedDict, total=False):
    """What is done with the best configurations at the end."""

    confirm: Annotated[
        str | None,
        Option(
            "--confirm",
            "Train the best configurations again with new seeds, and choose by their mean: none, quick (3 "
            "configurations with 3 seeds), full (5 with 5) or 4x10. [default: none]",
            metavar="PLAN",
        ),
    ]
    refit: Annotated[
        bool,
        Option(
            "--refit",
            "Train the winner on training and validation examples together before it is tested.",
            of_trainer=True,
        ),
    ]


class StudyOptions(TrialOptions, SpaceOptions, GoalOptions, StrategyOptions, WinnerOptions, total=False):
    """What is searched, and how."""


class MachineOptions(TypedDict, total=False):
    """What this machine does for a study."""

    workers: Annotated[
        int | None,
        Option(
            "--workers",
            "Trials to run in parallel. [default: one per GPU, or one per CPU core]",
            metavar="N",
            at_least=1,
        ),
    ]
    gpus_per_trial: Annotated[
        float | None,
        Option(
            "--gpus-per-trial",
            "2 trains each trial on two GPUs, 0.25 puts four trials on one. [default: 1; with Ray 0, on CPUs]",
            metavar="N",
        ),
    ]
    timeout: Annotated[
        float | None,
        Option("--timeout", "End this session after this time: 90, 90s, 30m or 2h.", metavar="TIME", is_duration=True),
    ]
    device: Annotated[
        str | None, Option("--device", "auto, cpu, cuda or cuda:N. [default: auto]", metavar="NAME", default="auto")
    ]
    precision: Annotated[
        str | None,
        Option(
            "--precision",
            "auto, fp32, bf16 or fp16. [default: auto, bf16 if it is faster]",
            metavar="TYPE",
            of_trainer=True,
        ),
    ]
    compile: Annotated[
        str | None,
        Option(
            "--compile",
            "auto, off, step or graph. [default: auto, step if it is faster]",
            metavar="MODE",
            of_trainer=True,
        ),
    ]
    deterministic: Annotated[
        bool, Option("--deterministic", "Use only deterministic GPU algorithms (slower).", of_trainer=True)
    ]
    accept_changes: Annotated[
        bool,
        Option("--accept-changes", "Resume although the data or the task's source changed; every report mentions it."),
    ]
    keep: Annotated[
        int | None,
        Option(
            "--keep",
            "Keep the weights of the K best trials, besides the default configuration's. [default: 5]",
            metavar="K",
            default=5,
            at_least=1,
        ),
    ]
    data_dir: Annotated[
        Path | None,
        Option(
            "--data-dir",
            "Directory of data sets, into which missing ones are downloaded; or your own data, a directory or file. "
            "[env: HPO_DATA_DIR; default: ~/.cache/hpo/data]",
            of_trainer=True,
        ),
    ]


class HookOptions(TypedDict, total=False):
    """Who hears of what this session finds."""

    notify: Annotated[
        str | None,
        Option(
            "--notify",
            "Post JSON to this address at each new best, at failures and at the end. [env: HPO_NOTIFY]",
            metavar="URL",
        ),
    ]
    on_best: Annotated[
        str | None,
        Option(
            "--on-best", "Run this shell command for each new best trial, with HPO_TRIAL, ... set.", metavar="COMMAND"
        ),
    ]


class ExecutorOptions(TypedDict, total=False):
    """Where the workers of `hpo search` run."""

    executor: Annotated[
        str | None,
        Option(
            "--executor",
            "Where trials run: local, ray (a Ray cluster), or an installed one by name. [default: local]",
            metavar="NAME",
            default="local",
        ),
    ]
    address: Annotated[
        str | None,
        Option("--address", "Ray cluster. [default: the cluster this machine belongs to]", metavar="HOST:PORT"),
    ]
    join: Annotated[bool, Option("--join", "Join a search that is already running on other machines.")]


class StoreOptions(TypedDict, total=False):
    """Where studies and runs are kept."""

    home: Annotated[
        Path | None,
        Option("--home", "Directory for everything hpo writes. [env: HPO_HOME; default: ./mlruns]"),
    ]
    storage: Annotated[
        str | None,
        Option(
            "--storage",
            "Database that holds the studies; needed when several machines share one: "
            "postgresql+psycopg://USER@HOST/DATABASE. [env: HPO_STORAGE; default: in the home]",
            metavar="URL",
        ),
    ]
    tracking_uri: Annotated[
        str | None,
        Option(
            "--tracking-uri",
            "MLflow store or server. [env: MLFLOW_TRACKING_URI; default: in the home]",
            metavar="URI",
        ),
    ]


class SubmitOptions(StudyOptions, StoreOptions, total=False):
    """The options of `hpo submit` and `hpo.submit_study`."""


class WorkerOptions(MachineOptions, HookOptions, StoreOptions, total=False):
    """The options of `hpo worker` and `hpo.join_search`."""


class SessionOptions(MachineOptions, ExecutorOptions, HookOptions, StoreOptions, total=False):
    """All options of a session besides its study."""


class SearchOptions(StudyOptions, SessionOptions, total=False):
    """The options of `hpo search` and `hpo.run_search`."""

    rehearse: Annotated[
        bool | None,
        Option(
            "--rehearse",
            "First train, save and resume the default configuration and the extremes of the space for one step, within "
            "30 s. [default: in a new study of 30 trials or more]",
            of_trainer=True,
        ),
    ]


SECTIONS: dict[str, type] = {
    "What is searched": SpaceOptions,
    "How much is tried": TrialOptions,
    "How configurations are chosen": StrategyOptions,
    "What is optimised": GoalOptions,
    "What happens at the end": WinnerOptions,
    "How this machine trains": MachineOptions,
    "Where trials run": ExecutorOptions,
    "Who is told": HookOptions,
    "Where everything is kept": StoreOptions,
}
"""The titles under which the help shows them, in its order."""


@dataclass(frozen=True)
class Declaration:
    """An option with its type."""

    name: str
    type: Any
    option: Option


def declarations(options: type) -> list[Declaration]:
    """The options of one of the classes above, in the order of the help."""
    hints = get_type_hints(options, include_extras=True)
    return [Declaration(name, hint.__origin__, hint.__metadata__[0]) for name, hint in hints.items()]


def checked(given: Mapping[str, object]) -> SearchOptions:
    """The options, with defaults for those that no study keeps.

    Raises UnknownNameError for a name that is not an option, and UsageError for a number that is too small, or a time
    that is not above 0.
    """
    found, declared_options = dict(given), declarations(SearchOptions)
    names = [declared.name for declared in declared_options]
    for name in found:
        if name not in names:
            raise UnknownNameError("option", name, names)
    for declared in declared_options:
        name, option, value = declared.name, declared.option, found.get(declared.name)
        if value is None and option.kept is None:
            found[name] = False if declared.type is bool else option.default
        kinds = [get_origin(kind) for kind in (declared.type, *get_args(declared.type))]
        if isinstance(value, str) and Sequence in kinds:
            found[name] = (value,)  # one text in place of several would be taken apart into its letters
        if option.at_least is not None and isinstance(value, int) and value < option.at_least:
            raise UsageError(f"{option.flag} {value} is not allowed: it must be at least {option.at_least}.")
        if option.is_duration and value is not None:
            _check_duration(option, value)
    return found  # type: ignore[return-value]


def _check_duration(option: Option, value: object) -> None:
    if option.takes_none and value == "none":
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        other = ', or "none"' if option.takes_none else ""
        raise UsageError(f"{option.flag} {value} is not allowed: it must be seconds above 0{other}.")


def require_submittable(given: Mapping[str, object]) -> None:
    """Raise UsageError for options of the machines that will train, which queueing a study has no use for."""
    submitted = {declared.name for declared in declarations(SubmitOptions)}
    for declared in declarations(SearchOptions):
        if declared.name in given and declared.name not in submitted:
            raise UsageError(
                f"submit_study takes no {declared.name!r}, which belongs to the machines that train: give it to "
                "join_search, or to `hpo worker`."
            )


def kept_by_the_study(options: StudyOptions) -> dict[str, Any]:
    """The fields of StudySettings that were given; those left out are not there."""
    given: Mapping[str, object] = options
    fields = {
        declared.option.kept: given.get(declared.name)
        for declared in declarations(StudyOptions)
        if declared.option.kept
    }
    return {name: _as_kept(value) for name, value in fields.items() if value not in (None, (), [], {})}


def _as_kept(value: Any) -> Any:
    if isinstance(value, Mapping):
        return as_written(value)
    return tuple(value) if isinstance(value, list | tuple) else value


def defaults_of_a_study() -> dict[str, Any]:
    """The fields of StudySettings that have the same default for every task."""
    return {d.option.kept: d.option.default for d in declarations(StudyOptions) if d.option.kept}
