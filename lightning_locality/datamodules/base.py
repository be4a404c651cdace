"""What every image data module shares: splits by index, gathered and composed on the device."""

from __future__ import annotations

__all__ = ["AbstractImageDataModule", "Split", "SplitBatch"]

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Split = Literal["train", "validation", "test"]


class SplitBatch(NamedTuple):
    """What a loader yields: sample indices of one split, before the images are gathered."""

    split: Split
    indices: Tensor


class _Indices(Dataset[int]):
    """The numbers 0..size-1; fetched a batch at a time, without per-sample Python."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, indices: list[int]) -> SplitBatch:
        return SplitBatch(self.split, torch.tensor(indices, dtype=torch.int64))


def _as_fetched(batch: Any) -> Any:
    return batch


class _ShardedSampler(DistributedSampler[int]):
    """Each index once per epoch over all ranks; a seeded order that does not depend on their number.

    Rank r of W takes every W-th index of the epoch's order, so that the W local batches of a step are
    together the batch that one process with W times the batch size would see. Nothing is padded: an uneven
    remainder goes to the first ranks, except in training where it would give the ranks different numbers
    of steps (DDP would hang); there at most W - 1 samples of the epoch's order are left out.
    """

    def __init__(
        self,
        dataset: _Indices,
        *,
        rank: int,
        world: int,
        shuffle: bool,
        seed: int,
        batch_size: int,
        drop_last: bool,
    ) -> None:
        super().__init__(dataset, num_replicas=world, rank=rank, shuffle=shuffle, seed=seed)
        size = len(dataset)
        steps = {self._steps(len(range(r, size, world)), batch_size, drop_last) for r in range(world)}
        self.total = size if len(steps) == 1 or not shuffle else size - size % world
        self.world = world

    @staticmethod
    def _steps(samples: int, batch_size: int, drop_last: bool) -> int:
        return samples // batch_size if drop_last else -(-samples // batch_size)

    def __iter__(self) -> Iterator[int]:
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.arange(size)
        return iter(order[: self.total][self.rank :: self.world].tolist())

    def __len__(self) -> int:
        return len(range(self.rank, self.total, self.world))


class AbstractImageDataModule(LightningDataModule, ABC):
    r"""Image classification data as indices; images are gathered, scaled and composed on the device.

    A loader yields :class:`SplitBatch`; ``on_after_batch_transfer`` turns it into ``(image, label)`` with
    ``image`` a float tensor ``(B, C, H, W)`` and ``label`` an int64 tensor ``(B,)``, by :meth:`compose`.
    Under DDP every sample is seen once per epoch.

    Args:
        batch_size: Samples per step and process.
        seed: Seed of the data and of the order of training batches.
        drop_last: Leave out the last, smaller training batch of an epoch.
    """

    def __init__(self, batch_size: int = 64, seed: int = 0, drop_last: bool = False) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self._moved: dict[tuple[str, torch.device], Tensor] = {}

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of labels."""

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a composed image."""

    @abstractmethod
    def size(self, split: Split) -> int:
        """Number of samples of a split, known after ``setup``."""

    @abstractmethod
    def compose(self, split: Split, index: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``(B, C, H, W)`` and labels ``(B,)`` of the samples ``index`` ``(B,)``, on its device."""

    def on_device(self, name: str, tensor: Tensor, device: torch.device) -> Tensor:
        """``tensor`` on ``device``, moved once and kept under ``name``."""
        if tensor.device == device:
            return tensor
        key = (name, device)
        if key not in self._moved:
            self._moved[key] = tensor.to(device, non_blocking=True)
        return self._moved[key]

    def loader(self, split: Split) -> DataLoader[int]:
        """Loader of a split: shuffled and sharded over ranks for training, in order otherwise."""
        dataset = _Indices(split, self.size(split))
        training = split == "train"
        drop_last = training and self.drop_last
        trainer = self.trainer
        sampler = _ShardedSampler(
            dataset,
            rank=trainer.global_rank if trainer else 0,
            world=trainer.world_size if trainer else 1,
            shuffle=training,
            seed=self.seed,
            batch_size=self.batch_size,
            drop_last=drop_last,
        )
        return DataLoader(
            dataset, batch_size=self.batch_size, sampler=sampler, drop_last=drop_last, collate_fn=_as_fetched
        )

    def train_dataloader(self) -> DataLoader[int]:
        """Loader of the training split."""
        return self.loader("train")

    def val_dataloader(self) -> DataLoader[int]:
        """Loader of the validation split."""
        return self.loader("validation")

    def test_dataloader(self) -> DataLoader[int]:
        """Loader of the test split."""
        return self.loader("test")

    def predict_dataloader(self) -> DataLoader[int]:
        """Loader of the test split."""
        return self.loader("test")

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Compose the batch that a loader of this module has yielded."""
        if not isinstance(batch, SplitBatch):
            return batch
        return self.compose(batch.split, batch.indices)
