"""The trainer beside the loops that people would write or take instead: `python benchmarks/trainer.py`.

For each case the sides train in turn, in one process and on the same examples, an evaluation after each epoch included:

    reference   the tutorial's loop: torchvision data set, a transform for each image, DataLoader, `.item()` and a
                torchmetrics update in each step, one checkpoint file
    tensors     the same loop on a TensorDataset of floats that were normalised once, as for Fashion-MNIST in guides
    lightning   the same data through Lightning, with logger, progress bar and checkpoints off
    hpo         hpo.training.fit with `--precision auto --compile off`
    hpo-step    the same with `--compile step`
    hpo-graph   the same with `--compile graph`, on a GPU

It prints the time of an epoch (CPU time on a CPU, device events on a GPU; the first two epochs of a run are left out),
how many times faster than both loops each side is, and its share of what an fp32 matrix product of the shape that
the case's largest layer has reaches on this machine. With `--accuracy N` all sides also train N seeds to the
end. The data sets are found by HPO_DATA_DIR. The last lines name what was used.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning
import torch
from machine import describe_machine
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.classification import MulticlassAccuracy
from torchvision.datasets import CIFAR10, FashionMNIST
from torchvision.models import resnet18
from torchvision.transforms import Compose, Normalize, ToTensor

from hpo.config import TrainConfig
from hpo.data.datasets import Splits, split_dataset
from hpo.data.examples import DataSpec, Split
from hpo.models.convnet import ConvNet
from hpo.models.mlp import MLP
from hpo.models.preprocessed import PreprocessedModel
from hpo.plugins import load_task
from hpo.training.trainer import fit

NUM_CLASSES = 10


# --- the cases --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A network, its data and how it is trained."""

    name: str
    task: str
    network: Callable[[DataSpec], nn.Module]
    config: TrainConfig
    num_examples: int
    """Examples used, a tenth of them for validation."""


