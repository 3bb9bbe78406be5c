"""Averages of the weights: EMA and SWA."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.data import of_classes
from helpers.training import NUM_CLASSES, ImageNet, image_splits, quick_config
from torch import nn

from hpo.errors import UsageError
from hpo.training.averaging import AveragedWeights
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.evaluation import evaluate
from hpo.training.trainer import fit


def test_an_average_keeps_its_share_of_itself_in_each_step_and_takes_the_buffers_as_they_are() -> None:
    model = ImageNet()
    expected = model.output.weight.detach().clone()
    average = AveragedWeights(model, quick_config(ema_decay=0.9))
    for step in range(1, 4):
        with torch.no_grad():
            model.output.weight += step
        average.end_step()
        expected = 0.9 * expected + 0.1 * model.output.weight.detach()
    torch.testing.assert_close(average.model.output.weight, expected)

    plain = nn.Sequential(nn.Linear(2, 2))
    plain.register_buffer("count", torch.tensor(1))
    average = AveragedWeights(plain, quick_config(ema_decay=0.9))
    plain.count += 4  # type: ignore[assignment]
    assert average.settle(plain, (), "fp32").count == 5


def test_the_averaged_weights_are_those_that_are_measured_and_kept() -> None:
    splits = image_splits()
    config = quick_config(max_epochs=5, ema_decay=0.9, metric="loss", lr=0.05)
    model = ImageNet(dropout=0.2)
    results = list(fit(model, splits, config))
    best = results[results[-1].best_epoch - 1]
    measured = evaluate(model, splits.validation, config, of_classes(4))
    assert measured == {name: best.metrics[f"val/{name}"] for name in measured}
    plain = ImageNet(dropout=0.2)
    others = list(fit(plain, splits, replace(config, ema_decay=0.0)))
    assert [result.metrics["train/loss"] for result in results] == [result.metrics["train/loss"] for result in others]
    assert not torch.equal(model.output.weight, plain.output.weight)


def test_batch_norms_see_the_training_split_through_the_averaged_weights() -> None:
    splits, model = image_splits(), ImageNet()
    list(fit(model, splits, quick_config(max_epochs=1, ema_decay=0.99, lr=0.1)))
    hidden = model.hidden(splits.train.inputs.flatten(1) / 255.0)
    torch.testing.assert_close(model.norm.running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    assert model.norm.momentum == 0.1


def test_averaging_steadies_a_training_with_a_rate_that_is_too_high() -> None:
    def losses(ema_decay: float) -> list[float]:
        config = quick_config(
            optimizer="sgd", schedule="constant", lr=0.5, batch_size=8, max_epochs=8, ema_decay=ema_decay
        )
        return [result.metrics["val/loss"] for result in fit(ImageNet(), image_splits(), config)][4:]

    assert sum(losses(0.95)) < 0.9 * sum(losses(0.0))


def test_swa_is_the_mean_of_the_weights_at_the_ends_of_the_late_epochs(tmp_path: Path) -> None:
    config = quick_config(max_epochs=5, swa_start=0.6, metric="loss", lr=0.02, optimizer="sgd")
    model, ends = ImageNet(dropout=0.0), []
    folder = CheckpointFolder(tmp_path)
    for result in fit(model, image_splits(), config, checkpoint=folder):
        ends.append(deepcopy(model.state_dict()))
        assert result.is_best, "so that the last average is what is kept"
        measured = evaluate(deepcopy(model), image_splits().validation, config, of_classes(NUM_CLASSES))["loss"]
        assert (measured == pytest.approx(result.metrics["val/loss"], abs=1e-6)) == (result.epoch < 3)
    for name in ("hidden.weight", "output.bias"):
        by_hand = torch.stack([weights[name] for weights in ends[2:]]).mean(0)
        torch.testing.assert_close(model.state_dict()[name], by_hand)
        assert not torch.allclose(by_hand, ends[-1][name])


def test_two_ways_of_averaging_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match=r"swa_start=0\.5 is not allowed: it must be 0 when ema_decay"):
        quick_config(swa_start=0.5, ema_decay=0.9)


def test_the_average_of_a_recurrent_network_has_its_weights_in_one_piece_as_cudnn_wants_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flattened = []
    network = nn.Sequential(nn.LSTM(3, 4), nn.Linear(4, 2))
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda module: flattened.append(module))
    average = AveragedWeights(network, quick_config(ema_decay=0.9))
    assert flattened == [average.model[0]]  # type: ignore[index]
