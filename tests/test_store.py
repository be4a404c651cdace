from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_locality.datamodules.pathfinder.store import CorruptFileError, ImageFile

Chunk = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]
SHAPE = (10, 6, 7)


def content(seed: int = 0) -> Chunk:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, SHAPE, dtype=np.uint8), rng.integers(0, 2, SHAPE[0], dtype=np.uint8)


def chunks(seed: int = 0, size: int = 4) -> Iterator[Chunk]:
    images, labels = content(seed)
    for start in range(0, len(images), size):
        yield images[start : start + size], labels[start : start + size]


def stored(folder: Path, seed: int = 0, **parameters: Any) -> ImageFile:
    file = ImageFile(folder / "some-set.json", parameters or {"a": 1}, SHAPE)
    file.write(chunks(seed))
    return file


def data_of(file: ImageFile) -> Path:
    (data,) = file.path.parent.glob("some-set.*.npy")
    return data


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = stored(tmp_path / "new" / "folder")
    images, labels = content()
    read = file.load()
    assert np.array_equal(read.images, images)
    assert np.array_equal(read.labels, labels)
    assert isinstance(read.images.base, np.memmap) or isinstance(read.images, np.memmap)
    assert read.mean == pytest.approx(images.mean() / 255, rel=1e-12)
    assert read.std == pytest.approx(images.std() / 255, rel=1e-12)


def test_sidecar_tells_what_the_data_are(tmp_path: Path) -> None:
    file = ImageFile(tmp_path / "some-set.json", {"length": 9, "seed": 3}, SHAPE)
    file.write(chunks())
    header = json.loads(file.path.read_text())
    assert header["parameters"] == {"length": 9, "seed": 3}
    assert header["shape"] == list(SHAPE)
    assert header["sha256"] == hashlib.sha256(data_of(file).read_bytes()).hexdigest()
    assert np.load(data_of(file)).shape == (10 * 6 * 7 + 10,)


def test_bytes_do_not_depend_on_chunks(tmp_path: Path) -> None:
    first, second = (ImageFile(tmp_path / name / "some-set.json", {}, SHAPE) for name in "ab")
    first.write(chunks(size=3))
    second.write(chunks(size=10))
    assert data_of(first).read_bytes() == data_of(second).read_bytes()
    assert first.path.read_bytes() == second.path.read_bytes()


@pytest.mark.parametrize("position", [0, 60, 200, -1])
def test_altered_byte(tmp_path: Path, position: int) -> None:
    file = stored(tmp_path)
    file.load()
    data = bytearray(data_of(file).read_bytes())
    data[position] ^= 1
    data_of(file).write_bytes(data)
    with pytest.raises(CorruptFileError, match="altered or cut short"):
        file.load()


def test_truncated_and_lengthened(tmp_path: Path) -> None:
    file = stored(tmp_path)
    data = data_of(file).read_bytes()
    for other in (data[:-1], data[:100], b"", data + b"\0"):
        data_of(file).write_bytes(other)
        with pytest.raises(CorruptFileError, match="altered or cut short"):
            file.load()
    data_of(file).unlink()
    with pytest.raises(CorruptFileError, match="lost its data file"):
        file.load()


def test_altered_sidecar(tmp_path: Path) -> None:
    file = stored(tmp_path)
    text = file.path.read_text()
    mean = f'"mean": {json.loads(text)["mean"]}'
    altered = [text.replace(mean, '"mean": 0.5'), text[:50], "", "[]", "{}", "\ud7ff", text.replace(".npy", "")]
    for other in altered:
        assert other != text
        file.path.write_text(other)
        with pytest.raises(CorruptFileError, match="some-set"):
            file.load()
    file.path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CorruptFileError, match="cannot be read"):
        file.load()
    file.path.write_text(text)
    file.load()


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ImageFile(tmp_path / "none.json", {}, SHAPE).load()


