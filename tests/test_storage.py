"""The study's database: sqlite, and a real PostgreSQL, which is really killed."""

from __future__ import annotations

import math
import re
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from helpers.databases import Process
from helpers.postgres import PASSWORD, Postgres
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from hpo.config import Direction
from hpo.database import without_password
from hpo.errors import StoreError
from hpo.parameters import Float, Int
from hpo.records import TrialState as StateName
from hpo.search import optuna_tables
from hpo.search.lease import Session, living_sessions
from hpo.search.optuna_tables import DirectStorage
from hpo.search.settings import StudySettings
from hpo.search.storage import OutageError, StudyStorage, open_storage, read_storage
from hpo.search.stored import OWNER
from hpo.search.study import Study, list_studies
from hpo.space import Group, Space

SECRETS = (PASSWORD, "s3cret")
SETTINGS = StudySettings(
    task="digits",
    space=Space(Group("step size", lr=Float(1e-4, 1.0, log=True, default=1e-2), depth=Int(2, 20, default=8))),
    seed=0,
    strategy="priority",
    pruner="none",
    max_epochs=5,
    metric="accuracy",
    direction=Direction.MAXIMIZE,
    limit=None,
    planned_trials=20,
)


@pytest.fixture
def storage(either_storage: StudyStorage) -> StudyStorage:
    return either_storage


# --- addresses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("sqlite:///optuna.db", "sqlite, whose locks and write-ahead log do not work between machines"),
        ("mysql://me:s3cret@host/db", "not PostgreSQL with psycopg"),
        ("postgresql+psycopg2://me:s3cret@host/db", "not PostgreSQL with psycopg"),
        ("studies.db", "not a database URL"),
        ("postgresql://me:s3cret@host:port/db", "not a database URL"),
    ],
)
def test_an_address_that_is_not_postgresql_is_refused_with_what_to_give(
    address: str, reason: str, tmp_path: Path
) -> None:
    for opened in (open_storage, read_storage):
        with pytest.raises(StoreError, match=rf"'.*' is {reason}.*postgresql\+psycopg://USER@") as refusal:
            opened(tmp_path / "home", address)
        assert_one_line_without_secrets(refusal.value)
    assert not (tmp_path / "home").exists()


def test_a_server_that_does_not_answer_a_wrong_password_and_an_unknown_database_are_distinguished(
    postgres: Postgres, tmp_path: Path
) -> None:
    refused = {
        postgres.url("nowhere"): 'refuses: .*database "nowhere" does not exist',
        postgres.url("postgres", password="wrong-s3cret"): 'refuses: .*password .*failed for user "hpo"; check',
        "postgresql://hpo:s3cret@127.0.0.1:1/db": "no PostgreSQL answers at .*127.0.0.1:1/db: .*refused.*start it",
        "postgresql://hpo:s3cret@nowhere.invalid/db": "no PostgreSQL answers at .*nowhere.invalid.*check the host",
    }
    for address, told in refused.items():
        with pytest.raises(StoreError, match=told) as refusal:
            open_storage(tmp_path, address)
        assert_one_line_without_secrets(refusal.value)


def test_a_driver_that_is_missing_is_named_with_the_command_that_helps(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)

    with pytest.raises(StoreError, match=re.escape("run `pip install 'hpo-torch[postgres]'`")):
        open_storage(tmp_path, url)


def test_the_driver_need_not_be_named_and_any_password_goes_through(url: str, tmp_path: Path) -> None:
    assert open_storage(tmp_path, url.replace("+psycopg", "")).get_all_studies() == []


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://me:s3cret@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg://me:s3@c/ret@host:5432/db?a=b", "postgresql+psycopg://me:***@host:5432/db?a=b"),
        ("postgresql://:s3cret@host", "postgresql://:***@host"),
        ("postgresql://host/db?user=me&password=s3cret&b=c", "postgresql://host/db?user=me&password=***&b=c"),
        ("postgresql://host/db?sslpassword=s3cret", "postgresql://host/db?sslpassword=***"),
        ("https://me:s3cret@host:5000/path", "https://me:***@host:5000/path"),
        ("postgresql://me@host:5432/db", "postgresql://me@host:5432/db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("sqlite:////a/b@c.db", "sqlite:////a/b@c.db"),
    ],
)
def test_a_password_is_not_shown(address: str, shown: str) -> None:
    assert without_password(address) == shown


