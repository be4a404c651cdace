"""The metrics file of a run."""

from __future__ import annotations

__all__ = ["MetricsFile"]

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from lightning_locality.whole import written_whole


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
