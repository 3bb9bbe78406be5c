"""A worker: runs the trials it is given, reports each epoch and follows the answer."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import platform
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import cloudpickle
import torch
from torch import Tensor, nn

from hpo.config import TrainConfig, derive_seed
from hpo.data.batches import place
from hpo.data.datasets import Splits, all_examples, folds, load_splits
from hpo.data.examples import DataSpec
from hpo.errors import DeviceMemoryError, HpoError, SearchError, UsageError, in_one_line, place_of
from hpo.execution.followers import SETTLE_S, Followers, join
from hpo.execution.messages import (
    Alive,
    Assignment,
    Decision,
    EpochDone,
    LogLine,
    Message,
    Setup,
    TrialDone,
    TrialInfeasible,
    TrialRaised,
    WorkerUnfit,
    encode,
)
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.objective import Objective
from hpo.parameters import Value
from hpo.plugins import load_objective
from hpo.sources import source_checksums
from hpo.training.checkpoint import CheckpointFolder, save_weights
from hpo.training.costs import measure_costs
from hpo.training.cross_validation import fit_folds
from hpo.training.device import free_memory, limit_memory, prepare_deterministic_products
from hpo.training.distributed import ALONE, Ranks
from hpo.training.evaluation import choose_thresholds, has_thresholds
from hpo.training.loop import RunningTrial, run_loop
from hpo.training.trained import BEST_WEIGHTS, TrialDescription
from hpo.training.trainer import EpochResult, fit

_logger = logging.getLogger(__name__)

SIGNS_OF_LIFE = 3  # in the time after which a silent worker counts as dead


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def serve(connection: Connection, setup: Setup, followers: Sequence[Connection] = ()) -> None:
    """Run one trial after another until the connection closes; the one entry point of every worker, wherever it runs.

    A trial that raises is the last one: what it has left behind, on a GPU above all, must not harm the next.
    `followers` leads to the other processes of a worker that trains on several GPUs; they run this function, too.
    """
    torch.set_num_threads(setup.num_threads)
    _keep_freed_memory()
    line = _Line(connection, setup.silence_s)
    if setup.rank == 0:
        _forward_log(line)
    others = Followers(followers, line.say, setup.silence_s)

    def report(result: EpochResult) -> Decision:
        if setup.rank > 0:
            return line.decision()
        decision = line.ask(EpochDone(_with_threads(result, setup.num_ranks)))
        others.tell({"decision": decision.value})
        return decision

    try:
        if setup.gpu_share < 1:
            limit_memory(setup.gpu_share)
        ranks = join(setup, others, line.hear)
        objective = _load_task(setup)
        data = TrialData(load_splits(setup.splits)) if setup.splits else None
    except (HpoError, OSError) as error:
        line.say(WorkerUnfit(str(error)))
        return
    line.say(Alive())  # whoever dies from here on dies of its trial
    for given in line.assignments():
        assignment = replace(given, sources=setup.sources)
        others.tell({"assignment": assignment.to_dict()})
        try:
            done = _run(assignment, objective, data, report, ranks)
        except InfeasibleError as error:
            line.say(TrialInfeasible(str(error)))
            continue
        except (
            Exception,
            SystemExit,
        ) as error:  # the model and the data are the user's: whatever they raise ends this trial only
            if ranks.size > 1:
                time.sleep(SETTLE_S)
            line.say(TrialRaised(f"{type(error).__name__}: {error}{place_of(error)}", traceback.format_exc()))
            return
        line.say(done)


def _load_task(setup: Setup) -> Objective:
    """The task, by its reference or out of its pickle. Raises UsageError if either cannot be imported."""
    if setup.objective is None:
        return load_objective(setup.task_reference)
    sys.path.extend(folder for folder in setup.import_path if folder not in sys.path)
    try:
        objective: Objective = cloudpickle.loads(setup.objective)
    except Exception as error:  # it imports what user code needs
        raise UsageError(f"the task cannot be read from its pickle: {in_one_line(error)}") from error
    return objective


def _with_threads(result: EpochResult, num_ranks: int) -> EpochResult:
    """The result and the threads, and processes, that it was computed with: a sum in another order is another one in
    the last digit."""
    settled = {**result.settled, "threads": str(torch.get_num_threads())}
    return replace(result, settled=settled if num_ranks == 1 else {**settled, "processes": str(num_ranks)})


def _run(
    assignment: Assignment,
    objective: Objective,
    data: TrialData | None,
    report: Callable[[EpochResult], Decision],
    ranks: Ranks,
) -> TrialDone:
    """A trial by the shared trainer, or by the task's own loop."""
    if data is None:
        return _run_own_loop(assignment, objective, report)
    return TrialDone(run_with_data(assignment, objective, data, report, ranks=ranks))


