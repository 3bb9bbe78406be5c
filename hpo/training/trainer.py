"""The training of one trial: `fit` yields one result per epoch, and the caller decides whether to continue."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from hpo.config import config_fields, derive_seed
from hpo.data.batches import build_batches, num_views, place
from hpo.errors import CheckpointError, DeviceMemoryError, UsageError, first_line
from hpo.models.preprocessed import own_of
from hpo.models.pretrained import find_pretrained
from hpo.training.averaging import AveragedWeights
from hpo.training.captured import CapturedStep, wants_graph
from hpo.training.checkpoint import CheckpointFolder, CheckpointWriter
from hpo.training.compiled import CompiledStep, check_compile_mode, has_formula, settle_compile_mode
from hpo.training.device import is_out_of_memory, prepare_deterministic_products
from hpo.training.distributed import ALONE, Ranks
from hpo.training.evaluation import has_thresholds, losses_of_examples, measure, read_all
from hpo.training.losses import evaluation_loss, least_training_loss, target_scale, training_loss
from hpo.training.metrics import EpochMetrics, check_metric
from hpo.training.optimizers import build_optimizer, load_optimizer_state
from hpo.training.precision import has_convolutions, settle_precision
from hpo.training.probe import Probe
from hpo.training.schedules import Plateau, Point, build_schedule
from hpo.training.step import StepResult, TrainingStep
from hpo.training.stopping import EarlyStopping
from hpo.training.symptoms import Symptoms

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hpo.config import TrainConfig
    from hpo.data.datasets import Splits
    from hpo.data.parts import Batch


NORM_EVERY = 8
"""Steps between two measurements of the gradients' norm where clipping does not need it."""


@dataclass(frozen=True)
class EpochResult:
    """One epoch in plain values, so that it can cross processes and be logged as it is."""

    epoch: int
    """From 1."""

    metrics: dict[str, float]
    """`train/loss`, `val/loss` and every other metric of the task for both (`auroc` for the validation alone), `lr` at
    the epoch's end, `grad_norm` (before clipping; the mean over the steps, or over every eighth one if nothing is
    clipped or compiled) and `time/epoch_s`. The train values are means over the epoch as the weights change, with
    dropout and augmentation; `train/loss` is what was minimised, `val/loss` is `losses.evaluation_loss`. `watch/gap` is
    the validation loss without the training loss, `watch/epochs_without_progress` of the training loss; the others of
    `watch/` are in `hpo.training.probe`."""

    value: float
    """The metric that decides, on the validation split; NaN where the epoch diverged."""

    best_value: float | None
    """Best value up to here; None where there was no finite one."""

    best_epoch: int | None

    is_best: bool
    """Whether this epoch improved on all before it, however little."""

    diverged: bool
    """Whether a loss or the value was not finite. It is the last epoch then."""

    settled: dict[str, str]
    """What the trainer has settled by itself: `precision`, and `compile` (off, step or graph)."""

    symptoms: dict[str, float]
    """What goes wrong by this epoch; see `hpo.training.symptoms`."""

    is_last: bool = False
    """Whether the training ends here, or with folds that of the fold, if the caller does not end it before."""

    fold: int | None = None
    """Fold of a cross-validation that the epoch belongs to, from 1; None without folds."""

    fold_value: float | None = None
    """The best value up to here in this fold alone."""


