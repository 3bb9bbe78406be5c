"""Contrastive pre-training without labels, then fine-tuning from its weights with 100 labels (no download).

Run it as a script: it searches the tasks in turn and prints the accuracy with and without the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hpo import Choice, Dataset, DataSpec, Float, Group, Objective, Space, hold_out, load_best, run_search

NUM_LABELLED = 100
LR, FAST = (Float(1e-4, 0.03, log=True, default=default) for default in (3e-3, 1e-2))


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.from_numpy(found.images).to(torch.uint8).unsqueeze(1), torch.from_numpy(found.target)


class Network(nn.Module):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, spec.num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


pretraining = Objective(
    name="pretraining",
    description="digits are found again after they were shifted, without labels",
    load=lambda data_dir: hold_out(digits()[0], None, kind="instances"),
    model=Network,
    loss="info_nce",
    metric="recall_at_1",
    settings={"max_epochs": 40, "patience": 40, "augment": "crop", "temperature": 0.2},
    space=Space(Group("step size", lr=FAST, batch_size=Choice(64, 128, 256, default=128))),
)


def labelled(data_dir: Path) -> Dataset:
    images, labels = digits()
    return hold_out(images, labels, list("0123456789"), test_fraction=1 - NUM_LABELLED / len(labels))


def fine_tuning(body: dict[str, Tensor] | None) -> Objective:
    def model(spec: DataSpec) -> nn.Module:
        network = Network(spec)
        if body:
            network.body.load_state_dict(body)
        return network

    return Objective(
        name="fine_tuning" if body else "from_scratch",
        description="digits from few labels",
        load=labelled,
        model=model,
        settings={"max_epochs": 30},
        space=Space(Group("step size", lr=LR, batch_size=Choice(8, 16, 32, default=16))),
    )


def main(home: Path | None = None, trials: int = 1) -> dict[str, float]:
    run_search(pretraining, trials=trials, home=home)
    body = load_best("pretraining", home=home, task=pretraining).network.body.state_dict()
    tasks = {task.name: task for task in (fine_tuning(body), fine_tuning(None))}
    outcomes = {name: run_search(task, trials=trials, home=home) for name, task in tasks.items()}
    return {name: (outcome.winner.test or {})["accuracy"] for name, outcome in outcomes.items() if outcome.winner}


if __name__ == "__main__":
    print(main())
