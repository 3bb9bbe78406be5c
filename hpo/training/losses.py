"""The losses of a training, by name; torch's own where it has them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from hpo.config import OWN, SEVERAL
from hpo.data.examples import Split
from hpo.data.kinds import IGNORED, labels_of
from hpo.data.parts import Padded, tensors_of, values_and_lengths
from hpo.errors import UsageError
from hpo.models.weighing import Weighing
from hpo.objective import NOTHING_OWN
from hpo.training.embeddings import contrastive, info_nce, triplet

if TYPE_CHECKING:
    from hpo.config import TrainConfig
    from hpo.data.examples import DataSpec
    from hpo.objective import Own

LossFunction = Callable[[Any, Any], "Tensor"]
"""From outputs and targets of a batch to the mean over its examples, a scalar on their device.

Those for one of several classes also take targets (B, num_classes): the share that an example has of each, when
examples are mixed."""

Scale = float | Tensor | Mapping[str, float | Tensor]
"""What numbers are learned in units of: of one target, or by name of several."""

SAMPLE_SIZE = 4096
"""Examples of a reconstruction that its scale is taken from."""

LOSSES_OF_KIND = {
    "classification": ("cross_entropy", "binary_cross_entropy", "focal"),
    "soft_labels": ("cross_entropy", "kl_divergence"),
    "multilabel": ("binary_cross_entropy", "focal"),
    "regression": ("mse", "mae", "huber", "log_cosh"),
    "segmentation": ("cross_entropy", "dice", "focal"),
    "box": ("huber", "mse", "mae", "iou", "giou"),
    "tagging": ("cross_entropy", "focal"),
    "transcription": ("ctc",),
    "embedding": ("triplet", "contrastive", "info_nce"),
    "instances": ("info_nce", "triplet", "contrastive"),
    "reconstruction": ("mse", "mae", "huber", "log_cosh", "vae"),
    "own": (),
}
"""The losses that fit each kind of target; a task's own loss fits any."""


def training_loss(config: TrainConfig, train: Split, spec: DataSpec, own: Own = NOTHING_OWN) -> LossFunction:
    """The loss that is minimised: `loss_function` with the class weights that `config` asks for.

    A sampling that balances the classes leaves them at 1. Raises UsageError for a loss, or weights, that do not fit the
    data.
    """
    scale = target_scale(train, spec)
    if config.class_weights == "none":
        return loss_function(config, spec, scale, own)
    if spec.kind != "classification" or config.loss == OWN:
        raise UsageError(
            "class_weights='balanced' is for classification with one of hpo's losses; this task has a "
            f"{spec.kind if config.loss != OWN else 'loss of its own'}: use 'none'."
        )
    if config.sampling != "uniform":
        return loss_function(config, spec, scale, own)
    weights = _balanced_weights(train, len(spec.classes)).to(config.device)
    return loss_function(config, spec, scale, own, class_weights=weights)


def evaluation_loss(config: TrainConfig, spec: DataSpec, target_scale: Scale, own: Own) -> LossFunction:
    """The loss that an evaluation measures: `loss_function` without label smoothing, and cross-entropy for `focal`.

    So trials that differ in them are compared by what they answer. `dice` is that of each image, not of a batch.
    """
    loss = loss_function(replace(config, label_smoothing=0.0, focal_gamma=0.0), spec, target_scale, own)
    return _dice_of_images if loss is _dice else loss


def least_training_loss(config: TrainConfig, spec: DataSpec) -> float:
    """What the training loss cannot fall below: the entropy of smoothed labels.

    Infinite where that is not known: of examples that are mixed, of shares, and of smoothed labels by other losses.
    """
    if config.mixup > 0 or config.cutmix > 0 or (spec.kind == "soft_labels" and config.loss == "cross_entropy"):
        return math.inf
    if not config.label_smoothing:
        return 0.0
    num_answers = {"cross_entropy": len(spec.classes), "binary_cross_entropy": 2}.get(config.loss, 0)
    if num_answers < 2 or (config.loss == "binary_cross_entropy" and spec.kind != "multilabel"):
        return math.inf
    other = config.label_smoothing / num_answers
    right = 1 - config.label_smoothing + other
    return -right * math.log(right) - (num_answers - 1) * other * math.log(other)


