"""Data, a model and a loss for each kind of target, and for inputs of every shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpo import Dataset, DataSpec, Ragged, convnet1d, from_torch, hold_out, mlp, recurrent, tabular, transformer

NUM = 75  # 48 of them are trained on
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(NUM, 6, generator=GENERATOR)
IMAGES = torch.randint(256, (NUM, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR)
CLASSES = torch.arange(NUM) % 3
WORDS = [torch.randint(9, (3 + row % 4,), generator=GENERATOR) for row in range(NUM)]
NAMES = ("a", "b", "c")


class Pixels(nn.Conv2d):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__(3, spec.num_outputs, 3, padding=1)


class Squared(nn.Module):
    """A loss with a weight of its own, for data without targets."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, outputs: dict[str, Tensor], inputs: Tensor) -> Tensor:
        return (self.weight * outputs["again"] - inputs).square().mean()


class Again(nn.Linear):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__(6, 6)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"again": super().forward(inputs)}


class Latent(nn.Module):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        mean, log_variance = self.encoder(inputs).chunk(2, dim=1)
        return self.decoder(mean + torch.randn_like(mean)), mean, log_variance


class Heads(nn.Module):
    def __init__(self, spec: DataSpec) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(6, spec.of(name).num_outputs) for name in spec.targets})

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        return {name: head(inputs) for name, head in self.heads.items()}


class Distance:
    higher_is_better = False

    def __init__(self) -> None:
        self.sum: Any = 0.0

    def update(self, outputs: dict[str, Tensor], inputs: Tensor) -> None:
        self.sum = self.sum + (outputs["again"] - inputs).norm()

    def compute(self) -> Tensor:
        return self.sum  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    data: Dataset
    model: Any
    loss: Any
    metric: str
    parameters: dict[str, Any]
    waits_in_each_step: frozenset[tuple[str, str]] = frozenset()
    metrics: tuple[Any, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


def boxes() -> Tensor:
    corners = torch.rand(NUM, 2, generator=GENERATOR)
    return torch.cat((corners, corners + 1 + torch.rand(NUM, 2, generator=GENERATOR)), dim=1)


WIDTH = {"width": 8}
CASES = {
    "several labels": Case(
        hold_out(FEATURES, FEATURES[:, :3] > 0, NAMES), mlp, "binary_cross_entropy", "average_precision", WIDTH
    ),
    "several numbers": Case(hold_out(FEATURES, FEATURES[:, :2]), mlp, "huber", "r2", WIDTH),
    "masks": Case(hold_out(IMAGES, IMAGES[:, 0].long() % 2, NAMES[:2]), Pixels, "cross_entropy", "mean_iou", {}),
    "masks by Dice": Case(hold_out(IMAGES, IMAGES[:, 0] % 2, NAMES[:2]), Pixels, "dice", "dice", {}),
    "boxes": Case(hold_out(FEATURES, boxes(), kind="box"), mlp, "giou", "mean_iou", WIDTH),
    "classes of sequences": Case(
        hold_out(Ragged.of(WORDS), CLASSES, NAMES), transformer, "cross_entropy", "auroc", WIDTH | {"causal": True}
    ),
    "classes of elements": Case(
        hold_out(Ragged.of(WORDS), Ragged.of([each % 3 for each in WORDS]), NAMES),
        convnet1d, "cross_entropy", "perplexity", WIDTH,
    ),
    "classes of elements, accumulated": Case(
        hold_out(Ragged.of(WORDS), Ragged.of([each % 3 for each in WORDS]), NAMES),
        convnet1d, "cross_entropy", "perplexity", WIDTH, settings={"accumulate": 2},
    ),
    "transcriptions": Case(
        hold_out(Ragged.of(WORDS), Ragged.of([each[:2] % 3 for each in WORDS]), NAMES, kind="transcription"),
        recurrent, "ctc", "character_error_rate", WIDTH,
        # Edits are counted on the CPU after an evaluation, batch by batch.
        frozenset({("tolist", "training/position_metrics.py:compute"), ("tolist", "data/kinds.py:read_greedily")}),
    ),
    "two inputs": Case(
        hold_out({"numbers": FEATURES, "kinds": CLASSES}, CLASSES, NAMES), tabular, "cross_entropy", "f1", WIDTH
    ),
    "augmented texts": Case(
        hold_out(Ragged.of(WORDS, synonyms=torch.arange(9)[:, None].repeat(1, 3)), CLASSES, NAMES),
        convnet1d, "cross_entropy", "f1", WIDTH,
        settings={"augment": "delete_words+swap_words+replace_synonyms+drop_tokens"},
    ),
    "augmented sound": Case(
        hold_out(Ragged.of([FEATURES[row % 9, : 3 + row % 3] for row in range(NUM)]), CLASSES, NAMES),
        recurrent, "cross_entropy", "f1", WIDTH, settings={"augment": "noise+gain+speed+pitch"},
    ),
    "augmented spectrograms": Case(
        hold_out(IMAGES.float(), CLASSES, NAMES), mlp, "cross_entropy", "f1", WIDTH,
        settings={"augment": "time_mask+frequency_mask"},
    ),
    "augmented masks": Case(
        hold_out(IMAGES, IMAGES[:, 0].long() % 2, NAMES[:2]), Pixels, "dice", "dice", {},
        settings={"augment": "flip+crop+rotation"},
    ),
    "augmented boxes": Case(
        hold_out(IMAGES, boxes(), kind="box"), mlp, "giou", "mean_iou", WIDTH,
        settings={"augment": "flip+crop+rotation"},
    ),
    "smote": Case(
        hold_out(FEATURES, (torch.arange(NUM) % 3 == 0).long(), NAMES[:2]), mlp, "cross_entropy", "f1", WIDTH,
        settings={"sampling": "smote"},
    ),
    "growing sequences": Case(
        hold_out(Ragged.of(WORDS), CLASSES, NAMES), recurrent, "cross_entropy", "f1", WIDTH,
        settings={"progressive_start": 0.5, "progressive_until": 1.0},
    ),
    "soft labels": Case(
        hold_out(FEATURES, FEATURES[:, :3].softmax(1), NAMES, kind="soft_labels"), mlp, "kl_divergence", "accuracy",
        WIDTH,
    ),
    "embeddings": Case(hold_out(FEATURES, CLASSES, kind="embedding"), mlp, "triplet", "recall_at_1", WIDTH),
    "instances": Case(
        hold_out(IMAGES, None, kind="instances"), mlp, "info_nce", "recall_at_5", WIDTH,
        settings={"augment": "crop+flip"},
    ),
    "reconstructions": Case(hold_out(FEATURES, None, kind="reconstruction"), mlp, "mse", "mae", WIDTH),
    "a variational autoencoder": Case(
        hold_out(FEATURES, None, kind="reconstruction"), Latent, "vae", "mse", {}
    ),
    "several targets": Case(
        hold_out(
            FEATURES, {"one": FEATURES[:, 0], "other": CLASSES, "some": FEATURES[:, :2]}, {"other": NAMES},
        ),
        Heads, {"one": "mse", "other": "focal", "some": "huber"}, "other/auroc", {"weighting": "uncertainty"},
    ),
    "a torch Dataset": Case(
        from_torch(list(zip(FEATURES, CLASSES.tolist(), strict=True)), classes=NAMES, num_workers=0),
        mlp, "cross_entropy", "f1", WIDTH,
    ),
    "no targets": Case(hold_out(FEATURES, None), Again, Squared, "distance", {}, metrics=(("distance", Distance),)),
}  # fmt: skip
