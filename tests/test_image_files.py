"""Kinds of pictures, layouts of folders, labels of arrays; export and reading back."""

from __future__ import annotations

import re
import shlex
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lightning_locality import IsGreater, Pathfinder, PermutedImages, SameClass, SameParity
from lightning_locality.cli import main
from lightning_locality.datamodules import image_files
from lightning_locality.datamodules.base import SPLITS
from lightning_locality.datamodules.image_files import CorruptImagesError, ImagesNotFoundError, read_picture
from lightning_locality.datamodules.image_sets import UnknownSourceError, load_images, parse_source

RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 2**16, (4, 6), dtype=np.uint16)
GREY = (DEEP >> 8).astype(np.uint8)
COLOUR = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(image_files, "_say", lines.append)
    return lines


def pixels(path: Path) -> Any:
    return read_picture(path)[0].permute(1, 2, 0).numpy()


def write_png(path: Path, kind: int, values: Any, transparent: bytes = b"") -> None:
    """A PNG file of 8 or 16 bits a value, which Pillow does not write for every kind."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * values.itemsize, kind, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(row.dtype.newbyteorder(">")).tobytes() for row in values)
    key = chunk(b"tRNS", transparent) if transparent else b""
    content = chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def write_set(root: Path, counts: dict[str, int], suffix: str = ".png") -> None:
    """Class folders of pictures, each of another grey: the picture's number overall, in the order given."""
    number = 0
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new("L", (4, 4), number).save(
                root / name / f"{k}{suffix}", **({"quality": 100} if suffix != ".png" else {})
            )
            number += 1


# kinds of pictures


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    write_png(tmp_path / "grey.png", 0, DEEP)
    assert np.array_equal(pixels(tmp_path / "grey.png"), GREY[..., None].repeat(3, 2))
    colour = RNG.integers(0, 2**16, (4, 6, 3), dtype=np.uint16)
    write_png(tmp_path / "colour.png", 2, colour)
    assert np.array_equal(pixels(tmp_path / "colour.png"), colour >> 8)
    for name in ("grey.tif", "grey.pgm"):
        Image.fromarray(DEEP).save(tmp_path / name)
        assert np.array_equal(pixels(tmp_path / name)[..., 0], GREY), name
    Image.fromarray(DEEP.astype(">u2")).save(tmp_path / "big.tif")
    assert np.array_equal(pixels(tmp_path / "big.tif")[..., 0], GREY)
    # 8 bits stored as 16, by either convention, come back as they were
    for factor in (256, 257):
        write_png(tmp_path / "stretched.png", 0, GREY.astype(np.uint16) * np.uint16(factor))
        assert np.array_equal(pixels(tmp_path / "stretched.png")[..., 0], GREY)


def test_other_depths_of_grey(tmp_path: Path) -> None:
    (tmp_path / "ten.pgm").write_bytes(b"P5 3 1 1023\n" + struct.pack(">3H", 0, 512, 1023))
    assert pixels(tmp_path / "ten.pgm")[0, :, 0].tolist() == [0, 128, 255]
    Image.fromarray(GREY > 127).save(tmp_path / "one.png")
    assert np.array_equal(pixels(tmp_path / "one.png")[..., 1], np.where(GREY > 127, 255, 0))
    # 12 bits of TIFF are packed: two values in three bytes
    Image.fromarray(np.zeros((1, 2), np.uint16)).save(tmp_path / "twelve.tif")
    content = (tmp_path / "twelve.tif").read_bytes()
    bits, at = struct.pack("<HHII", 258, 3, 1, 16), content.index(struct.pack("<HHI", 273, 4, 1)) + 8
    assert content.count(bits) == 1
    content = content.replace(bits, struct.pack("<HHII", 258, 3, 1, 12))
    (strip,) = struct.unpack("<I", content[at : at + 4])
    (tmp_path / "twelve.tif").write_bytes(content[:strip] + bytes([0xAB, 0xC1, 0x23, 0]) + content[strip + 4 :])
    assert pixels(tmp_path / "twelve.tif")[0, :, 0].tolist() == [0xAB, 0x12]


