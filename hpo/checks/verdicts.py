"""What a check looks at, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor, nn

from hpo.config import TrainConfig
from hpo.data.datasets import Splits
from hpo.data.examples import Split
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.training.losses import LossFunction, loss_function, target_scale
from hpo.training.precision import has_convolutions

if TYPE_CHECKING:
    from hpo.space import Value
    from hpo.task import Task

State = Literal["ok", "warning", "wrong"]

LARGE_EXAMPLE = 3 * 64 * 64
"""Values in an example; networks for larger ones are slow on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one check found."""

    check: str = ""
    """Its name, which the checklist gives it."""

    state: State
    text: str
    """The figures, in words."""

    advice: str = ""
    """What to do, where the state is not ok."""

    data: dict[str, Any] = field(default_factory=dict)
    """The figures as plain data: numbers are logged, and lists are drawn."""


@dataclass(frozen=True)
class Sample:
    """Examples on the device."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def as_split(self) -> Split:
        return Split(self.inputs, self.targets)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is checked: a task with the default configuration of its space, on its training and validation splits."""

    task: Task
    splits: Splits
    configuration: dict[str, Value]
    config: TrainConfig

    @classmethod
    def of(cls, task: Task, splits: Splits, device: str) -> Self:
        """The trainer's own choices that are no part of a network are left out: nothing is compiled."""
        configuration = task.space.active(task.space.defaults())
        return cls(
            task=task,
            splits=splits,
            configuration=configuration,
            config=task.train_config(configuration, device=device, compile="off"),
        )

    @property
    def num_classes(self) -> int:
        """0 for a regression."""
        return len(self.splits.spec.classes)

    @property
    def target_scale(self) -> float:
        return target_scale(self.splits.train)

    @property
    def loss(self) -> LossFunction:
        """The loss of the task, without what regularizes it."""
        plain = replace(self.config, label_smoothing=0.0)
        return loss_function(plain, self.num_classes, self.target_scale)

    def sample(self, num_examples: int) -> Sample:
        """At most this many training examples, on the device; the classes are in proportion."""
        train, device = self.splits.train, self.config.device
        return Sample(train.inputs[:num_examples].to(device), train.targets[:num_examples].to(device))

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """A batch of training examples and their targets, on the device."""
        sample = self.sample(size)
        return sample.inputs, sample.targets

    def small_sample(self) -> Sample:
        """As many training examples as a large network takes seconds for on a CPU."""
        return self.sample(64 if self.splits.train.inputs.shape[1:].numel() <= LARGE_EXAMPLE else 16)

    @cached_property
    def fingerprints(self) -> tuple[list[bytes], list[bytes]]:
        """Those of the training and of the validation split: photos are read from their file for them, once."""
        return self.splits.train.fingerprints(), self.splits.validation.fingerprints()

    def network(self) -> PreprocessedModel:
        """A new network, as a trial would begin with, but without what is random in it and in evaluation mode.

        Batch norms take the statistics of the batch, as in training: those that they keep are of no data yet.
        """
        model = deepcopy(self._untrained).to(self.config.device).eval()
        if has_convolutions(model):
            model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        return model

    @cached_property
    def _untrained(self) -> PreprocessedModel:
        parameters = self.task.model_parameters(self.configuration)
        model = build_model(self.task.objective, self.splits.spec, parameters, seed=self.config.seed)
        model.fit_statistics(self.splits.train)  # of large data this takes a second
        return model

    def loss_of_knowing_nothing(self, targets: Tensor) -> float:
        """What the loss is where every class has the same chance, or where the mean is predicted."""
        if self.num_classes:
            outputs = torch.zeros(len(targets), self.num_classes, device=targets.device)
        else:
            outputs = targets.mean().expand(len(targets))
        return self.loss(outputs, targets).item()


def in_few_lines(verdicts: Sequence[Verdict], task: str) -> list[str]:
    """A line for each verdict that is not ok; a single one where all of them are."""
    lines = [f"{v.state}: {v.check}: {v.text}: {v.advice}" for v in verdicts if v.state != "ok"]
    return lines or [f"checked: {', '.join(v.check for v in verdicts)} (more: hpo check {task})"]


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of the verdicts."""
    rows = (f"| {v.state} | {v.check} | {v.text} | {v.advice} |\n" for v in verdicts)
    return "| verdict | check | figures | what to do |\n| --- | --- | --- | --- |\n" + "".join(rows)
