"""Checkpoints that are written whole or not at all."""

from __future__ import annotations

__all__ = ["KeptRow", "MetricsFile", "Stopwatch", "WholeCheckpoints", "with_whole_checkpoints", "written_whole"]

import csv
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, final

from lightning_fabric.loggers.logger import rank_zero_experiment
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy


@contextmanager
def written_whole(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing that takes the place of another only once it is complete.

    Args:
        path: The file; where writing fails, what is there stays.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with written_whole(path) as file:
        ...     _ = file.write("all")
        ...     before = path.exists()
        >>> before, path.read_text()
        (False, 'all')
    """
    temporary = path.with_name(path.name + ".part")
    # no translation of line ends: csv writes its own
    with temporary.open("w", newline="") as file:
        yield file
    os.replace(temporary, path)


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer deletes the rows of an earlier part of the run; this one continues the file."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class MetricsFile(CSVLogger):
    """Write metrics to ``metrics.csv`` of a folder; a resumed run appends to the rows already there.

    Args:
        folder: Folder of the run.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer."""
        if not isinstance(self._experiment, _AppendingWriter):
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment

    def keep(self, wanted: Callable[[Mapping[str, str]], bool]) -> None:
        """Drop the other rows of the file, which an earlier part of the run has written.

        Args:
            wanted: Whether a row, as text by column, is kept.
        """
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        if not path.is_file():
            return
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), list(reader.fieldnames or [])
        with written_whole(path) as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(row for row in rows if wanted(row))

    def complete(self, row: Mapping[str, float]) -> None:
        """Write what the file lacks of the metrics of an epoch.

        Args:
            row: ``epoch``, ``step`` and the metrics.
        """
        path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
        known: set[str] = set()
        if path.is_file():
            with path.open(newline="") as file:
                for stored in csv.DictReader(file):
                    if stored.get("epoch") and int(float(stored["epoch"])) == row["epoch"]:
                        known |= {name for name, value in stored.items() if value}
        missing = {name: value for name, value in row.items() if name not in known and name not in ("epoch", "step")}
        if missing:
            self.log_metrics({**missing, "epoch": row["epoch"]}, int(row["step"]))
            self.save()

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: the run's config.yaml holds them."""


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


class Stopwatch(Callback):
    """Count the seconds of a run that is continued on from those at the checkpoint that it continues from.

    What a killed part did after its last checkpoint is done again, and counts once.
    """

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._earlier = 0.0

    @property
    def seconds(self) -> float:
        """Time since the start, with that of the earlier parts."""
        return self._earlier + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on from the checkpoint's."""
        self._earlier = float(state_dict["seconds"])


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
