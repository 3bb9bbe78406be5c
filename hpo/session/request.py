"""What a command was given, checked, and filled up with what the study and the machine say."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpo.config import COSTS, TrainConfig
from hpo.database import without_password
from hpo.errors import StudyMismatchError, UnknownNameError, UsageError
from hpo.execution.executors import Resources, check_executor
from hpo.execution.hooks import check_url
from hpo.home import Home, check_study_name, find_data_dir, find_storage
from hpo.objective import Objective
from hpo.parameters import Value
from hpo.plugins import OBJECTIVES, SEARCH_SPACES, load_task, require_registered
from hpo.search.confirmation import find_plan
from hpo.search.forecast import can_forecast
from hpo.search.prior import Observation
from hpo.search.priority import TRIED_BY_HAND
from hpo.search.pruners import check_first_rung, check_folds_pruner, check_pruner
from hpo.search.settings import StudySettings, read_constraint
from hpo.search.storage import read_storage
from hpo.search.study import Kept, Study, check_strategy, read_settings, require_same_settings
from hpo.search.warm_start import NUM_CONFIGURATIONS, NUM_OF_ANOTHER_TASK, best_configurations, observations
from hpo.session.options import (
    SearchOptions,
    StudyOptions,
    checked,
    declarations,
    defaults_of_a_study,
    kept_by_the_study,
)
from hpo.task import Task
from hpo.tracking.store import home_store_uri
from hpo.training.compiled import check_compile_mode
from hpo.training.device import check_gpus_per_trial, choose_device, require_share_or_whole, visible_gpus

MIN_TRIALS_REHEARSED = 30
"""Trials of a new study that make a rehearsal of some seconds worth its while."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one session searches with: its machine, its stores and its share of the work."""

    home: Home
    storage: str | None
    """URL of the database that several machines share; None for the one in the home."""
    tracking_uri: str | None
    """The MLflow store that was named."""
    data_dir: Path
    device: str
    """As torch names it."""
    keep: int
    """Trials whose best weights stay in MLflow."""
    timeout_s: float | None
    joins: bool
    """Whether the study may be under way elsewhere."""
    accepts_changes: bool
    """Whether to continue with other data, or another source of the task, than the study began with."""
    executor: str
    """Name of the executor: where the workers run."""
    resources: Resources
    trainer: Mapping[str, Any]
    """Settings of TrainConfig for this session's trials; what was not given is the task's."""
    notify: str | None = None
    """Address that hears of new bests, failures and the end."""
    on_best: str | None = None
    """Shell command for each new best trial."""

    @property
    def is_shared(self) -> bool:
        """Whether other machines may search the same study."""
        return self.storage is not None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a session was asked to do, checked against what the study says."""

    task: Task
    """With the space and the metric of the study."""
    study: str
    settings: StudySettings
    trials: int | None
    """The study's new total of trials; None leaves it as it is."""
    proposals: Sequence[Proposal]
    """What is tried first."""
    confirm: str | None = None
    """How the best configurations are confirmed, as `--confirm` has it; None leaves it as it is."""
    stop_at: Kept = None
    """The value of the metric that ends the search; "none" takes it back, and None leaves it as it is."""
    stop_when_flat: Kept = None
    """The gain that more trials must promise; "none" takes it back, and None leaves it as it is."""
    budget_s: Kept = None
    """Training time of all trials together; "none" takes it back, and None leaves it as it is."""
    trial_timeout_s: Kept = None
    """Training time of one trial; "none" takes it back, and None leaves it as it is."""
    extensions: tuple[str, ...] = ()
    """What widens the space of the study that is there, as `-p` has it."""
    refit: bool = False
    """Whether the winner is trained on training and validation examples together; False leaves it as it is."""
    rehearse: bool | None = None
    """Whether to rehearse before the first trial; None for what `is_rehearsed` says."""
    machine: Machine

    def is_rehearsed(self, *, is_new: bool) -> bool:
        """Whether the configurations are rehearsed first: if asked, or if the study is new and takes long.

        Only workers of this machine can: those of other executors may have other devices.
        """
        if self.rehearse is not None:
            return self.rehearse
        num_trials = self.trials or self.settings.planned_trials
        return is_new and num_trials >= MIN_TRIALS_REHEARSED and self.machine.executor == "local"


def read_request(task: str | Objective, given: Mapping[str, object]) -> Request:
    """What the options of a search ask for. Raises UsageError if they make no sense; nothing is written."""
    options = checked(given)
    if not options["join"]:
        require_started_once()
    return request_for(this_machine(options), task, options)


