"""A study in MLflow: one experiment, a flat run for each trial, and one summary run with the plots and the winner."""

from __future__ import annotations

import atexit
import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

from hpo.database import without_password
from hpo.errors import StoreError
from hpo.home import Home
from hpo.tracking.owners import PROCESS_TAG, end_dead_runs, has_owner, this_process
from hpo.tracking.spool import ATTEMPT_TAG, RUN_STATUS, Delivery, Event, Sender, Spool
from hpo.tracking.store import ORPHANED_TAG, STUDY_ID_TAG, TRIAL_TAG, explained, is_of_study, search_runs
from hpo.tracking.view import FRONT_TAG, view_tags

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hpo.config import Direction
    from hpo.records import EndState
    from hpo.tracking.store import TrackingStore

_logger = logging.getLogger(__name__)

PARAMETERS_TAG = "hpo.parameters"
"""The parameters of a run as JSON, with all their digits."""

MAX_PARAM = 500
"""Characters of a parameter's value in MLflow, which itself takes 6 000 at most and 500 in old versions."""

_FLUSH_TIMEOUT_S = 60.0
_HURRIED_FLUSH_TIMEOUT_S = 3.0


class StudyRuns:
    """The runs of a study, in the experiment `hpo/<study>`, which is created on first use.

    Use it as a context manager: leaving it sends what is left. `metric` names the value that trials are compared by;
    the runs table sorts by `best/<metric>` and shows the `costs` and the parameters in `columns`. `note` is Markdown,
    shown above it. What is on its way lies in a folder of the session's own: several may share a home. Runs are tied to
    the `study_id`; those that a lost study of the same name has left are marked as orphaned when this one `is_new`. It
    `is_shared` where other machines may take its trials over: each run is then looked at before it is written to.
    """

    def __init__(
        self,
        store: TrackingStore,
        study: str,
        *,
        metric: str,
        direction: Direction,
        session: str,
        study_id: str | None = None,
        is_new: bool = False,
        is_shared: bool = True,
        columns: Sequence[str] = (),
        costs: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
        run_tags: Mapping[str, str] | None = None,
        note: str | None = None,
    ) -> None:
        from mlflow.tracking.context.registry import resolve_tags

        described = {"hpo.study": study, "hpo.metric": metric, "hpo.direction": direction, **(tags or {})}
        described |= view_tags(metric, direction, columns, costs)
        if note:
            described["mlflow.note.content"] = note
        self.store = store
        self.study = study
        self.metric = metric
        self.experiment_id = store.open_experiment(study, described)
        # User and source, which a run made by a client lacks, and what the session searches with.
        self._source_tags: dict[str, str] = {**resolve_tags(), **(run_tags or {})}
        self._study_id = study_id
        self._is_shared = is_shared
        if is_new and study_id:
            self._mark_orphans()
        self._files = Home(store.home).study(study)
        self._session = session
        self._folder = _make_folder(self._files.spool / session)
        self._deliveries: dict[int, Delivery] = {}
        self._sender = Sender()
        self._summary_id: str | None = None
        atexit.register(self.close)

    def _mark_orphans(self) -> None:
        client = self.store.client
        with explained(self.store.uri):
            runs = search_runs(client, self.experiment_id, "")
            for run in runs:
                if run.data.tags.get("hpo.kind") in ("trial", "study") and not is_of_study(run, self._study_id):
                    orphaned = {ORPHANED_TAG: "its study's database is gone", "hpo.state": "orphaned"}
                    self.store.set_tags(run.info.run_id, orphaned)

    def trial_run(
        self, number: int, *, params: Mapping[str, Any], attempt: int = 1, tags: Mapping[str, str] | None = None
    ) -> TrialRun:
        """The run of a trial: a new one, or after an interruption the one it had. Returns at once."""
        run = TrialRun(self._delivery(number), self._sender)
        texts = {name: _as_text(value) for name, value in params.items()}
        exact = {PARAMETERS_TAG: _exact(params)}
        run.start(texts, {**self._source_tags, **(tags or {}), **self._study_tags, **exact, ATTEMPT_TAG: str(attempt)})
        return run

    @property
    def _study_tags(self) -> dict[str, str]:
        return {STUDY_ID_TAG: self._study_id} if self._study_id else {}

    def remove_file(self, number: int, path: str) -> None:
        """Delete a file from the artifacts of a trial that has ended. Returns at once."""
        TrialRun(self._delivery(number), self._sender).remove_file(path)

    def abandon(self, number: int) -> None:
        """Tell nothing more of a trial that another session has taken over."""
        self._deliveries.pop(number).abandon()

    def summary_run(self) -> SummaryRun:
        """The study's summary, RUNNING until it is finished; found again when a study is resumed."""
        client = self.store.client
        with explained(self.store.uri):
            found = search_runs(client, self.experiment_id, "tags.`hpo.kind` = 'study'", self._study_id)
            if found:
                self._summary_id = found[0].info.run_id
                client.update_run(self._summary_id, status="RUNNING")
                self.store.set_tags(self._summary_id, {"hpo.state": "running"})
            else:
                tags = {**self._source_tags, **self._study_tags, "hpo.kind": "study", "hpo.study": self.study}
                tags["hpo.state"] = "running"
                run = client.create_run(self.experiment_id, tags=tags, run_name="study summary")
                self._summary_id = run.info.run_id
        return SummaryRun(self.store, self._summary_id)

    def missing(self, numbers: Collection[int]) -> list[int]:
        """Those of the trials that MLflow has no run of, and that do not wait in a spool: somebody deleted them."""
        with explained(self.store.uri):
            runs = search_runs(self.store.client, self.experiment_id, "tags.`hpo.kind` = 'trial'", self._study_id)
        known = {run.data.tags.get(TRIAL_TAG) for run in runs}
        return [number for number in numbers if str(number) not in known and self.has_arrived(number)]

    def mark_front(self, numbers: Collection[int]) -> None:
        """Say of each trial's run whether it is on the Pareto front, in the tag `hpo.front`: `yes`, or none."""
        client = self.store.client
        with explained(self.store.uri):
            for run in search_runs(client, self.experiment_id, "tags.`hpo.kind` = 'trial'", self._study_id):
                is_on_front = int(run.data.tags[TRIAL_TAG]) in numbers
                if is_on_front and FRONT_TAG not in run.data.tags:
                    self.store.set_tags(run.info.run_id, {FRONT_TAG: "yes"})
                elif not is_on_front and FRONT_TAG in run.data.tags:
                    self.store.delete_tag(run.info.run_id, FRONT_TAG)

    def recover(
        self,
        living: Callable[[], Collection[str]] = tuple,
        owners: Callable[[], Mapping[int, str]] = dict,
    ) -> None:
        """Clean up after sessions that died: send what they left in spools, end as KILLED what they left RUNNING.

        `living` gives the sessions that are left alone, and `owners` the session of each trial that runs; both are
        asked after what they judge was listed, so that a session or a trial that begins meanwhile is seen.
        """
        folders = list(self._files.spool.iterdir())
        alive = {*living(), self._session}
        for folder in folders:
            if folder.name == self._session or folder.name not in alive:
                self._recover_folder(folder)
        client = self.store.client
        with explained(self.store.uri):
            runs = search_runs(client, self.experiment_id, "attributes.status = 'RUNNING'")
            alive = {*living(), self._session}
            running = {str(number) for number, owner in owners().items() if owner in alive}
            for run in runs:
                if has_owner(run):
                    continue
                is_summary = run.data.tags.get("hpo.kind") == "study"
                is_ours = run.info.run_id == self._summary_id
                if run.data.tags.get(TRIAL_TAG) not in running and not (is_summary and (is_ours or len(alive) > 1)):
                    self.store.set_tags(run.info.run_id, {"hpo.state": "interrupted"})
                    client.set_terminated(run.info.run_id, "KILLED")
        end_dead_runs(self.store, self.experiment_id)

    def _recover_folder(self, folder: Path) -> None:
        ours = {delivery.spool.path for delivery in self._deliveries.values()}
        for path in sorted(set(folder.glob("trial-*.jsonl")) - ours):
            delivery = self._new_delivery(path)
            self._interrupt_if_open(delivery)
            self._sender.put(delivery)
        self.flush()
        if folder != self._folder:
            _remove_if_empty(folder)

    def has_arrived(self, number: int) -> bool:
        """Whether MLflow has all that was written in this home of a trial that has ended."""
        return not self._files.is_spooled(number)

    def _interrupt_if_open(self, delivery: Delivery) -> None:
        if not delivery.spool.has_ended():
            TrialRun(delivery, self._sender).finish("interrupted", reason="the search ended before the trial did")

    def _delivery(self, number: int) -> Delivery:
        if number not in self._deliveries:
            self._deliveries[number] = self._new_delivery(self._files.spool_file(self._session, number))
        return self._deliveries[number]

    def _new_delivery(self, path: Path) -> Delivery:
        number = int(path.stem.removeprefix("trial-"))
        about = self.store, self.experiment_id, number, self.metric
        return Delivery(*about, Spool(path), self._study_id, is_shared=self._is_shared)

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Send all that is not sent yet; whether all of it arrived."""
        return self._sender.flush(timeout_s)

    def close(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> None:
        """End open trials as interrupted and send what is left; what does not arrive stays for the next search."""
        atexit.unregister(self.close)
        try:
            for delivery in self._deliveries.values():
                self._interrupt_if_open(delivery)
        finally:
            arrived = self._sender.close(timeout_s)
        if not arrived:
            _logger.warning(
                "MLflow at %s did not accept everything; the rest waits in %s and is sent by the next search of '%s'.",
                without_password(self.store.uri),
                self._folder,
                self.study,
            )
        _remove_if_empty(self._folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Who has pressed Ctrl-C twice is in a hurry; what does not arrive stays for the next search.
        self.close(_HURRIED_FLUSH_TIMEOUT_S if kind is KeyboardInterrupt else _FLUSH_TIMEOUT_S)


class TrialRun:
    """The run of one trial. Every call writes to the spool on disk and returns; a thread sends it on."""

    def __init__(self, delivery: Delivery, sender: Sender) -> None:
        self._delivery = delivery
        self._sender = sender

    def start(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        self._write({"start": {"params": params, "tags": tags}}, now=True)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Something that the trial has turned out to be."""
        self._write({"tags": tags})

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """One row of every curve. An epoch that was logged before, by an earlier attempt, is not logged again."""
        self._write({"epoch": epoch, "metrics": {key: float(value) for key, value in metrics.items()}})

    def log_file(self, path: Path, folder: str | None = None) -> None:
        """Copy a file to the run's artifacts, into `folder`; it must stay as it is until `flush` has said True."""
        self._write({"file": str(path.absolute()), "folder": folder})

    def remove_file(self, path: str) -> None:
        """Delete a file from the run's artifacts, where it is there."""
        self._write({"remove": path}, now=True)

    def log_text(self, text: str, name: str) -> None:
        """Add a text to the run's artifacts, as the file `name`."""
        self._write({"text": text, "name": name})

    def flush(self, timeout_s: float = _FLUSH_TIMEOUT_S) -> bool:
        """Send all that is not sent yet; whether all of it arrived."""
        return self._sender.flush(timeout_s)

    def finish(
        self,
        state: EndState,
        *,
        value: float | None = None,
        reason: str | None = None,
        costs: Mapping[str, float] | None = None,
    ) -> None:
        """How the trial ended, its best value, its costs and, in words for the user, why it ended like this.

        NaN takes back the value of a trial that had one when it was pruned, and can win no longer.
        """
        self._write({"end": {"state": state, "value": value, "reason": reason, "costs": dict(costs or {})}}, now=True)

    def _write(self, event: Event, *, now: bool = False) -> None:
        self._delivery.spool.append(event)
        self._sender.put(self._delivery, now=now)


