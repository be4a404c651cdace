"""The Pathfinder data module, and the command that generates its pictures ahead of a run."""

from __future__ import annotations

__all__ = ["Pathfinder", "make_pathfinder"]

import dataclasses
import logging
import shlex
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_locality.datamodules.base import SPLITS, STAGES, AbstractImageDataModule, Split
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
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
        path_length: Dashes per curve; published: 3, 5, 7 and 9. None: that of ``preset`` or ``curves``, by default 9.
        train: Number of training pictures.
        validation: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the pictures and of the order of training batches, 0 to 2^32 - 1.
        root: Folder of the data.
        batch_size: Samples per step and process.
        workers: Number of processes that generate pictures; None: one per usable core.
        preset: A published setting by its name instead of ``curves``: ``icml2022``, ``lra32``, ``lra64``, ``lra128``,
            ``lra256``, ``pathx`` or ``linsley300``, see :meth:`PathfinderCurves.preset`.
        curves: All other parameters of the pictures; None: as published.
        targets: Also what is where: a batch of a loader has :meth:`targets` as its third entry.
        validation_is_test: Validate on the test pictures (published; a score selected by validation is then worthless).
        drop_last: Leave out the last, smaller training batch of an epoch.

    Raises:
        ValueError: A number is out of range, curves do not fit in the picture, or there are both preset and curves.

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
        preset: str | None = None,
        curves: PathfinderCurves | None = None,
        targets: bool = False,
        validation_is_test: bool = False,
        drop_last: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed, drop_last=drop_last)
        if preset is not None and curves is not None:
            raise ValueError(
                f"give preset or curves, not both: got preset={preset!r}; or curves=PathfinderCurves.preset(...)"
            )
        if curves is None:
            self.curves = PathfinderCurves.preset(preset or "icml2022", path_length)
        else:
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
        self.has_targets = targets
        self._loaded: dict[Split, list[Tensor]] = {}

    def size(self, split: Split) -> int:
        """Number of pictures of a split."""
        return self._counts[self.origin(split)]

    def store(self, split: Split) -> PictureStore:
        """The stored pictures of a split."""
        origin, folder = self.origin(split), self.root / "pathfinder"
        return PictureStore(folder, self.curves, self.seed, origin, self.size(split), self.has_targets)

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
                    self._loaded[split] = [torch.from_numpy(array) for array in store.load()]
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{store.folder} does not exist{_former(store)}; call prepare_data() before setup(), or run: "
                f"{self._command()}"
            ) from error

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pictures ``(B, 1, size, size)`` and labels ``(B,)`` of the samples ``index`` ``(B,)``."""
        images, labels = self._samples_of(split, index)[:2]
        scaled = images.unsqueeze(1).to(torch.float32).div_(255).sub_(self._mean).div_(self._std)
        return scaled, labels.to(torch.int64)

    def targets(self, split: Split, index: Tensor) -> dict[str, Tensor]:
        """What is where in the samples ``index`` ``(B,)``, on its device; for ``targets=True``.

        ``segmentation``: uint8 ``(B, size, size)``, 1 on the curve that starts at the first disc, 2 on the other
        target curve, 3 on distractors, in pixels at least half as bright as their dash. ``markers``: centres (row,
        column) of the two discs in pixels, float32 ``(B, 2, 2)``: the start of curve 1, and the end of curve 1 for
        label 1, of curve 2 for label 0.
        """
        if not self.has_targets:
            raise RuntimeError("these pictures were made without targets: use Pathfinder(targets=True)")
        return dict(zip(("segmentation", "markers"), self._samples_of(split, index)[2:], strict=True))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compose a batch yielded by a loader of this module, its targets included; leave any other batch alone."""
        composed = super().on_after_batch_transfer(batch, dataloader_idx)
        own = self.has_targets and composed is not batch
        return (*composed, self.targets(batch.split, batch.indices)) if own else composed

    def _samples_of(self, split: Split, index: Tensor) -> list[Tensor]:
        if split not in self._loaded:
            raise RuntimeError(f"the {split} split is not loaded; call setup() first")
        names = ("images", "labels", "segmentation", "markers")
        arrays = zip(names, self._loaded[split], strict=False)
        return [self.on_device(f"{split} {name}", array, index.device)[index] for name, array in arrays]

    def to_uint8(self, images: Tensor) -> Tensor:
        """Undo the normalisation of :meth:`compose`."""
        return (images * self._std + self._mean).mul_(255).round_().to(torch.uint8)

    def _command(self) -> str:
        """The command line that generates the pictures of this module."""
        options: dict[str, Any] = self._counts | {"seed": self.seed, "root": self.root}
        if self.has_targets:
            options["targets"] = True
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
        options: ``path_length``, numbers, ``seed``, ``root``, ``workers``, ``preset``, ``curves`` and
            ``targets`` of :class:`Pathfinder`.
    """
    # what is fixed here is no option of the command
    module = Pathfinder(**options, batch_size=64, validation_is_test=False, drop_last=False)
    module.prepare_data()
    folders = {split: module.store(split).folder for split in SPLITS}
    for split, folder in folders.items():
        print(f"{split}: {module.size(split)} pictures in {folder}")
    return folders
