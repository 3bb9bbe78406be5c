"""Checks of the data: ranges, balance, duplicates, and what the network gets to see of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hpo.checks.verdicts import Subject, Verdict
from hpo.data.datasets import class_counts
from hpo.data.kinds import IGNORED, labels_of
from hpo.data.parts import Padded, Ragged, map_parts, named_parts, parts, tensors_of
from hpo.data.preprocessing import IGNORED as BY_REQUEST

if TYPE_CHECKING:
    from hpo.data.examples import SealedSplit, Split
    from hpo.data.parts import Batch, Part

SAMPLE = 5_000
"""Examples that ranges are taken from."""

NORMALISED_SAMPLE = 1_000
"""Examples that the network's inputs are looked at of."""

LONG = 10.0
"""The longest sequence, as a multiple of most, that makes batches wasteful."""

UNBALANCED = 3.0
"""The largest class, as a multiple of the smallest one, above which accuracy misleads."""

OUTLIER = 20.0
"""Deviations from the mean above which a single value may rule a training."""

LEAK = 0.01
"""Share of the test split above which copies of training examples falsify its result."""


def check_preprocessing(subject: Subject) -> Verdict:
    """What was found in raw examples, and what of them the model does not get."""
    preprocessing = subject.spec.preprocessing
    assert preprocessing is not None, "there are raw examples"
    text = preprocessing.describe()
    unasked = {name: why for name, why in preprocessing.left_out.items() if why != BY_REQUEST}
    if not unasked:
        return Verdict(state="ok", text=text)
    listed = "; ".join(f"{name}: {why}" for name, why in unasked.items())
    names = ",".join(unasked)
    advice = f"left out: {listed}. --data-option ignore={names} says that this is right, categories=NAME keeps one"
    return Verdict(state="warning", text=text, advice=advice, data={"left_out": dict(unasked)})


def check_inputs(subject: Subject) -> Verdict:
    """Ranges of all inputs; the first that is not as it should be gives the advice."""
    named = named_parts(subject.splits.train.inputs)
    verdicts = [_check_input(name, part, len(subject.splits.train)) for name, part in named.items()]
    worst = max(verdicts, key=lambda verdict: ("ok", "warning", "wrong").index(verdict.state))
    return replace(worst, text="; ".join(verdict.text for verdict in verdicts))


def _check_input(name: str, part: Part, num_examples: int) -> Verdict:
    if isinstance(part, Ragged):
        return _check_sequences(name, part)
    inputs = part[:SAMPLE]
    low, high = inputs.min().item(), inputs.max().item()
    is_constant = (inputs == inputs[:1]).flatten(1).all(0) if inputs.ndim > 1 else (inputs == inputs[0]).all()
    num_constant, num_features = int(is_constant.sum()), is_constant.numel()
    shape = "x".join(map(str, inputs.shape[1:])) or "one"
    kind = str(inputs.dtype).removeprefix("torch.")
    text = f"{f'{name}: ' if name else ''}{num_examples} examples of {shape} {kind} from {low:.4g} to {high:.4g}"
    data = {"low": low, "high": high, "constant_features": num_constant, "features": num_features}
    if num_constant == num_features:
        advice = "all examples are the same: look at what `load` reads"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if inputs.dtype == torch.uint8 and high <= 1:
        advice = "give pixels from 0 to 255: fractions converted to whole numbers are lost"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    # The margins of images may well be empty.
    if inputs.ndim == 2 and num_constant:
        which = ", ".join(map(str, is_constant.nonzero().flatten().tolist()[:5]))
        advice = f"{num_constant} of {num_features} features never vary ({which}): leave them out"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _check_sequences(name: str, part: Ragged) -> Verdict:
    shortest, longest = int(part.lengths.min()), int(part.lengths.max())
    kind = str(part.dtype).removeprefix("torch.")
    low, high = part.values.min().item(), part.values.max().item()
    text = f"{f'{name}: ' if name else ''}{len(part)} sequences of {shortest} to {longest} {kind} "
    text += f"from {low:.4g} to {high:.4g}"
    data = {"low": low, "high": high, "shortest": shortest, "longest": longest}
    typical = part.lengths.double().quantile(0.9).item() if len(part) < SAMPLE else float(part.lengths[:SAMPLE].max())
    if low == high:
        advice = "all elements are the same: look at what `load` reads"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if longest > LONG * typical:
        advice = (
            f"the longest is {longest / typical:.0f} times as long as most: truncate it, because batches are padded to "
            "its length"
        )
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def check_targets(subject: Subject) -> Verdict:
    targets = subject.splits.train.targets
    match subject.spec.kind:
        case "classification" | "multilabel":
            return _check_balance(subject)
        case "regression" | "box":
            assert isinstance(targets, Tensor), "they are numbers"
            return _check_values(targets)
        case "segmentation" | "tagging" | "transcription":
            assert isinstance(targets, Tensor | Ragged), "they are labels"
            return _check_labels(subject, targets.values if isinstance(targets, Ragged) else targets)
        case "soft_labels":
            assert isinstance(targets, Tensor), "they are shares"
            return _check_labels(subject, targets.argmax(1))
        case "embedding":
            assert isinstance(targets, Tensor), "they are numbers"
            return _check_groups(targets, subject.config.batch_size)
        case "several":
            return Verdict(state="ok", text=", ".join(f"{n} ({t.kind})" for n, t in subject.spec.targets.items()))
        case "instances" | "reconstruction":
            return Verdict(state="ok", text="none: the inputs alone")
        case _:
            return Verdict(state="ok", text="none" if targets is None else "known to the task's own loss alone")


