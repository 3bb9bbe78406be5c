"""Where a study's results come from: data, code, versions, commit, command line and machine of each session."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from hpo import __version__
from hpo.database import without_password
from hpo.errors import StudyMismatchError
from hpo.machine import num_cores
from hpo.sources import changed_sources, source_checksums, source_folder

if TYPE_CHECKING:
    from hpo.data.examples import Dataset
    from hpo.objective import Objective
    from hpo.search.study import Study

PROVENANCE = "provenance"
"""Key of the study's list of sessions, the first one first."""

_PACKAGES = ("torch", "torchvision", "torchmetrics", "optuna", "mlflow")
_GIT_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What one session searched with. Plain data, stored with the study."""

    started: str
    """UTC, as 2026-01-31T12:00:00+00:00."""

    first_trial: int
    """Number of the first trial that the session could begin."""

    data: str
    """Checksum of the data; see `hpo.data.fingerprint`. Empty for a task with a training loop of its own, which reads
    its data itself."""

    sources: dict[str, str]
    """Checksums of the task's source files by relative path; see `hpo.sources`."""

    versions: dict[str, str]
    """Of Python, hpo and the libraries that results depend on."""

    commit: str | None
    """Git commit of the folder that the task's source is in; None outside a repository."""

    is_dirty: bool | None
    """Whether tracked files of that repository had changes that were not committed."""

    command: str
    """The command line, without passwords."""

    machine: str
    """Host name, operating system, architecture and number of CPU cores."""

    accepted: list[str] = field(default_factory=list)
    """What `--accept-changes` let differ from the session before: "the data", or a source file's name."""

    @classmethod
    def of_session(cls, objective: Objective, dataset: Dataset | None) -> Self:
        """What this process is about to search with; `record_session` knows the first trial."""
        from hpo.data.fingerprint import data_fingerprint  # it imports torch, which `hpo show` can do without

        folder = source_folder(objective)
        commit, is_dirty = _git_state(folder) if folder else (None, None)
        return cls(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            first_trial=0,
            data=data_fingerprint(dataset) if dataset else "",
            sources=source_checksums(objective),
            versions={"python": platform.python_version(), "hpo": __version__, **_installed(_PACKAGES)},
            commit=commit,
            is_dirty=is_dirty,
            command=shlex.join([*_program(), *_without_secrets(sys.argv[1:])]),
            machine=f"{platform.node()}, {platform.system()} {platform.machine()}, {num_cores()} cores",
        )

    def tags(self) -> dict[str, str]:
        """What each MLflow run of the session is tagged with."""
        tags = {f"hpo.version.{name}": number for name, number in self.versions.items()}
        tags |= {"hpo.command": self.command, "hpo.machine": self.machine}
        if self.data:
            tags["hpo.data"] = self.data
        if self.commit:
            tags |= {"hpo.commit": self.commit, "hpo.commit.is_dirty": str(self.is_dirty).lower()}
        return tags

    def changes_since(self, earlier: Provenance) -> list[str]:
        """What would make results incomparable: "the data", and the names of source files that differ."""
        data = ["the data"] if self.data != earlier.data else []
        return data + changed_sources(earlier.sources, self.sources)


def sessions(study: Study) -> list[Provenance]:
    """The provenance of each session that differs from the one before, the first one first."""
    return [Provenance(**plain) for plain in study.recorded(PROVENANCE) or []]


def require_unchanged(study: Study, now: Provenance, *, accept_changes: bool) -> list[str]:
    """What has changed since the study's last session, where that is accepted; else StudyMismatchError names it."""
    earlier = sessions(study)
    changes = now.changes_since(earlier[-1]) if earlier else []
    if changes and not accept_changes:
        raise StudyMismatchError(
            f"{listed(changes)} changed since study '{study.name}' was last searched ({earlier[-1].started[:10]}): "
            "restore what it was, use another name with --study, or continue with --accept-changes, "
            "which every report will mention."
        )
    return changes


def record_session(study: Study, now: Provenance, *, accept_changes: bool) -> None:
    """Add the session to the study's list, unless nothing but the time is new.

    The caller holds the study's lock. Raises StudyMismatchError as `require_unchanged` does.
    """
    accepted = require_unchanged(study, now, accept_changes=accept_changes)
    known: list[dict[str, Any]] = study.recorded(PROVENANCE) or []
    plain = asdict(replace(now, first_trial=study.num_numbered, accepted=accepted))
    if not known or any(plain[name] != known[-1].get(name) for name in _COMPARED):
        study.record(PROVENANCE, [*known, plain])


def describe(study: Study) -> list[str]:
    """A line with what the study began with, and one for each time that something which decides results changed."""
    found = sessions(study)
    if not found:
        return []
    first = found[0]
    versions = ", ".join(f"{name} {number}" for name, number in first.versions.items())
    commit = (
        f"; commit {first.commit[:10]}{' with uncommitted changes' if first.is_dirty else ''}" if first.commit else ""
    )
    lines = [f"Made with {versions}{commit}" + (f"; data {first.data[:12]}" if first.data else "")]
    for before, session in pairwise(found):
        new = [f"{name} {number}" for name, number in session.versions.items() if before.versions.get(name) != number]
        if session.accepted or new:
            lines.append(f"Changed before trial {session.first_trial}: {', '.join([*session.accepted, *new])}")
    return lines


_SECRET = ("--notify", "--on-best")

_COMPARED = ("data", "sources", "versions", "commit", "is_dirty", "command", "machine")


def _program() -> list[str]:
    """What was run: `hpo`, `python -m hpo`, or a script."""
    program = Path(sys.argv[0])
    return ["python", "-m", program.parent.name] if program.name == "__main__.py" else [program.name]


def _without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments without passwords, and without what --notify and --on-best are given: it often holds a token."""
    for before, argument in pairwise(["", *arguments]):
        option = argument.partition("=")[0]
        if before in _SECRET:
            yield "..."
        elif option in _SECRET and option != argument:
            yield f"{option}=..."
        else:
            yield without_password(argument)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, or `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _installed(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the repository that the folder is in, and whether it has uncommitted changes; None without one."""
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return (None, None) if commit is None or status is None else (commit, bool(status))


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None where it is not installed, finds no repository, or does not answer."""
    try:
        answer = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_TIMEOUT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
