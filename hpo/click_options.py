"""The options of hpo.session.options as click takes them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import click

from hpo.session.options import SECTIONS, Declaration, declarations

Command = Callable[..., Any]
_FLAGS_WIDTH = 28  # columns


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


class InSections(click.Command):
    """A command whose help shows its options under the titles of `SECTIONS`, in one column."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        rows = {option.name: option.get_help_record(ctx) for option in options}
        shown = {name: (row[0].ljust(_FLAGS_WIDTH), row[1]) for name, row in rows.items() if row}
        sections = {title: [name for name in get_type_hints(kind) if name in shown] for title, kind in SECTIONS.items()}
        named = {name for names in sections.values() for name in names}
        sections["Other options"] = [name for name in shown if name not in named]
        for title, names in sections.items():
            if names:
                with formatter.section(title):
                    formatter.write_dl([shown[name] for name in names])


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
