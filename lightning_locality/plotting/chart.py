"""A chart of finished runs: any column against any other, a line per group, a panel per value."""

from __future__ import annotations

__all__ = ["Chart", "Log", "column_label"]

import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

from matplotlib import rc_context
from matplotlib.axes import Axes as Panel
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from lightning_locality.plotting.cells import Axes, Cell, ordered_groups
from lightning_locality.plotting.run_table import Value, ordered, shown
from lightning_locality.plotting.style import STYLE, Spread, Statistic, draw_points, legend_below, line_style

Log = Literal["x", "y", "xy", "none"]

_NAMES = {
    "distance": "distance (pixels)",
    "path_length": "path length",
    "weight": "weight of the regulariser",
    "seed_everything": "seed",
    "seconds": "time (s)",
    "observations": "observed entries",
}
_STAGES = {"train": "training", "val": "validation", "test": "test"}
_TICKS = 7  # places on the axis that are named each
_DECADES = 2.5  # fewer are named at 1, 2 and 5 in each
_CLOSEST = 0.09  # of the axis: ticks nearer than this would touch
_WIDE = 5.0  # inches
_LETTERS = 16  # in an inch, at 8 points
_SLANTED = 0.25  # inches between names at 30 degrees, at least
_MARGIN = 0.07  # of the axis, beside the first and the last place: room for bars that stand beside each other


def column_label(name: str) -> str:
    """How a column is called in a figure.

    Example:
        >>> column_label("data.init_args.distance"), column_label("test/accuracy"), column_label("my_column")
        ('distance (pixels)', 'test accuracy', 'my column')
    """
    stage, slash, rest = name.rpartition("/")
    if slash:
        return f"{_STAGES.get(stage, stage)} {rest}".replace("_", " ")
    last = name.split(".")[-1]
    return _NAMES.get(last, last.replace("_", " "))


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]


