"""One trial's settings of the shared trainer, and the seeds everything random follows from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

from hpo.errors import UnknownNameError, UsageError
from hpo.methods import OPTIMIZERS, SCHEDULES
from hpo.values import is_number

AUGMENTATIONS = (
    "flip",
    "alternating_flip",
    "crop",
    "rotation",
    "zoom",
    "translation",
    "contrast",
    "colour_jitter",
    "cutout",
    "randaugment",
    "trivial_augment",
)
TEXT_AUGMENTATIONS = ("delete_words", "swap_words", "replace_synonyms", "drop_tokens")
WAVEFORM_AUGMENTATIONS = ("noise", "gain", "speed", "pitch")
SPECTROGRAM_AUGMENTATIONS = ("time_mask", "frequency_mask")
OWN = "own"
"""The name of a loss or an optimizer that the task itself brings."""

SEVERAL = "several"
"""The name of the losses of several targets together, and of their kind."""

AUTO = "auto"
"""The name of the loss and the metric that are usual for the kind of target that the data turn out to have."""

LOSSES = (
    "cross_entropy",
    "binary_cross_entropy",
    "focal",
    "mse",
    "mae",
    "huber",
    "log_cosh",
    "dice",
    "iou",
    "giou",
    "ctc",
    "kl_divergence",
    "triplet",
    "contrastive",
    "info_nce",
    "vae",
)
CLASS_WEIGHTS = ("none", "balanced")
CURRICULA = ("none", "given", "loss")
PACINGS = ("linear", "root")
SAMPLINGS = ("uniform", "balanced", "smote")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
COMPILE_MODES = ("auto", "off", "step", "graph")


class Direction(StrEnum):
    """Whether a larger or a smaller metric is better."""

    MAXIMIZE = "maximize"
    MINIMIZE = "minimize"

    def loss(self, value: float) -> float:
        """The value turned so that lower is better; done twice, it is the value again."""
        return -value if self is Direction.MAXIMIZE else value

    def gain(self, value: float, over: float) -> float:
        """How much better a value is than another, below 0 where it is worse."""
        return self.loss(over) - self.loss(value)

    @property
    def best(self) -> Callable[..., float]:
        """`max` or `min`, whichever is better."""
        return max if self is Direction.MAXIMIZE else min


METRICS = {
    "loss": Direction.MINIMIZE,
    "accuracy": Direction.MAXIMIZE,
    "precision": Direction.MAXIMIZE,
    "recall": Direction.MAXIMIZE,
    "f1": Direction.MAXIMIZE,
    "precision_weighted": Direction.MAXIMIZE,
    "f1_weighted": Direction.MAXIMIZE,
    "auroc": Direction.MAXIMIZE,
    "mse": Direction.MINIMIZE,
    "rmse": Direction.MINIMIZE,
    "mae": Direction.MINIMIZE,
    "r2": Direction.MAXIMIZE,
    "exact_match": Direction.MAXIMIZE,
    "average_precision": Direction.MAXIMIZE,
    "mean_iou": Direction.MAXIMIZE,
    "dice": Direction.MAXIMIZE,
    "perplexity": Direction.MINIMIZE,
    "character_error_rate": Direction.MINIMIZE,
    "recall_at_1": Direction.MAXIMIZE,
    "recall_at_5": Direction.MAXIMIZE,
    "kl_divergence": Direction.MINIMIZE,
}
"""What can be optimised on the validation split, and whether more of it is better."""

USUAL = {
    "classification": ("cross_entropy", "accuracy"),
    "multilabel": ("binary_cross_entropy", "f1"),
    "regression": ("mse", "r2"),
    "segmentation": ("cross_entropy", "mean_iou"),
    "box": ("huber", "mean_iou"),
    "tagging": ("cross_entropy", "accuracy"),
    "transcription": ("ctc", "character_error_rate"),
    "soft_labels": ("kl_divergence", "kl_divergence"),
    "embedding": ("triplet", "recall_at_1"),
    "instances": ("info_nce", "recall_at_1"),
    "reconstruction": ("mse", "mse"),
}
"""By kind of target, the loss and the metric that `auto` stands for."""

COSTS = ("params", "latency")
"""What can be minimised beside the metric: trainable parameters, and milliseconds of a forward pass of one example."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of one training run. Every field is validated, alone and against the others, on construction."""

    max_epochs: int = 20
    """Maximum number of passes over the training split; schedules stretch over this number."""

    batch_size: int = 128
    """Examples a step, at least 1; the last, smaller batch of an epoch is dropped."""

    accumulate: int = 1
    """Batches whose gradients are averaged for one step, which so takes in `batch_size * accumulate` examples."""

    lr: float = 1e-3
    """Peak learning rate, above 0."""

    optimizer: str = "adamw"
    """One of hpo.methods.OPTIMIZERS, or "own" for the one that the task brings."""

    momentum: float = 0.9
    """Momentum of SGD, RMSprop and Muon, in [0, 1)."""

    nesterov: bool = True
    """Whether the momentum of SGD and Muon is Nesterov's; without effect when momentum is 0."""

    beta1: float = 0.9
    """Decay of the average of the gradients in Adam and its variants (not SGD, RMSprop and Adagrad), in [0, 1)."""

    beta2: float = 0.999
    """Decay of the average of the squared gradients, where there is a `beta1`, in [0, 1)."""

    eps: float = 1e-8
    """What is added to the root of that average, or of RMSprop's or Adagrad's, before dividing by it; above 0."""

    weight_decay: float = 0.0
    """Weight decay (decoupled in AdamW, LAMB and Muon, L2 elsewhere), at least 0; biases and norms are spared."""

    schedule: str = "cosine"
    """One of hpo.methods.SCHEDULES, stepped once a step; plateau's rate falls at the end of epochs."""

    warmup_fraction: float = 0.05
    """Share of all steps over which the rate first rises linearly, in [0, 1); one-cycle has its own rise."""

    decay_factor: float = 0.1
    """What step and plateau multiply the rate by each time, and where exponential ends, in (0, 1)."""

    num_cycles: int = 3
    """Cycles of cosine_restarts, each twice as long as the one before, at least 1."""

    plateau_patience: int = 3
    """Epochs without improvement (see `min_delta`) after which plateau lowers the rate, at least 1."""

    clip_norm: float = 0.0
    """Gradients are scaled down to this global norm; 0 turns clipping off."""

    clip_value: float = 0.0
    """Each element of a gradient is cut off at this size, before `clip_norm` acts; 0 turns it off."""

    l1: float = 0.0
    """The gradient of this times the sum of absolute weights is added, at least 0; biases and norms are spared."""

    max_norm: float = 0.0
    """The weights into each unit are scaled down to this norm after a step; 0 turns it off."""

    ema_decay: float = 0.0
    """What an average of the weights keeps of itself in each step, in [0, 1); 0 turns it off. Where it is on, the
    average is what is measured, kept and deployed."""

    swa_start: float = 0.0
    """Share of `max_epochs`, in [0, 1), from which on the weights at the ends of epochs are averaged, all alike, and
    the average is what is measured, kept and deployed; 0 turns it off. Not together with `ema_decay`."""

    thaw_epoch: int = 0
    """Epoch, from 1, at whose start the frozen layers of a pretrained model begin to train; 0 leaves them frozen."""

    backbone_lr_factor: float = 1.0
    """What the rate of all layers of a pretrained model but its head is multiplied by, in (0, 1]."""

    label_smoothing: float = 0.0
    """Share of the target spread over all classes, in [0, 1)."""

    augment: str = "none"
    """Names of AUGMENTATIONS (of images), or of those of texts or sound, joined by "+", applied in this order, or
    "none"; drawn for each example."""

    augment_strength: float = 0.5
    """How far rotation, zoom, translation, contrast, colour_jitter, randaugment and those of texts and sound go, in
    (0, 1]."""

    unknown_token: int = 0
    """The id that drop_tokens puts in, at least 0."""

    mixup: float = 0.0
    """Examples are mixed in pairs by shares of the beta distribution with these parameters; 0 turns it off."""

    cutmix: float = 0.0
    """A rectangle of another image is put in, its area by the beta distribution with these parameters; 0 turns it off.
    Where `mixup` is on as well, each example gets one of the two by chance."""

    loss: str = "cross_entropy"
    """One of LOSSES, "own" for the one that the task brings, or "several" for one for each of its targets."""

    focal_gamma: float = 2.0
    """How far focal loss passes over examples that are right already, at least 0; at 0 it is cross-entropy."""

    margin: float = 0.2
    """How much closer triplet loss wants what is alike than what is not; how far apart contrastive loss wants what is
    not. Embeddings have length 1, so no two are farther apart than 2; above 0."""

    temperature: float = 0.1
    """What info_nce divides cosine similarities by, above 0; a small one looks at the nearest examples alone."""

    kl_weight: float = 1.0
    """What vae multiplies the divergence of the latent distribution by, at least 0."""

    class_weights: str = "none"
    """One of CLASS_WEIGHTS: "balanced" makes every class count alike in the training loss, however rare it is. It
    changes nothing if `sampling` is not "uniform", which balances the classes already."""

    sampling: str = "uniform"
    """One of SAMPLINGS: "balanced" draws every class equally often, with replacement; "uniform" each example once;
    "smote" adds examples between those of rare classes first."""

    curriculum: str = "none"
    """One of CURRICULA: whether epochs draw from the easiest examples at first, by a difficulty that the task gives or
    by the loss of each example after the epoch before. An epoch has as many steps as ever."""

    curriculum_start: float = 0.3
    """Share of the examples that the first epoch draws from, in (0, 1]."""

    curriculum_until: float = 0.5
    """Share of `max_epochs`, in (0, 1], after which all examples are drawn."""

    curriculum_pacing: str = "linear"
    """One of PACINGS: how the share of examples grows."""

    progressive_start: float = 1.0
    """Size of images (their sides) or of sequences (the longest) in the first epoch, as a share in (0, 1]; 1 turns it
    off. The size grows in four stages."""

    progressive_until: float = 0.5
    """Share of `max_epochs`, in (0, 1], after which they have their full size."""

    metric: str = "accuracy"
    """One of METRICS, or a metric of the task's own: it decides about stopping and the best epoch, measured on the
    validation split."""

    metric_direction: str = ""
    """Whether more ("maximize") or less ("minimize") of a metric of the task's own is better; empty for METRICS."""

    patience: int = 10
    """Epochs without improvement after which training stops, at least 1."""

    min_delta: float = 0.0
    """The least change of the metric that counts as an improvement, at least 0."""

    stop_after: int = 0
    """Epochs before early stopping may act (its warm-up)."""

    seed: int = 0
    """Seed of the trial; initialisation, order and augmentation derive their own from it."""

    device: str = "cpu"
    """Device as torch names it: cpu, cuda, cuda:1, ..."""

    precision: str = "auto"
    """One of PRECISIONS: the type that products are made in; see hpo.training.precision for `auto`."""

    compile: str = "auto"
    """One of COMPILE_MODES: whether a step is one compiled function, or a CUDA graph of it; `auto` where it pays."""

    deterministic: bool = False
    """Whether torch may use deterministic algorithms only; what has none raises. It matters on a GPU."""

    def __post_init__(self) -> None:
        for setting in fields(self):
            self._require_type(setting.name, type(setting.default))
        for name, allowed in (
            ("optimizer", (*OPTIMIZERS, OWN)),
            ("schedule", SCHEDULES),
            ("loss", (*LOSSES, OWN, SEVERAL)),
            ("class_weights", CLASS_WEIGHTS),
            ("sampling", SAMPLINGS),
            ("curriculum", CURRICULA),
            ("curriculum_pacing", PACINGS),
            ("precision", PRECISIONS),
            ("compile", COMPILE_MODES),
        ):
            if getattr(self, name) not in allowed:
                raise UnknownNameError(name, str(getattr(self, name)), allowed)
        if self.metric_direction not in ("", *Direction):
            raise UnknownNameError("metric_direction", self.metric_direction, ["", *Direction])
        if self.metric not in METRICS and not self.metric_direction:
            raise UnknownNameError("metric", self.metric, METRICS)
        augmentation_names(self.augment)
        for name in ("max_epochs", "batch_size", "accumulate", "num_cycles", "plateau_patience", "patience"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in (
            "weight_decay",
            "clip_norm",
            "clip_value",
            "l1",
            "max_norm",
            "mixup",
            "cutmix",
            "focal_gamma",
            "kl_weight",
            "unknown_token",
            "min_delta",
            "stop_after",
            "thaw_epoch",
        ):
            self._require(name, 0 <= getattr(self, name) < math.inf, "at least 0 and finite")
        for name in ("momentum", "beta1", "beta2", "warmup_fraction", "label_smoothing", "ema_decay", "swa_start"):
            self._require(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self._require("swa_start", self.swa_start == 0 or self.ema_decay == 0, "0 when ema_decay averages the weights")
        for name in (
            "backbone_lr_factor",
            "curriculum_start",
            "curriculum_until",
            "progressive_start",
            "progressive_until",
        ):
            self._require(name, 0 < getattr(self, name) <= 1, "in (0, 1]")
        self._require("decay_factor", 0 < self.decay_factor < 1, "in (0, 1)")
        self._require("augment_strength", 0 < self.augment_strength <= 1, "in (0, 1]")
        for name in ("lr", "eps", "margin", "temperature"):
            self._require(name, 0 < getattr(self, name) < math.inf, "above 0 and finite")

    @property
    def direction(self) -> Direction:
        """Whether a larger or a smaller metric is better."""
        return Direction(self.metric_direction) if self.metric_direction else METRICS[self.metric]

    def _require_type(self, name: str, wanted: type) -> None:
        value = getattr(self, name)
        if not (is_number(value) if wanted is float else type(value) is wanted):
            raise UsageError(f"{name}={value!r} is not allowed: it must be of type {wanted.__name__}.")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise UsageError(f"{name}={getattr(self, name)!r} is not allowed: it must be {allowed}.")


def augmentation_names(augment: str) -> tuple[str, ...]:
    """The names in a value of `augment`, none for "none". Raises UnknownNameError for one that is not there."""
    names = () if augment == "none" else tuple(augment.split("+"))
    known = (*AUGMENTATIONS, *TEXT_AUGMENTATIONS, *WAVEFORM_AUGMENTATIONS, *SPECTROGRAM_AUGMENTATIONS)
    for name in names:
        if name not in known:
            raise UnknownNameError("augment", name, ["none", *known])
    return names


def config_fields() -> dict[str, Any]:
    """Name and default of every training setting."""
    return {f.name: f.default for f in fields(TrainConfig)}


def derive_seed(study_seed: int, *purpose: int | str) -> int:
    """A seed in [0, 2**63) for one purpose, independent of every other: `derive_seed(0, 7, "init")`.

    It is a hash (BLAKE2b) of all that is given, so trials and purposes share no stream, and it is the same on every
    machine and after every restart.
    """
    text = "/".join(str(part) for part in (study_seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