def request_for(machine: Machine, task: str | Objective, options: SearchOptions) -> Request:
    """The same for a machine that is known, and options of `checked`."""
    if (confirm := options.get("confirm")) is not None:
        find_plan(confirm)
    found, name, settings = agree(machine, task, options)
    if options["rehearse"] and machine.executor != "local":
        raise UsageError(
            f"--rehearse is for workers of this machine, not for --executor {machine.executor}; omit it, and run "
            f"`hpo check {found.reference}` on a machine of the cluster."
        )
    trial_timeout = options.get("trial_timeout")
    if settings.folds and isinstance(trial_timeout, int | float):
        raise UsageError(
            f"--trial-timeout {trial_timeout:g} cannot be combined with --folds {settings.folds}: the mean of a part "
            "of the folds cannot be compared with others; omit it, or use fewer --epochs."
        )
    return Request(
        task=found,
        study=name,
        settings=settings,
        trials=options.get("trials"),
        proposals=find_proposals(machine, name, settings, options.get("tries") or (), options.get("warm_starts") or ()),
        confirm=confirm,
        stop_at=_read_value("--stop-at", options.get("stop_at"), settings),
        stop_when_flat=_read_gain(options.get("stop_when_flat"), settings),
        budget_s=options.get("budget"),
        trial_timeout_s=trial_timeout,
        extensions=new_extensions(read_study(machine, name), settings),
        refit=options["refit"],
        rehearse=options["rehearse"],
        machine=machine,
    )


def _read_gain(given: str | None, settings: StudySettings) -> Kept:
    """The gain in METRIC=GAIN. Raises UsageError for anything else, and where no forecast is made."""
    gain = _read_value("--stop-when-flat", given, settings)
    if gain is None or gain == "none":
        return gain
    if gain <= 0:
        raise UsageError(f"--stop-when-flat {given} is not allowed: the gain must be above 0.")
    if not can_forecast(settings):
        raise UsageError(
            f"--stop-when-flat {given} needs a forecast, which is made for --strategy priority with one objective and "
            "without --folds; omit it."
        )
    return gain


def _read_value(flag: str, given: str | None, settings: StudySettings) -> Kept:
    """The value in METRIC=VALUE, of the study's own metric. Raises UsageError for anything else."""
    if given is None:
        return None
    if given == "none":
        return "none"
    metric, _, text = given.rpartition("=")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if metric != settings.metric or not math.isfinite(value):
        raise UsageError(
            f"{flag} must be {settings.metric}=VALUE, because this study optimises {settings.metric}, or none; not "
            f"'{given}'."
        )
    return value


def this_machine(options: Mapping[str, Any]) -> Machine:
    """What a session searches with, by options of `checked`, the environment and the machine. Raises UsageError."""
    executor = options["executor"]
    _check_executor(executor, options)
    trainer: dict[str, Any] = {
        name: value
        for name, value in (
            ("precision", options["precision"]),
            ("compile", options["compile"]),
            ("deterministic", options["deterministic"] or None),
        )
        if value is not None
    }
    TrainConfig(**trainer)  # raises where one of them is not allowed
    chosen_device = choose_device(options["device"])
    if executor == "local":
        gpus = visible_gpus(chosen_device)
        check_gpus_per_trial(options["gpus_per_trial"], gpus=gpus, num_workers=options["workers"])
        check_compile_mode(options["compile"] or "auto", options["precision"] or "auto", chosen_device)
    home, study = Home.find(options["home"]), options.get("study")
    data_dir = options["data_dir"] or (home.study(study).data_dir if study else None)
    machine = Machine(
        home=home,
        storage=find_storage(options["storage"]),
        tracking_uri=options["tracking_uri"],
        data_dir=find_data_dir(data_dir),
        device=chosen_device,
        keep=options["keep"],
        timeout_s=options["timeout"],
        joins=options["join"],
        accepts_changes=options["accept_changes"],
        executor=executor,
        resources=Resources(
            num_workers=options["workers"],
            device=chosen_device,
            address=options["address"],
            gpus_per_trial=options["gpus_per_trial"],
        ),
        trainer=trainer,
        notify=check_url(url) if (url := options["notify"] or os.environ.get("HPO_NOTIFY")) else None,
        on_best=options["on_best"],
    )
    if machine.joins and not machine.is_shared:
        raise UsageError(
            "several machines need one database: give --storage postgresql+psycopg://USER@HOST/DATABASE, "
            "or set HPO_STORAGE. The database in a home serves one process at a time, which runs --workers of its own."
        )
    return machine