def _check_groups(targets: Tensor, batch_size: int) -> Verdict:
    """Whether a batch holds examples that are alike, without which nothing is learned from it."""
    counts = Counter(targets.tolist()).values()
    text = f"{len(counts)} groups of {min(counts)} to {max(counts)} training examples that are alike"
    num, num_alike = len(targets), sum(count * (count - 1) for count in counts)
    num_pairs = batch_size * (batch_size - 1) / 2 * num_alike / (num * (num - 1))
    if num_pairs >= 1:
        return Verdict(state="ok", text=text)
    text += f"; {num_pairs:.2g} pairs of them in a batch of {batch_size}"
    advice = "most steps learn nothing: a larger batch_size, or fewer groups with more examples"
    return Verdict(state="warning", text=text, advice=advice)


def _check_labels(subject: Subject, labels: Tensor) -> Verdict:
    """How the labels of pixels or elements are spread over the classes."""
    classes = subject.spec.classes
    counted = labels_of(labels).flatten()
    counts = torch.bincount(counted[counted != IGNORED], minlength=len(classes)).tolist()
    num_labels, commonest = sum(counts), max(counts)
    text = (
        f"{len(classes)} classes; '{classes[counts.index(commonest)]}' has {commonest / num_labels:.0%} of the labels"
    )
    data = {"counts": counts, "classes": list(classes)}
    if commonest == num_labels:
        advice = "all labels are the same, so there is nothing to learn"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _check_balance(subject: Subject) -> Verdict:
    found = class_counts(subject.splits.train, subject.spec)
    classes, counts = list(found), list(found.values())
    rarest, commonest = min(counts), max(counts)
    ratio = commonest / max(1, rarest)  # of a torch Dataset only the first examples are read
    text = f"{len(classes)} classes with {rarest} to {commonest} training examples"
    data = {"ratio": ratio, "counts": counts, "classes": classes}
    config = subject.config
    is_dealt_with = config.metric != "accuracy" and "balanced" in (config.class_weights, config.sampling)
    is_dealt_with = is_dealt_with or not subject.is_classified
    if ratio <= UNBALANCED or is_dealt_with:
        return Verdict(state="ok", text=text, data=data)
    advice = (
        f"'{classes[counts.index(rarest)]}' is {ratio:.1f} times as rare as '{classes[counts.index(commonest)]}': "
        "judge by the metric recall or f1, and try class_weights=balanced"
    )
    return Verdict(state="warning", text=text, advice=advice, data=data)


def _check_values(targets: Tensor) -> Verdict:
    values = targets.double()
    if targets.ndim > 1:
        return _check_columns(values)
    mean, deviation = values.mean().item(), values.std(correction=0).item()
    text = f"{values.min():.4g} to {values.max():.4g}, mean {mean:.4g}, deviation {deviation:.4g}"
    data = {"mean": mean, "deviation": deviation, "values": values[:SAMPLE].tolist()}
    if not deviation:
        advice = "all targets are the same, so there is nothing to learn"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    furthest = ((values - mean).abs().max() / deviation).item()
    if furthest > OUTLIER / 2:
        advice = (
            f"a target lies {furthest:.0f} deviations from the mean: try loss=huber or mae, or predict its logarithm"
        )
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _check_columns(values: Tensor) -> Verdict:
    """Several numbers for each example."""
    deviations = values.std(0, correction=0)
    text = f"{values.shape[1]} numbers from {values.min():.4g} to {values.max():.4g}"
    data = {"means": values.mean(0).tolist(), "deviations": deviations.tolist()}
    if constant := (deviations == 0).nonzero().flatten().tolist():
        advice = f"number {constant[0]} never varies, so there is nothing to learn from it: leave it out"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


