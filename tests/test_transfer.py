"""Transfer learning on a folder of photos: how they are read, pretrained weights, frozen layers, and a whole search.

The weights are made here; nothing is downloaded.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, get_model, get_model_weights

import hpo
from hpo.cli import main
from hpo.config import TrainConfig
from hpo.data import photos as photos_module
from hpo.data.datasets import Splits
from hpo.data.examples import DataSpec, Split
from hpo.data.photos import load_image_folder, read_photos
from hpo.errors import DataError, UnknownNameError, UsageError
from hpo.methods import OPTIMIZERS
from hpo.models.preprocessed import PreprocessedModel, build_model
from hpo.models.pretrained import PretrainedNetwork, _layers, find_pretrained
from hpo.objective import Objective
from hpo.training.checkpoint import CheckpointFolder
from hpo.training.optimizers import build_optimizer
from hpo.training.schedules import build_schedule
from hpo.training.trainer import fit

COLOURS = {"blue": (30, 60, 220), "green": (20, 200, 60), "red": (220, 40, 30)}
SMALL = "shufflenet_v2_x0_5"

# --- Photos


def write_photos(folder: Path, per_class: int, classes: tuple[str, ...] = tuple(COLOURS)) -> Path:
    """Noisy photos of one colour a class, in several formats, none of the size of another."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            noise = generator.integers(-30, 30, (40 + 3 * index, 70 - 2 * index, 3))
            pixels = np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
            suffix = ("jpg", "png", "webp")[index % 3]
            Image.fromarray(pixels).save(folder / name / f"{index:02}.{suffix}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos", per_class=10)


def test_photos_of_any_size_and_format_become_squares_of_their_class(folder: Path) -> None:
    dataset = load_image_folder(folder, side=16)
    assert dataset.classes == ("blue", "green", "red")
    assert (len(dataset.train), len(dataset.test), dataset.test.times_opened) == (24, 6, 0)
    assert dataset.spec.input_shape == (3, 16, 16)
    for split in (dataset.train, dataset.test.open()):
        brightest = torch.tensor([2, 1, 0])[split.targets]  # the channel of each class
        assert torch.equal(split.inputs[:].float().mean((2, 3)).argmax(1), brightest)
        assert split.targets.bincount().unique().numel() == 1, "stratified"


def test_a_photo_is_cropped_to_its_middle_and_turned_upright(tmp_path: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, :10], wide[:10, 10:30], wide[:, 30:] = 255, 100, 255
    upright = Image.Exif()
    upright[0x0112] = 6  # the camera was turned: to be rotated clockwise
    Image.fromarray(wide).save(tmp_path / "plain.png")
    Image.fromarray(wide).rotate(90, expand=True).save(tmp_path / "turned.png", exif=upright)
    plain, turned = read_photos([tmp_path / "plain.png", str(tmp_path / "turned.png")], side=20)
    assert torch.equal(plain, torch.from_numpy(wide[:, 10:30]).permute(2, 0, 1))
    assert torch.equal(turned, plain)


@pytest.mark.parametrize(
    ("splits", "in_test", "num_train"),
    [("train test", "test", 12), ("train val", "val", 12), ("train val test", "test", 24)],
)
def test_folders_named_train_val_and_test_are_the_splits(
    splits: str, in_test: str, num_train: int, tmp_path: Path
) -> None:
    for name in splits.split():
        write_photos(tmp_path / name, per_class=4)
    for path in (tmp_path / in_test).rglob("*.*"):
        Image.open(path).convert("L").save(path)
    dataset = load_image_folder(tmp_path, side=8)
    test = dataset.test.open()
    assert (len(dataset.train), len(test), dataset.classes) == (num_train, 12, tuple(COLOURS))
    assert (test.inputs[:].float().std(1).max() < 5).item(), "the grey ones"
    assert (dataset.train.inputs[:].float().std(1).mean() > 20).item()


def test_damaged_photos_are_left_out_and_named_each_time(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "red" / "99.jpg").write_bytes((folder / "red" / "00.jpg").read_bytes()[:200])
    (folder / "red" / "notes.txt").write_text("not a photo")
    for _ in range(2):
        caplog.clear()
        assert len(load_image_folder(folder, side=8).train) == 24
        assert "1 of 31 photos" in caplog.text
        assert re.search(r"skipped: red/99\.jpg \(.+\)", caplog.text)
        assert "1 files in" in caplog.text