def require_started_once() -> None:
    """Raise UsageError if a launcher has started this command several times, as it does a training script."""
    for launcher, variable in (("torchrun", "WORLD_SIZE"), ("srun", "SLURM_STEP_NUM_TASKS")):
        number = os.environ.get(variable, "")
        if number.isdecimal() and int(number) > 1:
            raise UsageError(
                f"{launcher} has started hpo {number} times ({variable}={number}), and each would do the same; start "
                "it once, without it: --gpus-per-trial 2 trains each trial on two GPUs, --workers runs trials in "
                "parallel, and `hpo worker` joins from other machines."
            )


def _check_executor(executor: str, options: Mapping[str, Any]) -> None:
    check_executor(executor)
    device, address, gpus_per_trial = options["device"], options["address"], options["gpus_per_trial"]
    if executor == "local" and address is not None:
        raise UsageError(f"--address {address} is for --executor ray; omit it.")
    if executor == "ray" and device != "auto":
        raise UsageError(f"--device {device} is for workers of this machine; with Ray --gpus-per-trial decides.")
    if gpus_per_trial is None:
        return
    require_share_or_whole(gpus_per_trial)
    if gpus_per_trial > 1 and options["compile"] in ("step", "graph"):
        raise UsageError(
            f"--compile {options['compile']} cannot be combined with --gpus-per-trial {gpus_per_trial:g}; omit it."
        )


def read_study(machine: Machine, name: str) -> Study | None:
    """The study of that name, if there is one; nothing is written."""
    storage = read_storage(machine.home.path, machine.storage)
    return Study.load(storage, name) if read_settings(storage, name) else None


def agree(machine: Machine, task: str | Objective, options: StudyOptions) -> tuple[Task, str, StudySettings]:
    """The task, the study's name and its settings: what is given, completed by what the study has."""
    given, space = kept_by_the_study(options), options.get("space")
    found = load_task(task, space)
    check_options_of_loop(found.objective, options)
    given_name = options.get("study")
    name = check_study_name(found.objective.name if given_name is None else given_name)
    earlier = read_study(machine, name)
    stored = earlier.settings if earlier else None
    if stored and stored.task != found.objective.name:
        raise StudyMismatchError(
            f"study '{name}' is of task '{stored.task}', not '{found.objective.name}'; choose another name "
            "with --study."
        )
    if stored and machine.is_shared:
        _require_no_code_of_others(stored, given)
    if stored and stored.space_reference and space is None:
        found = load_task(task, stored.space_reference)
    if not found.objective.train:
        found = _with_data_options(found, name, stored, given)
        found = found.suited_to_data(machine.data_dir)
    if options.get("extend"):
        _extend(stored, given)
    settings = _complete(found, stored, given)
    if earlier:  # before the data is read, which may take long
        require_same_settings(name, earlier.settings.extend(new_extensions(earlier, settings)), settings)
    return _with_space_of(found, vars(settings)).judged_by(settings.metric), name, settings


def _with_space_of(task: Task, chosen: Mapping[str, Any]) -> Task:
    """The task with the space that these settings make of its own."""
    return task.narrow(chosen["overrides"]).extend(chosen["extensions"]).fix(chosen["fixed"])


def _extend(stored: StudySettings | None, given: dict[str, Any]) -> None:
    """Let the overrides that were given widen the space: those that have not done so before."""
    overrides = given.pop("overrides", ())
    if not overrides:
        raise UsageError("--extend widens what -p names; give -p NAME=LOW:HIGH or -p NAME=A,B,C.")
    if (stored.strategy if stored else given.get("strategy")) == "grid":
        raise UsageError(
            "--extend is not for --strategy grid, whose points would be others; choose another name with --study."
        )
    so_far = stored.extensions if stored else ()
    given["extensions"] = so_far + tuple(each for each in overrides if each not in so_far)


def new_extensions(study: Study | None, settings: StudySettings) -> tuple[str, ...]:
    """What a session widens of the study that is there."""
    return settings.extensions[len(study.settings.extensions) :] if study else ()


def _with_data_options(task: Task, study: str, stored: StudySettings | None, given: dict[str, Any]) -> Task:
    """The task with the options of its data as given, or as the study has them; `given` gets them as the study keeps
    them. Raises StudyMismatchError if they differ."""
    so_far = stored.data_options if stored else ()
    found = task.with_data_options(given.get("data_options", so_far))
    if "data_options" in given:
        given["data_options"] = found.written_data_options
        if stored:  # before the data are read
            require_same_settings(study, stored, replace(stored, data_options=given["data_options"]))
    return found


