"""Where tables and progress are written: a terminal as it is, or a file or pipe of a fixed width."""

from __future__ import annotations

import io
import re
from typing import IO, cast

from rich.console import Console

PIPED_WIDTH = 200
"""Columns of a table in a file or a pipe, which have no width."""


def new_console(*, stderr: bool) -> Console:
    # Names and messages may contain brackets, which are not markup.
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(
            file=cast("IO[str]", _Trimmed(console.file)), highlight=False, markup=False, width=PIPED_WIDTH
        )
    return console


class _Trimmed(io.TextIOBase):
    """A stream without the blanks at the ends of lines, with which rich fills the columns of tables up."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r"[ ]+$", "", text, flags=re.MULTILINE))

    def flush(self) -> None:
        self._stream.flush()
