"""`hpo report` and `hpo compare`: what is known of studies, as a file that opens in any browser."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import StoreError, UsageError
from hpo.files import write_atomically
from hpo.provenance import describe as describe_provenance
from hpo.provenance import listed, sessions
from hpo.search.lease import living_sessions
from hpo.search.storage import find_studies
from hpo.search.study import Study
from hpo.search.winner import find_winner

if TYPE_CHECKING:
    from hpo.report.content import Content

LIVE_S = 10
"""Seconds after which a live report is written again."""


def write_report(
    study: str,
    out: Path,
    *,
    home: Path | None = None,
    storage: str | None = None,
    live: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the report of a study to a file; with `live` again and again until nobody searches it.

    Raises UsageError if plotly is not installed, and StoreError if the file cannot be written.
    """
    database = find_studies(home, storage)
    while True:
        is_searched = live and bool(living_sessions(database, study))
        page = report_page(Study.load(database, study), refresh_s=LIVE_S if is_searched else None)
        _write(out, page)
        if not is_searched:
            return out
        tell(f"{out}: written again every {LIVE_S} s while the study is searched, Ctrl-C to stop")
        tell = _nothing
        time.sleep(LIVE_S)


def _nothing(line: str) -> None:
    """Said once already."""


def report_page(study: Study, *, refresh_s: int | None = None) -> str:
    """The report of a study as HTML. Raises UsageError if plotly is not installed."""
    require_plotly()
    from hpo.report.content import Content
    from hpo.report.page import draw_page

    return draw_page(_content(study, Content), refresh_s=refresh_s)


def compare_studies(
    studies: Sequence[str], out: Path | None = None, *, home: Path | None = None, storage: str | None = None
) -> list[dict[str, Any]]:
    """What several studies came to, a row for each; with `out` also a page with their curves and configurations.

    Of a study with folds `epochs` are those folds. Raises UsageError if fewer than two are named, or they optimise
    different metrics.
    """
    if len(studies) < 2:
        raise UsageError(f"hpo compare needs two studies or more, not {len(studies)}.")
    database = find_studies(home, storage)
    loaded = [Study.load(database, name) for name in dict.fromkeys(studies)]
    metrics = {study.settings.metric: study.name for study in loaded}
    if len(metrics) > 1:
        (one, first), (other, second), *_ = metrics.items()
        raise UsageError(f"study '{first}' optimises {one} and study '{second}' {other}: name studies of one metric.")
    rows = [_row(study) for study in loaded]
    if out is not None:
        require_plotly()
        from hpo.report.comparison import draw_comparison
        from hpo.report.content import Content

        _write(out, draw_comparison([_content(study, Content) for study in loaded], describe_differences(rows)))
    return rows


def describe_differences(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """What keeps the scores of these studies from being of the same examples, as rows of `compare_studies` say."""
    names = ("task", "data", "seed", "folds", "limit")
    differing = [name for name in names if len({row[name] for row in rows}) > 1]
    if not differing:
        return None
    verb = "differs" if len(differing) == 1 and differing != ["data"] else "differ"
    return f"Compare with care: {listed(differing)} {verb}, so the validation scores are of other examples."


def _row(study: Study) -> dict[str, Any]:
    winner = find_winner(study)
    test = winner.test.get(winner.metric) if winner and winner.test else None
    return {
        "study": study.name,
        "task": study.settings.task,
        "strategy": study.settings.strategy,
        "pruner": study.settings.pruner,
        "seed": study.settings.seed,
        "data": next((session.data[:8] for session in reversed(sessions(study)) if session.data), None),
        "folds": study.settings.folds,
        "limit": study.settings.limit,
        "trials": f"{study.num_finished}/{study.num_trials}",
        "epochs": sum(len(trial.curve) for trial in (*study.trials(), *study.repeats())),
        f"validation {study.settings.metric}": winner and winner.validation,
        f"test {study.settings.metric}": test,
    }


def _content(study: Study, content: type[Content]) -> Content:
    commands = list(dict.fromkeys(session.command for session in sessions(study)))
    return content.of(study, made_with=describe_provenance(study), commands=commands)


def require_plotly() -> None:
    """Raise UsageError if plotly is not installed."""
    if not has_plotly():
        raise UsageError("a report needs plotly: pip install 'hpo-torch[report]'.")


def has_plotly() -> bool:
    return find_spec("plotly") is not None


def _write(out: Path, page: str) -> None:
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error.strerror}; choose another file with --out.") from error
