"""Image data modules whose loaders yield indices; images are gathered and composed on the device."""

from __future__ import annotations

__all__ = ["AbstractImageDataModule", "IndexLoader", "Split", "SplitBatch"]

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, final, get_args

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from lightning_locality.arguments import Checked, checked
from lightning_locality.datamodules.image_files import write_images
from lightning_locality.datamodules.shards import write_shards
from lightning_locality.datamodules.stream import StreamBatch, StreamLoader, StreamSamples, Values

Split = Literal["train", "validation", "test"]
Format = Literal["png", "npz", "webdataset", "parquet"]
SPLITS: tuple[Split, ...] = get_args(Split)
MAX_SAMPLES = 10**8  # of a split
# splits that a stage needs; all without a stage
STAGES: dict[str | None, tuple[Split, ...]] = {
    None: SPLITS,
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("test",),
}


class SplitBatch(NamedTuple):
    """Sample indices of one split, as yielded by a loader before the images are gathered."""

    split: Split
    indices: Tensor


def seeded_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU generator whose stream depends only on the seed and the names of its purpose."""
    digest = hashlib.sha256(repr((int(seed), *names)).encode()).digest()
    # 63 bits: torch takes signed seeds
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def check_counts(counts: Mapping[str, int], samples: str) -> None:
    """Raise ValueError unless every number of samples (pairs, pictures) is 1 to 100 million."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1 {samples}, got {count}")
        if count > MAX_SAMPLES:
            raise ValueError(f"{name} must be at most {MAX_SAMPLES:,} {samples}s, got {count}")


