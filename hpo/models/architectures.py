"""The architectures that come with pretrained weights: torchvision's classification models, and timm's."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hpo.errors import DataError, UnknownNameError, UsageError

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum
    from torchvision.transforms import InterpolationMode

TIMM = "timm/"
"""What the names of timm's architectures begin with."""

AUXILIARY = ("AuxLogits", "aux1", "aux2")
"""Second heads of Inception and GoogLeNet, of use in their own training only."""

_NUM_SUGGESTIONS = 5


class Preset(NamedTuple):
    """How the images were prepared that weights were trained with."""

    resize: int
    crop: int
    interpolation: InterpolationMode
    mean: Sequence[float]
    std: Sequence[float]
    is_fixed: bool = False
    """Whether the network takes images of this size alone."""


class Architecture(Protocol):
    """An architecture of a library, with the weights that were asked for."""

    title: str
    """What messages call it."""

    weights: list[str]
    """Names of the weights that there are."""

    @property
    def preset(self) -> Preset:
        """That of the weights that were asked for; of a file, that of the default ones."""

    def build(self, num_outputs: int, *, uses_imagenet_inputs: bool) -> nn.Module:
        """The network with weights that are drawn."""

    def head(self, model: nn.Module) -> str:
        """Name of the layer that returns the outputs."""

    def knows(self, weights: str) -> bool:
        """Whether the weights of this name are the library's."""

    def state_dict(self) -> dict[str, Tensor]:
        """The library's weights, from where it keeps what it has downloaded, or from its server. Raises DataError."""


def find_architecture(name: str, weights: str) -> Architecture:
    """The architecture of that name. Raises UnknownNameError, or UsageError if timm is wanted and not installed."""
    if name.startswith(TIMM):
        return TimmArchitecture(name.removeprefix(TIMM), weights)
    return TorchvisionArchitecture(name, weights)


class TorchvisionArchitecture:
    """One of torchvision's classification models."""

    def __init__(self, name: str, weights: str) -> None:
        import torchvision
        from torchvision.models import get_model_weights, list_models

        available = list_models(module=torchvision.models)
        if name not in available:
            raise UnknownNameError("architecture", name, available, "With timm installed, timm/NAME is one of its own.")
        self._name = name
        self.title = f"torchvision's {name}"
        known = get_model_weights(name)
        self.weights = [each.name for each in known]
        self._weights: WeightsEnum = known[weights] if weights in known.__members__ else known.DEFAULT

    @property
    def preset(self) -> Preset:
        transforms = self._weights.transforms()
        return Preset(
            transforms.resize_size[0],
            transforms.crop_size[0],
            transforms.interpolation,
            transforms.mean,
            transforms.std,
        )

    def build(self, num_outputs: int, *, uses_imagenet_inputs: bool) -> nn.Module:
        from torchvision.models import get_model

        settings: dict[str, Any] = {}
        if self._name in ("googlenet", "inception_v3"):
            # Their weights come from TensorFlow, and want other inputs than those of all others.
            settings = {"init_weights": False, "transform_input": uses_imagenet_inputs}
        model: nn.Module = get_model(self._name, weights=None, num_classes=num_outputs, **settings)
        for name in AUXILIARY:
            if hasattr(model, name):
                setattr(model, name, None)
        return model

    def head(self, model: nn.Module) -> str:
        """It is the last one in every model of torchvision."""
        names: list[str] = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        return names[-1]

    def knows(self, weights: str) -> bool:
        return weights in ("default", self._weights.name)

    def state_dict(self) -> dict[str, Tensor]:
        from torchvision.models import get_model

        try:
            # Through the model, for torchvision renames parts of some of its files while it loads them.
            state: dict[str, Tensor] = get_model(self._name, weights=self._weights, progress=False).state_dict()
        except (OSError, RuntimeError, HTTPException) as problem:
            file = Path(torch.hub.get_dir(), "checkpoints", Path(self._weights.url).name)
            reason = " ".join(str(problem).split())
            raise DataError(
                f"no weights for {self._name}: {file} could not be downloaded or read ({reason}). Copy "
                f"{self._weights.url} there, or give -p weights=FILE or -p weights=none; -p architecture=NAME selects "
                "another model."
            ) from problem
        return state


class TimmArchitecture:
    """One of timm's models: `resnet10t`, or with the weights that are its default `resnet10t.c3_in1k`."""

    def __init__(self, name: str, weights: str) -> None:
        try:
            import timm
        except ImportError as error:
            raise UsageError(f"architecture {TIMM}{name} needs timm: pip install 'hpo-torch[timm]'.") from error
        base = name.partition(".")[0]
        if not timm.is_model(base):
            raise _unknown(name, timm.list_models())
        tags = [each.partition(".")[2] for each in timm.list_pretrained(f"{base}.*")]
        if name != base and name not in timm.list_pretrained(f"{base}.*"):
            raise _unknown(name, [f"{base}.{tag}" for tag in tags] or [base])
        self._name = f"{base}.{weights}" if weights in tags else name
        self.title = f"timm's {name}"
        self.weights = tags
        self._config: dict[str, Any] = timm.get_pretrained_cfg(self._name).to_dict() if tags else {}

    @property
    def preset(self) -> Preset:
        from timm.data import resolve_data_config
        from torchvision.transforms import InterpolationMode

        config = resolve_data_config(pretrained_cfg=self._config)
        crop = config["input_size"][-1]
        return Preset(
            round(crop / config["crop_pct"]),
            crop,
            InterpolationMode(config["interpolation"]),
            config["mean"],
            config["std"],
            is_fixed=bool(self._config.get("fixed_input_size")),
        )

    def build(self, num_outputs: int, *, uses_imagenet_inputs: bool) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(self._name, pretrained=False, num_classes=num_outputs)
        return model

    def head(self, model: nn.Module) -> str:
        known: Any = model
        head = known.get_classifier() if hasattr(model, "get_classifier") else None
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise UsageError(f"{self.title} has no single layer that returns its outputs; choose another architecture.")
        names: list[str] = [name for name, module in model.named_modules() if module is head]
        return names[0]

    def knows(self, weights: str) -> bool:
        return weights in ("default", *self.weights)

    def state_dict(self) -> dict[str, Tensor]:
        import timm

        if not self.weights:
            raise DataError(f"timm has no weights for {self.title}; give -p weights=FILE or -p weights=none.")
        try:
            state: dict[str, Tensor] = timm.create_model(self._name, pretrained=True).state_dict()
        except (OSError, RuntimeError, ValueError, HTTPException) as problem:
            reason = " ".join(str(problem).split())
            raise DataError(
                f"no weights for {self.title}: {self._config.get('hf_hub_id')} could not be downloaded or read "
                f"({reason}). Download it on a machine with a network and copy its cache (HF_HOME), or give "
                "-p weights=FILE or -p weights=none."
            ) from problem
        return state


def _unknown(name: str, available: Sequence[str]) -> UsageError:
    """timm has more than a thousand names, of which the nearest are of use."""
    near = [f"{TIMM}{each}" for each in get_close_matches(name, available, n=_NUM_SUGGESTIONS, cutoff=0.0)]
    return UsageError(f"no architecture '{TIMM}{name}'; the nearest of timm are {', '.join(near)}.")
