"""The options of a search: declared once, taken by every command, kept by the study, and open to what others add."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from hpo.cli import cli
from hpo.errors import SpaceError, StudyMismatchError, UnknownNameError, UsageError
from hpo.plugins import load_task
from hpo.search.settings import StudySettings
from hpo.session.options import (
    SECTIONS,
    SearchOptions,
    StudyOptions,
    SubmitOptions,
    WorkerOptions,
    checked,
    declarations,
    kept_by_the_study,
)
from hpo.session.request import agree, this_machine
from hpo.session.search import run_search, submit_study


@pytest.mark.parametrize(
    ("command", "options"), [("search", SearchOptions), ("submit", SubmitOptions), ("worker", WorkerOptions)]
)
def test_a_command_has_the_options_that_are_declared_and_no_others(command: str, options: type) -> None:
    shown = {
        parameter.name: parameter for parameter in cli.commands[command].params if isinstance(parameter, click.Option)
    }

    assert set(shown) - {"as_json", "help"} == {declared.name for declared in declarations(options)}
    for declared in declarations(options):
        assert shown[declared.name].opts == [declared.option.flag]
        assert bool(shown[declared.name].secondary_opts) == (declared.type == bool | None)
        assert shown[declared.name].help == declared.option.help


def test_the_help_has_a_title_for_the_options_of_each_kind() -> None:
    lines = CliRunner().invoke(cli, ["search", "--help"]).stdout.splitlines()
    titles, sections = ["Usage", *SECTIONS, "Other options"], dict[str, list[str]]()
    for line in lines:
        if (title := line.partition(":")[0]) in titles:
            sections[title] = []
        elif found := re.match(r"  (-[-\w]+)", line):
            sections[list(sections)[-1]].append(found[1])

    assert list(sections) == titles
    assert sections["How much is tried"][:2] == ["--trials", "--epochs"]
    assert sections["Other options"] == ["--rehearse", "--json", "-h"]
    assert sum(map(len, sections.values())) == len(cli.commands["search"].params)  # --help, and not TASK


def test_every_field_that_an_option_is_kept_in_is_one_of_the_study() -> None:
    kept = {declared.option.kept for declared in declarations(StudyOptions)} - {None}

    assert kept < set(StudySettings.__dataclass_fields__)


def test_what_is_left_out_is_the_default_or_the_studys() -> None:
    options = checked({"trials": None, "keep": None})

    assert (options["keep"], options["device"], options["join"]) == (5, "auto", False)
    assert kept_by_the_study({"trials": None, "overrides": (), "epochs": 3}) == {"max_epochs": 3}


def test_one_text_in_place_of_several_is_not_taken_apart() -> None:
    options = checked({"overrides": "lr=0.1", "data_options": "label=y", "tries": ["lr=1"]})

    assert (options["overrides"], options["data_options"], options["tries"]) == (("lr=0.1",), ("label=y",), ["lr=1"])


@pytest.mark.parametrize(
    "given", [{"budget": 0}, {"budget": "8h"}, {"trial_timeout": float("nan")}, {"timeout": "none"}]
)
def test_a_time_that_is_not_above_zero_is_refused(given: dict[str, Any]) -> None:
    (value,) = given.values()
    with pytest.raises(UsageError, match=f"{value} is not allowed: it must be seconds above 0"):
        checked(given)


def test_a_keyword_that_is_no_option_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="no option 'trails'; did you mean 'trials'"):
        run_search("digits", trails=3)  # type: ignore[call-arg]


# --- --set ------------------------------------------------------------------------------------------------------------


def test_a_setting_that_the_space_does_not_search_is_fixed() -> None:
    task = load_task("digits").fix(["patience=20", "nesterov=false", "schedule=constant"])

    config = task.train_config(task.space.defaults())
    assert (config.patience, config.nesterov, config.schedule) == (20, False, "constant")
    assert task.space.parameters.keys() == load_task("digits").space.parameters.keys()


def test_a_setting_that_is_searched_may_be_fixed_at_a_value_that_the_space_lacks() -> None:
    searched = load_task("digits")
    task = searched.fix(["optimizer=lamb"])

    assert "optimizer" in searched.space.parameters
    assert task.space.defaults()["optimizer"] == "lamb"
    assert "momentum" not in task.space.parameters  # it is searched with sgd alone
    assert task.train_config(task.space.defaults()).optimizer == "lamb"


@pytest.mark.parametrize(
    ("assignment", "error", "message"),
    [
        ("patience=many", UsageError, "--set patience=many is not allowed: patience must be a whole number"),
        ("lr=fast", UsageError, "lr must be a number"),
        ("nesterov=1", UsageError, "nesterov must be true or false"),
        ("patience=0", UsageError, "at least 1"),
        ("optimizer=sdg", UnknownNameError, "did you mean 'sgd'"),
        ("patiense=3", UnknownNameError, "did you mean 'patience'"),
        ("max_epochs=3", UsageError, "has a command-line option of its own"),
        ("patience", SpaceError, "--set 'patience' is not NAME=VALUE"),
    ],
)
def test_what_cannot_be_fixed_is_reported(assignment: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_task("digits").fix([assignment])


def test_a_check_takes_the_settings_that_a_search_would(home: Path) -> None:
    shown = CliRunner().invoke(cli, ["check", "digits", "--set", "batch_size=5000", "--home", str(home)])
    assert "batch_size 5000 is larger than the" in str(shown.exception)


def test_what_was_fixed_is_kept_by_the_study_and_shown(home: Path) -> None:
    options: Any = {"home": home, "trials": 1, "epochs": 1, "workers": 1, "device": "cpu", "limit": 400}
    run_search("digits", **options, fixed=["patience=20", "optimizer=lamb"])

    machine = this_machine(checked({"home": home}))
    task, _, settings = agree(machine, "digits", {})
    assert settings.fixed == ("patience=20", "optimizer=lamb")
    assert task.train_config(task.space.defaults()).patience == 20
    assert (
        "Fixed with --set: patience=20, optimizer=lamb"
        in CliRunner().invoke(cli, ["show", "digits", "--home", str(home)]).output
    )
    with pytest.raises(StudyMismatchError, match="--set patience=20 optimizer=lamb, not patience=5"):
        run_search("digits", **options, fixed=["patience=5"])


# --- what others add --------------------------------------------------------------------------------------------------

STRANGERS = """
from optuna.pruners import MedianPruner
from optuna.samplers import RandomSampler
from hpo.execution.local import local_workers