def request_of_study(machine: Machine, name: str, task: str | Objective | None = None) -> tuple[Request, Study]:
    """What there is to do for a study that exists, as it has it. `task` says where its task is now, if it has moved."""
    opened = Study.load(read_storage(machine.home.path, machine.storage), name)
    found, _, settings = agree(machine, task or task_of(machine, opened), {"study": name})
    return Request(task=found, study=name, settings=settings, trials=None, proposals=(), machine=machine), opened


def task_of(machine: Machine, study: Study) -> str:
    """The task that a study names. Raises UnknownNameError if others share it and the task is not registered here.

    Whoever can write to the database must not choose what code runs here.
    """
    if machine.is_shared:
        require_registered(OBJECTIVES, study.task_reference)
    return study.task_reference


def check_options_of_loop(objective: Objective, options: Mapping[str, object]) -> None:
    """Raise UsageError if something is asked of the shared trainer, and the task has a training loop of its own."""
    if not objective.train:
        return
    gpus = options.get("gpus_per_trial")
    if isinstance(gpus, int | float) and gpus > 1:
        raise UsageError(
            f"--gpus-per-trial {gpus:g} is for the shared trainer, and task '{objective.name}' has a training loop of "
            "its own (train=), which has one GPU; omit it."
        )
    for declared in declarations(SearchOptions):
        value = options.get(declared.name)
        if declared.option.of_trainer and value and (declared.name, value) != ("metric", objective.metric):
            given = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
            raise UsageError(
                f"{declared.option.flag}{'' if value is True else f' {given}'} is for the shared trainer, and task "
                f"'{objective.name}' has a training loop of its own (train=); omit it."
            )


def _require_no_code_of_others(stored: StudySettings, given: Mapping[str, Any]) -> None:
    """Whoever can write to a shared database must not choose what code runs here."""
    if stored.space_reference and "space_reference" not in given:
        require_registered(SEARCH_SPACES, stored.space_reference)
    for kind, value in (("strategy", stored.strategy), ("pruner", stored.pruner)):
        if ":" in value and given.get(kind) != value:
            raise UsageError(
                f"the study has --{kind} {value}, which is code: on several machines register it as an entry point, or "
                f"give --{kind} {value} here if you trust whoever made the study."
            )


def _complete(task: Task, stored: StudySettings | None, given: Mapping[str, Any]) -> StudySettings:
    """What is given, else what the study was made with, else the defaults; each of it checked."""
    defaults: dict[str, Any] = defaults_of_a_study() | {
        "overrides": (),
        "extensions": (),
        "fixed": (),
        "data_options": (),
        "objectives": (),
        "constraints": (),
        "max_epochs": task.train_config({}).max_epochs,
        "metric": task.objective.metric,
        "pruner": "wilcoxon" if given.get("folds") else "sha",
    }
    known = {name: getattr(stored, name) for name in defaults} if stored else defaults
    chosen = known | dict(given)
    if "metric" not in given and "objectives" in given:
        chosen["metric"] = _metric_of(given["objectives"], task) or chosen["metric"]
    if chosen["metric"] not in task.objective.metric_names and not task.objective.train:
        raise UnknownNameError("metric", chosen["metric"], task.objective.metric_names)
    chosen["objectives"] = _check_objectives(chosen["objectives"], chosen["metric"], task)
    if chosen["objectives"]:
        _suit_several_objectives(chosen, given)
    _check_constraints(chosen["constraints"])
    check_folds_pruner(chosen["pruner"], chosen["folds"])
    check_first_rung(chosen["pruner"], chosen["max_epochs"], chosen["first_rung"])
    settings = StudySettings(
        task=task.objective.name,
        space=_with_space_of(task, chosen).space,
        direction=task.judged_by(chosen["metric"]).objective.better,
        **chosen,
    )
    check_strategy(settings)
    return settings


def _metric_of(objectives: Sequence[str], task: Task) -> str | None:
    """The metric that the first objective names, as `val/f1` does."""
    name = objectives[0].removeprefix("val/")
    return name if name in task.objective.metric_names else None