def resnet18_for_32_pixels(spec: DataSpec) -> nn.Module:
    """torchvision's ResNet-18 with a stem for small images: 3x3, stride 1, no pooling (He et al. 2016, section 4.2)."""
    network = resnet18(num_classes=spec.num_outputs)
    network.conv1 = nn.Conv2d(spec.input_shape[0], 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def deep_mlp(spec: DataSpec) -> nn.Module:
    return MLP(spec, depth=20, width=100, activation="silu", norm="batch")


def mlp(spec: DataSpec) -> nn.Module:
    return MLP(spec, depth=2, width=256)


def small_mlp(spec: DataSpec) -> nn.Module:
    return MLP(spec, depth=3, width=100)


def _case(name: str, task: str, network: Callable[[DataSpec], nn.Module], num_examples: int, **settings: Any) -> Case:
    config = TrainConfig(**{"schedule": "one_cycle", "patience": 1000, **settings})
    return Case(name, task, network, config, num_examples)


CASES = {
    case.name: case
    for case in (
        _case("mlp-20x100-b128", "cifar10", deep_mlp, 20_000, batch_size=128, optimizer="adamw", lr=2e-3),
        _case("fashion-b32", "fashion_mnist", mlp, 20_000, batch_size=32, optimizer="sgd", lr=0.05),
        _case("fashion-b512", "fashion_mnist", mlp, 60_000, batch_size=512, optimizer="adamw", lr=2e-3),
        _case("fashion-3x100-b32", "fashion_mnist", small_mlp, 20_000, batch_size=32, optimizer="sgd", lr=0.05),
        _case("fashion-3x100-b512", "fashion_mnist", small_mlp, 60_000, batch_size=512, optimizer="sgd", lr=0.05),
        _case("convnet-b256", "cifar10", ConvNet, 4_000, batch_size=256, optimizer="sgd", lr=0.1, weight_decay=5e-4),
        _case(
            "resnet18-b64", "cifar10", resnet18_for_32_pixels, 640, batch_size=64, optimizer="sgd", lr=0.05,
            weight_decay=5e-4,
        ),
    )
}  # fmt: skip


def load_splits(case: Case, data_dir: Path) -> Splits:
    dataset = load_task(case.task).objective.load(data_dir)
    return split_dataset(dataset, validation_fraction=0.1, seed=0, limit=case.num_examples)


# --- the sides --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Epoch:
    """What an epoch took, and the validation accuracy after it."""

    seconds: float
    accuracy: float


class Stopwatch:
    """CPU time of this process, or a GPU's own time; both leave out what other processes do."""

    def __init__(self, device: str) -> None:
        self._events = device.startswith("cuda")
        self.lap()

    def lap(self) -> float:
        """Seconds since the last call."""
        before, self._mark = getattr(self, "_mark", None), self._now()
        if before is None:
            return 0.0
        if self._events:
            torch.cuda.synchronize()
            return before.elapsed_time(self._mark) / 1000
        return self._mark - before

    def _now(self) -> Any:
        if not self._events:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


Side = Callable[[Case, Splits, TrainConfig], Iterator[Epoch]]
Loaders = Callable[[Splits, TrainConfig], tuple[DataLoader[Any], DataLoader[Any]]]


def ours(case: Case, splits: Splits, config: TrainConfig, **settings: Any) -> Iterator[Epoch]:
    """hpo's trainer, on the splits as a study has them."""
    torch.manual_seed(config.seed)
    model = PreprocessedModel(case.network(splits.spec), splits.spec)
    model.fit_statistics(splits.train)
    stopwatch = Stopwatch(config.device)
    for result in fit(model, splits, replace(config, **settings)):
        yield Epoch(stopwatch.lap(), result.metrics["val/accuracy"])


def reference(case: Case, splits: Splits, config: TrainConfig, load: Loaders | None = None) -> Iterator[Epoch]:
    """The loop of the tutorials."""
    torch.manual_seed(config.seed)
    train_loader, validation_loader = (load or loaders)(splits, config)
    model = case.network(splits.spec).to(config.device)
    optimizer, schedule = optimizer_and_schedule(model, config, len(train_loader))
    checkpoint = Path(tempfile.gettempdir()) / "reference.pt"
    stopwatch = Stopwatch(config.device)
    for _ in range(config.max_epochs):
        model.train()
        train_accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro").to(config.device)
        loss_sum = 0.0
        for images, labels in train_loader:
            images, labels = images.to(config.device), labels.to(config.device)
            outputs = model(images)
            loss = cross_entropy(outputs, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            loss_sum += loss.item()
            train_accuracy.update(outputs, labels)
        accuracy = evaluate(model, validation_loader, config.device)
        torch.save(model.state_dict(), checkpoint)
        yield Epoch(stopwatch.lap(), accuracy)
    checkpoint.unlink()


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any], device: str) -> float:
    model.eval()
    accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro").to(device)
    for images, labels in loader:
        accuracy.update(model(images.to(device)), labels.to(device))
    return float(accuracy.compute())