@pytest.mark.parametrize(
    "name", ["float.tif", "whole.tif", "float.pfm", "signed.tif", "inverted.tif", "key.png", "keys.png"]
)
def test_values_without_a_known_range_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    match name:
        case "float.tif" | "float.pfm":
            Image.fromarray(RNG.random((4, 4), dtype=np.float32)).save(path)
        case "whole.tif":
            Image.fromarray(DEEP.astype(np.int32)).save(path)
        case "key.png":
            write_png(path, 0, DEEP, b"\0\0")
        case "keys.png":
            write_png(path, 2, DEEP[..., None].repeat(3, 2), struct.pack(">3H", 256, 256, 256))
        case _:
            Image.fromarray(DEEP).save(path, tiffinfo={339: (2,)} if name == "signed.tif" else {})
            if name == "inverted.tif":  # 0 is white
                black, white = (struct.pack("<HHII", 262, 3, 1, value) for value in (1, 0))
                assert black in path.read_bytes()
                path.write_bytes(path.read_bytes().replace(black, white))
    with pytest.raises(CorruptImagesError, match=rf"{name} cannot be read.*(no known range|transparent).*8 bits"):
        read_picture(path)


def test_palettes_and_cmyk_are_colours(tmp_path: Path) -> None:
    palette = Image.fromarray(COLOUR).quantize(8)
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "p.gif")
    for name in ("p.png", "p.gif"):
        assert np.array_equal(pixels(tmp_path / name), np.array(palette.convert("RGB")))
    for suffix in ("tif", "jpg"):
        Image.new("CMYK", (8, 8), (10, 20, 30, 40)).save(tmp_path / f"c.{suffix}")
        want = [round((255 - ink) * (255 - 40) / 255) for ink in (10, 20, 30)]
        assert pixels(tmp_path / f"c.{suffix}")[0, 0].tolist() == want


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (4, 6, 1), dtype=np.uint8)
    for values, name in ((COLOUR, "rgba"), (GREY[..., None], "la")):
        opaque = np.dstack([values, np.full_like(alpha, 255)])
        Image.fromarray(opaque).save(tmp_path / "opaque.png")
        assert np.array_equal(pixels(tmp_path / "opaque.png"), np.broadcast_to(values, COLOUR.shape))
        Image.fromarray(np.dstack([values, alpha])).save(tmp_path / f"{name}.png")
        twin = values * (alpha / 255) + 255 * (1 - alpha / 255)
        assert np.abs(pixels(tmp_path / f"{name}.png") - twin).max() <= 1
    palette = Image.fromarray(COLOUR).quantize(8)
    palette.save(tmp_path / "p.png", transparency=3)
    twin = np.where(np.array(palette)[..., None] == 3, 255, np.array(palette.convert("RGB")))
    assert np.array_equal(pixels(tmp_path / "p.png"), twin)
    write_png(tmp_path / "key.png", 0, GREY, bytes([0, GREY[1, 1]]))
    assert np.array_equal(pixels(tmp_path / "key.png")[..., 0], np.where(GREY[1, 1] == GREY, 255, GREY))


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
def test_pictures_stand_upright(tmp_path: Path, suffix: str) -> None:
    turned: dict[int, Callable[[Any], Any]] = {
        1: lambda picture: picture,
        2: ImageOps.mirror,
        3: lambda picture: picture.rotate(180),
        6: lambda picture: picture.rotate(-90, expand=True),
        8: lambda picture: picture.rotate(90, expand=True),
    }
    for orientation, turn in turned.items():
        exif = Image.Exif()
        exif[0x112] = orientation
        stored = Image.fromarray(COLOUR)
        stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
        assert np.array_equal(pixels(tmp_path / f"a.{suffix}"), np.array(turn(stored))), orientation


def test_a_picture_too_large_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, {"a": 2, "b": 2})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    with pytest.raises(
        CorruptImagesError, match=r"0\.png is too large.*shrink it.*PIL\.Image\.MAX_IMAGE_PIXELS"
    ) as caught:
        load_images(f"folder:{tmp_path}", "train")
    assert "\n" not in str(caught.value)


