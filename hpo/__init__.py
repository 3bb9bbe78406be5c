"""Hyperparameter search for PyTorch that people trust.

`hpo.load_best("cifar10")` gives the winner of a study; `hpo.run_search("cifar10", trials=100)` searches from Python.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.deploy.load import load_best as load_best
    from hpo.pipeline import run_search as run_search

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
