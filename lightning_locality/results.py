"""The results of many runs: one table, one figure."""

from __future__ import annotations

__all__ = ["FinishedRun", "collect", "progress_table", "result_table"]

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from lightning_locality.figures import read_metrics
from lightning_locality.whole import written_whole

Row = Mapping[str, Any]

_TAIL = 16384  # bytes at the end of a metrics file that hold its last row


class FinishedRun(Protocol):
    """What is read of a run: its row, its point of the grid, its folder, and whether it has finished."""

    @property
    def variant(self) -> str:
        """Name of the row."""

    @property
    def point(self) -> Mapping[str, Any]:
        """Option -> value."""

    @property
    def folder(self) -> Path:
        """Folder with summary.json and metrics.csv."""

    @property
    def finished(self) -> bool:
        """Whether there is a summary."""


def collect(runs: Sequence[FinishedRun], path: Path) -> list[dict[str, Any]]:
    """Gather the summaries of finished runs into one tidy CSV file, a row per run.

    Args:
        runs: The runs; unfinished ones are left out.
        path: File to write, whole or not at all.

    Returns:
        The rows.
    """
    rows: list[dict[str, Any]] = []
    for run in runs:
        if run.finished:
            summary = json.loads((run.folder / "summary.json").read_text())
            own = {key: summary[key] for key in ("epochs", "iterations", "seconds") if key in summary}
            rows.append({"variant": run.variant, **run.point, **own, **summary["metrics"]})
    names = list(dict.fromkeys(key for row in rows for key in row))
    with written_whole(path) as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def result_table(runs: Sequence[FinishedRun], rows: Sequence[Row]) -> Table:
    """How every variant ended: mean, and range where there are several runs.

    Accuracies where the runs have them, otherwise loss, reconstruction error and iterations.

    Args:
        runs: All runs, finished or not.
        rows: What :func:`collect` has returned for them.
    """
    recovery = any("iterations" in row for row in rows) and not any("test/accuracy" in row for row in rows)
    if recovery:
        table = Table(title="loss and reconstruction error, last measurement: mean (lowest to highest)")
        columns = [
            ("training loss", "train/loss", 1.0, ".2g"),
            ("test loss", "test/loss", 1.0, ".2g"),
            ("error", "reconstruction_error", 1.0, ".2g"),
            ("iterations", "iterations", 1.0, ".0f"),
        ]
        columns = [column for column in columns if any(column[1] in row for row in rows)]
    else:
        table = Table(title="accuracy in %, last epoch: mean (lowest to highest)")
        columns = [
            ("training", "train/accuracy", 100.0, ".1f"),
            ("test", "test/accuracy", 100.0, ".1f"),
            ("R on test", "test/regularizer", 1.0, ".2f"),
        ]
    for column in ("run", "finished", *(title for title, *_ in columns), "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for variant in dict.fromkeys(run.variant for run in runs):
        own = [row for row in rows if row["variant"] == variant]
        table.add_row(
            variant,
            f"{len(own)} of {sum(run.variant == variant for run in runs)}",
            *(_spread(own, key, scale, digits) for _, key, scale, digits in columns),
            _spread(own, "seconds", 1, ".0f", with_range=False),
        )
    return table


def _spread(rows: Sequence[Row], key: str, scale: float, digits: str, with_range: bool = True) -> str:
    values = [scale * row[key] for row in rows if key in row]
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):{digits}}"
    if len(values) == 1 or not with_range:
        return mean
    return f"{mean} ({min(values):{digits}} to {max(values):{digits}})"


def progress_table(runs: Sequence[FinishedRun], states: Sequence[tuple[FinishedRun, str]], seconds: float) -> Table:
    """What every run is doing now.

    Args:
        runs: All runs.
        states: Those that are running or have failed, and which of the two.
        seconds: Time since the start.
    """
    finished = sum(run.finished for run in runs)
    table = Table(title=f"{finished} of {len(runs)} runs finished, {seconds:.0f} s", show_header=False)
    known = {run.folder: state for run, state in states}
    for run in runs:
        state = known.get(run.folder, "done" if run.finished else "waiting")
        table.add_row(run.folder.name, state, _last_epoch(run.folder / "metrics.csv") if state == "running" else "")
    return table


def _last_epoch(metrics: Path) -> str:
    last = _last_row(metrics) if metrics.exists() else {}
    if "iteration" in last:
        parts = [f"iteration {int(last['iteration'])}"]
        for name, key in (("loss", "train/loss"), ("error", "reconstruction_error")):
            if key in last:
                parts.append(f"{name} {last[key]:.3g}")
        return ", ".join(parts)
    history = read_metrics(metrics) if metrics.exists() else []
    if not history:
        return "starting"
    last = history[-1]
    parts = [f"epoch {int(last['epoch']) + 1}"]
    for name, key in (("training", "train/accuracy"), ("validation", "val/accuracy")):
        if key in last:
            parts.append(f"{name} {100 * last[key]:.0f} %")
    return ", ".join(parts)


def _last_row(metrics: Path) -> dict[str, float]:
    """Last row of a metrics file, which may have many thousands and is looked at again and again."""
    with metrics.open("rb") as file:
        header = file.readline().decode()
        size = file.seek(0, os.SEEK_END)
        file.seek(max(len(header), size - _TAIL))
        lines = file.read().decode().split("\n")
    # what follows the last line end is a row that is being written
    for row in csv.DictReader(lines[:-1][-1:], fieldnames=next(csv.reader([header]), [])):
        return {key: float(value) for key, value in row.items() if value}
    return {}