def test_many_damaged_photos_are_a_mistake(folder: Path) -> None:
    for index in range(10):
        (folder / "red" / f"{index + 50}.jpg").write_bytes(b"\xff\xd8 nothing")
    for _ in range(2):  # and nothing of it is kept
        with pytest.raises(DataError, match=r"10 of 40 photos .* more than 5% .*red/50\.jpg .* and 5 more"):
            load_image_folder(folder, side=8)


def test_photos_are_decoded_once_and_again_when_the_folder_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Path] = []
    read = photos_module._read
    monkeypatch.setattr(photos_module, "_read", lambda path, side: (decoded.append(path), read(path, side))[1])
    first, again = (load_image_folder(folder, side=8) for _ in range(2))
    assert len(decoded) == 30
    assert torch.equal(first.train.inputs[:], again.train.inputs[:])  # type: ignore[arg-type]
    shutil.copy(folder / "red" / "00.jpg", folder / "red" / "50.jpg")
    assert len(load_image_folder(folder, side=8).train) == 24
    assert len(decoded) == 61
    assert len(list((folder / "hpo-cache").glob("photos-8.*.bin"))) == 1


def test_a_file_of_photos_that_was_cut_off_is_made_anew(folder: Path) -> None:
    whole = load_image_folder(folder, side=8).train.inputs[:]
    (file,) = (folder / "hpo-cache").glob("*.bin")
    os.truncate(file, 1000)
    assert torch.equal(load_image_folder(folder, side=8).train.inputs[:], whole)  # type: ignore[arg-type]


def test_a_photo_to_predict_is_read_as_those_of_the_training(folder: Path) -> None:
    dataset = load_image_folder(folder, side=16)
    blue = read_photos(sorted((folder / "blue").iterdir()), side=16)
    known = dataset.train.inputs[:]
    assert sum(any(torch.equal(photo, other) for other in known) for photo in blue) == 8
    with pytest.raises(DataError, match=r"missing\.jpg cannot be read"):
        read_photos([folder / "missing.jpg"])


def test_a_folder_that_is_none_is_refused_in_a_line(folder: Path) -> None:
    with pytest.raises(DataError, match=r"there is no directory .*nowhere"):
        load_image_folder(folder / "nowhere")
    with pytest.raises(DataError, match="red must hold a folder of photos for each of two or more classes"):
        load_image_folder(folder / "red")
    (folder / "violet").mkdir()
    with pytest.raises(DataError, match=r"class 'violet' in .* has no photos"):
        load_image_folder(folder)


def test_a_class_of_the_test_photos_alone_is_refused(tmp_path: Path) -> None:
    write_photos(tmp_path / "train", 3, ("red", "blue"))
    write_photos(tmp_path / "test", 3, ("red", "green"))
    with pytest.raises(DataError, match="green is not a class of the training photos; they have blue, red"):
        load_image_folder(tmp_path)


def test_a_full_disk_is_reported_before_photos_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    with pytest.raises(DataError, match=r"cannot be kept in .*hpo-cache \(No space left on device\); they need 6 MB"):
        load_image_folder(folder)
    assert {path.name for path in (folder / "hpo-cache").iterdir()} <= {".photos.lock"}


# --- Pretrained networks

SPEC = DataSpec((3, 64, 64), tuple(COLOURS))
OBJECTIVE = Objective(name="test", description="", load=lambda _: pytest.fail("no data"), model=PretrainedNetwork)


def made_weights(path: Path, architecture: str = SMALL, num_classes: int = 7) -> str:
    """A state dict as from a training on other classes; its norms have seen images of many colours."""
    torch.manual_seed(5)
    model = get_model(architecture, num_classes=num_classes)
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.momentum = None  # an average over all it sees
    with torch.no_grad():
        model(torch.randn(16, 3, 1, 1) + 0.3 * torch.randn(16, 3, 64, 64))
    torch.save(model.state_dict(), path)
    return str(path)


@pytest.fixture
def weights(tmp_path: Path) -> str:
    return made_weights(tmp_path / "weights.pth")


def pretrained(seed: int = 0, **parameters: Any) -> PreprocessedModel:
    return build_model(OBJECTIVE, SPEC, {"architecture": SMALL, "image_size": 32, **parameters}, seed=seed)


