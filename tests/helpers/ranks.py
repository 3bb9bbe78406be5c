"""Trainings in two processes that share each batch, as on two GPUs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import distributed

from helpers.kinds import CASES
from helpers.training import trained
from hpo.config import TrainConfig
from hpo.data.datasets import split_dataset
from hpo.execution import local
from hpo.models.preprocessed import build_model
from hpo.objective import Objective
from hpo.training.distributed import Ranks, join_ranks
from hpo.training.trainer import fit


def in_ranks(function: Callable[..., Any], *args: Any, size: int = 2) -> list[Any]:
    """What `function(ranks, *args)`, of a module that imports little, returns in each of the processes."""
    local.warm_up()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    lines = [local.process_context().Pipe() for _ in range(size)]
    with local._main_module_hidden():
        for rank, (_, theirs) in enumerate(lines):
            task = (theirs, port, rank, size, function, args)
            local.process_context().Process(target=_run, args=task, daemon=True).start()
            theirs.close()
    found = [ours.recv() for ours, _ in lines]
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found


def _run(line: Any, port: int, rank: int, size: int, function: Callable[..., Any], args: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    store = distributed.TCPStore("127.0.0.1", port, size, is_master=rank == 0)  # type: ignore[attr-defined]
    ranks = join_ranks(store, rank, size)
    try:
        line.send(function(ranks, *args))
    except Exception as error:
        line.send(error)
        raise
    distributed.barrier()


def trained_all(
    ranks: Ranks, cases: dict[str, dict[str, Any]], kinds: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`trained` for each case, and `trained_kind` for each kind."""
    return {name: trained(ranks, changes) for name, changes in cases.items()}, {
        kind: trained_kind(ranks, kind) for kind in kinds
    }


def trained_kind(ranks: Ranks, name: str) -> list[dict[str, float]]:
    """The metrics of each epoch of a training on a kind of data, in batches of an odd number."""
    case = CASES[name]
    objective = Objective(
        name="kind", description="", load=lambda _: case.data, model=case.model, loss=case.loss,
        metric=case.metric, metrics=dict(case.metrics),
    )  # fmt: skip
    judged_by: dict[str, Any] = objective.judged_by
    config = TrainConfig(
        max_epochs=2, batch_size=15, lr=0.01, optimizer="sgd", precision="fp32", compile="off",
        **judged_by, **case.settings,
    )  # fmt: skip
    splits = split_dataset(case.data, seed=0)
    without_dropout = {"dropout": 0.0} if "dropout" in objective.model_parameters() else {}
    model = build_model(objective, splits.spec, case.parameters | without_dropout, seed=0)
    model.fit_statistics(splits.train)
    return [result.metrics for result in fit(model, splits, config, ranks=ranks)]
