"""Hyperparameter search for PyTorch that people trust.

`hpo.load_best("cifar10")` gives the winner of a study; `hpo.run_search("cifar10", trials=100)` searches from Python.
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.deploy.load import load_best as load_best
    from hpo.pipeline import run_search as run_search

# Before torch is imported, as its threads read it once. When another process wants the cores too, threads that spin
# while they wait made 6 epochs of the digits take 17 s, threads that sleep 0.3 s (2 cores, torch 2.15).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
__all__ = ["__version__", "load_best", "run_search"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `hpo --help` must not wait for torch.
    if name == "load_best":
        from hpo.deploy.load import load_best

        return load_best
    if name == "run_search":
        from hpo.pipeline import run_search

        return run_search
    raise AttributeError(f"module 'hpo' has no attribute '{name}'")
