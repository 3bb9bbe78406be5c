"""`hpo ui`: the server it starts, and what is left of it."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers.tracking import curve, find_trial, open_runs, run_python, spooled

from hpo.errors import StoreError, UsageError
from hpo.tracking import server
from hpo.tracking.store import TrackingStore, open_store


def get(url: str | urllib.request.Request) -> bytes:
    with urllib.request.urlopen(url, timeout=30) as answer:
        return bytes(answer.read())


def post(url: str, content: object) -> Any:
    """What the UI's page asks for, read as its browser reads it."""
    body, kind = json.dumps(content).encode(), {"Content-Type": "application/json"}
    return strict_json(get(urllib.request.Request(url, body, kind)))


def strict_json(text: bytes) -> Any:
    """NaN is no JSON for a browser."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_the_ui_serves_the_store_takes_runs_and_leaves_no_process_behind(
    store: TrackingStore, tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One start of the server, which takes seconds, for the whole story."""
    with open_runs(store) as runs:
        summary = runs.summary_run()
        summary.log_text("what an artifact viewer shows", "report.txt")
        summary.finish("complete")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    base = f"http://127.0.0.1:{free_port}"
    with ExitStack() as stack:
        group = stack.enter_context(server.running_server(store, host="127.0.0.1", port=free_port)).pid
        assert b"<title>MLflow</title>" in get(base)
        for header in ({"Origin": "http://elsewhere.example"}, {"Host": "elsewhere.example"}):
            page = urllib.request.Request(f"{base}/ajax-api/2.0/mlflow/runs/search", b"{}", header, method="POST")
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(page, timeout=30)
        assert get(f"{base}/get-artifact?run_uuid={summary.run_id}&path=report.txt") == b"what an artifact viewer shows"

        remote = open_store(tmp_path / "remote", base)
        lines: list[str] = []
        server.serve(remote, study="digits", say=lines.append)
        assert lines[0] == f"MLflow is at {store.study_url('digits', base)}"
        runs = stack.enter_context(open_runs(remote))
        trial = runs.trial_run(5, params={"lr": 0.1})
        trial.log_epoch(1, {"val/accuracy": 0.1})
        awkward = runs.trial_run(6, params={"layers": "64," * 3000})
        awkward.log_epoch(1, {"val/accuracy": math.nan, "train/loss": math.inf})
        awkward.finish("diverged")
        assert runs.flush()
        asked = {"experiment_ids": [runs.experiment_id], "filter": "tags.`hpo.trial` = '6'"}
        (shown,) = post(f"{base}/ajax-api/2.0/mlflow/runs/search", asked)["runs"]
        assert shown["data"]["params"][0]["value"].endswith("... (9000 characters)")
        assert {each["key"]: each["value"] for each in shown["data"]["metrics"]} == dict.fromkeys(
            ("val/accuracy", "train/loss"), "NaN"
        )
        history = f"run_id={shown['info']['run_id']}&metric_key=val/accuracy"
        assert strict_json(get(f"{base}/ajax-api/2.0/mlflow/metrics/get-history?{history}"))["metrics"]

        os.killpg(group, signal.SIGKILL)
        trial.log_epoch(2, {"val/accuracy": 0.2})
        trial.finish("complete", value=0.2)
        assert not runs.flush()
    assert group_is_gone(group)
    assert spooled(remote.home) == ["trial-0005.jsonl"]
    with open_runs(open_store(remote.home, store.uri)) as later:
        later.recover()
    assert curve(store, 5) == [(1, 0.1), (2, 0.2)]
    assert find_trial(store, 5).info.status == "FINISHED"


HEALTHY_WITH_A_CHILD = """
import http.server, os, sys
os.fork()
print("Uvicorn running on this port", flush=True)
class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer.allow_reuse_port = True
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGINT, 130)])
def test_stopping_the_command_stops_the_server_and_its_children(
    home: Path, free_port: int, stop: signal.Signals, code: int
) -> None:
    script = f"""
import signal
from hpo.tracking import server
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
from hpo.tracking.store import TrackingStore
server._command = lambda store, host, port: [sys.executable, "-c", {HEALTHY_WITH_A_CHILD!r}, str(port)]
store = TrackingStore(home=home, uri=f"sqlite:///{{home / 'mlflow.db'}}", client=None)
try:
    with server.running_server(store, host="127.0.0.1", port=int(sys.argv[2])) as running:
        print(running.pid, flush=True)
        running.wait()
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = run_python(script, home, free_port)
    assert process.stdout is not None
    group = int(process.stdout.readline())
    assert not group_is_gone(group)
    process.send_signal(stop)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert group_is_gone(group)


def test_a_taken_port_is_named_with_the_way_out(store: TrackingStore) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .*--port {port + 1}"):
            server.serve(store, port=port, say=lambda line: None)


def test_another_port_is_found_and_said(store: TrackingStore, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_command", lambda *_: ["false"])
    monkeypatch.setattr(server, "DEFAULT_PORT", free_port)
    lines: list[str] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        with pytest.raises(StoreError):
            server.serve(store, say=lines.append)
    assert re.fullmatch(rf"Port {free_port} is taken by another program; using \d+\.", lines[0])
    port = server.find_free_port("127.0.0.1", free_port, lines.append)
    assert (port, len(lines)) == (free_port, 2)


def test_somebody_elses_server_is_not_taken_for_ours(
    store: TrackingStore, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes the port after we looked, and answers before ours finds it taken."""
    begin = HEALTHY_WITH_A_CHILD.replace("os.fork()", "")
    theirs = subprocess.Popen([sys.executable, "-c", begin, str(free_port)], stdout=subprocess.PIPE)
    try:
        assert theirs.stdout.readline()
        late = [sys.executable, "-c", "import sys, time; time.sleep(0.5); sys.exit('address already in use')"]
        monkeypatch.setattr(server, "_command", lambda *_: late)
        monkeypatch.setattr(server, "require_free_port", lambda *_: None)
        with pytest.raises(StoreError, match="ended with code 1 at its start: address already in use"):
            server.serve(store, port=free_port, say=lambda line: None)
    finally:
        theirs.kill()
        theirs.communicate()


def test_a_server_that_does_not_start_says_why(
    store: TrackingStore, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = [sys.executable, "-c", "import sys; print('first'); sys.exit('no disk today')"]
    monkeypatch.setattr(server, "_command", lambda *_: failing)
    with pytest.raises(StoreError, match="ended with code 1 at its start: no disk today"):
        server.serve(store, port=free_port, say=lambda line: None)


def test_a_host_that_others_can_reach_is_warned_about(
    store: TrackingStore, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_command", lambda *_: ["false"])
    for host, warned in (("0.0.0.0", True), ("127.0.0.1", False), ("localhost", False)):
        lines: list[str] = []
        with pytest.raises(StoreError):
            server.serve(store, host=host, port=free_port, say=lines.append)
        assert any("can read and change every run" in line for line in lines) == warned
