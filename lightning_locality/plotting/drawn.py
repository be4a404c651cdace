"""A chart drawn from options, with its numbers."""

from __future__ import annotations

__all__ = ["DrawnChart", "draw_chart"]

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from lightning_locality.plotting.cells import Axes, averaged_over, cells, table_rows
from lightning_locality.plotting.chart import Chart
from lightning_locality.plotting.options import INCHES
from lightning_locality.plotting.run_table import RunTable

_DISTANCES = ("distance", "path_length")


@dataclass(frozen=True)
class DrawnChart:
    """A figure and what stands behind it.

    Args:
        figure: The figure.
        numbers: Header and rows of its table.
        name: For its file, without ending.
        notes: What was averaged and what was left out, in words.
    """

    figure: Figure
    numbers: tuple[list[str], list[list[Any]]]
    name: str
    notes: tuple[str, ...]


def draw_chart(options: Namespace, table: RunTable) -> DrawnChart:
    """Draw what the kinds ``accuracy`` and ``xy`` of the figure command ask for.

    Args:
        options: As :func:`~lightning_locality.plotting.options.parsed` gives them.
        table: The runs.

    Raises:
        ValueError: No such column, or nothing that can be drawn.
    """
    chart, over = _chart(options, table)
    gathered = cells(table, chart.axes, over)
    notes = []
    if averaged := averaged_over(table, chart.axes):
        notes.append(f"averaged over {', '.join(averaged)}")
    if lost := sum(chart.axes.x not in row.values for row in table.rows):
        notes.append(f"{lost} run{'s' if lost > 1 else ''} without {chart.axes.x} left out")
    name = f"{_file(chart.axes.y)}_against_{_file(chart.axes.x.split('.')[-1])}"
    return DrawnChart(chart.draw(gathered), table_rows(chart.axes, gathered), name, tuple(notes))


def _file(name: str) -> str:
    return re.sub(r"\W+", "_", name)


def _chart(options: Namespace, table: RunTable) -> tuple[Chart, list[str] | None]:
    accuracy = options.kind == "accuracy"
    x = table.column(options.x, "--x") if options.x else _default_x(table)
    y = table.column(options.y, "--y")
    panel = table.column(options.panel, "--panel") if options.panel else None
    if options.group is None and accuracy:
        group = _default_group(table, (x, panel))
    else:
        group = tuple(table.column(name, "--group") for name in options.group or ())
    places = (x, *group, *([panel] if panel else []))
    if twice := [name for name in places if places.count(name) > 1]:
        raise ValueError(f"{twice[0]} is asked for twice: use it once in --x, --group and --panel")
    # a table of somebody else may be in per cent already
    values = [row.values.get(y) for row in table.rows]
    percent = y.endswith("accuracy") and not any(isinstance(value, (int, float)) and value > 1 for value in values)
    level = getattr(options, "chance", None)
    return Chart(
        Axes(x, y, group, panel),
        log=options.log,
        statistic=options.statistic,
        spread=options.spread,
        scale=100.0 if percent else 1.0,
        level=(level, "chance") if level is not None else None,
        labels=_pairs(options.labels or ()),
        width=INCHES[options.width],
        points=options.points,
    ), None if options.over is None else [table.column(name, "--over") for name in options.over]


def _default_x(table: RunTable) -> str:
    for name in _DISTANCES:
        found = [own for own in table.columns if own.split(".")[-1] == name]
        if len(found) == 1:
            return found[0]
    raise ValueError(
        f"--x: there is no single column {' or '.join(_DISTANCES)}; choose one of {', '.join(table.columns)}"
    )


def _default_group(table: RunTable, used: Sequence[str | None]) -> tuple[str, ...]:
    """The weight and the variant, as far as they vary and one does not tell the other."""
    weights = [name for name in table.columns if name.split(".")[-1] == "weight"]
    found = [name for name in ("variant", *weights) if name in table.columns and name not in used]
    varying = [name for name in found if len({row.values.get(name) for row in table.rows}) > 1]
    if len(varying) == 2:
        pairs = {tuple(row.values.get(name) for name in varying) for row in table.rows}
        if len(pairs) == len({pair[1] for pair in pairs}):
            return (varying[1],)
        if len(pairs) == len({pair[0] for pair in pairs}):
            return (varying[0],)
    return tuple(varying)


def _pairs(texts: Sequence[str]) -> Mapping[str, str]:
    for text in texts:
        if "=" not in text:
            raise ValueError(f"--labels: expected NAME=TEXT, got {text!r}")
    return {name: label for name, _, label in (text.partition("=") for text in texts)}