def network_of(model: nn.Module) -> PretrainedNetwork:
    network = find_pretrained(model)
    assert network is not None
    return network


@pytest.mark.parametrize("architecture", ["resnet18", "mobilenet_v3_large"])
def test_the_deployed_model_has_the_transform_of_its_weights(architecture: str, tmp_path: Path) -> None:
    """Equal, on raw photos, to torchvision's model behind torchvision's transform."""
    file = made_weights(tmp_path / "weights.pth", architecture, num_classes=len(COLOURS))
    model = build_model(OBJECTIVE, SPEC, {"architecture": architecture, "weights": file}, seed=0)
    model.fit_statistics(Split(torch.zeros(2, 3, 64, 64, dtype=torch.uint8), torch.tensor([0, 1])))
    theirs = get_model(architecture, num_classes=len(COLOURS))
    theirs.load_state_dict(torch.load(file, weights_only=True))
    transform = get_model_weights(architecture).DEFAULT.transforms()
    photo = torch.randint(256, (1, 3, 300, 260), dtype=torch.uint8)
    with torch.inference_mode():
        difference = model.eval()(photo) - theirs.eval()(transform(photo.float() / 255))
    assert difference.abs().max() < 1e-3


def test_weights_of_other_classes_get_a_new_head(weights: str) -> None:
    saved, state = torch.load(weights, weights_only=True), network_of(pretrained(weights=weights)).model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved if not name.startswith("fc."))
    assert state["fc.weight"].shape == (3, 1024)
    assert state["fc.weight"].std() < 0.02, "as a fresh output layer"


def test_weights_are_loaded_for_a_training_and_not_where_a_state_dict_follows(weights: str) -> None:
    trained = pretrained(weights=weights)
    Path(weights).unlink()
    rebuilt = build_model(
        OBJECTIVE, SPEC, {"architecture": SMALL, "image_size": 32, "weights": weights}, seed=1, pretrained=False
    )
    rebuilt.load_state_dict(trained.state_dict())
    photos = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(rebuilt.eval()(photos), trained.eval()(photos))