def test_whatever_a_decoder_raises_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path, {"a": 2, "b": 2})

    def broken(*_: Any, **__: Any) -> None:
        raise struct.error("unpack requires a buffer of 4 bytes")

    monkeypatch.setattr(Image, "open", broken)
    with pytest.raises(CorruptImagesError, match=r"0\.png cannot be read as an image \(unpack requires"):
        load_images(f"folder:{tmp_path}", "train")


# layouts of folders


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Train", "Test"),
        ("training", "testing"),
        ("TRAIN", "Val"),
        ("training_set", "test_set"),
        ("train", "validation"),
    ],
)
def test_splits_are_known_by_their_usual_names(tmp_path: Path, train: str, test: str, said: list[str]) -> None:
    write_set(tmp_path / train, {"cat": 3, "dog": 2})
    write_set(tmp_path / test, {"cat": 1, "dog": 2})
    source = f"folder:{tmp_path}"
    assert load_images(source, "train").labels.tolist() == [0, 0, 0, 1, 1]
    assert load_images(source, "test").labels.tolist() == [0, 1, 1]
    assert [line for line in said if "used for testing" in line] == said
    assert bool(said) == ("val" in test.lower())
    with pytest.raises(ImagesNotFoundError, match="no validation images of its own"):
        load_images(source, "validation")


def test_own_validation_images_are_used(tmp_path: Path) -> None:
    counts = {"train": 10, "valid": 3, "Test": 4}
    for split, count in counts.items():
        write_set(tmp_path / split, {"cat": count, "dog": count})
    data = PermutedImages(f"folder:{tmp_path}", image_size=4, scramble=0.0, batch_size=100)
    data.setup()
    assert [data.size(split) for split in SPLITS] == [20, 6, 8]
    assert data.part("validation") == "validation"
    pairs = SameClass(f"folder:{tmp_path}", image_size=4, canvas=(4, 12), distance=4, train=50, validation=50, test=50)
    pairs.setup()
    assert pairs.pairs("validation").left.max() < 6
    assert pairs.pairs("train").left.max() > 6
    both = PermutedImages(f"folder:{tmp_path}", image_size=4, validation_is_test=True)
    both.setup()
    assert both.size("validation") == 8


def test_classes_may_be_called_like_splits(tmp_path: Path) -> None:
    for number, names in enumerate((["valid", "invalid"], ["train", "bus", "car"], ["test", "control"])):
        write_set(tmp_path / str(number), dict.fromkeys(names, 5))
        images, labels = load_images(f"folder:{tmp_path / str(number)}", "train")
        first = sorted(names)[0]
        assert labels.unique().tolist() == list(range(len(names)))
        assert images[labels == 0].max() // 5 == names.index(first)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "Training/a"], "Training and train are both names of train images"),
        (["train/a", "val/a", "valid/a"], "both names of validation images"),
        (["val/a", "test/a"], "no folder of training images"),
        (["valid/a", "invalid"], "no folder of training images"),
        (["train", "test"], "no images in class folders"),
        (["cat/train", "cat/test", "dog/train"], r"cat holds test, train.*not these into the class folders"),
        (["images/train/a", "images/val/a"], r"use folder:.*images if that is no class"),
    ],
)
def test_ambiguous_layouts_are_refused(tmp_path: Path, folders: list[str], message: str) -> None:
    for folder in folders:
        write_set(tmp_path, {folder: 2})
    with pytest.raises((CorruptImagesError, ImagesNotFoundError), match=message):
        load_images(f"folder:{tmp_path}", "train")


def test_a_part_that_is_missing_says_what_to_do(tmp_path: Path) -> None:
    write_set(tmp_path / "train", {"a": 2, "b": 2})
    with pytest.raises(
        ImagesNotFoundError, match=r"no folder .*test: .* holds train alone; add it, or use folder:.*train"
    ):
        load_images(f"folder:{tmp_path}", "test")


