"""Transfer learning: classification models of torchvision and timm, with weights that were trained on other photos."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from hpo.data.examples import DataSpec
from hpo.errors import DataError, UsageError
from hpo.models.architectures import AUXILIARY, find_architecture
from hpo.models.layers import initialize_output


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
        """`architecture` is any of torchvision's classification models, or "timm/NAME" any of timm's.

        `weights` are the library's best ("default"), others by its name for them ("IMAGENET1K_V1"), those in a FILE
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
        self._found = find_architecture(architecture, weights)
        preset = self._found.preset
        if preset.is_fixed and image_size not in (0, preset.crop):
            raise UsageError(
                f"image_size={image_size} is not for {architecture}, which takes {preset.crop} alone: use 0."
            )
        crop = image_size or preset.crop
        self.transform = nn.Sequential(
            Resize(round(preset.resize * crop / preset.crop), preset.interpolation, antialias=True),
            CenterCrop(crop),
        )
        self.input_mean = tuple(255 * value for value in preset.mean)
        """What the weights expect to be subtracted from images of bytes, by channel."""
        self.input_std = tuple(255 * value for value in preset.std)
        self.model = self._found.build(spec.num_outputs, uses_imagenet_inputs=weights != "none")
        self._head_name = self._found.head(self.model)
        head = self.model.get_submodule(self._head_name)
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

        Raises DataError if they are neither there nor to be downloaded, or belong to another architecture.
        """
        if self.weights == "none":
            return
        state, own = self._state_dict(), self.model.state_dict()
        for name in [name for name in state if _is_in(name, self._head_name, *AUXILIARY)]:
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

    def _state_dict(self) -> dict[str, Tensor]:
        if self._found.knows(self.weights):
            return self._found.state_dict()
        file = Path(self.weights)
        if not file.is_file():
            names = ", ".join(("default", "none", *self._found.weights))
            raise DataError(f"no weights '{file}' for {self.architecture}: give one of {names}, or an existing FILE.")
        try:
            state: Any = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a user's file: unpickling it may raise anything
            raise self._misfit(f"it cannot be read ({type(error).__name__})") from error
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise self._misfit("it holds something else; save model.state_dict()")
        return dict(state)

    def _misfit(self, problem: str) -> DataError:
        return DataError(f"'{self.weights}' is not a state dict for {self._found.title}: {problem}.")


def find_pretrained(model: nn.Module) -> PretrainedNetwork | None:
    """The pretrained network in a model, if there is one."""
    return next((module for module in model.modules() if isinstance(module, PretrainedNetwork)), None)


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


def _is_in(name: str, *modules: str) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)
