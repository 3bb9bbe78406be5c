"""How fast two processes train a model together, against one: an epoch in one process, and in two that meet over gloo.

    python benchmarks/several_gpus.py

The same batches of the same random images (3, 32, 32) are trained, with one thread in each process, in turn, so that
whatever else the machine does falls on both. It prints the seconds of an epoch, the median over the rounds, and how
many times as fast the two are, by the clock and by CPU time. The most is 2. By the clock each process needs a core of
its own; CPU time is what counts on a machine that is busy, but does not show how long a process waits for the other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import socket
import time
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from machine import describe_machine
from torch import distributed

from hpo import DataSpec, TrainConfig
from hpo.data.datasets import Splits
from hpo.data.examples import Split
from hpo.models.mlp import MLP
from hpo.models.networks import convnet
from hpo.training.distributed import Ranks, join_ranks
from hpo.training.trainer import fit

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES = 1024, 256, 10
EPOCHS = 3  # the first is not counted: it measures precisions and fills the optimizer's state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(describe_machine("torch"))
    for name in NETWORKS:
        seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for _ in range(rounds):
            for size, found in seconds.items():
                found += _in_processes(name, size)
        for index, kind in enumerate(("clock", "CPU time")):
            one, two = (median(each[index] for each in seconds[size]) for size in (1, 2))
            print(f"{name:<20} {kind:<8} one {one:6.3f} s, two {two:6.3f} s: {one / two:.2f} times as fast", flush=True)


def _in_processes(name: str, size: int) -> list[tuple[float, float]]:
    """Seconds of each epoch by the clock, and of CPU time in the first process, trained by that many processes."""
    context = multiprocessing.get_context("spawn")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    ours, theirs = context.Pipe()
    processes = [context.Process(target=_train, args=(name, rank, size, port, theirs)) for rank in range(size)]
    for process in processes:
        process.start()
    found: list[tuple[float, float]] = ours.recv()
    for process in processes:
        process.join()
    return found


def _train(name: str, rank: int, size: int, port: int, line: Any) -> None:
    torch.set_num_threads(1)
    ranks = Ranks()
    if size > 1:
        ranks = join_ranks(distributed.TCPStore("127.0.0.1", port, size, is_master=rank == 0), rank, size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (NUM_TRAIN + NUM_VALIDATION, 3, 32, 32), dtype=torch.uint8, generator=generator)
    targets = torch.randint(NUM_CLASSES, (len(images),), generator=generator)
    train, validation = (Split(images[part], targets[part]) for part in (slice(NUM_TRAIN), slice(NUM_TRAIN, None)))
    spec = DataSpec((3, 32, 32), classes=tuple(map(str, range(NUM_CLASSES))))
    network, batch_size = NETWORKS[name]
    config = TrainConfig(max_epochs=EPOCHS, batch_size=batch_size, lr=1e-3, precision="fp32", compile="off")
    torch.manual_seed(0)
    times = []
    for _ in fit(network(spec), Splits(train, validation, spec), config, ranks=ranks):
        times.append((time.perf_counter(), time.process_time()))
    if rank == 0:
        line.send([(end[0] - begin[0], end[1] - begin[1]) for begin, end in pairwise(times)])
    if size > 1:
        distributed.barrier()


class _Scaled(torch.nn.Module):
    """A network for raw uint8 images."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images.float() / 255)


def _convnet(spec: DataSpec) -> torch.nn.Module:
    return _Scaled(convnet(spec, width=32))


def _mlp(spec: DataSpec) -> torch.nn.Module:
    return _Scaled(MLP(spec, depth=4, width=512, activation="relu", norm="batch", dropout=0.0))


NETWORKS = {"conv net, batch 256": (_convnet, 256), "conv net, batch 32": (_convnet, 32), "MLP, batch 256": (_mlp, 256)}


if __name__ == "__main__":
    main()
