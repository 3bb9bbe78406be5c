"""The tasks and search spaces that ship: they fit each other, their data and the trainer."""

from __future__ import annotations

import importlib
import pkgutil
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hpo import objectives, search_spaces
from hpo.config import TrainConfig, config_fields
from hpo.data.augment import build_augmentations
from hpo.data.datasets import split_dataset
from hpo.data.examples import Dataset, DataSpec, InputSpec, SealedSplit, Split
from hpo.data.parts import Ragged, map_parts
from hpo.models.preprocessed import build_model
from hpo.objective import Objective
from hpo.parameters import Choice, Float, Int, Parameter
from hpo.space import Space

NAMES = sorted(module.name for module in pkgutil.iter_modules(objectives.__path__))
SPECS = {
    "digits": DataSpec((1, 8, 8), tuple("0123456789")),
    "fashion_mnist": DataSpec((1, 28, 28), tuple("0123456789")),
    "cifar10": DataSpec((3, 32, 32), tuple("0123456789")),
    "diabetes": DataSpec((10,)),
    "airnet": DataSpec((3, 32, 32), tuple("0123456789")),
    "image_folder": DataSpec((3, 256, 256), tuple("0123456789")),
    "table": DataSpec(
        {
            "numbers": InputSpec((5,)),
            "categories": InputSpec((2,), "int64", vocabulary=40, categories=(3, 40), is_normalised=False),
        },
        tuple("0123456789"),
    ),
    "pasted_clothes": DataSpec((3, 32, 32), tuple("0123456789"), "segmentation"),
    "text_folder": DataSpec(
        InputSpec((), "int64", is_ragged=True, vocabulary=90, is_normalised=False), tuple("0123456789")
    ),
}
ARGUMENTS = {
    "depth": (1, 2),
    "width": (8, 16),
    "blocks": (1, 2),
    "activation": ("relu", "silu"),
    "init": ("he", "lecun"),
    "norm": ("none", "layer"),
    "norm_first": (True, False),
    "dropout": (0.0, 0.5),
    "stochastic_depth": (0.0, 0.5),
    "architecture": ("resnet18", "squeezenet1_1"),
    "weights": ("default", "none"),
    "image_size": (64, 96),
    "trainable_layers": (0, 1),
    "residual": (True, False),
    "embedding": (4, 8),
    "network": ("recurrent", "convnet1d"),
}
NUM_TRAIN = {
    "digits": 1149,
    "fashion_mnist": 48_000,
    "cifar10": 40_000,
    "airnet": 40_000,
    "diabetes": 282,
    "image_folder": 128,
    "text_folder": 500,
    "pasted_clothes": 8000,
    "table": 282,  # of the 442 patients of diabetes
}
NUM_DRAWN = {"image_folder": 4}
"""Configurations that are tried; of large networks few."""


def objective_of(name: str) -> Objective:
    objective: Objective = importlib.import_module(f"hpo.objectives.{name}").objective
    return objective


def space_of(name: str) -> Space:
    space: Space = importlib.import_module(f"hpo.search_spaces.{name}").space
    return space


def bounds(parameter: Parameter) -> list[Any]:
    return list(parameter.choices) if isinstance(parameter, Choice) else [parameter.low, parameter.high]


def draw(space: Space, seed: int) -> dict[str, Any]:
    """A configuration from all over the space, its corners included."""
    chosen = random.Random(seed)
    return space.active({name: chosen.choice(bounds(parameter)) for name, parameter in space.parameters.items()})


