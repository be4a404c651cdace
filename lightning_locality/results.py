"""The results of many runs: one table, one figure."""

from __future__ import annotations

__all__ = ["FinishedRun", "collect", "draw", "progress_table", "result_table"]

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.table import Table

from lightning_locality.figures import accuracy_curves, read_metrics, save_figure

Row = Mapping[str, Any]


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
            own = {"epochs": summary["epochs"], "seconds": summary["seconds"], **summary["metrics"]}
            rows.append({"variant": run.variant, **run.point, **own})
    names = list(dict.fromkeys(key for row in rows for key in row))
    temporary = path.with_name(path.name + ".part")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)
    return rows


def result_table(runs: Sequence[FinishedRun], rows: Sequence[Row]) -> Table:
    """Accuracy of every variant: mean, and range where there are several runs.

    Args:
        runs: All runs, finished or not.
        rows: What :func:`collect` has returned for them.
    """
    table = Table(title="accuracy in %, last epoch: mean (lowest to highest)")
    for column in ("run", "finished", "training", "test", "R on test", "seconds"):
        table.add_column(column, justify="left" if column == "run" else "right")
    for variant in dict.fromkeys(run.variant for run in runs):
        own = [row for row in rows if row["variant"] == variant]
        table.add_row(
            variant,
            f"{len(own)} of {sum(run.variant == variant for run in runs)}",
            _spread(own, "train/accuracy", 100, 1),
            _spread(own, "test/accuracy", 100, 1),
            _spread(own, "test/regularizer", 1, 2),
            _spread(own, "seconds", 1, 0, with_range=False),
        )
    return table


def _spread(rows: Sequence[Row], key: str, scale: float, digits: int, with_range: bool = True) -> str:
    values = [scale * row[key] for row in rows if key in row]
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.{digits}f}"
    if len(values) == 1 or not with_range:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


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
    history = read_metrics(metrics) if metrics.exists() else []
    if not history:
        return "starting"
    last = history[-1]
    parts = [f"epoch {int(last['epoch']) + 1}"]
    for name, key in (("training", "train/accuracy"), ("validation", "val/accuracy")):
        if key in last:
            parts.append(f"{name} {100 * last[key]:.0f} %")
    return ", ".join(parts)


def draw(runs: Sequence[FinishedRun], folder: Path) -> None:
    """Draw accuracy against epoch for all runs into ``FOLDER/accuracy.pdf`` and ``.png``.

    Args:
        runs: The runs; those without metrics are left out.
        folder: Where the figure goes.
    """
    histories: dict[str, list[list[dict[str, float]]]] = {}
    for run in runs:
        metrics = run.folder / "metrics.csv"
        if metrics.exists():
            histories.setdefault(run.variant, []).append(read_metrics(metrics))
    if histories:
        save_figure(accuracy_curves(histories), folder / "accuracy")
