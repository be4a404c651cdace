"""The Pathfinder data module, and the command that generates its pictures ahead of a run."""

from __future__ import annotations

__all__ = ["Pathfinder", "make_pathfinder"]

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_locality.datamodules.base import SPLITS, STAGES, AbstractImageDataModule, Split
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import STREAMS, place
from lightning_locality.datamodules.pathfinder.store import CorruptStoreError, PictureStore

_log = logging.getLogger(__name__)


class Pathfinder(AbstractImageDataModule):
    r"""Pictures of dashed curves and two discs; label 1 if the discs are the two ends of one curve.

    The task of "Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks"
    (Razin, Maman, Cohen, 2022), after "Learning long-range spatial dependencies with horizontal gated recurrent units"
    (Linsley, Kim, Veerabadran, Windolf, Serre, 2018), by the published process without the faults of its first program
    (see data/README.md). ``prepare_data`` generates what is missing under ``root``/pathfinder (0.2 to 0.4 ms per
    picture and core) and, with a warning, what is incomplete or altered. A picture depends on ``seed``, its split and
    its number alone. Images are ``(B, 1, size, size)`` in float32, normalised with the mean and standard deviation of
    the training split; labels are int64.

    Args:
        path_length: Dashes per curve; published: 3, 5, 7 and 9. None: that of ``curves``, by default 9.
        train: Number of training pictures.
        validation: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the pictures and of the order of training batches, 0 to 2^32 - 1.
        root: Folder of the data.
        batch_size: Samples per step and process.
        workers: Number of processes that generate pictures; None: one per usable core.
        curves: All other parameters of the pictures; None: as published.
        validation_is_test: Validate on the test pictures (published; a score selected by validation is then worthless).
        drop_last: Leave out the last, smaller training batch of an epoch.

    Raises:
        ValueError: A number is out of range, or curves do not fit in the picture.

    >>> Pathfinder(path_length=9, train=10_000, seed=0).image_shape
    (1, 150, 150)
    """

    num_classes = 2
    class_names = ("not connected", "connected")

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
        self._counts: dict[Split, int] = {"train": train, "validation": validation, "test": test}
        for name, number in self._counts.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a number of pictures of at least 1, got {number!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, or None for one per usable core, got {workers}")
        self.root, self.workers, self.validation_is_test = Path(root), workers, validation_is_test
        self.image_shape = (1, self.curves.size, self.curves.size)
        self._loaded: dict[Split, tuple[Tensor, Tensor]] = {}

    @property
    def task_distance(self) -> float:
        """Mean distance of the two discs, in pixels, in the first test pictures, up to 256 (placed anew: 0.1 s)."""
        index = range(min(256, self.size("test")))
        discs = place(self.curves, self.seed, STREAMS["test"], index).discs
        return float(np.linalg.norm(discs[:, 0] - discs[:, 1], axis=1).mean()) / self.curves.reduction

    def size(self, split: Split) -> int:
        """Number of pictures of a split."""
        return self._counts[self.origin(split)]

    def store(self, split: Split) -> PictureStore:
        """The stored pictures of a split."""
        return PictureStore(self.root / "pathfinder", self.curves, self.seed, self.origin(split), self.size(split))

    def prepare_data(self) -> None:
        """Generate the splits that are missing or not intact."""
        for split in dict.fromkeys(map(self.origin, SPLITS)):
            store = self.store(split)
            try:
                store.load()
            except (FileNotFoundError, CorruptStoreError) as error:
                if isinstance(error, CorruptStoreError):
                    _log.warning("%s. It is generated again now.", error)
                rank_zero_info(f"Generating {store.count} Pathfinder pictures in {store.folder}{_former(store)}")
                store.generate(self.workers)

    def setup(self, stage: str | None = None) -> None:
        """Map the pictures of the splits that the stage needs; every stage reads the training split's statistics."""
        store = self.store("train")
        try:
            self._mean, self._std, _ = store.header()
            for split in STAGES[stage]:
                store = self.store(split)
                if split not in self._loaded:
                    images, labels = map(torch.from_numpy, store.load())
                    self._loaded[split] = images, labels
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{store.folder} does not exist{_former(store)}; call prepare_data() before setup(), or run: "
                f"{self._command()}"
            ) from error

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pictures ``(B, 1, size, size)`` and labels ``(B,)`` of the samples ``index`` ``(B,)``."""
        if split not in self._loaded:
            raise RuntimeError(f"the {split} split is not loaded; call setup() first")
        images, labels = self._loaded[split]
        images = self.on_device(f"{split} images", images, index.device)[index]
        labels = self.on_device(f"{split} labels", labels, index.device)[index]
        scaled = images.unsqueeze(1).to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        return scaled, labels.to(torch.int64)

    def to_uint8(self, images: Tensor) -> Tensor:
        """Undo the normalisation of :meth:`compose`."""
        return (images * self._std + self._mean).mul_(255).round_().to(torch.uint8)

    def _command(self) -> str:
        """The command line that generates the pictures of this module."""
        options: dict[str, Any] = self._counts | {"seed": self.seed, "root": self.root}
        for field in dataclasses.fields(self.curves):
            value = getattr(self.curves, field.name)
            if value != field.default:
                options["path_length" if field.name == "path_length" else f"curves.{field.name}"] = value
        return "lightning-locality make-data pathfinder " + shlex.join(f"--{k}={v}" for k, v in options.items())


def _former(store: PictureStore) -> str:
    former = store.folder.with_name(f"{store.folder.name}.json")
    return f" ({former} has the format of version 0.1, which is no longer read: delete it)" if former.exists() else ""


def make_pathfinder(**options: Any) -> dict[Split, Path]:
    """Generate the Pathfinder pictures of all splits ahead of a run; print and return the folder of each.

    Args:
        options: ``path_length``, numbers, ``seed``, ``root``, ``workers`` and ``curves`` of :class:`Pathfinder`.
    """
    # what is fixed here is no option of the command
    module = Pathfinder(**options, batch_size=64, validation_is_test=False, drop_last=False)
    module.prepare_data()
    folders = {split: module.store(split).folder for split in SPLITS}
    for split, folder in folders.items():
        print(f"{split}: {module.size(split)} pictures in {folder}")
    return folders
