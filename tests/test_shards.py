"""Files for other libraries, read by the plain readers of their formats."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lightning_locality import Pathfinder, SameClass
from lightning_locality.cli import main
from lightning_locality.datamodules import shards
from lightning_locality.datamodules.base import AbstractImageDataModule
from lightning_locality.datamodules.pathfinder import make_pathfinder
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves

TINY = PathfinderCurves(2, 96, 32, padding=6, seed_distance=13, paddle_length=4, margin=2, distractors=1)
COUNTS: dict[str, Any] = {"train": 11, "validation": 3, "test": 5}
PAIRS: dict[str, Any] = {"source": "digits", "image_size": 8, "canvas": (8, 24), "distance": 8}


def pathfinder(root: Path) -> Pathfinder:
    return Pathfinder(root=root, curves=TINY, batch_size=4, workers=1, **COUNTS)


def digests(root: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.iterdir())}


@pytest.fixture
def few_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "PER_SHARD", 5)
    monkeypatch.setattr(shards, "PER_GROUP", 2)


def decode(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.mark.usefixtures("few_in_a_file")
def test_webdataset(tmp_path: Path) -> None:
    data = pathfinder(tmp_path)
    data.export(tmp_path / "out", "webdataset")
    names = [*(f"train-{shard:06}.tar" for shard in range(3)), "test-000000.tar", "validation-000000.tar"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    number, (images, labels) = 0, data.store("train").load()
    for shard in range(3):
        with tarfile.open(tmp_path / "out" / f"train-{shard:06}.tar") as tar:
            members = tar.getmembers()
            assert all((member.mtime, member.uid, member.uname) == (0, 0, "") for member in members)
            # the files of a sample are neighbours, with everything before the first dot as key
            for first, second in zip(members[::2], members[1::2], strict=True):
                assert (first.name, second.name) == (f"{number:08}.cls", f"{number:08}.png")
                assert int(tar.extractfile(first).read()) == labels[number]  # type: ignore[union-attr]
                assert np.array_equal(decode(tar.extractfile(second).read()), images[number])  # type: ignore[union-attr]
                number += 1
    assert number == 11


@pytest.mark.usefixtures("few_in_a_file")
def test_parquet(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    data = pathfinder(tmp_path)
    data.export(tmp_path / "out", "parquet")
    names = [f"train-{shard:05}-of-00003.parquet" for shard in range(3)]
    names += ["test-00000-of-00001.parquet", "validation-00000-of-00001.parquet"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(names)
    rows = [row for name in names[:3] for row in pq.read_table(tmp_path / "out" / name).to_pylist()]
    images, labels = data.store("train").load()
    assert [row["label"] for row in rows] == labels.tolist()
    assert all(np.array_equal(decode(row["image"]["bytes"]), image) for row, image in zip(rows, images, strict=True))
    expected = {"seed": 0, **TINY.parameters()}
    assert {name: rows[4][name] for name in expected} == expected
    file = pq.ParquetFile(tmp_path / "out" / names[0])
    assert file.num_row_groups == 3
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == file.schema_arrow.names
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"_type": "ClassLabel", "names": ["not connected", "connected"]}
    assert features["margin"]["dtype"] == "int64"


@pytest.mark.usefixtures("few_in_a_file")
@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_bytes_are_the_same_again(tmp_path: Path, kind: Any) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    for name, batch_size in (("one", 4), ("two", 7)):
        data = pathfinder(tmp_path)
        data.batch_size = batch_size
        data.export(tmp_path / name, kind)
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_parquet_of_pairs(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    pq = pytest.importorskip("pyarrow.parquet")
    data = SameClass(**PAIRS, **COUNTS)
    data.export(tmp_path / "out", "parquet")
    table = pq.read_table(tmp_path / "out" / "test-00000-of-00001.parquet").to_pylist()
    assert [row["label"] for row in table] == data.pairs("test").label.tolist()
    assert (table[0]["source"], table[0]["distance"], table[0]["canvas"]) == ("digits", 8, "[8, 24]")
    assert not {"root", "batch_size", "download"} & set(table[0])


def test_make_data_writes_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    given = {"root": tmp_path, "path_length": 2, **COUNTS, "curves.size": 32, "curves.window": 128, "curves.padding": 6}
    given |= {"curves.seed_distance": 13}
    options = [f"--{name}={value}" for name, value in given.items()]
    for kind, out, said in (
        ("png", "png", "as a source it is folder:"),
        ("npz", "set.npz", "as a source it is file:"),
        ("webdataset", "tars", "webdataset.WebDataset reads"),
        ("parquet", "parquet", "datasets.load_dataset("),
    ):
        main(["make-data", "pathfinder", *options, f"--format={kind}", f"--out={tmp_path / out}"])
        assert said in capsys.readouterr().out
        assert (tmp_path / out).exists()
    assert len(list((tmp_path / "pathfinder").iterdir())) == 3


def test_wrong_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pathfinder(tmp_path)
    for out, kind, message in (
        ("a", "hdf5", "format must be 'png', 'npz', 'webdataset', 'parquet' or None, got 'hdf5'"),
        ("a", "npz", r"out must end in \.npz"),
        ("a.npz", "parquet", r"a\.npz would be a folder"),
        ("a.parquet", "parquet", r"a\.parquet would be a folder"),
    ):
        with pytest.raises(ValueError, match=message):
            data.export(tmp_path / out, kind)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="format='parquet' needs out=FOLDER"):
        make_pathfinder("parquet")
    with pytest.raises(ValueError, match="format='npy' is written under root: leave out out=FOLDER"):
        make_pathfinder(out="here")

    def broken(self: AbstractImageDataModule, split: str) -> Any:
        yield from []
        raise OSError("disk full")

    monkeypatch.setattr(Pathfinder, "_samples", broken)
    for kind in ("webdataset", "parquet"):
        with pytest.raises(OSError, match="disk full"):
            data.export(tmp_path / "cut", kind)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["pathfinder"]