def test_other_parameters_shape_and_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = stored(tmp_path)
    for other in (ImageFile(file.path, {"a": 2}, SHAPE), ImageFile(file.path, {"a": 1}, (5, 12, 7))):
        with pytest.raises(CorruptFileError, match="other parameters"):
            other.load()
    monkeypatch.setattr("lightning_locality.datamodules.pathfinder.store.FORMAT", 2)
    with pytest.raises(CorruptFileError, match="format 1"):
        file.load()


class FullDisk:
    """Raises ENOSPC at the n-th call of a function."""

    def __init__(self, function: Any, call: int) -> None:
        self.function, self.left = function, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("function", "call"), [("fsync", 0), ("fsync", 1), ("replace", 0), ("replace", 1)])
def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, function: str, call: int) -> None:
    if before:
        old = stored(tmp_path, seed=1)
    kept = names(tmp_path)
    monkeypatch.setattr(os, function, FullDisk(getattr(os, function), call))
    with pytest.raises(OSError, match=r"some-set\.json could not be written .*no space left") as raised:
        stored(tmp_path, seed=2)
    assert raised.value.errno == errno.ENOSPC
    assert names(tmp_path) == kept
    if before:
        assert np.array_equal(old.load().images, content(1)[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, OSError(errno.ENOSPC, "full")])
def test_interrupted_write(tmp_path: Path, error: type[BaseException] | BaseException) -> None:
    def broken() -> Iterator[Chunk]:
        yield from list(chunks())[:2]
        raise error

    old = stored(tmp_path, seed=1)
    kept = names(tmp_path)
    with pytest.raises(error if isinstance(error, type) else OSError):
        old.write(broken())
    assert names(tmp_path) == kept
    assert np.array_equal(old.load().images, content(1)[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_write_to_a_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda self, mode="r": opened(Path("/dev/full"), mode.replace("x", "w")))
    with pytest.raises(OSError, match="no space left"):
        stored(tmp_path)
    assert names(tmp_path) == []


def test_rewritten_after_damage_and_older_data_removed(tmp_path: Path) -> None:
    file = stored(tmp_path, seed=1)
    mapped = file.load().images
    data_of(file).rename(tmp_path / "some-set.0123456789ab.npy")
    with pytest.raises(CorruptFileError):
        file.load()
    file.write(chunks(2))
    assert np.array_equal(file.load().images, content(2)[0])
    assert len(names(tmp_path)) == 2
    assert np.array_equal(mapped, content(1)[0])  # a reader of the old file is not disturbed


def test_two_writers_at_once(tmp_path: Path) -> None:
    file = ImageFile(tmp_path / "some-set.json", {}, SHAPE)
    barrier = threading.Barrier(2)

    def in_step() -> Iterator[Chunk]:
        for chunk in chunks():
            barrier.wait()
            yield chunk

    threads = [threading.Thread(target=lambda: file.write(in_step())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(file.load().images, content()[0])
    assert len(names(tmp_path)) == 2


def test_leftovers_of_killed_processes(tmp_path: Path) -> None:
    old, fresh = tmp_path / ".some-set.aaaa.part", tmp_path / ".some-set.bbbb.part"
    for path in (old, fresh):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    stored(tmp_path)
    assert not old.exists()
    assert fresh.exists()  # may belong to a process that is still writing


def test_wrong_chunks_and_arguments(tmp_path: Path) -> None:
    file = ImageFile(tmp_path / "some-set.json", {}, SHAPE)
    images, labels = content()
    for wrong in ([(images[:4], labels[:4])], [(images, labels), (images, labels)], []):
        with pytest.raises(ValueError, match=r"is for 10 images|need at least one"):
            file.write(wrong)
    with pytest.raises(ValueError, match="chunks must be bytes"):
        file.write([(images.astype(float), labels)])
    with pytest.raises(ValueError, match="chunks must be bytes"):
        file.write([(images, labels[:3])])
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match=r"end in \.json"):
        ImageFile(tmp_path / "x.npy", {}, SHAPE)
    with pytest.raises(ValueError, match="shape"):
        ImageFile(tmp_path / "x.json", {}, (0, 6, 7))
