"""Trials on a pretended GPU: the settings that touch a device, the data, and where the host may wait."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.data import of_classes
from helpers.pretended_cuda import Seen, pretended_cuda
from hpo.config import AUGMENTATIONS, TrainConfig
from hpo.data import batches
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.data.mapped import MappedImages
from hpo.execution.messages import Assignment, Decision
from hpo.execution.worker import run_trial
from hpo.methods import OPTIMIZERS, SCHEDULES
from hpo.models import networks
from hpo.models.architectures import TorchvisionArchitecture
from hpo.models.preprocessed import MirrorAveraged, build_model
from hpo.objective import Objective
from hpo.training import costs as training_costs
from hpo.training import trainer
from hpo.training.checkpoint import load_weights
from hpo.training.evaluation import evaluate, evaluate_classes
from hpo.training.step import StepResult, TrainingStep
from hpo.training.trained import BEST_WEIGHTS, TrialDescription

BETWEEN_STEPS = {
    ("copy from pageable memory", "?"): "the test itself moves the model that it loads",
    ("copy from pageable memory", "data/batches.py:_draw_epoch"): "the order and the draws of an epoch",
    ("copy from pageable memory", "data/batches.py:evaluation_views"): "the draws of views to predict",
    ("copy from pageable memory", "data/examples.py:move"): "the data, once a trial",
    ("copy from pageable memory", "data/parts.py:<genexpr>"): "where sequences begin, once a trial",
    ("copy from pageable memory", "data/parts.py:select"): "the sequences that are watched",
    ("copy from pageable memory", "data/parts.py:to"): "the data, once a trial",
    ("copy from pageable memory", "data/parts.py:move"): "the first examples, for precisions, costs and initialisation",
    ("copy from pageable memory", "execution/worker.py:_build"): "the model, once a trial",
    ("copy from pageable memory", "models/preprocessed.py:fit_statistics"): "the statistics of the data, once a trial",
    ("copy from pageable memory", "models/preprocessed.py:_as_batch"): "examples to predict",
    (
        "copy from pageable memory",
        "training/losses.py:loss_function",
    ): "the deviations of several numbers, once a trial",
    ("copy from pageable memory", "training/losses.py:training_loss"): "the weights of the classes",
    ("copy from pageable memory", "training/optimizers.py:load_optimizer_state"): "a resumed training",
    ("copy from pageable memory", "training/optimizers.py:load_state_dict"): "a resumed training",
    ("copy from pageable memory", "training/probe.py:__init__"): "the examples that are watched",
    ("copy from pageable memory", "training/trainer.py:restore_best_weights"): "the best weights, from the checkpoint",
    ("copy from pageable memory", "training/trainer.py:resume"): "a resumed training",
    ("bincount", "models/preprocessed.py:_uint8_statistics"): "the statistics of images, once a trial",
    ("bincount", "training/losses.py:_balanced_weights"): "the weights of the classes, once a trial",
    ("copy to the host", "data/batches.py:_balanced_chances"): "the classes, to draw them alike",
    ("copy to the host", "training/trainer.py:_measure_difficulty"): "the losses of a curriculum, once an epoch",
    (
        "copy to the host",
        "data/oversampling.py:oversample",
    ): "examples that others are made of, once a trial",
    ("copy from pageable memory", "data/oversampling.py:oversample"): "those that were made, once a trial",
    ("copy from pageable memory", "data/augment.py:_build"): "the synonyms, once a trial",
    ("copy to the host", "training/checkpoint.py:_on_device"): "the weights of the trial",
    ("copy to the host", "training/optimizers.py:load_optimizer_state"): "a resumed training",
    (
        "item",
        "models/layers.py:scale_to_unit_variance",
    ): "layers that are initialised one after the other, once a trial",
    ("index on the CPU", "data/parts.py:select_part"): "the examples that are watched, in two views, once a trial",
    ("item", "training/losses.py:scale_of"): "the deviation of the targets, once a trial",
    ("item", "training/step.py:state_dict"): "the scale of fp16, in the checkpoint of an epoch",
    ("synchronize", "training/costs.py:_measure_latency"): "the measured latency",
    ("synchronize", "training/device.py:wait_for"): "precisions are timed, once an architecture",
    ("tolist", "models/preprocessed.py:_predicted"): "the predictions",
    ("tolist", "training/evaluation.py:read_all"): "the numbers of an epoch, in one transfer",
    ("tolist", "training/evaluation.py:evaluate_classes"): "the confusion matrix of the winner",
    ("stream.synchronize", "training/checkpoint.py:_copied_to_cpu"): "the checkpoint of an epoch, in one transfer",
}
"""Where the host may wait, and what for: once an epoch, or once a trial."""

NOT_COMPARED = {
    # Weights from before a resume lie on the CPU, where none of the later ones is better.
    ("copy from pageable memory", "training/trainer.py:restore_best_weights"),
    # An architecture and batch size that another case has had are not timed again.
    ("synchronize", "training/device.py:wait_for"),
    # As many passes as fit into 0.2 s.
    ("synchronize", "training/costs.py:_measure_latency"),
}
"""Waits whose number does not depend on the number of steps, but on other things."""

IN_EACH_STEP = {
    "fp16 without a fused optimizer": {
        # torch's GradScaler asks after each step whether a gradient overflowed; fused optimizers do so on the device.
        ("item", "training/step.py:_step_optimizer"),
    },
}
"""Waits in each step that are there for a reason, by configuration."""

OF_THE_OPTIMIZER = {
    "training/optimizers.py:_fused_adam",
    "training/optimizers.py:_fused_sgd",
    "training/optimizers.py:_step",
    "training/optimizers.py:step",
    "training/step.py:_step_optimizer",  # those of torch, which are no part of hpo
}
"""Where a step may be given other numbers than the one before: its rates, and corrections for the number of steps."""

CONV = {"model": "convnet", "parameters": {"width": 8}}
ON_IMAGES = "crop+flip+rotation+colour_jitter+cutout+randaugment"


def configurations() -> dict[str, dict[str, Any]]:
    """Every value of every setting that touches a device, several in one training where they do not mask each other.

    An optimizer is trained for an epoch on the CPU, then on the GPU, and is resumed there.
    """
    found: dict[str, dict[str, Any]] = {
        f"{optimizer}, {schedule}": {
            "optimizer": optimizer,
            "schedule": schedule,
            "weight_decay": 0.01,
            "max_epochs": 3,
            "resumes": True,
        }
        for optimizer, schedule in zip(OPTIMIZERS, [*SCHEDULES, "constant", "cosine"], strict=True)
    }
    found |= {
        f"augment={name}": {"augment": name} for name in AUGMENTATIONS if name not in ("none", *ON_IMAGES.split("+"))
    }
    found |= {f"regression, {loss}": {"loss": loss, "metric": "r2"} for loss in ("mse", "mae", "huber", "log_cosh")}
    found |= {
        "images": {**CONV, "augment": ON_IMAGES, "costs": ("params", "latency")},
        "mixed": {**CONV, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "ema_decay": 0.9},
        "binary cross-entropy": {"loss": "binary_cross_entropy", "class_weights": "balanced", "mixup": 0.2},
        "focal": {"loss": "focal", "class_weights": "balanced", "metric": "auroc"},
        "swa": {**CONV, "swa_start": 0.4, "sampling": "balanced"},
        "limits": {"clip_norm": 1.0, "clip_value": 0.1, "l1": 1e-4, "max_norm": 1.0},
        "bf16": {**CONV, "precision": "bf16"},
        "fp16": {**CONV, "precision": "fp16"},
        "fp16 without a fused optimizer": {"precision": "fp16", "optimizer": "rmsprop"},
        "deterministic": {**CONV, "deterministic": True, "augment": "crop+flip+cutout+rotation", "mixup": 0.2},
        "deterministic regression": {"loss": "mse", "metric": "r2", "deterministic": True},
        "streamed": {**CONV, "is_streamed": True, "augment": "crop+flip"},
        "streamed from a file": {**CONV, "is_streamed": True, "is_mapped": True},
        "mlp": {"parameters": {"norm": "batch", "dropout": 0.1, "activation": "swiglu", "init": "lsuv"}},
        "dropconnect": {"parameters": {"dropout": 0.1, "dropout_type": "dropconnect"}},
        "alpha dropout": {"parameters": {"dropout": 0.1, "activation": "selu"}},
        "dropblock": {
            "model": "convnet",
            "parameters": {"width": 8, "dropout": 0.1, "dropout_type": "dropblock", "stochastic_depth": 0.2},
        },
        "spatial dropout": {
            "model": "convnet",
            "parameters": {"width": 8, "dropout": 0.1, "dropout_type": "spatial", "norm": "group"},
        },
        "airnet": {"model": "airnet", "parameters": {"width": 4}, "augment": "alternating_flip+crop"},
        "deterministic airnet": {"model": "airnet", "parameters": {"width": 4}, "deterministic": True},
        "pretrained": {
            "model": "pretrained",
            "parameters": {"architecture": "shufflenet_v2_x0_5", "weights": "none", "image_size": 32}
            | {"trainable_layers": 1},
            "thaw_epoch": 2,
            "backbone_lr_factor": 0.1,
        },
        "accumulated": {"accumulate": 2, "num_examples": 96},
        "curriculum": {"curriculum": "loss", "curriculum_until": 1.0, "max_epochs": 3},
        "growing": {**CONV, "progressive_start": 0.5, "progressive_until": 1.0, "augment": "flip"},
        "folds": {"folds": 2},
    }
    return found


def make_splits(*, is_regression: bool = False, num_examples: int = 48) -> Splits:
    generator = torch.Generator().manual_seed(0)
    if is_regression:
        inputs = torch.rand(num_examples + 16, 5, generator=generator)
        targets = inputs.sum(1) * 3 + 7
        classes: tuple[str, ...] = ()
    else:
        inputs = torch.randint(256, (num_examples + 16, 3, 16, 16), generator=generator, dtype=torch.uint8)
        targets, classes = torch.arange(num_examples + 16) % 3, ("a", "b", "c")
    spec = DataSpec(tuple(inputs.shape[1:]), classes)
    train, rest = slice(0, num_examples), slice(num_examples, None)
    return Splits(Split(inputs[train], targets[train]), Split(inputs[rest], targets[rest]), spec)


def in_a_file(splits: Splits, file: Path) -> Splits:
    inputs = splits.train.inputs
    assert isinstance(inputs, torch.Tensor)
    file.write_bytes(inputs.numpy().tobytes())
    mapped = MappedImages(file, len(inputs), tuple(inputs.shape[1:]), torch.arange(len(inputs)))
    return replace(splits, train=Split(mapped, splits.train.targets))


def make_objective(model: Callable[..., nn.Module]) -> Objective:
    return Objective(
        name="pretended",
        description="",
        load=lambda folder: pytest.fail("nothing is read"),
        model=model,
        settings={"batch_size": 16},
    )


def small_backbone(architecture: object, num_outputs: int, *, uses_imagenet_inputs: bool) -> nn.Module:
    """In place of one of torchvision's, whose hundreds of operations are not hpo's."""
    hidden = nn.Sequential(nn.Linear(48, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    return nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), hidden, nn.Linear(8, num_outputs))


def listening(seen: Seen, addresses: list[tuple[int, ...]]) -> type[TrainingStep]:
    """A step that notes all operations up to the next one, and where weights and the optimizer's state are after it."""

    class ListeningStep(TrainingStep):
        def __call__(self, inputs: torch.Tensor, targets: torch.Tensor, *, measures_norm: bool = True) -> StepResult:
            seen.operations.append([])
            seen.is_listening = True
            result = super().__call__(inputs, targets, measures_norm=measures_norm)
            state = [value for of_parameter in self.optimizer.state.values() for value in of_parameter.values()]
            kept = [*self.model.state_dict().values(), *[value for value in state if isinstance(value, torch.Tensor)]]
            addresses.append(tuple(tensor.data_ptr() for tensor in kept))
            return result

    return ListeningStep


