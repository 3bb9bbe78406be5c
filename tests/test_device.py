"""What this machine has, what of it can be used, and what happens when its memory does not suffice."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.data import of_classes
from helpers.kinds import CASES
from helpers.pretended_cuda import TOTAL_MEMORY, pretended_cuda
from helpers.training import ImageNet, image_splits, quick_config
from torch import Tensor, nn

from hpo import recurrent, split_dataset
from hpo.data import batches
from hpo.data.batches import place
from hpo.data.datasets import Splits
from hpo.errors import DeviceMemoryError, UnknownNameError, UsageError
from hpo.models.airnet import GlobalMaxPool
from hpo.training import compiled, device, trainer
from hpo.training.device import CONTEXT_BYTES, choose_device, limit_memory, memory_share, visible_gpus, why_gpus_fail
from hpo.training.evaluation import evaluate
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit

OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity ..."
)


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    why_gpus_fail.cache_clear()
    yield
    why_gpus_fail.cache_clear()


# Memory of the device.


@pytest.mark.pretended_gpu
def test_the_free_memory_of_a_gpu_without_an_index_is_known() -> None:
    with pretended_cuda():
        assert batches._free_memory(torch.device("cuda")) == TOTAL_MEMORY


@pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")  # torch 2.9 alone
def test_an_epoch_leaves_cudnn_on_and_the_choice_of_tf32_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(ImageNet):
        def forward(self, images: Tensor) -> Tensor:
            cudnn = torch.backends.cudnn
            seen.add((cudnn.enabled, cudnn.allow_tf32, cudnn.benchmark == self.training))
            return super().forward(images)

    seen: set[tuple[bool, bool, bool]] = set()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    next(iter(fit(Watched(), image_splits(), quick_config())))
    assert seen == {(True, False, True)}
    assert not torch.backends.cudnn.benchmark


@pytest.mark.parametrize("kind", ["sequences", "images"])
def test_cudnn_tries_out_its_algorithms_for_batches_of_one_shape_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the choice of the precision on, because cuDNN keeps for a shape what it has chosen first."""
    seen = []

    def look(module: nn.Module, *_: Any) -> None:
        if module.training:
            seen.append(torch.backends.cudnn.benchmark)

    def settle_precision(_wanted: str, module: nn.Module, *_: Any) -> str:
        look(module)
        return "fp32"

    monkeypatch.setattr(trainer, "settle_precision", settle_precision)
    splits = image_splits() if kind == "images" else split_dataset(CASES["classes of sequences"].data, seed=0)
    model = ImageNet() if kind == "images" else recurrent(splits.spec, width=8)
    model.register_forward_pre_hook(look)
    next(iter(fit(model, splits, quick_config())))
    assert set(seen) == {kind == "images"}
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("num_workers", "num_gpus", "share"), [(1, 1, 1), (2, 2, 1), (3, 2, 1 / 2), (5, 4, 1 / 2), (9, 4, 1 / 3)]
)
def test_the_shares_of_a_gpu_add_up_to_no_more_than_one(num_workers: int, num_gpus: int, share: float) -> None:
    assert memory_share(num_workers, num_gpus) == share
    on_first_gpu = len(range(0, num_workers, num_gpus))
    assert on_first_gpu * memory_share(num_workers, num_gpus) <= 1


@pytest.mark.parametrize("num_workers", [2, 8])
def test_the_workers_of_a_gpu_leave_room_for_their_contexts(num_workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together with what torch's limit does not count they take less than there is."""
    total, limits = 24e9, []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (total, total))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", limits.append)
    limit_memory(memory_share(num_workers, 1))
    assert num_workers * (limits[0] * total + CONTEXT_BYTES) < total
    with pytest.raises(DeviceMemoryError, match=r"40 workers do not fit on a GPU with 24.0 GB: .* use fewer --workers"):
        limit_memory(1 / 40)


