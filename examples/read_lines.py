"""Transcription: numbers of two to five handwritten digits are read from left to right (no download).

Each example is a line of images of scikit-learn's, 8 pixels high: a sequence of columns. Nobody says where a digit
begins; CTC finds out.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits

from hpo import Choice, Dataset, Float, Group, Objective, Ragged, Space, hold_out, recurrent

NUM_LINES = 1_500


def load(data_dir: Path) -> Dataset:
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float(), torch.from_numpy(digits.target)
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 6, (NUM_LINES,), generator=draw).tolist()
    chosen = [torch.randint(len(images), (length,), generator=draw) for length in lengths]
    lines = Ragged.of([images[rows].transpose(0, 1).flatten(1).T for rows in chosen])  # (8 * length, 8) columns
    return hold_out(lines, Ragged.of([labels[rows] for rows in chosen]), list("0123456789"), kind="transcription")


objective = Objective(
    name="read_lines",
    description="lines of handwritten digits, read by an LSTM or a GRU with CTC",
    load=load,
    model=recurrent,
    loss="ctc",
    metric="character_error_rate",
    settings={"max_epochs": 15, "patience": 6, "clip_norm": 1.0},
    space=Space(
        Group("step size", lr=Float(1e-3, 0.03, log=True, default=1e-2), batch_size=Choice(32, 64, 128, default=64)),
        Group(
            "architecture",
            cell=Choice("lstm", "gru", default="gru"),
            width=Choice(32, 64, 128, default=64),
            depth=Choice(1, 2, default=1),
        ),
        Group("regularization", dropout=Float(0.0, 0.5, default=0.0)),
    ),
)
