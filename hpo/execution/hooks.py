"""Observers that tell the world outside: a JSON post to a URL, and a command for each new best trial.

Both work in a thread of their own, so that no trial waits for them, and neither can end a search.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from hpo.errors import UsageError
from hpo.execution.observer import Observer, Standing
from hpo.records import ELIGIBLE, to_plain

if TYPE_CHECKING:
    from hpo.records import EndState, SearchOutcome
    from hpo.search.study import Suggestion
    from hpo.training.trainer import EpochResult

ANSWER_S = 5.0
"""Seconds that a server may take to answer a post."""

LAST_POST_S = 5.0
"""Seconds that the end of a search waits for posts that are still on their way."""

LAST_COMMAND_S = 60.0
"""The same for commands."""

_logger = logging.getLogger(__name__)


def check_url(url: str) -> str:
    """The URL, if it can be posted to. Raises UsageError, which does not repeat it: it may hold a token."""
    with suppress(ValueError):  # a port that is not a number, or brackets that do not close
        parts = urlsplit(url)
        if parts.scheme in ("http", "https") and parts.hostname and parts.port != 0:
            return url
    raise UsageError(
        "--notify, or HPO_NOTIFY, must be an address such as https://HOST/PATH; http:// and https:// are allowed."
    )


class BestObserver(Observer):
    """Knows when a trial of this session becomes the best of its study."""

    _standing: Standing
    _best: float | None = None

    def search_started(self, start: Standing) -> None:
        self.study_moved(start)

    def study_moved(self, standing: Standing) -> None:
        self._standing = standing
        self._best = standing.best and standing.best[1]

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        value = result.best_value if result else None
        # A repeat in a confirmation is not a trial of the search, and may be lucky.
        if suggestion.repeats is None and state in ELIGIBLE and value is not None and self._is_better(value):
            self._best = value
            self.new_best(suggestion, value)

    def _is_better(self, value: float) -> bool:
        return self._best is None or self._standing.direction.gain(value, over=self._best) > 0

    def new_best(self, suggestion: Suggestion, value: float) -> None:
        """A trial has become the best one."""


class Notifier(BestObserver):
    """Posts JSON at each new best, at a failed trial, and at the end or the failure of the search.

    It holds names, numbers and the configuration, and nothing that could be a secret: no path, address, command line or
    error message. `text` is a sentence, which chat services show. What a server does not take is lost; the first time
    there is a warning.
    """

    def __init__(self, url: str, study: str) -> None:
        self._url = check_url(url)
        self._study = study
        self._thread = _Worker("hpo-notify", self._post, LAST_POST_S)
        self._has_warned = False

    def new_best(self, suggestion: Suggestion, value: float) -> None:
        metric = self._standing.metric
        self._send(
            "best",
            f"{self._study}: trial {suggestion.number} is the best so far, {metric} {value:.4f}",
            trial=suggestion.number,
            metric=metric,
            direction=self._standing.direction,
            value=value,
            configuration=suggestion.active_values,
        )

    def trial_ended(
        self, suggestion: Suggestion, state: EndState, result: EpochResult | None, reason: str | None
    ) -> None:
        super().trial_ended(suggestion, state, result, reason)
        if state == "failed":
            text = f"{self._study}: trial {suggestion.number} failed; hpo show {self._study} says why"
            self._send("trial failed", text, trial=suggestion.number, configuration=suggestion.active_values)

    def search_failed(self, error: Exception) -> None:
        self._send("failed", f"{self._study}: the search failed with a {type(error).__name__}")
        self._thread.close()

    def search_concluded(self, outcome: SearchOutcome) -> None:
        event = "done" if outcome.is_done else "interrupted" if outcome.interrupted else "time is up"
        winner = outcome.winner
        best = f", best {winner.metric} {winner.validation:.4f} (trial {winner.trial})" if winner else ""
        self._send(
            event,
            f"{self._study}: {event}{best}",
            counts=outcome.counts,
            winner=winner
            and {
                "trial": winner.trial,
                "metric": winner.metric,
                "validation": winner.validation,
                "test": winner.test,
                "configuration": winner.configuration,
            },
        )
        self._thread.close()

    def _send(self, event: str, text: str, **facts: Any) -> None:
        self._thread.put(json.dumps(to_plain({"event": event, "study": self._study, "text": text, **facts})).encode())

    def _post(self, body: bytes) -> None:
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json", "User-Agent": "hpo"})
        try:
            with urllib.request.urlopen(request, timeout=ANSWER_S):
                pass
        except (OSError, ValueError, HTTPException) as error:  # of sockets, of urllib's own, and of what is not HTTP
            if not self._has_warned:
                self._has_warned = True
                reason = getattr(error, "code", None) or getattr(error, "reason", None) or error
                _logger.warning("the server of --notify did not accept a post (%s); the search continues", reason)


class CommandRunner(BestObserver):
    """Runs a shell command for each new best trial, one after the other.

    It gets HPO_STUDY, HPO_TRIAL, HPO_METRIC, HPO_VALUE, HPO_CONFIGURATION (JSON) and HPO_HOME in its environment. What
    it prints goes to standard error, and a warning names the exit code of one that fails.
    """

    def __init__(self, command: str, study: str, home: Path) -> None:
        self._command = command
        self._study = study
        self._home = home
        self._thread = _Worker("hpo-on-best", self._run, LAST_COMMAND_S)

    def new_best(self, suggestion: Suggestion, value: float) -> None:
        self._thread.put(
            {
                "HPO_STUDY": self._study,
                "HPO_TRIAL": str(suggestion.number),
                "HPO_METRIC": self._standing.metric,
                "HPO_VALUE": repr(value),
                "HPO_CONFIGURATION": json.dumps(suggestion.active_values),
                "HPO_HOME": str(self._home),
            }
        )

    def search_failed(self, error: Exception) -> None:
        self._thread.close()

    def search_concluded(self, outcome: SearchOutcome) -> None:
        self._thread.close()

    def _run(self, variables: Mapping[str, str]) -> None:
        # It prints to where our messages go, descriptor 2: with --json, standard output is for the data.
        environment = {**os.environ, **variables}
        code = subprocess.call(self._command, shell=True, env=environment, stdin=subprocess.DEVNULL, stdout=2)
        if code:
            _logger.warning("the command of --on-best ended with code %d for trial %s", code, variables["HPO_TRIAL"])


class _Worker:
    """A thread that handles one thing after the other; `close` waits for the rest for a while."""

    def __init__(self, name: str, handle: Callable[[Any], None], last_s: float) -> None:
        self._handle = handle
        self._last_s = last_s
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def put(self, job: Any) -> None:
        self._waiting.put(job)

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(self._last_s)
        if self._thread.is_alive():
            _logger.warning(
                "%s was not done %.0f s after the search; the rest is dropped", self._thread.name, self._last_s
            )

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            self._handle(job)
