"""CIFAR-10 in as few epochs as possible: the network and the settings of airbench94 (Jordan 2024, arXiv:2404.00498)."""

from __future__ import annotations

from hpo.objectives.cifar10 import load

from hpo import Objective, airnet

objective = Objective(
    name="airnet",
    description="CIFAR-10 with a conv net that learns it in ten epochs, quickly on a GPU",
    load=load,
    model=airnet,
    settings={"max_epochs": 10, "patience": 10},
)
