"""The pretended GPU itself: what it refuses, what it counts, and what it repeats."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.pretended_cuda import pretended_cuda
from torch import nn

pytestmark = pytest.mark.pretended_gpu


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
