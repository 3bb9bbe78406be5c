"""Text with a transformer: what a word is from its definition in WordNet, with synonyms put in at random.

It reads wordnet/glosses.tsv and wordnet/synonyms.tsv below --data-dir or HPO_DATA_DIR: a kind, a tab and a definition
in each line of the first; a word and its synonyms, with tabs between them, in each line of the second.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from hpo import Choice, DataError, Dataset, Float, Group, Objective, Ragged, Space, hold_out, read_synonyms, transformer

KINDS = ("animal", "artifact", "food", "person", "plant", "location")
NUM_EACH, VOCABULARY, UNKNOWN = 400, 4_000, 0


def load(data_dir: Path) -> Dataset:
    file = data_dir / "wordnet" / "glosses.tsv"
    if not file.is_file():
        raise DataError(f"{file} is missing; it has a kind, a tab and a definition in each line.")
    lines = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    texts = {kind: [text.split() for given, text in lines if given == kind][:NUM_EACH] for kind in KINDS}
    counts = Counter(word for each in texts.values() for text in each for word in text)
    ids = {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY - 1), start=1)}
    sequences = [[ids.get(word, UNKNOWN) for word in text] for kind in KINDS for text in texts[kind]]
    synonyms = read_synonyms(file.with_name("synonyms.tsv"), ids, VOCABULARY)
    targets = torch.tensor([number for number, kind in enumerate(KINDS) for _ in texts[kind]])
    return hold_out(Ragged.of(sequences, synonyms=synonyms), targets, KINDS, vocabulary=VOCABULARY)


objective = Objective(
    name="text_transformer",
    description="the kind of a word from its definition, with a transformer and augmented texts",
    load=load,
    model=transformer,
    settings={"max_epochs": 12, "patience": 4, "unknown_token": UNKNOWN},
    space=Space(
        Group("step size", lr=Float(1e-4, 0.01, log=True, default=2e-3), batch_size=Choice(32, 64, 128, default=32)),
        Group("architecture", width=Choice(32, 64, 128, default=64), depth=Choice(1, 2, default=1)),
        Group(
            "regularization",
            dropout=Float(0.0, 0.5, default=0.2),
            augment=Choice("none", "drop_tokens", "drop_tokens+replace_synonyms", default="drop_tokens"),
        ),
    ),
)
