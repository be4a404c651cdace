"""Trees of Pathfinder pictures as the Long Range Arena has them: imgs/ and the rows of metadata/."""

from __future__ import annotations

__all__: list[str] = []

from pathlib import Path

import numpy as np
from pytorch_lightning.utilities import rank_zero_info

from lightning_locality.datamodules.image_files import CorruptImagesError, ImagesNotFoundError, in_order

MAGIC = b"\x93NUMPY"


def list_tree(root: Path) -> list[tuple[Path, int]]:
    """Pictures and labels by the files in ``root``/metadata, in the order of their numbers and rows.

    Empty pictures are left out, as is usual: the published easy set of 32 pixels has one.
    """
    names = [path.stem for path in (root / "metadata").glob("*.npy")]
    if not names:
        trees = " or ".join(f"lra:{path.parent}" for path in sorted(root.glob("*/metadata")))
        hint = f"use {trees}" if trees else "source lra needs metadata/*.npy and imgs/"
        raise ImagesNotFoundError(f"no rows in {root / 'metadata'}: {hint}")
    found, empty = [], 0
    for name in in_order(names):
        file = root / "metadata" / f"{name}.npy"
        for number, row in enumerate(_rows(file), 1):
            path, label = _parse(row, root, f"{file}, row {number}")
            if path.stat().st_size:
                found.append((path, label))
            else:
                empty += 1
    if empty:
        rank_zero_info(f"{root}: left out {empty} empty pictures")
    if not found:
        raise ImagesNotFoundError(f"no pictures in the rows of {root / 'metadata'}")
    return found


def _rows(file: Path) -> list[list[str]]:
    """Values of the rows: of text, for all that the name says, or of an array of text."""
    try:
        with file.open("rb") as stream:
            if stream.read(len(MAGIC)) == MAGIC:
                stream.seek(0)
                array = np.load(stream)
                return [list(map(str, row)) for row in array.astype(str).reshape(len(array), -1)]
        return [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
    except (ValueError, OSError) as error:
        raise CorruptImagesError(f"{file} is neither text nor an array of text ({error})") from error


def _parse(row: list[str], root: Path, where: str) -> tuple[Path, int]:
    if len(row) < 4 or row[3] not in ("0", "1"):
        raise CorruptImagesError(
            f"{where}, must begin with folder, file, number and label (0 or 1), as in 'imgs/0 sample_0.png 0 1', "
            f"got {' '.join(row)[:80]!r}: correct or remove it"
        )
    path = root / row[0] / row[1]
    if not path.is_file():
        raise ImagesNotFoundError(f"{where}, names {path}, which is missing: add it or remove the row")
    return path, int(row[3])