def _run_own_loop(assignment: Assignment, objective: Objective, report: Callable[[EpochResult], Decision]) -> TrialDone:
    decision = Decision.CONTINUE

    def continues(result: EpochResult) -> bool:
        nonlocal decision
        decision = report(result)
        return decision is Decision.CONTINUE

    trial = RunningTrial(
        objective,
        assignment.number,
        assignment.model_parameters,
        assignment.config,
        assignment.folder,
        continues,
        sources=assignment.sources,
    )
    run_loop(trial)
    return TrialDone(has_weights=decision is not Decision.LEAVE and trial.conclude())


def _keep_freed_memory() -> None:
    """Let this process keep up to 1 GB that it has freed, for the next tensor of that size.

    glibc gives every large tensor back to the system at once and gets it again, page by page, for the next: with the
    small conv net of CIFAR-10 and batches of 256, a sixth to a quarter of the time in fp32 (torch 2.15, one core).
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**30)


class _Line:
    """The worker's end of the connection. When the other end is gone, so is the process: nobody would hear of it."""

    def __init__(self, connection: Connection, silence_s: float) -> None:
        self._connection = connection
        self._interval_s = silence_s / SIGNS_OF_LIFE
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="hpo-line", daemon=True).start()

    def say(self, message: Message) -> None:
        try:
            with self._sending:
                self._connection.send_bytes(encode(message))
        except OSError:
            _leave()

    def ask(self, message: EpochDone) -> Decision:
        self.say(message)
        return self.decision()

    def hear(self) -> dict[str, Any]:
        """What the other end says next."""
        return self._inbox.get()

    def decision(self) -> Decision:
        return Decision(self.hear()["decision"])

    def assignments(self) -> Iterator[Assignment]:
        while True:
            yield Assignment.from_dict(self.hear()["assignment"])

    def _listen(self) -> None:
        try:
            while True:
                if self._connection.poll(self._interval_s):
                    self._inbox.put(json.loads(self._connection.recv_bytes()))
                else:
                    self.say(Alive())
        except (EOFError, OSError):
            _leave()


def _leave() -> NoReturn:
    """End the process at once, within an epoch: its checkpoints are whole, and the trial continues elsewhere."""
    os._exit(0)


