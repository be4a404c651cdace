"""Pictures that the package draws: generated once and stored, or an endless stream of new ones."""

from __future__ import annotations

__all__ = ["AbstractDrawnPictures"]

import dataclasses
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from joblib import cpu_count
from joblib.externals.loky import ProcessPoolExecutor
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from lightning_locality.datamodules.base import (
    SPLITS,
    STAGES,
    AbstractImageDataModule,
    Format,
    Split,
    check_counts,
    written_as,
)
from lightning_locality.datamodules.image_sets import given_statistics
from lightning_locality.datamodules.pathfinder.store import (
    FILES,
    TARGETS,
    CorruptStoreError,
    PictureProcess,
    PictureStore,
)
from lightning_locality.datamodules.stream import Curriculum, StreamSamples, Values

_log = logging.getLogger(__name__)


class AbstractDrawnPictures(AbstractImageDataModule):
    """Pictures with two labels, each a function of parameters, seed, split and its own number.

    A subclass names its ``process`` and passes on the parameters of its pictures, a frozen dataclass, as ``curves``.

    Args:
        curves: Parameters of the pictures.
        train: Number of training pictures; None: new ones in every epoch.
        validation: Number of validation pictures.
        test: Number of test pictures.
        seed: Seed of the pictures and of the order of training batches, 0 to 2^32 - 1.
        root: Folder of the data.
        batch_size: Samples per step and process.
        workers: Number of processes that generate pictures; None: one per usable core.
        targets: A batch of a loader has :meth:`targets` as its third entry.
        validation_is_test: Validate on the test pictures.
        drop_last: Leave out the last, smaller training batch of an epoch.
        epoch_size: Number of pictures per epoch if ``train`` is None.
        curriculum: With ``train=None``, values in epoch 0 of numbers among the parameters, such as ``{"omission": 0}``,
            which change in equal steps to their own values; validation and test pictures have those.
        curriculum_epochs: Number of epochs that this takes.
        channels: 1, or 3 equal ones for networks that expect colours.
        mean: Mean intensity (0 to 1) of each channel, subtracted; None: of the pictures. ``imagenet``: mean and
            deviation that most pretrained networks expect, of three channels.
        std: Standard deviation of each channel, divided by; likewise.
    """

    num_classes = 2
    process: ClassVar[PictureProcess]
    parameters_option: ClassVar[str]  # the argument that takes the dataclass
    own_options: ClassVar[tuple[str, ...]] = ()  # its fields that are arguments themselves

    def __init__(
        self,
        curves: Any,
        *,
        train: int | None = 10_000,
        validation: int = 2_000,
        test: int = 10_000,
        seed: int = 0,
        root: str | Path = "data",
        batch_size: int = 64,
        workers: int | None = None,
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
        self.curves = curves
        self.endless, size = train is None, epoch_size if train is None else train
        # as headers of .npy files take them
        self._counts: dict[Split, int] = {"train": int(size), "validation": int(validation), "test": int(test)}
        named = {("epoch_size" if self.endless else "train"): size, "validation": validation, "test": test}
        check_counts(named, "picture")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {seed}")
        if workers is not None and workers < 1:
            raise ValueError(f"workers must be at least 1, or None for one per usable core, got {workers}")
        self.root, self.workers, self.validation_is_test = Path(root), workers, validation_is_test
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
        """Mean distance of the two markers, in pixels, in the first test pictures, up to 256 (drawn anew)."""
        known = self.process.draw(self.curves, self.seed, "test", range(min(256, self.size("test"))), True)[2]
        return float(np.linalg.norm(known.markers[:, 0] - known.markers[:, 1], axis=1).mean())

    def size(self, split: Split) -> int:
        """Number of pictures of a split."""
        return self._counts[self.origin(split)]

    def store(self, split: Split) -> PictureStore:
        """The stored pictures of a split."""
        origin, folder = self.origin(split), self.root / self.process.name
        return PictureStore(folder, self.curves, self.seed, origin, self.size(split), self.has_targets, self.process)

    def curves_at(self, epoch: int) -> Any:
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
        future = self._pool.submit(_draw, self.process, self.curves_at(epoch), self.seed, numbers, self.has_targets)
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
                rank_zero_info(
                    f"Generating {store.count} {self.process.title} pictures in {store.folder}{_former(store)}"
                )
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
            drawn = _draw(self.process, self.curves_at(0), self.seed, numbers, self.has_targets)
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
        """The seed and all parameters of the pictures."""
        return {"seed": self.seed, **self.curves.parameters()}

    def targets(self, split: Split, indices: Tensor | StreamSamples) -> dict[str, Tensor]:
        """Segmentation and markers of the samples ``indices`` ``(B,)``, on their device; needs ``targets=True``.

        ``segmentation``: uint8 ``(B, size, size)``, the class of each pixel, and ``markers``: centres (row, column) of
        the two markers in pixels, float32 ``(B, 2, 2)``, as the class describes them.
        """
        if not self.has_targets:
            raise RuntimeError(f"these pictures were made without targets: use {type(self).__name__}(targets=True)")
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
                own = field.name in self.own_options
                options[field.name if own else f"{self.parameters_option}.{field.name}"] = (
                    list(value) if isinstance(value, tuple) else "null" if value is None else value
                )
        command = f"lightning-locality make-data {self.process.command} "
        return command + shlex.join(f"--{k}={v}" for k, v in options.items())


def _draw(
    process: PictureProcess, curves: Any, seed: int, numbers: list[int], targets: bool
) -> tuple[NDArray[Any], ...]:
    """Training pictures by their numbers, with labels and targets."""
    images, labels, known = process.draw(curves, seed, "train", numbers, targets)
    return (images, labels, *known) if targets else (images, labels)


def _former(store: PictureStore) -> str:
    former = store.folder.with_name(f"{store.folder.name}.json")
    return f" ({former} has the format of version 0.1, which is no longer read: delete it)" if former.exists() else ""


def write_pictures(
    module: AbstractDrawnPictures, format: Literal["npy"] | Format, out: str | None
) -> dict[Split, Path]:
    """Generate the pictures of all splits, in another format too unless it is ``npy``; print and return the folders."""
    if (format == "npy") != (out is None):
        raise ValueError(f"format={format!r} {'is written under root: leave out' if out else 'needs'} out=FOLDER")
    module.prepare_data()
    folders = {split: module.store(split).folder for split in module._stored()}
    for split, folder in folders.items():
        print(f"{split}: {module.size(split)} pictures in {folder}")
    if format != "npy" and out is not None:
        module.export(out, format)
        print(f"all written to {out}{written_as(out, format)}")
    return folders