class SummaryRun:
    """A run that is not a trial's: the summary of a study, or a training, a rerun or a checklist of its own.

    Its calls go to MLflow directly and raise StoreError if it does not take them.
    """

    def __init__(self, store: TrackingStore, run_id: str) -> None:
        self.run_id = run_id
        self._store = store
        self._client = store.client

    def log_dict(self, data: Mapping[str, Any], name: str) -> None:
        """Add data to the artifacts, as JSON or YAML by the ending of `name`."""
        with explained(self._store.uri):
            self._client.log_dict(self.run_id, dict(data), name)

    def log_text(self, text: str, name: str) -> None:
        with explained(self._store.uri):
            self._client.log_text(self.run_id, text, name)

    def log_file(self, path: Path, folder: str) -> None:
        """Copy a file to the run's artifacts, into `folder`."""
        with explained(self._store.uri):
            self._client.log_artifact(self.run_id, str(path), folder)

    def log_figure(self, name: str, figure: Figure) -> None:
        """Add a figure to the artifacts: `log_figure("plots/history.png", plot_history(...))`."""
        with explained(self._store.uri):
            self._client.log_figure(self.run_id, figure, name)

    def log_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        """One row of every curve."""
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        with explained(self._store.uri):
            rows = [Metric(name, value, now_ms, epoch) for name, value in metrics.items()]
            self._client.log_batch(self.run_id, metrics=rows)

    def log_metrics(self, metrics: Mapping[str, float]) -> None:
        """Single values, such as `best/accuracy` and `test/accuracy`; those that the run has already are left out."""
        with explained(self._store.uri):
            known = self._client.get_run(self.run_id).data.metrics
            for key, value in metrics.items():
                if known.get(key) != value:
                    self._client.log_metric(self.run_id, key, value)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self._store.set_tags(self.run_id, tags)

    def set_note(self, markdown: str) -> None:
        """The description that the UI shows on the run's page."""
        self.set_tags({"mlflow.note.content": markdown})

    def finish(self, state: Literal["complete", "failed", "interrupted"]) -> None:
        self.set_tags({"hpo.state": state})
        with explained(self._store.uri):
            self._client.set_terminated(self.run_id, RUN_STATUS[state])


