"""Who hears of a search: observers, a server that gets posts, and a command for each new best trial."""

from __future__ import annotations

import json
import logging
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import hpo
from hpo.config import Direction
from hpo.execution import hooks
from hpo.execution.hooks import BestObserver, Notifier
from hpo.execution.observer import Standing
from hpo.provenance import sessions
from hpo.search.storage import open_storage
from hpo.search.study import Study, Suggestion

# Its trials get better in their order, and the last one fails.
TASK = """
import hpo


def train(trial):
    if trial.parameters["rank"] == 3:
        raise RuntimeError("my password is 1234")
    trial.report(1, {"accuracy": trial.parameters["rank"] / 10})


objective = hpo.Objective(
    name="ranked", description="", train=train, direction="maximize", settings={"max_epochs": 1},
    space=hpo.Space(hpo.Group("all", rank=hpo.Choice(1, 2, 3, default=1))),
)
"""
OPTIONS: dict[str, Any] = {"strategy": "grid", "pruner": "none", "workers": 1}


@pytest.fixture
def task(tmp_path: Path) -> str:
    path = tmp_path / "ranked.py"
    path.write_text(TASK)
    return str(path)


@pytest.fixture
def posts() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The address of a server, and what was posted to it."""
    taken: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.headers["Content-Type"] == "application/json"
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hook/s3cret", taken
        server.shutdown()
        thread.join()


def test_a_server_and_a_command_hear_of_new_bests_failures_and_the_end_but_of_no_secret(
    task: str, home: Path, tmp_path: Path, posts: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, taken = posts
    monkeypatch.setattr("sys.argv", ["hpo", "search", "--notify", url, f"--notify={url}"])
    command = f'echo "$HPO_STUDY $HPO_TRIAL $HPO_METRIC $HPO_VALUE $HPO_CONFIGURATION" >> {tmp_path}/best.txt; exit 3'
    outcome = hpo.run_search(task, home=home, notify=url, on_best=command, **OPTIONS)
    assert outcome.winner is not None
    # A grid is tried in random order.
    order = [trial.values["rank"] for trial in outcome.trials]
    bests = [
        rank for place, rank in enumerate(order) if rank < 3 and all(r in (3, *range(rank)) for r in order[:place])
    ]
    assert [post["configuration"]["rank"] for post in taken if post["event"] == "best"] == bests
    assert [post["event"] for post in taken if post["event"] != "best"] == ["trial failed", "done"]
    assert taken[-1]["winner"]["validation"] == 0.2
    assert taken[-1]["counts"]["failed"] == 1
    assert all(post["study"] == "ranked" and post["text"].startswith("ranked: ") for post in taken)
    written = (tmp_path / "best.txt").read_text().splitlines()
    assert written == [f'ranked {order.index(rank)} accuracy {rank / 10} {{"rank": {rank}}}' for rank in bests]

    study = Study.load(open_storage(home), "ranked")
    assert sessions(study)[-1].command == "hpo search --notify ... --notify=..."
    assert not any(secret in json.dumps(taken) for secret in ("1234", "s3cret", str(tmp_path)))


def test_a_server_that_does_not_answer_costs_no_trial_and_one_warning(
    task: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hooks, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, caplog.at_level(logging.WARNING, "hpo"):
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert hpo.run_search(task, home=home, notify=url, **OPTIONS).is_done
    warnings = [record.getMessage() for record in caplog.records if "--notify" in record.getMessage()]
    assert warnings == ["the server of --notify did not accept a post (timed out); the search continues"]


def test_a_search_that_fails_is_reported_without_its_message(posts: tuple[str, list[dict[str, Any]]]) -> None:
    url, taken = posts
    Notifier(url, "x").search_failed(hpo.SearchError("the token is 1234"))
    assert taken == [{"event": "failed", "study": "x", "text": "x: the search failed with a SearchError"}]


def suggestion(number: int, repeats: int | None = None) -> Suggestion:
    return Suggestion(number=number, attempt=1, values={}, active_values={}, stage="", seed=0, repeats=repeats)


def test_a_server_that_does_not_speak_http_gets_the_next_post_too() -> None:
    def answer(server: socket.socket) -> None:
        for reply in (b"what?\r\n\r\n", b"HTTP/1.0 200 OK\r\n\r\n"):
            connection, _ = server.accept()
            with connection:
                asked.append(connection.recv(9999))
                connection.sendall(reply)

    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        notifier = Notifier(f"http://127.0.0.1:{server.getsockname()[1]}", "x")
        notifier.trial_ended(suggestion(0), "failed", None, None)
        notifier.search_failed(hpo.SearchError("why"))
        thread.join(10)
    assert len(asked) == 2


def test_a_training_of_a_confirmation_is_no_new_best() -> None:
    class Bests(BestObserver):
        def new_best(self, suggestion: Suggestion, value: float) -> None:
            found.append((suggestion.number, value))

    found: list[tuple[int, float]] = []
    observer = Bests()
    standing = Standing(
        study="x", metric="accuracy", direction=Direction.MAXIMIZE, num_trials=3, counts={}, best=(1, 0.8)
    )
    observer.search_started(standing)
    for repeats, value in ((1, 0.95), (None, 0.9)):
        result = SimpleNamespace(best_value=value)
        observer.trial_ended(suggestion(7, repeats), "complete", result, None)  # type: ignore[arg-type]
    assert found == [(7, 0.9)]


@pytest.mark.parametrize("url", ["ftp://host/1234", "host/1234", "https:///1234", "http://host:1234x", "http://[1234"])
def test_an_address_that_cannot_be_posted_to_is_refused_without_repeating_it(url: str, task: str, home: Path) -> None:
    with pytest.raises(hpo.UsageError, match="--notify, or HPO_NOTIFY, must be an address such as https://") as raised:
        hpo.run_search(task, home=home, notify=url)
    assert "1234" not in str(raised.value)


def test_an_observer_hears_of_everything_and_what_it_raises_ends_the_search(task: str, home: Path) -> None:
    heard: list[str] = []

    class Diary(hpo.Observer):
        def search_started(self, start: hpo.Standing) -> None:
            heard.append(start.study)

        def epoch_done(self, suggestion: hpo.Suggestion, result: hpo.EpochResult) -> None:
            heard.append(f"{suggestion.number}: {result.value}")
            raise ZeroDivisionError

        def search_failed(self, error: Exception) -> None:
            heard.append(type(error).__name__)

    with pytest.raises(ZeroDivisionError):
        hpo.run_search(task, home=home, observer=Diary(), strategy="random", trials=1, workers=1)
    assert heard == ["ranked", "0: 0.1", "ZeroDivisionError"]
    assert hpo.run_search(task, home=home, overrides=(), trials=1, workers=1).is_done