class LightningClassifier(lightning.LightningModule):
    def __init__(self, case: Case, spec: DataSpec, config: TrainConfig, steps_per_epoch: int) -> None:
        super().__init__()
        self.network = case.network(spec)
        self.config, self.steps_per_epoch = config, steps_per_epoch
        self.train_accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")
        self.accuracy = MulticlassAccuracy(NUM_CLASSES, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        outputs = self.network(images)
        loss = cross_entropy(outputs, labels)
        self.train_accuracy(outputs, labels)
        self.log("train/loss", loss)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.accuracy(self.network(images), labels)
        self.log("val/accuracy", self.accuracy)

    def configure_optimizers(self) -> Any:
        optimizer, schedule = optimizer_and_schedule(self, self.config, self.steps_per_epoch)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class EpochTimes(lightning.Callback):
    """Notes what each epoch took, its validation included."""

    def __init__(self, device: str) -> None:
        self.epochs: list[Epoch] = []
        self._device = device

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._stopwatch = Stopwatch(self._device)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self.epochs.append(Epoch(self._stopwatch.lap(), float(trainer.callback_metrics["val/accuracy"])))


def by_lightning(case: Case, splits: Splits, config: TrainConfig) -> Iterator[Epoch]:
    torch.manual_seed(config.seed)
    train_loader, validation_loader = loaders(splits, config)
    times = EpochTimes(config.device)
    trainer = lightning.Trainer(
        max_epochs=config.max_epochs,
        accelerator="gpu" if config.device.startswith("cuda") else "cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[times],
    )
    trainer.fit(LightningClassifier(case, splits.spec, config, len(train_loader)), train_loader, validation_loader)
    return iter(times.epochs)


def loaders(splits: Splits, config: TrainConfig) -> tuple[DataLoader[Any], DataLoader[Any]]:
    channels = splits.train.inputs.transpose(0, 1).flatten(1).float() / 255
    transform = Compose([ToTensor(), Normalize(channels.mean(1).tolist(), channels.std(1).tolist())])
    train, validation = (_torchvision_dataset(split, transform) for split in (splits.train, splits.validation))
    train_loader = DataLoader(train, batch_size=config.batch_size, shuffle=True, drop_last=True)
    return train_loader, DataLoader(validation, batch_size=config.batch_size)


def tensor_loaders(splits: Splits, config: TrainConfig) -> tuple[DataLoader[Any], DataLoader[Any]]:
    channels = splits.train.inputs.transpose(0, 1).flatten(1).float()
    mean, std = (values.view(-1, 1, 1) for values in (channels.mean(1), channels.std(1)))
    train, validation = (
        TensorDataset((split.inputs.float() - mean) / std, split.targets) for split in (splits.train, splits.validation)
    )
    train_loader = DataLoader(train, batch_size=config.batch_size, shuffle=True, drop_last=True)
    return train_loader, DataLoader(validation, batch_size=config.batch_size)


def _torchvision_dataset(split: Split, transform: Callable[[Any], Tensor]) -> CIFAR10 | FashionMNIST:
    """torchvision's own class over these examples; it has no constructor for what is in memory already."""
    is_colour = split.inputs.shape[1] == 3
    dataset: CIFAR10 | FashionMNIST = object.__new__(CIFAR10 if is_colour else FashionMNIST)
    dataset.data = split.inputs.permute(0, 2, 3, 1).numpy() if is_colour else split.inputs[:, 0]
    dataset.targets = split.targets.tolist()
    dataset.transform, dataset.target_transform = transform, None
    return dataset


def optimizer_and_schedule(model: nn.Module, config: TrainConfig, steps_per_epoch: int) -> Any:
    parameters, decay = model.parameters(), config.weight_decay
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(parameters, config.lr, momentum=config.momentum, nesterov=True, weight_decay=decay)
    else:
        optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=decay)
    num_steps = config.max_epochs * steps_per_epoch + 1
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=num_steps)


SIDES: dict[str, Side] = {
    "reference": reference,
    "tensors": partial(reference, load=tensor_loaders),
    "lightning": by_lightning,
    "hpo": partial(ours, compile="off"),
    "hpo-step": partial(ours, compile="step"),
    "hpo-graph": partial(ours, compile="graph"),
}


# --- the limit of the arithmetic --------------------------------------------------------------------------------------


def flops_of_an_epoch(case: Case, splits: Splits) -> float:
    """Floating-point operations of the products in an epoch: training, forward and backward, and the evaluation."""
    model = case.network(splits.spec)
    images = torch.zeros(2, *splits.spec.input_shape)
    with FlopCounterMode(display=False) as training:
        model(images).sum().backward()
    with FlopCounterMode(display=False) as evaluating, torch.no_grad():
        model(images)
    return training.get_total_flops() / 2 * len(splits.train) + evaluating.get_total_flops() / 2 * len(
        splits.validation
    )


def limit_flops(case: Case, splits: Splits, dtype: torch.dtype = torch.float32) -> float:
    """Operations a second of the matrix product that the case's largest layer amounts to, measured."""
    rows, inner, columns = _largest_product(case, splits.spec)
    device = case.config.device
    a, b = torch.randn(rows, inner, device=device, dtype=dtype), torch.randn(inner, columns, device=device, dtype=dtype)
    num_products = max(1, round(2e9 / (2 * rows * inner * columns)))
    laps = []
    for _ in range(5):
        stopwatch = Stopwatch(device)
        for _ in range(num_products):
            a @ b
        laps.append(stopwatch.lap())
    return 2 * rows * inner * columns * num_products / min(laps)