def fit(
    model: nn.Module,
    splits: Splits,
    config: TrainConfig,
    *,
    checkpoint: CheckpointFolder | None = None,
    num_epochs: int | None = None,
    is_streamed: bool = False,
    ranks: Ranks = ALONE,
    tunes_thresholds: bool = True,
) -> Generator[EpochResult, None, None]:
    """Train `model` and yield the result of each epoch, until max_epochs, early stopping or divergence.

    `model` takes raw batches and holds its own preprocessing; for a regression its outputs are in the target's units.
    It is moved to `config.device`. When the generator ends, or is closed, the model has the weights of the best epoch
    and is in evaluation mode; where no epoch was finite its weights stay as they are.

    With `checkpoint` the state after each epoch is handed to a `CheckpointWriter`, and the last one is written when the
    generator ends or is closed. A run that was interrupted continues after the last epoch that was written, and is
    bit-equal to one that was not; for that the caller passes the same model, splits and config. Its first result is
    then the saved one once more: whoever was killed may not have got it.

    With `num_epochs` nothing is judged by the validation split: the training ends after that many of the `max_epochs`
    that its schedule is made for, and the model has the last weights. With `is_streamed` the data stay where they are,
    even if the device has room for them, and the results are the same.

    Metrics of several labels on the validation split are those with the thresholds that the model will get from it, if
    it gets any; without `tunes_thresholds` the thresholds are 0.

    With several `ranks` all of them make this call, with an equal model, and yield equal results; the config's
    `compile` must be "off". The first rank alone writes checkpoints.

    The global random state is seeded again for each epoch. Raises UsageError before any work where the config does not
    fit the data or the device, CheckpointError if the folder holds a run with another config, and DeviceMemoryError
    where half a batch does not fit either.
    """
    run = _Run(
        model, splits if is_streamed else place(splits, config.device), config, num_epochs, ranks, tunes_thresholds
    )
    saved = run.resume(checkpoint) if checkpoint else None
    # The stack first writes the last state, then gives the model its best weights.
    with ExitStack() as ending:
        ending.callback(run.restore_best_weights)
        writer = ending.enter_context(CheckpointWriter(checkpoint)) if checkpoint and ranks.leads else None
        result = saved
        if result:
            yield result
        while result is None or not result.is_last:
            result = run.next_epoch(result.epoch + 1 if result else 1)
            if writer:
                writer.save(run.state_dict(result), result.epoch)
            yield result


