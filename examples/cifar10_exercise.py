"""An exercise of the textbooks: 20 layers of 100 units on CIFAR-10, and one technique after the other.

    python examples/cifar10_exercise.py            trains each variant, 20 minutes on two cores
    hpo search examples/cifar10_exercise.py -p optimizer=nadam -p activation=selu --trials 1        one of them
    hpo search examples/cifar10_exercise.py --trials 30                                  what a search finds instead

The variants are points of one search space, given by -p; docs/training.md has the table that this prints.
"""

from __future__ import annotations

import torch
from hpo.objectives.cifar10 import load
from hpo.objectives.fashion_mnist import load as load_fashion_mnist

import hpo
from hpo import Choice, Float, Group, Int, Objective, Space, find_data_dir, mlp, split_dataset

NETWORK = {
    "depth": Int(1, 20, default=20),
    "width": Int(50, 500, log=True, default=100),
    "activation": Choice("relu", "silu", "selu", "gelu", default="silu"),
    "norm": Choice("none", "batch", "layer", default="none"),
}
OPTIMIZERS = Choice("sgd", "adagrad", "rmsprop", "adam", "adamax", "nadam", "adamw", default="nadam")

objective = Objective(
    name="cifar10_exercise",
    description="photographs of ten kinds with a deep plain MLP",
    load=load,
    model=mlp,
    settings={"max_epochs": 30, "patience": 8, "warmup_fraction": 0.0},
    space=Space(
        Group(
            "step size",
            lr=Float(1e-5, 1e-1, log=True, default=5e-5),
            batch_size=Choice(32, 64, 128, 256, default=32),
        ),
        Group(
            "architecture and optimizer",
            **NETWORK,
            optimizer=OPTIMIZERS,
            schedule=Choice("constant", "cosine", "one_cycle", default="constant"),
        ),
        Group(
            "regularization",
            dropout=Float(0.0, 0.5, default=0.0),
            weight_decay=Float(1e-6, 1e-1, log=True, default=1e-6),
        ),
    ),
)

fashion = Objective(
    name="fashion_optimizers",
    description="clothes with a small MLP, at one learning rate for all optimizers",
    load=load_fashion_mnist,
    model=mlp,
    settings={"max_epochs": 10, "patience": 10, "schedule": "constant", "warmup_fraction": 0.0, "batch_size": 32},
    space=Space(
        Group("step size", lr=Float(1e-4, 1.0, log=True, default=0.05)),
        Group(
            "optimizer",
            optimizer=OPTIMIZERS,
            momentum=Float(0.0, 0.99, default=0.9),
            nesterov=Choice(True, False, default=False),
            depth=Int(1, 5, default=3),
            width=Int(50, 300, default=100),
        ),
    ),
)

VARIANTS = {
    "nadam-silu": ["lr=5e-5"],
    "batch-norm": ["lr=5e-4", "norm=batch"],
    "selu": ["lr=7e-4", "activation=selu"],
    "selu-alpha-dropout": ["lr=5e-4", "activation=selu", "dropout=0.1"],
    "selu-one-cycle": ["lr=2e-2", "activation=selu", "optimizer=sgd", "schedule=one_cycle", "batch_size=128"],
}

FASHION_VARIANTS = {
    "sgd": ["optimizer=sgd", "momentum=0"],
    "momentum": ["optimizer=sgd"],
    "nesterov": ["optimizer=sgd", "nesterov=true"],
    "adagrad": ["optimizer=adagrad"],
    "rmsprop": ["optimizer=rmsprop", "momentum=0"],
    "adam": ["optimizer=adam"],
    "adamax": ["optimizer=adamax"],
    "nadam": ["optimizer=nadam"],
    "adamw": ["optimizer=adamw"],
}


def validation_accuracy(task: str, variant: str, overrides: list[str]) -> float:
    """That of the best epoch of one training, whose study and runs have the variant's name."""
    outcome = hpo.run_search(task, trials=1, study=f"exercise-{variant}", overrides=overrides)
    assert outcome.winner is not None, "one trial has run"
    return outcome.winner.validation


def monte_carlo_accuracy(variant: str, samples: int = 20) -> float:
    """The same of the model with alpha dropout, when dropout stays on and the mean of many passes is taken."""
    validation = split_dataset(load(find_data_dir(None)), seed=0).validation
    model = hpo.load_best(f"exercise-{variant}")
    parts = validation.inputs.split(2048)
    predicted = [model.probabilities(images, dropout_samples=samples).argmax(1) for images in parts]
    return (torch.cat(predicted) == validation.targets).float().mean().item()


if __name__ == "__main__":
    for variant, overrides in VARIANTS.items():
        print(f"CIFAR-10, {variant:20} {validation_accuracy(__file__, variant, overrides):.1%}", flush=True)
    print(f"CIFAR-10, {'monte-carlo-dropout':20} {monte_carlo_accuracy('selu-alpha-dropout'):.1%}", flush=True)
    for variant, overrides in FASHION_VARIANTS.items():
        accuracy = validation_accuracy("cifar10_exercise:fashion", variant, overrides)
        print(f"Fashion-MNIST, {variant:20} {accuracy:.1%}", flush=True)
