"""What the recovery problems share: one batch, the whole problem, handed over again and again."""

from __future__ import annotations

__all__ = ["AbstractRecoveryDataModule", "RepeatedBatch"]

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, final

import torch
from pytorch_lightning import LightningDataModule

from lightning_locality.tensors.observations import RecoveryBatch


@final
class RepeatedBatch:
    """A loader of one batch, the same object at every step.

    Args:
        batch: The batch.
        steps: How often an epoch hands it over.

    Example:
        >>> loader = RepeatedBatch(RecoveryBatch(None, None, None), steps=3)
        >>> len(loader), len({id(batch) for batch in loader})
        (3, 1)
    """

    def __init__(self, batch: RecoveryBatch, steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[RecoveryBatch]:
        for _ in range(self.steps):
            yield self.batch


class AbstractRecoveryDataModule(LightningDataModule, ABC):
    """A recovery problem whose every training step gets all of it, already on the device.

    A step of training is cheaper than moving the data, so :attr:`problem` is drawn once, moved once, and handed
    over as one and the same object in all epochs; how many iterations a step makes of it, and of how many
    observations each, is for the model to say. There is nothing to share out: it is for one process. Validation and
    test get the same object, once: it holds what they need.

    Args:
        epoch_length: Training steps that Lightning calls an epoch: checkpoints are written at its end.

    Raises:
        ValueError: ``epoch_length`` is below 1, or the Trainer has several processes.
    """

    def __init__(self, epoch_length: int = 40) -> None:
        super().__init__()
        if epoch_length < 1:
            raise ValueError(f"epoch_length must be at least 1 training step, got {epoch_length}")
        self.epoch_length = epoch_length
        self._problem: RecoveryBatch | None = None
        self._moved: tuple[torch.device, RecoveryBatch] | None = None

    @abstractmethod
    def draw(self) -> RecoveryBatch:
        """The problem, on the CPU: the same whenever it is drawn."""

    @property
    def problem(self) -> RecoveryBatch:
        """The problem, on the CPU, drawn at the first use."""
        if self._problem is None:
            self._problem = self.draw()
        return self._problem

    def setup(self, stage: str | None = None) -> None:
        """Draw the problem.

        Args:
            stage: Of the Trainer; all stages have the same problem.
        """
        if self.trainer is not None and self.trainer.world_size > 1:
            raise ValueError(
                f"the Trainer has {self.trainer.world_size} processes, each of which would do the same work: a "
                "recovery problem is one batch, so pass devices=1 (trainer.devices: 1)"
            )
        _ = self.problem

    def train_dataloader(self) -> RepeatedBatch:
        """The problem, ``epoch_length`` times."""
        return RepeatedBatch(self.problem, self.epoch_length)

    def val_dataloader(self) -> RepeatedBatch:
        """The problem, once."""
        return RepeatedBatch(self.problem, 1)

    def test_dataloader(self) -> RepeatedBatch:
        """The problem, once."""
        return RepeatedBatch(self.problem, 1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The problem on the device, moved there at the first call."""
        if not isinstance(batch, RecoveryBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        if self._moved is None or self._moved[0] != device:
            # not the batch that was passed: with some precisions Lightning has converted it into a new one
            moved = super().transfer_batch_to_device(self.problem, device, dataloader_idx)
            self._moved = (device, moved)
        return self._moved[1]
