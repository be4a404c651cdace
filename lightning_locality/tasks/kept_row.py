"""The last row of a run's metrics, kept in its checkpoint."""

from __future__ import annotations

__all__ = ["KeptRow"]

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from lightning_locality.tasks.logger import MetricsFile


class KeptRow(Callback):
    """Keep an epoch's metrics in the checkpoint at its end, and write them on resume where the file lacks them.

    Lightning saves the checkpoint before it writes the metrics of the epoch: a run killed in between would continue
    with the next epoch, without a row for this one.
    """

    def __init__(self) -> None:
        self.row: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The row."""
        return {"row": self.row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the row of the checkpoint."""
        self.row = dict(state_dict["row"])

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the row, before the checkpoints are saved."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.row = {**metrics, "epoch": trainer.current_epoch, "step": trainer.global_step - 1}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what the file lacks of the row, unless the run goes on in another folder, which begins with its own."""
        folder = Path(trainer.ckpt_path).parent.resolve() if trainer.ckpt_path else None
        for logger in trainer.loggers if self.row and trainer.is_global_zero else ():
            if isinstance(logger, MetricsFile) and Path(logger.log_dir).resolve() == folder:
                logger.complete(self.row)