def test_hidden_and_system_folders_are_no_classes(tmp_path: Path, said: list[str]) -> None:
    write_set(
        tmp_path, {"cat": 5, ".ipynb_checkpoints": 3, "__MACOSX": 2, "dog": 5, "@eaDir": 1, "cat/.ipynb_checkpoints": 2}
    )
    (tmp_path / "dog" / "._0.png").write_bytes(b"resource fork")
    (tmp_path / "dog" / "Thumbs.db").write_bytes(b"")
    both = [load_images(f"folder:{tmp_path}", part) for part in ("train", "test")]  # type: ignore[arg-type]
    assert [part.labels.tolist() for part in both] == [[0] * 4 + [1] * 4, [0, 1]]
    greys = torch.cat([part.images[:, 0, 0, 0] for part in both]).sort().values
    assert greys.tolist() == [*range(5), *range(10, 15)]
    assert set(said) == {f"{tmp_path}: left out .ipynb_checkpoints/ (2), @eaDir/ (1), __MACOSX/ (1)"}


def test_what_is_left_out_is_said_in_one_line(tmp_path: Path, said: list[str]) -> None:
    write_set(tmp_path / "train", {"cat": 5, "empty": 0, "dog": 5, ".git": 0})
    write_set(tmp_path / "test", {"cat": 2, "dog": 2, "empty": 0})
    write_set(tmp_path, {"annotations": 0})
    for name in ("train/cat/notes.txt", "train/dog/a.heic", "train/dog/b.heic"):
        (tmp_path / name).write_text("")
    Image.new("L", (4, 4)).save(tmp_path / "train" / "cover.png")
    # no gap in the labels
    assert load_images(f"folder:{tmp_path}", "train").labels.unique().tolist() == [0, 1]
    assert load_images(f"folder:{tmp_path}", "test").labels.tolist() == [0, 0, 1, 1]
    assert said == [
        f"{tmp_path / 'train'}: left out *.heic (2), *.txt (1), .git/ (1), annotations/ (1), empty/ without a picture "
        "(1), pictures outside the class folders (1)",
        f"{tmp_path / 'test'}: left out empty/ without a picture (1)",
    ]


def test_a_complete_folder_is_read_without_a_word(tmp_path: Path, said: list[str]) -> None:
    write_set(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "README.md").write_text("")
    load_images(f"folder:{tmp_path}", "train")
    assert said == []


