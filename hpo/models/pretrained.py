"""Transfer learning: torchvision's classification models with weights that were trained on other photos."""

from __future__ import annotations

from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn

from hpo.data.examples import DataSpec
from hpo.errors import DataError, UnknownNameError, UsageError
from hpo.models.layers import initialize_output

if TYPE_CHECKING:
    from torchvision.models import WeightsEnum

_AUXILIARY = ("AuxLogits", "aux1", "aux2")  # second heads of Inception and GoogLeNet, of use in their own training only


class PretrainedNetwork(nn.Module):
    """A backbone that comes with weights and a new head; it resizes and crops images as the weights are used to.

    Takes images (B, 3, H, W) of any size, normalised by `input_mean` and `input_std`. Its layers are those modules of
    the backbone, in order, that are repeated or different (a block, or a convolution and its norm); frozen ones keep
    their weights and the statistics of their norms.
    """

    def __init__(
        self,
        spec: DataSpec,
        *,
        architecture: str = "resnet18",
        weights: str = "default",
        image_size: int = 0,
        trainable_layers: int = -1,
    ) -> None:
        """`architecture` is any of torchvision's classification models.

        `weights` are torchvision's best ("default"), others by its name for them ("IMAGENET1K_V1"), those in a FILE
        with a state dict, or "none"; `load_pretrained` loads them. `image_size` is what the images are cropped to, 0
        for the size of the weights' own training. `trainable_layers` counts those before the head that are not frozen
        from the end, -1 for all of them; 0 trains the head alone.
        """
        super().__init__()
        if len(spec.input_shape) != 3 or spec.input_shape[0] != 3:
            raise UsageError(f"pretrained models take photos (3, H, W); this task's inputs are {spec.input_shape}.")
        if image_size < 0:
            raise UsageError(f"image_size={image_size} is not allowed: it must be at least 1, or 0 for the weights'.")
        if trainable_layers < -1:
            raise UsageError(f"trainable_layers={trainable_layers} is not allowed: it must be at least 0, or -1 (all).")
        from torchvision.transforms import CenterCrop, Resize

        self.architecture, self.weights, self.trainable_layers = architecture, weights, trainable_layers
        preset = self._torchvision_weights().transforms()
        crop = image_size or preset.crop_size[0]
        self.transform = nn.Sequential(
            Resize(round(preset.resize_size[0] * crop / preset.crop_size[0]), preset.interpolation, antialias=True),
            CenterCrop(crop),
        )
        self.input_mean = tuple(255 * value for value in preset.mean)
        """What the weights expect to be subtracted from images of bytes, by channel."""
        self.input_std = tuple(255 * value for value in preset.std)
        self.model = _build(architecture, spec.num_outputs, uses_imagenet_inputs=weights != "none")
        self._head_name, head = _head(self.model)
        if isinstance(head, nn.Linear):
            initialize_output(head)
        self._frozen: list[nn.Module] = []
        if trainable_layers >= 0:
            self._freeze(trainable_layers)

    def forward(self, images: Tensor) -> Tensor:
        return cast(Tensor, self.model(self.transform(images)))

    def extra_repr(self) -> str:
        return f"{self.architecture}, weights={self.weights}, trainable_layers={self.trainable_layers}"

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for layer in self._frozen:
            layer.eval()
        return self

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All but the head's."""
        return [p for name, p in self.model.named_parameters() if not name.startswith(f"{self._head_name}.")]

    def thaw(self) -> None:
        """Let all layers train from now on."""
        self._frozen = []
        self.requires_grad_(True)

    def load_pretrained(self) -> None:
        """Load the weights; the head's as well where it has as many outputs.

        Raises DataError where they are neither there nor to be downloaded, or belong to another architecture.
        """
        if self.weights == "none":
            return
        state, own = self._state_dict(), self.model.state_dict()
        for name in [name for name in state if _is_in(name, self._head_name, *_AUXILIARY)]:
            if name not in own or state[name].shape != own[name].shape:
                del state[name]
        for name, value in own.items():
            if name in state and state[name].shape != value.shape:
                raise self._misfit(f"{name} is of shape {tuple(state[name].shape)}, not {tuple(value.shape)}")
            if name not in state and not _is_in(name, self._head_name):
                raise self._misfit(f"it lacks {name}")
        if unknown := state.keys() - own.keys():
            raise self._misfit(f"it also has {min(unknown)}")
        self.model.load_state_dict(state, strict=False)

    def _freeze(self, num_trainable: int) -> None:
        layers = _layers(self.model, self.model.get_submodule(self._head_name))
        trainable = [module for layer in layers[max(0, len(layers) - num_trainable) :] for module in layer]
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(False)
        for module in trainable:
            module.requires_grad_(True)
        self._frozen = [module for layer in layers for module in layer if module not in trainable]

    def _torchvision_weights(self) -> WeightsEnum:
        """Those that are meant; of a file, those that say how its images are to be transformed."""
        import torchvision
        from torchvision.models import get_model_weights, list_models

        available = list_models(module=torchvision.models)
        if self.architecture not in available:
            raise UnknownNameError("architecture", self.architecture, available)
        weights = get_model_weights(self.architecture)
        return weights[self.weights] if self.weights in weights.__members__ else weights.DEFAULT

    def _state_dict(self) -> dict[str, Tensor]:
        known = self._torchvision_weights()
        if self.weights in ("default", known.name):
            return _download(self.architecture, known)
        file = Path(self.weights)
        if not file.is_file():
            names = ", ".join(("default", "none", *(weights.name for weights in type(known))))
            raise DataError(f"no weights '{file}' for {self.architecture}: give one of {names}, or an existing FILE.")
        try:
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a stranger's file: unpickling it may raise anything
            raise self._misfit(f"it cannot be read ({type(error).__name__})") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise self._misfit("it holds something else; save model.state_dict()")
        return dict(state)

    def _misfit(self, problem: str) -> DataError:
        return DataError(f"'{self.weights}' is not a state dict for torchvision's {self.architecture}: {problem}.")


