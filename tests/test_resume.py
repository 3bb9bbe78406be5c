"""A training that was stopped or killed continues bit by bit."""

from __future__ import annotations

import math
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import warm
from helpers.training import (
    ImageNet,
    Scripted,
    assert_equal_weights,
    image_splits,
    quick_config,
    weights_of,
    without_time,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from hpo.config import AUGMENTATIONS, CLASS_WEIGHTS, TrainConfig
from hpo.errors import CheckpointError
from hpo.methods import OPTIMIZERS, SCHEDULES
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.losses import LOSSES_OF_KIND
from hpo.training.trainer import fit

averages: list[dict[str, Any]] = [{}, {"ema_decay": 0.9}, {"swa_start": 0.5}]
resumable_configs = st.builds(
    quick_config,
    max_epochs=st.just(4),
    batch_size=st.sampled_from([20, 48]),
    optimizer=st.sampled_from([*OPTIMIZERS]),
    beta1=st.sampled_from([0.9, 0.5]),
    schedule=st.sampled_from([*SCHEDULES]),
    warmup_fraction=st.sampled_from([0.05, 0.4]),
    plateau_patience=st.just(1),
    augment=st.lists(st.sampled_from(AUGMENTATIONS), max_size=3).map(lambda names: "+".join(names) or "none"),
    mixup=st.sampled_from([0.0, 0.3]),
    cutmix=st.sampled_from([0.0, 1.0]),
    sampling=st.sampled_from(["uniform", "balanced"]),
    class_weights=st.sampled_from(CLASS_WEIGHTS),
    loss=st.sampled_from(LOSSES_OF_KIND["classification"]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    clip_norm=st.sampled_from([0.0, 0.5]),
    clip_value=st.sampled_from([0.0, 0.1]),
    l1=st.sampled_from([0.0, 0.001]),
    max_norm=st.sampled_from([0.0, 1.0]),
    patience=st.sampled_from([1, 4]),
    precision=st.sampled_from(["auto", "bf16", "fp16"]),
    seed=st.integers(0, 3),
)


@settings(max_examples=25, phases=[Phase.generate])  # shrinking would train for minutes
@given(
    config=st.builds(lambda config, average: replace(config, **average), resumable_configs, st.sampled_from(averages)),
    dropout=st.sampled_from([0.0, 0.4]),
    stops=st.sets(st.integers(1, 4), min_size=1),
)
def test_a_training_stopped_after_any_epoch_and_resumed_is_bit_equal(
    tmp_path_factory: pytest.TempPathFactory, config: TrainConfig, dropout: float, stops: set[int]
) -> None:
    expected_model = ImageNet(dropout=dropout)
    expected = [without_time(result) for result in fit(expected_model, image_splits(), config)]

    folder = CheckpointFolder(tmp_path_factory.mktemp("run"))
    results: list[dict[str, Any]] = []
    for stop in [*sorted(stops), math.inf]:
        # Whatever a resumed run starts with is replaced by what was saved.
        model = ImageNet(dropout=dropout, seed=len(results))
        torch.rand(3)
        for result in fit(model, image_splits(), config, checkpoint=folder):
            if not results or result.epoch > results[-1]["epoch"]:
                results.append(without_time(result))
            if result.epoch >= stop:
                break
    assert results == expected
    assert_equal_weights(weights_of(model), weights_of(expected_model))


def test_a_resumed_training_begins_with_the_saved_result_and_does_not_repeat_its_epoch(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    first = next(iter(fit(ImageNet(), image_splits(), quick_config(), checkpoint=folder)))
    resumed = list(fit(ImageNet(), image_splits(), quick_config(), checkpoint=folder))
    assert [result.epoch for result in resumed] == [1, 2, 3]
    assert resumed[0] == first, "the time too: nothing was trained again"


@pytest.mark.parametrize(
    ("accuracies", "patience"), [([0.2, 0.6, 0.5], 9), ([0.2, 0.6, 0.5, 0.9], 1), ([0.2, 0.6, math.nan, 0.9], 9)]
)
def test_a_run_that_was_over_yields_its_last_result_again_and_restores_the_best_weights(
    tmp_path: Path, accuracies: list[float], patience: int
) -> None:
    splits, folder = image_splits(), CheckpointFolder(tmp_path)
    config = quick_config(max_epochs=len(accuracies), patience=patience)
    *_, last = fit(Scripted(accuracies, splits.validation.targets), splits, config, checkpoint=folder)  # type: ignore[arg-type]
    assert last.epoch == 3

    model = Scripted(accuracies, splits.validation.targets)  # type: ignore[arg-type]
    (again,) = fit(model, splits, config, checkpoint=folder)
    assert without_time(again) == without_time(last)
    assert model.epoch == 2
    assert not model.training


def test_a_damaged_checkpoint_costs_one_epoch_and_nothing_else(tmp_path: Path) -> None:
    expected_model = ImageNet(dropout=0.2)
    expected = [without_time(result) for result in fit(expected_model, image_splits(), quick_config())]

    folder = CheckpointFolder(tmp_path)
    for result in fit(ImageNet(dropout=0.2), image_splits(), quick_config(), checkpoint=folder):
        if result.epoch == 2:
            break
    newest = max(tmp_path.iterdir())
    newest.write_bytes(newest.read_bytes()[:-100])
    model = ImageNet(dropout=0.2)
    resumed = [without_time(result) for result in fit(model, image_splits(), quick_config(), checkpoint=folder)]
    assert resumed == expected, "what is left is the first epoch"
    assert_equal_weights(weights_of(model), weights_of(expected_model))


def test_a_folder_with_a_run_of_another_config_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    next(iter(fit(ImageNet(), image_splits(), quick_config(), checkpoint=folder)))
    other = replace(quick_config(), lr=0.5, seed=3)
    with pytest.raises(CheckpointError, match=r"lr 0\.01 -> 0\.5, seed 0 -> 3"):
        next(iter(fit(ImageNet(), image_splits(), other, checkpoint=folder)))


# This module is imported by the process to be killed, so imports that take as long as torch's stay in their tests.
KILLED_IN_ITS_THIRD_EPOCH = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from helpers.training import *
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.trainer import fit

class Killed(ImageNet):
    def train(self, mode=True):
        begun.extend([mode] * mode)
        if len(begun) == 3:
            while not list(folder.path.glob("epoch-0002.*")):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train(mode)

begun, folder = [], CheckpointFolder(Path(sys.argv[2]))
list(fit(Killed(dropout=0.3), image_splits(), quick_config(max_epochs=5, compile="off"), checkpoint=folder))
"""


def test_a_killed_process_is_continued_bit_equal_by_another(tmp_path: Path) -> None:
    killed = warm.run([sys.executable, "-c", KILLED_IN_ITS_THIRD_EPOCH, Path(__file__).parent, tmp_path])
    assert killed.returncode == -signal.SIGKILL, killed.stderr

    # What was compiled in this process already is compiled again at once, which the other one does not know.
    config = quick_config(max_epochs=5, compile="off")
    model, expected_model = ImageNet(dropout=0.3), ImageNet(dropout=0.3)
    resumed = [without_time(r) for r in fit(model, image_splits(), config, checkpoint=CheckpointFolder(tmp_path))]
    expected = [without_time(result) for result in fit(expected_model, image_splits(), config)]
    assert resumed == expected[1:]
    assert_equal_weights(weights_of(model), weights_of(expected_model))