def test_from_scratch_the_inputs_are_normalised_with_their_own_statistics(weights: str) -> None:
    train = Split(torch.randint(100, 120, (8, 3, 64, 64), dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    scratch, transferred = pretrained(weights="none"), pretrained(weights=weights)
    for model in (scratch, transferred):
        model.fit_statistics(train)
    assert scratch.input_mean.flatten().allclose(torch.full((3,), 109.5), atol=1)
    assert transferred.input_mean.flatten().allclose(255 * torch.tensor([0.485, 0.456, 0.406]))


def test_the_file_that_torchvision_would_download_is_found_where_it_is_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(DataError) as error:
        pretrained(architecture="resnet18", weights="default")
    url = ResNet18_Weights.DEFAULT.url
    file = tmp_path / "hub" / "checkpoints" / Path(url).name
    assert f"no weights for resnet18: {file} could not be downloaded" in str(error.value)
    assert f"network is unreachable). Copy {url} there, or give -p weights=FILE" in str(error.value)
    made_weights(file, "resnet18", num_classes=1000)
    state = network_of(pretrained(architecture="resnet18", weights="IMAGENET1K_V1")).model.state_dict()
    assert torch.equal(state["conv1.weight"], torch.load(file, weights_only=True)["conv1.weight"])


def test_weights_that_do_not_fit_are_refused_in_a_line(tmp_path: Path, weights: str) -> None:
    with pytest.raises(
        DataError, match=r"no weights 'nofile' for resnet18: give one of default, none, IMAGENET1K_V1, or"
    ):
        pretrained(architecture="resnet18", weights="nofile")
    with pytest.raises(DataError, match=r"is not a state dict for torchvision's resnet18: it lacks conv1\.weight"):
        pretrained(architecture="resnet18", weights=weights)
    with pytest.raises(
        DataError, match=r"x0_5: stage2\.0\.branch1\.2\.weight is of shape \(58, .*\), not \(24, .*\)\.$"
    ):
        pretrained(weights=made_weights(tmp_path / "wide.pth", "shufflenet_v2_x1_0"))
    (tmp_path / "bytes.pth").write_bytes(b"nothing")
    with pytest.raises(DataError, match="it cannot be read"):
        pretrained(weights=str(tmp_path / "bytes.pth"))
    torch.save({"epoch": 3}, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"it holds something else; save model\.state_dict"):
        pretrained(weights=str(tmp_path / "other.pth"))
    with pytest.raises(UnknownNameError, match="no architecture 'resnet1'; did you mean 'resnet18'"):
        pretrained(architecture="resnet1")
    with pytest.raises(UsageError, match="trainable_layers=-2 is not allowed"):
        pretrained(trainable_layers=-2)
    with pytest.raises(UsageError, match="pretrained models take photos"):
        PretrainedNetwork(DataSpec((1, 28, 28), tuple(COLOURS)))


FAMILIES = [
    "alexnet",
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "googlenet",
    "inception_v3",
    "maxvit_t",
    "mnasnet0_5",
    "mobilenet_v3_small",
    "regnet_x_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
    "swin_t",
    "vgg11_bn",
    "vit_b_32",
]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_every_family_of_architectures_has_a_head_and_layers_to_freeze(architecture: str) -> None:
    # torchvision computes the shapes of RegNet with tensors, which must have values.
    with torch.device("cpu" if architecture.startswith("regnet") else "meta"):
        network = PretrainedNetwork(SPEC, architecture=architecture, trainable_layers=0)
    head = network.model.get_submodule(network._head_name)
    layers = _layers(network.model, head)
    assert all(p.requires_grad == any(p is own for own in head.parameters()) for p in network.parameters())
    assert (head.weight.shape[0], len(layers) >= 5) == (len(COLOURS), True)
    in_layers = sum(p.numel() for layer in layers for module in layer for p in module.parameters())
    assert in_layers > 0.99 * sum(p.numel() for p in network.backbone_parameters())
    assert network._frozen == [module for layer in layers for module in layer]


def test_layers_are_unfrozen_from_the_end() -> None:
    def trained(trainable_layers: int) -> set[str]:
        model = PretrainedNetwork(SPEC, architecture="resnet18", trainable_layers=trainable_layers).model
        return {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}

    head, last, two, all_but_stem, everything = (trained(number) for number in (0, 1, 2, 8, -1))
    assert head == {"fc"}
    assert {name[:8] for name in last - head} == {"layer4.1"}
    assert {name[:8] for name in two - last} == {"layer4.0"}
    assert everything - all_but_stem == {"conv1", "bn1"}


# --- Training


def photo_splits(num_train: int = 24) -> Splits:
    generator = torch.Generator().manual_seed(0)

    def split(number: int) -> Split:
        targets = torch.arange(number) % 3
        images = torch.randint(0, 120, (number, 3, 64, 64), generator=generator, dtype=torch.uint8)
        images[torch.arange(number), targets] += 80
        return Split(images, targets)

    return Splits(split(num_train), split(9), SPEC)


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{"max_epochs": 4, "batch_size": 8, "precision": "fp32", "lr": 1e-2, **settings})


def backbone_state(model: nn.Module) -> dict[str, Tensor]:
    state = network_of(model).model.state_dict()
    return {name: value.clone() for name, value in state.items() if not name.startswith("fc.")}


def equal(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.5}, {"max_norm": 0.1, "l1": 0.1}], ids=str)
def test_frozen_layers_keep_their_weights_and_the_statistics_of_their_norms(
    settings: dict[str, Any], weights: str
) -> None:
    model = pretrained(weights=weights, trainable_layers=0)
    before, head = backbone_state(model), network_of(model).model.fc.weight.clone()
    assert len(list(fit(model, photo_splits(), config(max_epochs=2, **settings)))) == 2
    assert equal(before, backbone_state(model))
    assert not torch.equal(head, network_of(model).model.fc.weight)  # type: ignore[arg-type]


