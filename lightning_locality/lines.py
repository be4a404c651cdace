"""Lines of means or medians with their spread, and the legend below them."""

from __future__ import annotations

__all__ = ["Point", "Spread", "Statistic", "draw_points", "legend_below", "line_style", "points_by"]

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from lightning_locality.figures import COLOURS

Statistic = Literal["mean", "median"]
Spread = Literal["std", "sem", "range", "quartiles", "none"]

_MARKERS = "os^Dv<>P"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_APART = 1.6  # printer's points between the error bars of neighbouring groups
_WIDEST = 5.0  # between the first and the last of many
_LONGEST = 46  # characters of a line of the legend


@dataclass(frozen=True)
class Point:
    """The values of the runs that share a place on the x axis.

    Args:
        x: The place.
        values: One finite value per run.

    Example:
        >>> point = Point(80.0, (1.0, 2.0, 6.0))
        >>> point.centre("mean"), point.centre("median"), point.interval("mean", "range")
        (3.0, 2.0, (1.0, 6.0))
    """

    x: float
    values: tuple[float, ...]

    @property
    def std(self) -> float:
        """Standard deviation of the runs themselves (division by n), as published; NaN for one run."""
        return float(np.std(self.values)) if len(self.values) > 1 else math.nan

    @property
    def sem(self) -> float:
        """Standard error of the mean, from the unbiased variance; NaN for one run."""
        return float(np.std(self.values, ddof=1)) / len(self.values) ** 0.5 if len(self.values) > 1 else math.nan

    def centre(self, statistic: Statistic) -> float:
        """Mean or median."""
        return float(np.mean(self.values) if statistic == "mean" else np.median(self.values))

    def interval(self, statistic: Statistic, spread: Spread) -> tuple[float, float]:
        """Lower and upper end of what is drawn round the centre; NaN for one run or no spread."""
        if len(self.values) < 2:
            return math.nan, math.nan
        match spread:
            case "none":
                return math.nan, math.nan
            case "range":
                return min(self.values), max(self.values)
            case "quartiles":
                return float(np.percentile(self.values, 25)), float(np.percentile(self.values, 75))
            case "std" | "sem":
                centre, width = self.centre(statistic), self.std if spread == "std" else self.sem
                return centre - width, centre + width


def points_by(rows: Iterable[Mapping[str, Any]], x: str, y: str, by: str) -> dict[str, list[Point]]:
    """Points of every value of a column, in order of x; rows without x or without a finite y are left out.

    Args:
        rows: One per run.
        x: Column of numbers.
        y: Column of numbers.
        by: Column that separates the lines, in order of appearance.
    """
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        own = found.setdefault(str(row.get(by, "")), {})
        if x in row and np.isfinite(row.get(y, np.nan)):
            own.setdefault(float(row[x]), []).append(float(row[y]))
    return {label: [Point(place, tuple(own[place])) for place in sorted(own)] for label, own in found.items()}


def line_style(position: int, joined: bool = True) -> dict[str, Any]:
    """Colour, marker and dashes of a line: no two of the first 56 are alike in all.

    Args:
        position: Number of the line, from 0.
        joined: A line, not its markers alone.
    """
    return {
        "color": COLOURS[position % len(COLOURS)],
        "marker": _MARKERS[position % len(_MARKERS)],
        "linestyle": _DASHES[position % len(_DASHES)] if joined else "none",
        "markersize": 3.2,
    }


def draw_points(
    axes: Axes,
    points: Sequence[Point],
    position: int,
    of: int = 1,
    *,
    label: str | None = None,
    statistic: Statistic = "mean",
    spread: Spread = "std",
    band: bool = False,
    joined: bool = True,
) -> None:
    """Draw a line through the centres, with error bars or a band.

    Args:
        axes: Where.
        points: In order of x.
        position: Number of the line, from 0.
        of: Number of lines; their error bars stand beside each other, up to 1.6 printer's points apart.
        label: In the legend.
        statistic: What the line goes through.
        spread: What is drawn round it, where a point has two runs or more.
        band: A band instead of error bars.
        joined: A line, not its markers alone.
    """
    if not points:
        return
    style = line_style(position, joined)
    xs, centres = np.array([(point.x, point.centre(statistic)) for point in points]).T
    low, high = np.array([point.interval(statistic, spread) for point in points]).T
    (line,) = axes.plot(xs, centres, label=label, **style)
    known = np.isfinite(low)
    if not known.any():
        return
    if band:
        # a point of one run has no spread
        ends = (np.where(known, end, centres) for end in (low, high))
        axes.fill_between(xs, *ends, color=style["color"], alpha=0.2, linewidth=0)
        return
    bars = axes.vlines(xs[known], low[known], high[known], color=style["color"], linewidth=0.9)
    # moved only now: matplotlib would take the shift for one of the data when it finds the limits
    apart = min(_APART, _WIDEST / max(1, of - 1))
    shift = ScaledTranslation(
        (position - (of - 1) / 2) * apart / 72,
        0,
        axes.get_figure(root=True).dpi_scale_trans,  # type: ignore[union-attr]
    )
    for artist in (line, bars):
        artist.set_transform(axes.transData + shift)


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str], title: str | None = None) -> None:
    """A legend under the panels, in as many columns as the width takes; the figure grows by its height.

    Args:
        figure: With constrained layout.
        handles: What is explained.
        labels: How; long ones are broken.
        title: Over the legend.
    """
    if not any(labels):
        return
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    broken = [textwrap.fill(label, _LONGEST) for label in labels]
    for columns in range(min(len(labels), 6), 0, -1):
        legend = figure.legend(
            handles, broken, loc="outside lower center", ncols=columns, title=title, columnspacing=1.2, handlelength=2.4
        )
        box = legend.get_window_extent(renderer)
        if columns == 1 or box.width <= 0.98 * figure.bbox.width:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + box.height / figure.dpi)
