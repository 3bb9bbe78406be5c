"""Checks of a short training: does it fit a single batch, beat what needs no network, and at which rates?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hpo.checks.speed import seconds_a_step
from hpo.checks.verdicts import Sample, Subject, Verdict
from hpo.config import derive_seed
from hpo.data.batches import build_batches
from hpo.data.datasets import Splits
from hpo.data.examples import Split
from hpo.space import Choice, format_value
from hpo.training.losses import training_loss
from hpo.training.metrics import ConfusionMetrics, RegressionMetrics
from hpo.training.optimizers import build_optimizer
from hpo.training.precision import settle_precision
from hpo.training.probe import backward_in_evaluation_mode
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit

BATCH, BATCH_STEPS = 32, 300
BATCH_RATES = (1e-3, 1e-2)

NUM_EXAMPLES = 5_000
TRAINING_S = 15.0
"""Seconds that the training against the baseline may take; slow networks see fewer examples."""

ENOUGH_STEPS = 100
"""With fewer, a network that has learned nothing may simply be slow."""

RANGE_TEST_S = 10.0
NUM_RATES, MIN_RATES, LOWEST_RATE, HIGHEST_RATE = 100, 20, 1e-5, 10.0
TOO_LARGE = 4.0
"""The loss, as a multiple of the first ones, at which the rate need not grow any further."""

SMOOTHING = 0.85
"""What a smoothed loss keeps of the one before."""

ROUGH = 3.0
"""How far outside the window a rate may lie: a hundred steps do not say it better."""


def check_one_batch(subject: Subject) -> Verdict:
    """Whether the network, without dropout and the like, can learn a few examples by heart: nothing is easier."""
    sample = subject.sample(BATCH)
    for rate in BATCH_RATES:
        losses, score = _learn_by_heart(subject, sample, rate)
        if score >= _learned(subject):
            break
    name = "accuracy" if subject.num_classes else "r2"
    text = f"{name} {score:.3f} on {len(sample.targets)} examples after {len(losses)} steps"
    data = {"score": score, "steps": len(losses), "losses": losses}
    if score >= _learned(subject):
        return Verdict(state="ok", text=text, data=data)
    advice = "something is broken: look at the loss, the labels, detached layers, and whether inputs reach the outputs"
    return Verdict(state="wrong", text=text, advice=advice, data=data)


def _learned(subject: Subject) -> float:
    return 1.0 if subject.num_classes else 0.95


def _learn_by_heart(subject: Subject, sample: Sample, rate: float) -> tuple[list[float], float]:
    model = subject.network()
    optimizer = build_optimizer(model, replace(subject.config, optimizer="adam", lr=rate, weight_decay=0.0))
    step = TrainingStep(model, subject.loss, optimizer)
    losses: list[float] = []
    score = -math.inf
    for number in range(1, BATCH_STEPS + 1):
        with backward_in_evaluation_mode(model):
            done = step(sample.inputs, sample.targets)
        losses.append(done.loss.item())
        if number % 10 == 0:
            score = _score(subject, done.outputs, sample.targets, "accuracy" if subject.num_classes else "r2")
            if score >= _learned(subject) or not math.isfinite(losses[-1]):
                break
    return losses, score


def check_baseline(subject: Subject) -> Verdict:
    """Whether a short training beats the commonest class, or the mean, and a linear model of the same examples."""
    splits, max_epochs = _as_fits_the_time(subject)
    metric = _comparable_metric(subject)
    config = replace(subject.config, max_epochs=max_epochs, patience=max_epochs)
    model = subject.network()
    with closing(fit(model, splits, config)) as results:
        *_, last = results
    network = last.metrics[f"val/{metric}"]
    naive, linear = (_score(subject, outputs, splits.validation.targets, metric) for outputs in _baselines(splits))
    epochs = "an epoch" if last.epoch == 1 else f"{last.epoch} epochs"
    trained = f"{metric} {network:.3f} after {epochs} of {len(splits.train)} examples"
    simplest = "the majority class" if subject.num_classes else "the mean"
    text = f"{trained}; {simplest} has {naive:.3f}, a linear model {linear:.3f}"
    data = {"network": network, "naive": naive, "linear": linear, "metric": metric, "epochs": last.epoch}
    # What scores like chance does not get beyond three standard errors by accident.
    num = len(splits.validation)
    margin = 3 * math.sqrt(max(naive * (1 - naive), 0.0) / num) if subject.num_classes else 9 / num
    num_steps = last.epoch * (len(splits.train) // config.batch_size)
    if not network > naive + margin and last.epoch < subject.config.max_epochs and num_steps < ENOUGH_STEPS:
        advice = (
            f"only {num_steps} steps fit into the time limit, too few to tell; run on a GPU or with a smaller network"
        )
        return Verdict(state="warning", text=text, advice=advice, data=data)
    if not network > naive + margin:
        advice = "nothing was learned that helps with new examples: are the labels right, and lr and the loss?"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if network < linear - margin and last.epoch < subject.config.max_epochs:
        return Verdict(state="ok", text=f"{text}, which so few epochs say little of", data=data)
    if network < linear - margin:
        advice = "a linear model does better: train longer, tune lr first, or take a smaller network"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _as_fits_the_time(subject: Subject) -> tuple[Splits, int]:
    """As many examples and epochs as a few seconds allow, of the 5 000 but no more than the task has."""
    splits, batch_size = subject.splits, subject.config.batch_size
    num_steps = max(1, int(TRAINING_S / seconds_a_step(subject, batch_size)))
    num_examples = min(len(splits.train), max(batch_size, min(NUM_EXAMPLES, num_steps * batch_size)))
    max_epochs = min(subject.config.max_epochs, max(1, num_steps * batch_size // num_examples))
    few = replace(splits, train=_first(splits.train, num_examples), validation=_first(splits.validation, 2_000))
    return few, max_epochs


def _first(split: Split, num_examples: int) -> Split:
    return Split(split.inputs[:num_examples], split.targets[:num_examples])


def _comparable_metric(subject: Subject) -> str:
    """The task's metric where guesses have one that is better when larger; else accuracy or R2."""
    if subject.num_classes:
        return subject.config.metric if subject.config.metric in ("precision", "recall", "f1") else "accuracy"
    return "r2"


