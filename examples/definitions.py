"""Text: what a word is (a plant, a person, food, ...) from its definition in WordNet, with an LSTM or a transformer.

It reads wordnet/glosses.tsv below --data-dir or HPO_DATA_DIR: a kind, a tab and a definition in each line.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpo import Choice, DataError, Dataset, DataSpec, Float, Group, Objective, Ragged, Space, hold_out

from hpo import recurrent, transformer  # isort: skip

KINDS = ("animal", "artifact", "food", "person", "plant", "location")
NUM_EACH = 400
VOCABULARY = 4_000
UNKNOWN = 0


def load(data_dir: Path) -> Dataset:
    file = data_dir / "wordnet" / "glosses.tsv"
    if not file.is_file():
        raise DataError(f"{file} is missing; it has a kind, a tab and a definition in each line.")
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    texts = {kind: [text.split() for given, text in lines if given == kind][:NUM_EACH] for kind in KINDS}
    counts = Counter(word for each in texts.values() for text in each for word in text)
    ids = {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY - 1), start=1)}
    sequences = [[ids.get(word, UNKNOWN) for word in text] for kind in KINDS for text in texts[kind]]
    targets = torch.tensor([number for number, kind in enumerate(KINDS) for _ in texts[kind]])
    return hold_out(Ragged.of(sequences), targets, KINDS, vocabulary=VOCABULARY)


def model(spec: DataSpec, *, network: str, width: int, depth: int, dropout: float) -> nn.Module:
    networks: dict[str, Any] = {"lstm": recurrent, "transformer": transformer}
    return networks[network](spec, width=width, depth=depth, dropout=dropout)  # type: ignore[no-any-return]


objective = Objective(
    name="definitions",
    description="the kind of a word from its definition in WordNet, with an LSTM or a transformer",
    load=load,
    model=model,
    settings={"max_epochs": 12, "patience": 4},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.03, log=True, default=3e-3), batch_size=Choice(32, 64, 128, default=32)),
        Group(
            "architecture",
            network=Choice("lstm", "transformer", default="lstm"),
            width=Choice(32, 64, 128, default=64),
            depth=Choice(1, 2, default=1),
        ),
        Group("regularization", dropout=Float(0.0, 0.5, default=0.2)),
    ),
)
