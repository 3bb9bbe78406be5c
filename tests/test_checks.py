"""The checks that every change must pass, and what the distributions hold."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from helpers import warm

ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    finished = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=600
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.parametrize(
    "command",
    [
        ("ruff", "check", "."),
        ("ruff", "format", "--check", "."),
        ("mypy",),
        ("importlinter.cli", "lint", "--no-cache"),
    ],
    ids=lambda command: command[0],
)
def test_the_code_passes(command: tuple[str, ...]) -> None:
    run("-m", *command)


@pytest.mark.parametrize(
    "benchmark", ["chaos", "fuzz", "search_quality", "serving", "soups", "storage", "warm_start", "workers"]
)
def test_a_benchmark_finds_all_that_it_imports(benchmark: str) -> None:
    shown = warm.run([sys.executable, f"benchmarks/{benchmark}.py", "--help"], cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "usage" in shown.stdout


def test_the_benchmark_of_scale_runs_a_small_study() -> None:
    small = ["benchmarks/scale.py", "--trials", "8", "--workers", "2", "--strategy", "random"]
    shown = warm.run([sys.executable, *small], cwd=ROOT)
    assert shown.returncode == 0, shown.stderr
    assert "optuna.db: " in shown.stdout


def test_the_distributions_hold_what_they_should_and_nothing_else(tmp_path: Path) -> None:
    run("-m", "hatchling", "build", "-d", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert {name for name in top if not name.endswith(".dist-info")} == {"hpo"}
    assert {"hpo/py.typed", "hpo/cli.py", "hpo/objectives/digits.py", "hpo/search_spaces/digits.py"} <= names
    pages = {"hpo/report/page.css", "hpo/report/page.js"}
    assert pages <= set(names)
    assert all(name.endswith((".py", "py.typed")) or name in pages or ".dist-info/" in name for name in names)

    installed = tmp_path / "installed"
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r})\n"
        "from hpo.plugins import OBJECTIVES, load_task, registered\n"
        "for name in registered(OBJECTIVES): load_task(name)\n"
        "assert not {'objectives', 'search_spaces'} & set(sys.modules)\n"
        "from hpo import objectives, search_spaces\n"
        "print(objectives.digits.__file__, search_spaces.digits.__file__)"
    )
    modules = run("-c", code).split()
    assert modules == [str(installed / "hpo" / room / "digits.py") for room in ("objectives", "search_spaces")]

    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        entries = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/test_checks.py"} <= entries
    allowed = {"hpo", "objectives", "search_spaces", "tests", "examples", "docs"}
    files = {"README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {entry.split("/")[0] for entry in entries} <= allowed | files
    assert not [entry for entry in entries if "__pycache__" in entry or entry.endswith((".db", ".pt"))]


def test_the_workflow_follows_its_schema_and_runs_the_line_of_the_readme() -> None:
    workflow = ".github/workflows/ci.yml"
    run("-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", workflow)
    assert ".ci/run" in (ROOT / workflow).read_text()


def test_no_file_names_a_package_index() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hosts = ("pypi" + ".org", "files.python" + "hosted.org", "download.py" + "torch.org")
    for name in tracked:
        text = (ROOT / name).read_text(errors="replace")
        assert not any(host in text for host in hosts), name
