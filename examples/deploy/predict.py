"""Classes of images with PyTorch and NumPy alone: python predict.py FOLDER IMAGES.npy.

FOLDER is what `hpo export STUDY --format pt2` wrote.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

folder, images = Path(sys.argv[1]), torch.from_numpy(np.load(sys.argv[2]))
classes = json.loads((folder / "signature.json").read_text())["classes"]
model = torch.export.load(folder / "model.pt2").module()
with torch.inference_mode():
    (logits,) = model(images)
for name, share in zip(logits.argmax(1).tolist(), logits.softmax(1).amax(1).tolist(), strict=True):
    print(f"{classes[name]} {share:.3f}")