def _forward_log(line: _Line) -> None:
    """Let the user read what hpo logs here, such as a damaged checkpoint that was passed over."""

    class Forward(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line.say(LogLine(record.levelno, record.getMessage()))

    logger = logging.getLogger("hpo")
    logger.handlers[:] = [Forward()]
    logger.propagate = False


class InfeasibleError(HpoError):
    """A model costs more than was allowed."""


@dataclass
class TrialData:
    """The splits that a worker's trials share, where the last trial has left them."""

    splits: Splits


def run_with_data(
    assignment: Assignment,
    objective: Objective,
    data: TrialData,
    report: Callable[[EpochResult], Decision],
    *,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Run a trial with its data on the device, where they stay for the next one, if there is room for them.

    If the device's memory does not hold both the trial and the data that were placed there, they are taken off it, and
    the trial continues from its checkpoint with streamed data. The next trial places them again. With several ranks it
    raises, because the others would wait.
    """
    device = torch.device(assignment.config.device)
    if assignment.config.deterministic:
        prepare_deterministic_products()
    if not assignment.folds:
        data.splits = place(data.splits, device)
    try:
        return run_trial(assignment, objective, data.splits, report, ranks=ranks)
    except (DeviceMemoryError, torch.OutOfMemoryError):
        places_its_folds = assignment.folds and device.type == "cuda"
        if ranks.size > 1 or not (data.splits.train.device.type == "cuda" or places_its_folds):
            raise
    # Out here the failed attempt's tensors are gone.
    _logger.warning("the device's memory cannot hold the trial and its data; this trial continues with streamed data")
    if data.splits.train.device.type == "cuda":
        data.splits = data.splits.to("cpu")
    free_memory(device)
    return run_trial(assignment, objective, data.splits, report, is_streamed=True)


def run_trial(
    assignment: Assignment,
    objective: Objective,
    splits: Splits,
    report: Callable[[EpochResult], Decision],
    *,
    is_streamed: bool = False,
    ranks: Ranks = ALONE,
) -> dict[str, float]:
    """Train until the trainer ends or `report` says so; the costs of the model that the assignment asks for.

    Raises InfeasibleError if the model costs more than the assignment allows.

    A trial that was begun before continues from its checkpoint. Unless it is left to be continued, its folder then has
    the weights of the best epoch (`best.pt`) and all that is needed to rebuild the model (`trial.json`); but not with
    folds, where each had a model of its own. With several `ranks` the first one alone writes, and only what it
    measures counts.
    """
    config = assignment.config
    if ranks.size > 1:
        config = replace(config, compile="off")
    if assignment.num_examples:
        splits = replace(splits, train=splits.train.select(slice(0, assignment.num_examples)))
    build = partial(_build, objective, assignment.model_parameters)
    if assignment.limits:
        _check_costs(assignment, build, splits, ranks)
    if assignment.folds:
        each_fold = folds(splits, assignment.folds)
        results = fit_folds(
            build, each_fold, config, checkpoints=assignment.folder, is_streamed=is_streamed, ranks=ranks
        )
    else:
        model = build(splits, config)
        checkpoint = CheckpointFolder(assignment.folder)
        results = fit(model, splits, config, checkpoint=checkpoint, is_streamed=is_streamed, ranks=ranks)
    # Closed before the weights are saved: it is then that the model gets those of the best epoch.
    with closing(results):
        for result in results:
            decision = report(result)
            if decision is Decision.LEAVE:
                return {}
            if decision is Decision.STOP:
                break
    if result.best_epoch is None or result.best_value is None or not ranks.leads:
        return {}
    if not assignment.folds:
        if has_thresholds(splits.spec, config):
            choose_thresholds(model, splits.validation, config)
        _save(model, assignment, objective, splits.spec, result.best_epoch, result.best_value)
    elif assignment.costs:
        model = build(splits, config)
    else:
        return {}
    return measure_costs(model, splits.train.first(1, config.device)[0], assignment.costs)


def _check_costs(
    assignment: Assignment, build: Callable[[Splits, TrainConfig], PreprocessedModel], splits: Splits, ranks: Ranks
) -> None:
    """Raise InfeasibleError, in all ranks or in none, if an untrained model costs more than is allowed.

    One that is resumed was looked at.
    """
    if any(assignment.folder.glob("**/epoch-*.pt")):
        return
    config = assignment.config
    model = build(splits, config).eval()
    example = splits.train.first(1, config.device)[0]
    costs = ranks.agreed(measure_costs(model, example, assignment.limits))
    limits = assignment.limits.items()
    broken = [f"{name} is {costs[name]:.6g}, above {most:.6g}" for name, most in limits if costs[name] > most]
    if broken:
        raise InfeasibleError(" and ".join(broken))


def refit(
    assignment: Assignment,
    objective: Objective,
    splits: Splits,
    *,
    num_epochs: int,
    value: float,
    thresholds: Tensor | None = None,
) -> None:
    """Train on all examples, with nothing left to judge by: for as many epochs as the folds needed, who gave `value`.

    The folder then holds what that of a trial without folds does. `thresholds` are those of several labels that the
    trial's model has from its validation split. Raises SearchError if the training diverges.
    """
    config = assignment.config
    # What is measured after each epoch are the training examples; a `plateau` schedule goes by them.
    examples = all_examples(splits)
    everything = Splits(examples, examples, splits.spec)
    model = _build(objective, assignment.model_parameters, everything, config)
    for result in fit(model, everything, config, num_epochs=num_epochs):
        if result.diverged:
            raise SearchError(
                f"trial {assignment.number}, the winner, diverged when it was trained on all examples; "
                "search again with smaller learning rates: -p lr=LOW:HIGH in a new --study."
            )
    if thresholds is not None:
        model.get_buffer("thresholds").copy_(thresholds)
    _save(model, assignment, objective, splits.spec, num_epochs, value)


def _build(
    objective: Objective, parameters: Mapping[str, Value], splits: Splits, config: TrainConfig
) -> PreprocessedModel:
    """The model as a training begins with it."""
    model = build_model(objective, splits.spec, parameters, seed=derive_seed(config.seed, "initialisation"))
    model = model.to(config.device)
    model.fit_statistics(splits.train)
    return model


def _save(
    model: nn.Module, assignment: Assignment, objective: Objective, spec: DataSpec, best_epoch: int, best_value: float
) -> None:
    TrialDescription(
        trial=assignment.number,
        spec=spec,
        model_parameters=assignment.model_parameters,
        config=assignment.config,
        best_epoch=best_epoch,
        best_value=best_value,
        sources=assignment.sources or source_checksums(objective),
        weights_sha256=save_weights(model.state_dict(), assignment.folder / BEST_WEIGHTS),
    ).write(assignment.folder)
