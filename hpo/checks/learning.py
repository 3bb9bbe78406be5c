"""Checks of a short training: does it fit a single batch, beat what needs no network, and at which rates?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from itertools import islice
from statistics import mean, median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hpo.checks.baselines import baselines
from hpo.checks.speed import seconds_a_step
from hpo.checks.table_models import BOOSTED, LINEAR, is_table, table_scores
from hpo.checks.verdicts import Subject, Verdict
from hpo.config import OWN, derive_seed
from hpo.data.batches import build_batches
from hpo.data.kinds import IGNORED, labels_of
from hpo.data.parts import tensors_of
from hpo.parameters import Choice
from hpo.training.losses import training_loss
from hpo.training.metrics import EpochMetrics
from hpo.training.optimizers import build_optimizer
from hpo.training.precision import settle_precision
from hpo.training.probe import backward_in_evaluation_mode
from hpo.training.step import TrainingStep
from hpo.training.trainer import fit
from hpo.values import format_value

if TYPE_CHECKING:
    from hpo.data.datasets import Splits
    from hpo.data.parts import Batch

BATCH, BATCH_STEPS = 32, 300
BATCH_RATES = (1e-3, 1e-2)

NUM_EXAMPLES = 5_000
TRAINING_S = 15.0
"""Seconds that the training against the baseline may take; slow networks see fewer examples."""

ENOUGH_STEPS = 100
"""With fewer, a network that has learned nothing may simply be slow."""

RANGE_TEST_S = 10.0
NUM_RATES, MIN_RATES, LOWEST_RATE, HIGHEST_RATE = 100, 20, 1e-5, 10.0
TOO_LARGE = 3.0
"""By how many times the first losses a loss has grown at which the rate need not grow any further."""

SMOOTHING = 0.85
"""What a smoothed loss keeps of the one before."""

ROUGH = 3.0
"""How far outside the window a rate may lie: a hundred steps do not say it better."""


_LEARNED = {
    "classification": ("accuracy", 1.0),
    "multilabel": ("exact_match", 1.0),
    "regression": ("r2", 0.95),
    "segmentation": ("mean_iou", 0.9),
    "box": ("mean_iou", 0.8),
    "tagging": ("accuracy", 0.99),
    "soft_labels": ("accuracy", 0.99),
}
"""By kind of target, the metric that tells whether a batch was learned by heart, and from which value on it was."""

FALLEN = {"transcription": 0.5}
"""By what share the loss falls at least where a batch was learned whose kind has no such metric."""

FALLEN_AT_ALL = 0.05
"""The same for a loss of the task's own: how far it can fall, only its author knows."""


def check_one_batch(subject: Subject) -> Verdict:
    """Whether the network, without dropout and the like, can learn a few examples by heart: nothing is easier."""
    name, enough = _by_heart(subject)
    for rate in BATCH_RATES:
        losses, score = _learn_by_heart(subject, rate)
        if score >= enough:
            break
    measured = f"{name} {score:.3f}" if name else f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}"
    text = f"{measured} on {min(BATCH, len(subject.splits.train))} examples after {len(losses)} steps"
    data = {"score": score, "steps": len(losses), "losses": losses}
    if score >= enough:
        return Verdict(state="ok", text=text, data=data)
    advice = "something is broken: look at the loss, the labels, detached layers, and whether inputs reach the outputs"
    return Verdict(state="wrong" if name else "warning", text=text, advice=advice, data=data)


def _by_heart(subject: Subject) -> tuple[str, float]:
    if subject.config.loss == OWN or subject.spec.kind not in _LEARNED:
        return "", FALLEN.get(subject.spec.kind, FALLEN_AT_ALL)
    return _LEARNED[subject.spec.kind]


