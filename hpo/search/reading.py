"""Reading a study: its trials, their states, and the facts that were kept about it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC
from functools import cached_property
from statistics import fmean
from typing import TYPE_CHECKING, Any, get_args

from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from hpo.config import derive_seed
from hpo.errors import UsageError
from hpo.records import TrialRecord, TrialState, count_finished, losses, mean_of_finite, pareto_front, ranked
from hpo.search import stored
from hpo.search.confirmation import REPEATS, Race, find_plan
from hpo.search.encoding import OptunaSpace
from hpo.search.finalists import finalists
from hpo.search.forecast import Forecast, forecast
from hpo.search.internals import ENQUEUED
from hpo.search.priority import DEFAULT_CONFIGURATION, EVERYTHING, stage_name, tunable_groups
from hpo.search.strategies import grid_size

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

    from hpo.parameters import Value
    from hpo.search.settings import StudySettings


class ReadStudy:
    """What a study in a storage knows. Reading takes no lock, and none of the code that others added to the study."""

    def __init__(self, storage: BaseStorage, name: str, settings: StudySettings) -> None:
        self.name = name
        self.settings = settings
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(name)
        self._stages = list(tunable_groups(settings.space))
        self._as_optuna = OptunaSpace(settings.space)
        self._snapshot: _Snapshot | None = None
        self._records: dict[int, tuple[FrozenTrial, TrialRecord]] = {}
        """Records of the trials, and what they were made from: a study of thousands is read often."""

    @contextmanager
    def seen_once(self) -> Iterator[None]:
        """Answer all questions within from one reading of the database; nothing may be written to the study there."""
        if self._snapshot is not None:
            yield
            return
        self._snapshot = _Snapshot(self._storage, self._study_id)
        try:
            yield
        finally:
            self._snapshot = None

    def finalists(self) -> list[TrialRecord]:
        """The pruned trials that are continued to their end when the study has all its trials, the best first.

        None are if a trial has reached `stop_at`: it was not pruned, and is good enough. Nor are any if the budget is
        used up.
        """
        with self.seen_once():
            if self.has_reached_target or self.has_spent_budget:
                return []
            totals = [
                trial.user_attrs[stored.CONTINUED]["total"]
                for trial in self._searched()
                if stored.CONTINUED in trial.user_attrs
            ]
            return finalists(self.trials(), self.settings, num_continued=totals.count(self.num_trials))

    @property
    def has_begun(self) -> bool:
        """Whether a trial has ever run."""
        return any(trial.state != "queued" for trial in self.trials())

    @property
    def is_done(self) -> bool:
        """Whether it has all the trials that it was last asked for, and has confirmed what was to be confirmed."""
        with self.seen_once():
            return self.has_searched and self.race.is_done

    @property
    def has_searched(self) -> bool:
        """Whether it has all these trials, and each that may win has run to its end."""
        with self.seen_once():
            return self.remaining(self.num_trials) == 0 and self.counts()["running"] == 0 and not self.finalists()

    @property
    def stop_at(self) -> float | None:
        """The value of the metric that is good enough: no new trial is started when one has it. None without one."""
        value: float | None = self.recorded(stored.STOP_AT)
        return value

    @property
    def has_reached_target(self) -> bool:
        """Whether a trial has reached `stop_at`: in one of its epochs, or with folds as its mean over all of them."""
        target = self.stop_at
        if target is None:
            return False
        gain = self.settings.direction.gain
        return any(gain(value, over=target) >= 0 for trial in self.trials() for value in self._judged(trial))

    @property
    def stop_when_flat(self) -> float | None:
        """The gain that more trials must promise for a new one to be started. None without one."""
        value: float | None = self.recorded(stored.STOP_WHEN_FLAT)
        return value

    @property
    def forecast(self) -> Forecast | None:
        """What more trials promise; None where that is not known."""
        return forecast(self.settings, self.trials())

    @property
    def is_flat(self) -> bool:
        """Whether more trials promise less than `stop_when_flat`."""
        wanted = self.stop_when_flat
        if wanted is None:
            return False
        found = self.forecast
        return found is not None and found.gain < wanted

    @property
    def budget_s(self) -> float | None:
        """Training time of all trials together, in seconds, after which no new one is started. None without a limit."""
        value: float | None = self.recorded(stored.BUDGET)
        return value

    @property
    def trial_timeout_s(self) -> float | None:
        """Training time of a trial, in seconds, after which it ends. None without a limit."""
        value: float | None = self.recorded(stored.TRIAL_TIMEOUT)
        return value

    @property
    def broken_extremes(self) -> str | None:
        """What a rehearsal found wrong with extremes of the space, in words; None if nothing, or if there was none."""
        value: str | None = self.recorded(stored.REHEARSAL)
        return value

    def trained_s(self, *, besides: Collection[int] = ()) -> float:
        """Seconds that workers were busy with the trials of the search, in all sessions and on all machines.

        Repeats do not count, nor do the trials whose numbers are in `besides`.
        """
        return math.fsum(
            trial.user_attrs.get(stored.TRAINED, 0.0) for trial in self._searched() if trial.number not in besides
        )

    @property
    def has_spent_budget(self) -> bool:
        """Whether the trials have trained for as long as `budget_s` allows."""
        budget_s = self.budget_s
        return budget_s is not None and self.trained_s() >= budget_s

    def _judged(self, trial: TrialRecord) -> list[float]:
        """What decides whether a trial is good enough."""
        if trial.state in ("diverged", "failed"):
            return []
        if self.settings.folds:
            return [trial.value] if trial.state == "complete" and trial.value is not None else []
        return [value for value in trial.curve.values() if math.isfinite(value)]

    @property
    def race(self) -> Race:
        """The confirmation of the best configurations, as far as it has come."""
        plan = find_plan(self.recorded(stored.CONFIRM) or "none")
        return Race.of(plan, self.trials(), self.repeats(), self.settings.direction)

    def estimated_mean(self, number: int) -> float:
        """What the folds that a trial has say of its mean over all, when there is a complete trial to compare with.

        It is the best complete trial's mean and the mean difference to it in the same folds: with folds of which some
        are easier than others, the mean of the first few says little.
        """
        best = ranked([trial for trial in self.trials() if trial.state == "complete"], self.settings.direction)[0]
        assert best.value is not None, "a complete trial has a value"
        return best.value + fmean(value - best.curve[fold] for fold, value in self.trial(number).curve.items())

    def owners(self) -> dict[int, str]:
        """The session that each running trial belongs to, by number."""
        return {
            trial.number: trial.user_attrs.get(stored.OWNER, "")
            for trial in self._trials()
            if trial.state == OptunaState.RUNNING
        }

    def last_owner(self, number: int) -> str:
        """The session that ran the trial last, or runs it."""
        return str(self._trials()[number].user_attrs.get(stored.OWNER, ""))

    def ended(self, numbers: Iterable[int]) -> set[int]:
        """Those of the trials that neither run nor wait to continue; one that the study does not know has ended."""
        trials = self._trials()
        return {number for number in numbers if number >= len(trials) or trials[number].state.is_finished()}

    def remaining(self, num_trials: int) -> int:
        """Trials still to be created until `num_trials` are finished, if the running ones will be.

        A grid ends at its last point; a point whose trial failed is not tried again. No new ones are missing once a
        trial has reached `stop_at`, more trials promise too little, or the budget is used up.
        """
        with self.seen_once():
            if self.has_reached_target or self.is_flat or self.has_spent_budget:
                return len(self.to_resume(is_budget_spent=self.has_spent_budget))
            counts = self.counts()
        missing = num_trials - count_finished(counts) - counts["running"]
        if self.settings.strategy == "grid":
            num_tried = sum(counts.values()) - counts["interrupted"] - counts["queued"]
            missing = min(missing, grid_size(self.settings.space) - num_tried)
        return max(0, missing)

    def to_resume(self, *, is_budget_spent: bool) -> list[int]:
        """Trials that were interrupted and run on, even if no new one is started.

        If the budget is used up, each ends as pruned with its next epoch, and none is resumed that could not.
        """
        if is_budget_spent and not self.may_end_early:
            return []
        return [trial.number for trial in self.trials() if trial.state == "interrupted"]

    @property
    def may_end_early(self) -> bool:
        """Whether a part of a trial is a result: some of the folds, or one of several objectives, are not."""
        return not (self.settings.folds or self.settings.costs)

    @property
    def num_finished(self) -> int:
        """Trials that count for the study's total: complete, pruned, diverged and infeasible."""
        return count_finished(self.counts())

    def counts(self) -> dict[TrialState, int]:
        """Number of the search's trials in each state, 0 where there are none."""
        counted = Counter(trial.state for trial in self.trials())
        return {state: counted[state] for state in get_args(TrialState)}

    def trials(self) -> list[TrialRecord]:
        """Every trial of the search, by number."""
        return [self._record(trial) for trial in self._searched()]

    def repeats(self) -> list[TrialRecord]:
        """The trainings that confirm configurations, by number. They are numbered as trials are."""
        return [self._record(trial) for trial in self._trials() if REPEATS in trial.user_attrs]

    def trial(self, number: int) -> TrialRecord:
        """A trial of the search or a repeat. Raises UsageError if there is none of that number."""
        trials = self._trials()
        if not 0 <= number < len(trials):
            raise UsageError(f"study '{self.name}' has no trial {number}; `hpo show {self.name}` lists its trials.")
        return self._record(trials[number])

    @property
    def num_numbered(self) -> int:
        """Trials and repeats that have a number; the next one gets this."""
        return len(self._trials())

    def best(self) -> TrialRecord | None:
        """The trial with the best epoch, complete or pruned, the earliest of equals; None while there is none."""
        return next(iter(ranked(self.trials(), self.settings.direction)), None)

    @property
    def default_trial(self) -> TrialRecord | None:
        """The trial of the default configuration; None before there is one, and with a grid, which has points alone."""
        first = next(iter(self.trials()), None)
        return first if first and first.stage == DEFAULT_CONFIGURATION else None

    def front(self) -> list[TrialRecord]:
        """The complete trials that no other one beats in all objectives, the best metric first."""
        complete = {trial.number: trial for trial in self.trials() if trial.state == "complete"}
        points = {number: losses(trial, self.settings.direction) for number, trial in complete.items()}
        return [complete[number] for number in pareto_front(points)]

    @property
    def id(self) -> str | None:
        """What tells the study from one of the same name in a database that was lost; None before hpo 0.2."""
        known: str | None = self.recorded(stored.ID)
        return known

    @property
    def num_trials(self) -> int:
        """Trials that the study was last asked for."""
        return int(self.recorded(stored.NUM_TRIALS) or self.settings.planned_trials)

    @property
    def has_loop(self) -> bool:
        """Whether the task has a training loop of its own."""
        return bool(self.recorded(stored.HAS_LOOP))

    @property
    def has_test(self) -> bool:
        """Whether its winner can be tested; a training loop of the task's own may come without a test."""
        return self.recorded(stored.HAS_TEST) is not False

    @property
    def is_refit(self) -> bool:
        """Whether its winner is trained on training and validation examples together before it is tested."""
        return bool(self.recorded(stored.REFIT) or self.settings.folds)

    @property
    def task_reference(self) -> str:
        """What finds the task's code, as the last session found it."""
        return str(self.recorded(stored.TASK_REFERENCE) or self.settings.task)

    @property
    def tracking_uri(self) -> str | None:
        """MLflow store that was named for the runs; None for the one in the home."""
        uri: str | None = self.recorded(stored.TRACKING_URI)
        return uri

    def recorded(self, key: str) -> Any:
        """The fact kept under the key; None if there is none."""
        facts = self._snapshot.facts if self._snapshot else self._storage.get_study_user_attrs(self._study_id)
        return facts.get(stored.RECORD + key)

    def trial_seed(self, number: int) -> int:
        """Seed of everything random in a trial."""
        return derive_seed(self.settings.seed, number)

    def _trials(self) -> list[FrozenTrial]:
        return self._snapshot.trials if self._snapshot else self._storage.get_all_trials(self._study_id, deepcopy=False)

    def _searched(self) -> list[FrozenTrial]:
        return [trial for trial in self._trials() if REPEATS not in trial.user_attrs]

    def _stage(self, trial: optuna.Trial | FrozenTrial) -> str:
        if stored.STAGE in trial.user_attrs:
            return str(trial.user_attrs[stored.STAGE])
        if self.settings.strategy == "priority":
            return stage_name(trial.number, self._stages, self.settings.planned_trials)
        return DEFAULT_CONFIGURATION if trial.number == 0 and self.settings.strategy != "grid" else EVERYTHING

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        source, record = self._records.get(trial.number, (None, None))
        if record is None or source is not trial:
            record = self._read(trial)
            self._records[trial.number] = trial, record
        return record

    def _read(self, trial: FrozenTrial) -> TrialRecord:
        curve = dict(sorted(trial.intermediate_values.items()))
        best_epoch: int | None = trial.user_attrs.get(stored.BEST_EPOCH)
        if self.settings.folds:
            best_value = mean_of_finite(curve.values())
        else:
            best_epoch = best_epoch or self._best_epoch(curve)
            best_value = None if best_epoch is None else curve.get(best_epoch)
        return TrialRecord(
            number=trial.number,
            state=_state(trial),
            value=trial.values[0] if trial.state == OptunaState.COMPLETE else best_value,
            values=self._as_optuna.decode(trial.params or trial.system_attrs.get(ENQUEUED, {})),
            inactive=tuple(trial.user_attrs.get(stored.INACTIVE, ())),
            curve=curve,
            best_epoch=best_epoch,
            stage=self._stage(trial),
            reason=trial.user_attrs.get(stored.REASON),
            attempts=trial.user_attrs.get(stored.ATTEMPT, 1),
            duration_s=_duration_s(trial),
            trained_s=trial.user_attrs.get(stored.TRAINED, 0.0),
            pruned_after=trial.user_attrs.get(stored.CONTINUED, {}).get("after"),
            costs=self._costs(trial),
            symptoms=trial.user_attrs.get(stored.SYMPTOMS, {}),
            repeats=trial.user_attrs.get(REPEATS),
        )

    def _costs(self, trial: FrozenTrial) -> dict[str, float]:
        if trial.state != OptunaState.COMPLETE:
            return {}
        return dict(zip(self.settings.costs, trial.values[1:], strict=True))

    def _best_epoch(self, curve: dict[int, float]) -> int | None:
        finite = [epoch for epoch, value in curve.items() if math.isfinite(value)]
        return min(finite, key=lambda epoch: self._loss(curve[epoch]), default=None)

    def _loss(self, value: float | None) -> float:
        assert value is not None, "only trials and epochs with a value are compared"
        return self.settings.direction.loss(value)

    def _inactive(self, values: Mapping[str, Value]) -> list[str]:
        active = self.settings.space.active(values)
        return [name for name in values if name not in active]


