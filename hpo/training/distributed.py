"""One model trained by several processes, one per GPU, as one process would train it.

Each batch is divided over the processes, and `DistributedDataParallel` averages the gradients (Li et al. 2020,
arXiv:2006.15704). Everything else follows from all examples of a batch too: batch norms, losses, metrics, clipping. So
a configuration does not change its meaning with the number of GPUs. All that a training needs of it is in `Ranks`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from hpo.config import PRECISIONS, SEVERAL
from hpo.data.batches import own_part
from hpo.data.parts import map_tensors, tensors_of
from hpo.training.losses import is_mean_over_labels, num_averaged
from hpo.training.precision import autocast
from hpo.training.probe import backward_in_evaluation_mode

if TYPE_CHECKING:
    from hpo.config import TrainConfig
    from hpo.data.examples import DataSpec
    from hpo.data.parts import Batch
    from hpo.training.losses import LossFunction
    from hpo.training.step import TrainingStep

_OF_WHOLE_BATCHES = ("embedding", "instances")
"""Kinds of targets whose losses compare the examples of a batch."""


class Ranks:
    """The processes of a training: this one is `rank`, from 0, of `size`. With a size of 1 nothing is divided.

    All of them must make the same calls in the same order. Rank 0 alone speaks to others and writes files.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @property
    def leads(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def share_step(
        self, step: TrainingStep, spec: DataSpec, config: TrainConfig, part: Callable[[], tuple[Batch, Batch]]
    ) -> None:
        """Let a step take this rank's part of each batch, and leave the gradients of the whole batch.

        `part` gives such a part, to see what is trained; call this again when that changes.
        """
        synchronize_batch_norms(step.model)
        begin, end = own_part(config.batch_size, self.rank, self.size)
        loss = step.loss_function
        # The gradients of the ranks are averaged, whether or not their parts are equal.
        step.share = self.size * (end - begin) / config.batch_size
        if _compares_examples(spec, config):
            loss = self._of_all_outputs(loss, config.batch_size)
            step.share = 1.0
        elif is_mean_over_labels(loss):
            step.num_averaged = partial(_num_of_all, loss)
            loss = _of_all_labels(loss, config.batch_size / (end - begin))
        step.precision = PRECISIONS[int(self._from_first([PRECISIONS.index(step.precision)])[0])]
        # A rank that takes its part in halves, because its memory is full, would leave the others waiting.
        step.may_halve = False
        step.forward = None  # an earlier one's hooks would reduce the gradients as well
        step.forward = DistributedDataParallel(
            _WithLoss(step.model, loss), find_unused_parameters=_leaves_some_out(step, *part()), **_OWN_BUFFERS
        )

    def outputs(self, model: nn.Module, inputs: Batch) -> Any:
        """What the model makes of a batch, of which each rank takes its part."""
        size = len(tensors_of(inputs)[0])
        if size < self.size or self.size == 1:
            return model(inputs)
        parts = [own_part(size, rank, self.size) for rank in range(self.size)]
        begin, end = parts[self.rank]
        sizes = [end - begin for begin, end in parts]
        own = model(map_tensors(lambda tensor: tensor[begin:end], inputs))
        return map_tensors(lambda tensor: _joined(tensor, sizes, self.rank), own)

    def agree_on_buffers(self, model: nn.Module) -> None:
        """Give every rank the model's buffers of rank 0. Those of batch norms are the same already."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def agreed(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The metrics of rank 0: a GPU may round differently, and all must decide alike."""
        if self.size == 1:
            return dict(metrics)
        return dict(zip(metrics, self._from_first(list(metrics.values())), strict=True))

    def of_first(self, tensor: Tensor) -> Tensor:
        """The tensor of rank 0, on the CPU."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def _of_all_outputs(self, loss_function: LossFunction, batch_size: int) -> Callable[[Any, Any], Tensor]:
        """The loss of a whole batch, which every rank computes from the outputs of all."""
        parts = [own_part(batch_size, rank, self.size) for rank in range(self.size)]
        shares = [end - begin for begin, end in parts]

        def loss(outputs: Any, targets: Any) -> Tensor:
            # Of the kind `instances` each example is there twice.
            times = len(tensors_of(targets)[0]) // shares[self.rank]
            sizes = [times * size for size in shares]

            def gather(tensor: Tensor) -> Tensor:
                of_all: Tensor = _OfAll.apply(tensor, sizes, self.rank)
                return of_all

            return loss_function(map_tensors(gather, outputs), map_tensors(gather, targets))

        return loss

    @torch.inference_mode()
    def total(self, counted: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        total = counted.clone()
        dist.all_reduce(total)
        return total

    def _from_first(self, numbers: Sequence[float]) -> list[float]:
        agreed = torch.tensor(numbers, dtype=torch.float64)
        dist.broadcast(agreed, 0)
        return agreed.tolist()


_OWN_BUFFERS: dict[str, Any] = (
    {"forward_sync_buffers": False}  # new in torch 2.15, where the other one warns
    if "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)
"""Each rank keeps its buffers during an epoch; see `Ranks.agree_on_buffers`."""

ALONE = Ranks()
"""A training in one process."""


def join_ranks(store: dist.TCPStore, rank: int, size: int) -> Ranks:  # type: ignore[name-defined]
    """Become one of the ranks of this machine, which find each other in `store`; returns when all have joined."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # its sockets are for this machine alone
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    return Ranks(rank, size)


def _compares_examples(spec: DataSpec, config: TrainConfig) -> bool:
    """Whether a loss is no mean over the examples of a batch."""
    if spec.kind != SEVERAL:
        return spec.kind in _OF_WHOLE_BATCHES or config.loss == "dice"
    return any(of.kind in (*_OF_WHOLE_BATCHES, "segmentation") for of in spec.targets.values())


class _WithLoss(nn.Module):
    """Model and loss as one: DistributedDataParallel must see all that gradients come through."""

    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model = model
        self.loss_function = loss_function

    def forward(self, inputs: Batch, targets: Batch) -> tuple[Any, Tensor]:
        outputs = self.model(inputs)
        return outputs, self.loss_function(outputs, targets)


def _leaves_some_out(step: TrainingStep, inputs: Batch, targets: Batch) -> bool:
    """Whether the loss does not depend on all that is trained, which DistributedDataParallel has to know."""
    model = step.model.eval()
    with backward_in_evaluation_mode(model), autocast(step.precision, next(model.parameters()).device):
        loss = step.loss_function(model(inputs), targets)
        if not loss.requires_grad:  # these examples may happen to have none, as for a triplet loss
            return True
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    return any(gradient is None for gradient in gradients)


def _num_of_all(loss_function: LossFunction, targets: Batch) -> Tensor:
    """How many labels a mean over labels is taken over, in the parts of all ranks."""
    total = torch.as_tensor(num_averaged(loss_function, targets))
    dist.all_reduce(total)
    return total


def _of_all_labels(loss_function: LossFunction, num_parts: float) -> Callable[[Any, Any], Tensor]:
    """A mean over the labels of a rank's part, weighted so that the mean over examples is one over all labels.

    `num_parts` is how many of such parts a batch has.
    """

    def loss(outputs: Any, targets: Any) -> Tensor:
        share = num_averaged(loss_function, targets) / _num_of_all(loss_function, targets).clamp(min=1)
        return loss_function(outputs, targets) * (num_parts * share)

    return loss


def _joined(own: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
    """The outputs of all ranks, one after the other; `sizes` are the examples of each. Of scalars the mean."""
    if own.ndim == 0:
        total = own * sizes[rank] / sum(sizes)
        dist.all_reduce(total)
        return total
    # Bytes, which every backend moves, and of one number for all.
    filled = own.new_zeros((max(sizes), *own.shape[1:]))
    filled[: len(own)] = own
    sent = filled.flatten().view(torch.uint8)
    received = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(received, sent)
    return torch.cat(
        [part.view(own.dtype).view(filled.shape)[:size] for part, size in zip(received, sizes, strict=True)]
    )


def synchronize_batch_norms(model: nn.Module) -> None:
    """Let torch's batch norms in a model take mean and deviation from all ranks' parts of a batch."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and type(module).forward is _BatchNorm.forward:
            module.__class__ = SynchronizedBatchNorm  # weights, buffers and hooks stay what and where they are


class SynchronizedBatchNorm(_BatchNorm):
    """A batch norm whose batch is divided over ranks; in evaluation mode it is torch's.

    torch's SyncBatchNorm does the same on GPUs alone, with kernels of its own; this one runs on CPUs as well, so that
    it can be tested without GPUs. Ranks may have parts of different sizes.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"a batch norm takes inputs (B, C, ...), not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        values = input.float()
        others = [dimension for dimension in range(input.ndim) if dimension != 1]
        variance, mean = torch.var_mean(values, others, correction=0)
        count = mean.new_full((1,), values.numel() / len(mean))
        of_ranks: Tensor = _Gathered.apply(torch.cat((mean, variance, count)))  # (ranks, 2 C + 1)
        means, variances, counts = torch.split(of_ranks, [len(mean), len(mean), 1], dim=1)
        # Chan, Golub and LeVeque 1983, https://doi.org/10.1080/00031305.1983.10483115, equation 2.1, for all at once
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        variance = (shares * (variances + (means - mean).square())).sum(0)
        self._track(mean.detach(), variance.detach(), counts.detach().sum())
        scale = (variance + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        shape = [1, -1, *[1] * (input.ndim - 2)]
        outputs: Tensor = values * scale.view(shape) + shift.view(shape)
        return outputs.to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None, "they are tracked"
        self.num_batches_tracked.add_(1)
        weight = 1 / self.num_batches_tracked.float() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, weight)
        self.running_var.lerp_(variance * count / (count - 1), weight)


class _OfAll(torch.autograd.Function):
    """The tensors (B, ...) of all ranks, one after the other; the gradient of each is what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, sizes: Sequence[int], rank: int) -> Tensor:
        ctx.part = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        return _joined(own, sizes, rank)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[ctx.part], None, None


class _Gathered(torch.autograd.Function):
    """The tensors of all ranks, stacked; the gradient of each is what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total[dist.get_rank()]
