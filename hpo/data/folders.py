"""Which files and folders of a user's folder are data: not those that are hidden, or that another program made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_OF_SYSTEMS = ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found")
_THUMBNAILS = ("thumbnails", "thumbnail", "thumbs", "_thumbs")


@dataclass(frozen=True)
class Files:
    """The files below a folder."""

    found: list[Path]
    """By name; without those of the next two."""
    passed_over: Counter[str]
    """Files in hidden folders, folders of the system and folders of thumbnails, by the folder's name."""


def files_below(folder: Path) -> Files:
    """All files below a folder of one class, but none that is hidden, or that another program made."""
    found, passed_over = [], Counter[str]()
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        inside = path.relative_to(folder).parts[:-1]
        strange = next((name for name in inside if is_hidden(name) or name.lower() in _THUMBNAILS), None)
        if strange is not None:
            passed_over[strange] += 1
        elif not is_hidden(path.name):
            found.append(path)
    return Files(found, passed_over)


def folders_in(parent: Path, *, besides: Sequence[str] = ()) -> Iterator[Path]:
    """The folders in another one, by name, but none that is hidden or that the system made."""
    for path in sorted(parent.iterdir()):
        if path.is_dir() and path.name not in besides and not is_hidden(path.name):
            yield path


def is_hidden(name: str) -> bool:
    """Whether a file or a folder of this name is hidden, or belongs to the system: `.git`, `__MACOSX`, `@eaDir`."""
    return name.startswith(".") or name.lower() in _OF_SYSTEMS