def test_a_folder_too_many_is_noticed(tmp_path: Path, said: list[str]) -> None:
    write_set(tmp_path / "flowers", {"rose": 3, "tulip": 3})
    load_images(f"folder:{tmp_path}", "train")
    assert said == [
        f"{tmp_path} has a single class: if the class folders are in flowers, use folder:{tmp_path / 'flowers'}"
    ]


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".avif", ".JPG", ".jp2", ".tga"])
def test_suffixes_are_those_that_pillow_reads(tmp_path: Path, suffix: str) -> None:
    if suffix.lower() not in image_files._suffixes():
        pytest.skip(f"this Pillow reads no {suffix}")
    write_set(tmp_path, {"a": 5}, suffix)
    write_set(tmp_path, {"b": 5})
    assert load_images(f"folder:{tmp_path}", "train").labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("names", "order"),
    [
        ([str(k) for k in range(12)], [str(k) for k in range(12)]),
        (["10", "9", "007", "-1"], ["-1", "007", "9", "10"]),
        (["0.5", "10", "2"], ["0.5", "2", "10"]),
        (["class10", "class9"], ["class10", "class9"]),
        (["10", "9", "other"], ["10", "9", "other"]),
        (["20230101123456789013", "20230101123456789012"], ["20230101123456789012", "20230101123456789013"]),
    ],
)
def test_numbers_sort_as_numbers(tmp_path: Path, names: list[str], order: list[str]) -> None:
    write_set(tmp_path, dict.fromkeys(names, 2))
    images, labels = load_images(f"folder:{tmp_path}", "train")
    assert [names[int(images[labels == label].max()) // 2] for label in range(len(names))] == order


def test_tasks_of_numbers_see_the_numbers(tmp_path: Path) -> None:
    write_set(tmp_path, {str(k): 6 for k in range(12)})
    options: dict[str, Any] = {"image_size": 4, "canvas": (4, 12), "distance": 4, "train": 200, "distinct": False}
    for task in (SameParity, IsGreater):
        data = task(f"folder:{tmp_path}", **options)
        data.setup("fit")
        images = data.images("train").images[:, 0, 0, 0].long() // 6  # the number of the class
        left, right, label = data.pairs("train")
        difference = images[left] - images[right]
        want = difference % 2 == 0 if task is SameParity else difference % 12 < 6
        assert torch.equal(want.long(), label)


# arrays


def save(path: Path, labels: Any, test: Any = None, shape: tuple[int, ...] = (3, 4, 4)) -> str:
    test = labels if test is None else test
    parts = {"train": np.asarray(labels), "test": np.asarray(test)}
    arrays = {f"{name}_labels": own for name, own in parts.items()}
    arrays |= {f"{name}_images": np.zeros((len(own), *shape), np.uint8) for name, own in parts.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return f"file:{path}"


@pytest.mark.parametrize(
    ("labels", "read"),
    [
        (np.array([[1], [0], [2]]), [1, 0, 2]),
        (np.array([1.0, 0.0, 2.0]), [1, 0, 2]),
        (np.array([3, -1, 2], dtype=">i8"), [3, -1, 2]),
        (np.array([3, 1, 2], dtype=">u2"), [3, 1, 2]),
        (np.array([3, 1, 2], dtype=np.uint64), [3, 1, 2]),
        (np.array([200, 1, 2], dtype=np.uint8), [200, 1, 2]),
        (np.array([True, False, True]), [1, 0, 1]),
        (np.array([2, 1, 0], dtype=np.float16), [2, 1, 0]),
        (np.array(["cat", "ant", "dog"]), [1, 0, 2]),
        (np.array([["cat"], ["ant"], ["dog"]]), [1, 0, 2]),
        (np.array(["cat", "ant", "é"]), [1, 0, 2]),
        (np.array([b"cat", b"ant", b"dog"]), [1, 0, 2]),
        (np.array(["10", "9", "8"]), [2, 1, 0]),
    ],
)
def test_labels_of_arrays(tmp_path: Path, labels: Any, read: list[int]) -> None:
    found = load_images(save(tmp_path / "a.npz", labels), "train").labels
    assert found.dtype == torch.int64
    assert found.tolist() == read


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.5, 1.0], r"must be whole numbers or text, got 0\.5"),
        ([0.0, float("nan")], "must be whole numbers or text, got nan"),
        ([0.0, float("inf")], "must be whole numbers or text, got inf"),
        (np.array([1, 2**63], dtype=np.uint64), "must be whole numbers or text, got 9223372036854775808"),
        (np.eye(2), r"got \(2, 2\); if they are one-hot, use argmax"),
        (np.zeros((2, 1, 1)), r"one label an image, got \(2, 1, 1\)"),
        (np.array([1j, 0]), "got complex128"),
        (np.array(["2020-01-01"] * 2, dtype="M8[D]"), "got datetime64"),
        (np.array(["a", 1], dtype=object), "of numbers or text and not of objects"),
    ],
)
def test_labels_of_arrays_that_are_refused(tmp_path: Path, labels: Any, message: str) -> None:
    with pytest.raises(CorruptImagesError, match=rf"a\.npz.*train_labels.*{message}"):
        load_images(save(tmp_path / "a.npz", labels), "train")


def test_texts_have_the_labels_of_the_training_part(tmp_path: Path) -> None:
    source = save(tmp_path / "a.npz", ["cat", "ant", "dog"], ["dog", "cat"])
    assert load_images(source, "test").labels.tolist() == [2, 1]
    for test in (["cow", "cat"], [0, 1]):
        source = save(tmp_path / "a.npz", ["cat", "ant", "dog"], test)
        with pytest.raises(CorruptImagesError, match=r"test_labels must be classes of the training images, \['ant'"):
            load_images(source, "test")
    with pytest.raises(CorruptImagesError, match="must be classes of the training images"):
        load_images(save(tmp_path / "a.npz", [0, 1], ["0", "1"]), "test")


