"""A study: one search's settings, its trials, and the asking for and telling of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self
from uuid import uuid4

import optuna
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.trial import TrialState as OptunaState
from optuna.trial import create_trial

from hpo.config import Direction
from hpo.errors import HpoError, StoreError, StudyMismatchError, UnknownNameError, first_line
from hpo.records import EndState, TrialRecord, TrialState, describe_pruning
from hpo.search import stored
from hpo.search.confirmation import REPEATS
from hpo.search.encoding import OptunaSpace, distribution
from hpo.search.finalists import is_spared
from hpo.search.internals import trial_id
from hpo.search.prior import Observation
from hpo.search.pruners import build_pruner, describe_verdict
from hpo.search.reading import ReadStudy
from hpo.search.settings import FORMAT, StudySettings, differences
from hpo.search.storage import StudyStorage
from hpo.search.strategies import build_sampler

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    from hpo.parameters import Value


_WAITING: tuple[TrialState, ...] = ("queued", "interrupted")

_STORE_TIME_EVERY_S = 10.0
"""Training time of a running trial that may be lost in a crash, seconds. Storing it each epoch would cost a write."""

Kept = float | Literal["none"] | None
"""A number that the study keeps: "none" takes it back, and None leaves it as it is."""


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """A trial to run."""

    number: int
    """Position in the study, from 0."""

    attempt: int
    """1, or more if the trial was begun before."""

    values: dict[str, Value]
    """Every parameter of the space, in its order."""

    active_values: dict[str, Value]
    """The values without those whose `when` does not hold."""

    stage: str
    """What this trial searches, for people."""

    seed: int
    """Seed of everything random in the trial."""

    pruned: str | None = None
    """How far it came before it was pruned, if it is continued after that: `pruned after 3 of 20 epochs`."""

    repeats: int | None = None
    """The trial whose configuration it trains again with another seed; None for a trial of the search."""

    trained_s: float = 0.0
    """Seconds that workers were busy with it in earlier attempts."""


@dataclass(frozen=True)
class _RunningTrial:
    handle: optuna.Trial
    reported: set[int]
    """Epochs, or folds, that a result is stored for, those of earlier attempts too."""


class TrialTakenError(HpoError):
    """Another session has taken a trial over, and has ended it."""


@contextmanager
def _explained() -> Iterator[None]:
    """Turn what a database refuses, when it is full or locked for long, into a StoreError."""
    try:
        yield
    except StorageInternalError as error:
        cause = first_line(error.__cause__ or error)
        raise StoreError(
            f"cannot write to the study database ({cause}): free disk space or close whatever locks it."
        ) from error


class Study(ReadStudy):
    """A study in a storage. One process at a time may ask and tell: the holder of the study's lock.

    Where several sessions share a study, each holds the lock while it asks or tells, and reports its own trials alone.
    """

    def __init__(self, storage: BaseStorage, name: str, settings: StudySettings) -> None:
        """Use `open`, `load` or `list_studies`: the study must be there, with these settings."""
        super().__init__(storage, name, settings)
        parameters = self._as_optuna.space.parameters
        self._distributions = {name: distribution(parameter) for name, parameter in parameters.items()}
        self._running: dict[int, _RunningTrial] = {}

    @cached_property
    def _optuna(self) -> optuna.Study:
        """The study as it asks and tells. To look at it takes none of the code that others added to it."""
        return optuna.load_study(
            study_name=self.name,
            storage=self._storage,
            sampler=_sampler(self.settings),
            pruner=_pruner(self.settings),
        )

    @classmethod
    def open(
        cls, storage: BaseStorage, name: str, settings: StudySettings, *, extensions: tuple[str, ...] = ()
    ) -> Self:
        """Create the study, or resume it if it was made with the same settings.

        `extensions` widen the space of a study that is there; its trials are kept, and nobody else may search it.

        Raises StudyMismatchError, naming every difference, if it was made with others; nothing is written then.
        """
        made = read_settings(storage, name)
        if made is None:
            _create(storage, name, settings)
            return cls(storage, name, settings)
        extended = made.extend(extensions)
        require_same_settings(name, extended, settings)
        if extensions:
            _redeclare(storage, name, made, extended)
        return cls(storage, name, extended)

    @classmethod
    def load(cls, storage: BaseStorage, name: str) -> Self:
        """The study of that name. Raises UnknownNameError if there is none."""
        settings = read_settings(storage, name)
        if settings is None:
            raise UnknownNameError("study", name, [study.name for study in list_studies(storage)])
        return cls(storage, name, settings)

    @_explained()
    def ask(self, owner: str = "") -> Suggestion:
        """The next trial: one that was interrupted, with its number and its values, or else a new one.

        It belongs to `owner`, a session's id, until it is told or adopted by another.
        """
        return self._begin(self._optuna.ask(self._distributions), owner)

    @_explained()
    def resume(self, number: int, owner: str = "") -> Suggestion:
        """A trial that was interrupted, as `ask` would return it. The caller holds the study's lock."""
        waiting = trial_id(self._trials()[number])
        self._storage.set_trial_state_values(waiting, OptunaState.RUNNING)
        return self._begin(optuna.Trial(self._optuna, waiting), owner)

    @_explained()
    def ask_repeat(self, owner: str = "") -> Suggestion | None:
        """The next training that confirms a configuration, one that was interrupted first; None if none is missing.

        The caller holds the study's lock, and the search has all its trials.
        """
        race = self.race
        numbers = [repeat.number for each in race.running for repeat in each.repeats if repeat.state in _WAITING]
        if not numbers:
            if race.next is None:
                return None
            numbers = [self._queue_repeat(race.next.trial)]
        return self.resume(numbers[0], owner)

    def _queue_repeat(self, record: TrialRecord) -> int:
        """Queue a training of this configuration with a seed of its own; the number of the new trial."""
        number = len(self._trials())
        about = {REPEATS: record.number, stored.STAGE: f"confirms trial {record.number}"}
        self._optuna.add_trial(
            create_trial(
                state=OptunaState.WAITING,
                params=self._as_optuna.encode(record.values),
                distributions=self._distributions,
                user_attrs=about | {stored.INACTIVE: list(record.inactive)},
            )
        )
        return number

    def _begin(self, handle: optuna.Trial, owner: str) -> Suggestion:
        handle.set_user_attr(stored.OWNER, owner)
        values = self._as_optuna.decode({name: handle.params[name] for name in self.settings.space.parameters})
        active_values = self.settings.space.active(values)
        attempt = handle.user_attrs.get(stored.ATTEMPT, 0) + 1
        handle.set_user_attr(stored.ATTEMPT, attempt)
        handle.set_user_attr(stored.INACTIVE, self._inactive(values))
        earlier_curve = self._trials()[handle.number].intermediate_values if attempt > 1 else {}
        self._running[handle.number] = _RunningTrial(handle, set(earlier_curve))
        return Suggestion(
            number=handle.number,
            attempt=attempt,
            values=values,
            active_values=active_values,
            stage=self._stage(handle),
            seed=self.trial_seed(handle.number),
            pruned=self._describe_pruning(handle.user_attrs),
            repeats=handle.user_attrs.get(REPEATS),
            trained_s=handle.user_attrs.get(stored.TRAINED, 0.0),
        )

    def _describe_pruning(self, attributes: Mapping[str, Any]) -> str | None:
        if stored.CONTINUED not in attributes:
            return None
        num_steps = attributes[stored.CONTINUED]["after"]
        return describe_pruning(num_steps, self.settings.num_steps, folds=bool(self.settings.folds))

    @_explained()
    def enqueue(self, configurations: Iterable[Mapping[str, Value]], stage: str) -> None:
        """Let configurations be tried next, in their order; one that the study has already is passed over.

        Each has a value for every parameter. The default configuration stays trial 0. The caller holds the study's
        lock.
        """
        if not self._trials():
            self._optuna.enqueue_trial(self._as_stored(self.settings.space.defaults()))
        for values in configurations:
            about = {stored.STAGE: stage, stored.INACTIVE: self._inactive(values)}
            self._optuna.enqueue_trial(self._as_stored(values), user_attrs=about, skip_if_exists=True)

    def learn_from(self, source: str, seen: Sequence[Observation]) -> None:
        """Keep the trials of another study, as a guess that `priority` scales by how well this study agrees with it.

        Replaces what was kept of that study. The caller holds the study's lock.
        """
        kept = [each | {"values": self._as_optuna.encode(each["values"])} for each in seen]
        self.record(stored.PRIORS, (self.recorded(stored.PRIORS) or {}) | {source: kept})

    def _as_stored(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """The values as Optuna gives them back: 1 for a real number is 1.0."""
        encoded = self._as_optuna.encode(values)
        return {
            name: declared.to_external_repr(declared.to_internal_repr(encoded[name]))
            for name, declared in self._distributions.items()
        }

    @_explained()
    def report(self, number: int, step: int, value: float, *, trained_s: float = 0.0) -> bool:
        """Store the metric after an epoch, or a fold, counted from 1; whether the trial is too weak to continue.

        `trained_s` are the seconds that workers were busy with the trial so far, in all attempts; they are stored now
        and then, so that a crash loses little of them.

        Raises TrialTakenError if another session has ended the trial, while this one was cut off.

        A step that an earlier attempt has reported keeps its value. NaN is stored and never judged: the trainer
        knows whether a trial has diverged. Nothing is gained by stopping a trial in its last step.
        """
        running = self._running[number]
        if step not in running.reported:
            try:
                self._store_value(running, step, value)
                if trained_s - running.handle.user_attrs.get(stored.TRAINED, 0.0) >= _STORE_TIME_EVERY_S:
                    running.handle.set_user_attr(stored.TRAINED, trained_s)
            except UpdateFinishedTrialError as error:
                raise TrialTakenError(f"trial {number} has ended elsewhere") from error
            running.reported.add(step)
        if math.isnan(value) or self.settings.costs or step >= self.settings.num_steps:
            return False
        if {stored.CONTINUED, REPEATS} & running.handle.user_attrs.keys() or not running.handle.should_prune():
            return False
        with self.seen_once():
            return not is_spared(self.trial(number), self.trials(), self.settings)

    def pruning_reason(self, number: int, step: int) -> str:
        """Why `report` has said that a trial is to stop after an epoch, or a fold, in words for the user."""
        return describe_verdict(self.settings.pruner, number, step)

    def _store_value(self, running: _RunningTrial, step: int, value: float) -> None:
        if self.settings.costs:  # Optuna reports, and prunes, where there is one objective alone
            self._storage.set_trial_intermediate_value(trial_id(running.handle), step, value)
        else:
            running.handle.report(value, step)

    @_explained()
    def tell(
        self,
        number: int,
        state: EndState,
        *,
        value: float | None = None,
        best_epoch: int | None = None,
        reason: str | None = None,
        costs: Mapping[str, float] | None = None,
        symptoms: Mapping[str, float] | None = None,
        trained_s: float | None = None,
    ) -> None:
        """Write down how a trial ended; `value` is the metric of its best epoch, which a complete trial must have.

        With folds `value` and `best_epoch` are means over them, and a pruned trial must have an `estimated_mean`.

        With several objectives it has `costs` too, one for each of the settings' `costs`. `trained_s` are the seconds
        that workers were busy with it in all attempts.

        An interrupted trial goes back to the queue: `ask` returns it again. A diverged one, and an infeasible one,
        which costs more than was allowed, count as worse than any other, and a failed one not at all.
        """
        running = self._running[number]
        # None is written too: it replaces what an interrupted attempt has left.
        running.handle.set_user_attr(stored.BEST_EPOCH, best_epoch)
        running.handle.set_user_attr(stored.REASON, reason)
        if self.settings.folds:
            running.handle.set_user_attr(stored.WAS_PRUNED, state == "pruned")
        running.handle.set_user_attr(stored.SYMPTOMS, dict(symptoms or {}))
        if trained_s is not None:
            running.handle.set_user_attr(stored.TRAINED, trained_s)
        match state:
            case "complete":
                assert value is not None, "a complete trial has a value"
                self._optuna.tell(number, [value, *((costs or {})[name] for name in self.settings.costs)])
            case "pruned" if self.settings.folds:
                # Optuna's samplers learn from an estimated mean when the trial is complete for them, as its
                # WilcoxonPruner advises; of one that was pruned they would take the last fold.
                self._optuna.tell(number, value)
            case "pruned":
                self._optuna.tell(number, state=OptunaState.PRUNED)
            case "diverged":
                self._mark_diverged(running)
                self._optuna.tell(number, state=OptunaState.PRUNED)
            case "infeasible":
                running.handle.set_constraint(stored.INFEASIBLE, 1.0)  # samplers rank it last
                self._optuna.tell(number, state=OptunaState.PRUNED)
            case "failed":
                self._optuna.tell(number, state=OptunaState.FAIL)
            case "interrupted":
                self._requeue(number)
        del self._running[number]

    @_explained()
    def continue_finalists(self) -> None:
        """Put the finalists back into the queue, to be trained to their end. The caller holds the study's lock.

        Each keeps its number, its curve and what it took to get there, and is not pruned again.
        """
        assert isinstance(self._storage, StudyStorage), "only a database can take a trial up again"
        for record in self.finalists():
            fact = {"after": len(record.curve), "total": self.num_trials}
            self._storage.reopen_trial(trial_id(self._trials()[record.number]), stored.CONTINUED, fact)

    def _mark_diverged(self, running: _RunningTrial) -> None:
        # TPE ranks pruned trials by how far they came: one that diverged in epoch 30 would beat all that were pruned in
        # epoch 10. Only a violated constraint ranks last. The NaN keeps Optuna from taking the last epoch as its value.
        self._store_value(running, max(running.reported, default=0) + 1, math.nan)
        running.handle.set_constraint(stored.DIVERGED, 1.0)

    @_explained()
    def requeue(self, numbers: Iterable[int]) -> None:
        """Put running trials back into the queue: nobody runs them any longer. The caller holds the study's lock."""
        for number in numbers:
            self._requeue(number)

    @_explained()
    def release(self, owner: str) -> None:
        """Put the trials that this session runs back into the queue."""
        self.requeue(number for number, trial_owner in self.owners().items() if trial_owner == owner)

    def forget(self, number: int) -> None:
        """Let go of a trial that another session has taken over."""
        self._running.pop(number, None)

    def _requeue(self, number: int) -> None:
        id_in_database = self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)
        self._storage.set_trial_state_values(id_in_database, OptunaState.WAITING)

    def remember_session(
        self,
        *,
        num_trials: int,
        task_reference: str,
        tracking_uri: str | None,
        has_test: bool = True,
        has_loop: bool = False,
        confirm: str | None = None,
        stop_at: Kept = None,
        stop_when_flat: Kept = None,
        budget_s: Kept = None,
        trial_timeout_s: Kept = None,
        refit: bool = False,
    ) -> None:
        """Keep what a session was given and the next one, or a reader, wants to know.

        What is None stays as it was, and so does a `refit` that was asked for.
        """
        if confirm is not None:
            self.record(stored.CONFIRM, confirm)
        limits = {
            stored.STOP_AT: stop_at,
            stored.STOP_WHEN_FLAT: stop_when_flat,
            stored.BUDGET: budget_s,
            stored.TRIAL_TIMEOUT: trial_timeout_s,
        }
        for key, limit in limits.items():
            if limit is not None:
                self.record(key, None if limit == "none" else limit)
        if refit:
            self.record(stored.REFIT, refit)
        self.record(stored.NUM_TRIALS, num_trials)
        self.record(stored.TASK_REFERENCE, task_reference)
        self.record(stored.TRACKING_URI, tracking_uri)
        self.record(stored.HAS_TEST, has_test)
        self.record(stored.HAS_LOOP, has_loop)

    @_explained()
    def record(self, key: str, value: Any) -> None:
        """Keep a fact about the study under a key; `value` is anything that JSON can hold."""
        self._storage.set_study_user_attr(self._study_id, stored.RECORD + key, value)


