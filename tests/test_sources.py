from __future__ import annotations

import builtins
import gzip
import hashlib
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import datasets

from lightning_locality import PermutedImages, SameClass
from lightning_locality.datamodules.image_sets import (
    CorruptImagesError,
    ImagesNotFoundError,
    UnknownSourceError,
    convert_channels,
    load_images,
    parse_source,
    pixel_statistics,
    prepare_images,
    resize_images,
    stratified_split,
)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def write_mnist(root: Path, train: int = 30, test: int = 20) -> dict[str, tuple[Tensor, Tensor]]:
    """A small set in the format of MNIST's files."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    parts = {}
    for part, prefix, count in (("train", "train", train), ("test", "t10k", test)):
        images, labels = random_images(count, 28, 28, seed=count), torch.arange(count) % 10
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        header = struct.pack(">II", 0x801, count)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())
        parts[part] = (images, labels)
    return parts


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Tensor, Tensor]]:
    """A small set in the format of CIFAR-10's files, with its own checksums."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    sums, parts = {}, {}
    for number, name in enumerate([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"]):
        images, labels = random_images(20, 3, 32, 32, seed=number), torch.arange(20) % 10
        content = pickle.dumps({"data": images.reshape(20, -1).numpy(), "labels": labels.tolist()})
        (folder / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
        parts[name] = (images, labels)
    content = pickle.dumps({"label_names": [f"class {k}" for k in range(10)]})
    (folder / "batches.meta").write_bytes(content)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", hashlib.md5(content).hexdigest())
    monkeypatch.setattr(
        datasets.CIFAR10, "train_list", [[f"data_batch_{k}", sums[f"data_batch_{k}"]] for k in range(1, 6)]
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    return parts


def write_folder(root: Path, count: int = 6, size: int = 5) -> dict[str, Tensor]:
    written = {}
    for number, name in enumerate(["apple", "beetle", "cat"]):
        (root / name).mkdir(parents=True)
        images = random_images(count, 3, size, size, seed=number)
        for k, image in enumerate(images):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / name / f"{k}.png")
        written[name] = images
    return written


def test_mnist_files_are_read_as_they_are(tmp_path: Path) -> None:
    parts = write_mnist(tmp_path)
    for part in ("train", "test"):
        found = load_images("mnist", part, tmp_path)
        images, labels = parts[part]
        assert found.images.dtype == torch.uint8
        assert found.labels.dtype == torch.int64
        assert torch.equal(found.images, images[:, None])
        assert torch.equal(found.labels, labels)


def test_cifar_files_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = write_cifar10(tmp_path, monkeypatch)
    train, test = (load_images("cifar10", part, tmp_path) for part in ("train", "test"))
    assert torch.equal(train.images, torch.cat([parts[f"data_batch_{k}"][0] for k in range(1, 6)]))
    assert torch.equal(train.labels, torch.cat([parts[f"data_batch_{k}"][1] for k in range(1, 6)]))
    assert torch.equal(test.images, parts["test_batch"][0])
    assert train.images.is_contiguous()


def test_svhn_files_are_read_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    io = pytest.importorskip("scipy.io")
    images, labels = random_images(12, 3, 32, 32), torch.arange(12) % 10
    raw = np.where(labels.numpy() == 0, 10, labels.numpy()).astype(np.uint8)[:, None]
    io.savemat(tmp_path / "test_32x32.mat", {"X": images.permute(2, 3, 1, 0).numpy(), "y": raw})
    entry = list(datasets.SVHN.split_list["test"])
    entry[2] = hashlib.md5((tmp_path / "test_32x32.mat").read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SVHN.split_list, "test", entry)
    found = load_images("svhn", "test", tmp_path)
    assert torch.equal(found.images, images)
    assert torch.equal(found.labels, labels)
    with pytest.raises(ImagesNotFoundError, match=r"train_32x32\.mat"):
        load_images("svhn", "train", tmp_path)


def test_digits_are_exact_and_split_once_for_all() -> None:
    datasets_module = pytest.importorskip("sklearn.datasets")
    bunch = datasets_module.load_digits()
    train, test = (load_images("digits", part) for part in ("train", "test"))
    assert train.images.shape == (1438, 1, 8, 8)
    assert test.images.shape == (359, 1, 8, 8)
    assert train.images.max() == 255
    # every picture of the set is in one of the parts, with its own label, once
    rows = [
        (*((16 * part.images.long() + 127) // 255).flatten(1)[k].tolist(), int(part.labels[k]))
        for part in (train, test)
        for k in range(len(part.labels))
    ]
    twin = [(*(int(v) for v in x.ravel()), int(y)) for x, y in zip(bunch.images, bunch.target, strict=True)]
    assert sorted(rows) == sorted(twin)
    counts = torch.stack([train.labels.bincount(), test.labels.bincount()])
    assert torch.equal(counts[1], (0.2 * counts.sum(0)).round().long())
    assert torch.equal(load_images("digits", "test").images, test.images)


def test_digits_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-locality\[digits\]'"):
        load_images("digits", "train")


@pytest.mark.parametrize("spelling", ["folder", "folder:PATH"])
def test_a_folder_with_both_parts(tmp_path: Path, spelling: str) -> None:
    train, test = write_folder(tmp_path / "train", 6), write_folder(tmp_path / "test", 4)
    (tmp_path / "train" / "apple" / "notes.txt").write_text("not an image")
    source = spelling.replace("PATH", str(tmp_path))
    for part, images in (("train", train), ("test", test)):
        found = load_images(source, part, tmp_path)  # type: ignore[arg-type]
        assert torch.equal(found.images, torch.cat(list(images.values())))
        assert found.labels.tolist() == [label for label in range(3) for _ in range(len(images["cat"]))]


def test_a_folder_without_parts_is_split(tmp_path: Path) -> None:
    written = torch.cat(list(write_folder(tmp_path, 10).values()))
    train, test = (load_images("folder", part, tmp_path) for part in ("train", "test"))
    assert train.labels.bincount().tolist() == [8, 8, 8]
    assert test.labels.bincount().tolist() == [2, 2, 2]
    both = torch.cat([train.images, test.images]).flatten(1)
    assert sorted(both.tolist()) == sorted(written.flatten(1).tolist())


def test_a_folder_of_several_sizes_needs_an_image_size(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", 2, size=5)
    write_folder(tmp_path / "b", 2, size=8)
    with pytest.raises(ValueError, match="give an image_size"):
        load_images("folder", "train", tmp_path)
    grey = load_images("folder", "train", tmp_path, image_size=4, channels=1)
    assert grey.images.shape[1:] == (1, 4, 4)


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "cat" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    with pytest.raises(CorruptImagesError, match=r"3\.png"):
        load_images("folder", "train", tmp_path)


def test_classes_of_the_test_folder_must_be_known(tmp_path: Path) -> None:
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "test")
    shutil.copytree(tmp_path / "test" / "cat", tmp_path / "test" / "dog")
    with pytest.raises(CorruptImagesError, match="dog"):
        load_images("folder", "test", tmp_path)


def test_an_empty_or_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(ImagesNotFoundError, match="no images"):
        load_images("folder", "train", tmp_path)
    with pytest.raises(ImagesNotFoundError, match="no folder"):
        load_images("folder", "train", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("typed", "near"),
    [("cifar", "cifar10"), ("CIFAR10", "cifar10"), ("fashion-mnist", "fashion_mnist"), ("digit", "digits")],
)
def test_an_unknown_source_suggests_the_nearest(typed: str, near: str) -> None:
    with pytest.raises(UnknownSourceError, match=rf"unknown source '{typed}' \(did you mean '{near}'\?\).*folder:PATH"):
        parse_source(typed)


def test_an_unknown_source_lists_the_known() -> None:
    with pytest.raises(UnknownSourceError, match="known are cifar10, cifar100, mnist, fashion_mnist, svhn, digits"):
        parse_source("xyzzy")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "svhn"])
def test_a_root_without_the_set_says_what_to_do(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImagesNotFoundError, match=r"[Pp]ass download=True or point root at") as caught:
        load_images(name, "train", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


def test_a_failed_download_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    with pytest.raises(ImagesNotFoundError, match=r"could not be downloaded.*no route to host"):
        prepare_images("cifar10", tmp_path)


def test_preparing_what_is_there_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    write_mnist(tmp_path)
    for module in ("cifar", "mnist"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", None)
    for source in ("cifar10", "mnist", "digits", f"folder:{tmp_path}"):
        prepare_images(source, tmp_path)


def test_an_altered_cifar_file_is_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar10(tmp_path, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CorruptImagesError, match=r"damaged or incomplete.*delete it"):
        load_images("cifar10", "train", tmp_path)


def test_a_short_mnist_file_is_corrupt(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CorruptImagesError, match="damaged or incomplete"):
        load_images("mnist", "train", tmp_path)


def test_images_and_labels_must_be_as_many(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    raw = tmp_path / "MNIST" / "raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    with pytest.raises(CorruptImagesError, match="30 images and 20 labels"):
        load_images("mnist", "train", tmp_path)


def test_area_is_the_mean_over_blocks() -> None:
    images = random_images(3, 1, 28, 28)
    twin = images.double().reshape(3, 1, 14, 2, 14, 2).mean((3, 5)).round()
    assert torch.equal(resize_images(images, 14, "area").double(), twin)


def test_pad_keeps_the_pixels() -> None:
    images = random_images(3, 2, 28, 28)
    padded = resize_images(images, 32, "pad")
    assert torch.equal(padded[:, :, 2:30, 2:30], images)
    assert int(padded.sum(dtype=torch.int64)) == int(images.sum(dtype=torch.int64))
    assert resize_images(images, 31, "pad").shape == (3, 2, 31, 31)
    with pytest.raises(ValueError, match="image_size=20 is smaller than the images"):
        resize_images(images, 20, "pad")


def test_bilinear_of_a_ramp_is_the_ramp() -> None:
    ramp = (torch.arange(16, dtype=torch.uint8) * 8).expand(2, 1, 16, 16)
    grown = resize_images(ramp, 32)
    centres = (torch.arange(32) + 0.5) / 2 - 0.5
    assert torch.equal(grown[0, 0, 7].double(), (8 * centres.clamp(0, 15)).round())
    # halved with antialiasing: the triangle filter keeps a ramp but at the borders
    assert torch.equal(
        resize_images(ramp, 8)[0, 0, 3, 1:-1].double(), (8 * (2 * torch.arange(8.0) + 0.5)).round()[1:-1]
    )


def test_resizing_goes_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random_images(4097, 1, 4, 4)
    assert torch.equal(resize_images(images, 2)[-1], resize_images(images[-1:], 2)[0])
    assert resize_images(images, 4) is images
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        resize_images(images, 0)


def test_channels() -> None:
    grey, colour = random_images(2, 1, 4, 4), random_images(2, 3, 4, 4)
    assert torch.equal(convert_channels(grey, 3), torch.cat([grey] * 3, 1))
    luma = (torch.tensor([0.299, 0.587, 0.114])[:, None, None] * colour.double()).sum(1, keepdim=True)
    assert (convert_channels(colour, 1).double() - luma).abs().max() <= 0.5 + 1e-9
    assert torch.equal(convert_channels(convert_channels(grey, 3), 1), grey)
    assert convert_channels(colour, 3) is colour
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 2"):
        convert_channels(colour, 2)  # type: ignore[arg-type]


def test_statistics_are_those_of_the_pixels() -> None:
    images = random_images(50, 3, 6, 6) // torch.tensor([1, 2, 5], dtype=torch.uint8)[:, None, None]
    mean, std = pixel_statistics(images)
    pixels = images.double().transpose(0, 1).flatten(1) / 255
    assert torch.allclose(mean, pixels.mean(1), rtol=1e-12, atol=0)
    assert torch.allclose(std, pixels.std(1, correction=0), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="constant"):
        pixel_statistics(torch.full((4, 1, 2, 2), 9, dtype=torch.uint8))


def test_a_stratified_split_is_one() -> None:
    labels = torch.arange(1000) % 7
    kept, held = stratified_split(labels, 0.25, seed=1)
    assert sorted(kept.tolist() + held.tolist()) == list(range(1000))
    assert torch.equal(labels[held].bincount(), (0.25 * labels.bincount()).round().long())
    assert torch.equal(stratified_split(labels, 0.25, seed=1)[1], held)
    assert not torch.equal(stratified_split(labels, 0.25, seed=2)[1], held)
    # a class keeps its split when another class goes
    without = torch.where(labels == 3, 6, labels)
    again = stratified_split(without, 0.25, seed=1)[1]
    assert set(again[without[again] < 3].tolist()) == set(held[labels[held] < 3].tolist())


def test_a_class_with_one_image_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="class 5 has a single image"):
        stratified_split(torch.tensor([0, 0, 5]), 0.5, seed=0)


@pytest.mark.images
@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [("cifar10", (3, 32, 32), 0.4734), ("mnist", (1, 28, 28), 0.1307), ("fashion_mnist", (1, 28, 28), 0.2860)],
)
def test_the_real_sets(image_root: Path, name: Any, shape: tuple[int, ...], mean: float) -> None:
    train, test = (load_images(name, part, image_root) for part in ("train", "test"))
    assert train.images.shape[1:] == test.images.shape[1:] == shape
    assert SameClass(name, image_root).channels == shape[0]
    assert len(test.labels) == 10_000
    assert train.labels.unique().tolist() == list(range(10))
    means, deviations = pixel_statistics(train.images)
    assert abs(float(means.mean()) - mean) < 1e-3
    if name == "cifar10":
        # as published
        assert torch.allclose(means, torch.tensor([0.491, 0.482, 0.446]), atol=1e-3, rtol=0)
        assert torch.allclose(deviations, torch.tensor([0.247, 0.243, 0.261]), atol=1e-3, rtol=0)


@pytest.mark.images
def test_the_first_real_digit(image_root: Path) -> None:
    packed = image_root / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else packed.with_suffix("").read_bytes()
    twin = torch.tensor(list(raw[16 : 16 + 784]), dtype=torch.uint8).reshape(1, 28, 28)
    assert torch.equal(load_images("mnist", "train", image_root).images[0], twin)


def test_file_of_arrays(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    arrays = {
        "train_images": np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 2, 2),
        "train_labels": np.array([1, 0]),
    }
    np.savez(path, **arrays)
    found = load_images(f"file:{path}", "train")
    assert found.images.tolist() == arrays["train_images"].tolist()
    assert found.labels.tolist() == [1, 0]
    with pytest.raises(CorruptImagesError, match="needs the arrays test_images and test_labels"):
        load_images(f"file:{path}", "test")
    with pytest.raises(ImagesNotFoundError, match="no file"):
        load_images(f"file:{tmp_path / 'none.npz'}", "train")
    np.savez(path, train_images=np.zeros((2, 2, 2)), train_labels=np.zeros(2))
    with pytest.raises(CorruptImagesError, match="must be uint8"):
        load_images(f"file:{path}", "train")
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(CorruptImagesError, match="cannot be read"):
        load_images(f"file:{path}", "train")


def test_statistics_of_imagenet() -> None:
    plain, other = (
        PermutedImages("digits", scramble=0.0, image_size=8, channels=3, **options).batch("test")[0]
        for options in ({"mean": [0.0] * 3, "std": [1.0] * 3}, {"mean": "imagenet"})
    )
    for channel, (mean, std) in enumerate(((0.485, 0.229), (0.456, 0.224), (0.406, 0.225))):
        assert torch.allclose(other[:, channel], (plain[:, channel] - mean) / std)
