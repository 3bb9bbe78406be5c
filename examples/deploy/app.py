"""A web service of an ONNX export: EXPORT=FOLDER uvicorn app:app.

FOLDER is what `hpo export STUDY --format onnx` wrote.
"""

import json
import os
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime
from fastapi import Body, FastAPI, HTTPException

folder = Path(os.environ["EXPORT"])
signature = json.loads((folder / "signature.json").read_text())
wanted = signature["inputs"][0]
session = onnxruntime.InferenceSession(folder / "model.onnx")
app = FastAPI()


@app.post("/predict")
def predict(examples: Annotated[list, Body()]) -> list[str]:
    try:
        (logits,) = session.run(None, {wanted["name"]: np.array(examples, dtype=wanted["dtype"])})
    except Exception as error:
        raise HTTPException(400, f"give {wanted['dtype']} of shape {wanted['shape']}") from error
    return [signature["classes"][index] for index in logits.argmax(1)]