def loss_function(
    config: TrainConfig,
    spec: DataSpec,
    target_scale: Scale = 1.0,
    own: Own = NOTHING_OWN,
    *,
    class_weights: Tensor | None = None,
) -> LossFunction:
    """The loss that `config` names, for the kind of target in `spec`.

    Those of numbers divide outputs and targets by `target_scale`, so that step sizes do not depend on the targets'
    units: predicting the mean gives an `mse` of 1. Raises UsageError for a loss that does not fit the data.
    """
    if config.loss == OWN:
        if own.loss is None:
            raise UsageError("loss='own' needs an Objective whose loss is a callable.")
        return own.loss
    if config.loss == SEVERAL:
        return _loss_of_several(config, spec, target_scale, own)
    fitting = LOSSES_OF_KIND.get(spec.kind, ())
    if config.loss not in fitting:
        data = {
            "classification": f"{len(spec.classes)} classes",
            "regression": "no classes (a regression)",
        }.get(spec.kind, f"targets of the kind {spec.kind}")
        advice = f"use {' or '.join(fitting)}" if fitting else "give the Objective a loss of its own"
        if spec.kind == SEVERAL:
            advice = "give the Objective a mapping from each target to its loss"
        raise UsageError(f"loss '{config.loss}' does not fit data with {data}; {advice}.")
    assert not isinstance(target_scale, Mapping), "it is of one target"
    if spec.kind in ("regression", "box", "reconstruction"):
        # A tensor, so that a compiled step is the same for every fold.
        scale = torch.as_tensor(target_scale, dtype=torch.float32, device=config.device)
        if config.loss == "vae":
            return partial(_vae, scale, torch.tensor(config.kl_weight, device=config.device))
        return _LOSSES_OF_BOXES.get(config.loss) or partial(_scaled, _LOSSES_OF_NUMBERS[config.loss], scale)

    def as_tensor(value: float, *, matters: bool) -> Tensor | None:
        # A tensor, so that a compiled step is the same for every trial.
        return torch.tensor(value, device=config.device) if matters else None

    if spec.kind in ("embedding", "instances"):
        number = config.temperature if config.loss == "info_nce" else config.margin
        return partial(_LOSSES_OF_EMBEDDINGS[config.loss], torch.tensor(number, device=config.device))
    smoothing = as_tensor(config.label_smoothing, matters=config.label_smoothing > 0)
    gamma = as_tensor(config.focal_gamma, matters=config.loss == "focal")
    if spec.kind == "soft_labels":
        return _kl_divergence if config.loss == "kl_divergence" else partial(_cross_entropy, smoothing, None, None)
    if spec.kind == "multilabel":
        return partial(_binary_cross_entropy_of_labels, smoothing, gamma)
    if spec.kind in ("segmentation", "tagging"):
        return _dice if config.loss == "dice" else partial(_cross_entropy_of_positions, smoothing, gamma)
    if spec.kind == "transcription":
        return _ctc
    if config.loss == "binary_cross_entropy":
        return partial(_binary_cross_entropy, smoothing, class_weights)
    if smoothing is gamma is class_weights is None:
        return functional.cross_entropy
    return partial(_cross_entropy, smoothing, gamma, class_weights)


def is_mean_over_labels(loss: LossFunction) -> bool:
    """Whether it is the mean over the labels of pixels or elements, of which examples have different numbers."""
    return isinstance(loss, partial) and loss.func is _cross_entropy_of_positions


def num_averaged(loss: LossFunction, targets: Any) -> int | Tensor:
    """How many examples of a batch `loss` is the mean over, or how many labels that are not IGNORED."""
    if is_mean_over_labels(loss):
        return (labels_of(targets) != IGNORED).sum()
    return len(tensors_of(targets)[0])


def one_by_one(loss: LossFunction, outputs: Tensor, targets: Tensor) -> Tensor:
    """The loss of each example (B,), by a loss that is the mean over them."""
    if loss is functional.cross_entropy:
        return functional.cross_entropy(outputs, targets, reduction="none")
    alone: Callable[[Tensor, Tensor], Tensor] = torch.vmap(lambda output, target: loss(output[None], target[None]))
    return alone(outputs, targets)