@torch.no_grad()
def check_normalised(subject: Subject) -> Verdict:
    """What the network itself gets, whatever stands before it."""
    seen = [_seen_by_network(subject, split) for split in (subject.splits.train, subject.splits.validation)]
    if not all(len(floats) for floats in seen):
        return Verdict(state="ok", text="integers, which stay as they are")
    train, validation = seen
    mean, deviation = train.mean().item(), train.std(correction=0).item()
    shifts = [validation.mean().item() - mean, validation.std(correction=0).item() - deviation]
    furthest = train.abs().max().item()
    text = f"mean {mean:.3f}, deviation {deviation:.3f}, largest absolute value {furthest:.1f}; "
    text += f"validation {shifts[0]:+.3f}"
    data = {"mean": mean, "deviation": deviation, "furthest": furthest, "shift_of_validation": shifts[0]}
    if not (abs(mean) < 1 and 0.2 < deviation < 5):
        advice = "a network learns best from inputs of mean 0 and deviation 1: scale them in `load`"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    if max(map(abs, shifts)) > 0.5:
        advice = "the validation examples look different from the training examples: look at what `load` reads"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    is_of_features = isinstance(subject.splits.train.inputs, Tensor) and subject.splits.train.inputs.ndim == 2
    if is_of_features and furthest > OUTLIER:
        feature = int(train.view(-1, *subject.spec.input_shape).abs().amax(0).argmax())
        advice = f"feature {feature} has values far from all others: clip it, or take its logarithm"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _seen_by_network(subject: Subject, split: Split) -> Tensor:
    """All floats that the network gets for the first examples, as one vector; of sequences without padding."""
    model = subject.network().cpu()
    recorder = _InputRecorder(subject.spec.target_shape or (1,))
    model.network = recorder
    model(split.first(NORMALISED_SAMPLE, "cpu")[0])
    return torch.cat(recorder.seen) if recorder.seen else torch.empty(0)


class _InputRecorder(nn.Module):
    """Keeps what a network would get. Not a closure: a class and what it refers to would hold each other."""

    def __init__(self, output_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.seen: list[Tensor] = []
        self._output_shape = output_shape

    def forward(self, inputs: Batch) -> Tensor:
        map_parts(self._record, inputs)
        return torch.zeros(len(tensors_of(inputs)[0]), *self._output_shape)

    def _record(self, batch: Tensor | Padded) -> None:
        values = batch.values[batch.mask] if isinstance(batch, Padded) else batch
        if values.is_floating_point():
            self.seen.append(values.flatten())


def check_duplicates(subject: Subject) -> Verdict:
    """Examples of the training and the validation split that have the same inputs."""
    train, validation = subject.splits.train, subject.splits.validation
    labels = defaultdict(set)
    fingerprints, of_validation = subject.fingerprints
    of_class = train.targets.tolist() if subject.is_classified else [0] * len(train)  # type: ignore[union-attr]
    for fingerprint, target in zip(fingerprints, of_class, strict=True):
        labels[fingerprint].add(target)
    num_repeated = len(fingerprints) - len(labels)
    num_contradictory = sum(len(given) > 1 for given in labels.values())
    num_shared = sum(fingerprint in labels for fingerprint in of_validation)
    text = f"{num_repeated} in the training split, {num_shared} of {len(validation)} validation examples are in it"
    data = {"in_training": num_repeated, "in_validation": num_shared, "contradictory": num_contradictory}
    if num_contradictory:
        advice = f"{num_contradictory} of them have different classes: look at these labels"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    if num_shared > LEAK * len(validation):
        advice = "memorised examples count as correct predictions: remove the copies in `load`"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def check_leak(subject: Subject, test: SealedSplit) -> Verdict:
    """Test examples that are in the training or the validation split; the test split stays sealed."""
    fingerprints, of_validation = subject.fingerprints
    num_shared = test.count_known({*fingerprints, *of_validation})
    share = num_shared / len(test)
    text = f"{num_shared} of {len(test)} test examples are among the others"
    data = {"in_test": num_shared, "test_examples": len(test)}
    if not num_shared:
        return Verdict(state="ok", text=text, data=data)
    if share <= LEAK:
        return Verdict(state="warning", text=text, advice="leave them out of the training", data=data)
    if share <= 1.2 * _natural_share(subject):
        advice = "as often as training examples repeat each other: are they measured too coarsely, or copied?"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    advice = "the test result would be too good: leave them out of the training, or divide by groups (docs/tasks.md)"
    return Verdict(state="wrong", text=text, advice=advice, data=data)


def _natural_share(subject: Subject) -> float:
    """Share of the training examples that equal another: a few coarse features do so by themselves, images do not."""
    if any(isinstance(part, Ragged) or part.ndim > 2 for part in parts(subject.splits.train.inputs)):
        return 0.0
    fingerprints, _ = subject.fingerprints
    return sum(count for count in Counter(fingerprints).values() if count > 1) / len(fingerprints)
