"""Named losses, strategies and augmentations that do not fit: each is told in one line before the first trial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_wrong_tasks import CLASSES, FEATURES, IMAGES, LABELS, NAMES, NUM, WORDS, fixed, prepared

from hpo import HpoError, Ragged

EMBEDDED: dict[str, Any] = {"classes": [], "loss": "info_nce", "metric": "recall_at_1", "given": {"kind": "embedding"}}
UNLABELLED: dict[str, Any] = EMBEDDED | {"inputs": IMAGES, "targets": None, "given": {"kind": "instances"}}
AGAIN: dict[str, Any] = {
    "targets": None, "classes": [], "loss": "mse", "metric": "mse", "given": {"kind": "reconstruction"}
}  # fmt: skip
SHARES: dict[str, Any] = {"loss": "kl_divergence", "metric": "kl_divergence", "given": {"kind": "soft_labels"}}

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a loss of embeddings for classes": ({"loss": "triplet"}, "loss 'triplet' does not fit data with 3 classes; use"),
    "a loss of classes for embeddings": (
        EMBEDDED | {"loss": "cross_entropy"},
        "does not fit data with targets of the kind embedding; use triplet or contrastive or info_nce",
    ),
    "a metric of classes for embeddings": (EMBEDDED | {"metric": "accuracy"}, "no embedding metric 'accuracy'"),
    "embeddings of which no two are alike": (
        EMBEDDED | {"targets": torch.arange(NUM)},
        "no two examples have the same target, .* use kind='instances'",
    ),
    "embeddings with classes": (EMBEDDED | {"classes": NAMES}, "kind embedding have no classes"),
    "embeddings of floats": (EMBEDDED | {"targets": CLASSES.float()}, "of an embedding must be int64 of shape"),
    "outputs of embeddings with three dimensions": (
        EMBEDDED | {"model": fixed(4, 4)},
        r"outputs of shape \(2, 4, 4\) for 2 examples, not \(2, 4\)",
    ),
    "a temperature of 0": (EMBEDDED | {"settings": {"temperature": 0.0}}, "temperature=0.0 is not allowed"),
    "a margin below 0": (EMBEDDED | {"settings": {"margin": -1.0}}, "margin=-1.0 is not allowed: it must be above 0"),
    "instances without augmentation": (UNLABELLED, "kind instances need augment=.*two views of an example"),
    "instances with labels": (
        UNLABELLED | {"targets": CLASSES, "settings": {"augment": "crop"}},
        "two examples have the same target; what has labels is of kind='embedding'",
    ),
    "instances whose inputs cannot be augmented": (
        UNLABELLED | {"inputs": FEATURES, "settings": {"augment": "crop"}},
        "augment='crop' is for images",
    ),
    "a reconstruction of targets": (AGAIN | {"targets": FEATURES}, "are the inputs themselves: give None"),
    "a reconstruction of sequences": (
        AGAIN | {"inputs": lambda: Ragged.of(WORDS), "model": fixed(3)},
        "a reconstruction is of one tensor of images or floats",
    ),
    "a reconstruction of another size": (AGAIN | {"model": fixed(3)}, r"outputs of shape \(2, 3\) .* not \(2, 4\)"),
    "a vae without its latent distribution": (
        AGAIN | {"loss": "vae"},
        r"loss 'vae' takes three outputs: .* the model of task 'mine' returns \(2, 4\)",
    ),
    "a divergence below 0": (AGAIN | {"settings": {"kl_weight": -1.0}}, "kl_weight=-1.0 is not allowed"),
    "soft labels that are classes": (SHARES, r"soft labels must be floats of shape \(N, 3\), a share for each class"),
    "soft labels that do not add up": (
        SHARES | {"targets": LABELS.float() * 0.9},
        "at least 0 and 1 in all; those of example 0 add up to 0.9",
    ),
    "more accumulated examples than there are": (
        {"settings": {"batch_size": 20, "accumulate": 3}},
        "batch_size 20 times accumulate 3 is larger than the 38 training examples",
    ),
    "no accumulated batch": ({"settings": {"accumulate": 0}}, "accumulate=0 is not allowed: it must be at least 1"),
    "a curriculum that nobody gives": (
        {"settings": {"curriculum": "given"}},
        "curriculum='given' needs an Objective with difficulty=",
    ),
    "an unknown curriculum": ({"settings": {"curriculum": "losses"}}, "did you mean 'loss'"),
    "a curriculum by losses that are not known for each example": (
        {"inputs": lambda: Ragged.of(WORDS), "model": fixed(3), "settings": {"curriculum": "loss"}},
        "curriculum='loss' needs a loss of hpo's that is known for each example",
    ),
    "a difficulty that raises": (
        {"settings": {"curriculum": "given"}, "difficulty": lambda inputs, targets: inputs.lengths},
        "the task's difficulty fails with the training split: AttributeError",
    ),
    "a difficulty for each value": (
        {"settings": {"curriculum": "given"}, "difficulty": lambda inputs, targets: inputs},
        r"difficulty must give a tensor of shape \(38,\), not a tensor of shape \(38, 4\)",
    ),
    "a difficulty that is not finite": (
        {"settings": {"curriculum": "given"}, "difficulty": lambda inputs, targets: inputs[:, 0] / 0},
        "difficulty must be finite",
    ),
    "a curriculum without examples": (
        {"settings": {"curriculum_start": 0.0}},
        r"curriculum_start=0.0 is not allowed: it must be in \(0, 1\]",
    ),
    "growing vectors": ({"settings": {"progressive_start": 0.5}}, "is for one input of images or of sequences"),
    "growing images for a network of one size": (
        {"inputs": IMAGES, "settings": {"progressive_start": 0.5}},
        "the model of task 'mine' fails with images of 4x4, as progressive_start=0.5 begins",
    ),
    "augmentation of texts for vectors": (
        {"settings": {"augment": "swap_words"}},
        "augment='swap_words' is for texts: Ragged ids of tokens",
    ),
    "augmentation of sound for texts": (
        {"inputs": lambda: Ragged.of(WORDS), "model": fixed(3), "settings": {"augment": "noise"}},
        r"augment='noise' is for waveforms: floats \(N, T\) or \(N, C, T\)",
    ),
    "masks of time for vectors": (
        {"settings": {"augment": "time_mask"}},
        r"augment='time_mask' is for spectrograms: floats \(N, F, T\)",
    ),
    "synonyms that nobody gives": (
        {"inputs": lambda: Ragged.of(WORDS), "model": fixed(3), "settings": {"augment": "replace_synonyms"}},
        "augment='replace_synonyms' needs synonyms: Ragged.of",
    ),
    "words that are left out although each has a label": (
        {
            "inputs": lambda: Ragged.of(WORDS),
            "targets": lambda: Ragged.of([[0, 1]] * NUM),
            "model": fixed(2, 3),
            "settings": {"augment": "drop_tokens+delete_words"},
        },
        "augment='delete_words' moves elements away from their labels",
    ),
    "an unknown augmentation": ({"settings": {"augment": "swap_word"}}, "did you mean 'swap_words'"),
    "an unknown token below 0": ({"settings": {"unknown_token": -1}}, "unknown_token=-1 is not allowed"),
    "smote of images": (
        {"inputs": IMAGES, "settings": {"sampling": "smote"}},
        "sampling='smote' is for vectors of numbers",
    ),
    "smote of numbers": (
        {"targets": FEATURES[:, 0], "classes": [], "loss": "mse", "metric": "r2", "settings": {"sampling": "smote"}},
        "sampling='smote' is for classes",
    ),
    "smote and a curriculum": (
        {"settings": {"sampling": "smote", "curriculum": "loss"}},
        "sampling='smote' cannot be combined with a curriculum",
    ),
    "mixing of soft labels": (
        SHARES | {"targets": LABELS.float(), "settings": {"mixup": 0.2}},
        "mixup and cutmix do not work with targets of the kind soft_labels",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_reported_in_one_line_before_the_first_trial(name: str) -> None:
    given, message = WRONG[name]
    with pytest.raises(HpoError, match=message) as raised:
        prepared(**given)
    assert "\n" not in str(raised.value)