seeds = []

def sampler(seed):
    seeds.append(seed)
    return RandomSampler(seed=seed)

def pruner(max_epochs):
    return MedianPruner(n_warmup_steps=max_epochs)

def nothing():
    return 3

def executor(setup, resources):
    print("a stranger's workers")
    return local_workers(setup, num_workers=resources.num_workers, device=resources.device)
"""


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed beside hpo, with an entry point for each door."""
    site = tmp_path / "site"
    info = site / "strangers-1.dist-info"
    info.mkdir(parents=True)
    (site / "strangers.py").write_text(STRANGERS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: strangers\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[hpo.strategies]\ntheirs = strangers:sampler\n"
        "[hpo.pruners]\ntheirs = strangers:pruner\n"
        "[hpo.executors]\ntheirs = strangers:executor\n"
    )
    monkeypatch.syspath_prepend(str(site))


def values(home: Path, study: str) -> list[dict[str, Any]]:
    shown = CliRunner().invoke(cli, ["show", study, "--home", str(home), "--json"])
    return [trial["values"] for trial in json.loads(shown.output)["trials"]]


@pytest.mark.usefixtures("strangers")
def test_a_strategy_a_pruner_and_an_executor_of_others_run_a_search(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By name or as module:factory; a search that was stopped draws what one in a single piece would have drawn."""
    options: Any = {
        "home": home, "epochs": 1, "workers": 1, "device": "cpu", "limit": 400, "pruner": "theirs",
        "executor": "theirs",
    }  # fmt: skip
    run_search("digits", study="one", trials=4, strategy="theirs", **options)
    run_search("digits", study="two", trials=2, strategy="strangers:sampler", **options)
    outcome = run_search("digits", study="two", trials=4, **options)

    assert outcome.counts["complete"] == 4
    assert "a stranger's workers" in capsys.readouterr().out
    assert values(home, "one") == values(home, "two")
    assert values(home, "one")[0] == load_task("digits").space.defaults()
    assert len({json.dumps(drawn) for drawn in values(home, "one")}) == 4


@pytest.mark.usefixtures("strangers")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "thiers"}, "no strategy 'thiers'; did you mean 'theirs'"),
        ({"strategy": "strangers:missing"}, "strangers:missing is not a factory"),
        ({"strategy": "strangers:nothing"}, "made a int, not an Optuna sampler"),
        ({"strategy": "not_there:sampler"}, "not_there cannot be imported"),
        ({"pruner": "strangers:nothing"}, "made a int, not an Optuna pruner"),
        ({"executor": "thiers"}, "no executor 'thiers'"),
    ],
)
def test_what_others_made_wrong_is_reported_before_anything_is_written(
    options: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        run_search("digits", home=tmp_path / "home", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "home").exists()


@pytest.mark.usefixtures("strangers")
def test_looking_at_a_study_imports_none_of_the_code_that_others_added(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_search(
        "digits", home=home, trials=1, epochs=1, workers=1, device="cpu", limit=400, strategy="strangers:sampler"
    )
    monkeypatch.setattr("hpo.search.study._sampler", lambda settings: pytest.fail("the sampler was made"))

    assert len(values(home, "digits")) == 1


def test_a_study_is_not_submitted_with_options_of_the_machines_that_train(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"submit_study takes no 'workers', .*: give it to join_search, or to `hpo"):
        submit_study("digits", home=tmp_path, workers=2)  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []
