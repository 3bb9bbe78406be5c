"""The settings that a study keeps, and how two that differ are told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.studies import SETTINGS, SPACE, spaces
from hypothesis import given, settings
from optuna.storages import BaseStorage

from hpo.config import Direction
from hpo.errors import StoreError, StudyMismatchError, UnknownNameError
from hpo.parameters import Float
from hpo.search.settings import FORMAT, StudySettings
from hpo.search.storage import open_storage
from hpo.search.study import Study, list_studies, read_settings
from hpo.space import Group, Space

# --- settings ---------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> StudySettings:
    return replace(SETTINGS, **changes)


def with_group(**parameters: Any) -> StudySettings:
    """The settings with some parameters of 'step size' declared otherwise; None drops one."""
    first = SPACE.groups[0].parameters | parameters
    return changed(
        space=Space(Group("step size", **{n: p for n, p in first.items() if p is not None}), *SPACE.groups[1:])
    )


@pytest.mark.parametrize(
    ("asked", "difference"),
    [
        (changed(seed=1), "--seed 0, not 1"),
        (changed(task="cifar10"), "task digits, not cifar10"),
        (changed(strategy="tpe"), "--strategy priority, not tpe"),
        (changed(pruner="sha"), "--pruner none, not sha"),
        (changed(max_epochs=30), "--epochs 3, not 30"),
        (changed(metric="loss", direction=Direction.MINIMIZE), "--metric accuracy, not loss"),
        (changed(limit=500), "no --limit, not 500"),
        (changed(space=SPACE.narrow(["lr=1e-3:0.1"])), "lr (in 'step size') 0.0001:1 (log), not 0.001:0.1 (log)"),
        (changed(space=SPACE.narrow(["optimizer=sgd"]), seed=2), "--seed 0, not 2; optimizer (in 'archi"),
        (with_group(lr=Float(1e-4, 1.0, log=True, default=0.1)), "lr (in 'step size') default 0.01, not 0.1"),
        (with_group(batch_size=None), "batch_size (in 'step size'), which is gone"),
        (with_group(clip=Float(0.0, 1.0, default=0.0)), "no clip (in 'step size')"),
        (
            changed(space=Space(*reversed(SPACE.groups))),
            "the groups step size, architecture and optimizer, regularization, not regularization, architecture",
        ),
    ],
)
def test_a_study_made_with_other_settings_is_refused_and_every_difference_named(
    asked: StudySettings, difference: str, storage: BaseStorage
) -> None:
    Study.open(storage, "made", SETTINGS)
    before = written(storage)

    with pytest.raises(StudyMismatchError) as refusal:
        Study.open(storage, "made", asked)

    assert str(refusal.value).startswith(f"study 'made' was made with {difference}")
    assert str(refusal.value).endswith(". Use the same settings, or another name with --study.")
    assert written(storage) == before


def written(storage: BaseStorage) -> list[str]:
    with storage.engine.connect() as connection:  # type: ignore[attr-defined]
        return list(connection.connection.driver_connection.iterdump())


def test_a_limit_that_is_dropped_or_a_seed_of_0_is_named_too(storage: BaseStorage, study_name: str) -> None:
    Study.open(storage, study_name, replace(SETTINGS, limit=500, seed=1))

    with pytest.raises(StudyMismatchError, match="--seed 1, not 0; --limit 500, not none"):
        Study.open(storage, study_name, SETTINGS)


def test_other_overrides_that_leave_the_same_space_and_conditions_written_otherwise_are_no_difference(
    storage: BaseStorage, study_name: str
) -> None:
    made = replace(SETTINGS, space=SPACE.narrow(["lr=0.1:1"]), overrides=("lr=0.1:1",))
    Study.open(storage, study_name, made)

    Study.open(storage, study_name, replace(made, overrides=("lr=1e-1:1.0",)))
    study = Study.open(storage, study_name, replace(made, space=Space(*made.space.groups)))

    assert study.settings.overrides == ("lr=0.1:1",)


@pytest.mark.parametrize("wrong", [{"strategy": "best"}, {"pruner": "best"}])
def test_an_unknown_name_is_refused_before_the_study_is_made(
    wrong: dict[str, Any], storage: BaseStorage, study_name: str
) -> None:
    with pytest.raises(UnknownNameError):
        Study.open(storage, study_name, replace(SETTINGS, **wrong))

    assert read_settings(storage, study_name) is None


@settings(max_examples=30)
@given(space=spaces)
def test_settings_are_read_back_as_they_were_written(space: Space) -> None:
    made = replace(SETTINGS, space=space, overrides=("lr=1",), limit=7)

    again = StudySettings.from_dict(json.loads(json.dumps(made.to_dict())))

    assert again.to_dict() == made.to_dict()
    assert replace(again, space=space) == made
    assert again.space.parameters == space.parameters


def test_conditions_are_read_back(storage: BaseStorage, study_name: str) -> None:
    Study.open(storage, study_name, SETTINGS)

    space = Study.load(storage, study_name).settings.space

    assert space.to_dict() == SPACE.to_dict()
    assert "momentum" not in space.active(SPACE.defaults() | {"optimizer": "adam"})


def test_an_unknown_study_is_refused_with_the_near_miss(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    Study.open(storage, "digits", SETTINGS)

    with pytest.raises(UnknownNameError, match=r"no study 'digit'; did you mean 'digits'\? Available: digits\."):
        Study.load(storage, "digit")


def test_studies_that_hpo_did_not_make_are_left_alone(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    optuna.create_study(study_name="foreign", storage=storage).add_trial(optuna.trial.create_trial(value=1.0))
    Study.open(storage, "ours", SETTINGS)

    assert [study.name for study in list_studies(storage)] == ["ours"]
    with pytest.raises(StoreError, match="study 'foreign' was not made by hpo"):
        Study.open(storage, "foreign", SETTINGS)


def test_a_study_whose_making_was_cut_off_is_made_by_the_next_command(storage: BaseStorage, study_name: str) -> None:
    optuna.create_study(study_name=study_name, storage=storage, direction=SETTINGS.direction)  # type: ignore[arg-type]

    Study.open(storage, study_name, SETTINGS)

    assert Study.load(storage, study_name).settings.task == "digits"


def test_a_study_of_a_newer_hpo_is_refused(storage: BaseStorage, study_name: str) -> None:
    study = optuna.create_study(study_name=study_name, storage=storage)
    study.set_user_attr("hpo:settings", {"format": FORMAT + 1})

    with pytest.raises(StoreError, match="newer version of hpo; upgrade"):
        Study.load(storage, study_name)


def test_facts_about_a_study_are_kept(storage: BaseStorage, study_name: str) -> None:
    Study.open(storage, study_name, SETTINGS).record("winner", {"trial": 3, "scores": [0.5, None]})

    study = Study.load(storage, study_name)

    assert study.recorded("winner") == {"trial": 3, "scores": [0.5, None]}
    assert study.recorded("settings") is None
