"""Common style of all figures: lines of means or medians with their spread, legends, files."""

from __future__ import annotations

__all__ = ["save_figure"]

import textwrap
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

from lightning_locality.arguments import checked

# Okabe and Ito, Color Universal Design (2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    "grid.color": "0.92",
    "grid.linewidth": 0.5,
    # Type 3 fonts are refused by venues; 42 embeds TrueType
    "pdf.fonttype": 42,
}
COLUMN = 3.4  # inches: one column of a two-column paper
LETTERS = 16  # per inch, at 8 points
Width = Literal["column", "text"]
WIDTHS: dict[Width, float] = {"column": 3.35, "text": 6.9}  # inches
Drawn = tuple[Figure, pd.DataFrame]  # what every kind returns: the figure and its numbers
Statistic = Literal["mean", "median"]
Spread = Literal["std", "sem", "range", "quartiles", "none"]

_MARKERS = "os^Dv<>P"
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
_APART = 1.6  # printer's points between the error bars of neighbouring lines
_WIDEST = 5.0  # between the first and the last of many
_LONGEST = 46  # characters of a line of the legend


def shown(value: Any) -> str:
    """Return a value as text: ``true``, ``0.1``, ``none``."""
    if value is None or pd.isna(value):
        return "none"
    if isinstance(value, (bool, np.bool_)):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def interval(values: Any, spread: Spread, statistic: Statistic) -> tuple[float, float]:
    """Return the ends of the error bar of the values of several runs; NaN for a single run."""
    if len(values) < 2 or spread == "none":
        return np.nan, np.nan
    if spread == "range":
        return values.min(), values.max()
    if spread == "quartiles":
        return values.quantile(0.25), values.quantile(0.75)
    center, width = values.agg(statistic), values.std(ddof=0) if spread == "std" else values.sem()
    return center - width, center + width


def line_style(position: int, joined: bool = True) -> dict[str, Any]:
    """Return color, marker and dashes of a line: no two of the first 56 are alike in all."""
    return {
        "color": COLOURS[position % len(COLOURS)],
        "marker": _MARKERS[position % len(_MARKERS)],
        "linestyle": _DASHES[position % len(_DASHES)] if joined else "none",
        "markersize": 3.6,
        "markeredgewidth": 0,
    }


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the finished runs; all of a table that does not tell."""
    return runs[runs["finished"]] if "finished" in runs else runs


def panels(number: int, width: Width, height: float, share: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels of this height: above each other in a column, up to three in a row over the text."""
    columns = min(number, 3) if width == "text" else 1
    rows = -(-number // columns)
    figure = Figure(figsize=(WIDTHS[width], rows * height), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share).flat)
    for spare in grid[number:]:
        spare.remove()
    return figure, grid[:number]


def plot_lines(
    axes: Axes,
    data: pd.DataFrame,
    lines: Sequence[str],
    statistic: Statistic,
    spread: Spread,
    *,
    band: bool = False,
    joined: bool = True,
    orient: Literal["x", "y"] = "x",
) -> None:
    """Draw a line through the means or medians of ``x`` and ``y``, with bars or a band, for each ``line`` of the runs.

    ``lines`` are all values of ``line``, in the order of the legend; the places lie along the axis ``orient``.
    """
    # here: it takes most of a second to import
    import seaborn

    figure: Any = axes.get_figure(root=True)
    data = data.dropna(subset=["x", "y"])
    ends = partial(interval, spread=spread, statistic=statistic)
    for position, name in enumerate(lines):
        own, style = data[data["line"] == name], line_style(position, joined)
        options = {"estimator": statistic, "errorbar": ends if band else None, "orient": orient, "legend": False}
        seaborn.lineplot(own, x="x", y="y", label=name, ax=axes, **options, **style)
        if band:
            continue
        # not by seaborn: matplotlib refuses error bars that do not contain the mean, as quartiles may
        groups = own.groupby(orient)["y" if orient == "x" else "x"]
        low, high = np.array([ends(values) for _, values in groups]).reshape(-1, 2).T
        draw: Any = axes.vlines if orient == "x" else axes.hlines
        bars = draw(list(groups.groups), low, high, color=style["color"], linewidth=0.9)
        if joined or orient == "y":
            # side by side; moved only now: matplotlib would take the shift for one of the data when it finds the limits
            shift = (position - (len(lines) - 1) / 2) * min(_APART, _WIDEST / max(1, len(lines) - 1)) / 72
            across, down = (shift, 0.0) if orient == "x" else (0.0, -shift)
            for artist in (axes.lines[-1], bars):
                artist.set_transform(axes.transData + ScaledTranslation(across, down, figure.dpi_scale_trans))


def legend_below(figure: Figure, title: str | None = None) -> None:
    """Add a legend of the lines of all panels under them; the figure grows by its height."""
    # of several lines with one label the first
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(textwrap.fill(label, _LONGEST), handle)
    if not handles:
        return
    width, height = figure.get_size_inches()
    longest = max(len(line) for text in handles for line in text.split("\n"))
    columns = int(np.clip(width * LETTERS // (longest + 7), 1, min(6, len(handles))))
    style: Any = {"ncols": columns, "title": title, "columnspacing": 1.2}
    legend = figure.legend(list(handles.values()), list(handles), loc="outside lower center", **style)
    figure.set_figheight(height + legend.get_window_extent().height / figure.dpi)


@checked
def save_figure(figure: Figure, stem: Path) -> None:
    """Write a figure as ``STEM.pdf`` and ``STEM.png``; ``weight_0.1`` is a stem, without ending. Its folder is made."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        # no date in the file: the same results give the same bytes
        figure.savefig(stem.with_name(f"{stem.name}.pdf"), metadata={"CreationDate": None})
        figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=200)