def _loss_of_several(config: TrainConfig, spec: DataSpec, target_scale: Scale, own: Own) -> LossFunction:
    """Each target's own loss, weighed by the model's `Weighing`."""
    if spec.targets.keys() != own.losses.keys():
        raise UsageError(
            f"there are losses for the targets {', '.join(own.losses)}, but the data have "
            f"{', '.join(spec.targets) or 'no targets with names and kinds'}."
        )
    weigh = own.weigh or Weighing(own)
    scales = {n: target_scale[n] if isinstance(target_scale, Mapping) else target_scale for n in own.losses}
    losses = {}
    for name, loss in own.losses.items():
        try:
            losses[name] = loss_function(replace(config, loss=loss), spec.of(name), scales[name])
        except UsageError as error:
            raise UsageError(f"the target {name}: {error}") from error

    def loss_of_several(outputs: Any, targets: Any) -> Tensor:
        total: Tensor = weigh({name: loss(outputs[name], targets[name]) for name, loss in losses.items()})
        return total

    return loss_of_several


def _cross_entropy(
    smoothing: Tensor | None, gamma: Tensor | None, class_weights: Tensor | None, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Cross-entropy, changed by what is given.

    Smoothing: each class gets its part of the target (Szegedy et al. 2016, arXiv:1512.00567, section 7). Gamma: an
    example counts with the power of what its class lacks to a share of 1 (Lin et al. 2017, arXiv:1708.02002, equation
    4). Weights (num_classes,): an example counts with its class's. An example of several classes has their losses by
    its shares. The mean is over the examples, not their weights, so that half a batch is half of a batch's gradient.
    """
    log_shares = functional.log_softmax(outputs.float(), dim=1)  # autocast leaves some of these operations in fp16
    losses = surprise = -log_shares  # (B, num_classes), for each class as if it were the right one
    if smoothing is not None:
        losses = (1 - smoothing) * surprise - smoothing * log_shares.mean(1, keepdim=True)
    if gamma is not None:
        # Kept off 0, where the power's slope is infinite for a gamma below 1.
        losses = losses * (-torch.expm1(-surprise)).clamp(min=1e-6) ** gamma
    if class_weights is not None:
        losses = losses * class_weights
    if targets.is_floating_point():
        return (losses * targets).sum(1).mean()
    return losses.gather(1, targets[:, None]).mean()


def _binary_cross_entropy(
    smoothing: Tensor | None, class_weights: Tensor | None, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Each class against all others, a sigmoid for each logit; the mean over classes and examples.

    For ImageNet in Wightman et al. 2021, arXiv:2110.00476. Smoothing is that of `_cross_entropy`, and an example counts
    with its class's weight, or with the mean of several by its shares.
    """
    shares = targets
    if not targets.is_floating_point():
        shares = torch.zeros_like(outputs, dtype=torch.float32).scatter(1, targets[:, None], 1.0)
    wanted = shares if smoothing is None else (1 - smoothing) * shares + smoothing / outputs.shape[1]
    losses = functional.binary_cross_entropy_with_logits(outputs.float(), wanted, reduction="none").mean(1)  # (B,)
    return losses.mean() if class_weights is None else (losses * (shares * class_weights).sum(1)).mean()


def _balanced_weights(train: Split, num_classes: int) -> Tensor:
    """Weights (num_classes,) with which all classes count alike and an example 1 in the mean.

    King and Zeng 2001, https://doi.org/10.1093/oxfordjournals.pan.a004868; scikit-learn's "balanced".
    """
    assert isinstance(train.targets, torch.Tensor), "they are classes"
    counts = torch.bincount(train.targets, minlength=num_classes)
    return len(train) / (num_classes * counts.clamp(min=1).float())


def target_scale(train: Split, spec: DataSpec) -> Scale:
    """`scale_of` the training targets, or of each by name if they are several."""
    if spec.kind != SEVERAL:
        return scale_of(train, spec.kind)
    assert isinstance(train.targets, Mapping), "they are several"
    return {n: scale_of(Split(train.inputs, train.targets[n]), target.kind) for n, target in spec.targets.items()}


def scale_of(train: Split, kind: str) -> float | Tensor:
    """Standard deviation of a regression's training targets, (values,) where there are several; else 1.

    For a reconstruction it is that of all values of the inputs, of the first `SAMPLE_SIZE` examples. It is 1 as well
    where all targets are equal.
    """
    targets = train.targets
    if kind == "reconstruction":
        assert isinstance(train.inputs, torch.Tensor), "they are images or numbers"
        return float(train.inputs[:SAMPLE_SIZE].double().std(correction=0)) or 1.0
    if kind not in ("regression", "box"):
        return 1.0
    if not isinstance(targets, torch.Tensor) or not targets.is_floating_point() or targets.ndim > 2:
        return 1.0
    deviation = targets.double().std(0, correction=0)
    safe = torch.where(deviation > 0, deviation, 1.0)
    return float(safe) if targets.ndim == 1 else safe.float()


def _kl_divergence(outputs: Tensor, targets: Tensor) -> Tensor:
    """What the shares (B, num_classes) of a model lack to those that are wanted, in nats (Kullback and Leibler 1951,
    https://doi.org/10.1214/aoms/1177729694). Its gradient is that of the cross-entropy, but it can reach 0."""
    shares = targets.float()
    return (torch.xlogy(shares, shares) - shares * outputs.float().log_softmax(1)).sum(1).mean()


def _vae(scale: Tensor, kl_weight: Tensor, outputs: Any, inputs: Tensor) -> Tensor:
    """The negative of the bound of a variational autoencoder, in nats for each example, without its constant.

    Outputs are three tensors in any structure: the reconstruction, and mean and logarithm of the variance of the
    latent distribution, both (B, size). The inputs are taken to be normal around their reconstruction with a deviation
    of `scale`. Kingma and Welling 2014, arXiv:1312.6114, equation 10; `kl_weight` is the beta of Higgins et al. 2017.
    """
    reconstruction, mean, log_variance = (tensor.float() for tensor in tensors_of(outputs))
    error = (reconstruction.reshape(inputs.shape) - inputs).flatten(1) / scale
    divergence = (mean.square() + log_variance.exp() - log_variance - 1).sum(1) / 2
    return (error.square().sum(1) / 2 + kl_weight * divergence).mean()


def _scaled(loss: LossFunction, scale: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    # (B, 1) against (B,) would silently broadcast to (B, B).
    return loss(outputs.reshape(targets.shape).float() / scale, targets / scale)


def _binary_cross_entropy_of_labels(
    smoothing: Tensor | None, gamma: Tensor | None, outputs: Tensor, targets: Tensor
) -> Tensor:
    """Whether an example has each label (B, num_classes), each by itself; the mean over labels and examples.

    With gamma it is the focal loss of Lin et al. 2017, arXiv:1708.02002, without its balance of positives.
    """
    wanted = targets.float()
    wanted = wanted if smoothing is None else (1 - smoothing) * wanted + smoothing / 2
    logits = outputs.float()
    losses = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    if gamma is not None:
        share = logits.sigmoid()
        lacking = (share * (1 - wanted) + (1 - share) * wanted).clamp(min=1e-6)
        losses = losses * lacking**gamma
    return losses.mean()


def _cross_entropy_of_positions(smoothing: Tensor | None, gamma: Tensor | None, outputs: Any, targets: Any) -> Tensor:
    """`_cross_entropy` of each pixel or element that has a label, the mean over all of them in the batch.

    Outputs are (B, num_classes, H, W) for masks (B, H, W), or (B, L, num_classes) for labels (B, L).
    """
    logits, labels = outputs_by_position(outputs, targets)
    is_counted = labels != IGNORED
    log_shares = functional.log_softmax(logits.float(), dim=-1)
    losses = -log_shares.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    surprise = losses
    if smoothing is not None:
        losses = (1 - smoothing) * losses - smoothing * log_shares.mean(-1)
    if gamma is not None:
        losses = losses * (-torch.expm1(-surprise)).clamp(min=1e-6) ** gamma
    return torch.where(is_counted, losses, 0.0).sum() / is_counted.sum().clamp(min=1)


def outputs_by_position(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Logits (..., num_classes) and labels (...) of pixels or elements; IGNORED is the label of those without one."""
    labels, (logits, _) = labels_of(targets), values_and_lengths(outputs)
    if labels.ndim == 3:
        logits = logits.movedim(1, -1)
    if logits.shape[:-1] != labels.shape:
        raise UsageError(
            f"the outputs of the model have the shape {tuple(logits.shape)}, which does not fit labels of the shape "
            f"{tuple(labels.shape)}."
        )
    return logits, labels


def _dice(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 less the mean over the classes of the soft Dice coefficient of a batch (Milletari et al. 2016,
    arXiv:1606.04797, section 3)."""
    common, total = (of_images.sum(0) for of_images in _overlaps(outputs, targets))
    return 1 - ((2 * common + 1) / (total + 1)).mean()


def _dice_of_images(outputs: Tensor, targets: Tensor) -> Tensor:
    """`_dice` of each image, the mean: it does not depend on how a split is divided into batches.

    It is not what is trained with: 8 of 10 trainings of examples/segmentation.py by it predicted background alone after
    8 epochs, and 3 of 10 by `_dice`.
    """
    common, total = _overlaps(outputs, targets)
    return 1 - ((2 * common + 1) / (total + 1)).mean()


def _overlaps(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What the shares of a class and its mask have in common, and what they are together: (B, num_classes) twice."""
    logits, labels = outputs_by_position(outputs, targets)
    is_counted = (labels != IGNORED).unsqueeze(-1)
    shares = logits.float().softmax(-1) * is_counted
    wanted = (labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=labels.device)).float()
    common, total = (part.flatten(1, -2).sum(1) for part in (shares * wanted, shares + wanted))
    return common, total


def _iou(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 less the intersection over union of boxes (B, 4), the mean (Yu et al. 2016, arXiv:1608.01471, without log)."""
    return (1 - iou_of_pairs(outputs, targets)).mean()


def _giou(outputs: Tensor, targets: Tensor) -> Tensor:
    """The same, and the share of the smallest box around both that neither covers (Rezatofighi et al. 2019,
    arXiv:1902.09630). torchvision's picks out the boxes that meet, for which it waits for a GPU."""
    boxes, others = _ordered(outputs.float()), targets.float()
    common, union = _common_and_union(boxes, others)
    around = torch.cat((torch.minimum(boxes[:, :2], others[:, :2]), torch.maximum(boxes[:, 2:], others[:, 2:])), dim=1)
    enclosed = _area(around).clamp(min=1e-6)
    return (1 - common / union + (enclosed - union) / enclosed).mean()


def iou_of_pairs(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of each box with the one in the same row: (B, 4) twice, x1 y1 x2 y2, to (B,)."""
    common, union = _common_and_union(_ordered(boxes.float()), others.float())
    return common / union


def _common_and_union(boxes: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    corners = torch.maximum(boxes[:, :2], others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    width, height = (corners[1] - corners[0]).clamp(min=0).unbind(1)
    common = width * height
    return common, (_area(boxes) + _area(others) - common).clamp(min=1e-6)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _ordered(boxes: Tensor) -> Tensor:
    """The same boxes with x1 <= x2 and y1 <= y2, which the outputs of a network need not have."""
    return torch.cat((torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])), dim=1)


def _ctc(outputs: Any, targets: Padded) -> Tensor:
    """Connectionist temporal classification (Graves et al. 2006, https://doi.org/10.1145/1143844.1143891).

    Outputs are (B, T, num_classes + 1), or Padded of them where lengths differ; the last one is the blank. An example
    whose outputs are too few for its classes counts with 0.
    """
    logits, lengths = values_and_lengths(outputs)
    lengths = torch.full((len(logits),), logits.shape[1], device=logits.device) if lengths is None else lengths
    return functional.ctc_loss(
        logits.float().log_softmax(-1).transpose(0, 1),
        targets.values,
        lengths,
        targets.lengths,
        blank=logits.shape[-1] - 1,
        zero_infinity=True,
    )


def _log_cosh(outputs: Tensor, targets: Tensor) -> Tensor:
    """The logarithm of the error's hyperbolic cosine, without overflow (Saleh and Saleh 2022, arXiv:2208.04564)."""
    error = outputs - targets
    return (error + functional.softplus(-2 * error) - math.log(2)).mean()


_LOSSES_OF_NUMBERS: dict[str, LossFunction] = {
    "mse": functional.mse_loss,
    "mae": functional.l1_loss,
    "huber": functional.huber_loss,  # Huber 1964, https://doi.org/10.1214/aoms/1177703732, quadratic up to 1
    "log_cosh": _log_cosh,
}

_LOSSES_OF_EMBEDDINGS = {"triplet": triplet, "contrastive": contrastive, "info_nce": info_nce}

_LOSSES_OF_BOXES: dict[str, LossFunction] = {"iou": _iou, "giou": _giou}