@final
class IndexLoader:
    r"""Batches of sample indices that visit every sample exactly once per epoch across all processes.

    Process r of W takes every W-th index of the epoch's order, which does not depend on W, so the W batches of a step
    together are the batch that one process with W times the batch size would see. Nothing is padded or repeated. All
    processes make the same number of steps, as collective operations require (gradients in training, BatchNorm's
    buffers in evaluation too): a process that would lack a batch splits one sample off its last full one. ValueError if
    the samples cannot give every process at least one sample in every step.

    Not a torch ``DataLoader``: there is nothing to load in worker processes, and the Trainer must replace neither the
    order nor the sharding. Without a Trainer, call ``loader.sampler.set_epoch(epoch)`` before each epoch if
    ``shuffle``, which uses a new order in every epoch. ``batch_size`` is that of one of the ``world`` processes.

    Example:
        >>> loaders = [IndexLoader("test", 9, 2, rank=rank, world=2) for rank in range(2)]
        >>> for first, second in zip(*loaders, strict=True):
        ...     print(first.indices.tolist(), second.indices.tolist())
        [0, 2] [1, 3]
        [4, 6] [5]
        [8] [7]
    """

    sampler: IndexLoader

    def __init__(
        self,
        split: Split,
        size: int,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.split, self.size, self.batch_size = split, size, batch_size
        self.drop_last, self.rank, self.world = drop_last, rank, world
        fewest, most = size // world, -(-size // world)
        self.steps = fewest // batch_size if drop_last else -(-most // batch_size)
        if self.steps == 0:
            raise ValueError(
                f"the {split} split has {size} samples, too few for a full batch of batch_size={batch_size} "
                f"in each of {world} process(es): lower batch_size, set drop_last=False or add samples"
            )
        if fewest < self.steps:
            raise ValueError(
                f"the {split} split has {size} samples, which batch_size={batch_size} does not divide over "
                f"{world} processes in the same number of steps: use a batch_size of at least 2 and at least "
                f"{world} samples, or a multiple of {world} samples"
            )
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0
        if shuffle:
            # where Lightning looks for set_epoch; only if shuffled: to overfit, the Trainer would unshuffle any loader
            # that has a sampler
            self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[SplitBatch]:
        order = torch.arange(self.size)
        if self.shuffle:
            order = torch.randperm(self.size, generator=seeded_generator(self.seed, "order", self.epoch))
        mine = order[self.rank :: self.world]
        if self.drop_last:
            mine = mine[: self.steps * self.batch_size]
        bounds = [*range(0, self.steps * self.batch_size, self.batch_size), len(mine)]
        # the last batch is never empty: the one before it gives up a sample
        bounds[-2] = min(bounds[-2], len(mine) - 1)
        for start, stop in pairwise(bounds):
            # a copy: a view would take the whole order along wherever it is sent
            yield SplitBatch(self.split, mine[start:stop].clone())


class AbstractImageDataModule(Checked, LightningDataModule, ABC):
    r"""Image classification data loaded as indices; images are gathered, scaled and composed on the device.

    Loaders yield :class:`SplitBatch`, which ``on_after_batch_transfer`` turns into the images and labels of
    :meth:`compose`. Under DDP every sample is seen once per epoch. Without a Trainer, :meth:`batch` gives the same.

    Args:
        batch_size: Samples per step and process; ValueError below 1.
        seed: Seed of the data and of the order of training batches.
        drop_last: Drop the last, incomplete training batch of an epoch.
    """

    image_shape: tuple[int, int, int]  # channels, height and width of a composed image
    validation_is_test = False
    endless = False  # whether the training split is a stream with new samples in every epoch

    def __init__(self, batch_size: int = 64, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self._moved: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}
        self._ready: set[Split] = set()

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of labels."""

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of samples in a split, known after ``setup``."""

    @abstractmethod
    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Float images ``(B, C, H, W)`` and int64 labels ``(B,)`` of the samples ``index`` ``(B,)``, on its device."""

    @property
    def task_distance(self) -> float | None:
        """Distance in pixels of the regions that decide the label only together; None if it is not known."""
        return None

    @property
    def ahead(self) -> int:
        """Number of batches of an endless stream that are sampled in advance."""
        return 1

    def begin_stream(self, epoch: int, index: Tensor) -> Callable[[], Values]:
        """Begin to sample ``index`` ``(B,)`` of an epoch of an endless stream; returns a function that waits for it."""
        raise NotImplementedError(f"{type(self).__name__} has no endless training stream: give train")

    def compose_stream(self, epoch: int, values: Values) -> tuple[Tensor, Tensor]:
        """Return images and labels as :meth:`compose` does, from what :meth:`begin_stream` gave, on the device."""
        raise NotImplementedError(f"{type(self).__name__} has no endless training stream: give train")

    def origin(self, split: Split) -> Split:
        """The split whose samples a split uses: its own, but the test split's for ``validation_is_test``."""
        return "test" if split == "validation" and self.validation_is_test else split

    def on_device(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """Return ``tensor`` on ``device``, moved once and cached under ``name`` until another tensor takes the name."""
        if tensor.device == device:
            return tensor
        kept = self._moved.get((name, device))
        if kept is None or kept[0] is not tensor:
            kept = self._moved[name, device] = (tensor, tensor.to(device, non_blocking=True))
        return kept[1]

    @checked
    def batch(
        self, split: Split, indices: Tensor | StreamSamples | None = None, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the samples ``indices`` ``(B,)``, by default the first ``batch_size``, composed on ``device``.

        Without a Trainer, the first call for a split prepares and sets up the data. Indices of an endless stream are
        those of its first epoch; its loader yields the samples of later ones in place of indices.
        """
        if self.trainer is None and split not in self._ready:
            self.prepare_data()
            self.setup({"train": "fit", "validation": "validate", "test": "test"}[split])
            self._ready.add(split)
        if isinstance(indices, StreamSamples):
            values = indices.values if device is None else tuple(value.to(device) for value in indices.values)
            return self.compose_stream(indices.epoch, values)
        if indices is None:
            indices = torch.arange(min(self.batch_size, self.size(split)))
        return self.compose(split, indices if device is None else indices.to(device))

    def to_uint8(self, images: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` of :meth:`compose` as uint8, for :meth:`export`."""
        raise NotImplementedError(f"{type(self).__name__} cannot be exported: define to_uint8(images) for it")

    def parameters(self) -> dict[str, Any]:
        """Parameters that determine the data, written by :meth:`export`."""
        return {}

    @checked
    def export(self, out: str | Path, format: Format | None = None) -> None:
        """Write all splits for other programs: PNG files, arrays, WebDataset's shards or Parquet; see data/README.md.

        Without a Trainer, this prepares and sets up the data. The sources ``folder:OUT`` and ``file:OUT.npz`` read PNG
        files and arrays bit for bit.

        Args:
            out: Folder to write, or file for ``npz``; neither may exist.
            format: None: ``npz`` if ``out`` ends in .npz, else ``png``, in class folders.

        Raises:
            FileExistsError: There is something at ``out``.
            ValueError: An unknown format, or a name that does not suit it.
        """
        out = Path(out)
        arrays = out.suffix == ".npz"
        format = format or ("npz" if arrays else "png")
        if format == "npz" and not arrays:
            raise ValueError(f"out must end in .npz for format 'npz', got {out}")
        if format != "npz" and out.suffix.lower() in (".npz", ".npy", ".zip", ".png", ".h5", ".tar", ".parquet"):
            raise ValueError(f"{out} would be a folder: write arrays to a name that ends in .npz, else to another")
        # those of validation_is_test are written once
        splits = dict.fromkeys(map(self.origin, SPLITS))
        for split in splits:
            self.batch(split, torch.zeros(1, dtype=torch.int64))  # sets up, after which sizes and classes are known
        names = list(getattr(self, "class_names", None) or map(str, range(self.num_classes)))
        batches: dict[str, Iterator[tuple[Tensor, Tensor]]] = {split: self._samples(split) for split in splits}
        if format == "png" or format == "npz":
            write_images(out, batches, names)
        else:
            write_shards(out, format, batches, {split: self.size(split) for split in splits}, names, self.parameters())

    def _samples(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        for index in torch.split(torch.arange(self.size(split)), self.batch_size):
            images, labels = self.batch(split, index)
            yield self.to_uint8(images), labels

    def loader(self, split: Split) -> IndexLoader:
        """Loader of a split: shuffled for training, in order otherwise, sharded over the processes."""
        training, trainer = split == "train", self.trainer
        return IndexLoader(
            split,
            self.size(split),
            self.batch_size,
            shuffle=training and not self.endless and not self._overfits(),
            seed=self.seed,
            drop_last=training and self.drop_last,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
        )

    def _overfits(self) -> bool:
        # overfit_batches promises the same batches in every epoch; the Trainer sets it dynamically
        return bool(self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]

    def train_dataloader(self) -> IndexLoader | StreamLoader:
        """Loader of the training split."""
        loader = self.loader("train")
        if not self.endless:
            return loader
        batches = [batch.indices for batch in loader]
        return StreamLoader(batches, self.begin_stream, self.ahead, fixed=self._overfits())

    def val_dataloader(self) -> IndexLoader:
        """Loader of the validation split."""
        return self.loader("validation")

    def test_dataloader(self) -> IndexLoader:
        """Loader of the test split."""
        return self.loader("test")

    predict_dataloader = test_dataloader

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compose a batch yielded by a loader of this module; leave any other batch alone."""
        match batch:
            case SplitBatch():
                image, label = self.compose(batch.split, batch.indices)
            case StreamBatch():
                image, label = self.compose_stream(*batch.samples)
            case _:
                return batch
        if self.trainer is not None:
            # Lightning converts a batch before its transfer, when there are no images yet
            image = self.trainer.precision_plugin.convert_input(image)
        return image, label


def export_images(data: AbstractImageDataModule, out: str, format: Format | None = None) -> None:
    """Write the images of a task for other programs, see data/README.md.

    Args:
        data: The task, such as SameClass, and its options.
        out: Folder to write, or .npz file; neither may exist.
        format: ``png`` files in class folders (default), ``npz`` arrays (default if OUT ends in .npz), ``webdataset``
            (tar shards) or ``parquet`` (of images, for Hugging Face datasets).
    """
    data.export(out, format)
    print(f"{type(data).__name__} written to {out}{written_as(out, format)}")


def written_as(out: str, format: str | None) -> str:
    """How the data that :meth:`AbstractImageDataModule.export` wrote is read."""
    match format or ("npz" if out.endswith(".npz") else "png"):
        case "npz":
            return f": as a source it is file:{out}"
        case "png":
            return f": as a source it is folder:{out}"
        case "parquet":
            return f': datasets.load_dataset("{out}") reads it'
        case _:
            return f": webdataset.WebDataset reads {out}/train-*.tar"
