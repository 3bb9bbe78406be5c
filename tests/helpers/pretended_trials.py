"""The trainer, the checks and the worker on a pretended GPU: what would fail or wait on a real one.

Where a real GPU is found these are left out, and tests/test_gpu.py runs.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.data import of_classes
from pretended_cuda import Seen, pretended_cuda
from torch import nn

from hpo.checks.checklist import whole_list
from hpo.checks.verdicts import Subject
from hpo.config import AUGMENTATIONS, TrainConfig
from hpo.data import batches
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, SealedSplit, Split
from hpo.data.mapped import MappedImages
from hpo.execution.messages import Assignment, Decision
from hpo.execution.worker import refit, run_trial
from hpo.methods import OPTIMIZERS, SCHEDULES
from hpo.models import networks, preprocessed
from hpo.models.preprocessed import MirrorAveraged, build_model
from hpo.objective import Objective
from hpo.space import Float, Group, Space
from hpo.task import Task
from hpo.training import captured, trainer
from hpo.training.checkpoint import load_weights
from hpo.training.evaluation import evaluate, evaluate_classes
from hpo.training.step import StepResult, TrainingStep
from hpo.training.trained import BEST_WEIGHTS, TrialDescription

pytestmark = pytest.mark.pretended_gpu

BETWEEN_STEPS = {
    ("copy from pageable memory", "?"): "the test itself moves the model that it loads",
    ("copy from pageable memory", "data/batches.py:_draw_epoch"): "the order and the draws of an epoch",
    ("copy from pageable memory", "data/batches.py:<listcomp>"): "the same",
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
    ("bincount", "models/preprocessed.py:<listcomp>"): "the statistics of images, once a trial",
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
    ("synchronize", "training/precision.py:_synchronize"): "precisions are timed, once an architecture",
    ("tolist", "models/preprocessed.py:_predicted"): "the predictions",
    ("tolist", "training/evaluation.py:read_all"): "the numbers of an epoch, in one transfer",
    ("tolist", "training/evaluation.py:evaluate_classes"): "the confusion matrix of the winner",
    ("stream.synchronize", "training/checkpoint.py:_copied_to_cpu"): "the checkpoint of an epoch, in one transfer",
}
"""Where the host may wait, and what for: once an epoch, or once a trial."""

NOT_COMPARED = {
    # Weights from before a resume lie on the CPU, where none of the later ones is better.
    ("copy from pageable memory", "training/trainer.py:restore_best_weights"),
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
        "focal": {"loss": "focal", "class_weights": "balanced", "sampling": "balanced", "metric": "auroc"},
        "swa": {**CONV, "swa_start": 0.4},
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
        if is_streamed:
            patch.setattr(batches, "DEVICE_SHARE", 0.0)
        patch.setattr(batches, "_SMALL_EXAMPLE", 0)  # evaluated in as many batches as it is trained in
        if resumes:
            run_trial(replace(assignment, config=replace(config, device="cpu")), objective, splits, leave)
        with pretended_cuda() as seen:
            if addresses is not None:
                patch.setattr(trainer, "TrainingStep", listening(seen, addresses))
            if resumes:
                asked = iter([Decision.GO_ON, Decision.LEAVE])  # the CPU's epoch once more, and one on the GPU
                run_trial(assignment, objective, splits, lambda result: next(asked))
            run_trial(assignment, objective, splits, lambda result: Decision.GO_ON)
            if not folds:
                test_winner(assignment, objective, splits)
    return seen


def test_winner(assignment: Assignment, objective: Objective, splits: Splits) -> None:
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


test_winner.__test__ = False  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As a worker has; more would only wait for each other here."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", configurations())
def test_a_trial_runs_waits_between_epochs_alone_repeats_its_step_and_leaves_nothing(name: str, tmp_path: Path) -> None:
    """What the host waits for in 2 steps an epoch and in 6 is the same, but for the permitted waits.

    Each step has the operations, the plain numbers and the addresses of the one before it, but for the optimizer's
    rates.
    """
    case = configurations()[name]
    addresses: list[tuple[int, ...]] = []
    few = train(case, tmp_path / "few", batch_size=24)
    many = train(case, tmp_path / "many", batch_size=8, addresses=addresses)
    assert many.without_cudnn == {}
    assert many.bytes_alive() == 0
    more = {wait for wait, count in many.waits.items() if count > few.waits[wait]} - NOT_COMPARED
    assert more == IN_EACH_STEP.get(name, set())
    assert many.waits.keys() <= BETWEEN_STEPS.keys() | more
    # A CUDA graph repeats a step with the numbers and addresses that it was captured with.
    # The first step makes the optimizer's state, and after the last ones there is less to stream, or an evaluation.
    one, other = many.operations[1:3]
    assert addresses[1] == addresses[2]
    assert [operation for operation, _, _ in one] == [operation for operation, _, _ in other]
    changing = {place for (_, before, place), (_, after, _) in zip(one, other, strict=True) if before != after}
    assert changing <= OF_THE_OPTIMIZER


def test_the_data_stay_on_the_device_from_trial_to_trial_and_their_statistics_are_kept() -> None:
    """As a worker places them: what the next trial moves, and computes anew, does not grow with the data."""
    splits = make_splits()
    with pretended_cuda() as seen:
        placed = batches.place(splits, "cuda")
        assert placed.train.inputs.device.type == "cuda"
        assert batches.place(placed, "cuda") is placed
        seen.waits.clear()
        with pytest.MonkeyPatch.context() as patch:
            for _ in range(2):
                model = build_model(make_objective(networks.mlp), splits.spec, {"width": 8}, seed=0).to("cuda")
                model.fit_statistics(placed.train)
                patch.setattr(preprocessed, "_uint8_statistics", lambda inputs: pytest.fail("they are known"))
    assert torch.equal(model.cpu().input_mean, expected_mean(splits))  # type: ignore[arg-type]


def expected_mean(splits: Splits) -> torch.Tensor:
    assert isinstance(splits.train.inputs, torch.Tensor)
    return splits.train.inputs.double().mean((0, 2, 3)).float()[:, None, None]


class Recurrent(nn.Module):
    """A GRU over the rows of an image: cuDNN's has no backward pass in evaluation mode."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.gru = nn.GRU(spec.input_shape[-1], 8, batch_first=True)
        self.output = nn.Linear(8, spec.num_outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        cudnn_refuses = (
            images.is_cuda and torch.backends.cudnn.enabled and not self.training and torch.is_grad_enabled()
        )
        assert not cudnn_refuses, "cudnn RNN backward can only be called in training mode"
        outputs: torch.Tensor = self.output(self.gru(images.mean(1))[0][:, -1])
        return outputs


@pytest.fixture
def _without_collector() -> Iterator[None]:
    """What is alive only because Python has not looked for circles yet is memory that a trial does not get."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_collector")
@pytest.mark.parametrize("model", [networks.convnet, Recurrent])
def test_the_checks_run_and_leave_nothing_on_the_device(model: Callable[..., nn.Module]) -> None:
    task = Task(
        reference="pretended",
        objective=make_objective(model),
        space=Space(Group("step size", lr=Float(1e-4, 1e-1, log=True, default=1e-2))),
    )
    with pretended_cuda() as seen:
        subject = Subject.of(task, make_splits(), "cuda")
        verdicts = list(whole_list(subject, SealedSplit(lambda: make_splits().validation, 16)))
        assert [verdict.text for verdict in verdicts if "could not be made" in verdict.advice] == []
        assert seen.without_cudnn == {}
        del subject
        assert seen.bytes_alive() == 0


def test_the_winner_of_folds_is_trained_on_all_examples(tmp_path: Path) -> None:
    config = TrainConfig(max_epochs=2, batch_size=16, device="cuda")
    assignment = Assignment(number=0, model_parameters={"width": 8}, config=config, folder=tmp_path)
    with pretended_cuda() as seen:
        refit(assignment, make_objective(networks.mlp), make_splits(), num_epochs=1, value=0.5)
        assert seen.bytes_alive() == 0
    assert TrialDescription.read(tmp_path).best_epoch == 1


def test_a_training_there_equals_one_on_the_cpu(tmp_path: Path) -> None:
    """So what is seen of it is what a GPU would see."""
    curves = []
    for device in ("cuda", "cpu"):
        config = TrainConfig(
            max_epochs=2, batch_size=16, device=device, precision="fp32", compile="off", augment="crop+flip"
        )
        assignment = Assignment(number=0, model_parameters={"width": 8}, config=config, folder=tmp_path / device)
        curve: list[float] = []

        def report(result: Any, curve: list[float] = curve) -> Decision:
            curve.append(result.metrics["val/loss"])
            return Decision.GO_ON

        with pretended_cuda() if device == "cuda" else pytest.MonkeyPatch.context():
            run_trial(assignment, make_objective(networks.convnet), make_splits(), report)
        curves.append(curve)
    assert curves[0] == curves[1]


# CUDA graphs.


GRAPHS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "schedule": "one_cycle", "weight_decay": 0.01},
    "sgd without nesterov": {"optimizer": "sgd", "nesterov": False, "schedule": "cosine"},
    "sgd without momentum": {"optimizer": "sgd", "momentum": 0.0, "schedule": "cosine"},
    "adam": {"optimizer": "adam", "schedule": "one_cycle", "weight_decay": 0.01, "clip_norm": 0.1},
    "adamw": {"optimizer": "adamw", "schedule": "cosine", "weight_decay": 0.1, "ema_decay": 0.9},
    "images": {"model": "convnet", "augment": "crop+flip+cutout", "mixup": 0.2, "precision": "bf16"},
    "dropout": {"parameters": {"width": 16, "norm": "batch", "dropout": 0.2}, "label_smoothing": 0.1},
    "regression": {"loss": "huber", "metric": "r2"},
    "frozen layers": {"model": "airnet", "parameters": {"width": 4}, "augment": "alternating_flip+crop"},
}


def curve_of(
    compile_mode: str, *, model: str | Callable[..., nn.Module] = "mlp", **settings: Any
) -> tuple[list[float], Seen, str]:
    """Validation losses of a training with 12 steps an epoch, what was seen of it, and how it was compiled."""
    network = getattr(networks, model) if isinstance(model, str) else model
    parameters = settings.pop("parameters", {"width": 8} if isinstance(model, str) else {})
    splits = make_splits(is_regression=settings.get("metric") == "r2")
    config = TrainConfig(
        **{"max_epochs": 2, "batch_size": 4, "lr": 1e-3, "device": "cuda", "precision": "fp32", **settings},
        compile=compile_mode,
    )
    with pretended_cuda() as seen:
        built = build_model(make_objective(network), splits.spec, parameters, seed=0).to("cuda")
        built.fit_statistics(splits.train)
        results = list(trainer.fit(built, splits, config))
        del built, splits
        assert seen.bytes_alive() == 0
    return [result.metrics["val/loss"] for result in results], seen, results[-1].settled["compile"]


@pytest.mark.parametrize("name", GRAPHS)
def test_a_captured_training_equals_an_eager_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No rate, count or random draw stays what it was in the capture; eager steps come between for comparison."""
    monkeypatch.setattr(captured, "RACE_STEPS", 2)
    eager, _, _ = curve_of("off", **GRAPHS[name])
    graph, seen, mode = curve_of("graph", **GRAPHS[name])
    assert mode == "graph"
    assert seen.num_captures == 1
    assert seen.num_replays > 15
    rough = GRAPHS[name].get("precision") == "bf16"
    assert graph == pytest.approx(eager, rel=1e-2 if rough else 1e-4)


def test_a_captured_step_lets_the_host_wait_once_a_trial() -> None:
    waits = []
    for max_epochs in (1, 3):
        _, seen, _ = curve_of("graph", max_epochs=max_epochs)
        waits.append({kind: count for kind, count in seen.waits.items() if "captured.py" in kind[1]})
    assert waits[0] == waits[1]
    assert {place for _, place in waits[0]} == {"training/captured.py:_capture", "training/captured.py:_check"}


class Counting(nn.Module):
    """Its outputs depend on how often it was called, by a number that Python holds."""

    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.output = nn.Linear(spec.input_shape[-1], spec.num_outputs)
        self.num_calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.num_calls += self.training
        outputs: torch.Tensor = self.output(images.mean((1, 2))) * (self.num_calls % 7)
        return outputs


class Waiting(Counting):
    """Reads a number from the device in each step."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.output(images.mean((1, 2)) / (1 + abs(images.mean().item())))
        return outputs


class Full(Counting):
    """Runs out of memory in a capture."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        outputs: torch.Tensor = self.output(images.mean((1, 2)))
        return outputs


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Counting, "differs from an eager one"),
        (Waiting, "operation not permitted when stream is capturing"),
        (Full, "CUDA out of memory"),
    ],
)
def test_what_cannot_be_captured_is_trained_as_it_is_and_the_user_reads_why(
    model: type[nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    eager, _, _ = curve_of("off", model=model, optimizer="adamw")
    graph, seen, mode = curve_of("graph", model=model, optimizer="adamw")
    assert mode == "off"
    assert "steps are not captured as a CUDA graph" in caplog.text
    assert reason in caplog.text
    assert seen.num_captures == 1
    if model is not Counting:  # which was called twice more, for the check
        assert graph == pytest.approx(eager, rel=1e-4)


def test_auto_will_capture_models_of_known_modules_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert curve_of("auto", max_epochs=1)[2] == "off", "until it has run on a real GPU"
    monkeypatch.setattr(captured, "CAPTURED_BY_AUTO", True)
    assert curve_of("auto", max_epochs=1)[2] == "graph"
    assert curve_of("auto", max_epochs=1, model=Full)[1].num_captures == 0


def test_a_slower_captured_step_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(captured, "RACE_STEPS", 2)
    times = iter([2.0, 1.0])
    monkeypatch.setattr("pretended_cuda._Event.elapsed_time", lambda self, other: next(times))
    _, _, mode = curve_of("graph")
    assert mode == "off"
    assert "not captured as a CUDA graph: it is not faster" in caplog.text


# What the instrument finds.


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.ones(shape).to("cuda")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        (lambda: on_gpu(2) + torch.ones(2), "at least two devices"),
        (lambda: on_gpu(2, 2).index_select(0, torch.tensor([1])), "at least two devices"),
        (lambda: on_gpu(2).normal_(generator=torch.Generator()), "'cuda' device type for generator"),
        (lambda: on_gpu(2).numpy(), "can't convert cuda:0"),
        (
            lambda: torch.cuda.get_per_process_memory_fraction(torch.device("cuda")),
            "torch.device with a specified index",
        ),
    ],
)
def test_what_a_gpu_refuses_is_refused(wrong: Callable[[], object], error: str) -> None:
    with pretended_cuda(), pytest.raises((RuntimeError, TypeError, ValueError), match=error):
        wrong()