# Which devices there are.


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lists two GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_this_torch_cannot_use_is_found_before_the_first_trial(caplog: pytest.LogCaptureFixture) -> None:
    """The product is really tried in another process, which has no GPU here."""
    device._PROBE, before = "import torch; torch.ones(2, device='cuda')", device._PROBE
    try:
        assert choose_device("auto") == "cpu"
        assert "the GPU cuda:1 cannot be used" in caplog.text
        with pytest.raises(UsageError, match=r"--device cuda:1 cannot be used: \w*Error: .*\. Update the driver"):
            choose_device("cuda:1")
    finally:
        device._PROBE = before
    assert choose_device("cpu") == "cpu"


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_works_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        tried.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="[null, null]")

    monkeypatch.setattr(subprocess, "run", run)
    assert [choose_device(name) for name in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    assert tried == [[sys.executable, "-P", "-c", device._PROBE, "2"]]
    with pytest.raises(UnknownNameError, match=r"no device 'cuda:2'.*Available: auto, cpu, cuda, cuda:0, cuda:1"):
        choose_device("cuda:2")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_that_fails_does_not_keep_the_other_from_being_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "why_gpus_fail", lambda: (None, "RuntimeError: no kernel image"))
    assert [choose_device(name) for name in ("auto", "cuda", "cuda:0")] == ["cuda", "cuda", "cuda:0"]
    assert "the GPU cuda:1 cannot be used (RuntimeError: no kernel image); training on cuda instead" in caplog.text
    assert visible_gpus("cuda") == ["0"]
    with pytest.raises(UsageError, match=r"--device cuda:1 cannot be used: .* or use --device cuda:0"):
        choose_device("cuda:1")
    monkeypatch.setattr(device, "why_gpus_fail", lambda: ("RuntimeError: no kernel image", None))
    assert [choose_device(name) for name in ("auto", "cuda:1")] == ["cuda:1", "cuda:1"]
    assert visible_gpus("cuda:1") == ["1"]


