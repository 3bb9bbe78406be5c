"""Predict with the winner of `hpo search digits`."""

from pathlib import Path

from hpo.objectives.digits import load

import hpo

model = hpo.load_best("digits")
images = load(Path()).train.inputs[:8]  # (8, 1, 8, 8) uint8, as they come: the model holds its preprocessing
print("predicted:", " ".join(model.predict(images)))