def settings_and_arguments(name: str, values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    objective = objective_of(name)
    searched = {key: value for key, value in values.items() if key in config_fields()}
    arguments = {key: value for key, value in values.items() if key not in config_fields()}
    return {**objective.settings, **objective.judged_by, **searched}, arguments


def examples_of(spec: DataSpec) -> Any:
    """Two examples, as a batch."""

    def batch(of_input: InputSpec) -> Any:
        if of_input.is_ragged:
            return Ragged.of([[1, 2, 3], [4]]).padded(slice(None), slice(None))
        if of_input.vocabulary is not None:
            return torch.randint(min(of_input.categories), (2, *of_input.shape))
        return torch.rand(2, *of_input.shape)

    return map_parts(batch, spec.inputs)


def test_every_task_has_a_space_of_the_same_name() -> None:
    assert NAMES == sorted(module.name for module in pkgutil.iter_modules(search_spaces.__path__)) == sorted(SPECS)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_named_like_its_module_and_described_in_a_line(name: str) -> None:
    objective = objective_of(name)
    assert objective.name == name
    assert objective.description
    assert "\n" not in objective.description


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_a_setting_of_the_trainer_or_an_argument_of_the_model(name: str) -> None:
    known = config_fields().keys() | objective_of(name).model_parameters()
    assert space_of(name).declared.keys() <= known


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_a_model_is_searched_or_can_be_opened(name: str) -> None:
    assert objective_of(name).model_parameters() <= space_of(name).declared.keys()


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_of_a_task_reaches_its_network(name: str) -> None:
    objective = objective_of(name)
    for argument in objective.model_parameters():
        values = bounds(space_of(name).declared[argument])[:2] if argument == "dropout_type" else ARGUMENTS[argument]
        given = {"dropout": 0.5} if argument == "dropout_type" else {}
        first, other = (
            build_model(objective, SPECS[name], given | {argument: v}, seed=0, pretrained=False) for v in values
        )
        weights, other_weights = (torch.cat([p.flatten() for p in m.parameters()]) for m in (first, other))
        assert repr(first) != repr(other) or not torch.equal(weights, other_weights), argument


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_in_the_order_of_priority(name: str) -> None:
    groups = space_of(name).groups
    assert [group.name for group in space_of(name).closed_groups] == ["fine tuning"]
    assert [group.name for group in groups] == ["step size", "architecture and optimizer", "regularization"]
    assert list(groups[0].parameters) == ["lr", "batch_size"]


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_space_is_valid_for_trainer_and_model(name: str) -> None:
    spec = SPECS[name]
    for seed in range(NUM_DRAWN.get(name, 30)):
        settings, arguments = settings_and_arguments(name, draw(space_of(name), seed))
        TrainConfig(**settings)
        model = build_model(objective_of(name), spec, arguments, seed=seed, pretrained=False)
        sides = spec.input_shape[1:] if spec.kind == "segmentation" else ()
        assert model(examples_of(spec)).shape == ((2, 10, *sides) if spec.classes else (2,))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_appears_when_a_space_is_drawn_from(name: str) -> None:
    space = space_of(name)
    seen = set().union(*(draw(space, seed) for seed in range(100)))
    assert seen == set(space.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_batches_fit_the_training_split_many_times(name: str) -> None:
    batch_sizes = space_of(name).parameters["batch_size"]
    assert isinstance(batch_sizes, Choice)
    assert max(batch_sizes.choices) * 2 <= NUM_TRAIN[name]


@pytest.mark.parametrize("name", NAMES)
def test_ranges_are_wide_enough_to_search_and_positive_scales_are_logarithmic(name: str) -> None:
    parameters = space_of(name).parameters
    for key in ("lr", "weight_decay"):
        parameter = parameters[key]
        assert isinstance(parameter, Float)
        assert parameter.log
        assert parameter.high / parameter.low >= 100
    assert all(p.low < p.high for p in parameters.values() if isinstance(p, Float | Int))


@pytest.mark.parametrize("name", NAMES)
def test_augmentation_is_searched_for_images_only(name: str) -> None:
    augment = space_of(name).parameters.get("augment")
    if augment:
        assert all(build_augmentations(str(value), 0.5) or value == "none" for value in bounds(augment))
        assert len(SPECS[name].input_shape) == 3


def test_importing_every_task_and_space_imports_no_heavy_library() -> None:
    """`hpo tasks` and `hpo space` must answer at once."""
    imports = [f"hpo.objectives.{name}" for name in NAMES] + [f"hpo.search_spaces.{name}" for name in NAMES]
    code = f"import sys, {', '.join(imports)}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "torchvision", "sklearn", "numpy", "optuna", "mlflow"} & set(result.stdout.split())


@pytest.mark.parametrize(
    ("name", "sizes", "highest"), [("digits", (1437, 360), 16), ("diabetes", (353, 89), float("inf"))]
)
def test_the_data_of_scikit_learn_need_no_data_dir(name: str, sizes: tuple[int, int], highest: float) -> None:
    dataset = objective_of(name).load(Path("/nowhere"))
    assert (len(dataset.train), len(dataset.test)) == sizes
    assert dataset.spec.input_shape == SPECS[name].input_shape
    assert len(split_dataset(dataset, validation_fraction=0.2, seed=0).train) == NUM_TRAIN[name]
    assert 0 < dataset.train.inputs.max() <= highest
    assert dataset.test.times_opened == 0


def test_digits_are_images_of_bytes_and_diabetes_a_regression_in_raw_units() -> None:
    digits, diabetes = (objective_of(name).load(Path("/nowhere")) for name in ("digits", "diabetes"))
    assert (digits.train.inputs.dtype, digits.train.targets.dtype) == (torch.uint8, torch.int64)
    assert digits.classes == tuple("0123456789")
    assert (diabetes.train.inputs.dtype, diabetes.train.targets.dtype) == (torch.float32, torch.float32)
    assert diabetes.classes == ()
    assert 25 <= diabetes.train.targets.min() < diabetes.train.targets.max() <= 346
    assert diabetes.train.inputs[:, 0].max() > 50, "ages in years"  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar10"])
def test_image_tasks_read_below_the_data_dir(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(Split(torch.zeros(1), torch.zeros(1)), SealedSplit(lambda: pytest.fail("opened"), 1))
    asked = []
    monkeypatch.setattr(f"hpo.data.vision.load_{name}", lambda data_dir: asked.append(data_dir) or dataset)
    assert objective_of(name).load(tmp_path) is dataset
    assert asked == [tmp_path]
