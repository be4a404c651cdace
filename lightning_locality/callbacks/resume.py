"""Resume a run that was killed or stopped: its metrics, its seconds, its configuration, its checkpoints."""

from __future__ import annotations

__all__ = ["AtomicCheckpointIO", "MetricsFile"]

import csv
import inspect
import os
import pkgutil
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from jsonargparse import Namespace
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from lightning_locality.results import atomic_write, read_rows


@final
class MetricsFile(Logger, Callback):
    """Write metrics to ``metrics.csv`` of a folder; a resumed run continues exactly where its checkpoint was saved.

    As a logger it writes one row per call. As a callback it stores in every checkpoint the number of rows written so
    far, and the row of the epoch that ends, which Lightning logs only afterwards. On resume the file is cut back to
    these rows. Pass the same object as ``logger`` and among the ``callbacks`` of the trainer.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.path = self.folder / "metrics.csv"
        self._columns: list[str] = []
        self._rows = 0
        self._epoch_ends = False
        self._stored: dict[str, Any] = {}

    @property
    def name(self) -> None:
        """None, like the version: the folder alone identifies the run."""

    version = name

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.folder)

    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` of the run holds them."""

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append a row."""
        # a module may log for itself at the end of an epoch; Lightning's own row names the epoch
        self._epoch_ends = self._epoch_ends and "epoch" not in metrics
        self._append({**_scalars(metrics), "step": step})

    @rank_zero_only
    def _append(self, row: dict[str, Any]) -> None:
        if row.keys() <= set(self._columns):
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self._columns).writerow(row)
            self._rows += 1
        else:
            self._write([*self._read(), row])

    def _read(self) -> list[dict[str, Any]]:
        return read_rows(self.path) if self.path.is_file() else []

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._columns = sorted({name for row in rows for name, value in row.items() if value not in ("", None)})
        self._rows = len(rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(self.path) as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the previous epoch is over, whether or not it had metrics."""
        self._epoch_ends = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the metrics of the epoch are about to be logged, after its checkpoint has been saved."""
        self._epoch_ends = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the number of rows written, and the row that is about to be logged."""
        row = {}
        # on every process: computing a metric may need them all
        if self._epoch_ends and (metrics := trainer._logger_connector.metrics["log"]):
            row = {**_scalars(metrics), "epoch": trainer.current_epoch, "step": trainer.global_step - 1}
        checkpoint["callbacks"][self.state_key] = {"rows": self._rows, "next": row}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Take what the checkpoint says; one of version 0.1 holds the row of its epoch, but no number of rows."""
        recovery = checkpoint.get("recovery")
        steps = recovery["row"].get("iteration", 0) + 1 if recovery else checkpoint["global_step"]
        self._stored = {**checkpoint["callbacks"].get(self.state_key, {}), "steps": steps}
        if "rows" not in self._stored:
            kept = checkpoint["callbacks"].get("KeptRow", {}).get("row", {})
            rows = [row for row in self._read() if int(row["step"]) < steps]
            known = {name for row in rows if row.get("epoch") == str(kept.get("epoch")) for name in row if row[name]}
            missing = {name: value for name, value in kept.items() if name not in known}
            place = {name: kept[name] for name in ("epoch", "step") if missing}
            self._stored |= {"rows": len(rows), "next": {**missing, **place}}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cut the file of a resumed run back to the rows of its checkpoint; another folder starts a file of its own.

        A run that Lightning's EarlyStopping had stopped trains no further: it would stop only after another epoch.
        """
        trainer.should_stop |= any(callback.stopped_epoch > 0 for callback in trainer.early_stopping_callbacks)
        if not self._stored or not trainer.is_global_zero:
            return
        # later steps: the folder holds an earlier continuation of the checkpoint
        rows = [row for row in self._read()[: self._stored["rows"]] if int(row["step"] or 0) <= self._stored["steps"]]
        if self._stored["next"] and (rows or Path(str(trainer.ckpt_path)).parent.resolve() == self.folder.resolve()):
            rows.append(self._stored["next"])
        if rows or self.path.is_file():
            self._write(rows)
        self._stored = {}

    # where no epoch is left to train, the first hook after all has been restored
    on_fit_end = on_train_start


def _scalars(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.item() if isinstance(value, Tensor) else value for name, value in metrics.items()}


@final
class Stopwatch(Callback):
    """Count all seconds of a run and of its earlier parts; Lightning's ``Timer`` counts those of training alone."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._stored = self._earlier = 0.0

    @property
    def seconds(self) -> float:
        """Seconds of all parts; those after the last checkpoint of a killed part are repeated, and count once."""
        return self._earlier + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """Return the seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seconds of the checkpoint, which may be one that is only tested."""
        self._stored = float(state_dict["seconds"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue from the checkpoint's."""
        self._earlier = self._stored


@final
class SavedConfig(SaveConfigCallback):
    """Write ``config.yaml`` when all is built and the checkpoint is loaded: a run that is refused changes nothing."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing, where Lightning would write it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the new configuration, atomically, and rename that of the earlier part of a resumed run."""
        folder = Path(str(trainer.log_dir))
        config, part = folder / self.config_filename, folder / f"{self.config_filename}.part"
        self.config_filename, self.overwrite = part.name, True
        _drop_class_defaults(self.config)
        super().setup(trainer, pl_module, "fit")
        if trainer.is_global_zero:
            # without a checkpoint the former one is that of a start that failed
            if trainer.ckpt_path and config.exists():
                config.rename(folder / f"config.{len(list(folder.glob('config.*.yaml')))}.yaml")
            os.replace(part, config)


def _drop_class_defaults(config: Namespace) -> None:
    """Remove arguments left at a default that is a class: read again, its name would stand for an instance of it.

    So it is with ``embed_layer: Callable = PatchEmbed`` of timm's VisionTransformer.
    """
    for key, value in list(config.items()):
        owner, _, name = key.rpartition(".init_args.")
        if owner and isinstance(value, type):
            parameters = inspect.signature(pkgutil.resolve_name(config[f"{owner}.class_path"])).parameters
            if name in parameters and parameters[name].default is value:
                del config[key]


@final
class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically: a process killed while writing leaves the previous one.

    Lightning moves them from the folder for temporary files; if that is another disk, as on most clusters, the move is
    a copy. Paths with a protocol (``s3://``) are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write it in a new folder ``PATH.part``, which nobody else has opened, and rename it."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        part = Path(f"{path}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        # left by a process that was killed, or a link planted there
        shutil.rmtree(part) if part.is_dir() and not part.is_symlink() else part.unlink(missing_ok=True)
        part.mkdir(mode=0o700)
        try:
            super().save_checkpoint(checkpoint, part / "checkpoint", storage_options)
            os.replace(part / "checkpoint", path)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def use_atomic_checkpoints(trainer: Trainer) -> Trainer:
    """Let a trainer on one device or under DDP write atomically, unless it was given a ``CheckpointIO``."""
    strategy = trainer.strategy
    if type(strategy) in (SingleDeviceStrategy, DDPStrategy) and type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    return trainer
