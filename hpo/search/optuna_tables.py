"""Optuna's tables, with the statements of every epoch and of opening a study written out.

Optuna goes through SQLAlchemy's ORM: a trial of 20 reports costs 100 ms of CPU, and reading a study of 5 000 trials
4.7 s. These statements do the same to the same tables; `benchmarks/storage.py` measures them.
"""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar

from optuna.distributions import (
    BaseDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.storages._rdb.models import (
    StudyModel,
    StudyUserAttributeModel,
    TrialIntermediateValueModel,
    TrialModel,
    TrialParamModel,
    TrialSystemAttributeModel,
    TrialUserAttributeModel,
    TrialValueModel,
)
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import (
    Connection,
    String,
    Table,
    and_,
    bindparam,
    cast,
    delete,
    func,
    insert,
    literal,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from hpo.errors import StoreError
from hpo.search.internals import ENQUEUED, trial_id
from hpo.search.stored import OWNER

if TYPE_CHECKING:
    from optuna._typing import JSONSerializable
    from sqlalchemy import Insert, Row, Select

_STUDIES: Table = StudyModel.__table__
_STUDY_ATTRIBUTES: Table = StudyUserAttributeModel.__table__
_TRIALS: Table = TrialModel.__table__
_VALUES: Table = TrialValueModel.__table__
_EPOCHS: Table = TrialIntermediateValueModel.__table__
_PARAMS: Table = TrialParamModel.__table__
_USER_ATTRIBUTES: Table = TrialUserAttributeModel.__table__
_SYSTEM_ATTRIBUTES: Table = TrialSystemAttributeModel.__table__

_T = TypeVar("_T")

_MANY = 16
"""Unfinished trials from which on it is faster to find out which of them have changed than to read them all."""

_REFRESH_S = 5.0
"""Seconds after which all of them are read all the same."""

_MAX_IDS = 500
"""Trials whose rows are read at once: a database limits the number of parameters."""


class OutageError(StoreError):
    """The database does not answer, and will not be asked again."""


def refuse_another(connection: Connection) -> None:
    """Keep SQLAlchemy from replacing a connection that broke: the lock that it held is gone."""
    if connection.invalidated:
        raise OutageError("the connection that held the study's lock is gone.")


class DirectStorage(RDBStorage):
    """RDBStorage with fewer and lighter statements; what it writes, RDBStorage reads, and the other way round."""

    def __init__(self, url: str, engine_kwargs: dict[str, Any], *, skip_table_creation: bool = False) -> None:
        try:
            super().__init__(url, engine_kwargs, skip_table_creation=skip_table_creation)
        except RuntimeError:  # tables of another version, found by connections that nobody else would close
            self.engine.dispose()
            raise
        self._autocommitting = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        upsert = postgresql.insert if self.engine.name == "postgresql" else sqlite.insert
        self._unfinished = _UnfinishedTrials()
        self._set_epoch = _set_on_unfinished(upsert, _EPOCHS, key="step")
        self._set_param = _set_on_unfinished(upsert, _PARAMS)
        self._set_user_attr = _set_on_unfinished(upsert, _USER_ATTRIBUTES, key="key")
        self._set_system_attr = _set_on_unfinished(upsert, _SYSTEM_ATTRIBUTES, key="key")

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        value, kind = TrialIntermediateValueModel.intermediate_value_to_stored_repr(intermediate_value)
        row = {"step": step, "intermediate_value": value, "intermediate_value_type": kind}
        if not self._written(self._set_epoch, trial_id, row):
            super().set_trial_intermediate_value(trial_id, step, intermediate_value)  # it says why

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if not self._written(self._set_user_attr, trial_id, {"key": key, "value_json": json.dumps(value)}):
            super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: JSONSerializable) -> None:
        if not self._written(self._set_system_attr, trial_id, {"key": key, "value_json": json.dumps(value)}):
            super().set_trial_system_attr(trial_id, key, value)

    def _set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
        previous_distribution: BaseDistribution | None,
    ) -> None:
        if previous_distribution == distribution:
            row = {
                "param_name": param_name,
                "param_value": param_value_internal,
                "distribution_json": distribution_to_json(distribution),
            }
            if self._written(self._set_param, trial_id, row):
                return
        super()._set_trial_param(trial_id, param_name, param_value_internal, distribution, previous_distribution)

    def reopen_trial(self, trial_id: int, key: str, value: Any) -> None:
        """Put a finished trial back into the queue under its number, without values, and with one more user attribute.

        The trial gets a new row, and with it a new id. Optuna reads a finished row once, in every process that has the
        study open, and never again; but it reads each new row, and keeps its trials by number (_CachedStorage, Optuna
        5.0.0). A row that is gone is left alone: it was reopened before.
        """
        with self._transaction() as connection:
            found = connection.execute(_TRIAL, {"of_trial": trial_id}).first()
            if found is None:
                return
            row = {"number": found.number, "study_id": found.study_id, "datetime_start": found.datetime_start}
            added = connection.execute(insert(_TRIALS).values(state=TrialState.WAITING, **row))
            assert added.inserted_primary_key is not None, "a single row was added"
            new_id = added.inserted_primary_key[0]
            for table in (_PARAMS, _EPOCHS, _USER_ATTRIBUTES, _SYSTEM_ATTRIBUTES):
                connection.execute(update(table).where(table.c.trial_id == trial_id).values(trial_id=new_id))
            attribute = {"trial_id": new_id, "key": key, "value_json": json.dumps(value)}
            connection.execute(insert(_USER_ATTRIBUTES).values(attribute))
            for table in (_VALUES, _TRIALS):
                connection.execute(delete(table).where(table.c.trial_id == trial_id))

    def redeclare(
        self,
        study_id: int,
        distributions: Mapping[str, BaseDistribution],
        encoded: Callable[[Mapping[str, Any]], dict[str, Any]],
        attributes: Mapping[str, Any],
    ) -> None:
        """Declare parameters of a study's trials again, and replace attributes of the study; see StudyStorage."""
        trials = self.get_all_trials(study_id, deepcopy=False)
        with self._transaction() as connection:
            for trial in trials:
                values = encoded(trial.params)
                for name in values.keys() & distributions.keys():
                    declared = distributions[name]
                    row = {
                        "param_value": declared.to_internal_repr(values[name]),
                        "distribution_json": distribution_to_json(declared),
                    }
                    own = (_PARAMS.c.trial_id == trial_id(trial), _PARAMS.c.param_name == name)
                    connection.execute(update(_PARAMS).where(*own).values(row))
                if ENQUEUED in trial.system_attrs:
                    own = (_SYSTEM_ATTRIBUTES.c.trial_id == trial_id(trial), _SYSTEM_ATTRIBUTES.c.key == ENQUEUED)
                    queued = json.dumps(encoded(trial.system_attrs[ENQUEUED]))
                    connection.execute(update(_SYSTEM_ATTRIBUTES).where(*own).values(value_json=queued))
            for key, value in attributes.items():
                of_study = (_STUDY_ATTRIBUTES.c.study_id == study_id, _STUDY_ATTRIBUTES.c.key == key)
                connection.execute(update(_STUDY_ATTRIBUTES).where(*of_study).values(value_json=json.dumps(value)))
        self._unfinished = _UnfinishedTrials()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        """A transaction on the connection that this thread is bound to, or on any."""
        bound = self.scoped_session().get_bind()
        try:
            if isinstance(bound, Connection):
                refuse_another(bound)
                with bound.begin():
                    yield bound
            else:
                with self.engine.begin() as connection:
                    yield connection
        except SQLAlchemyError as error:
            raise StorageInternalError("a transaction failed") from error

    def _written(self, statement: Insert, trial_id: int, row: dict[str, Any]) -> bool:
        """Whether the row was written; False where the trial has ended, or is not there."""
        with self._connected() as connection:
            try:
                return connection.execute(statement, {"of_trial": trial_id, **row}).rowcount > 0
            except IntegrityError:  # a parameter that is there already
                return True
            finally:
                self._unfinished.forget(trial_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._attributes(_STUDY_ATTRIBUTES, study_id)

    def get_trial_user_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._attributes(_USER_ATTRIBUTES, trial_id)

    def get_trial_system_attrs(self, trial_id: int) -> dict[str, Any]:
        return self._attributes(_SYSTEM_ATTRIBUTES, trial_id)

    def _attributes(self, table: Table, owner_id: int) -> dict[str, Any]:
        with self._connected() as connection:
            rows = connection.execute(_ATTRIBUTES_OF[table.name], {"owner": owner_id}).all()
        if not rows:
            raise KeyError(f"{table.name}: there is nothing of id {owner_id}")
        return {key: json.loads(value) for key, value in rows if key is not None}

    def get_trial(self, trial_id: int) -> FrozenTrial:
        with self._connected() as connection:
            trials = _build(connection, list(connection.execute(_TRIAL, {"of_trial": trial_id})))
        if not trials:
            return super().get_trial(trial_id)  # it says why
        return trials[0]

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        if states is not None:
            return super()._get_trials(study_id, states, included_trial_ids, trial_id_greater_than)
        of_study = {"of_study": study_id, "after": trial_id_greater_than}
        with self._connected() as connection:
            if len(included_trial_ids) >= _MANY:
                trials = self._unfinished.read(connection, of_study, included_trial_ids)
            else:
                rows = connection.execute(_NEW_AND_KNOWN_TRIALS, of_study | {"known": sorted(included_trial_ids)})
                trials = _build(connection, rows.all())
        if not trials:
            self.get_study_name_from_id(study_id)  # raises KeyError if there is no such study
        return trials

    @contextmanager
    def _connected(self) -> Iterator[Connection]:
        """A connection that commits each statement: the one that this thread is bound to, or any."""
        bound = self.scoped_session().get_bind()
        try:
            if isinstance(bound, Connection):
                with _committing_each(bound):
                    yield bound
            else:
                with self._autocommitting.connect() as connection:
                    yield connection
        except SQLAlchemyError as error:
            raise StorageInternalError("a statement failed") from error


class _UnfinishedTrials:
    """Unfinished trials as they were last read: where hundreds run, few have changed a moment later.

    A trial is read again if its state or its owner has changed, if it has another epoch, parameter or attribute, or if
    this process has written to it. What another process replaces in place, such as the time that a trial has trained,
    is seen after `_REFRESH_S` at the latest.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[str, FrozenTrial]] = {}
        """Each trial by its id, with the mark that is compared before it is used again."""
        self._newest: dict[str, int] = {}
        """The newest row of each table that has rows of trials."""
        self._expires = -math.inf

    def forget(self, trial_id: int) -> None:
        """Read a trial again: it was written to."""
        self._known.pop(trial_id, None)

    def read(self, connection: Connection, of_study: dict[str, int], unfinished: set[int]) -> list[FrozenTrial]:
        """The trials that were `unfinished` when they were last read, and those that have come since, by id."""
        self._forget_changed(connection)
        marks = _marks(connection.execute(_MARKS, of_study | {"oldest": min(unfinished)}).scalar())
        known = {id: kept for id, kept in self._known.items() if marks.get(id) == kept[0]}
        changed = sorted((marks.keys() | unfinished) - known.keys())
        rows = [row for group in _groups(changed) for row in connection.execute(_KNOWN_TRIALS, {"known": group})]
        read = {trial_id(trial): trial for trial in _build(connection, rows)}
        self._known = known | {id: (marks[id], trial) for id, trial in read.items() if id in marks}
        found = read | {id: trial for id, (_, trial) in known.items()}
        return [found[id] for id in sorted(found)]

    def _forget_changed(self, connection: Connection) -> None:
        """Forget the trials that have new rows; what is written after this has newer ones, and is seen next time."""
        if time.monotonic() >= self._expires:
            self._expires = time.monotonic() + _REFRESH_S
            self._known.clear()
            self._newest = {name: newest or 0 for name, newest in connection.execute(_NEWEST_ROWS)}
        for name, of_trial, newest in connection.execute(_NEW_ROWS, self._newest):
            self._newest[name] = max(self._newest[name], newest)
            self.forget(of_trial)


def _marks(text: str | None) -> dict[int, str]:
    """The marks by trial, from the lines of `_MARKS`."""
    lines = (line.partition(" ") for line in (text or "").splitlines())
    return {int(id): mark for id, _, mark in lines}


@contextmanager
def _committing_each(connection: Connection) -> Iterator[None]:
    refuse_another(connection)
    usual = connection.default_isolation_level
    connection.execution_options(isolation_level="AUTOCOMMIT")
    try:
        yield
    finally:
        connection.rollback()  # of nothing: SQLAlchemy's own count of transactions ends here
        if not connection.invalidated:
            connection.execution_options(isolation_level=usual)


def _set_on_unfinished(insert: Callable[[Table], Any], table: Table, *, key: str | None = None) -> Insert:
    """A statement that writes a trial's row in `table`, or replaces the one with that key, unless the trial has ended.

    Its parameters are `of_trial` and the table's other columns.
    """
    columns = [column for column in table.columns if not column.primary_key and column.name != "trial_id"]
    row = select(_TRIALS.c.trial_id, *(bindparam(column.name, type_=column.type) for column in columns)).where(
        _TRIALS.c.trial_id == bindparam("of_trial"), _TRIALS.c.state.in_(_UNFINISHED)
    )
    statement = insert(table).from_select(["trial_id", *(column.name for column in columns)], row)
    if key is not None:
        replaced = {column.name: statement.excluded[column.name] for column in columns if column.name != key}
        statement = statement.on_conflict_do_update(index_elements=["trial_id", key], set_=replaced)
    written: Insert = statement.execution_options(preserve_rowcount=True)
    return written


_ATTRIBUTES_OF = {  # of a study, or trial, without any there is one row, without a key
    table.name: select(table.c.key, table.c.value_json)
    .select_from(owners.outerjoin(table))
    .where(owner_id == bindparam("owner"))
    for owners, owner_id, table in (
        (_STUDIES, _STUDIES.c.study_id, _STUDY_ATTRIBUTES),
        (_TRIALS, _TRIALS.c.trial_id, _USER_ATTRIBUTES),
        (_TRIALS, _TRIALS.c.trial_id, _SYSTEM_ATTRIBUTES),
    )
}


_TRIAL = select(_TRIALS).where(_TRIALS.c.trial_id == bindparam("of_trial"))
_is_known = _TRIALS.c.trial_id.in_(bindparam("known", expanding=True))
_is_of_study, _is_new = _TRIALS.c.study_id == bindparam("of_study"), _TRIALS.c.trial_id > bindparam("after")
_KNOWN_TRIALS = select(_TRIALS).where(_is_known)
_NEW_AND_KNOWN_TRIALS = select(_TRIALS).where(_is_of_study, or_(_is_new, _is_known)).order_by(_TRIALS.c.trial_id)
_UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
_MARKS = (  # in one text: where another thread is busy, each row that is fetched waits for it
    select(
        func.aggregate_strings(
            cast(_TRIALS.c.trial_id, String)
            + " "
            + cast(_TRIALS.c.state, String)
            + func.coalesce(cast(_TRIALS.c.datetime_start, String), "")
            + func.coalesce(_USER_ATTRIBUTES.c.value_json, ""),
            "\n",
        )
    )
    .select_from(_TRIALS)
    .outerjoin(
        _USER_ATTRIBUTES,
        and_(_USER_ATTRIBUTES.c.trial_id == _TRIALS.c.trial_id, _USER_ATTRIBUTES.c.key == OWNER),
    )
    .where(_is_of_study, _TRIALS.c.trial_id >= bindparam("oldest"), or_(_is_new, _TRIALS.c.state.in_(_UNFINISHED)))
)


_TABLES_OF_ROWS = (_EPOCHS, _PARAMS, _USER_ATTRIBUTES, _SYSTEM_ATTRIBUTES)
_NEWEST_ROWS = union_all(*(select(literal(table.name), func.max(*table.primary_key)) for table in _TABLES_OF_ROWS))
_NEW_ROWS = union_all(
    *(
        select(literal(table.name), table.c.trial_id, *table.primary_key).where(
            *(key > bindparam(table.name) for key in table.primary_key)
        )
        for table in _TABLES_OF_ROWS
    )
)


def _rows_of_trials(table: Table, *columns: str) -> Select[Any]:
    """A statement that reads the rows of the trials `ids`, as they were written, the trial's id first."""
    (primary_key,) = table.primary_key
    return (
        select(table.c.trial_id, *(table.c[name] for name in columns))
        .where(table.c.trial_id.in_(bindparam("ids", expanding=True)))
        .order_by(primary_key)
    )


_VALUE_ROWS = _rows_of_trials(_VALUES, "objective", "value", "value_type")
_EPOCH_ROWS = _rows_of_trials(_EPOCHS, "step", "intermediate_value", "intermediate_value_type")
_PARAM_ROWS = _rows_of_trials(_PARAMS, "param_name", "param_value", "distribution_json")
_USER_ATTRIBUTE_ROWS = _rows_of_trials(_USER_ATTRIBUTES, "key", "value_json")
_SYSTEM_ATTRIBUTE_ROWS = _rows_of_trials(_SYSTEM_ATTRIBUTES, "key", "value_json")


def _groups(items: Sequence[_T]) -> Iterator[Sequence[_T]]:
    """The items, `_MAX_IDS` at once."""
    return (items[start : start + _MAX_IDS] for start in range(0, len(items), _MAX_IDS))


def _build(connection: Connection, trials: Sequence[Row[Any]]) -> list[FrozenTrial]:
    """The trials that have these rows in their table."""
    return [trial for group in _groups(trials) for trial in _build_group(connection, group)]


def _build_group(connection: Connection, trials: Sequence[Row[Any]]) -> list[FrozenTrial]:
    ids = [trial.trial_id for trial in trials]
    values, epochs, params, user_attributes, system_attributes = (
        _rows_by_trial(connection, statement, ids)
        for statement in (_VALUE_ROWS, _EPOCH_ROWS, _PARAM_ROWS, _USER_ATTRIBUTE_ROWS, _SYSTEM_ATTRIBUTE_ROWS)
    )
    return [
        FrozenTrial(
            number=trial.number,
            state=trial.state,
            value=None,
            values=_values(values[trial.trial_id]),
            datetime_start=_local(trial.datetime_start),
            datetime_complete=_local(trial.datetime_complete),
            params={name: _distribution(text).to_external_repr(value) for name, value, text in params[trial.trial_id]},
            distributions={name: _distribution(text) for name, _, text in params[trial.trial_id]},
            user_attrs={key: json.loads(value) for key, value in user_attributes[trial.trial_id]},
            system_attrs={key: json.loads(value) for key, value in system_attributes[trial.trial_id]},
            intermediate_values={
                step: TrialIntermediateValueModel.stored_repr_to_intermediate_value(value, kind)
                for step, value, kind in epochs[trial.trial_id]
            },
            trial_id=trial.trial_id,
        )
        for trial in trials
    ]


def _rows_by_trial(connection: Connection, statement: Select[Any], ids: list[int]) -> dict[int, list[tuple[Any, ...]]]:
    found: dict[int, list[tuple[Any, ...]]] = defaultdict(list)
    for id_of_trial, *row in connection.execute(statement, {"ids": ids}).all():
        found[id_of_trial].append(tuple(row))
    return found


def _values(rows: list[tuple[Any, ...]]) -> list[float] | None:
    by_objective = sorted(rows, key=itemgetter(0))
    return [TrialValueModel.stored_repr_to_value(value, kind) for _, value, kind in by_objective] or None


def _local(stored: datetime | None) -> datetime | None:
    """A time as Optuna shows it: of this machine's zone. It is stored in UTC; neither names its zone."""
    return stored and stored.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)


@lru_cache(maxsize=1024)
def _distribution(text: str) -> BaseDistribution:
    return json_to_distribution(text)
