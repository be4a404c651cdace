"""Runs gathered by place: a cell for every panel, group and x, with the values of its runs."""

from __future__ import annotations

__all__ = ["STATISTICS", "Axes", "Cell", "averaged_over", "cells", "ordered_groups", "table_rows", "write_table"]

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_locality.callbacks.history import written_whole
from lightning_locality.plotting.run_table import Row, RunTable, Value, ordered, shown
from lightning_locality.plotting.style import Point

STATISTICS = ("mean", "std", "sem", "median", "least", "greatest", "n", "runs")
_SHOWN_VALUES = 6


@dataclass(frozen=True)
class Axes:
    """Which columns are drawn against which, by full name.

    Args:
        x: Along the axis.
        y: What is averaged.
        group: A line for every combination of their values.
        panel: A panel for every value.
    """

    x: str
    y: str
    group: tuple[str, ...] = ()
    panel: str | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """Columns that say where a run belongs, in the order of the table."""
        return (*([self.panel] if self.panel else []), *self.group, self.x)


@dataclass(frozen=True)
class Cell:
    """The runs of one place.

    Args:
        panel: Value of the panel's column.
        group: Values of the group's columns.
        x: Value of x.
        values: y of the runs that have one that is finite.
        runs: How many runs there should be: the most that any cell has, finished or not.
    """

    panel: Value | None
    group: tuple[Value | None, ...]
    x: Value
    values: tuple[float, ...]
    runs: int

    def point(self, place: float, scale: float = 1.0) -> Point:
        """As it is drawn."""
        return Point(place, tuple(scale * value for value in self.values))

    @property
    def statistics(self) -> tuple[float | int | None, ...]:
        """The numbers of :data:`STATISTICS`; None where too few runs have a value."""
        if not self.values:
            return (*[None] * (len(STATISTICS) - 2), 0, self.runs)
        point = self.point(0.0)
        spreads = [value if math.isfinite(value) else None for value in (point.std, point.sem)]
        ends = (point.centre("median"), min(self.values), max(self.values))
        return (point.centre("mean"), *spreads, *ends, len(self.values), self.runs)


def cells(table: RunTable, axes: Axes, over: Sequence[str] | None = None) -> list[Cell]:
    """Gather the runs.

    Args:
        table: The runs. Those without x are left out.
        axes: Columns, by full name.
        over: Columns that may vary within a cell; None for all.

    Returns:
        Cells in order of panel, group and x.

    Raises:
        ValueError: No run has x and y, y is no number, or another column varies within a cell.
    """
    found: dict[Any, list[Row]] = {}
    for row in table.rows:
        if axes.x in row.values:
            panel = row.values.get(axes.panel) if axes.panel else None
            group = tuple(row.values.get(name) for name in axes.group)
            found.setdefault((panel, group, row.values[axes.x]), []).append(row)
        _number(row, axes.y)
    _only_over(table, found, over)
    most = max(map(len, found.values()), default=0)
    gathered = []
    for panel in ordered(key[0] for key in found):
        own = {key: rows for key, rows in found.items() if key[0] == panel}
        for group in ordered_groups([key[1] for key in own]):
            for x in ordered(row.values[axes.x] for row in table.rows if axes.x in row.values):
                if (panel, group, x) in own:
                    numbers = [_number(row, axes.y) for row in own[panel, group, x]]
                    values = tuple(number for number in numbers if number is not None)
                    gathered.append(Cell(panel, group, x, values, most))
    if not any(cell.values for cell in gathered):
        raise ValueError(f"no run has both {axes.x} and a finite {axes.y}: nothing to draw")
    return gathered


def _number(row: Row, name: str) -> float | None:
    value = row.values.get(name)
    if isinstance(value, str):
        raise ValueError(f"--y: {name} is not a number: {value!r}; choose a column of numbers")
    return None if value is None or not math.isfinite(value) else float(value)


def _only_over(table: RunTable, found: dict[Any, list[Row]], over: Sequence[str] | None) -> None:
    if over is None:
        return
    for name in table.varied:
        if name not in over and any(len({row.values.get(name) for row in rows}) > 1 for rows in found.values()):
            raise ValueError(
                f"--over {' '.join(over)}: {name} varies as well between runs that would be averaged; put it into "
                "--group, --panel or --over, or choose one value with --where"
            )


def ordered_groups(groups: Sequence[tuple[Value | None, ...]]) -> list[tuple[Value | None, ...]]:
    """Each combination of values once, in order of the first, then of the second, and so on."""
    places = [ordered(column) for column in zip(*groups, strict=True)]
    return sorted(
        dict.fromkeys(groups), key=lambda group: [p.index(value) for p, value in zip(places, group, strict=True)]
    )


def averaged_over(table: RunTable, axes: Axes) -> list[str]:
    """What varies between runs of the same cell, in words: ``seed_everything (0, 1, 2)``."""
    texts = []
    for name in table.varied:
        if name in axes.places:
            continue
        own: dict[Any, set[Any]] = {}
        for row in table.rows:
            own.setdefault(tuple(row.values.get(place) for place in axes.places), set()).add(row.values.get(name))
        if any(len(values) > 1 for values in own.values()):
            values = [shown(value) for value in ordered(row.values.get(name) for row in table.rows)]
            listed = ", ".join(values) if len(values) <= _SHOWN_VALUES else f"{len(values)} values"
            texts.append(f"{name} ({listed})")
    return texts


def table_rows(axes: Axes, gathered: Sequence[Cell]) -> tuple[list[str], list[list[Any]]]:
    """The numbers behind the figure: header and rows, places first, then :data:`STATISTICS`, in the units of y."""
    rows = [
        [
            "" if value is None else shown(value) if isinstance(value, bool) else value
            for value in (*([cell.panel] if axes.panel else []), *cell.group, cell.x, *cell.statistics)
        ]
        for cell in gathered
    ]
    return [*axes.places, *STATISTICS], rows


def write_table(numbers: tuple[Sequence[str], Sequence[Sequence[Any]]], path: Path) -> None:
    """Write header and rows as a CSV file, whole or not at all; None becomes an empty cell."""
    header, rows = numbers
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