class _Run:
    """A training under way: all that changes from epoch to epoch. The splits are where they stay."""

    def __init__(
        self,
        model: nn.Module,
        splits: Splits,
        config: TrainConfig,
        num_epochs: int | None,
        ranks: Ranks,
        tunes_thresholds: bool,
    ) -> None:
        self.ranks = ranks
        self.tunes_thresholds = tunes_thresholds and has_thresholds(splits.spec, config)
        self.is_judged = num_epochs is None
        self.last_epoch = config.max_epochs if num_epochs is None else num_epochs
        self.spec, self.own = splits.spec, own_of(model)
        check_metric(config.metric, self.spec, self.own)
        self.config = config
        scale = target_scale(splits.train, splits.spec)
        self.model = model.to(config.device)
        self.loss_function = evaluation_loss(config, self.spec, scale, self.own)
        self.splits = splits
        self.order, self.augmentation = torch.Generator(), torch.Generator()
        self.batches = build_batches(
            self.splits.train,
            config,
            self.spec,
            order=self.order,
            augmentation=self.augmentation,
            difficulty=self.own.difficulty,
            rank=ranks.rank,
            num_ranks=ranks.size,
        )
        check_fine_tuning(model, config)
        if has_convolutions(model):
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(self.model, config, self.own)
        self.schedule = build_schedule(self.optimizer, config, config.max_epochs * len(self.batches))
        loss = training_loss(config, splits.train, self.spec, self.own)
        with self._algorithms_of_steps():  # what cuDNN chooses for a shape here, it keeps for the training
            precision = settle_precision(config.precision, self.model, loss, self.batches.first)
        self.step: TrainingStep | CompiledStep | CapturedStep = TrainingStep(
            self.model,
            loss,
            self.optimizer,
            clip_norm=config.clip_norm,
            clip_value=config.clip_value,
            l1=config.l1,
            max_norm=config.max_norm,
            precision=precision,
            num_parts=config.accumulate,
        )
        self._share_step(self.step)
        check_compile_mode(config.compile, self.step.precision, config.device)
        self.compile_mode = "off"
        averages = config.ema_decay > 0 or config.swa_start > 0
        self.average = AveragedWeights(self.model, config) if averages else None
        self.stopping = EarlyStopping(
            config.direction, patience=config.patience, min_delta=config.min_delta, stop_after=config.stop_after
        )
        self.probe = Probe(
            self.splits.train,
            self.loss_function,
            target_scale=scale,
            num_at_a_time=config.batch_size // 2,  # without bf16 it takes twice the memory
            num_views=num_views(self.spec),
            device=config.device,
        )
        self.symptoms = Symptoms(least_loss=least_training_loss(config, self.spec))
        self.best_weights: dict[str, Any] | None = None
        """Tensors, and what a module's `get_extra_state` returns."""
        self.has_optimizer_state = False
        """Whether the first step finds a state of the optimizer for all that is trained, so that it can be captured."""
        self.is_captured_faster: bool | None = None
        """What a checkpoint knows of it: how a captured step's race ended, or False if the capture failed."""

    def next_epoch(self, epoch: int) -> EpochResult:
        started = time.perf_counter()
        if self.compile_mode == "step" and isinstance(self.step, TrainingStep):
            self.step = CompiledStep(self.step)
        self._measure_difficulty(epoch)
        self._seed(epoch)
        self._thaw(epoch)
        # Not in an evaluation: its other batch sizes, the last one above all, would be tried out as well.
        with self._algorithms_of_steps(), _memory_explained():
            train, grad_norm = self._train()
        with _algorithms(deterministic=self.config.deterministic), _memory_explained():
            self.ranks.agree_on_buffers(self.model)
            candidate = self._candidate(epoch)
            validation = self._validate(candidate)
            probed = self.probe.measure(self.model)
        measured = {
            **_prefixed("train/", train),
            **_prefixed("val/", validation),
            **_prefixed("watch/", probed),
            "grad_norm": grad_norm,
        }
        metrics = self.ranks.agreed(read_all(measured))
        metrics["lr"] = float(self.optimizer.param_groups[0]["lr"])
        symptoms = self._watch(epoch, metrics)
        metrics["time/epoch_s"] = time.perf_counter() - started
        if isinstance(self.step, TrainingStep):
            self._settle_compile_mode(self.step, epoch, metrics["time/epoch_s"])
        return self._judge(epoch, metrics, symptoms, candidate)

    def _algorithms_of_steps(self) -> AbstractContextManager[None]:
        """cuDNN tries out its algorithms only if batches have one shape: each new one costs as much as many steps."""
        deterministic = self.config.deterministic
        return _algorithms(deterministic=deterministic, benchmark=not deterministic and self.splits.train.is_plain)

    def _seed(self, epoch: int) -> None:
        """Give each epoch its own streams: a checkpoint needs no random state, and no draw of the caller disturbs."""
        own = [self.ranks.rank] if self.ranks.rank else []  # each rank drops units of its own
        torch.manual_seed(derive_seed(self.config.seed, "dropout", epoch, *own))
        self.order.manual_seed(derive_seed(self.config.seed, "order", epoch))
        self.augmentation.manual_seed(derive_seed(self.config.seed, "augmentation", epoch))
        self.batches.epoch = epoch

    def _measure_difficulty(self, epoch: int) -> None:
        """For a curriculum by losses: those of all training examples, with the weights that the epoch begins with."""
        curriculum = self.batches.curriculum
        if self.config.curriculum != "loss" or curriculum is None or epoch == 1 or curriculum.pace.share(epoch) == 1:
            return
        with _algorithms(deterministic=self.config.deterministic), _memory_explained():
            losses = losses_of_examples(self.model, self.splits.train, self.config, self.loss_function, self.spec.kind)
        curriculum.difficulty = self.ranks.of_first(losses.double().cpu())

    def _thaw(self, epoch: int) -> None:
        """Let frozen layers train from `thaw_epoch` on, after a resume too."""
        if 0 < self.config.thaw_epoch <= epoch:
            for model in (self.model, self.average.model if self.average else None):
                if model and (network := find_pretrained(model)):
                    network.thaw()
        if epoch == self.config.thaw_epoch:
            if isinstance(self.step, CapturedStep):
                self.step = self.step.retire()
            assert isinstance(self.step, TrainingStep), "nothing is compiled before"
            self.step.thaw()
            self._share_step(self.step)
            self.has_optimizer_state, self.is_captured_faster = False, None

    def _train(self) -> tuple[dict[str, Tensor], Tensor]:
        """Metrics and the mean gradient norm of a pass over the training split, on the device."""
        metrics = EpochMetrics(self.spec, self.config.device, own=self.own)
        points = self.schedule.compute_ahead(len(self.batches))
        if not isinstance(self.step, TrainingStep):
            self.step.prepare(points)
        norm_sum, num_norms = torch.zeros((), device=self.config.device), 0
        self.model.train()
        for step, targets in self._steps(points):
            self.schedule.step()
            metrics.update(step.outputs, targets, step.loss)
            if step.grad_norm is not None:
                norm_sum += step.grad_norm
                num_norms += 1
        if self.ranks.size > 1:
            metrics.add_up(self.ranks.total)
        return metrics.compute(), norm_sum / num_norms

    def _share_step(self, step: TrainingStep) -> None:
        if self.ranks.size > 1:
            assert self.config.compile == "off", "a step that is compiled or captured has no gradients to average"
            with self._algorithms_of_steps():
                self.ranks.share_step(step, self.spec, self.config, self.batches.first)

    def _steps(self, points: Sequence[Point]) -> Iterator[tuple[StepResult, Batch]]:
        """Each step of an epoch, and the targets of its batch."""
        if self._may_capture:
            yield from self._captured_steps(points)
            return
        for index, batch in enumerate(self.batches):
            yield self._step(*batch, measures_norm=_measures_norm(index))

    def _captured_steps(self, points: Sequence[Point]) -> Iterator[tuple[StepResult, Batch]]:
        for index, drawn in enumerate(self.batches.drawn()):
            if isinstance(self.step, TrainingStep) and self._can_capture(self.step):
                self.step = CapturedStep(self.step, self.batches.make, self.average, is_faster=self.is_captured_faster)
                self.step.prepare(points[index:])
            if isinstance(self.step, CapturedStep):
                yield self.step(*drawn, measures_norm=_measures_norm(index))
            else:
                yield self._step(*self.batches.make(*drawn), measures_norm=_measures_norm(index))

    def _step(self, inputs: Batch, targets: Batch, *, measures_norm: bool) -> tuple[StepResult, Batch]:
        assert not isinstance(self.step, CapturedStep), "it makes its batches itself"
        result = self.step(inputs, targets, measures_norm=measures_norm)
        if self.average:
            self.average.end_step()
        return result, targets

    def _candidate(self, epoch: int) -> nn.Module:
        """What is measured, and kept where it is the best."""
        if not self.average or epoch < self.average.first_epoch:
            return self.model
        self.average.end_epoch(epoch)
        return self.average.settle(self.model, self.batches, self.step.precision)

    def _validate(self, candidate: nn.Module) -> dict[str, Tensor]:
        """Metrics of the validation split, on the device."""
        split, precision = self.splits.validation, self.step.precision
        return measure(
            candidate,
            split,
            self.config,
            self.loss_function,
            self.spec,
            self.own,
            precision=precision,
            ranks=self.ranks,
            tunes_thresholds=self.tunes_thresholds,
        ).compute()

    def _watch(self, epoch: int, metrics: dict[str, float]) -> dict[str, float]:
        """The symptoms by now; figures that follow from the others are added to the metrics."""
        symptoms = self.symptoms.update(epoch, metrics, peak_lr=self.config.lr)
        metrics["watch/gap"] = metrics["val/loss"] - metrics["train/loss"]
        metrics["watch/epochs_without_progress"] = float(self.symptoms.epochs_without_progress(epoch))
        return symptoms

    @property
    def _may_capture(self) -> bool:
        """Whether a CUDA graph is wanted, and can make its batches.

        Batches that are streamed are on their way while one is captured, those of sequences have other shapes each
        time, and a loss of the task's own may take anything.
        """
        is_fixed = self._has_fixed_batches and self.splits.train.device.type == "cuda"
        return is_fixed and self.is_captured_faster is not False and wants_graph(self.config.compile, self.model)

    @property
    def _has_fixed_batches(self) -> bool:
        """Whether all batches have one shape, and the loss is one of hpo's."""
        return self.splits.train.is_plain and self.own.loss is None and self.config.progressive_start == 1

    def _can_capture(self, step: TrainingStep) -> bool:
        return (step.has_stepped or self.has_optimizer_state) and has_formula(step)

    def _settle_compile_mode(self, step: TrainingStep, epoch: int, epoch_s: float) -> None:
        """After an epoch that was not compiled, as the first never is: it fills the optimizer's state and shows how
        long a step takes."""
        # One count of steps serves all parameters; batches of one shape and a known loss make one graph.
        is_fixed = self._has_fixed_batches
        self.compile_mode = settle_compile_mode(
            self.config.compile if is_fixed and not self.config.thaw_epoch else "off",
            step,
            batch_shape=(self.config.batch_size, *self.spec.only_input.shape) if is_fixed else (),
            is_mixed=self.batches.are_mixed,
            seconds_a_step=epoch_s / len(self.batches),
            steps_left=(self.last_epoch - epoch) * len(self.batches),
        )

    def _judge(
        self, epoch: int, metrics: dict[str, float], symptoms: dict[str, float], candidate: nn.Module
    ) -> EpochResult:
        value = metrics[f"val/{self.config.metric}"]
        # The mean of an epoch's losses is finite only where each of them was.
        diverged = not all(math.isfinite(number) for number in (metrics["train/loss"], metrics["val/loss"], value))
        value = math.nan if diverged else value
        if isinstance(self.schedule, Plateau):
            self.schedule.end_epoch(value)
        is_best = self.stopping.update(epoch, value)
        if is_best or (not self.is_judged and epoch == self.last_epoch):
            self.best_weights = {name: _copied(value) for name, value in candidate.state_dict().items()}
        return EpochResult(
            epoch=epoch,
            metrics=metrics,
            value=value,
            best_value=self.stopping.best_value,
            best_epoch=self.stopping.best_epoch,
            is_best=is_best,
            diverged=diverged,
            settled={"precision": self.step.precision, "compile": self.step.mode},
            is_last=diverged or epoch >= self.last_epoch or (self.is_judged and self.stopping.should_stop),
            symptoms=symptoms,
        )

    def restore_best_weights(self) -> None:
        self.model.eval()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)

    def state_dict(self, result: EpochResult) -> dict[str, Any]:
        step = self.step.state_dict()  # before the optimizer's, which it completes
        return {
            "config": _comparable(self.config),
            "result": asdict(result),
            "model": self.model.state_dict(),
            "average": self.average.model.state_dict() if self.average else None,
            "best_weights": self.best_weights,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "stopping": self.stopping.state_dict(),
            "symptoms": self.symptoms.state_dict(),
            "step": step,
            "compile_mode": self.compile_mode,
        }

    def resume(self, checkpoint: CheckpointFolder) -> EpochResult | None:
        """Take over the saved state, if there is one; returns the result of its epoch."""
        saved = checkpoint.load()
        if saved is None:
            return None
        _, state = saved
        self._check_config(state["config"], checkpoint)
        self.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.load_state_dict(state["average"])
        self.best_weights = state["best_weights"]
        load_optimizer_state(self.optimizer, state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.stopping.load_state_dict(state["stopping"])
        self.symptoms.load_state_dict(state["symptoms"])
        assert isinstance(self.step, TrainingStep), "a training begins with one"
        self.step.load_state_dict(state["step"])
        self.has_optimizer_state = "is_captured_faster" in state["step"]
        self.is_captured_faster = state["step"].get("is_captured_faster")
        self.compile_mode = state["compile_mode"]
        return EpochResult(**state["result"])

    def _check_config(self, saved: Mapping[str, Any], checkpoint: CheckpointFolder) -> None:
        current, known = _comparable(self.config), config_fields() | dict(saved)  # an earlier version had fewer
        changed = [f"{name} {known[name]} -> {current[name]}" for name in current if known[name] != current[name]]
        if changed:
            raise CheckpointError(
                f"{checkpoint.path} holds a run with another config ({', '.join(changed)}); "
                "use the config it was started with, or another folder."
            )


def _measures_norm(index: int) -> bool:
    """Whether the norm of the gradients is measured in a step of an epoch."""
    return index % NORM_EVERY == 0


def check_fine_tuning(model: nn.Module, config: TrainConfig) -> None:
    """Raise UsageError for settings of pretrained models where the model is none."""
    if find_pretrained(model):
        return
    for name, off in (("thaw_epoch", 0), ("backbone_lr_factor", 1.0)):
        if getattr(config, name) != off:
            raise UsageError(
                f"{name}={getattr(config, name)} is for pretrained models (hpo.models.pretrained); leave it at {off}."
            )


def _copied(value: Any) -> Any:
    """A copy of an entry of a state dict; plain data, if a module has a state of its own beside its tensors."""
    return value.clone() if isinstance(value, torch.Tensor) else deepcopy(value)


def _comparable(config: TrainConfig) -> dict[str, Any]:
    """The settings that a run cannot change on the way. It may continue on another device, with what was settled."""
    free = ("device", "precision", "compile", "deterministic")
    return {name: value for name, value in asdict(config).items() if name not in free}


@contextmanager
def _algorithms(*, deterministic: bool, benchmark: bool = False) -> Iterator[None]:
    """Let torch use deterministic algorithms only, or with `benchmark` try out which is fastest for each new shape."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic
    if deterministic:
        prepare_deterministic_products()
    try:
        torch.use_deterministic_algorithms(deterministic)
        # One by one: cudnn.flags() would switch cuDNN off and TF32 on, by its defaults (pytorch#77467).
        cudnn.benchmark, cudnn.deterministic = benchmark, deterministic
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        cudnn.benchmark, cudnn.deterministic = before[1:]


@contextmanager
def _memory_explained() -> Iterator[None]:
    """Turn what a step could not handle by halving its batch into a line for the user."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error).rstrip(".")
        raise DeviceMemoryError(f"out of memory (oom): {reason}. Choose a smaller batch or model.") from error


def _prefixed(prefix: str, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in metrics.items()}
