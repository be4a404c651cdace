"""Existing sets of Pathfinder pictures: trees of the Long Range Arena, and folders of positives and negatives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_locality import PermutedImages
from lightning_locality.datamodules.image_files import CorruptImagesError, ImagesNotFoundError
from lightning_locality.datamodules.image_sets import load_images

COUNT = 60


def write_tree(root: Path, *, text: bool = True) -> dict[int, int]:
    """A tree of two batches, of which picture k is grey with value k; returns the labels by these values."""
    labels = {}
    for batch in ("0", "10"):
        folder, rows = root / "imgs" / batch, []
        folder.mkdir(parents=True)
        for number in range(COUNT // 2):
            value = len(labels)
            labels[value] = int(value % 3 == 0)
            Image.new("L", (16, 16), value).save(folder / f"sample_{number}.png")
            # then continuity, lengths, thickness, margin and contrasts
            rows.append(f"imgs/{batch} sample_{number}.png {number} {labels[value]} 1.8 14 4 5 1.5 3 0.9 0.75".split())
        (root / "metadata").mkdir(exist_ok=True)
        file = root / "metadata" / f"{batch}.npy"
        if text:
            file.write_text("".join(" ".join(row) + "\n" for row in rows))
        else:
            np.save(file, np.array(rows))
    return labels


@pytest.mark.parametrize("text", [True, False])
def test_parts_are_disjoint_and_labelled(tmp_path: Path, text: bool) -> None:
    labels, seen = write_tree(tmp_path, text=text), []
    for part, size in (("train", 48), ("validation", 6), ("test", 6)):
        images, read = load_images(f"lra:{tmp_path}", part)  # type: ignore[arg-type]
        assert (images.shape, images.dtype) == ((size, 1, 16, 16), torch.uint8)
        values = images[:, 0, 3, 5].tolist()
        assert read.tolist() == [labels[value] for value in values]
        assert sum(read.tolist()) == size // 3
        seen += values
    assert sorted(seen) == list(range(COUNT))


def test_tasks_take_a_tree(tmp_path: Path) -> None:
    write_tree(tmp_path)
    data = PermutedImages(f"lra:{tmp_path}", scramble=0, image_size=16)
    images, labels = data.batch("validation")
    assert (images.shape, data.num_classes, labels.shape) == ((6, 1, 16, 16), 2, (6,))
    assert [data.size(split) for split in ("train", "validation", "test") if data.batch(split)] == [48, 6, 6]


def test_an_empty_picture_is_left_out(tmp_path: Path) -> None:
    write_tree(tmp_path)
    (tmp_path / "imgs" / "0" / "sample_7.png").write_bytes(b"")
    values = [load_images(f"lra:{tmp_path}", part)[0] for part in ("train", "validation", "test")]  # type: ignore[arg-type]
    assert sorted(torch.cat(values)[:, 0, 0, 0].tolist()) == [value for value in range(COUNT) if value != 7]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("imgs/0 sample_0.png 0", r"0\.npy, row 1, must begin with folder, file, number and label.*got 'imgs/0 sample"),
        ("imgs/0 sample_0.png 0 2 1.8", r"row 1, must begin with .*label \(0 or 1\)"),
        ("imgs/0 sample_99.png 0 1 1.8", r"row 1, names .*sample_99\.png, which is missing: add it or remove the row"),
    ],
)
def test_wrong_rows_are_named(tmp_path: Path, row: str, message: str) -> None:
    write_tree(tmp_path)
    (tmp_path / "metadata" / "0.npy").write_text(f"{row}\n")
    with pytest.raises((CorruptImagesError, ImagesNotFoundError), match=message):
        load_images(f"lra:{tmp_path}", "train")


def test_wrong_trees_say_what_to_do(tmp_path: Path) -> None:
    tree = tmp_path / "curv_contour_length_14"
    write_tree(tree)
    (tmp_path / "curv_baseline" / "metadata").mkdir(parents=True)
    with pytest.raises(ImagesNotFoundError, match=r"use lra:.*curv_baseline or lra:.*curv_contour_length_14"):
        load_images(f"lra:{tmp_path}", "train")
    with pytest.raises(ImagesNotFoundError, match=r"source lra needs metadata/\*\.npy and imgs/"):
        load_images(f"lra:{tmp_path / 'none'}", "train")
    with pytest.raises(CorruptImagesError, match=f"use lra:{tree}"):
        load_images(f"folder:{tree}", "train")
    (tree / "metadata" / "0.npy").write_bytes(b"\x93NUMPY\x01")
    with pytest.raises(CorruptImagesError, match=r"0\.npy is neither text nor an array of text"):
        load_images(f"lra:{tree}", "train")


def test_folders_of_negatives_and_positives(tmp_path: Path) -> None:
    for name, value in (("pos", 200), ("neg", 50)):
        (tmp_path / name).mkdir()
        for number in range(10):
            Image.new("L", (8, 8), value + number).save(tmp_path / name / f"{number}.png")
    parts: Any = [load_images(f"folder:{tmp_path}", part, channels=1) for part in ("train", "test")]
    for images, labels in parts:
        assert torch.equal((images[:, 0, 0, 0] >= 200).long(), labels)
    assert [len(labels) for _, labels in parts] == [16, 4]