def _baselines(splits: Splits) -> tuple[Tensor, Tensor]:
    """Outputs on the validation split of the simplest guess, and of a ridge regression of the inputs or the classes."""
    from sklearn.linear_model import Ridge, RidgeClassifier  # scikit-learn takes a second to import

    features = _flattened(splits.train.inputs[:])
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp(min=1e-6)
    inputs, new = (
        ((_flattened(part.inputs[:]) - mean) / deviation).numpy() for part in (splits.train, splits.validation)
    )
    targets, num = splits.train.targets, len(splits.validation)
    num_classes = len(splits.spec.classes)
    strength = float(len(inputs))  # a prior as strong as the data: pixels outnumber the examples
    if not num_classes:
        model = Ridge(alpha=strength / 100).fit(inputs, targets.numpy())
        return targets.mean().expand(num), torch.from_numpy(model.predict(new)).float()
    commonest = torch.bincount(targets).argmax().expand(num)
    predicted = RidgeClassifier(alpha=strength).fit(inputs, targets.numpy()).predict(new)
    naive, linear = (functional.one_hot(p, num_classes).float() for p in (commonest, torch.tensor(predicted)))
    return naive, linear


def _flattened(inputs: Tensor) -> Tensor:
    """Features (N, F); of large images means over parts of them, which is as much as a linear model can take."""
    if inputs.ndim == 4:
        height, width = (min(32, side) for side in inputs.shape[-2:])
        inputs = functional.adaptive_avg_pool2d(inputs.float(), (height, width))
    return inputs.flatten(1).float()


def _score(subject: Subject, outputs: Tensor, targets: Tensor, metric: str) -> float:
    metrics = (
        ConfusionMetrics(subject.num_classes, targets.device)
        if subject.num_classes
        else RegressionMetrics(targets.device)
    )
    metrics.update(outputs, targets)
    return metrics.compute()[metric].item()