def assert_one_line_without_secrets(error: Exception) -> None:
    assert "\n" not in str(error)
    assert not any(secret in str(error) for secret in SECRETS)


# --- tables -----------------------------------------------------------------------------------------------------------


def test_reading_an_empty_database_writes_nothing(url: str, tmp_path: Path, postgres: Postgres) -> None:
    assert list_studies(read_storage(tmp_path, url)) == []
    with postgres.connect(url.rpartition("/")[2]) as connection:
        assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


def test_a_home_of_an_earlier_version_has_no_sessions_and_gets_them(tmp_path: Path) -> None:
    optunas = closed_at_the_end(RDBStorage(f"sqlite:///{tmp_path}/optuna.db"))
    optunas.create_new_study([StudyDirection.MINIMIZE], "study")
    storage = open_storage(tmp_path)

    assert living_sessions(storage, "study") == []
    with Session(storage, "study") as session:
        assert [found.id for found in living_sessions(storage, "study")] == [session.id]
    assert [study.study_name for study in optunas.get_all_studies()] == ["study"]


def test_what_is_written_is_what_optuna_reads_and_the_other_way_round(
    storage: StudyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_tables, "_MAX_IDS", 2)
    optunas = plain(storage)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    fill(storage, study_id)
    fill(optunas, study_id)
    fresh = StudyStorage(storage._direct)

    trials = fresh.get_all_trials(study_id)

    assert len(trials) == 10
    assert repr(trials) == repr(optunas._backend.get_all_trials(study_id))  # repr, for NaN is not equal to itself
    for trial in trials:
        assert repr(fresh._direct.get_trial(trial._trial_id)) == repr(trial)
        assert fresh.get_trial_system_attrs(trial._trial_id) == trial.system_attrs
        assert fresh.get_trial_user_attrs(trial._trial_id) == trial.user_attrs
    # What was read before, and has changed since, is read again.
    running = trials[1]._trial_id
    optunas.set_trial_intermediate_value(running, 9, 0.9)
    assert fresh.get_all_trials(study_id)[1].intermediate_values[9] == 0.9


@pytest.mark.parametrize("writes_itself", [False, True])
def test_of_many_running_trials_those_that_have_changed_are_read_again_and_no_other(
    storage: StudyStorage, writes_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_tables, "_MANY", 2)
    monkeypatch.setattr(optuna_tables, "_MAX_IDS", 3)
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    for _ in range(8):
        storage.set_trial_user_attr(storage.create_new_trial(study_id), OWNER, "Anna")
    others = plain(storage)
    writer: Any = storage if writes_itself else others
    waiting, reporting, ending, owned = (trial._trial_id for trial in storage.get_all_trials(study_id)[1:5])
    before = storage.get_all_trials(study_id, deepcopy=False)

    for change in (
        lambda: writer.set_trial_intermediate_value(reporting, 1, 0.5),
        lambda: writer.set_trial_system_attr(reporting, "completed_rung_0", 0.5),
        lambda: writer.set_trial_param(reporting, "lr", 0.125, FloatDistribution(1e-4, 1.0, log=True)),
        lambda: writer.set_trial_user_attr(reporting, "reason", "new"),
        lambda: writer.set_trial_user_attr(owned, OWNER, "Bert"),
        lambda: writer.set_trial_state_values(waiting, TrialState.WAITING),
        lambda: writer.set_trial_state_values(ending, TrialState.COMPLETE, [1.0]),
        lambda: writer.set_trial_state_values(waiting, TrialState.RUNNING),
        lambda: writer.create_new_trial(study_id),
    ):
        change()
        assert repr(storage.get_all_trials(study_id)) == repr(others.get_all_trials(study_id))
    unchanged = [trial for trial in storage.get_all_trials(study_id, deepcopy=False) if trial in before]
    assert [trial.number for trial in unchanged if trial is before[trial.number]] == [0, 5, 6, 7]

    # Replaced in place by another process: seen after a while, and at once what this one has replaced.
    writer.set_trial_user_attr(reporting, "reason", "replaced")
    assert storage.get_all_trials(study_id)[2].user_attrs["reason"] == ("replaced" if writes_itself else "new")
    monkeypatch.setattr(storage._direct._unfinished, "_expires", 0.0)
    assert repr(storage.get_all_trials(study_id)) == repr(others.get_all_trials(study_id))


