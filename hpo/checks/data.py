"""Checks of the data: ranges, balance, duplicates, and what the network gets to see of them."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import Tensor, nn

from hpo.checks.verdicts import Subject, Verdict
from hpo.data.examples import SealedSplit

SAMPLE = 5_000
"""Examples that ranges and statistics are taken from."""

UNBALANCED = 3.0
"""The largest class, as a multiple of the smallest one, above which accuracy misleads."""

OUTLIER = 20.0
"""Deviations from the mean above which a single value may rule a training."""

LEAK = 0.01
"""Share of the test split above which copies of training examples falsify its result."""


def check_inputs(subject: Subject) -> Verdict:
    inputs = subject.splits.train.inputs[:SAMPLE]
    low, high = inputs.min().item(), inputs.max().item()
    is_constant = (inputs == inputs[:1]).flatten(1).all(0)
    num_constant, num_features = int(is_constant.sum()), is_constant.numel()
    shape = "x".join(map(str, inputs.shape[1:]))
    kind = str(inputs.dtype).removeprefix("torch.")
    text = f"{len(subject.splits.train)} examples of {shape} {kind} from {low:.4g} to {high:.4g}"
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


def check_targets(subject: Subject) -> Verdict:
    return _check_balance(subject) if subject.num_classes else _check_values(subject.splits.train.targets)


def _check_balance(subject: Subject) -> Verdict:
    classes = subject.splits.spec.classes
    counts = torch.bincount(subject.splits.train.targets, minlength=len(classes)).tolist()
    rarest, commonest = min(counts), max(counts)
    ratio = commonest / rarest
    text = f"{len(classes)} classes with {rarest} to {commonest} training examples"
    data = {"ratio": ratio, "counts": counts, "classes": list(classes)}
    config = subject.config
    is_dealt_with = config.metric != "accuracy" and "balanced" in (config.class_weights, config.sampling)
    if ratio <= UNBALANCED or is_dealt_with:
        return Verdict(state="ok", text=text, data=data)
    advice = (
        f"'{classes[counts.index(rarest)]}' is {ratio:.1f} times as rare as '{classes[counts.index(commonest)]}': "
        "judge by the metric recall or f1, and try class_weights=balanced"
    )
    return Verdict(state="warning", text=text, advice=advice, data=data)


def _check_values(targets: Tensor) -> Verdict:
    values = targets.double()
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


@torch.inference_mode()
def check_normalised(subject: Subject) -> Verdict:
    """What the network itself gets, whatever stands before it."""
    train, validation = (
        _seen_by_network(subject, split.inputs[:SAMPLE]) for split in (subject.splits.train, subject.splits.validation)
    )
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
        advice = "the validation examples are of another kind than the training examples: look at what `load` reads"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    if train.ndim == 2 and furthest > OUTLIER:
        feature = int(train.abs().amax(0).argmax())
        advice = f"feature {feature} has values far from all others: clip it, or take its logarithm"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _seen_by_network(subject: Subject, inputs: Tensor) -> Tensor:
    model = subject.network()
    model.network = recorder = _Recorder()
    model(inputs[:1_000].to(subject.config.device))
    return recorder.seen


class _Recorder(nn.Module):
    """Stands in for a network, and keeps what it gets.

    Not inside the function: a class refers to itself, so what it holds would stay on the device until Python looks for
    such circles.
    """

    seen: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        self.seen = inputs
        return inputs.new_zeros(len(inputs), 1)


def check_duplicates(subject: Subject) -> Verdict:
    """Examples of the training and the validation split that have the same inputs."""
    train, validation = subject.splits.train, subject.splits.validation
    labels = defaultdict(set)
    fingerprints, of_validation = subject.fingerprints
    for fingerprint, target in zip(fingerprints, train.targets.tolist(), strict=True):
        labels[fingerprint].add(target)
    num_repeated = len(fingerprints) - len(labels)
    num_contradictory = sum(len(given) > 1 for given in labels.values())
    num_shared = sum(fingerprint in labels for fingerprint in of_validation)
    text = f"{num_repeated} in the training split, {num_shared} of {len(validation)} validation examples are in it"
    data = {"in_training": num_repeated, "in_validation": num_shared, "contradictory": num_contradictory}
    if num_contradictory and subject.num_classes:
        advice = f"{num_contradictory} of them have different classes: look at these labels"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    if num_shared > LEAK * len(validation):
        advice = "what was learned by heart passes for knowledge: leave the copies out in `load`"
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
    advice = "the test result would be too good: leave them out of the training, or divide the data by group"
    return Verdict(state="wrong", text=text, advice=advice, data=data)


def _natural_share(subject: Subject) -> float:
    """Share of the training examples that equal another: a few coarse features do so by themselves, images do not."""
    if subject.splits.train.inputs.ndim > 2:
        return 0.0
    fingerprints, _ = subject.fingerprints
    return sum(count for count in Counter(fingerprints).values() if count > 1) / len(fingerprints)
