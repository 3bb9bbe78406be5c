"""The documentation is true: every command is in it, every example runs, every link leads somewhere."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from helpers import warm
from helpers.homes import copy_home
from helpers.postgres import Postgres

from hpo.checks.checklist import Checklist
from hpo.cli import cli, main
from hpo.deploy.predict import Prediction
from hpo.deploy.results import Export, Registration
from hpo.records import Rerun, SearchOutcome, Training, TrialRecord, Winner
from hpo.search.storage import read_storage
from hpo.search.study import Study
from hpo.session import conclude, formats, search
from hpo.session.search import run_search

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^ *(?:pip install uv && )?(?:uv run )?hpo (?P<arguments>[^-\s].*?)(?:   .*)?$", re.MULTILINE)
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def fenced_code() -> list[tuple[str, str, str]]:
    return [(page.name, m["language"], m["code"]) for page in PAGES for m in FENCED.finditer(page.read_text())]


def documented_commands() -> list[str]:
    """Each command line that a page or a command's help shows on its own."""
    shown = [code for _, language, code in fenced_code() if not language]
    # The usage line is no example.
    shown += [help_of(name).partition("\n")[2] for name in cli.commands] + [CliRunner().invoke(cli, ["-h"]).output]
    lines = {match["arguments"] for text in shown for match in COMMAND.finditer(text)}
    return sorted(line for line in lines if line.split()[0] in cli.commands)


def help_of(name: str) -> str:
    return CliRunner().invoke(cli, [name, "-h"]).output


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_every_command_has_help_an_example_and_a_line_in_the_readme(name: str) -> None:
    command = cli.commands[name]
    assert command.help
    assert f"\nhpo {name}" in command.help.replace("\n    ", "\n"), "an example that can be typed"
    assert all(isinstance(p, click.Argument) or getattr(p, "help", None) for p in command.params)
    assert f"hpo {name}" in (ROOT / "README.md").read_text()


def test_help_names_every_strategy_and_pruner() -> None:
    from hpo.search.pruners import PRUNERS
    from hpo.search.strategies import STRATEGIES

    words = re.findall(r"\w+", help_of("search"))
    assert {*STRATEGIES, *PRUNERS} <= set(words)
    guide = (ROOT / "docs" / "searching.md").read_text()
    assert all(f"| `{name}` |" in guide for name in (*STRATEGIES, *PRUNERS))


def test_the_docs_name_every_setting_of_the_trainer() -> None:
    from hpo.config import config_fields
    from hpo.task import NOT_TUNABLE

    guide = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in config_fields() if name not in NOT_TUNABLE and f"`{name}`" not in guide] == []


def test_the_docs_show_the_table_of_optimizers_and_that_of_schedules() -> None:
    from hpo.methods import OPTIMIZERS, SCHEDULES

    guide = (ROOT / "docs" / "training.md").read_text()
    for title, methods in (("Optimizers", OPTIMIZERS), ("Schedules", SCHEDULES)):
        section = guide.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        shown = [f"| `{name}` | {method.does} | {method.suits} |" for name, method in methods.items()]
        assert sorted(rows) == sorted(shown)
        assert all(callable(method.load()) for method in methods.values())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def shortened(arguments: str) -> list[str]:
    """The command as it is shown, but with so few trials and epochs that a test can run it."""
    words = shlex.split(arguments)
    if words[0] == "search":
        words = shlex.split(re.sub(r"--trials \d+", "--trials 2", arguments))
        words += [] if "--epochs" in words else ["--epochs", "1"]
    if words[0] == "report":
        words += ["--out", str(Path(os.environ["HPO_HOME"]) / "report.html")]
    return [*words, "--plan", "1x1"] if words[0] == "confirm" else words


SERVERS = [line for line in documented_commands() if line.startswith(("ui", "serve"))]  # other tests start them
ON_REAL_DATA = [line for line in documented_commands() if line.startswith("search") and "cifar10" in line]
ON_SEVERAL_MACHINES = [line for line in documented_commands() if " --storage " in line]
RUNNABLE = [line for line in documented_commands() if line not in (*SERVERS, *ON_REAL_DATA, *ON_SEVERAL_MACHINES)]


