"""What a check looks at, and what it says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from torch import nn

from hpo.config import OWN, TrainConfig
from hpo.data.batches import num_views
from hpo.data.datasets import Splits
from hpo.data.kinds import labels_of
from hpo.data.loaded import Loaded
from hpo.models.copies import copy_of
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.training.losses import LossFunction, Scale, loss_function, target_scale
from hpo.training.precision import has_convolutions

if TYPE_CHECKING:
    from hpo.data.examples import DataSpec, Split
    from hpo.data.parts import Batch
    from hpo.parameters import Value
    from hpo.task import Task

State = Literal["ok", "warning", "wrong"]

NUM_TRAIN, NUM_VALIDATION = 512, 256
"""Examples of a torch Dataset that are checked."""

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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is checked: a task with the default configuration of its space, on its training and validation splits."""

    task: Task
    splits: Splits
    configuration: dict[str, Value]
    config: TrainConfig

    @classmethod
    def of(cls, task: Task, splits: Splits, device: str) -> Self:
        """The trainer's own choices that are no part of a network are left out: nothing is compiled.

        Of a torch Dataset some examples are read, and looked at instead of all.
        """
        configuration = task.space.active(task.space.defaults())
        return cls(
            task=task,
            splits=_read_in_part(splits),
            configuration=configuration,
            config=task.train_config(configuration, device=device, compile="off"),
        )

    @property
    def spec(self) -> DataSpec:
        return self.splits.spec

    @property
    def is_classified(self) -> bool:
        """Whether each example has one of several classes."""
        return self.spec.kind == "classification"

    @property
    def target_scale(self) -> Scale:
        return target_scale(self.splits.train, self.spec)

    def loss_of(self, model: PreprocessedModel) -> LossFunction:
        """The loss of the task, without what regularizes it; one of its own has the weights of this model's."""
        plain = replace(self.config, label_smoothing=0.0)
        return loss_function(plain, self.spec, self.target_scale, model.own)

    def sample(self, num_examples: int) -> Split:
        """At most this many training examples, on the device; the classes are in proportion."""
        return self.splits.train.sample(num_examples, self.config.device, num_views(self.spec))

    def batch(self, size: int) -> tuple[Batch, Batch]:
        """A batch of training examples and their targets, on the device."""
        return self.sample(size).batch(slice(None))

    def small_sample(self) -> Split:
        """As many training examples as a large network takes seconds for on a CPU."""
        sample = self.sample(64)
        is_large = sample.num_bytes / len(sample) > LARGE_EXAMPLE * sample.parts[0].dtype.itemsize
        return sample.select(slice(0, 16)) if is_large else sample

    @cached_property
    def fingerprints(self) -> tuple[list[bytes], list[bytes]]:
        """Those of the training and of the validation split: photos are read from their file for them, once."""
        return self.splits.train.fingerprints(), self.splits.validation.fingerprints()

    def network(self) -> PreprocessedModel:
        """A new network, as a trial would begin with, but without what is random in it and in evaluation mode.

        Batch norms take the statistics of the batch, as in training: those that they keep are of no data yet.
        """
        model = self._copied().to(self.config.device).eval()
        if has_convolutions(model):
            model.to(memory_format=torch.channels_last)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
        return model

    def _copied(self) -> PreprocessedModel:
        """A copy of the network as it was built; built again if it holds what cannot be copied, such as a lock."""
        try:
            with torch.enable_grad():  # or a scripted module's weights would be frozen
                return cast(PreprocessedModel, copy_of(self._untrained))
        except TypeError:
            model = self._built(pretrained=False)
            model.load_state_dict(self._untrained.state_dict())
            return model

    @cached_property
    def _untrained(self) -> PreprocessedModel:
        model = self._built(pretrained=True)
        model.fit_statistics(self.splits.train)  # of large data this takes a second
        return model

    def _built(self, *, pretrained: bool) -> PreprocessedModel:
        parameters = self.task.model_parameters(self.configuration)
        return build_model(
            self.task.objective, self.splits.spec, parameters, seed=self.config.seed, pretrained=pretrained
        )

    def loss_of_knowing_nothing(self, targets: Batch) -> float | None:
        """What the loss is where every class has the same chance, or where the mean is predicted; None where only the
        task's own loss could say, or where it depends on the number of outputs."""
        if self.config.loss == OWN or self.spec.kind in _WITHOUT_REFERENCE:
            return None
        loss = self.loss_of(self._untrained)
        if self.spec.kind in ("regression", "box"):
            return loss(targets.mean(0).expand_as(targets), targets).item()
        if self.spec.kind == "soft_labels":
            return loss(torch.zeros_like(targets), targets).item()
        labels, num_classes = labels_of(targets), len(self.spec.classes)
        shape = list(labels.shape) if self.spec.kind == "multilabel" else [*labels.shape, num_classes]
        outputs = torch.zeros(shape, device=labels.device)
        return loss(outputs.movedim(-1, 1) if self.spec.kind == "segmentation" else outputs, targets).item()


_WITHOUT_REFERENCE = ("own", "transcription", "embedding", "instances", "reconstruction", "several")


def _read_in_part(splits: Splits) -> Splits:
    """The splits in memory, with only as many examples of a torch Dataset as the checks need."""
    if not isinstance(splits.train.inputs, Loaded):
        return splits
    train, validation = (
        split.select(slice(0, number)).in_memory()
        for split, number in ((splits.train, NUM_TRAIN), (splits.validation, NUM_VALIDATION))
    )
    return replace(splits, train=train, validation=validation)


def in_few_lines(verdicts: Sequence[Verdict], task: str) -> list[str]:
    """A line for each verdict that is not ok; a single one where all of them are."""
    lines = [f"{v.state}: {v.check}: {v.text}: {v.advice}" for v in verdicts if v.state != "ok"]
    return lines or [f"checked: {', '.join(v.check for v in verdicts)} (more: hpo check {task})"]


def as_markdown(verdicts: Sequence[Verdict]) -> str:
    """A table of the verdicts."""
    rows = (f"| {v.state} | {v.check} | {v.text} | {v.advice} |\n" for v in verdicts)
    return "| verdict | check | figures | what to do |\n| --- | --- | --- | --- |\n" + "".join(rows)
