"""The documentation is true: every command is in it, every example runs, every link leads somewhere."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from hpo.cli import cli, main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"^(?:uv run )?hpo (?P<arguments>.+)$", re.MULTILINE)
FENCED = re.compile(r"^```(?P<language>\w*)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)


def fenced_code() -> list[tuple[str, str, str]]:
    return [(page.name, m["language"], m["code"]) for page in PAGES for m in FENCED.finditer(page.read_text())]


def documented_commands() -> list[str]:
    """Each command line that a page shows on its own, but for the README's two set-up lines, which CI runs."""
    lines = [m["arguments"] for _, language, code in fenced_code() if not language for m in COMMAND.finditer(code)]
    return sorted(set(lines))


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
    from hpo.search.samplers import STRATEGIES

    words = re.findall(r"\w+", help_of("search"))
    assert {*STRATEGIES, *PRUNERS} <= set(words)
    guide = (ROOT / "docs" / "searching.md").read_text()
    assert all(f"| `{name}` |" in guide for name in (*STRATEGIES, *PRUNERS))


def test_the_docs_name_every_setting_of_the_trainer() -> None:
    from hpo.plugins import NOT_TUNABLE, config_fields

    guide = (ROOT / "docs" / "tasks.md").read_text()
    assert [name for name in config_fields() if name not in NOT_TUNABLE and f"`{name}`" not in guide] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_to_a_file(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def shortened(arguments: str) -> list[str]:
    """The command as it is shown, but with so few trials and epochs that a test can run it."""
    words = shlex.split(arguments)
    if words[0] == "search":
        words = [*re.sub(r"--trials \d+", "--trials 2", arguments).split(), "--epochs", "1"]
    return words


RUNNABLE = [line for line in documented_commands() if "cifar10" not in line or line.startswith("space")]


@pytest.mark.parametrize("arguments", RUNNABLE)
def test_every_command_in_the_docs_runs(
    arguments: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HPO_HOME", str(home))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["hpo", *shortened(arguments)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code in (0, None), capsys.readouterr().err


@pytest.mark.real_data
@pytest.mark.parametrize("arguments", sorted(set(documented_commands()) - set(RUNNABLE)))
def test_every_command_in_the_docs_runs_on_the_real_data(
    arguments: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    test_every_command_in_the_docs_runs(f"{arguments} --limit 1500", home, monkeypatch, capsys)


def test_the_commands_of_the_docs_were_found() -> None:
    assert {"search digits --trials 20", "search cifar10 --trials 100"} & {*documented_commands(), *help_examples()}
    assert len(RUNNABLE) >= 2


def help_examples() -> set[str]:
    return {m["arguments"] for name in cli.commands for m in re.finditer(COMMAND, re.sub(r"^ +", "", help_of(name)))}


def test_the_prediction_example_runs_after_the_search_of_the_readme(home: Path) -> None:
    environment = {**os.environ, "HPO_HOME": str(home)}
    for command in (["-m", "hpo", "search", "digits", "--trials", "2", "--epochs", "2"], ["examples/predict.py"]):
        finished = subprocess.run(
            [sys.executable, "-W", "error::UserWarning:hpo", *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert finished.returncode == 0, finished.stderr
        assert finished.stderr == ""
    assert re.fullmatch(r"predicted:( \d){8}\n", finished.stdout)


def test_the_readme_python_example_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hpo.pipeline import run_search

    monkeypatch.setenv("HPO_HOME", str(home))
    run_search("digits", trials=1, epochs=1)
    (code,) = [code for page, language, code in fenced_code() if page == "README.md" and language == "python"]
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["model"]


def test_the_python_of_the_task_guide_runs() -> None:
    for _, language, code in fenced_code():
        if language == "python" and "Space(" in code:
            exec(compile(code, "docs/tasks.md", "exec"), {})