def train(
    case: dict[str, Any], folder: Path, *, batch_size: int, addresses: list[tuple[int, ...]] | None = None
) -> Any:
    """What a GPU would have seen of a trial in a worker, from the splits to the costs, and of the winner's test."""
    settings = dict(case)
    num_examples = settings.pop("num_examples", 48)
    splits = make_splits(is_regression=settings.get("metric") == "r2", num_examples=num_examples)
    model, parameters = settings.pop("model", "mlp"), settings.pop("parameters", {})
    parameters = {"width": 16} | parameters if model == "mlp" else parameters
    costs, folds = settings.pop("costs", ("params",)), settings.pop("folds", None)
    resumes, is_streamed = settings.pop("resumes", False), settings.pop("is_streamed", False)
    if settings.pop("is_mapped", False):
        folder.mkdir()
        splits = in_a_file(splits, folder / "images.bin")
    objective = make_objective(getattr(networks, model))
    config = TrainConfig(
        **{"max_epochs": 2, "batch_size": batch_size, "lr": 1e-3, "device": "cuda", "compile": "off", **settings}
    )
    assignment = Assignment(
        number=0, model_parameters=parameters, config=config, folder=folder / "run", costs=costs, folds=folds
    )

    def leave(result: Any) -> Decision:
        return Decision.LEAVE

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchvisionArchitecture, "build", small_backbone)
        if is_streamed:
            patch.setattr(batches, "DEVICE_SHARE", 0.0)
        patch.setattr(training_costs, "TIMING_S", 0.001)
        patch.setattr(batches, "_SMALL_EXAMPLE", 0)  # evaluated in as many batches as it is trained in
        if resumes:
            run_trial(replace(assignment, config=replace(config, device="cpu")), objective, splits, leave)
        with pretended_cuda() as seen:
            if addresses is not None:
                patch.setattr(trainer, "TrainingStep", listening(seen, addresses))
            if resumes:
                asked = iter([Decision.CONTINUE, Decision.LEAVE])  # the CPU's epoch once more, and one on the GPU
                run_trial(assignment, objective, splits, lambda result: next(asked))
            run_trial(assignment, objective, splits, lambda result: Decision.CONTINUE)
            if not folds:
                evaluate_winner(assignment, objective, splits)
    return seen


def evaluate_winner(assignment: Assignment, objective: Objective, splits: Splits) -> None:
    """As a search does when it is done."""
    described = TrialDescription.read(assignment.folder)
    model = build_model(objective, described.spec, described.model_parameters, seed=0, pretrained=False)
    model.load_state_dict(load_weights(assignment.folder / BEST_WEIGHTS, described.weights_sha256))
    model = model.eval().to("cuda")
    few, num_classes = splits.validation.inputs[:3], len(splits.spec.classes)
    assert isinstance(few, torch.Tensor)
    model.predict(few)
    if not num_classes:
        evaluate(model, splits.validation, described.config, of_classes(0))
        return
    evaluate_classes(model, splits.validation, described.config, of_classes(num_classes))
    evaluate(MirrorAveraged(model), splits.validation, described.config, of_classes(num_classes))
    model.probabilities(few, dropout_samples=2)