@dataclass(frozen=True)
class Chart:
    """How cells are drawn.

    Args:
        axes: Columns.
        log: Logarithmic axes.
        statistic: What the lines go through.
        spread: What the bars show.
        scale: Factor of y in the figure; 100 for accuracies in per cent.
        level: Horizontal line, in the units of y, and its name.
        labels: What a column or a value is called in the figure, instead of its own name.
        width: Of the figure, in inches.
        points: Marks alone, without lines between them.
    """

    axes: Axes
    log: Log = "none"
    statistic: Statistic = "mean"
    spread: Spread = "std"
    scale: float = 1.0
    level: tuple[float, str] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    width: float = 3.35
    points: bool = False

    def draw(self, cells: Sequence[Cell]) -> Figure:
        """Draw.

        Args:
            cells: As :func:`~lightning_locality.plotting.cells.cells` gives them.

        Raises:
            ValueError: Values that have no logarithm, or a label for what is not in the figure.
        """
        panels = ordered(cell.panel for cell in cells)
        groups = ordered_groups([cell.group for cell in cells])
        self._check(cells)
        xs = ordered(cell.x for cell in cells)
        numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in xs)
        places = {x: float(x) if numbers else float(number) for number, x in enumerate(xs)}
        joined = numbers and not self.points
        columns = min(len(panels), 3 if self.width > _WIDE else 2)
        lines = -(-len(panels) // columns)
        height = min(max(0.68 * self.width / columns, 1.5), 2.9)
        with rc_context(STYLE):
            figure = Figure(figsize=(self.width, lines * height), layout="constrained")
            grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
            for number, axes in enumerate(grid.flat):
                if number >= len(panels):
                    axes.axis("off")
                    continue
                own = [cell for cell in cells if cell.panel == panels[number]]
                for position, group in enumerate(groups):
                    points = [cell.point(places[cell.x], self.scale) for cell in own if cell.group == group]
                    points = [point for point in points if point.values]
                    look: Any = {"statistic": self.statistic, "spread": self.spread, "joined": joined}
                    draw_points(axes, points, position, len(groups), **look)
                if self.level is not None:
                    axes.axhline(self.scale * self.level[0], color="0.4", linewidth=0.8, linestyle=":", zorder=0)
                if self.axes.panel:
                    title = self._value(self.axes.panel, panels[number])
                    fitting = textwrap.fill(title, int(_LETTERS * 0.8 * self.width / columns))
                    axes.set_title(fitting, fontsize=STYLE["font.size"])
                self._label(axes, number, columns, len(panels))
            grid[0, 0].margins(x=_MARGIN)
            if "x" in self.log:
                grid[0, 0].set_xscale("log")
            if "y" in self.log:
                grid[0, 0].set_yscale("log")
            self._ticks(grid[0, 0], places, 0.8 * self.width / columns)
            self._legend(figure, groups, joined)
            return figure

    def _check(self, cells: Sequence[Cell]) -> None:
        if "x" in self.log and (wrong := [c.x for c in cells if not isinstance(c.x, (int, float)) or c.x <= 0]):
            raise ValueError(f"--log {self.log}: {self.axes.x} has {wrong[0]!r}, which has no logarithm")
        if "y" in self.log and (low := min(value for cell in cells for value in cell.values)) <= 0:
            raise ValueError(f"--log {self.log}: {self.axes.y} has {low!r}, which has no logarithm")
        columns = (self.axes.x, self.axes.y, *self.axes.group, *([self.axes.panel] if self.axes.panel else []))
        values = {shown(v) for cell in cells for v in (cell.panel, cell.x, *cell.group)}
        known = {*columns, *map(_last, columns), *values}
        if self.level is not None:
            known.add(self.level[1])
        if wrong_names := [name for name in self.labels if name not in known]:
            raise ValueError(f"--labels: {wrong_names[0]!r} is not in the figure; there are {', '.join(sorted(known))}")

    def _column(self, name: str) -> str:
        return self.labels.get(name) or self.labels.get(_last(name)) or column_label(name)

    def _value(self, name: str, value: Value | None) -> str:
        """A value that stands alone: texts as they are, numbers with what they are of."""
        if (text := shown(value)) in self.labels:
            return self.labels[text]
        if isinstance(value, str):
            return text
        last = _last(name)
        return f"{self.labels.get(name) or self.labels.get(last) or last.replace('_', ' ')} {text}"

    def _label(self, axes: Panel, number: int, columns: int, panels: int) -> None:
        below = number + columns >= panels
        axes.tick_params(labelbottom=below)
        if below:
            axes.set_xlabel(self._column(self.axes.x))
        if number % columns == 0:
            axes.set_ylabel(self._column(self.axes.y) + (" (%)" if self.scale == 100 else ""))

    def _ticks(self, axes: Panel, places: Mapping[Any, float], inches: float) -> None:
        """Name the places themselves where they are few and far enough apart."""
        found = sorted(places.values())
        texts = [self.labels.get(shown(x), shown(x)) for x in sorted(places, key=lambda x: places[x])]
        if not all(place == x and not isinstance(x, bool) for x, place in places.items()):
            crowded = sum(map(len, texts)) / _LETTERS + 0.1 * len(texts) > inches
            figure = axes.get_figure(root=True)
            assert figure is not None
            # at 30 degrees a line of text takes twice its height across, and half its length down
            angle = 0 if not crowded else 30 if inches >= _SLANTED * len(texts) else 90
            down = math.sin(math.radians(angle)) * max(map(len, texts)) / _LETTERS
            figure.set_size_inches(self.width, figure.get_figheight() + down)
            for panel in figure.axes:
                panel.set_xticks(found, texts, rotation=angle, ha="right" if angle == 30 else "center")
                panel.set_xlim(-0.4, len(found) - 0.6)
            return
        log = "x" in self.log
        scaled = [math.log10(place) if log else place for place in found]
        span = scaled[-1] - scaled[0]
        if len(found) <= _TICKS and all(b - a >= _CLOSEST * span for a, b in pairwise(scaled)):
            axes.set_xticks(found, texts)
        elif log and span < _DECADES:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
        if log:
            axes.xaxis.set_minor_formatter(NullFormatter())

    def _legend(self, figure: Figure, groups: Sequence[tuple[Value | None, ...]], joined: bool) -> None:
        single = len(self.axes.group) == 1
        with rc_context(STYLE):
            sample = Figure().subplots()
            handles: list[Any] = []
            labels: list[str] = []
            if self.axes.group:
                for position, group in enumerate(groups):
                    handles += sample.plot([], [], **line_style(position, joined))
                    texts = [shown(group[0])] if single else []
                    texts = [self.labels.get(text, text) for text in texts] or [
                        self._value(name, value) for name, value in zip(self.axes.group, group, strict=True)
                    ]
                    labels.append(", ".join(texts))
            if self.level is not None:
                handles += sample.plot([], [], color="0.4", linewidth=0.8, linestyle=":")
                labels.append(self.labels.get(self.level[1], self.level[1]))
            title = self._column(self.axes.group[0]) if single and self.axes.group[0] != "variant" else None
            if handles:
                legend_below(figure, handles, labels, title)
