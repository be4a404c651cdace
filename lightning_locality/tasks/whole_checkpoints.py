"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

__all__ = ["WholeCheckpoints", "with_whole_checkpoints"]

import os
from pathlib import Path
from typing import Any, final

from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Trainer
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy


@final
class WholeCheckpoints(TorchCheckpointIO):
    """A checkpoint takes the place of an earlier one only once it is complete, wherever the run is stopped.

    Lightning writes into the folder for temporary files and moves the file from there. Where that is another disk,
    as on most clusters, the move is a copy, and a process killed meanwhile would leave half a checkpoint and not the
    one before. Here the copy goes to ``NAME.part`` and is renamed. Paths with a protocol are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint file."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        part = Path(f"{path}.part")
        super().save_checkpoint(checkpoint, part, storage_options)
        os.replace(part, path)


def with_whole_checkpoints(trainer: Trainer) -> Trainer:
    """The trainer, which on one device or under DDP now writes :class:`WholeCheckpoints`, unless given a writer."""
    strategy = trainer.strategy
    if type(strategy) in (SingleDeviceStrategy, DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = WholeCheckpoints()
    return trainer