def _largest_product(case: Case, spec: DataSpec) -> tuple[int, int, int]:
    """(rows, inner, columns) of the layer with the most arithmetic; a convolution is a product over its patches."""
    shapes = []

    def note(layer: nn.Module, inputs: tuple[Tensor], outputs: Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, Tensor)
        rows = case.config.batch_size * prod(outputs.shape[2:])
        shapes.append((rows, weight[0].numel(), weight.shape[0]))

    model = case.network(spec)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(note)
    model(torch.zeros(2, *spec.input_shape))
    return max(shapes, key=prod)


# --- the tables -------------------------------------------------------------------------------------------------------


def compare_speed(case: Case, splits: Splits, arguments: argparse.Namespace) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    config = replace(case.config, max_epochs=4, device=arguments.device)
    for _ in range(arguments.rounds):
        for name in arguments.sides:
            # The first epoch warms up; a compiled step is compiled in the second.
            _, _, *warm = SIDES[name](case, splits, config)
            times[name].append(statistics.median(epoch.seconds for epoch in warm))
    flops, limit = flops_of_an_epoch(case, splits), limit_flops(case, splits)
    title = f"{case.name}: {len(splits.train)} + {len(splits.validation)} examples"
    loops = [name for name in ("reference", "tensors") if name in times]
    headings = [f"times the speed of {loop}" for loop in loops]
    table = Table("side", "s an epoch", *headings, "of the product's speed", title=title)
    for name, seconds in times.items():
        table.add_row(
            name,
            f"{statistics.median(seconds):.2f}",
            *(_ratio(times[loop], seconds) for loop in loops),
            f"{flops / statistics.median(seconds) / limit:.0%}",
        )
    console.print(table)


def _ratio(theirs: list[float], own: list[float]) -> str:
    ratios = [one / other for one, other in zip(theirs, own, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def compare_accuracy(case: Case, splits: Splits, arguments: argparse.Namespace) -> None:
    config = replace(case.config, max_epochs=arguments.epochs, device=arguments.device)
    table = Table("side", "accuracy", "of each seed", title=f"{case.name}: after {arguments.epochs} epochs")
    for name in arguments.sides:
        accuracies = []
        for seed in range(arguments.accuracy):
            *_, last = SIDES[name](case, splits, replace(config, seed=seed))
            accuracies.append(last.accuracy)
        table.add_row(name, f"{statistics.mean(accuracies):.4f}", " ".join(f"{value:.4f}" for value in accuracies))
    console.print(table)


console = Console(width=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES, metavar="CASE")
    parser.add_argument("--sides", nargs="+", choices=SIDES, metavar="SIDE", help="[default: all that the device has]")
    parser.add_argument("--rounds", type=int, default=3, help="times that every side trains")
    parser.add_argument("--accuracy", type=int, default=0, metavar="N", help="seeds to compare the accuracy of")
    parser.add_argument("--epochs", type=int, default=5, help="epochs for the accuracy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if not arguments.sides:
        arguments.sides = [name for name in SIDES if name != "hpo-graph" or arguments.device.startswith("cuda")]
    if "HPO_DATA_DIR" not in os.environ:
        parser.error("HPO_DATA_DIR must name the folder of the data sets; `hpo search cifar10` downloads them there.")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    for case in (CASES[name] for name in arguments.cases):
        splits = load_splits(case, Path(os.environ["HPO_DATA_DIR"]))
        compare_speed(case, splits, arguments)
        if arguments.accuracy:
            compare_accuracy(case, splits, arguments)
    console.print(describe_machine("torch", "torchvision", "torchmetrics", "lightning"))
    console.print(
        torch.cuda.get_device_name() if arguments.device.startswith("cuda") else f"{torch.get_num_threads()} thread(s)"
    )


if __name__ == "__main__":
    main()
