"""CIFAR-10 and Fashion-MNIST in their real formats, made here; the real data where HPO_DATA_DIR has them."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import pickle
import shutil
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import assert_same
from PIL import Image
from torchvision.datasets import CIFAR10, FashionMNIST

from hpo.data import vision
from hpo.data.examples import Dataset, Split
from hpo.data.vision import CIFAR10_CLASSES, load_cifar10, load_fashion_mnist
from hpo.errors import DataError

# --- Fashion-MNIST, as IDX files


def write_idx(path: Path, values: np.ndarray, magic: bytes = b"\0\0\x08") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(magic + struct.pack(f">B{values.ndim}I", values.ndim, *values.shape) + values.tobytes())


FASHION = {"train": 40, "t10k": 20}


def fashion_arrays(prefix: str) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(FASHION[prefix])
    count = FASHION[prefix]
    return random.integers(256, size=(count, 28, 28), dtype=np.uint8), (np.arange(count) % 10).astype(np.uint8)


@pytest.fixture
def fashion_dir(tmp_path: Path) -> Path:
    for prefix in FASHION:
        images, labels = fashion_arrays(prefix)
        write_idx(tmp_path / f"FashionMNIST/raw/{prefix}-images-idx3-ubyte", images)
        write_idx(tmp_path / f"FashionMNIST/raw/{prefix}-labels-idx1-ubyte", labels)
    return tmp_path


def test_fashion_mnist_is_read_from_its_raw_files(fashion_dir: Path) -> None:
    for _ in ("from the originals", "from the cache"):
        dataset = load_fashion_mnist(fashion_dir)
        assert (dataset.spec.input_shape, dataset.classes[0], len(dataset.classes)) == ((1, 28, 28), "T-shirt/top", 10)
        for prefix, split in (("train", dataset.train), ("t10k", dataset.test.open())):
            images, labels = fashion_arrays(prefix)
            assert_same(split, Split(torch.from_numpy(images)[:, None], torch.from_numpy(labels).long()))
    assert sorted(path.name.split(".")[0] for path in (fashion_dir / "hpo-cache").iterdir()) == [
        "fashion-mnist-test",
        "fashion-mnist-train",
    ]


def test_the_test_images_of_fashion_mnist_stay_sealed(fashion_dir: Path) -> None:
    dataset = load_fashion_mnist(fashion_dir)
    assert (len(dataset.test), dataset.test.times_opened) == (20, 0)


FASHION_FILES = [f"{prefix}-{part}-ubyte" for prefix in FASHION for part in ("images-idx3", "labels-idx1")]


@pytest.mark.parametrize("name", FASHION_FILES)
@pytest.mark.parametrize("keep", [0, 3, 7, 12, -1])
def test_a_raw_file_that_is_cut_off_is_named_before_anything_is_trained(
    fashion_dir: Path, name: str, keep: int
) -> None:
    path = fashion_dir / "FashionMNIST/raw" / name
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError) as error:
        load_fashion_mnist(fashion_dir)
    assert str(path) in str(error.value)
    assert "delete it and run again to download it" in str(error.value)


def test_a_raw_file_that_is_too_long_is_named(fashion_dir: Path) -> None:
    path = fashion_dir / "FashionMNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=f"{path} is damaged: it has 52 bytes where its header says 48"):
        load_fashion_mnist(fashion_dir)


def test_a_label_of_no_class_is_noticed(fashion_dir: Path) -> None:
    path = fashion_dir / "FashionMNIST/raw/train-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0a")
    with pytest.raises(DataError, match=f"{path.parent} is damaged: it has the label 10"):
        load_fashion_mnist(fashion_dir)


@pytest.mark.parametrize("name", FASHION_FILES)
def test_a_raw_file_with_another_magic_number_is_named(fashion_dir: Path, name: str) -> None:
    path = fashion_dir / "FashionMNIST/raw" / name
    path.write_bytes(b"\x1f\x8b" + path.read_bytes()[2:])
    with pytest.raises(DataError, match=f"{name} is not an IDX file"):
        load_fashion_mnist(fashion_dir)


def test_raw_files_that_do_not_belong_together_are_named(fashion_dir: Path) -> None:
    raw = fashion_dir / "FashionMNIST/raw"
    write_idx(raw / "train-labels-idx1-ubyte", np.zeros(41, dtype=np.uint8))
    with pytest.raises(DataError, match="train-labels-idx1-ubyte has 41 labels for 40 images"):
        load_fashion_mnist(fashion_dir)
    write_idx(raw / "train-images-idx3-ubyte", np.zeros((41, 28, 30), dtype=np.uint8))
    with pytest.raises(DataError, match="train-images-idx3-ubyte has images of 30x28 pixels, not 28x28"):
        load_fashion_mnist(fashion_dir)


# --- CIFAR-10, as a folder of images


def write_image_folder(folder: Path, images_per_class: int) -> None:
    random = np.random.default_rng(images_per_class)
    for index, name in enumerate(CIFAR10_CLASSES):
        (folder / name).mkdir(parents=True)
        for number in range(images_per_class):
            pixels = random.integers(256, size=(32, 32, 3), dtype=np.uint8)
            suffix = "png" if index == 0 else "jpg"
            Image.fromarray(pixels).save(folder / name / f"{number:04}.{suffix}")


@pytest.fixture
def image_dir(tmp_path: Path) -> Path:
    write_image_folder(tmp_path / "cifar10/train", 3)
    write_image_folder(tmp_path / "cifar10/test", 2)
    return tmp_path


def test_cifar10_is_read_from_a_folder_of_images(image_dir: Path) -> None:
    (image_dir / "cifar10/train/.DS_Store").write_text("not a class")
    (image_dir / "cifar10/train/cat/Thumbs.db").write_text("not an image")
    for _ in ("from the originals", "from the cache"):
        dataset = load_cifar10(image_dir)
        assert (dataset.spec.input_shape, dataset.classes, len(dataset.test)) == ((3, 32, 32), CIFAR10_CLASSES, 20)
        for name, split in (("train", dataset.train), ("test", dataset.test.open())):
            paths = sorted((image_dir / "cifar10" / name).glob("*/*.[jp][pn]g"))
            assert split.inputs.dtype == torch.uint8
            assert split.targets.tolist() == [CIFAR10_CLASSES.index(path.parent.name) for path in paths]
            for image, path in zip(split.inputs, paths, strict=True):  # type: ignore[arg-type]
                assert np.array_equal(image.permute(1, 2, 0), np.asarray(Image.open(path)))


def test_grey_images_are_read_as_colour(image_dir: Path) -> None:
    pixels = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    Image.fromarray(pixels).save(image_dir / "cifar10/train/airplane/0000.png")
    image = load_cifar10(image_dir).train.inputs[0]
    assert torch.equal(image, torch.from_numpy(pixels).expand(3, 32, 32))


def test_the_test_images_stay_sealed_and_are_read_again_when_they_are_opened(image_dir: Path) -> None:
    dataset = load_cifar10(image_dir)
    assert (len(dataset.train), len(dataset.test), dataset.test.times_opened) == (30, 20, 0)
    shutil.rmtree(image_dir / "hpo-cache")
    for path in (image_dir / "cifar10/test").glob("*/*"):
        path.write_text("nothing that could be read")
    with pytest.raises(DataError, match="is damaged"):
        dataset.test.open()


def test_a_damaged_test_image_is_named_before_anything_is_trained(image_dir: Path) -> None:
    path = sorted((image_dir / "cifar10/test").glob("*/*"))[-1]
    path.write_text("nothing that could be read")
    with pytest.raises(DataError, match=f"{path.name} is damaged"):
        load_cifar10(image_dir)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("damage", ["cut off", "empty", "not an image"])
def test_a_damaged_image_is_named(image_dir: Path, suffix: str, damage: str) -> None:
    path = image_dir / "cifar10/train" / ("airplane/0001.png" if suffix == "png" else "ship/0002.jpg")
    content = path.read_bytes()
    path.write_bytes({"cut off": content[: len(content) // 2], "empty": b"", "not an image": b"hello"}[damage])
    with pytest.raises(DataError) as error:
        load_cifar10(image_dir)
    assert str(error.value).startswith(f"{path} is damaged")
    assert "\n" not in str(error.value)


def test_an_image_of_another_size_is_named_with_its_size(image_dir: Path) -> None:
    Image.new("RGB", (40, 30)).save(image_dir / "cifar10/train/dog/0001.jpg")
    with pytest.raises(DataError, match=r"dog/0001\.jpg has 40x30 pixels, not 32x32"):
        load_cifar10(image_dir)


@pytest.mark.parametrize("split", ["train", "test"])
def test_class_folders_must_be_those_of_cifar10(image_dir: Path, split: str) -> None:
    folder = image_dir / "cifar10" / split
    (folder / "zebra").mkdir()
    with pytest.raises(DataError, match=f"{folder / 'zebra'} is not a class"):
        load_cifar10(image_dir)
    (folder / "zebra").rmdir()
    shutil.rmtree(folder / "frog")
    with pytest.raises(DataError, match=f"{folder / 'frog'} is missing"):
        load_cifar10(image_dir)
    (folder / "frog").mkdir()
    with pytest.raises(DataError, match=f"{folder / 'frog'} holds no images"):
        load_cifar10(image_dir)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=f"{folder} is missing"):
        load_cifar10(image_dir)


# --- CIFAR-10 and Fashion-MNIST, as torchvision downloads them


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output free of requests."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A folder and the address that it is served from."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture
def cifar_site(site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small batches in CIFAR-10's own archive, which torchvision is made to take for the real one."""
    folder, address = site
    batches = folder / CIFAR10.base_folder
    batches.mkdir()
    random = np.random.default_rng(0)
    for number, name in enumerate(["data_batch_1", "data_batch_2", "test_batch"]):
        entry = {"data": random.integers(256, size=(20, 3072), dtype=np.uint8), "labels": [number, *range(10)] * 2}
        entry["labels"] = entry["labels"][:20]
        (batches / name).write_bytes(pickle.dumps(entry, protocol=2))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10_CLASSES)}, protocol=2))
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        archive.add(batches, arcname=batches.name)
    monkeypatch.setattr(CIFAR10, "url", address + CIFAR10.filename)
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(folder / CIFAR10.filename))
    monkeypatch.setattr(
        CIFAR10, "train_list", [[name, md5(batches / name)] for name in ("data_batch_1", "data_batch_2")]
    )
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(batches / "test_batch")]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(batches / "batches.meta")})
    monkeypatch.setattr(vision, "CIFAR10_TEST_SIZE", 20)
    return batches