def begin_run(
    store: TrackingStore,
    study: str,
    kind: str,
    note: str,
    *,
    tags: Mapping[str, str] | None = None,
    params: Mapping[str, Any] | None = None,
) -> SummaryRun:
    """A new run, RUNNING until it is finished, for a check or a training: there need be no study of that name.

    Such runs that processes which were killed have left RUNNING in the experiment are ended.
    """
    from mlflow.tracking.context.registry import resolve_tags

    described = {} if study in store.studies() else {"mlflow.note.content": note}  # a study has a note of its own
    experiment_id = store.open_experiment(study, {"hpo.study": study, **described})
    end_dead_runs(store, experiment_id)
    with explained(store.uri):
        described = {**resolve_tags(), **(tags or {}), "hpo.kind": kind, "hpo.study": study, "hpo.state": "running"}
        described |= {PROCESS_TAG: this_process(), PARAMETERS_TAG: _exact(params or {})}
        run = store.client.create_run(experiment_id, tags=described, run_name=kind)
        for name, value in (params or {}).items():
            store.client.log_param(run.info.run_id, name, _as_text(value))
    return SummaryRun(store, run.info.run_id)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # what MLflow did not take stays for the next search
        folder.rmdir()


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"cannot write to {path}: {error.strerror}; choose another folder with --home.") from error
    return path


def _as_text(value: Any) -> str:
    """As MLflow's table has room for it: of 2.118234561e-05 it would show 2.11823456. PARAMETERS_TAG has all digits."""
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= MAX_PARAM else f"{text[: MAX_PARAM - 40]}... ({len(text)} characters)"


def _exact(params: Mapping[str, Any]) -> str:
    """All parameters as JSON; long texts are shortened, because MLflow cuts a tag off after 8 000 characters."""
    is_long = {name: len(str(value)) > MAX_PARAM for name, value in params.items()}
    return json.dumps({name: _as_text(value) if is_long[name] else value for name, value in params.items()})
