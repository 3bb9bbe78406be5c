"""`hpo predict`: what the best model of a study says of files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.deploy.load import load_best
from hpo.deploy.predict import BATCH_SIZE, find_files, predict_files
from hpo.errors import UsageError
from hpo.models.preprocessed import PreprocessedModel

if TYPE_CHECKING:
    from hpo.deploy.predict import Prediction


def predict(
    study: str,
    files: Sequence[Path],
    *,
    batch_size: int = BATCH_SIZE,
    device: str = "cpu",
    tell: Callable[[int], None] = lambda count: None,
    **options: Any,
) -> list[Prediction]:
    """What the best model of a study says of each example in files and folders; `tell` hears how many there are so far.

    The other parameters are those of `load_best`. Raises UsageError if a file is missing, or the study's model has
    no known inputs, and DataError for files that do not fit the model.
    """
    model = load_best(study, device=device, **options)
    if not isinstance(model, PreprocessedModel):
        raise UsageError(f"study '{study}' has a training loop of its own: only its code knows what its model takes.")
    found = find_files(files, model.spec)
    predictions: list[Prediction] = []
    for batch in predict_files(model, found, batch_size=batch_size):
        predictions += batch
        tell(len(predictions))
    return predictions


def as_csv(predictions: Iterable[Prediction]) -> str:
    """A line for each example, and a column for the probability of each class."""
    rows = list(predictions)
    classes = list((rows[0].probabilities or {}) if rows else {})
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["file", "row", "prediction", *classes])
    for each in rows:
        said = each.to_dict()["prediction"]
        written = said if isinstance(said, str | int | float) else json.dumps(said)
        row = "" if each.row is None else each.row
        writer.writerow([each.file, row, written, *((each.probabilities or {}).values())])
    return text.getvalue()