@pytest.fixture(scope="session")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the digits were searched: one trial is complete."""
    home = tmp_path_factory.mktemp("searched")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conclude, "draw_figures", lambda *_: {})
        run_search("digits", trials=1, epochs=1, home=home)
    return home


@pytest.mark.parametrize("arguments", RUNNABLE)
def test_every_command_that_is_shown_runs(
    arguments: str, home: Path, searched: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(formats, "_TIME_S", 0.01)
    if arguments.startswith(("best", "show", "gc", "compare")) or "--warm-start" in arguments:
        copy_home(searched, home)
    if arguments.startswith(
        ("rerun", "confirm", "refit", "report", "export", "register", "predict")
    ):  # which read or write artifacts
        succeeds("search digits --trials 1 --epochs 1", monkeypatch)
    if arguments.startswith("compare"):
        succeeds("search digits --study digits-tpe --strategy tpe --trials 1 --epochs 1", monkeypatch)
    succeeds(arguments, monkeypatch)


def test_what_is_shown_for_several_machines_runs_in_the_order_of_the_work(
    home: Path, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home))
    address = {"--storage": postgres.new_database(), "--tracking-uri": postgres.new_database()}
    for line in sorted(ON_SEVERAL_MACHINES):  # submit, then worker
        for option, url in address.items():
            line = re.sub(rf"{option} \S+", lambda match, option=option, url=url: f"{option} {url}", line)  # type: ignore[misc]
        succeeds(line.replace("--trials 100", "--trials 2 --epochs 1"), monkeypatch)


@pytest.mark.real_data
@pytest.mark.parametrize("arguments", ON_REAL_DATA)
def test_every_search_that_is_shown_runs_on_the_real_data(
    arguments: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home))
    small = "-p width=32 -p blocks=1" if arguments.startswith("search cifar10 ") else ""
    succeeds(f"{arguments} {small} --limit 1500", monkeypatch)


def succeeds(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hpo", *shortened(arguments)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code in (0, None)


def test_the_commands_that_are_shown_were_found() -> None:
    assert {"search digits --trials 20", "best digits", "search examples/my_task.py --trials 10"} <= set(RUNNABLE)
    assert "search cifar10 --trials 100" in ON_REAL_DATA
    assert "ui digits" in SERVERS
    assert [line.split()[0] for line in ON_SEVERAL_MACHINES] == ["submit", "worker"]


def test_nothing_is_left_to_be_filled_in() -> None:
    for page in PAGES:
        assert not re.search(r"^[A-Z]{5,}$", page.read_text(), re.MULTILINE), page.name


def test_the_prediction_example_runs_after_the_search_of_the_readme(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home))
    succeeds("search digits --trials 20", monkeypatch)
    assert capfd.readouterr().err == ""
    finished = warm.run([sys.executable, "examples/predict.py"], cwd=ROOT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    assert re.fullmatch(r"predicted:( \d){8}\n", finished.stdout)


@pytest.mark.parametrize("page", ["README.md", "winner.md"])
def test_the_loading_example_runs(page: str, searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(searched))
    (code,) = [code for name, language, code in fenced_code() if name == page and language == "python"]
    names: dict[str, object] = {}
    exec(compile(code, page, "exec"), names)
    assert names["model"]


def test_the_python_of_the_task_guide_runs() -> None:
    for _, language, code in fenced_code():
        if language == "python" and "Space(" in code:
            exec(compile(code, "docs/tasks.md", "exec"), {})


def test_the_keys_that_json_prints_are_those_of_its_page(searched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands that only read are run here; what the others print are records, whose fields are compared."""
    monkeypatch.setattr(search, "submit_study", lambda **_: Study.load(read_storage(searched), "digits"))

    def printed(arguments: str) -> set[str]:
        command = [*arguments.split(), "--json", "--home", str(searched)]
        result = CliRunner().invoke(cli, command, catch_exceptions=False)
        found = json.loads(result.stdout)
        return set(found[0] if isinstance(found, list) else found)

    def fields(record: type, *more: str) -> set[str]:
        return {field.name for field in dataclasses.fields(record)} | set(more)

    metric = {"validation accuracy": "validation METRIC", "test accuracy": "test METRIC"}
    tasks = json.loads(CliRunner().invoke(cli, ["tasks", "--json"]).stdout)
    expected = {
        "hpo search": fields(SearchOutcome) - {"trials"},
        "hpo best": printed("best digits") | {"front"},
        "The winner": fields(Winner),
        "hpo show": printed("show digits"),
        "A trial": fields(TrialRecord),
        "hpo studies": printed("studies"),
        "hpo compare": {metric.get(key, key) for key in printed("compare digits digits")},
        "hpo tasks": set(tasks[0]),
        "hpo check": fields(Checklist),
        "hpo train": fields(Training),
        "hpo rerun": fields(Rerun, "is_equal", "is_within_spread"),
        "hpo export": fields(Export),
        "hpo register": fields(Registration, "uri"),
        "hpo predict": fields(Prediction),
        "hpo submit": printed("submit digits"),
        "hpo gc": printed("gc digits"),
    }
    documented, title = dict[str, set[str]](), ""
    for line in (ROOT / "docs" / "json.md").read_text().splitlines():
        if line.startswith("#"):
            title = line.strip("# `")
        elif line.startswith("| `"):  # a row of keys, and what they mean
            documented.setdefault(title, set()).update(re.findall(r"`([^`]+)`", line.split("|")[1]))
    assert documented == expected


def test_every_public_name_is_there_and_in_the_reference_which_is_built_without_a_warning(tmp_path: Path) -> None:
    import hpo

    assert set(hpo.__all__) <= set(dir(hpo))
    assert [name for name in hpo.__all__ if getattr(hpo, name, None) is None] == []
    reference = (ROOT / "docs" / "api.md").read_text()
    assert sorted(re.findall(r"^::: hpo\.(\w+)$", reference, re.MULTILINE)) == sorted(hpo.__all__[1:])
    build = ["mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "true"}
    built = subprocess.run([sys.executable, "-m", *build], cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api.html").read_text()
    assert [name for name in hpo.__all__[1:] if f'id="hpo.{name}"' not in page] == []