def plain(storage: StudyStorage) -> Any:
    """Optuna's own storage over the same tables."""
    url = storage.engine.url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")
    creator = {"creator": storage._direct.engine_kwargs["creator"]} if storage.engine.name == "sqlite" else {}
    return optuna.storages.get_storage(closed_at_the_end(RDBStorage(url, creator)))


def closed_at_the_end(storage: RDBStorage) -> RDBStorage:
    """Optuna leaves connections open when nobody uses a storage any more, of which Python 3.13 warns."""
    weakref.finalize(storage, storage.engine.dispose)
    return storage


def fill(storage: Any, study_id: int) -> None:
    """Five trials, in every state, with every kind of value."""
    ends = (TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED, TrialState.WAITING, TrialState.FAIL)
    for end in ends:
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "lr", 0.125, FloatDistribution(1e-4, 1.0, log=True))
        storage.set_trial_param(trial_id, "optimizer", 1, CategoricalDistribution(("sgd", "adam")))
        for epoch, value in enumerate((0.25, math.inf, -math.inf, math.nan, 1e-300), start=1):
            storage.set_trial_intermediate_value(trial_id, epoch, value)
        storage.set_trial_intermediate_value(trial_id, 1, 0.5)
        storage.set_trial_user_attr(trial_id, "reason", "first")
        storage.set_trial_user_attr(trial_id, "reason", {"ä": [None, "\n"]})
        storage.set_trial_system_attr(trial_id, "completed_rung_0", 0.5)
        if end != TrialState.RUNNING:
            storage.set_trial_state_values(trial_id, end, [math.inf] if end == TrialState.COMPLETE else None)


def test_a_trial_that_has_ended_or_is_not_there_is_refused_as_optuna_does(storage: StudyStorage) -> None:
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "study")
    fill(storage, study_id)
    ended, unknown = storage.get_all_trials(study_id)[0]._trial_id, 999
    for trial_id, refusal in ((ended, UpdateFinishedTrialError), (unknown, KeyError)):
        with pytest.raises(refusal):
            storage.set_trial_intermediate_value(trial_id, 1, 0.0)
        with pytest.raises(refusal):
            storage.set_trial_user_attr(trial_id, "key", 1)
        with pytest.raises(refusal):
            storage.set_trial_system_attr(trial_id, "key", 1)
        with pytest.raises(refusal):
            storage.set_trial_state_values(trial_id, TrialState.FAIL)
    with pytest.raises(UpdateFinishedTrialError):
        storage.set_trial_param(ended, "lr", 0.5, FloatDistribution(1e-4, 1.0, log=True))
    for read in (storage.get_trial, storage.get_trial_user_attrs, storage.get_trial_system_attrs):
        with pytest.raises(KeyError):
            read(unknown)
    with pytest.raises(KeyError):
        storage.get_all_trials(999)


# --- outages ----------------------------------------------------------------------------------------------------------

COORDINATE = """
import time
from functools import partial
from hpo.search.study import Study
study = Study.load(storage, "study")
with Session(storage, "study") as session:
    def ask():
        study.requeue([number for number, owner in study.owners().items() if owner in ("", session.id)])
        return study.ask(session.id) if study.remaining(40) else None
    def tell(number):
        if study.owners().get(number) == session.id:
            study.tell(number, "complete", value=1.0, best_epoch=5)
    while (trial := session.exclusively(ask)) is not None:
        print(trial.number, flush=True)
        for epoch in range(1, 6):
            time.sleep(0.05)
            study.report(trial.number, epoch, 1 / epoch)
        session.exclusively(partial(tell, trial.number))
"""


