"""How a trial's story reaches MLflow: a spool file on disk, and a thread that tells MLflow what stands in it.

A spool is a list of events, one JSON line each: `start`, `epoch`, `file`, `text`, `end`, `remove`. Telling the same
events twice changes nothing, so after kill -9 or a server's outage a spool is simply sent again, from its beginning.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import SearchError, first_line
from hpo.tracking.store import STUDY_ID_TAG, TRIAL_TAG, search_runs

if TYPE_CHECKING:
    from mlflow.entities import Metric, Run

    from hpo.records import EndState
    from hpo.tracking.store import TrackingStore

Event = dict[str, Any]

_logger = logging.getLogger(__name__)
_MAX_METRICS = (
    800  # MLflow takes 1000 rows at once, 100 of them parameters and 100 tags; more would cut an epoch in half
)
_PAUSE_S = 0.5  # between two rounds: a short trial is then told as a whole, which costs MLflow half as much
_MAX_TAG = 5000  # characters; MLflow refuses longer values

ATTEMPT_TAG = "hpo.attempt"

RUN_STATUS: dict[EndState, str] = {
    "complete": "FINISHED",
    "pruned": "FINISHED",  # MLflow has no such status: the tag hpo.state tells
    "diverged": "FINISHED",
    "infeasible": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}


class Spool:
    """The events of one run in a file, in the order they happened; what was sent is remembered in memory only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._told = 0  # bytes
        self._lock = threading.Lock()
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        """A process killed while it wrote, or a power cut, can leave half a line at the end."""
        if not self.path.exists():
            return
        whole = self.path.read_bytes().rfind(b"\n") + 1
        os.truncate(self.path, whole)

    def append(self, event: Event) -> None:
        """Write one event with the time it happened. Raises SearchError if the disk does not take it."""
        line = json.dumps({"time_ms": time.time_ns() // 1_000_000, **event}) + "\n"
        try:
            with self._lock, self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
        except OSError as error:
            raise SearchError(
                f"cannot write {self.path}: {error.strerror}; make room, then run the same command again."
            ) from error

    def unsent(self) -> tuple[list[Event], int]:
        """The events not yet sent, and the size of the file up to them."""
        with self._lock, self.path.open("rb") as file:
            file.seek(self._told)
            lines = file.read().splitlines(keepends=True)
        return list(self._parse(lines)), self._told + sum(map(len, lines))

    def _parse(self, lines: Iterable[bytes]) -> Iterator[Event]:
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if event and isinstance(event, dict):
                yield event
            else:
                _logger.warning("%s: skipped a damaged line of %d bytes", self.path, len(line))

    def has_ended(self) -> bool:
        """Whether the trial has ended, by the last event; one without a file has ended, and all of it was sent."""
        with self._lock:
            if not self.path.exists():
                return True
            last_line = self.path.read_bytes().splitlines()[-1:]
        return any(_closes(event) for event in self._parse(last_line))

    def mark_sent(self, size: int) -> None:
        """Remember that everything in the first `size` bytes was sent."""
        self._told = size

    def remove_if_told(self) -> None:
        """Delete the file, unless something was added meanwhile."""
        with self._lock:
            if self.path.exists() and self.path.stat().st_size == self._told:
                self.path.unlink()
                self._told = 0


def _closes(event: Event) -> bool:
    """Whether a spool that ends with this event has nothing to wait for."""
    return "end" in event or "remove" in event


class Delivery:
    """Tells MLflow one trial's spool.

    A run belongs to the latest attempt at its trial: what an earlier one still has to say, because its machine was cut
    off or slept, is passed over.
    """

    def __init__(
        self,
        store: TrackingStore,
        experiment_id: str,
        number: int,
        metric: str,
        spool: Spool,
        study_id: str | None = None,
        *,
        is_shared: bool = True,
    ) -> None:
        """`is_shared` says whether another machine may take the trial over meanwhile."""
        self.number = number
        self.spool = spool
        self._store = store
        self._client = store.client
        self._experiment_id = experiment_id
        self._metric = metric
        self._study_id = study_id
        self._is_shared = is_shared
        self._run_id: str | None = None
        self._attempt = 0
        self._is_abandoned = False
        self._last_epoch = -1
        self._nonfinite: AbstractSet[str] = frozenset()
        self._batch = self._new_batch()

    def deliver(self) -> None:
        """Tell all that is unsent; the file goes when the trial has ended. Raises what MLflow raises."""
        if self._is_abandoned or not self.spool.path.exists():
            return
        events, size = self.spool.unsent()
        self._attempt = max(
            [self._attempt, *(_attempt(event["start"]["tags"]) for event in events if "start" in event)]
        )
        for event in events:  # a spool that a lost study left belongs to the runs of that study
            self._study_id = event.get("start", {}).get("tags", {}).get(STUDY_ID_TAG, self._study_id)
        if self._is_superseded():
            self.abandon()
            return
        self._batch = self._new_batch()  # what an earlier try had collected stands in the spool
        for event in events:
            self._tell(event)
        self._send()
        self.spool.mark_sent(size)
        if events and _closes(events[-1]):
            self.spool.remove_if_told()

    def abandon(self) -> None:
        """Send nothing more, and forget what was not sent."""
        self._is_abandoned = True
        self.spool.path.unlink(missing_ok=True)

    def _is_superseded(self) -> bool:
        """Whether a later attempt than those of this spool has the run."""
        if self._run_id and not self._is_shared:
            return False
        run = self._client.get_run(self._run_id) if self._run_id else self._find_run()
        return run is not None and 0 < self._attempt < _attempt(run.data.tags)

    def _tell(self, event: Event) -> None:
        if "start" in event:
            self._start(event["time_ms"], **event["start"])
        elif "epoch" in event:
            self._batch.add_epoch(event)
        elif "tags" in event:
            self._batch.tags |= event["tags"]
        elif "text" in event:
            self._client.log_text(self._ensure_run(), event["text"], event["name"])
        elif "file" in event:
            self._send_file(Path(event["file"]), event["folder"])
        elif "remove" in event and self._run_id:  # without a run there is no file
            self._store.remove_file(self._run_id, event["remove"])
        elif "end" in event:
            self._end(event["time_ms"], **event["end"])

    def _start(self, time_ms: int, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        """Create the run, or continue it: then its parameters stand already, and MLflow lets no one change them."""
        tags = {**tags, "hpo.state": "running"}
        if self._run_id is None:
            self._run_id = self._create_run(time_ms, tags).info.run_id
            self._batch.params |= params
            return
        run = self._client.get_run(self._run_id)
        self._batch.params |= {key: value for key, value in params.items() if key not in run.data.params}
        self._batch.tags |= tags
        self._client.update_run(self._run_id, status="RUNNING")
        if "hpo.reason" in run.data.tags:
            self._client.delete_tag(self._run_id, "hpo.reason")

    def _ensure_run(self) -> str:
        """The run id; a spool whose first line was damaged still makes its run."""
        if self._run_id is None:
            self._run_id = self._create_run(time.time_ns() // 1_000_000, {}).info.run_id
        return self._run_id

    def _find_run(self) -> Run | None:
        runs = search_runs(self._client, self._experiment_id, f"tags.`{TRIAL_TAG}` = '{self.number}'", self._study_id)
        if not runs:
            return None
        run = runs[0]
        self._run_id = run.info.run_id
        self._last_epoch = self._last_recorded_epoch(run)
        self._nonfinite = frozenset(run.data.tags.get("hpo.nonfinite", "").split(", ")) - {""}
        return run

    def _last_recorded_epoch(self, run: Run) -> int:
        """Epochs up to this one are not sent again: a resumed trial repeats the epoch that its checkpoint missed."""
        keys = [key for key in run.data.metrics if key != f"best/{self._metric}"]
        return max(
            (row.step for key in keys for row in self._client.get_metric_history(run.info.run_id, key)), default=-1
        )

    def _create_run(self, time_ms: int, tags: Mapping[str, str]) -> Run:
        tags = {**tags, "hpo.kind": "trial", TRIAL_TAG: str(self.number)}
        tags |= {STUDY_ID_TAG: self._study_id} if self._study_id else {}
        return self._client.create_run(self._experiment_id, time_ms, tags, run_name=f"trial-{self.number:04d}")

    def _new_batch(self) -> _Batch:
        return _Batch(last_epoch=self._last_epoch, nonfinite=self._nonfinite)

    def _send(self) -> None:
        """Tell what was collected. One log_batch stores the metrics of an epoch as a whole or not at all."""
        from mlflow.entities import Param, RunTag

        batch = self._batch
        if batch.is_empty:
            return
        *earlier, rows = batch.groups_of_rows() or [[]]
        for group in earlier:
            self._client.log_batch(self._ensure_run(), group)
        params = [Param(*param) for param in batch.params.items()]
        tags = [RunTag(*tag) for tag in batch.tags.items()]
        self._client.log_batch(self._ensure_run(), rows, params=params, tags=tags)
        self._last_epoch, self._nonfinite = batch.last_epoch, batch.nonfinite
        self._batch = self._new_batch()

    def _send_file(self, path: Path, folder: str | None) -> None:
        if not path.exists():
            _logger.warning("trial %d: %s is gone and was not recorded in MLflow", self.number, path)
            return
        self._client.log_artifact(self._ensure_run(), str(path), folder)

    def _end(
        self,
        time_ms: int,
        state: EndState,
        value: float | None,
        reason: str | None,
        costs: Mapping[str, float] | None = None,  # a spool of an earlier version has none
    ) -> None:
        if value is None and state in ("failed", "diverged"):
            value = math.nan  # what it had while it ran does not count
        if value is not None and not math.isfinite(value) and not (math.isnan(value) and self._has_value()):
            value = None
        # MLflow shows the value of the last step, and of two in one step and millisecond the larger one.
        step = max(0, self._batch.last_epoch + 1)
        if value is not None:
            self._batch.add(step, time_ms, {f"best/{self._metric}": rounded(value)})
        self._batch.add(0, time_ms, {f"cost/{name}": cost for name, cost in (costs or {}).items()})
        self._batch.tags |= {"hpo.state": state} | ({"hpo.reason": reason[:_MAX_TAG]} if reason else {})
        self._send()
        self._client.set_terminated(self._ensure_run(), RUN_STATUS[state], time_ms)

    def _has_value(self) -> bool:
        """Whether the run has a value, which NaN takes back: MLflow deletes no metric, and sorts NaN last."""
        self._send()
        return f"best/{self._metric}" in self._client.get_run(self._ensure_run()).data.metrics


class _Batch:
    """Parameters, metrics and tags of a run that are told together."""

    def __init__(self, *, last_epoch: int, nonfinite: AbstractSet[str]) -> None:
        self.last_epoch = last_epoch
        """The last one that was told or is in here: a resumed trial repeats an epoch."""
        self.nonfinite = nonfinite
        """Metrics that were not finite in an epoch so far."""
        self.params: dict[str, str] = {}
        self.tags: dict[str, str] = {}
        self._epochs: list[list[Metric]] = []

    @property
    def is_empty(self) -> bool:
        return not (self.params or self.tags or self._epochs)

    def add_epoch(self, event: Event) -> None:
        """Add an epoch's metrics, unless they were told before."""
        if event["epoch"] <= self.last_epoch:
            return
        self.last_epoch = event["epoch"]
        self.add(event["epoch"], event["time_ms"], event["metrics"])
        nonfinite = {key for key, value in event["metrics"].items() if not math.isfinite(value)}
        if nonfinite - self.nonfinite:
            self.nonfinite |= nonfinite
            self.tags["hpo.nonfinite"] = ", ".join(sorted(self.nonfinite))

    def add(self, step: int, time_ms: int, metrics: Mapping[str, float]) -> None:
        """Add metrics of one step."""
        from mlflow.entities import Metric

        # MLflow stores inf as 1.8e308, which would top every descending sort.
        finite = {key: value if math.isfinite(value) else math.nan for key, value in metrics.items()}
        if finite:
            self._epochs.append([Metric(key, value, time_ms, step) for key, value in finite.items()])

    def groups_of_rows(self) -> list[list[Metric]]:
        """The metrics as MLflow takes them at once, with those of an epoch together."""
        size = max(1, _MAX_METRICS // max(1, *(len(rows) for rows in [*self._epochs, []])))
        groups = (self._epochs[begin : begin + size] for begin in range(0, len(self._epochs), size))
        return [list(chain.from_iterable(group)) for group in groups]


def rounded(value: float) -> float:
    """A value to six significant digits, for a table; the curves have all of them."""
    return float(f"{value:.6g}")


def _attempt(tags: Mapping[str, str]) -> int:
    return int(tags.get(ATTEMPT_TAG, 0))


class Sender:
    """A thread that tells MLflow what is new, every `interval_s` and when asked to.

    What fails stays in its spool and is tried again; the foreground never waits, except in `flush` and `close`.
    """

    def __init__(self, interval_s: float = 10.0) -> None:
        self._interval_s = interval_s
        self._changed = threading.Condition()
        self._waiting: dict[Delivery, None] = {}  # an ordered set: first in, first sent
        self._rounds_asked = 0
        self._flush_asked = 0
        """The round that somebody waits for."""
        self._rounds_done = 0
        self._arrived = True
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hpo-tracking", daemon=True)
        self._thread.start()

    def put(self, delivery: Delivery, *, now: bool = False) -> None:
        """Tell this delivery's new events in the next round, or at once. Returns immediately."""
        with self._changed:
            self._waiting[delivery] = None
            if now:
                self._rounds_asked += 1
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Tell everything now; whether all of it arrived in this time. One attempt, with MLflow's own retries."""
        with self._changed:
            self._rounds_asked += 1
            asked = self._flush_asked = self._rounds_asked
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._rounds_done >= asked, timeout_s) and self._arrived

    def close(self, timeout_s: float) -> bool:
        """Flush and end the thread; a second call does nothing."""
        with self._changed:
            if self._closing:
                return self._arrived
            self._closing = True
            return self.flush(timeout_s)  # within the lock, so that the thread does not end before it is asked

    def _run(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._rounds_asked > self._rounds_done, self._interval_s)
                self._changed.wait_for(lambda: self._flush_asked > self._rounds_done, _PAUSE_S)
                asked, closing = self._rounds_asked, self._closing
            arrived = self._tell_waiting()
            with self._changed:
                self._rounds_done, self._arrived = asked, arrived
                self._changed.notify_all()

    def _tell_waiting(self) -> bool:
        while delivery := self._next():
            try:
                delivery.deliver()
            except Exception as error:  # the thread must outlive whatever a network, a disk or a server comes up with
                self.put(delivery)  # behind the others, so that one bad run does not hold them up
                self._log_failure(delivery, error)
                return False
        return True

    def _next(self) -> Delivery | None:
        with self._changed:
            delivery = next(iter(self._waiting), None)
            if delivery:
                del self._waiting[delivery]
            return delivery

    def _log_failure(self, delivery: Delivery, error: Exception) -> None:
        level = logging.WARNING if self._arrived else logging.DEBUG  # once an outage
        reason = first_line(error)
        _logger.log(
            level, "trial %d waits in %s until MLflow accepts it: %s", delivery.number, delivery.spool.path, reason
        )
