from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_locality.datamodules.pathfinder import store as module
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import draw
from lightning_locality.datamodules.pathfinder.store import CorruptStoreError, PictureStore

TINY = PathfinderCurves(2, 96, 32, padding=6, seed_distance=13, paddle_length=4, margin=2, distractors=1)
COUNT = 10


def new_store(folder: Path, seed: int = 0) -> PictureStore:
    return PictureStore(folder, TINY, seed, "train", COUNT)


def stored(folder: Path, seed: int = 0) -> PictureStore:
    store = new_store(folder, seed)
    store.generate(workers=1)
    return store


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read_by_the_package_and_by_numpy(tmp_path: Path) -> None:
    store = stored(tmp_path / "new" / "folder", seed=3)
    images, labels, _ = draw(TINY, 3, "train", range(COUNT), False)
    mapped, mapped_labels = store.load()
    assert isinstance(mapped, np.memmap)
    assert store.header()[:2] == pytest.approx((images.mean() / 255, images.std() / 255), rel=1e-12)
    for name, mine, expected in (("images", mapped, images), ("labels", mapped_labels, labels)):
        assert np.array_equal(mine, expected)
        plain = np.load(store.folder / f"{name}.npy", mmap_mode="r")
        assert plain.dtype == np.uint8
        assert np.array_equal(plain, expected)
    header = json.loads((store.folder / "pathfinder.json").read_text())
    assert (header["seed"], header["split"], header["shape"]) == (3, "train", [COUNT, 32, 32])
    assert header["parameters"] == TINY.parameters() | {"process": 1}
    for name, digest in header["sha256"].items():
        assert digest == hashlib.sha256((store.folder / name).read_bytes()).hexdigest()


def test_targets_are_stored_beside_the_same_pictures(tmp_path: Path) -> None:
    plain, store = stored(tmp_path), replace(new_store(tmp_path), targets=True)
    store.generate(workers=1)
    assert store.folder != plain.folder
    images, labels, targets = draw(TINY, 0, "train", range(COUNT))
    for mine, expected in zip(store.load(), (images, labels, *targets), strict=True):
        assert np.array_equal(mine, expected)
    for mine, expected in zip(store.load(), plain.load(), strict=False):
        assert np.array_equal(mine, expected)


def children() -> list[str]:
    """Command lines of the processes that this one has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.append((path / "cmdline").read_text())
        except (OSError, ValueError):
            continue
    return [command for command in found if "popen_loky" in command]


def test_processes_do_not_matter_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = stored(tmp_path / "one")
    monkeypatch.setattr(module, "at_once", lambda curves: 3)
    several = new_store(tmp_path / "several")
    several.generate(workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "several")
    assert not children()
    with pytest.raises(KeyError, match="no split"):
        replace(several, root=tmp_path / "none", split="no split").generate(workers=2)
    assert not contents(tmp_path / "none")
    assert not children()
    assert one.load()[0].shape == (COUNT, 32, 32)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CUT = "that was altered or truncated"
DAMAGES: list[tuple[str, Callable[[Path], Any], str]] = [
    *(("images.npy", lambda path, at=at: flip(path, at), CUT) for at in (0, 60, 200, -1)),
    ("labels.npy", lambda path: flip(path, -1), CUT),
    ("images.npy", lambda path: path.write_bytes(path.read_bytes()[:-1]), CUT),
    ("images.npy", lambda path: path.write_bytes(path.read_bytes() + b"\0"), CUT),
    ("labels.npy", lambda path: path.write_bytes(b""), CUT),
    ("images.npy", Path.unlink, "has lost images.npy"),
    ("labels.npy", Path.unlink, "has lost labels.npy"),
    *(
        ("pathfinder.json", lambda path, text=text: path.write_bytes(text), "cannot be read")
        for text in (b"", b"{", b"[]", b"{}", b"\xff\xfe\x00")
    ),
    ("pathfinder.json", lambda path: edit(path, mean="?"), "cannot be read"),
    ("pathfinder.json", lambda path: edit(path, sha256={}), CUT),
    ("pathfinder.json", lambda path: edit(path, seed=1), r"was made with other parameters \(seed\)"),
    ("pathfinder.json", lambda path: edit(path, shape=[COUNT, 16, 64]), r"other parameters \(shape\)"),
    ("pathfinder.json", lambda path: edit(path, parameters={}), r"other parameters \(parameters\)"),
    ("pathfinder.json", lambda path: edit(path, format=3), "has format 3, this version of the package reads 2"),
]


def test_damage_is_found_and_repaired(tmp_path: Path) -> None:
    sound = stored(tmp_path / "sound")
    expected = contents(tmp_path / "sound")
    for number, (name, damage, message) in enumerate(DAMAGES):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "sound", root)
        store = new_store(root)
        store.load()
        damage(store.folder / name)
        with pytest.raises(CorruptStoreError, match=rf"length2-train-seed0-10-\w+ .*{message}.*; delete it, or let"):
            store.load()
        store.generate(workers=1)
        assert contents(root) == expected
    (sound.folder / "pathfinder.json").unlink()
    with pytest.raises(FileNotFoundError):
        sound.load()
    sound.generate(workers=1)
    assert contents(tmp_path / "sound") == expected


def test_readers_are_not_disturbed_by_a_repair(tmp_path: Path) -> None:
    store = stored(tmp_path)
    mapped = store.load()[0]
    (store.folder / "labels.npy").unlink()
    store.generate(workers=1)
    assert np.array_equal(mapped, store.load()[0])


@pytest.mark.parametrize("function", ["numpy.save", "pathlib.Path.write_text", "pathlib.Path.rename"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    stored(tmp_path, seed=1)
    kept = contents(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(function, full)
    message = r"train-seed2.* could not be written \(0 MB needed\): no space left on the disk; nothing was left behind"
    with pytest.raises(OSError, match=message) as raised:
        stored(tmp_path, seed=2)
    assert raised.value.errno == errno.ENOSPC
    assert contents(tmp_path) == kept


def test_pictures_that_exceed_the_limit_of_a_file(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not be written .*File too large"):
            stored(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    write, calls = module._write_pictures, iter(range(9))

    def broken(*args: Any) -> Any:
        if next(calls) == 2:
            raise error
        return write(*args)

    monkeypatch.setattr(module, "at_once", lambda curves: 3)
    monkeypatch.setattr(module, "_write_pictures", broken)
    with pytest.raises(error):
        stored(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damaged", [False, True])
def test_two_writers_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool) -> None:
    expected = contents(stored(tmp_path / "alone").folder)
    store = new_store(tmp_path / "both")
    if damaged:
        store.generate(workers=1)
        flip(store.folder / "images.npy", -1)
    barrier, install, errors = threading.Barrier(2), PictureStore._install, []

    def in_step(self: PictureStore, part: Path) -> None:
        barrier.wait()
        install(self, part)

    def run() -> None:
        try:
            store.generate(workers=1)
            assert contents(store.folder) == expected
        except BaseException as error:
            errors.append(error)

    monkeypatch.setattr(PictureStore, "_install", in_step)
    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert os.listdir(tmp_path / "both") == [store.folder.name]


def test_leftovers_of_killed_processes(tmp_path: Path) -> None:
    store = new_store(tmp_path)
    old, fresh = (tmp_path / f".{store.folder.name}.{token}.part" for token in ("aaaa", "bbbb"))
    for path in (old, fresh):
        path.mkdir()
        (path / "images.npy").write_bytes(b"half")
    os.utime(old, (0, 0))
    store.generate(workers=1)
    assert not old.exists()
    assert fresh.exists()  # may belong to a process that is still writing