def test_a_study_outlives_outages_of_its_database_and_ends_with_exactly_its_trials(
    start: Callable[..., Process], shared: StudyStorage, postgres: Postgres
) -> None:
    Study.open(shared, "study", SETTINGS)
    coordinators = [start(COORDINATE), start(COORDINATE)]
    for coordinator in coordinators:
        assert coordinator.answer().isdigit()
    for _ in range(2):
        with postgres.outage():
            time.sleep(1)
        assert coordinators[0].answer().isdigit()

    warnings = [coordinator.finish() for coordinator in coordinators]

    study = Study.load(shared, "study")
    assert study.counts() == dict.fromkeys(get_args(StateName), 0) | {"complete": 40}
    assert [sorted(trial.curve) for trial in study.trials()] == [[1, 2, 3, 4, 5]] * 40
    assert all("the study's database does not answer" in told for told in warnings)


def test_after_its_patience_the_storage_says_that_the_same_command_continues(
    shared: StudyStorage, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    shared.patience_s = 0.5
    with postgres.outage(), pytest.raises(OutageError, match=r"does not answer .*run the same command again") as end:
        shared.get_all_studies()

    assert_one_line_without_secrets(end.value)
    shared.get_all_studies()
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "the study's database does not answer",
        "the study's database answers again",
    ]


@pytest.fixture
def lose_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the next call of one of the database's methods be carried out, and its answer be lost."""

    def lose(method: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        original = getattr(DirectStorage, method)

        def lost(*args: Any, **named: Any) -> None:
            monkeypatch.setattr(DirectStorage, method, original)
            original(*args, **named)
            meanwhile()
            raise OperationalError("COMMIT", None, Exception("the connection was closed"))

        monkeypatch.setattr(DirectStorage, method, lost)

    return lose


@pytest.mark.parametrize(
    ("end", "values"), [(TrialState.COMPLETE, [0.5]), (TrialState.PRUNED, None), (TrialState.WAITING, None)]
)
def test_an_end_whose_answer_is_lost_is_written_once(
    end: TrialState, values: list[float] | None, shared: StudyStorage, lose_answer: Callable[..., None]
) -> None:
    trial_id = shared.create_new_trial(shared.create_new_study([StudyDirection.MINIMIZE], "study"))
    lose_answer("set_trial_state_values")

    assert shared.set_trial_state_values(trial_id, end, values)

    trial = shared.get_trial(trial_id)
    assert (trial.state, trial.values) == (end, values)


def test_a_trial_that_was_taken_from_the_queue_while_the_answer_was_lost_stays_with_who_took_it(
    shared: StudyStorage, lose_answer: Callable[..., None]
) -> None:
    trial_id = shared.create_new_trial(shared.create_new_study([StudyDirection.MINIMIZE], "study"))
    another = plain(shared)
    lose_answer("set_trial_state_values", lambda: another.set_trial_state_values(trial_id, TrialState.RUNNING))

    assert shared.set_trial_state_values(trial_id, TrialState.WAITING)

    assert shared.get_trial(trial_id).state == TrialState.RUNNING


def test_a_parameter_a_report_and_an_attribute_whose_answers_are_lost_are_written_once(
    shared: StudyStorage, lose_answer: Callable[..., None]
) -> None:
    trial_id = shared.create_new_trial(shared.create_new_study([StudyDirection.MINIMIZE], "study"))
    lose_answer("_set_trial_param")
    shared.set_trial_param(trial_id, "lr", 0.5, FloatDistribution(1e-4, 1.0, log=True))
    lose_answer("set_trial_intermediate_value")
    shared.set_trial_intermediate_value(trial_id, 1, 0.25)
    lose_answer("set_trial_user_attr")
    shared.set_trial_user_attr(trial_id, "reason", "none")

    trial = shared.get_trial(trial_id)
    assert (trial.params, trial.intermediate_values, trial.user_attrs) == ({"lr": 0.5}, {1: 0.25}, {"reason": "none"})


def test_a_statement_that_is_wrong_is_no_outage(storage: StudyStorage) -> None:
    storage.create_new_study([StudyDirection.MINIMIZE], "study")
    with storage.engine.begin() as connection:
        connection.execute(text("ALTER TABLE studies RENAME TO lost"))

    with pytest.raises(StorageInternalError):
        storage.get_all_studies()