@pytest.mark.pretended_gpu
def test_the_product_that_is_tried_is_right_on_a_gpu_that_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", "1"])
    with pretended_cuda():
        exec(device._PROBE, {})
        assert capsys.readouterr().out == "[null]\n"
        exec(device._PROBE.replace("== 8", "== 9"), {})
    assert capsys.readouterr().out == '["a product is wrong"]\n'


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize(
    ("listed", "names"),
    [
        (None, ["0", "1"]),
        ("3,1", ["3", "1"]),
        ("0,1,2,3", ["0", "1"]),
        ("0, 1,-1,2", ["0", "1"]),
        ("MIG-a,MIG-b,MIG-c", ["MIG-a", "MIG-b", "MIG-c"]),
    ],
)
def test_workers_get_the_gpus_that_are_there(
    listed: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA ignores what follows a name that it does not know; torch counts no more than one slice of a MIG card."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed) if listed else monkeypatch.delenv("CUDA_VISIBLE_DEVICES", False)
    monkeypatch.setattr(device, "why_gpus_fail", lambda: (None, None))
    assert visible_gpus("cuda") == names
    assert visible_gpus("cuda:1") == [names[1]]
    assert visible_gpus("cpu") == []


def test_the_pooling_of_airnet_is_that_of_torch_and_has_a_deterministic_form() -> None:
    images = torch.randn(2, 3, 4, 5)
    assert torch.equal(GlobalMaxPool()(images), nn.AdaptiveMaxPool2d(1)(images).flatten(1))


# When memory does not suffice.


@pytest.mark.pretended_gpu
def test_data_that_turn_out_not_to_fit_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(splits: Splits, device: object) -> Splits:
        raise OUT_OF_MEMORY

    monkeypatch.setattr(Splits, "to", full)
    splits = image_splits()
    with pretended_cuda():
        assert place(splits, "cuda") is splits


class Tight(ImageNet):
    """A network of which the device holds no more than some examples at a time when it is evaluated."""

    def __init__(self, max_examples: int) -> None:
        super().__init__()
        self.max_examples = max_examples

    def forward(self, images: Tensor) -> Tensor:
        if not self.training and len(images) > self.max_examples:
            raise OUT_OF_MEMORY
        return super().forward(images)


def test_an_evaluation_that_does_not_fit_is_done_in_smaller_batches() -> None:
    """And so is the look into the network at the end of an epoch."""
    roomy, tight = (list(fit(Tight(size), image_splits(), quick_config(max_epochs=2))) for size in (1000, 5))
    for there, here in zip(roomy, tight, strict=True):
        compared = {name: value for name, value in there.metrics.items() if name != "time/epoch_s"}
        assert {name: here.metrics[name] for name in compared} == pytest.approx(compared, rel=1e-4)
    with pytest.raises(DeviceMemoryError, match=r"one example at a time; choose a smaller model"):
        evaluate(Tight(0), image_splits().validation, quick_config(), of_classes(3))


def test_running_out_of_memory_outside_of_a_step_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OUT_OF_MEMORY

    monkeypatch.setattr("hpo.training.averaging._renew_batch_norms", full)
    with pytest.raises(
        DeviceMemoryError, match=r"out of memory \(oom\): CUDA .* 2.00 GiB. Choose a smaller batch or model"
    ):
        list(fit(ImageNet(), image_splits(), quick_config(ema_decay=0.9)))


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("CUDA error: operation not permitted when capturing")])
def test_a_compiled_step_that_fails_continues_without(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With the batch that it failed on, and the number of steps so far."""

    def fails(*_: object, **__: object) -> Any:
        raise error

    def run(mode: str) -> Tensor:
        torch.manual_seed(0)
        model = ImageNet()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        step: Any = TrainingStep(model, nn.functional.cross_entropy, optimizer)
        train = image_splits().train
        assert isinstance(train.inputs, Tensor)
        for number, rows in enumerate(torch.arange(12).split(4)):
            step = compiled.CompiledStep(step) if mode != "off" and number == 1 else step
            step(train.inputs[rows], train.targets[rows])
        assert step.mode == "off"
        step.state_dict()  # as a checkpoint takes it
        assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    monkeypatch.setattr(compiled, "_compiled", [fails])
    assert torch.equal(run("step"), run("off"))
    assert "the step cannot be compiled and continues without" in caplog.text


@pytest.mark.parametrize("where", ["forward", "optimizer"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_running_out_of_memory_in_the_first_step_leaves_nothing_half_made(precision: str, where: str) -> None:
    """Neither a half-made state of the optimizer, nor gradients that fp16 has scaled back already."""
    failed: list[bool] = []

    def fail_once(place: str) -> bool:
        if place == where and not failed:
            failed.append(True)
            return True
        return False

    class FullModel(ImageNet):
        def forward(self, images: Tensor) -> Tensor:
            if fail_once("forward"):
                raise OUT_OF_MEMORY
            return super().forward(images)

    class FullOptimizer(torch.optim.AdamW):
        def step(self, closure: Any = None) -> Any:
            if fail_once("optimizer"):
                self.state[self.param_groups[0]["params"][0]]["step"] = torch.zeros(())
                raise OUT_OF_MEMORY
            return super().step(closure)

    def run(num_parts: int) -> Tensor:
        torch.manual_seed(0)
        model = FullModel()
        step = TrainingStep(model, nn.functional.cross_entropy, FullOptimizer(model.parameters()), precision=precision)
        step.num_parts = num_parts
        train = image_splits().train
        assert isinstance(train.inputs, Tensor)
        for rows in torch.arange(8).split(4):
            step(train.inputs[rows], train.targets[rows])
        assert step.num_parts == 2
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    once_failed = run(1)
    assert failed
    assert torch.equal(once_failed, run(2))
