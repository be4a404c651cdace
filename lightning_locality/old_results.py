"""The results of many runs: one table, one figure."""

from __future__ import annotations

__all__ = ["FinishedRun", "Progress", "collect", "progress_table", "result_row", "result_table"]

import csv
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final

from rich.table import Table

from lightning_locality.callbacks.history import written_whole
from lightning_locality.results import history

Row = Mapping[str, Any]

_TAIL = 16384  # bytes at the end of a metrics file that hold its last row
_ROWS = 30  # runs of a table that fits on a screen


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
    rows = [result_row(run) for run in runs if run.finished]
    names = list(dict.fromkeys(key for row in rows for key in row))
    with written_whole(path) as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def result_row(run: FinishedRun) -> dict[str, Any]:
    """A run's place in the sweep, and what its summary says once it has finished."""
    row = {"run": run.folder.name, "variant": run.variant, **run.point}
    if not run.finished:
        return row
    summary = json.loads((run.folder / "summary.json").read_text())
    counts = {key: summary[key] for key in ("epochs", "iterations", "seconds") if key in summary}
    return {**row, **counts, **summary["metrics"]}


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


@final
class Progress:
    """How far a sweep is, and how long it may take still.

    The time left is what the runs that wait and run still need, at the mean time of those that have finished, shared
    among the places.

    Args:
        runs: All runs.
        places: Runs at a time.
        clock: Seconds.
    """

    def __init__(self, runs: Sequence[FinishedRun], places: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.runs, self.places, self.clock = runs, places, clock
        self.started = clock()
        self.counts: dict[str, int] = {}
        self.left: float | None = None
        self._since: dict[Path, float] = {}
        self._spent = [_seconds(run) for run in runs if run.finished]

    def update(self, states: Sequence[tuple[FinishedRun, str]]) -> None:
        """Take note of what the runs are doing.

        Args:
            states: Runs that are not waiting, and what they do: ``running``, ``failed`` or something else.
        """
        now = self.clock()
        doing = {run.folder: state for run, state in states if not run.finished}
        working = {folder for folder, state in doing.items() if state.startswith("running")}
        for folder in self._since.keys() - working:
            begun = self._since.pop(folder)
            if doing.get(folder) != "failed":
                self._spent.append(now - begun)
        for folder in working:
            self._since.setdefault(folder, now)
        done = sum(run.finished for run in self.runs)
        failed = sum(state == "failed" for state in doing.values())
        waiting = len(self.runs) - done - failed - len(working)
        self.counts = {"done": done, "running": len(working), "failed": failed, "waiting": max(0, waiting)}
        self.left = None
        if self._spent:
            each = sum(self._spent) / len(self._spent)
            rest = [max(0.0, each - (now - self._since[folder])) for folder in working] + [each] * max(0, waiting)
            self.left = max(sum(rest) / self.places, *rest, 0.0) if rest else 0.0

    def __str__(self) -> str:
        """In words: ``3 done, 2 running, 0 failed, 4 waiting; 120 s, about 4 min left``."""
        counts = ", ".join(f"{number} {state}" for state, number in self.counts.items())
        left = "" if self.left is None else f", about {_duration(self.left)} left"
        return f"{counts}; {_duration(self.clock() - self.started)}{left}"


def progress_table(runs: Sequence[FinishedRun], states: Sequence[tuple[FinishedRun, str]], progress: Progress) -> Table:
    """What every run is doing now; of many runs, those that do something or have failed.

    Args:
        runs: All runs.
        states: Those that are not waiting or done, and what they do.
        progress: The title.
    """
    # a title is wrapped at the width of its table
    table = Table(title=str(progress), show_header=False, min_width=len(str(progress)))
    known = {run.folder: state for run, state in states}
    for run in runs:
        if len(runs) > _ROWS and run.folder not in known:
            continue
        state = known.get(run.folder, "done" if run.finished else "waiting")
        doing = _last_epoch(run.folder / "metrics.csv") if state.startswith("running") else ""
        table.add_row(run.folder.name, state, doing)
    return table


def _seconds(run: FinishedRun) -> float:
    return float(json.loads((run.folder / "summary.json").read_text()).get("seconds", 0.0))


def _duration(seconds: float) -> str:
    """Time in words: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _last_epoch(metrics: Path) -> str:
    last = _last_row(metrics) if metrics.exists() else {}
    if "iteration" in last:
        parts = [f"iteration {int(last['iteration'])}"]
        for name, key in (("loss", "train/loss"), ("error", "reconstruction_error")):
            if key in last:
                parts.append(f"{name} {last[key]:.3g}")
        return ", ".join(parts)
    rows = history(metrics.parent)
    if rows.empty:
        return "starting"
    last = {str(name): value for name, value in rows.reset_index().iloc[-1].dropna().items()}
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