class _Snapshot:
    """What a study's database has at one moment, read when it is first asked for."""

    def __init__(self, storage: BaseStorage, study_id: int) -> None:
        self._storage = storage
        self._study_id = study_id

    @cached_property
    def trials(self) -> list[FrozenTrial]:
        return self._storage.get_all_trials(self._study_id, deepcopy=False)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return self._storage.get_study_user_attrs(self._study_id)


def _duration_s(trial: FrozenTrial) -> float | None:
    """Optuna's own is an hour wrong across the end of summer time, because its times are local ones."""
    if trial.datetime_start is None or trial.datetime_complete is None:
        return None
    return (trial.datetime_complete.astimezone(UTC) - trial.datetime_start.astimezone(UTC)).total_seconds()


def _state(trial: FrozenTrial) -> TrialState:
    match trial.state:
        case OptunaState.COMPLETE:
            return "pruned" if trial.user_attrs.get(stored.WAS_PRUNED) else "complete"
        case OptunaState.PRUNED:
            broken: tuple[TrialState, ...] = ("diverged", "infeasible")
            return next((state for state in broken if state in trial.constraints), "pruned")
        case OptunaState.FAIL:
            return "failed"
        case OptunaState.WAITING:
            return "interrupted" if stored.ATTEMPT in trial.user_attrs else "queued"
        case OptunaState.RUNNING:
            return "running"