def find_pretrained(model: nn.Module) -> PretrainedNetwork | None:
    """The pretrained network in a model, if there is one."""
    return next((module for module in model.modules() if isinstance(module, PretrainedNetwork)), None)


def _build(architecture: str, num_outputs: int, *, uses_imagenet_inputs: bool) -> nn.Module:
    from torchvision.models import get_model

    settings: dict[str, Any] = {}
    if architecture in ("googlenet", "inception_v3"):
        # Their weights come from TensorFlow, and want other inputs than those of all others.
        settings = {"init_weights": False, "transform_input": uses_imagenet_inputs}
    model: nn.Module = get_model(architecture, weights=None, num_classes=num_outputs, **settings)
    for name in _AUXILIARY:
        if hasattr(model, name):
            setattr(model, name, None)
    return model


def _head(model: nn.Module) -> tuple[str, nn.Module]:
    """The layer that gives the outputs; it is the last one in every model of torchvision's."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


def _layers(model: nn.Module, head: nn.Module) -> list[list[nn.Module]]:
    """The backbone's layers in order; a module without matrices, a norm above all, belongs to the one before it."""
    half = sum(p.numel() for p in model.parameters()) / 2
    layers: list[list[nn.Module]] = []
    for module in _opened(model, half):
        if module is head:
            continue
        if layers and all(p.ndim <= 1 for p in module.parameters()):
            layers[-1].append(module)
        else:
            layers.append([module])
    return layers


def _opened(module: nn.Module, half: float) -> list[nn.Module]:
    """Modules with parameters; what holds more than half of the model's, or is no more than a sequence, is opened."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    is_container = type(module) in (nn.Sequential, nn.ModuleList) or sum(p.numel() for p in module.parameters()) > half
    if not (children and is_container):
        return [module]
    return [part for child in children for part in _opened(child, half)]


def _download(architecture: str, weights: WeightsEnum) -> dict[str, Tensor]:
    """torchvision's weights, from where it keeps what it has downloaded, or from its server."""
    from torchvision.models import get_model

    try:
        # Through the model, for torchvision renames parts of some of its files while it loads them.
        state: dict[str, Tensor] = get_model(architecture, weights=weights, progress=False).state_dict()
    except (OSError, RuntimeError, HTTPException) as problem:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
        reason = " ".join(str(problem).split())
        raise DataError(
            f"no weights for {architecture}: {file} could not be downloaded or read ({reason}). Copy {weights.url} "
            "there, or give -p weights=FILE or -p weights=none; -p architecture=NAME selects another model."
        ) from problem
    return state


def _is_in(name: str, *modules: str) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