def list_studies(storage: BaseStorage) -> list[Study]:
    """The studies in the storage that hpo made, the oldest first."""
    names = [frozen.study_name for frozen in storage.get_all_studies() if stored.SETTINGS in frozen.user_attrs]
    return [Study.load(storage, name) for name in names]


def read_settings(storage: BaseStorage, name: str) -> StudySettings | None:
    """What the study was made with; None if there is no such study.

    Raises StoreError if the name belongs to a study that hpo did not make, or that a newer hpo made.
    """
    try:
        study_id = storage.get_study_id_from_name(name)
    except KeyError:
        return None
    written = storage.get_study_user_attrs(study_id).get(stored.SETTINGS)
    if written is None:
        if storage.get_n_trials(study_id) == 0:
            return None  # its making was cut short before anything was asked
        raise StoreError(f"study '{name}' was not made by hpo; choose another name with --study.")
    if written["format"] > FORMAT:
        raise StoreError(f"study '{name}' was made by a newer version of hpo; upgrade hpo to use it.")
    return StudySettings.from_dict(written["settings"])


def require_same_settings(name: str, made: StudySettings, asked: StudySettings) -> None:
    """Raise StudyMismatchError, naming every difference, where a study was made with other settings."""
    found = list(differences(made, asked))
    if found:
        raise StudyMismatchError(
            f"study '{name}' was made with {'; '.join(found)}. Use the same settings, or another name with --study."
        )


