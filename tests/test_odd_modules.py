"""Modules as strangers write them: lazy, complex, cached, shared, with state of their own; and what is refused."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.data import LR_SPACE
from helpers.training import assert_equal_weights, weights_of, without_time
from torch import Tensor, nn
from torch.nn import functional, utils

from hpo import Choice, Group, HpoError, Objective, Ragged, Space, UsageError, hold_out, split_dataset
from hpo.checks.checklist import quick_part
from hpo.checks.compatibility import check_task
from hpo.checks.network import check_forward
from hpo.checks.verdicts import Subject, Verdict
from hpo.data.datasets import Splits
from hpo.deploy.exporters import write_weights
from hpo.errors import ExportError
from hpo.models.copies import copy_of
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.task import Task, load_dataset
from hpo.training import precision
from hpo.training.averaging import AveragedWeights
from hpo.training.checkpoint import CheckpointFolder, load_weights, save_weights
from hpo.training.optimizers import Lamb, build_optimizer
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit

NUM = 60
FEATURES = torch.randn(NUM, 4, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(NUM) % 3
IMAGES = torch.randint(256, (NUM, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
AVERAGES = [{}, {"ema_decay": 0.9}]


def prepared(model: Callable[..., Any], inputs: Any = FEATURES, **of_task: Any) -> tuple[Task, Splits]:
    settings = {"batch_size": 8, "max_epochs": 2, "compile": "off"} | of_task.pop("settings", {})
    objective = Objective(
        name="odd", description="odd", load=lambda folder: hold_out(inputs, CLASSES, ["a", "b", "c"]), model=model,
        space=LR_SPACE, settings=settings, **of_task,
    )  # fmt: skip
    task = Task(reference="odd", objective=objective, space=LR_SPACE)
    return task, split_dataset(load_dataset(task, Path()), seed=0)


def built(task: Task, splits: Splits) -> PreprocessedModel:
    model = build_model(task.objective, splits.spec, {}, seed=1)
    model.fit_statistics(splits.train)
    return model


def assert_trains_and_resumes(task: Task, splits: Splits, folder: Path, **settings: Any) -> None:
    """Checks, epochs, a checkpoint that another process could continue, and weights that another model takes."""
    check_task(task, splits)
    config = task.train_config(task.space.defaults(), **settings)
    whole = built(task, splits)
    results = list(fit(whole, splits, config))
    assert not results[-1].diverged
    begun = fit(built(task, splits), splits, config, checkpoint=CheckpointFolder(folder))
    next(begun)
    begun.close()
    resumed = built(task, splits)
    again = list(fit(resumed, splits, config, checkpoint=CheckpointFolder(folder)))
    assert [without_time(result) for result in again] == [without_time(result) for result in results]
    loaded = built(task, splits)
    loaded.load_state_dict(load_weights(folder / "best.pt", save_weights(resumed.state_dict(), folder / "best.pt")))
    inputs, _ = splits.validation.batch(slice(None))
    torch.testing.assert_close(loaded.eval()(inputs), whole.eval()(inputs))


# --- modules that work ------------------------------------------------------------------------------------------------


class Spectral(nn.Module):
    """Complex weights: a fused optimizer refuses them."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(0.3 * torch.randn(3, 4, dtype=torch.complex64))
        self.output = nn.Linear(3, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output((torch.fft.fft(inputs) @ self.filter.T).abs())


class Cached(nn.Linear):
    """Keeps a mask that it makes where it has none, be it in an evaluation."""

    mask: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.mask is None or not self.training:
            self.mask = torch.ones(3)
        return super().forward(inputs) * self.mask


class Growing(nn.Linear):
    """A buffer that is not saved, and as long as the largest batch so far."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("positions", torch.zeros(1), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        if len(self.positions) < len(inputs):
            self.positions = torch.zeros(len(inputs))
        return super().forward(inputs) + self.positions[: len(inputs), None]


class Counting(nn.Linear):
    """Has a state beside its tensors, which comes back with them."""

    calls = 0

    def get_extra_state(self) -> dict[str, Any]:
        return {"calls": [self.calls], "ones": torch.ones(2)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        [self.calls] = state["calls"]

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(inputs)


class Skipping(nn.Module):
    """Passes over a layer in half of the steps, as stochastic depth does."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped, self.output = nn.Linear(4, 4), nn.Linear(4, 3)
        self.steps = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps += self.training
        skips = self.training and torch.initial_seed() % 2 + self.steps > 3 and self.steps % 2 == 1
        return self.output(inputs if skips else self.skipped(inputs))


class WithInteger(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.count = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)


class Kept(nn.Linear):
    """Keeps what it has computed, with its graph."""

    def forward(self, inputs: Tensor) -> Tensor:
        self.last = {"outputs": (super().forward(inputs),)}
        return self.last["outputs"][0]


WORKING: dict[str, Callable[..., nn.Module]] = {
    "lazy": lambda spec: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(3)),
    "complex": lambda spec: Spectral(),
    "weight norm, as it was": lambda spec: nn.Sequential(
        utils.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "spectral norm, as it was": lambda spec: nn.Sequential(
        utils.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 3)
    ),
    "weight norm": lambda spec: utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    "spectral norm": lambda spec: utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    "cache": lambda spec: Cached(4, 3),
    "growing buffer": lambda spec: Growing(),
    "extra state": lambda spec: Counting(4, 3),
    "kept outputs": lambda spec: Kept(4, 3),
    "integers": lambda spec: WithInteger(),
    "scripted": lambda spec: torch.jit.script(nn.Linear(4, 3)),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
@pytest.mark.parametrize("averages", AVERAGES, ids=["last", "ema"])
@pytest.mark.parametrize("name", WORKING)
def test_an_odd_module_is_checked_trained_averaged_and_resumed(
    name: str, averages: dict[str, Any], tmp_path: Path
) -> None:
    task, splits = prepared(WORKING[name])
    assert_trains_and_resumes(task, splits, tmp_path, **averages)


@pytest.mark.parametrize("name", ["lazy", "complex", "cache", "extra state"])
def test_the_quick_checks_take_an_odd_module(name: str) -> None:
    verdicts = quick_part(Subject.of(*prepared(WORKING[name]), "cpu"))
    assert [(verdict.state, verdict.text) for verdict in verdicts if verdict.state == "wrong"] == []


def test_lazy_weights_follow_from_the_seed_and_are_decayed() -> None:
    task, splits = prepared(WORKING["lazy"])
    one, same, other = (build_model(task.objective, splits.spec, {}, seed=seed) for seed in (1, 1, 2))
    assert_equal_weights(weights_of(one), weights_of(same))
    assert not torch.equal(one.network[0].weight, other.network[0].weight)
    assert one.training
    assert one.network[1].num_batches_tracked == 0
    config = task.train_config(task.space.defaults(), weight_decay=0.1)
    decayed, others = build_optimizer(one, config).param_groups
    assert [parameter.ndim for parameter in decayed["params"]] == [2, 2]
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_a_lazy_layer_of_sequences_and_of_several_inputs_finds_its_size() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.output = nn.Embedding(9, 5), nn.LazyLinear(3)

        def forward(self, inputs: dict[str, Any]) -> Tensor:
            words = self.embedding(inputs["words"].values).mean(1)
            return self.output(torch.cat([words, inputs["numbers"]], 1))

    words = Ragged.of([[1 + row % 5, 2] for row in range(NUM)])
    task, splits = prepared(lambda spec: Both(), {"words": words, "numbers": FEATURES})
    assert built(task, splits).network.output.in_features == 9


def test_a_lazy_layer_that_is_not_used_is_named() -> None:
    class Unused(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.more = nn.LazyLinear(2)

    with pytest.raises(UsageError, match=r"the lazy layer more\.weight is not used in forward: leave it out"):
        check_task(*prepared(lambda spec: Unused()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "nadam", "adamax", "adagrad", "rmsprop", "lamb", "muon"])
def test_each_optimizer_trains_complex_weights(optimizer: str) -> None:
    task, splits = prepared(WORKING["complex"])
    changes = {"optimizer": optimizer, "max_epochs": 8, "l1": 1e-4, "max_norm": 5.0, "clip_norm": 1.0}
    config = task.train_config({"lr": 0.001 if optimizer == "rmsprop" else 0.02}, **changes)
    model = built(task, splits)
    before = model.network.filter.detach().clone()
    results = list(fit(model, splits, config))
    assert results[-1].metrics["train/loss"] < results[0].metrics["train/loss"]
    assert (model.network.filter != before).any()


def test_lamb_treats_a_complex_weight_as_pairs_of_real_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, *gradients = torch.randn(4, 3, 4, 2, generator=generator).unbind()
    stepped = []
    for form in (torch.clone, torch.view_as_complex):
        parameter = nn.Parameter(form(weight.clone()))
        optimizer = Lamb([{"params": [parameter], "weight_decay": 0.01}], lr=0.1, betas=(0.9, 0.999), eps=1e-8)
        for gradient in gradients:
            parameter.grad = form(gradient.clone())
            optimizer.step()
        stepped.append(parameter.detach())
    torch.testing.assert_close(torch.view_as_real(stepped[1]), stepped[0])


def test_swa_takes_integers_as_they_are(tmp_path: Path) -> None:
    assert_trains_and_resumes(*prepared(WORKING["integers"]), tmp_path, swa_start=0.3)


def test_fp16_is_refused_for_complex_weights() -> None:
    task, splits = prepared(WORKING["complex"])
    config = task.train_config(task.space.defaults(), precision="fp16")
    with pytest.raises(UsageError, match="--precision fp16 does not work with complex parameters; use bf16 or fp32"):
        next(fit(built(task, splits), splits, config))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_layer_may_be_passed_over_in_some_steps(optimizer: str) -> None:
    model = Skipping()
    config = prepared(lambda spec: model)[0].train_config({"lr": 0.1}, optimizer=optimizer)
    step = TrainingStep(model, functional.cross_entropy, build_optimizer(model, config))
    moved = []
    for _ in range(6):
        before = model.skipped.weight.detach().clone()
        step(FEATURES, CLASSES)
        moved.append(not torch.equal(model.skipped.weight, before))
    assert moved[:2] == [True, True]
    assert False in moved
    assert model.output.weight.isfinite().all()


def test_a_model_that_cannot_be_copied_is_trained_and_named_where_it_must_be_copied(tmp_path: Path) -> None:
    class Locked(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 3)
            self.lock = threading.Lock()

    task, splits = prepared(lambda spec: Locked())
    assert_trains_and_resumes(task, splits, tmp_path)
    verdicts = quick_part(Subject.of(task, splits, "cpu"))
    assert {verdict.state for verdict in verdicts} == {"ok"}
    with pytest.raises(
        UsageError, match=r"ema_decay and swa_start average a copy of the model, .*cannot pickle '_thre"
    ):
        AveragedWeights(Locked(), task.train_config(task.space.defaults(), ema_decay=0.9))


def test_a_copy_has_no_graph_and_shares_nothing() -> None:
    layer = Kept(4, 3)
    layer(FEATURES)
    copied = copy_of(layer)
    assert torch.equal(copied.last["outputs"][0], layer.last["outputs"][0])
    assert not copied.last["outputs"][0].requires_grad
    assert not {tensor.data_ptr() for tensor in copied.parameters()} & {t.data_ptr() for t in layer.parameters()}


def test_a_loss_that_cannot_be_copied_is_refused() -> None:
    class Locked(nn.CrossEntropyLoss):
        def __init__(self) -> None:
            super().__init__()
            self.lock = threading.Lock()

    with pytest.raises(UsageError, match=r"the loss of task 'odd' cannot be copied for each trial: .*give its class"):
        check_task(*prepared(lambda spec: nn.Linear(4, 3), loss=Locked(), metric="loss"))


def test_the_best_epoch_keeps_its_extra_state_and_safetensors_says_that_it_cannot(tmp_path: Path) -> None:
    task, splits = prepared(WORKING["extra state"])
    model = built(task, splits)
    *_, last = fit(model, splits, task.train_config({"lr": 0.01}, max_epochs=4))
    assert model.network.calls == last.best_epoch * (len(splits.train) // 8)
    with pytest.raises(ExportError, match=r"safetensors holds tensors alone, and network\._extra_state is a dict"):
        write_weights(model.state_dict(), tmp_path, {})


class Halved(nn.Module):
    """A convolution, and an operation that a GPU does not have in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.output = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        found = self.convolution(images)
        if found.dtype is torch.bfloat16:
            raise RuntimeError("cuFFT does not support tensor of type: BFloat16")
        return self.output(torch.fft.rfft2(found).abs().mean((2, 3)))


def test_a_model_without_bf16_is_trained_in_fp32_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "_multiplies_bf16", lambda device: True)
    task, splits = prepared(lambda spec: Halved(), IMAGES)
    with caplog.at_level(logging.WARNING, "hpo"):
        result = next(fit(built(task, splits), splits, task.train_config(task.space.defaults(), precision="auto")))
    assert result.settled["precision"] == "fp32"
    [record] = caplog.records
    assert record.getMessage().startswith("the model does not run in bf16 and is trained in fp32: RuntimeError")


# --- outputs ----------------------------------------------------------------------------------------------------------


@dataclass
class Outputs:
    logits: Tensor
    hidden: Tensor | None = None


class Returning(nn.Linear):
    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__(4, 3)
        self.wrap = wrap

    def forward(self, inputs: Tensor) -> Any:
        return self.wrap(super().forward(inputs))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: {"logits": logits, "loss": None},
        lambda logits: {"aux": logits * 0, "out": logits},
        Outputs,
        lambda logits: SimpleNamespace(out=logits),
    ],
    ids=["logits", "out", "dataclass", "attribute"],
)
def test_the_main_output_of_several_is_trained(wrap: Callable[[Tensor], Any]) -> None:
    task, splits = prepared(lambda spec: Returning(wrap))
    check_task(task, splits)
    model = built(task, splits)
    assert model(FEATURES[:5]).shape == (5, 3)
    assert len(model.predict(FEATURES[:5])) == 5
    assert not next(fit(model, splits, task.train_config(task.space.defaults()))).diverged


def test_a_loss_of_the_task_gets_all_outputs() -> None:
    def loss(outputs: Outputs, targets: Tensor) -> Tensor:
        return functional.cross_entropy(outputs.logits, targets)

    task, splits = prepared(lambda spec: Returning(Outputs), loss=loss, metric="loss")
    assert isinstance(built(task, splits)(FEATURES[:5]), Outputs)


@pytest.mark.parametrize("wrap", [lambda logits: (logits, logits), lambda logits: {"mine": logits}])
def test_outputs_without_a_main_one_are_refused_in_one_line(wrap: Callable[[Tensor], Any]) -> None:
    message = (
        r"returns a (tuple|dict); it must return one tensor, or have it as logits or out among its outputs, or the"
    )
    with pytest.raises(UsageError, match=message):
        check_task(*prepared(lambda spec: Returning(wrap)))


# --- what is refused, or warned of ------------------------------------------------------------------------------------

SHARED = nn.Linear(4, 3)
SCALE = torch.ones(3)


class SharedBuffer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.register_buffer("scale", SCALE)


class SharedMemory(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 3)
        self.scale = nn.Parameter(SCALE)


class FixedBatch(nn.Module):
    """A hidden state of one batch size, as tutorials have it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.recurrent, self.output = nn.GRU(1, 8, batch_first=True), nn.Linear(8, 3)
        self.hidden = torch.zeros(1, size, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.output(self.recurrent(inputs[..., None], self.hidden)[0][:, -1])


class Nothing(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs[:, :3]


REFUSED: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "a module made at import": (
        lambda spec: SHARED,
        r"two calls of the model of task 'odd' return models that share weight, so that a trial would begin with",
    ),
    "a part of it": (lambda spec: nn.Sequential(SHARED, nn.ReLU(), nn.Linear(3, 3)), r"that share 0\.weight, so that"),
    "a buffer": (lambda spec: SharedBuffer(), r"that share scale, so that .*copy\.deepcopy or clone"),
    "the memory of a parameter": (lambda spec: SharedMemory(), "that share scale, so that"),
    "no parameters": (lambda spec: Nothing(), "cannot be trained: it has no parameters; let some have requires_grad"),
    "frozen parameters": (
        lambda spec: nn.Linear(4, 3).requires_grad_(False),
        "cannot be trained: the 2 parameters of the model are all frozen",
    ),
    "a hidden state for batches of 8": (
        lambda spec: FixedBatch(8),
        r"takes a batch of 8 examples, but not of 2 \(RuntimeError: Expected hidden size .*\): batches differ in size",
    ),
    "a hidden state for batches of 2": (
        lambda spec: FixedBatch(2),
        r"takes a batch of 2 examples, but not of 3 .* let it take the size from its inputs, as in inputs\.shape\[0\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_module_that_would_fail_or_mislead_is_refused_before_the_search(name: str) -> None:
    model, message = REFUSED[name]
    with pytest.raises(HpoError, match=message) as raised:
        check_task(*prepared(model))
    assert "\n" not in str(raised.value)


def forward_verdict(last: nn.Module, **of_task: Any) -> Verdict:
    task, splits = prepared(lambda spec: nn.Sequential(nn.Linear(4, 3), last), **of_task)
    return check_forward(Subject.of(task, splits, "cpu"))


def test_probabilities_before_a_loss_of_logits_get_a_warning() -> None:
    verdict = forward_verdict(nn.Softmax(1))
    assert verdict.state == "warning"
    assert "probabilities already, and cross_entropy takes logits" in verdict.advice
    for harmless in (nn.LogSoftmax(1), nn.Identity(), nn.Sigmoid()):
        assert forward_verdict(harmless).state == "ok"
    own = {"loss": lambda outputs, targets: functional.nll_loss(outputs.log(), targets), "metric": "loss"}
    assert forward_verdict(nn.Softmax(1), **own).state == "ok"


def test_batch_norm_and_batches_of_one_are_refused_before_the_search() -> None:
    task, splits = prepared(lambda spec: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    task = replace(task, space=Space(Group("sizes", batch_size=Choice(1, 8, default=8))))
    with pytest.raises(UsageError, match="cannot train with batch_size=1, for its batch norms need more than one exam"):
        check_task(task, splits)
    check_task(replace(task, space=Space(Group("sizes", batch_size=Choice(2, 8, default=8)))), splits)
