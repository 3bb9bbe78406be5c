"""Hyperparameter search for PyTorch. These are the public names; docs/api.md says what a change of them means.

`hpo.run_search("cifar10", trials=100)` searches, and `hpo.load_best("cifar10")` returns the winner.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpo.config import TrainConfig as TrainConfig
    from hpo.data.datasets import Splits as Splits
    from hpo.data.datasets import hold_out as hold_out
    from hpo.data.datasets import split_dataset as split_dataset
    from hpo.data.examples import Dataset as Dataset
    from hpo.data.examples import DataSpec as DataSpec
    from hpo.data.examples import InputSpec as InputSpec
    from hpo.data.examples import SealedSplit as SealedSplit
    from hpo.data.examples import Split as Split
    from hpo.data.from_torch import from_torch as from_torch
    from hpo.data.mapped import MappedImages as MappedImages
    from hpo.data.parts import Padded as Padded
    from hpo.data.parts import Ragged as Ragged
    from hpo.data.pasted import load_pasted_clothes as load_pasted_clothes
    from hpo.data.photos import load_image_folder as load_image_folder
    from hpo.data.photos import read_photos as read_photos
    from hpo.data.tables import load_table as load_table
    from hpo.data.text_augment import read_synonyms as read_synonyms
    from hpo.data.texts import load_texts as load_texts
    from hpo.data.vision import load_cifar10 as load_cifar10
    from hpo.data.vision import load_fashion_mnist as load_fashion_mnist
    from hpo.deploy.exporters import Exporter as Exporter
    from hpo.deploy.load import load_best as load_best
    from hpo.deploy.load import load_run as load_run
    from hpo.errors import CheckpointError as CheckpointError
    from hpo.errors import DataError as DataError
    from hpo.errors import DeviceMemoryError as DeviceMemoryError
    from hpo.errors import ExportError as ExportError
    from hpo.errors import HpoError as HpoError
    from hpo.errors import SearchError as SearchError
    from hpo.errors import SpaceError as SpaceError
    from hpo.errors import StoreError as StoreError
    from hpo.errors import StudyMismatchError as StudyMismatchError
    from hpo.errors import UnknownNameError as UnknownNameError
    from hpo.errors import UsageError as UsageError
    from hpo.execution.observer import Observer as Observer
    from hpo.execution.observer import Standing as Standing
    from hpo.home import find_data_dir as find_data_dir
    from hpo.models.networks import airnet as airnet
    from hpo.models.networks import convnet as convnet
    from hpo.models.networks import convnet1d as convnet1d
    from hpo.models.networks import mlp as mlp
    from hpo.models.networks import pretrained as pretrained
    from hpo.models.networks import recurrent as recurrent
    from hpo.models.networks import tabular as tabular
    from hpo.models.networks import transformer as transformer
    from hpo.models.networks import unet as unet
    from hpo.models.preprocessed import PreprocessedModel as PreprocessedModel
    from hpo.objective import Objective as Objective
    from hpo.parameters import Choice as Choice
    from hpo.parameters import Float as Float
    from hpo.parameters import Int as Int
    from hpo.parameters import Setting as Setting
    from hpo.records import SearchOutcome as SearchOutcome
    from hpo.search.priority import PrioritySampler as PrioritySampler
    from hpo.search.study import Suggestion as Suggestion
    from hpo.session.ensemble import load_ensemble as load_ensemble
    from hpo.session.export import export_best as export_best
    from hpo.session.register import register_best as register_best
    from hpo.session.search import run_search as run_search
    from hpo.space import Group as Group
    from hpo.space import Space as Space
    from hpo.training.trainer import EpochResult as EpochResult
    from hpo.trial import TrainedTrial as TrainedTrial
    from hpo.trial import Trial as Trial

# Before torch is imported, as its threads read it once. When another process wants the cores too, threads that spin
# while they wait made 6 epochs of the digits take 17 s, threads that sleep 0.3 s (2 cores, torch 2.15).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"

# Imported on first use: `hpo --help` must not wait for torch.
_MODULES = {
    "TrainConfig": "hpo.config",
    "Splits": "hpo.data.datasets",
    "hold_out": "hpo.data.datasets",
    "split_dataset": "hpo.data.datasets",
    "InputSpec": "hpo.data.examples",
    "from_torch": "hpo.data.from_torch",
    "MappedImages": "hpo.data.mapped",
    "Padded": "hpo.data.parts",
    "Ragged": "hpo.data.parts",
    "load_pasted_clothes": "hpo.data.pasted",
    "load_image_folder": "hpo.data.photos",
    "read_photos": "hpo.data.photos",
    "load_table": "hpo.data.tables",
    "load_texts": "hpo.data.texts",
    "read_synonyms": "hpo.data.text_augment",
    "load_cifar10": "hpo.data.vision",
    "load_fashion_mnist": "hpo.data.vision",
    "Exporter": "hpo.deploy.exporters",
    "load_best": "hpo.deploy.load",
    "load_run": "hpo.deploy.load",
    "load_ensemble": "hpo.session.ensemble",
    "CheckpointError": "hpo.errors",
    "DataError": "hpo.errors",
    "DeviceMemoryError": "hpo.errors",
    "ExportError": "hpo.errors",
    "HpoError": "hpo.errors",
    "SearchError": "hpo.errors",
    "SpaceError": "hpo.errors",
    "StoreError": "hpo.errors",
    "StudyMismatchError": "hpo.errors",
    "UnknownNameError": "hpo.errors",
    "UsageError": "hpo.errors",
    "Observer": "hpo.execution.observer",
    "Standing": "hpo.execution.observer",
    "find_data_dir": "hpo.home",
    "airnet": "hpo.models.networks",
    "convnet": "hpo.models.networks",
    "convnet1d": "hpo.models.networks",
    "mlp": "hpo.models.networks",
    "pretrained": "hpo.models.networks",
    "recurrent": "hpo.models.networks",
    "tabular": "hpo.models.networks",
    "transformer": "hpo.models.networks",
    "unet": "hpo.models.networks",
    "PreprocessedModel": "hpo.models.preprocessed",
    "Dataset": "hpo.data.examples",
    "DataSpec": "hpo.data.examples",
    "Objective": "hpo.objective",
    "SealedSplit": "hpo.data.examples",
    "Split": "hpo.data.examples",
    "SearchOutcome": "hpo.records",
    "Suggestion": "hpo.search.study",
    "export_best": "hpo.session.export",
    "register_best": "hpo.session.register",
    "run_search": "hpo.session.search",
    "PrioritySampler": "hpo.search.priority",
    "Choice": "hpo.parameters",
    "Float": "hpo.parameters",
    "Group": "hpo.space",
    "Int": "hpo.parameters",
    "Setting": "hpo.parameters",
    "Space": "hpo.space",
    "EpochResult": "hpo.training.trainer",
    "TrainedTrial": "hpo.trial",
    "Trial": "hpo.trial",
}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'hpo' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
