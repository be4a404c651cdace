"""The Pathfinder data module, and the command that generates its pictures ahead of a run."""

from __future__ import annotations

__all__ = ["Pathfinder", "make_pathfinder"]

import dataclasses
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_locality.datamodules.base import SPLITS, STAGES, AbstractImageDataModule, Split, written_as
from lightning_locality.datamodules.image_sets import given_statistics
from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import pictures, pictures_with_targets
from lightning_locality.datamodules.pathfinder.store import FILES, TARGETS, CorruptStoreError, PictureStore
from lightning_locality.datamodules.stream import Curriculum, StreamSamples, Values

_log = logging.getLogger(__name__)


class Pathfinder(AbstractImageDataModule):
    r"""Pictures of dashed curves and two discs; label 1 if the discs are the two ends of one curve.

    The task of "Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks"
    (Razin, Maman, Cohen, 2022), after "Learning long-range spatial dependencies with horizontal gated recurrent units"
    (Linsley, Kim, Veerabadran, Windolf, Serre, 2018), by the published process without the faults of its first program
    (see data/README.md). ``prepare_data`` generates what is missing under ``root``/pathfinder (0.2 to 0.4 ms per
    picture and core) and, with a warning, what is incomplete or altered. A picture depends on ``seed``, its split and
    its number alone. Images are ``(B, channels, size, size)`` in float32, normalised with the mean and standard
    deviation of the training split; labels are int64.

    With ``train=None`` every epoch has ``epoch_size`` new pictures, rendered ahead of the device by ``workers``
    processes and never stored: picture i of epoch e is number e ``epoch_size`` + i of the training pictures, whatever
    the batch size and the number of processes, also if training is resumed. They are normalised with the mean and
    standard deviation of the validation split, which is fixed like the test split.

    Args:
        path_length: Dashes per curve; published: 3, 5, 7 and 9. None: that of ``preset`` or ``curves``, by default 9.
        train: Number of training pictures; None: new ones in every epoch.
        validation: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the pictures and of the order of training batches, 0 to 2^32 - 1.
        root: Folder of the data.
        batch_size: Samples per step and process.
        workers: Number of processes that generate pictures; None: one per usable core.
        preset: A published setting by its name instead of ``curves``: ``icml2022``, ``lra32``, ``lra64``, ``lra128``,
            ``lra256``, ``pathx`` or ``linsley300``; see data/README.md.
        curves: All other parameters of the pictures; None: as published.
        targets: Also what is where: a batch of a loader has :meth:`targets` as its third entry.
        validation_is_test: Validate on the test pictures (published; a score selected by validation is then worthless).
        drop_last: Leave out the last, smaller training batch of an epoch.
        epoch_size: Number of pictures per epoch if ``train`` is None.
        curriculum: With ``train=None``, values in epoch 0 of parameters of the curves, such as ``{"distractors": 0}``,
            which change in equal steps to their own values; validation and test pictures have those.
        curriculum_epochs: Number of epochs that this takes.
        channels: 1, or 3 equal ones for networks that expect colours.
        mean: Mean intensity (0 to 1) of each channel, subtracted; None: of the pictures. ``imagenet``: mean and
            deviation that most pretrained networks expect, of three channels.
        std: Standard deviation of each channel, divided by; likewise.

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
        train: int | None = 10_000,
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
        epoch_size: int = 10_000,
        curriculum: dict[str, float] | None = None,
        curriculum_epochs: int = 10,
        channels: Literal[1, 3] = 1,
        mean: Sequence[float] | Literal["imagenet"] | None = None,
        std: Sequence[float] | None = None,
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
        self.endless, size = train is None, epoch_size if train is None else train
        self._counts: dict[Split, int] = {"train": size, "validation": validation, "test": test}
        named = {("epoch_size" if self.endless else "train"): size, "validation": validation, "test": test}
        for name, number in named.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a number of pictures of at least 1, got {number!r}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, or None for one per usable core, got {workers}")
        self.root, self.workers, self.validation_is_test = Path(root), workers, validation_is_test
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}")
        self.image_shape = (channels, self.curves.size, self.curves.size)
        self.has_targets = targets
        self._given = given_statistics(mean, std, channels)
        self._loaded: dict[Split, Values] = {}
        self._mean: float | Tensor
        self._std: float | Tensor
        self._pool: ProcessPoolExecutor | None = None
        if curriculum and not self.endless:
            raise ValueError(f"curriculum={curriculum} needs new pictures in every epoch: set train=None")
        # the size of the pictures stays
        goals = {name: goal for name, goal in self.curves.parameters().items() if name not in ("window", "size")}
        self._curriculum = Curriculum(curriculum or {}, curriculum_epochs, goals)
        self._curriculum.check(self.curves_at)

    @property
    def task_distance(self) -> float:
        """Mean distance of the two discs, in pixels, in the first test pictures, up to 256 (drawn anew: 0.2 s)."""
        known = pictures_with_targets(self.curves, self.seed, "test", range(min(256, self.size("test"))))[2]
        return float(np.linalg.norm(known.markers[:, 0] - known.markers[:, 1], axis=1).mean())

    def size(self, split: Split) -> int:
        """Number of pictures of a split."""
        return self._counts[self.origin(split)]

    def store(self, split: Split) -> PictureStore:
        """The stored pictures of a split."""
        origin, folder = self.origin(split), self.root / "pathfinder"
        return PictureStore(folder, self.curves, self.seed, origin, self.size(split), self.has_targets)

    def curves_at(self, epoch: int) -> PathfinderCurves:
        """Parameters of the training pictures of an epoch."""
        return dataclasses.replace(self.curves, **self._curriculum.at(epoch))

    @property
    def ahead(self) -> int:
        """Number of batches of the stream that are rendered in advance."""
        return 2 * self._workers()

    def _workers(self) -> int:
        # the processes of a node share its cores
        return self.workers or max(1, cpu_count() // (self.trainer.num_devices if self.trainer else 1))

    def begin_stream(self, epoch: int, index: Tensor) -> Callable[[], Values]:
        """Begin to render pictures of an epoch in another process."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(self._workers())
        numbers = (epoch * self.size("train") + index).tolist()
        future = self._pool.submit(_draw, self.curves_at(epoch), self.seed, numbers, self.has_targets)
        return lambda: tuple(map(torch.from_numpy, future.result()))

    def compose_stream(self, epoch: int, values: Values) -> tuple[Tensor, Tensor]:
        """Normalised pictures ``(B, channels, size, size)`` and labels ``(B,)``."""
        return self._normalised(values[0]), values[1].to(torch.int64)

    def teardown(self, stage: str | None = None) -> None:
        """End the processes that render the stream."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def _stored(self) -> tuple[Split, ...]:
        return tuple(dict.fromkeys(self.origin(split) for split in SPLITS if split != "train" or not self.endless))

    def prepare_data(self) -> None:
        """Generate the splits that are missing or not intact."""
        for split in self._stored():
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
        stored = self._stored()
        store = self.store(stored[0])
        try:
            self._mean, self._std, _ = store.header()
            if self._given:
                self._mean, self._std = (row.to(torch.float32)[:, None, None] for row in self._given)
            for split in STAGES[stage]:
                store = self.store(split)
                if self.origin(split) in stored and split not in self._loaded:
                    self._loaded[split] = tuple(map(torch.from_numpy, store.load()))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{store.folder} does not exist{_former(store)}; call prepare_data() before setup(), or run: "
                f"{self._command()}"
            ) from error

    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised pictures ``(B, channels, size, size)`` and labels ``(B,)`` of the samples ``index`` ``(B,)``."""
        return self.compose_stream(0, self._values(split, index))

    def _values(self, split: Split, index: Tensor) -> Values:
        """Pictures, labels and targets of samples."""
        if split == "train" and self.endless:
            numbers = index.tolist()
            if not 0 <= min(numbers) <= max(numbers) < self.size("train"):
                raise IndexError(f"an epoch has pictures 0 to {self.size('train') - 1}, got {numbers}")
            drawn = _draw(self.curves_at(0), self.seed, numbers, self.has_targets)
            return tuple(torch.from_numpy(array).to(index.device) for array in drawn)
        if split not in self._loaded:
            raise RuntimeError(f"the {split} split is not loaded; call setup() first")
        arrays = zip(FILES + TARGETS, self._loaded[split], strict=False)
        return tuple(self.on_device(f"{split} {name}", array, index.device)[index] for name, array in arrays)

    def _normalised(self, images: Tensor) -> Tensor:
        pixels = images.unsqueeze(1).to(torch.float32).div_(255)
        if self.image_shape[0] == 3:
            pixels = pixels.repeat(1, 3, 1, 1)
        mean, std = (
            self.on_device(name, value, images.device) if isinstance(value, Tensor) else value
            for name, value in (("mean", self._mean), ("std", self._std))
        )
        return pixels.sub_(mean).div_(std)

    def parameters(self) -> dict[str, Any]:
        """The seed and all parameters of the curves."""
        return {"seed": self.seed, **self.curves.parameters()}

    def targets(self, split: Split, indices: Tensor | StreamSamples) -> dict[str, Tensor]:
        """What is where in the samples ``indices`` ``(B,)``, on their device; for ``targets=True``.

        ``segmentation``: uint8 ``(B, size, size)``, 1 on the curve that starts at the first disc, 2 on the other
        target curve, 3 on distractors, in pixels at least half as bright as their dash. ``markers``: centres (row,
        column) of the two discs in pixels, float32 ``(B, 2, 2)``: the start of curve 1, and the end of curve 1 for
        label 1, of curve 2 for label 0.
        """
        if not self.has_targets:
            raise RuntimeError("these pictures were made without targets: use Pathfinder(targets=True)")
        values = indices.values if isinstance(indices, StreamSamples) else self._values(split, indices)
        return dict(zip(("segmentation", "markers"), values[2:], strict=True))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compose a batch yielded by a loader of this module, its targets included; leave any other batch alone."""
        composed = super().on_after_batch_transfer(batch, dataloader_idx)
        own = self.has_targets and composed is not batch
        return (*composed, self.targets(*batch)) if own else composed

    def to_uint8(self, images: Tensor) -> Tensor:
        """Undo the normalisation of :meth:`compose`."""
        return (images * self._std + self._mean).mul_(255).round_().to(torch.uint8)

    def _command(self) -> str:
        """The command line that generates the pictures of this module."""
        options: dict[str, Any] = self._counts | {"seed": self.seed, "root": self.root}
        options |= {"targets": True} if self.has_targets else {}
        options |= {"train": "null"} if self.endless else {}
        for field in dataclasses.fields(self.curves):
            value = getattr(self.curves, field.name)
            if value != field.default:
                value = list(value) if isinstance(value, tuple) else value
                options["path_length" if field.name == "path_length" else f"curves.{field.name}"] = value
        return "lightning-locality make-data pathfinder " + shlex.join(f"--{k}={v}" for k, v in options.items())


def _draw(curves: PathfinderCurves, seed: int, numbers: list[int], targets: bool) -> tuple[NDArray[Any], ...]:
    """Training pictures by their numbers, with labels and targets."""
    if not targets:
        return pictures(curves, seed, "train", numbers)
    images, labels, known = pictures_with_targets(curves, seed, "train", numbers)
    return images, labels, *known


def _former(store: PictureStore) -> str:
    former = store.folder.with_name(f"{store.folder.name}.json")
    return f" ({former} has the format of version 0.1, which is no longer read: delete it)" if former.exists() else ""


def make_pathfinder(
    format: Literal["npy", "png", "npz", "webdataset", "parquet"] = "npy", out: str | None = None, **options: Any
) -> dict[Split, Path]:
    """Generate the Pathfinder pictures of all splits ahead of a run; print and return the folder of each.

    Args:
        format: ``npy``: the arrays under ROOT/pathfinder that ``fit`` reads. Otherwise these are also written to OUT
            for other programs, as ``png`` files in class folders, one ``npz`` file, ``webdataset`` shards or
            ``parquet`` (``datasets.load_dataset(OUT)``); see data/README.md.
        out: Folder to write, or .npz file, for all formats but ``npy``; it may not exist.
        options: ``path_length``, numbers, ``seed``, ``root``, ``workers``, ``preset``, ``curves`` and ``targets`` of
            :class:`Pathfinder`.
    """
    if (format == "npy") != (out is None):
        raise ValueError(f"format={format!r} {'is written under root: leave out' if out else 'needs'} out=FOLDER")
    # what is fixed here is no option of the command
    module = Pathfinder(
        **options,
        batch_size=64,
        validation_is_test=False,
        drop_last=False,
        epoch_size=10_000,
        curriculum=None,
        curriculum_epochs=10,
        channels=1,
        mean=None,
        std=None,
    )
    module.prepare_data()
    folders = {split: module.store(split).folder for split in module._stored()}
    for split, folder in folders.items():
        print(f"{split}: {module.size(split)} pictures in {folder}")
    if format != "npy" and out is not None:
        module.export(out, format)
        print(f"all written to {out}{written_as(out, format)}")
    return folders