@pytest.mark.parametrize("shape", [(28, 28, 3), (28, 28), (28, 28, 1), (3, 28, 28), (1, 28, 28)])
def test_files_like_those_of_medmnist(tmp_path: Path, shape: tuple[int, ...]) -> None:
    counts = {"train": 40, "val": 10, "test": 20}
    arrays: dict[str, Any] = {}
    for name, count in counts.items():
        arrays[f"{name}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
        arrays[f"{name}_labels"] = (np.arange(count) % 4).astype(np.uint8)[:, None]
    np.savez(tmp_path / "medmnist.npz", **arrays)
    data = PermutedImages(f"file:{tmp_path / 'medmnist.npz'}", image_size=28, scramble=0.0)
    data.setup()
    assert [data.size(split) for split in SPLITS] == [40, 10, 20]
    images = arrays["val_images"]
    if len(shape) == 3 and shape[-1] < 28:
        images = images.transpose(0, 3, 1, 2)
    images = images.reshape(10, -1, 28, 28)
    found = load_images(data.source, "validation")
    assert np.array_equal(found.images.numpy(), np.broadcast_to(images, (10, 3, 28, 28)))
    assert found.labels.tolist() == [k % 4 for k in range(10)]


def test_arrays_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, x_train=np.zeros(2), y_train=np.zeros(2))
    with pytest.raises(CorruptImagesError, match="no train_images and no train_labels among x_train, y_train"):
        load_images(f"file:{path}", "train")
    np.savez(path, train_images=np.zeros((2, 28, 28, 28), np.uint8), train_labels=np.zeros(2))
    with pytest.raises(CorruptImagesError, match=r"must be uint8 \(N, H, W\).*got uint8 \(2, 28, 28, 28\)"):
        load_images(f"file:{path}", "train")
    np.save(tmp_path / "a.npy", np.zeros(2))
    with pytest.raises(CorruptImagesError, match=r"a\.npy cannot be read as an \.npz file"):
        load_images(f"file:{tmp_path / 'a.npy'}", "train")
    np.savez_compressed(path, train_images=RNG.integers(0, 256, (9, 1, 9, 9), dtype=np.uint8), train_labels=np.zeros(9))
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(CorruptImagesError, match=r"a\.npz cannot be read"):
        load_images(f"file:{path}", "train")


# sources without a prefix


def test_a_path_alone_suggests_its_prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    for given, near in {
        "/data/pets": "folder:/data/pets",
        "./digits": "folder:./digits",
        "~/set.npz": "file:~/set.npz",
        "set.npz": "file:set.npz",
        "pictures": "folder:pictures",
        "CIFAR10": "cifar10",
    }.items():
        with pytest.raises(UnknownSourceError) as caught:
            parse_source(given)
        assert f"did you mean '{near}'?" in str(caught.value)
    with pytest.raises(UnknownSourceError, match=f"did you mean 'folder:{tmp_path}'"):
        SameClass(str(tmp_path))
    with pytest.raises(UnknownSourceError, match="did you mean 'folder'"):
        parse_source("folder:")
    (tmp_path / "set.npz").write_bytes(b"")
    with pytest.raises(ImagesNotFoundError, match=r"write file:.*set\.npz"):
        load_images(f"folder:{tmp_path / 'set.npz'}", "train")
    with pytest.raises(ImagesNotFoundError, match=r"write folder:.*pictures"):
        load_images(f"file:{tmp_path / 'pictures'}", "train")


def test_the_command_line_suggests_the_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["make-data", "export", "--data", "SameClass", f"--data.source={tmp_path}", f"--out={tmp_path / 'out'}"])
    assert f"did you mean 'folder:{tmp_path}'" in capsys.readouterr().err


# export


