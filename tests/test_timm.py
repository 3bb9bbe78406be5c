"""Models of timm in a task on photos, with the real library; their weights are made here, nothing is downloaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch
from test_transfer import COLOURS, write_photos

import hpo
from hpo.cli import main
from hpo.data.examples import DataSpec
from hpo.errors import DataError, UsageError
from hpo.models.pretrained import PretrainedNetwork, _layers

SPEC = DataSpec((3, 64, 64), tuple(COLOURS))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_each_family_has_a_head_and_layers_to_freeze(name: str) -> None:
    network = PretrainedNetwork(SPEC, architecture=f"timm/{name}", weights="none", trainable_layers=0)
    head = network.model.get_submodule(network._head_name)
    assert all(p.requires_grad == any(p is own for own in head.parameters()) for p in network.parameters())
    assert len(_layers(network.model, head)) >= 4
    assert network(torch.zeros(2, 3, 64, 64)).shape == (2, len(COLOURS))


def test_weights_of_a_file_are_loaded_and_images_prepared_as_for_them(tmp_path: Path) -> None:
    made = timm.create_model("test_resnet", num_classes=7)
    torch.save(made.state_dict(), tmp_path / "made.pth")
    network = PretrainedNetwork(SPEC, architecture="timm/test_resnet", weights=str(tmp_path / "made.pth"))
    network.load_pretrained()
    assert torch.equal(network.model.state_dict()["layer1.0.conv1.weight"], made.state_dict()["layer1.0.conv1.weight"])
    assert network.input_mean == (127.5,) * 3
    assert network.transform[1].size == (160, 160)  # type: ignore[index, union-attr]


def test_what_timm_does_not_have_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no architecture 'timm/resnt18'; the nearest of timm are timm/resnet18, .*"):
        PretrainedNetwork(SPEC, architecture="timm/resnt18")
    with pytest.raises(UsageError, match=r"no architecture 'timm/test_resnet\.x'; .* timm/test_resnet\.r160_in1k"):
        PretrainedNetwork(SPEC, architecture="timm/test_resnet.x")
    with pytest.raises(UsageError, match="image_size=64 is not for timm/test_vit, which takes 160 alone: use 0"):
        PretrainedNetwork(SPEC, architecture="timm/test_vit", weights="none", image_size=64)
    with pytest.raises(DataError, match="no weights 'best' for timm/test_resnet: give one of default, none, r160_in1k"):
        PretrainedNetwork(SPEC, architecture="timm/test_resnet", weights="best").load_pretrained()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match="architecture timm/test_resnet needs timm: pip install"):
        PretrainedNetwork(SPEC, architecture="timm/test_resnet")


def test_weights_that_cannot_be_downloaded_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    network = PretrainedNetwork(SPEC, architecture="timm/test_resnet")
    with pytest.raises(DataError, match=r"timm's test_resnet: timm/test_resnet\.r160_in1k could not be downloaded"):
        network.load_pretrained()


def test_a_search_trains_a_model_of_timm(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_photos(tmp_path / "photos", 10)
    command = f"search image_folder --data-dir {folder} --trials 1 --epochs 1 --workers 1 --home {home}"
    chosen = "-p architecture=timm/test_resnet -p weights=none -p image_size=32 -p batch_size=16"
    monkeypatch.setattr(sys, "argv", ["hpo", *command.split(), *chosen.split()])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code in (0, None)
    model = hpo.load_best("image_folder", home=home)
    assert set(model.predict(hpo.read_photos([folder / "red" / "00.jpg"]))) <= set(COLOURS)