def check_learning_rate(subject: Subject) -> Verdict:
    """The learning-rate range test (Smith 2017, arXiv:1506.01186, section 3.3): the rate grows from step to step.

    The window begins where the loss has fallen by a tenth of what it falls in all, and ends where it is lowest.
    """
    rates, losses = _range_test(subject)
    if not losses:
        return Verdict(state="wrong", text="the loss is not finite", advice="look at the loss and at the first outputs")
    smoothed = _smooth(losses)
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    first = median(losses[:10])  # the rates are so small that nothing has changed yet
    fall = first - smoothed[lowest]
    data: dict[str, Any] = {"rates": rates, "losses": losses, "smoothed": smoothed}
    steps = f"{len(rates)} steps"
    if not fall > 0.05 * first:
        advice = "the loss falls at no rate: look at the loss, the labels, and whether gradients reach the layers"
        text = f"the loss is {first:.3f} at first and at lowest {smoothed[lowest]:.3f} in {steps}"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    begin = max(index for index, loss in enumerate(smoothed[: lowest + 1]) if not index or loss > first - 0.1 * fall)
    low, high = (_rounded(rates[index]) for index in (begin, lowest))
    data |= {"low": low, "high": high}
    default = subject.config.lr
    text = f"the loss falls from {low:g} to {high:g} ({steps}); the default is {format_value(default)}"
    parameter = subject.task.space.parameters.get("lr")
    if parameter is not None and not isinstance(parameter, Choice) and not parameter.is_fixed:
        narrowed = max(low, parameter.low), min(high, parameter.high)
        text += f" of {parameter.describe()}"
        if narrowed[0] < narrowed[1]:
            text += f"; to narrow it: -p lr={narrowed[0]:g}:{narrowed[1]:g}"
    if low / ROUGH <= default <= high * ROUGH:
        return Verdict(state="ok", text=text, data=data)
    advice = f"the default is too {'small' if default < low else 'large'}: change the default of lr, or its range"
    return Verdict(state="warning", text=text, advice=advice, data=data)


def _range_test(subject: Subject) -> tuple[list[float], list[float]]:
    """Rates and the losses of their steps, until the loss is not finite or far above its lowest."""
    config = subject.config
    num_rates = max(MIN_RATES, min(NUM_RATES, int(RANGE_TEST_S / seconds_a_step(subject, config.batch_size))))
    model = subject.network().train()
    optimizer = build_optimizer(model, config)
    loss = training_loss(config, subject.splits.train, subject.num_classes)
    precision = settle_precision(config.precision, model, loss, lambda: subject.batch(config.batch_size))
    step = TrainingStep(model, loss, optimizer, clip_norm=config.clip_norm, precision=precision)
    shares = [group["lr"] / config.lr for group in optimizer.param_groups]
    growth = (HIGHEST_RATE / LOWEST_RATE) ** (1 / (num_rates - 1))
    rates: list[float] = []
    losses: list[float] = []
    with torch.random.fork_rng(devices=[] if config.device == "cpu" else [torch.cuda.current_device()]):
        torch.manual_seed(derive_seed(config.seed, "range test"))
        for number, (inputs, targets) in zip(range(num_rates), _endless(subject), strict=False):
            rates.append(LOWEST_RATE * growth**number)
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = share * rates[-1]
            losses.append(step(inputs, targets).loss.item())
            if not mean(losses[-3:]) < TOO_LARGE * median(losses[:10]):
                break
    num_finite = sum(map(math.isfinite, losses))
    return rates[:num_finite], losses[:num_finite]


def _endless(subject: Subject) -> Iterator[tuple[Tensor, Tensor]]:
    config = subject.config
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "range test"))
    split = subject.sample(NUM_EXAMPLES + config.batch_size).as_split()
    batches = build_batches(split, config, subject.num_classes, order=generator, augmentation=generator)
    while True:
        yield from batches


def _smooth(losses: list[float]) -> list[float]:
    """The exponential moving average, corrected for its beginning."""
    average, smoothed = 0.0, []
    for number, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        smoothed.append(average / (1 - SMOOTHING**number))
    return smoothed


def _rounded(rate: float) -> float:
    return float(f"{rate:.1g}")
