"""Draws docs/schedules.svg: the learning rate of each schedule with its default settings, over 20 epochs.

python benchmarks/schedules.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch

from hpo.config import TrainConfig
from hpo.methods import SCHEDULES
from hpo.training.optimizers import build_optimizer
from hpo.training.schedules import Plateau, build_schedule

NUM_EPOCHS, STEPS_AN_EPOCH = 20, 10
LAST_IMPROVEMENT = 6  # the last epoch in which plateau's metric improves


def rates(schedule: str) -> list[float]:
    """The rate of each step, as a share of the peak."""
    config = TrainConfig(schedule=schedule, lr=1.0, optimizer="sgd", max_epochs=NUM_EPOCHS, warmup_fraction=0.1)
    optimizer = build_optimizer(torch.nn.Linear(1, 1), config)
    curve = build_schedule(optimizer, config, NUM_EPOCHS * STEPS_AN_EPOCH)
    drawn = []
    for epoch in range(NUM_EPOCHS):
        for _ in range(STEPS_AN_EPOCH):
            drawn.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            curve.step()
        if isinstance(curve, Plateau):
            curve.end_epoch(min(epoch + 1, LAST_IMPROVEMENT))
    return drawn


def main() -> None:
    plt.rcParams |= {"svg.hashsalt": "schedules", "svg.fonttype": "none"}  # the same file again, and a small one
    figure, axes = plt.subplots(2, 4, figsize=(9, 3.6), sharex=True, sharey=True, layout="constrained")
    for axis, schedule in zip(axes.flat, SCHEDULES, strict=False):
        drawn = rates(schedule)
        axis.plot([step / STEPS_AN_EPOCH for step in range(len(drawn))], drawn)
        axis.set_title(schedule, family="monospace", fontsize=10)
        axis.grid(alpha=0.3)
    axes.flat[-1].set_axis_off()
    figure.supxlabel("epoch")
    figure.supylabel("rate / lr")
    figure.savefig(Path(__file__).parent.parent / "docs" / "schedules.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
