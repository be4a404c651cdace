"""Pathfinder: are two discs on the same dashed curve?"""

from __future__ import annotations

__all__ = ["Pathfinder", "make_pathfinder"]

import dataclasses
import hashlib
import json
import logging
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import get_args

import torch
from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from lightning_locality.datamodules.base import AbstractImageDataModule, Split
from lightning_locality.datamodules.pathfinder.dashes import Bytes
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.store import CorruptFileError, ImageFile, StoredImages, draw_in_order

PROCESS = 1  # goes up when the same parameters give other pictures
SPLITS: tuple[Split, ...] = get_args(Split)

_log = logging.getLogger(__name__)


class Pathfinder(AbstractImageDataModule):
    r"""Pictures of dashed curves and two discs; label 1 if the discs are the two ends of one curve.

    The task of the experiment in "Implicit Regularization in Hierarchical Tensor Factorization and Deep
    Convolutional Neural Networks" (Razin, Maman, Cohen, 2022), after "Learning long-range spatial dependencies with
    horizontal gated recurrent units" (Linsley, Kim, Veerabadran, Windolf, Serre, 2018), with pictures drawn by this
    package: the published process without the faults of its first program, in which a distractor could touch the
    last dash of one curve, the newest dashes of the two curves could touch each other, the place for a first dash
    was tested one pixel beside it, and test pictures were used for validation. ``prepare_data`` draws what is
    missing under ``root``/pathfinder (0.2 to 0.4 ms per picture and core, benchmarks/pathfinder.py);
    a file that is incomplete or altered is reported and drawn again. A picture depends on ``seed``, its split and
    its number alone. Images are ``(B, 1, size, size)`` in float32, normalised with the mean and standard deviation
    of the training split; labels are int64.

    Args:
        path_length: Dashes per curve; published: 3, 5, 7 and 9. None: that of ``curves``, 9 unless it says otherwise.
        train: Number of training pictures.
        validation: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the pictures and of the order of training batches, 0 to 2^32 - 1.
        root: Folder of the data.
        batch_size: Samples per step and process.
        workers: Processes that draw; None: one per usable core.
        curves: Everything else about the pictures; None: as published.
        validation_is_test: True, as published: validate on the test pictures (which makes a score that was chosen by
            validation worthless). False: on pictures of their own.
        drop_last: Leave out the last, smaller training batch of an epoch.

    Raises:
        ValueError: A number is out of its range, or curves do not fit in the picture.

    >>> Pathfinder(path_length=9, train=10_000, seed=0).image_shape
    (1, 150, 150)
    """

    def __init__(
        self,
        path_length: int | None = None,
        train: int = 10_000,
        validation: int = 2_000,
        test: int = 10_000,
        seed: int = 0,
        root: str | Path = "data",
        batch_size: int = 64,
        workers: int | None = None,
        curves: PathfinderCurves | None = None,
        validation_is_test: bool = False,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, drop_last=drop_last)
        curves = PathfinderCurves() if curves is None else curves
        self.curves = curves if path_length is None else dataclasses.replace(curves, path_length=path_length)
        for name, number in {"train": train, "validation": validation, "test": test}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a number of pictures of at least 1, got {number!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, or None for one per usable core, got {workers}")
        self.workers, self.validation_is_test = workers, validation_is_test
        self.folder = Path(root) / "pathfinder"
        self._counts: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        self._loaded: dict[Split, StoredImages] = {}
        self._mean, self._std = 0.0, 1.0

    @property
    def class_names(self) -> tuple[str, str]:
        """What the labels 0 and 1 mean."""
        return ("not connected", "connected")

    @property
    def num_classes(self) -> int:
        """Two: on different curves, on the same."""
        return 2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """One channel, ``size`` rows and columns."""
        return 1, self.curves.size, self.curves.size

    def size(self, split: Split) -> int:
        """Number of pictures of a split."""
        return self._counts[self._source(split)]

    def file(self, split: Split) -> ImageFile:
        """The stored pictures of a split; the name tells length, split, seed, number and a hash of all parameters."""
        source, shape = self._source(split), (self.size(split), self.curves.size, self.curves.size)
        parameters = self.curves.parameters() | {"process": PROCESS}
        digest = hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]
        name = f"length{self.curves.path_length}-{source}-seed{self.seed}-{shape[0]}-{digest}.json"
        return ImageFile(self.folder / name, parameters | {"seed": self.seed, "split": source}, shape)

    def prepare_data(self) -> None:
        """Draw the splits that are missing or not intact."""
        for split in dict.fromkeys(self._source(split) for split in SPLITS):
            file = self.file(split)
            try:
                file.load()
            except FileNotFoundError:
                pass
            except CorruptFileError as error:
                _log.warning("%s. It is drawn again now.", error)
            else:
                continue
            with closing(self._drawn(split)) as chunks:
                file.write(chunks)

    def setup(self, stage: str | None = None) -> None:
        """Map the pictures of the splits that the stage needs."""
        needed: dict[str | None, tuple[Split, ...]] = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("test",),
        }
        try:
            statistics = self.file("train").header()
            for split in needed.get(stage, SPLITS):
                if split not in self._loaded:
                    self._loaded[split] = self.file(split).load()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error.filename} does not exist; call prepare_data() before setup()") from error
        self._mean, self._std = float(statistics["mean"]), float(statistics["std"])

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pictures ``(B, 1, size, size)`` and labels ``(B,)`` of the samples ``index`` ``(B,)``."""
        if split not in self._loaded:
            raise RuntimeError(f"the {split} split is not loaded; call setup() first")
        stored = self._loaded[split]
        images = self.on_device(f"{split} images", torch.from_numpy(stored.images), index.device)[index]
        labels = self.on_device(f"{split} labels", torch.from_numpy(stored.labels), index.device)[index]
        scaled = images.unsqueeze(1).to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        return scaled, labels.to(torch.int64)

    def _source(self, split: Split) -> Split:
        return "test" if split == "validation" and self.validation_is_test else split

    def _drawn(self, split: Split) -> Generator[tuple[Bytes, Bytes], None, None]:
        """Pictures of a split in order, with a progress bar on a terminal and a line before and after elsewhere."""
        console, count = Console(stderr=True), self.size(split)
        what = f"Pathfinder {self.curves.path_length}, {split}"
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        if not console.is_terminal:
            rank_zero_info(f"{what}: drawing {count} pictures into {self.folder}")
        with (
            Progress(*columns, console=console, disable=not console.is_terminal) as progress,
            closing(draw_in_order(self.curves, self.seed, split, count, self.workers)) as chunks,
        ):
            task = progress.add_task(what, total=count)
            for images, labels in chunks:
                yield images, labels
                progress.advance(task, len(images))
        if not console.is_terminal:
            rank_zero_info(f"{what}: done")


def make_pathfinder(
    path_length: int | None = None,
    train: int = 10_000,
    validation: int = 2_000,
    test: int = 10_000,
    seed: int = 0,
    root: str | Path = "data",
    workers: int | None = None,
    curves: PathfinderCurves | None = None,
) -> dict[Split, Path]:
    """Draw the Pathfinder pictures of all splits ahead of a run, and print where they are.

    Args:
        path_length: Dashes per curve; published: 3, 5, 7 and 9. None: that of ``curves``, 9 unless it says otherwise.
        train: Number of training pictures.
        validation: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the pictures.
        root: Folder of the data.
        workers: Processes that draw; None: one per usable core.
        curves: Everything else about the pictures; None: as published.

    Returns:
        The file of each split.
    """
    module = Pathfinder(path_length, train, validation, test, seed, root, workers=workers, curves=curves)
    module.prepare_data()
    paths = {split: module.file(split).path for split in SPLITS}
    for split, path in paths.items():
        print(f"{split}: {module.size(split)} pictures in {path}")
    return paths