def _learn_by_heart(subject: Subject, rate: float) -> tuple[list[float], float]:
    """The losses, and the metric; without a metric the share by which the loss has fallen."""
    name, enough = _by_heart(subject)
    inputs, targets = _few_examples(subject)
    model = subject.network()
    optimizer = build_optimizer(model, replace(subject.config, optimizer="adam", lr=rate, weight_decay=0.0))
    step = TrainingStep(model, subject.loss_of(model), optimizer)
    losses: list[float] = []
    score = -math.inf
    for number in range(1, BATCH_STEPS + 1):
        with backward_in_evaluation_mode(model):
            done = step(inputs, targets)
        losses.append(done.loss.item())
        if number % 10 == 0:
            fallen = (losses[0] - losses[-1]) / (abs(losses[0]) or 1.0)  # a likelihood may be below 0
            score = _score(subject, done.outputs, targets, name) if name else fallen
            if score >= enough or not math.isfinite(losses[-1]):
                break
    return losses, score


def _few_examples(subject: Subject) -> tuple[Batch, Batch]:
    """The first examples; of an embedding, those that another one is alike to."""
    groups = subject.splits.train.targets
    if subject.spec.kind != "embedding" or not isinstance(groups, Tensor):
        return subject.batch(BATCH)
    rows = torch.tensor([*islice(_in_pairs(groups.tolist()), BATCH)])
    return subject.splits.train.select(rows).first(BATCH, subject.config.device)