@pytest.mark.parametrize(
    ("waits", "kind"),
    [
        (lambda: float(on_gpu()), "item"),
        (lambda: bool(on_gpu() > 0), "item"),
        (lambda: on_gpu(2).tolist(), "tolist"),
        (lambda: on_gpu(2).cpu(), "copy to the host"),
        (lambda: torch.ones(2).to("cuda"), "copy from pageable memory"),
        (lambda: torch.ones(2).to("cuda", non_blocking=True), "copy from pageable memory"),
        (lambda: on_gpu(2)[on_gpu(2) > 0], "boolean mask"),
        (lambda: on_gpu(2).nonzero(), "nonzero"),
        (lambda: torch.cuda.synchronize(), "synchronize"),
    ],
)
def test_a_wait_of_the_host_is_counted(waits: Callable[[], object], kind: str) -> None:
    with pretended_cuda() as seen:
        waits()
    assert kind in {kind for kind, _ in seen.waits}
    with pretended_cuda() as seen:
        torch.ones(2).pin_memory().to("cuda", non_blocking=True).add_(1)
    assert seen.waits == {}


def test_a_convolution_without_cudnn_and_one_that_is_not_deterministic_are_found() -> None:
    with pretended_cuda() as seen:
        images = on_gpu(1, 1, 4, 4).requires_grad_()
        nn.functional.conv2d(images, on_gpu(1, 1, 3, 3))
        assert seen.without_cudnn == {}
        with torch.backends.cudnn.flags(benchmark=True):  # `enabled` is False by default
            nn.functional.conv2d(images, on_gpu(1, 1, 3, 3))
        assert seen.without_cudnn == {"?": 1}
        torch.use_deterministic_algorithms(True)
        try:
            with pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
                nn.functional.adaptive_max_pool2d(images, 1).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)


def test_a_graph_repeats_the_numbers_and_the_tensors_of_its_capture() -> None:
    with pretended_cuda():
        number, given, total = 1.0, on_gpu(2), on_gpu(2)
        with torch.inference_mode():
            bystander = on_gpu(2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = given * 2
            total.add_(result + number)
        assert total.tolist() == [1, 1], "a capture runs nothing"
        assert bystander.tolist() == [1, 1]
        number = 100.0
        given.fill_(5)
        graph.replay()
        graph.replay()
        assert result.tolist() == [10, 10]
        assert total.tolist() == [23, 23]
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
            total.sum().item()


def test_a_tensor_that_outlives_its_trial_is_found() -> None:
    with pretended_cuda() as seen:
        left = on_gpu(3)
        assert seen.bytes_alive() == 12
        del left
        assert seen.bytes_alive() == 0