def unpickled(path: Path) -> Split:
    entry = pickle.loads(path.read_bytes())
    return Split(torch.from_numpy(entry["data"]).view(-1, 3, 32, 32), torch.tensor(entry["labels"]))


def test_cifar10_is_downloaded_once_and_then_read_from_its_batches(cifar_site: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "new" / "data"
    dataset = load_cifar10(data_dir)
    kept = {path.name.split(".")[0] for path in (data_dir / "hpo-cache").iterdir()}
    assert kept == {"cifar10-train", "cifar10-test"}
    parts = [unpickled(cifar_site / name) for name in ("data_batch_1", "data_batch_2")]
    inputs, targets = (torch.cat([getattr(part, name) for part in parts]) for name in ("inputs", "targets"))
    assert_same(dataset.train, Split(inputs, targets))
    assert_same(dataset.test.open(), unpickled(cifar_site / "test_batch"))
    (cifar_site.parent / CIFAR10.filename).unlink()
    shutil.rmtree(data_dir / "hpo-cache")
    assert_same(load_cifar10(data_dir).train, dataset.train)


def test_damaged_batches_are_named(cifar_site: Path, tmp_path: Path) -> None:
    load_cifar10(tmp_path)
    path = tmp_path / CIFAR10.base_folder / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{path.parent} is damaged .* delete it and run again"):
        load_cifar10(tmp_path)
    shutil.rmtree(path.parent)
    assert len(load_cifar10(tmp_path).train) == 40


def test_a_folder_of_images_goes_before_the_batches(cifar_site: Path, image_dir: Path) -> None:
    assert len(load_cifar10(image_dir).train) == 30
    assert not (image_dir / CIFAR10.base_folder).exists()


@pytest.fixture
def fashion_site(
    site: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder, address = site
    resources = []
    for prefix in FASHION:
        for part, values in zip(("images-idx3", "labels-idx1"), fashion_arrays(prefix), strict=True):
            path = folder / f"{prefix}-{part}-ubyte"
            write_idx(path, values)
            packed = folder / f"{path.name}.gz"
            packed.write_bytes(gzip.compress(path.read_bytes()))
            resources.append((packed.name, md5(packed)))
    monkeypatch.setattr(FashionMNIST, "mirrors", [address])
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    return folder


def test_fashion_mnist_is_downloaded_where_a_file_of_it_is_missing(fashion_site: Path, tmp_path: Path) -> None:
    for _ in ("nothing there", "one deleted"):
        dataset = load_fashion_mnist(tmp_path)
        assert torch.equal(dataset.train.inputs[:, 0], torch.from_numpy(fashion_arrays("train")[0]))  # type: ignore[call-overload]
        (tmp_path / "FashionMNIST/raw/train-images-idx3-ubyte").unlink()


@pytest.mark.parametrize("load", [load_cifar10, load_fashion_mnist])
def test_without_a_network_the_error_says_where_the_files_belong(
    load: Callable[[Path], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        point_downloads_at(f"http://127.0.0.1:{unused.getsockname()[1]}/", monkeypatch)
        with pytest.raises(DataError) as error:
            load(tmp_path)
    for part in (str(tmp_path), "could not be downloaded", "refused", "--data-dir", "HPO_DATA_DIR"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("load", [load_cifar10, load_fashion_mnist])
def test_a_network_that_says_nothing_is_given_up_on(
    load: Callable[[Path], Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "NETWORK_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_downloads_at(f"http://127.0.0.1:{silent.getsockname()[1]}/", monkeypatch)
        with pytest.raises(DataError, match="timed out"):
            load(tmp_path)
    assert socket.getdefaulttimeout() is None


def point_downloads_at(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", f"{address}cifar.tar.gz")
    monkeypatch.setattr(FashionMNIST, "mirrors", [address])


def test_a_data_folder_that_cannot_be_made_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("not a folder")
    with pytest.raises(DataError, match="could not be downloaded"):
        load_cifar10(tmp_path / "data")


# --- The real data


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("load", "num_train", "shape", "mean"),
    [
        (load_fashion_mnist, 60_000, (1, 28, 28), [72.94]),
        (load_cifar10, 50_000, (3, 32, 32), [125.3, 123.0, 113.9]),
    ],
)
def test_the_real_data_are_what_they_should_be(
    load: Callable[[Path], Dataset], num_train: int, shape: tuple[int, ...], mean: list[float], real_data_dir: Path
) -> None:
    dataset = load(real_data_dir)
    assert (len(dataset.train), len(dataset.test), dataset.spec.input_shape) == (num_train, 10_000, shape)
    assert dataset.train.targets.bincount().tolist() == [num_train // 10] * 10
    assert dataset.train.inputs[::10].float().mean((0, 2, 3)).tolist() == pytest.approx(mean, abs=1.0)
    test = dataset.test.open()
    assert test.targets.bincount().tolist() == [1_000] * 10
