"""How fast a network trains, and what it needs of memory, by batch size."""

from __future__ import annotations

import time

import torch
from torch.autograd.graph import saved_tensors_hooks

from hpo.checks.verdicts import Subject, Verdict
from hpo.errors import DeviceMemoryError
from hpo.parameters import Choice
from hpo.training.device import wait_for
from hpo.training.optimizers import build_optimizer
from hpo.training.precision import settle_precision
from hpo.training.step import TrainingStep

MEASURING_S = 0.5
MAX_SIZES = 6


def check_speed(subject: Subject) -> Verdict:
    sizes = _batch_sizes(subject)
    rates, memory, refused = [], [], []
    for size in sizes:
        try:
            rate, need = size / seconds_a_step(subject, size, MEASURING_S), _memory_of_step(subject, size)
            rates.append(rate)
            memory.append(need)
        except DeviceMemoryError:
            refused.append(size)
    measured = sizes[: len(rates)]
    figures = zip(measured, rates, memory, strict=True)
    text = ", ".join(f"{size}: {rate:,.0f}/s {_describe(need)}" for size, rate, need in figures)
    labels = [_describe(need) for need in memory]
    data = {"batch_sizes": measured, "examples_a_second": rates, "bytes": memory, "memory": labels}
    if refused:
        advice = f"batches of {refused[0]} do not fit into memory: allow smaller ones only, or a smaller network"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _describe(num_bytes: int) -> str:
    return f"{num_bytes / 1e3:,.0f} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:,.0f} MB"


def _batch_sizes(subject: Subject) -> list[int]:
    """The sizes that a search may draw, a few at most; powers of two around the task's own if it has one."""
    parameter, own = subject.task.space.parameters.get("batch_size"), subject.config.batch_size
    if isinstance(parameter, Choice):
        sizes = {int(size) for size in parameter.choices}
    elif parameter is not None and not parameter.is_fixed:
        low, high = (int(end) for end in parameter.extremes())
        sizes = {round(low * (high / low) ** (part / 4)) for part in range(5)}
    else:
        sizes = {max(1, own // 4), own, own * 4}
    return sorted(size for size in sizes if size <= len(subject.splits.train))[-MAX_SIZES:]


def seconds_a_step(subject: Subject, batch_size: int, at_least_s: float = 0.0) -> float:
    """Seconds that a training step takes, after one that is not counted; the quickest of a few."""
    step, batch = _step(subject, batch_size), subject.batch(batch_size)
    times: list[float] = []
    step(*batch)
    while len(times) < 2 or sum(times) < at_least_s:
        wait_for(torch.device(subject.config.device))
        started = time.perf_counter()
        step(*batch)
        wait_for(torch.device(subject.config.device))
        times.append(time.perf_counter() - started)
    return min(times)


def _memory_of_step(subject: Subject, batch_size: int) -> int:
    """Peak bytes on a GPU; on a CPU, what the forward pass keeps for the backward pass, and the weights."""
    step, batch = _step(subject, batch_size), subject.batch(batch_size)
    if subject.config.device != "cpu":
        step(*batch)
        torch.cuda.reset_peak_memory_stats(subject.config.device)
        step(*batch)
        return torch.cuda.max_memory_allocated(subject.config.device)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        step(*batch)
    return sum(kept.values())


def _step(subject: Subject, batch_size: int) -> TrainingStep:
    model = subject.network().train()
    loss = subject.loss_of(model)
    precision = settle_precision(subject.config.precision, model, loss, lambda: subject.batch(batch_size))
    return TrainingStep(model, loss, build_optimizer(model, subject.config, model.own), precision=precision)
