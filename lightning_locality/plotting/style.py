"""What all figures share: style, lines of means or medians with their spread, the legend below them, files."""

from __future__ import annotations

__all__ = ["save_figure"]

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import ScaledTranslation

# Okabe and Ito, Color Universal Design (2008)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "legend.frameon": False,
    # Type 3 fonts are refused by venues; 42 embeds TrueType
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
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


def draw_lines(
    axes: Axes,
    data: pd.DataFrame,
    lines: Sequence[str],
    *,
    statistic: Statistic = "mean",
    spread: Spread = "std",
    band: bool = False,
    joined: bool = True,
    orient: Literal["x", "y"] = "x",
) -> None:
    """Draw a line for every value of the column ``line`` through the means or medians, with error bars or a band.

    Args:
        axes: Where to draw.
        data: One row per run: ``x``, ``y`` and ``line``.
        lines: All values of ``line``, in the order of the legend.
        statistic: What the lines go through.
        spread: What the bars show.
        band: A band instead of bars.
        joined: Lines, not marks alone.
        orient: Axis along which the places lie.
    """
    # here: it takes most of a second to import
    import seaborn

    figure: Any = axes.get_figure(root=True)
    data = data.dropna(subset=["x", "y"])
    for position, name in enumerate(lines):
        before = [*axes.lines, *axes.collections]
        seaborn.lineplot(
            data[data["line"] == name],
            x="x",
            y="y",
            label=name,
            estimator=statistic,
            errorbar=lambda values: interval(values, spread, statistic),
            err_style="band" if band else "bars",
            err_kws={} if band else {"elinewidth": 0.9},
            orient=orient,
            legend=False,
            ax=axes,
            **line_style(position, joined),
        )
        if (joined and not band) or orient == "y":
            # side by side; moved only now: matplotlib would take the shift for one of the data when it finds the limits
            shift = (position - (len(lines) - 1) / 2) * min(_APART, _WIDEST / max(1, len(lines) - 1)) / 72
            across, down = (shift, 0.0) if orient == "x" else (0.0, -shift)
            moved = axes.transData + ScaledTranslation(across, down, figure.dpi_scale_trans)
            for artist in {*axes.lines, *axes.collections} - {*before}:
                artist.set_transform(moved)


def legend_below(figure: Figure, title: str | None = None) -> None:
    """Add a legend of the first panel's lines under the panels; the figure grows by its height."""
    found = zip(*figure.axes[0].get_legend_handles_labels(), strict=True)
    entries = [(handle, textwrap.fill(text, _LONGEST)) for handle, text in found if text]
    if not entries:
        return
    handles, texts = zip(*entries, strict=True)
    width, height = figure.get_size_inches()
    longest = max(len(line) for text in texts for line in text.split("\n"))
    columns = int(np.clip(width * LETTERS // (longest + 7), 1, min(6, len(texts))))
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, title=title, columnspacing=1.2)
    rows = [max(text.count("\n") + 1 for text in texts[start::columns]) for start in range(-(-len(texts) // columns))]
    figure.set_size_inches(width, height + 0.16 * (sum(rows) + (title is not None)) + 0.1)


def save_figure(figure: Figure, stem: Path) -> None:
    """Write a figure as ``STEM.pdf`` and ``STEM.png``.

    Args:
        figure: What to write.
        stem: Path without ending (``weight_0.1`` has none); its folder is made.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        # no date in the file: the same results give the same bytes
        figure.savefig(stem.with_name(f"{stem.name}.pdf"), metadata={"CreationDate": None})
        figure.savefig(stem.with_name(f"{stem.name}.png"), dpi=200)
