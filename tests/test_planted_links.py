"""Nothing is written through a link that somebody planted, nor outside the folder of a sweep."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from lightning_locality.callbacks.resume import AtomicCheckpointIO
from lightning_locality.datamodules.image_files import write_images
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.store import PictureStore
from lightning_locality.datamodules.shards import write_shards
from lightning_locality.plotting.style import save_figure
from lightning_locality.results import atomic_write
from lightning_locality.sweep_file import SweepFile


def text(path: Path) -> None:
    with atomic_write(path) as file:
        file.write("new")


def figure(path: Path) -> None:
    save_figure(Figure((1, 1)), path.with_suffix(""))


def checkpoint(path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)


def export(path: Path) -> None:
    images, labels = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    if path.suffix == ".tar":
        write_shards(path, "webdataset", {"train": [(images, labels)]}, {"train": 4}, ["a", "b"], {})
    else:
        write_images(path, {"train": [(images, labels)]}, ["a", "b"])


@pytest.mark.parametrize("at_folder", [False, True])
@pytest.mark.parametrize(
    ("write", "name", "temporary"),
    [
        (text, "results.csv", "results.csv.part"),
        (figure, "curves.png", "curves.png.part"),
        (figure, "curves.pdf", "curves.pdf.part"),
        (checkpoint, "last.ckpt", "last.ckpt.part"),
        (export, "images.npz", ".part-images.npz"),
        (export, "images", ".part-images"),
        (export, "images.tar", ".part-images.tar"),
    ],
)
def test_a_link_at_the_temporary_name_is_removed(
    tmp_path: Path, write: Callable[[Path], None], name: str, temporary: str, at_folder: bool
) -> None:
    victim = tmp_path / "victim"
    if at_folder:
        victim.mkdir()
    else:
        victim.write_text("old")
    out = tmp_path / "out"
    out.mkdir()
    (out / temporary).symlink_to(victim)
    write(out / name)
    assert list(victim.iterdir()) == [] if at_folder else victim.read_text() == "old"
    assert (out / name).exists()
    assert not any(path.is_symlink() for path in out.iterdir())
    assert not (out / temporary).exists()


@pytest.mark.parametrize("write", [text, checkpoint, figure])
def test_a_link_at_the_final_name_is_replaced(tmp_path: Path, write: Callable[[Path], None]) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file.png"
    victim.write_text("old")
    path.symlink_to(victim)
    write(path)
    assert victim.read_text() == "old"
    assert path.is_file()
    assert not path.is_symlink()


@pytest.mark.parametrize("write", [text, checkpoint])
def test_a_link_planted_again_is_refused(
    tmp_path: Path, write: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("old")
    (tmp_path / "file.part").symlink_to(victim)
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)  # as if planted just after
    with pytest.raises(FileExistsError):
        write(tmp_path / "file")
    assert victim.read_text() == "old"


def test_a_store_is_not_written_through_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 2 * n)
    curves = PathfinderCurves(2, 96, 32, padding=6, seed_distance=13, paddle_length=4, margin=2, distractors=1)
    store = PictureStore(tmp_path / "root", curves, 0, "train", 2)
    victim = tmp_path / "victim"
    victim.mkdir()
    store.root.mkdir()
    store.folder.with_name(f".{store.folder.name}.00000000.part").symlink_to(victim)
    with pytest.raises(OSError, match="could not be written"):
        store.generate(workers=1)
    assert list(victim.iterdir()) == []


def test_names_of_variants_stay_in_the_folder_of_the_sweep(tmp_path: Path) -> None:
    def folder(name: str, grid: dict[str, list[object]]) -> Path:
        (run,) = SweepFile(tmp_path / "a.yaml", variants={name: None}, grid=grid, out=tmp_path / "out").runs()
        return run.folder

    for name in ("", ".", "..", "...", ".lock", "results.csv"):
        with pytest.raises(ValueError, match=r"a\.yaml: variant '.*' cannot be the name of a folder"):
            folder(name, {})
    random = np.random.default_rng(0)
    for name in [
        "../../etc",
        "/etc",
        "~",
        "\0",
        "..\n",
        *("".join(random.choice([*"./\\a~ :"], 5)) for _ in range(50)),
    ]:
        for own in (folder(name, {"seed": [".."]}), folder(name, {}) if name.strip(".") else None):
            assert own is None or own.parent == tmp_path / "out"
            assert own is None or own.resolve().parent == (tmp_path / "out").resolve()
    # with a grid the name has more than dots
    assert folder("..", {"seed": [0]}).name == "..-seed=0"