def _check_objectives(objectives: tuple[str, ...], metric: str, task: Task) -> tuple[str, ...]:
    """The objectives where there are several; none where the metric is the only one."""
    first = f"val/{metric}"
    for position, objective in enumerate(objectives):
        if objective.removeprefix("val/") in task.objective.metric_names and objective != first:
            other = objective.removeprefix("val/")
            raise UsageError(f"--objective {objective} needs --metric {other}: {metric} is what decides.")
        if objective not in (first, *COSTS):
            raise UnknownNameError("objective", objective, (first, *COSTS))
        if objective in objectives[:position]:
            raise UsageError(f"--objective {objective} is given twice; leave one out.")
    if objectives and objectives[0] != first:
        raise UsageError(f"--objective {objectives[0]} cannot be the first: give --objective {first} before it.")
    return objectives if len(objectives) > 1 else ()


def _check_constraints(constraints: Sequence[str]) -> None:
    names = [read_constraint(text)[0] for text in constraints]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--constraint {name} is given twice; leave one out.")


def _suit_several_objectives(chosen: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Choose the pruner that several objectives allow. Raises UsageError if another, or cmaes, was asked for."""
    if given.get("pruner") is None:
        chosen["pruner"] = "none"
    if chosen["pruner"] != "none":
        check_pruner(chosen["pruner"])
        raise UsageError(
            f"--pruner {chosen['pruner']} compares trials by one objective; with several, omit it or use --pruner none."
        )
    if chosen["strategy"] == "cmaes":
        raise UsageError("--strategy cmaes has one objective; with several use priority, tpe, gp, random, grid or qmc.")


@dataclass(frozen=True)
class Proposal:
    """Configurations that are tried first."""

    stage: str
    """Where they come from, for people."""
    configurations: list[dict[str, Value]]
    """A value for every parameter in each."""
    source: str = ""
    """The earlier study that they come from, if any."""
    observations: Sequence[Observation] = ()
    """The trials of that study, as data for the model."""


def find_proposals(
    machine: Machine, name: str, settings: StudySettings, tries: Sequence[str], warm_starts: Sequence[str]
) -> list[Proposal]:
    """What `--try` and `--warm-start` ask for, checked. An earlier study is taken over once.

    Raises UsageError if a configuration does not fit the space, or an earlier study cannot be used.
    """
    if settings.strategy == "grid" and (tries or warm_starts):
        option = f"--try {tries[0]}" if tries else f"--warm-start {warm_starts[0]}"
        raise UsageError(f"{option} is not for --strategy grid, which runs only the points of its grid; omit it.")
    study = read_study(machine, name)
    proposals = [Proposal(TRIED_BY_HAND, [settings.space.configure(text) for text in tries])] if tries else []
    for source in warm_starts:
        earlier = _read_source(machine, source, name)
        stage = f"from study {source}"
        if study is None or all(trial.stage != stage for trial in study.trials()):
            most = NUM_CONFIGURATIONS if earlier.settings.task == settings.task else NUM_OF_ANOTHER_TASK
            best = best_configurations(earlier, settings.space, most=most)
            proposals.append(Proposal(stage, best, source, observations(earlier, settings.space)))
    return proposals


def _read_source(machine: Machine, source: str, name: str) -> Study:
    if source == name:
        raise UsageError(f"--warm-start {source} is the study itself, which is resumed anyway; omit it.")
    return Study.load(read_storage(machine.home.path, machine.storage), source)


def agreed_tracking_uri(machine: Machine, study: Study | None) -> str | None:
    """Where the runs of a study go: where they went so far, so that they stay together.

    If machines share a study, each user configures the store: a database that others write to must not choose who gets
    the password of an MLflow account. Raises StudyMismatchError if another store is given than before, UsageError if a
    shared study has none that all can reach.
    """
    given = machine.tracking_uri
    if machine.is_shared:
        return _reachable(given or os.environ.get("MLFLOW_TRACKING_URI"))
    if study is None:
        return given
    # Not None for the home's own store: MLFLOW_TRACKING_URI would then lead elsewhere.
    so_far = study.tracking_uri or home_store_uri(machine.home.path)
    if given not in (None, so_far):
        raise StudyMismatchError(
            f"the runs of study '{study.name}' are in {without_password(so_far)}, "
            f"not in {without_password(given or '')}; omit --tracking-uri, or choose another name with --study."
        )
    return so_far


def _reachable(uri: str | None) -> str:
    if not uri or uri.startswith("sqlite"):  # a variable can be set, and empty
        raise UsageError(
            f"the machines that share a study need one MLflow store, and {uri or 'the one in the home'} is a file of "
            "this machine; give --tracking-uri http://HOST:PORT, or set MLFLOW_TRACKING_URI."
        )
    return uri