def test_lines_of_the_page_on_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("sklearn")
    root = Path(__file__).parent.parent
    text = (root / "data" / "README.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("lightning-locality ")]
    assert len(lines) == 12
    monkeypatch.chdir(root)
    for line in lines:
        with pytest.raises(SystemExit) as stop:
            main([*shlex.split(line)[1:], "--print_config"])
        assert stop.value.code == 0
        task = line.partition("--data ")[2].split()[0]
        assert f"class_path: lightning_locality.{task}\n" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    (block,) = (block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "export" in block)
    exec(compile(block, "data/README.md", "exec"), {})
    assert len(load_images("folder:digits", "train").labels) == 200


def read_back(source: str, split: str) -> dict[bytes, int]:
    images, labels = load_images(source, split, channels=1)  # type: ignore[arg-type]
    return {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}


def test_pathfinder_is_written_and_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_default_dtype(torch.float32)
    counts = {"train": 20, "validation": 8, "test": 10}
    given = {"path_length": 3, "root": tmp_path, **counts}
    for name in ("png", "set.npz"):
        options = [f"--data.{key}={value}" for key, value in given.items()]
        main(["make-data", "export", "--data=Pathfinder", *options, f"--out={tmp_path / name}"])
    assert f"as a source it is folder:{tmp_path / 'png'}\n" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "png" / "test").iterdir()} == {"0_not_connected", "1_connected"}
    data = Pathfinder(**given)  # type: ignore[arg-type]
    for split in SPLITS:
        images, labels = map(np.array, data.store(split).load())
        written = {image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
        assert len(written) == counts[split]
        for source in (f"folder:{tmp_path / 'png'}", f"file:{tmp_path / 'set.npz'}"):
            assert read_back(source, split) == written
    # the same batches, whichever way
    again = PermutedImages(f"folder:{tmp_path / 'png'}", image_size=150, channels=1, scramble=0.0, batch_size=20)
    own, twin = (module.batch("train")[0].flatten(1).sum(1).sort().values for module in (data, again))
    assert torch.allclose(own, twin, rtol=0, atol=0.1)


@pytest.mark.parametrize("task", [SameClass, IsGreater])
@pytest.mark.parametrize("background", ["mean", "black"])
def test_pairs_are_written_and_read_back(tmp_path: Path, task: Any, background: str) -> None:
    pytest.importorskip("sklearn")
    options: dict[str, Any] = {
        "image_size": 8,
        "canvas": (8, 24),
        "distance": 8,
        "train": 30,
        "validation": 12,
        "test": 9,
    }
    data = task("digits", background=background, batch_size=7, **options)
    data.export(tmp_path / "new" / "pairs")
    data.export(str(tmp_path / "pairs.npz"))
    mean = round(float(data.images("train").images.double().mean())) if background == "mean" else 0
    for split in SPLITS:
        pairs, digits = data.pairs(split), data.images(data.part(split)).images
        written: dict[bytes, int] = {}
        for left, right, label in zip(*pairs, strict=True):
            canvas: Tensor = torch.full((1, 8, 24), mean, dtype=torch.uint8)
            canvas[..., :8], canvas[..., 16:] = digits[left], digits[right]
            written[canvas.numpy().tobytes()] = int(label)
        for source in (f"folder:{tmp_path / 'new' / 'pairs'}", f"file:{tmp_path / 'pairs.npz'}"):
            assert read_back(source, split) == written


def test_an_export_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    options: dict[str, Any] = {"image_size": 8, "canvas": (8, 16), "distance": 0, "validation": 4, "test": 4}
    with pytest.raises(ValueError, match=r"would have no training image of .*raise train, or write \.npz"):
        SameClass("digits", train=1, **options).export(tmp_path / "one")
    data = SameClass("digits", train=20, **options)
    monkeypatch.setattr(Image.Image, "save", None)
    with pytest.raises(TypeError):
        data.export(tmp_path / "cut")
    monkeypatch.undo()
    for name in ("arrays.npy", "pictures.ZIP", "a.png"):
        with pytest.raises(ValueError, match=rf"{name} would be a folder: write arrays to a name that ends in \.npz"):
            data.export(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    data.export(tmp_path / "whole")
    data.export(tmp_path / "whole.npz")
    for name in ("whole", "whole.npz"):
        with pytest.raises(FileExistsError, match="exists: delete it or choose another name"):
            data.export(tmp_path / name)
    # without validation images of its own, it is still read
    shared = SameClass("digits", train=20, validation_is_test=True, **options)
    shared.export(tmp_path / "shared")
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == ["test", "train"]


def test_classes_in_tens_keep_their_labels(tmp_path: Path) -> None:
    write_set(tmp_path / "in", {f"kind {k:02}": 5 for k in range(12)})
    data = PermutedImages(f"folder:{tmp_path / 'in'}", image_size=4, scramble=0.0, classes=list(range(1, 12)))
    data.export(tmp_path / "out")
    images, labels = load_images(f"folder:{tmp_path / 'out'}", "test")
    assert torch.equal(images[:, 0, 0, 0] // 5 - 1, labels)
