"""Checks of a network that has not been trained: its outputs, its loss, and the way of its gradients."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from hpo.checks.verdicts import Subject, Verdict
from hpo.data.parts import tensors_of, values_and_lengths
from hpo.training.probe import EXPLODED, VANISHED, backward_in_evaluation_mode, layers, relative_gradients

if TYPE_CHECKING:
    from hpo.data.examples import Split
    from hpo.models.preprocessed import PreprocessedModel

NUM_STEPS = 3
"""What begins with weights of 0 passes gradients on only after a step or two."""

DESCENT_RATE = 0.1

HIGH_LOSS, FAR_TOO_HIGH_LOSS = 1.5, 3.0
"""The loss at initialisation, as a multiple of what a network that knows nothing has."""


@torch.no_grad()
def check_forward(subject: Subject) -> Verdict:
    model = subject.network().eval()  # batch norms too, or examples would depend on each other
    sample = subject.small_sample()
    outputs = model(sample.batch(slice(None))[0])
    num_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    num_frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    frozen = f" ({num_frozen} more are frozen)" if num_frozen else ""
    shapes = " and ".join("x".join(map(str, tensor.shape)) or "one number" for tensor in tensors_of(outputs))
    text = f"outputs of {shapes}, {num_parameters} parameters{frozen}"
    data = {"parameters": num_parameters, "frozen_parameters": num_frozen}
    if not num_parameters:
        advice = "no parameter is trained: let some have requires_grad"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if not all(tensor.isfinite().all() for tensor in tensors_of(outputs)):
        advice = "outputs are not finite before any training: use another initialisation or a norm"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if _depends_on_others(model, sample, outputs):
        advice = "the output of an example changes with the others in its batch: look for a wrong view or reshape"
        if not sample.is_plain:
            advice += ", or for padding that is not masked"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if subject.config.loss in _LOSSES_OF_LOGITS and _are_probabilities(outputs, subject.spec.kind):
        advice = (
            f"the outputs are probabilities already, and {subject.config.loss} takes logits, which makes learning "
            "slow: leave out the softmax or sigmoid at the end"
        )
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


_LOSSES_OF_LOGITS = ("cross_entropy", "focal", "binary_cross_entropy", "dice", "ctc")
_DIMENSION_OF_CLASSES = {"classification": 1, "segmentation": 1, "soft_labels": 1, "tagging": -1, "transcription": -1}


def _are_probabilities(outputs: Any, kind: str) -> bool:
    """Whether outputs are from 0 to 1 and, if an example has one of several classes, add up to 1."""
    values, _ = values_and_lengths(outputs)
    if not isinstance(values, torch.Tensor) or values.ndim < 2 or not ((values >= 0) & (values <= 1)).all():
        return False
    if kind == "multilabel":
        return True
    dimension = _DIMENSION_OF_CLASSES.get(kind)
    return dimension is not None and bool(torch.allclose(values.sum(dimension), torch.ones(()), atol=1e-3))


def _depends_on_others(model: PreprocessedModel, sample: Split, outputs: Any) -> bool:
    """Whether the first example has other outputs alone; of a sequence those of its own elements count."""
    together, alone = (values_and_lengths(each)[0] for each in (outputs, model(sample.batch(slice(0, 1))[0])))
    if not isinstance(together, torch.Tensor) or together.ndim < 2:
        return False
    own, alone = together[0], alone[0]
    if own.shape != alone.shape:
        own = own[: len(alone)]
    return not torch.allclose(alone, own, rtol=1e-2, atol=1e-2 * float(together.std()) + 1e-6)


@torch.no_grad()
def check_first_loss(subject: Subject) -> Verdict:
    """The loss before training against that of a network that knows nothing: ln(classes) for cross-entropy."""
    inputs, targets = subject.small_sample().batch(slice(None))
    model = subject.network()
    loss = subject.loss_of(model)(model(inputs), targets).item()
    expected = subject.loss_of_knowing_nothing(targets)
    if expected is None:
        return Verdict(state="ok", text=f"{loss:.3f}", data={"first_loss": loss})
    reference = "the mean alone has"
    if subject.spec.classes:
        is_logarithm = subject.config.loss == "cross_entropy"
        reference = f"ln({len(subject.spec.classes)}) is" if is_logarithm else "equal chances have"
    text = f"{loss:.3f}; {reference} {expected:.3f}"
    data = {"first_loss": loss, "expected_loss": expected}
    ratio = loss / expected if expected else 1.0
    if 1 / HIGH_LOSS <= ratio <= HIGH_LOSS:
        return Verdict(state="ok", text=text, data=data)
    if ratio < 1:
        advice = "the network knows something before training: pretrained weights, or inputs that contain the answer"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    advice = "the first outputs are too large: begin with smaller weights in the last layer, or use a norm"
    return Verdict(state="warning" if ratio <= FAR_TOO_HIGH_LOSS else "wrong", text=text, advice=advice, data=data)


def check_gradients(subject: Subject) -> Verdict:
    """Whether gradients reach every layer that is trained, and how strong they are there."""
    model, sample = subject.network(), subject.small_sample()
    with backward_in_evaluation_mode(model):
        gradients = relative_gradients(model, sample, subject.loss_of(model), subject.target_scale).tolist()
        unreached = _unreached_layers(subject, model) if gradients else list(layers(model))
    text = (
        f"all {len(gradients)} layers receive gradients; smallest is {min(gradients, default=0.0):.1e} of its weights"
    )
    data = {"gradients": gradients, "unreached": unreached}
    if unreached or not gradients:
        names = f"{', '.join(unreached[:4])}{', ...' if len(unreached) > 4 else ''}"
        text = f"they do not reach {names}" if unreached else "no parameter of the model can be trained"
        advice = "is it used in forward, behind a detach(), or fed by units that are all dead?"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if not all(map(math.isfinite, gradients)):
        text = "they are not finite"
        advice = "use another initialisation, a norm, or a loss that is finite for these outputs"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    vanishing = [layer for layer, gradient in enumerate(gradients, start=1) if gradient < VANISHED]
    if vanishing:
        text = f"all {len(gradients)} layers receive gradients, but they vanish up to layer {max(vanishing)}: "
        text += f"{min(gradients):.1e}"
        advice = "use a norm, another initialisation or fewer layers"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    # The last layer's weights may be as small as they like.
    if max(gradients[:-1], default=0.0) > EXPLODED:
        text = f"all {len(gradients)} layers receive gradients, but they explode: "
        text += f"{max(gradients[:-1]):.1e} times the weights"
        advice = "use a norm, another initialisation, or clip_norm"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _unreached_layers(subject: Subject, model: PreprocessedModel) -> list[str]:
    """The names of those that no gradient reaches in a few steps of gradient descent.

    By hand: torch imports its compiler, which takes seconds, with the first optimizer.
    """
    (inputs, targets), weights = subject.small_sample().batch(slice(None)), layers(model)
    loss_function = subject.loss_of(model)
    unreached = set(weights)
    for _ in range(NUM_STEPS):
        if not unreached:
            break
        loss = loss_function(model(inputs), targets)
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
            if gradient.any():
                unreached.discard(name)
            weight.data.sub_(gradient, alpha=DESCENT_RATE)
    return [name.removeprefix("network.") for name in weights if name in unreached]