@pytest.mark.compiled_step
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_layers_thaw_at_their_epoch_with_every_optimizer(optimizer: str, weights: str) -> None:
    model = pretrained(weights=weights, trainable_layers=1)
    before = backbone_state(model)
    frozen = {name for name in before if not name.startswith("conv5")}
    epochs = fit(model, photo_splits(8), config(thaw_epoch=2, optimizer=optimizer, lr=1e-3, compile="step"))
    first = next(epochs)
    after_first = backbone_state(model)
    assert equal({name: before[name] for name in frozen}, after_first)
    assert not equal(before, after_first), "the last layer trains from the start"
    second = next(epochs)
    after_second = backbone_state(model)
    assert not any(torch.equal(before[name], after_second[name]) for name in frozen if name.endswith("0.weight"))
    assert not torch.equal(before["stage4.0.branch1.1.running_mean"], after_second["stage4.0.branch1.1.running_mean"])
    assert first.settled["compile"] == second.settled["compile"] == "off"
    epochs.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "sgd", "schedule": "one_cycle", "ema_decay": 0.5, "backbone_lr_factor": 0.1},
        {"optimizer": "adamw", "schedule": "plateau", "augment": "crop+flip+cutout"},
    ],
    ids=lambda settings: settings["optimizer"],
)
def test_a_training_that_thaws_continues_bit_equal_after_any_epoch(
    settings: dict[str, Any], weights: str, tmp_path: Path
) -> None:
    splits, chosen = photo_splits(16), config(max_epochs=3, thaw_epoch=2, **settings)

    def run(folder: Path) -> Iterator[Any]:
        model = pretrained(weights=weights, trainable_layers=1)
        for result in fit(model, splits, chosen, checkpoint=CheckpointFolder(folder)):
            yield result.metrics["val/loss"], result.metrics["grad_norm"], result.metrics["lr"]

    whole = list(run(tmp_path / "whole"))
    pieces = []
    for epoch in range(3):  # each epoch in a training of its own, which begins with the last saved result
        part = run(tmp_path / "pieces")
        pieces.append([next(part) for _ in range(2 if epoch else 1)][-1])
        part.close()  # type: ignore[attr-defined]
    assert pieces == whole


def test_the_backbone_has_its_own_rate_under_every_schedule(weights: str) -> None:
    model = pretrained(weights=weights)
    chosen = config(optimizer="sgd", momentum=0.0, backbone_lr_factor=0.25, schedule="one_cycle", weight_decay=1e-3)
    optimizer = build_optimizer(model, chosen)
    schedule = build_schedule(optimizer, chosen, 10)
    for _ in range(10):
        head, _, backbone, _ = (group["lr"] for group in optimizer.param_groups)
        assert backbone == pytest.approx(head / 4)
        optimizer.step()
        schedule.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0, 1e-3, 0]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_a_step_of_the_backbone_is_as_much_smaller_as_its_rate(weights: str) -> None:
    def steps(factor: float) -> dict[str, Tensor]:
        model = pretrained(weights=weights)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        chosen = config(optimizer="sgd", momentum=0.0, schedule="constant", max_epochs=1, backbone_lr_factor=factor)
        list(fit(model, photo_splits(8), chosen))
        return {name: p.detach() - before[name] for name, p in model.named_parameters()}

    whole, quarter = steps(1.0), steps(0.25)
    for name, step in whole.items():
        expected = step if ".fc." in name else step / 4
        torch.testing.assert_close(quarter[name], expected, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("settings", [{"thaw_epoch": 2}, {"backbone_lr_factor": 0.5}], ids=str)
def test_settings_of_a_backbone_are_refused_where_there_is_none(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(settings))}=.* is for pretrained models"):
        next(fit(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3)), photo_splits(), config(**settings)))


# --- A search


def test_a_search_on_a_folder_of_photos_gives_a_model_for_photos_of_any_size(
    folder: Path, weights: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "red" / "99.jpg").write_bytes(b"\xff\xd8 nothing")
    space = folder.parent / "small.py"
    space.write_text(
        "from hpo import Choice, Float, Group, Setting, Space\n"
        "space = Space(Group('all', lr=Float(1e-3, 1e-1, log=True, default=5e-2), batch_size=Choice(8, default=8),"
        f"architecture=Choice('{SMALL}', default='{SMALL}'), weights=Setting('default'), image_size=Setting(0),"
        "trainable_layers=Choice(0, default=0)))"
    )
    command = f"search image_folder --data-dir {folder} --trials 1 --epochs 10 --workers 1 --home {home}"
    chosen = f"--space {space} -p weights={weights} -p image_size=32"
    monkeypatch.setattr(sys, "argv", ["hpo", *command.split(), *chosen.split()])
    monkeypatch.setattr(logging.getLogger("hpo"), "level", logging.INFO)
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code in (0, None)
    assert "Done: 1 complete." in capsys.readouterr().out
    Path(weights).unlink()
    model = hpo.load_best("image_folder", home=home)
    photos = [folder / name / "00.jpg" for name in COLOURS]
    assert model.predict(read_photos(photos)) == list(COLOURS)
