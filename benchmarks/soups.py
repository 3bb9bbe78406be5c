"""Whether averaging the weights of trained models helps: `python benchmarks/soups.py digits --seeds 5`.

Each search is confirmed, and the kept models of one architecture, those of the best trials and of the best repeats,
are averaged in two ways of Wortsman et al. 2022 (arXiv:2203.05482): all of them, and greedily, where a model stays if
the average is no worse with it. Batch norms count the training examples again. What is chosen on one half of the
validation split is judged on the other half, and the other way round. An ensemble, which averages answers, is shown
beside them. The data sets are found by HPO_DATA_DIR.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from copy import deepcopy
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from machine import describe_machine
from torch import Tensor, nn

from hpo import load_best, run_search
from hpo.data.examples import Split
from hpo.errors import CheckpointError, StoreError
from hpo.session.export import choose, load_with_data
from hpo.training.ensembles import estimate_gain

BATCH_SIZE = 500
NUM_FOR_STATISTICS = 5000


def outputs_of(model: nn.Module, split: Split) -> Tensor:
    """Logits of all examples."""
    with torch.inference_mode():
        starts = range(0, len(split), BATCH_SIZE)
        batches = (split.select(slice(at, at + BATCH_SIZE)).in_memory().inputs for at in starts)
        return torch.cat([model(batch) for batch in batches])


def soup(models: Sequence[nn.Module], train: Split) -> nn.Module:
    """One network with the mean of the weights, whose batch norms have seen the training examples."""
    mixed = deepcopy(models[0])
    states = [model.state_dict() for model in models]
    mixed.load_state_dict(
        {
            name: torch.stack([state[name] for state in states]).mean(0) if value.is_floating_point() else value
            for name, value in states[0].items()
        }
    )
    norms = [each for each in mixed.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    if norms:
        outputs_of(mixed, train.select(slice(0, NUM_FOR_STATISTICS)))
    return mixed.eval()


def greedy(ordered: Sequence[int], judge: Callable[[Sequence[int]], float]) -> list[int]:
    """The members of a greedy soup of models, of which the best comes first; `judge` says what a soup's loss is."""
    chosen = [ordered[0]]
    best = judge(chosen)
    for number in ordered[1:]:
        if (loss := judge([*chosen, number])) <= best:
            chosen, best = [*chosen, number], loss
    return chosen


def architecture(model: nn.Module) -> list[object]:
    """What two models must have in common to be averaged."""
    layers: list[object] = [type(layer) for layer in model.modules()]
    return layers + [value.shape for value in model.state_dict().values()]


def measure(task: str, seed: int, given: argparse.Namespace) -> list[float]:
    """Members of one architecture, and in points of accuracy what all, a greedy soup and an ensemble gain."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        found = run_search(
            task, trials=given.trials, epochs=given.epochs, limit=given.limit, seed=seed, confirm="quick", keep=30,
            workers=given.workers, home=home, overrides=given.overrides,
        )  # fmt: skip
        models = {}
        for number in range(len(found.trials)):
            with suppress(StoreError, CheckpointError):  # its weights were not kept
                models[number] = load_best(task, trial=number, home=home)
        _, splits, _ = load_with_data(choose(task, trial=None, home=home))
    assert found.winner is not None, "a trial has a result"
    winner, validation = found.winner.trial, splits.validation
    targets = validation.in_memory().targets
    alike = {n: model for n, model in models.items() if architecture(model) == architecture(models[winner])}
    outputs = {number: outputs_of(model, validation) for number, model in models.items()}
    of_soup: dict[tuple[int, ...], Tensor] = {}

    def mixed(members: Sequence[int]) -> Tensor:
        key = tuple(sorted(members))
        if key not in of_soup:
            of_soup[key] = outputs_of(soup([alike[n] for n in key], splits.train), validation)
        return of_soup[key]

    def loss(answers: Tensor, rows: Tensor) -> float:
        return float((answers.argmax(1) != targets[rows]).double().mean())

    def gain(members: Sequence[int], rows: Tensor) -> float:
        return loss(outputs[winner][rows], rows) - loss(mixed(members)[rows], rows)

    def greedy_gain(chosen_on: Tensor, judged_on: Tensor) -> float:
        ordered = sorted(alike, key=lambda n: loss(outputs[n][chosen_on], chosen_on))
        return gain(greedy(ordered, lambda some: loss(mixed(some)[chosen_on], chosen_on)), judged_on)

    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    one, other = order.chunk(2)
    of_greedy = (greedy_gain(one, other) + greedy_gain(other, one)) / 2
    of_all = gain(list(alike), order)
    of_ensemble = estimate_gain(outputs, winner, loss, "classification", seed=seed)
    return [len(alike), 100 * of_all, 100 * of_greedy, len(models), 100 * of_ensemble]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("-p", dest="overrides", action="append", default=[], metavar="NAME=VALUES")
    given = parser.parse_args()
    print(describe_machine("torch"))
    print("seed: models alike; points of accuracy that all of them gain, and a greedy soup; all models, their ensemble")
    rows = []
    for seed in range(given.seeds):
        rows.append(measure(given.task, seed, given))
        print(seed, " ".join(f"{value:.2f}" for value in rows[-1]), flush=True)
    print("mean", " ".join(f"{value:.2f}" for value in np.mean(rows, axis=0)))


if __name__ == "__main__":
    main()