def check_strategy(settings: StudySettings) -> None:
    """Raise UsageError if the strategy or the pruner cannot be made, before anything is written."""
    _sampler(settings)
    _pruner(settings)


def _create(storage: BaseStorage, name: str, settings: StudySettings) -> None:
    check_strategy(settings)
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        directions=[direction.value for direction in (settings.direction, *[Direction.MINIMIZE] * len(settings.costs))],
        load_if_exists=True,
    )
    study.set_user_attr(stored.RECORD + stored.ID, uuid4().hex)
    study.set_user_attr(stored.SETTINGS, _as_written(settings))


def _as_written(settings: StudySettings) -> dict[str, Any]:
    """What `read_settings` reads."""
    return {"format": FORMAT, "settings": settings.to_dict()}


def _redeclare(storage: BaseStorage, name: str, made: StudySettings, extended: StudySettings) -> None:
    """Let each trial of a study have its values in a wider space, as if that had been declared from the beginning.

    Optuna takes a parameter whose range has changed out of the joint space for good, and refuses other choices.
    """
    assert isinstance(storage, StudyStorage), "only a database can declare parameters again"
    before, after = OptunaSpace(made.space), OptunaSpace(extended.space)
    changed = [
        (key, declared)
        for key, parameter in after.space.parameters.items()
        if (declared := distribution(parameter)) != distribution(before.space.parameters[key])
    ]

    def encoded(values: Mapping[str, Value]) -> dict[str, Value]:
        return after.encode(before.decode(values))

    attributes = {stored.SETTINGS: _as_written(extended)}
    storage.redeclare(storage.get_study_id_from_name(name), dict(changed), encoded, attributes)


def _sampler(settings: StudySettings) -> BaseSampler:
    return build_sampler(
        settings.strategy,
        OptunaSpace(settings.space).space,
        seed=settings.seed,
        num_trials=settings.planned_trials,
        has_curves=not settings.folds,
    )


def _pruner(settings: StudySettings) -> BasePruner:
    return build_pruner(
        settings.pruner,
        settings.max_epochs,
        space=OptunaSpace(settings.space).space,
        seed=settings.seed,
        first_rung=settings.first_rung,
    )
