"""What other kinds of data cost: `python benchmarks/kinds.py`, on one thread.

    grouped     batches of sequences of similar lengths (the trainer's), against those in random order; both padded
    own loss    `torch.nn.functional.cross_entropy` as a loss of the task's own, against `loss="cross_entropy"`

Both sides of a case train in turn, in one process; it prints the CPU time of an epoch (validation included), the median
over `--epochs` after the first, and the ratio. The texts are WordNet's glosses below HPO_DATA_DIR, the images
scikit-learn's digits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from machine import describe_machine
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

from hpo import Dataset, Objective, Ragged, find_data_dir, hold_out, mlp, recurrent, split_dataset
from hpo.data.batches import TrainingBatches
from hpo.models.preprocessed import build_model
from hpo.task import Task
from hpo.training.trainer import fit

NUM_TEXTS, VOCABULARY, ROUNDS = 1_000, 4_000, 2


def texts() -> Dataset:
    lines = (find_data_dir() / "wordnet" / "glosses.tsv").read_text(encoding="utf-8").splitlines()
    chosen = lines[:: max(1, len(lines) // NUM_TEXTS)]
    words = [line.split("\t")[1].split() for line in chosen]
    kinds = sorted({line.split("\t")[0] for line in chosen})
    ids: dict[str, int] = {}
    sequences = [[ids.setdefault(word, len(ids)) % VOCABULARY for word in text] for text in words]
    targets = torch.tensor([kinds.index(line.split("\t")[0]) for line in chosen])
    return hold_out(Ragged.of(sequences), targets, kinds, vocabulary=VOCABULARY)


def digits() -> Dataset:
    found = load_digits()
    images = torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1)
    return hold_out(images, torch.from_numpy(found.target), [str(digit) for digit in range(10)])


def epochs(data: Dataset, model: Callable[..., Any], loss: Any, num: int) -> Iterator[float]:
    """CPU seconds of each epoch but the first."""
    objective = Objective(name="bench", description="", load=lambda _: data, model=model, loss=loss)
    settings: dict[str, Any] = {"max_epochs": num + 1, "patience": num + 1, "batch_size": 32, "compile": "off"}
    task = Task(reference="bench", objective=objective, space=None)  # type: ignore[arg-type]
    splits = split_dataset(data, seed=0)
    network = build_model(objective, splits.spec, {}, seed=0)
    network.fit_statistics(splits.train)
    begin = time.process_time()
    for result in fit(network, splits, task.train_config({}, **settings)):
        now = time.process_time()
        if result.epoch > 1:
            yield now - begin
        begin = now


def in_random_order(batches: TrainingBatches, order: torch.Tensor) -> torch.Tensor:
    return order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=5)
    num = parser.parse_args().epochs
    torch.set_num_threads(1)
    language, images = texts(), digits()

    def naive() -> list[float]:
        with patch.object(TrainingBatches, "_grouped", in_random_order):
            return list(epochs(language, recurrent, "cross_entropy", num))

    sides: dict[str, dict[str, Callable[[], list[float]]]] = {
        "sequences": {
            "grouped": lambda: list(epochs(language, recurrent, "cross_entropy", num)),
            "random order": naive,
        },
        "loss": {
            "named": lambda: list(epochs(images, mlp, "cross_entropy", 4 * num)),
            "own": lambda: list(epochs(images, mlp, cross_entropy, 4 * num)),
        },
    }
    for case, of_case in sides.items():
        seconds: dict[str, list[float]] = {side: [] for side in of_case}
        for _ in range(ROUNDS):
            for side, run in of_case.items():
                seconds[side] += run()
        (one, first), (other, second) = ((side, statistics.median(found)) for side, found in seconds.items())
        print(f"{case}: {one} {first:.3f} s, {other} {second:.3f} s an epoch; {other} / {one} = {second / first:.2f}")
    print(f"{describe_machine('torch')}, one of them used")


if __name__ == "__main__":
    main()
