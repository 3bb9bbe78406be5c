"""The options of hpo.session.options as click takes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from hpo.session.options import Declaration, declarations

Command = Callable[..., Any]


class Duration(click.ParamType[float | str]):
    """Seconds, or a number with a unit: 90, 90s, 30m, 2h; also `none` where the option takes it."""

    name = "duration"

    def __init__(self, *, takes_none: bool) -> None:
        self._takes_none = takes_none

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | str:
        if self._takes_none and value == "none":
            return "none"
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        if parts is None or float(parts[1]) == 0:
            other = ", or none" if self._takes_none else ""
            self.fail(f"'{value}' is not a duration above 0, such as 90, 90s, 30m or 2h{other}.", param, ctx)
        return float(parts[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[parts[2]]


def take(*options: type, only: Sequence[str] = ()) -> Callable[[Command], Command]:
    """The options that hpo.session.options declares, as one decorator; all of them, or `only` some."""

    def decorate(command: Command) -> Command:
        declared = [each for kind in options for each in declarations(kind) if not only or each.name in only]
        for each in reversed(declared):
            command = _click_option(each)(command)
        return command

    return decorate


def _click_option(declared: Declaration) -> Callable[[Command], Command]:
    name, option = declared.name, declared.option
    if declared.type is bool:
        return click.option(option.flag, name, is_flag=True, help=option.help)
    if declared.type == bool | None:
        return click.option(f"{option.flag}/--no-{option.flag[2:]}", name, default=None, help=option.help)
    return click.option(
        option.flag,
        name,
        type=Duration(takes_none=option.takes_none) if option.is_duration else _CLICK_TYPES[declared.type],
        multiple=declared.type in _REPEATABLE,
        metavar=option.metavar,
        help=option.help,
    )


_REPEATABLE: tuple[Any, ...] = (Sequence[str], Sequence[str] | Mapping[str, object])

_CLICK_TYPES: dict[Any, Any] = {
    int | None: int,
    float | None: float,
    str | None: str,
    **dict.fromkeys(_REPEATABLE, str),
    Path | None: click.Path(path_type=Path),
}