def _in_pairs(groups: list[int]) -> Iterator[int]:
    """Rows, two that are alike at a time, from one group after the other."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    for first in range(0, max(map(len, members.values())) - 1, 2):
        for rows in members.values():
            if len(rows) >= first + 2:
                yield from rows[first : first + 2]


def check_baseline(subject: Subject) -> Verdict:
    """Whether a short training beats the commonest class, or the mean, and a linear model of the same examples."""
    splits, max_epochs = _as_fits_the_time(subject)
    metric = _comparable_metric(subject)
    config = replace(subject.config, max_epochs=max_epochs, patience=max_epochs)
    model = subject.network()
    with closing(fit(model, splits, config)) as results:
        *_, last = results
    epochs = "an epoch" if last.epoch == 1 else f"{last.epoch} epochs"
    if metric is None:
        text = f"{config.metric} {last.value:.3f} after {epochs} of {len(splits.train)} examples; "
        text += f"no baseline is known for targets of the kind {subject.spec.kind}"
        return Verdict(
            state="ok", text=text, data={"network": last.value, "metric": config.metric, "epochs": last.epoch}
        )
    network = last.metrics[f"val/{metric}"]
    _, targets = splits.validation.batch(slice(None))
    naive, linear = (
        math.nan if outputs is None else _score(subject, outputs, targets, metric) for outputs in baselines(splits)
    )
    of_table = table_scores(splits, metric) if is_table(splits) else {}
    linear = of_table.get(LINEAR, linear)
    trained = f"{metric} {network:.3f} after {epochs} of {len(splits.train)} examples"
    simplest = "the majority class" if subject.spec.classes else "the mean"
    text = f"{trained}; {simplest} has {naive:.3f}"
    text += f", a linear model {linear:.3f}" if math.isfinite(linear) else ""
    data = {"network": network, "naive": naive, "linear": linear, "metric": metric, "epochs": last.epoch}
    if of_table:
        text += f", {BOOSTED} {of_table[BOOSTED]:.3f}"
        data["boosted"] = of_table[BOOSTED]
    # What scores like chance does not get beyond three standard errors by accident.
    num, judged = _num_judged(targets, splits)
    margin = 3 * math.sqrt(max(naive * (1 - naive), 0.0) / num) if subject.spec.classes else 9 / num
    margin = min(margin, (1 - naive) / 2) if subject.spec.classes else margin  # what is perfect is better
    num_steps = last.epoch * (len(splits.train) // (config.batch_size * config.accumulate))
    if not network > naive + margin and last.epoch < subject.config.max_epochs and num_steps < ENOUGH_STEPS:
        advice = (
            f"only {num_steps} steps fit into the time limit, too few to tell; run on a GPU or with a smaller network"
        )
        return Verdict(state="warning", text=text, advice=advice, data=data)
    if naive + margin / 3 < network <= naive + margin:
        advice = f"{num} validation {judged} cannot tell this from {simplest}; more of them could"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    if not network > naive + margin:
        advice = "nothing was learned that helps with new examples: are the labels right, and lr and the loss?"
        return Verdict(state="wrong", text=text, advice=advice, data=data)
    if network < linear - margin and last.epoch < subject.config.max_epochs:
        return Verdict(state="ok", text=f"{text}, but so few epochs say little about it", data=data)
    if network < linear - margin:
        advice = "a linear model does better: train longer, tune lr first, or take a smaller network"
        return Verdict(state="warning", text=text, advice=advice, data=data)
    return Verdict(state="ok", text=text, data=data)


def _as_fits_the_time(subject: Subject) -> tuple[Splits, int]:
    """As many examples and epochs as a few seconds allow, of the 5 000 but no more than the task has."""
    splits, batch_size = subject.splits, subject.config.batch_size
    num_steps = max(1, int(TRAINING_S / seconds_a_step(subject, batch_size)))
    least = batch_size * subject.config.accumulate
    num_examples = min(len(splits.train), max(least, min(NUM_EXAMPLES, num_steps * batch_size)))
    max_epochs = min(subject.config.max_epochs, max(1, num_steps * batch_size // num_examples))
    train, validation = (
        split.sample(number, "cpu") for split, number in ((splits.train, num_examples), (splits.validation, 2_000))
    )
    return replace(splits, train=train, validation=validation), max_epochs


def _comparable_metric(subject: Subject) -> str | None:
    """The task's metric where guesses have one that is better when larger; else the most usual one of the kind.

    None for kinds that have no baseline.
    """
    comparable = {
        "classification": ("accuracy", "precision", "recall", "f1"),
        "multilabel": ("accuracy", "f1", "precision", "recall"),
        "regression": ("r2",),
        "segmentation": ("mean_iou", "dice", "accuracy"),
        "box": ("mean_iou",),
        "tagging": ("accuracy",),
    }.get(subject.spec.kind)
    if comparable is None:
        return None
    return subject.config.metric if subject.config.metric in comparable else comparable[0]


def _num_judged(targets: Batch, splits: Splits) -> tuple[int, str]:
    """How many labels the validation split has where elements have one, else how many examples, and what they are."""
    if splits.spec.kind not in ("segmentation", "tagging"):
        return len(splits.validation), "examples"
    return int((labels_of(targets) != IGNORED).sum()), "labels"


def _score(subject: Subject, outputs: Any, targets: Batch, metric: str) -> float:
    metrics = EpochMetrics(subject.spec, tensors_of(targets)[0].device)
    metrics.update(outputs, targets, torch.zeros((), device=tensors_of(targets)[0].device))
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
    if not fall > 0.05 * _size(losses):
        advice = (
            "no learning rate lowers the loss: look at the loss, the labels, and whether gradients reach the layers"
        )
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
    optimizer = build_optimizer(model, config, model.own)
    loss = training_loss(config, subject.splits.train, subject.spec, model.own)
    precision = settle_precision(config.precision, model, loss, lambda: subject.batch(config.batch_size))
    step = TrainingStep(model, loss, optimizer, clip_norm=config.clip_norm, precision=precision)
    shares = [group["lr"] / config.lr for group in optimizer.param_groups]
    growth = (HIGHEST_RATE / LOWEST_RATE) ** (1 / (num_rates - 1))
    rates: list[float] = []
    losses: list[float] = []
    with torch.random.fork_rng(devices=[] if config.device == "cpu" else [torch.device(config.device)]):
        torch.manual_seed(derive_seed(config.seed, "range test"))
        for number, (inputs, targets) in zip(range(num_rates), _endless(subject), strict=False):
            rates.append(LOWEST_RATE * growth**number)
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = share * rates[-1]
            losses.append(step(inputs, targets).loss.item())
            if not mean(losses[-3:]) - median(losses[:10]) < TOO_LARGE * _size(losses):
                break
    num_finite = sum(map(math.isfinite, losses))
    return rates[:num_finite], losses[:num_finite]


def _size(losses: list[float]) -> float:
    """Of the first losses; a likelihood's may be below 0."""
    return median(map(abs, losses[:10]))


def _endless(subject: Subject) -> Iterator[tuple[Batch, Batch]]:
    config = subject.config
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "range test"))
    split = subject.sample(NUM_EXAMPLES + config.batch_size)
    batches = build_batches(split, config, subject.spec, order=generator, augmentation=generator)
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
