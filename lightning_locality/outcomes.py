"""Figures of how recovery runs end, against what was varied between them."""

from __future__ import annotations

__all__ = ["against_depth", "completion_against_observations", "number_of_components", "rank_against_fit"]

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_locality.figures import COLOURS, COLUMN, STYLE
from lightning_locality.trajectories import Rows, magnitude_groups

_MARKERS = "os^Dv<>"


def number_of_components(row: Mapping[str, Any], threshold: float = 0.01) -> float:
    """How many magnitudes exceed a share of the largest of their group, averaged over the groups.

    Args:
        row: A measurement.
        threshold: The share.

    Example:
        >>> number_of_components({"mode 0/1": 2.0, "mode 0/2": 0.5, "mode 0/3": 0.001})
        2.0
    """
    counts = []
    for names in magnitude_groups([row]).values():
        values = [row[name] for name in names]
        counts.append(sum(value > threshold * max(values) for value in values))
    return sum(counts) / len(counts) if counts else float("nan")


def _spread(
    axes: Axes, rows: Rows, x: str, y: str, by: str, spread: Literal["range", "quartiles", "deviation"]
) -> None:
    """One line per value of ``by``: the centre over the rows that share x, and a band."""
    for position, label in enumerate(dict.fromkeys(str(row.get(by, "")) for row in rows)):
        own: dict[float, list[float]] = {}
        for row in rows:
            if str(row.get(by, "")) == label and x in row and np.isfinite(row.get(y, np.nan)):
                own.setdefault(float(row[x]), []).append(float(row[y]))
        if not own:
            continue
        xs = sorted(own)
        columns = [np.asarray(own[value]) for value in xs]
        if spread != "deviation":
            shares = (25, 50, 75) if spread == "quartiles" else (0, 50, 100)
            low, centre, high = (np.array([np.percentile(c, q) for c in columns]) for q in shares)
        else:
            centre, width = (np.array([f(c) for c in columns]) for f in (np.mean, np.std))
            low, high = centre - width, centre + width
        colour = COLOURS[position % len(COLOURS)]
        axes.plot(xs, centre, color=colour, marker=_MARKERS[position % len(_MARKERS)], markersize=3, label=label)
        if any(len(c) > 1 for c in columns):
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)


def _legend(figure: Figure, axes: Axes, title: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if any(labels):
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), title=title)


def against_depth(rows: Rows, *, x: str = "depth", by: str = "variant") -> Figure:
    """Effective rank, number of components and reconstruction error at the end of the runs, against the depth.

    Median and range over the runs of a point. The effective rank is the mean over the matricisations logged.

    Args:
        rows: One per run: its point and its last measurement.
        x: Column of the depth.
        by: Column that separates the lines.
    """
    extended = []
    for row in rows:
        ranks = [value for key, value in row.items() if key.startswith("effective rank/")]
        rank = sum(ranks) / len(ranks) if ranks else float("nan")
        extended.append({**row, "effective rank": rank, "number of components": number_of_components(row)})
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.1), layout="constrained")
        names = ("effective rank", "number of components", "reconstruction_error")
        for axes, name in zip(figure.subplots(1, 3), names, strict=True):
            _spread(axes, extended, x, name, by, "range")
            axes.set_xlabel(x)
            axes.set_ylabel(name.replace("_", " "))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if name == "reconstruction_error":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        _legend(figure, figure.axes[0])
        return figure


def rank_against_fit(rows: Rows, *, by: str = "variant", scale: float = 0.25, trivial: float = 0.09) -> Figure:
    """Training and test error against the number of components, for data with structure and without.

    As in *Implicit Regularization in Tensor Factorization* (Razin, Maman, Cohen, 2021): mean and standard
    deviation over the runs of a point, a line of panels per image set.

    Args:
        rows: One per run: its point (``rank``, and ``source`` where there are several image sets) and its last
            measurement.
        by: Column that separates the lines.
        scale: Factor of the errors; a quarter for targets 0 and 2 where the error is to be that of 0 and 1.
        trivial: Error of the best constant prediction, drawn as a level.
    """
    sources = list(dict.fromkeys(str(row.get("source", "")) for row in rows)) or [""]
    scaled = [{**row, **{k: scale * row[k] for k in ("train/loss", "test/loss") if k in row}} for row in rows]
    with rc_context(STYLE):
        figure = Figure(figsize=(1.6 * COLUMN, 1.7 * len(sources) + 0.4), layout="constrained")
        for line, source in zip(figure.subplots(len(sources), 2, squeeze=False), sources, strict=True):
            own = [row for row in scaled if str(row.get("source", "")) == source]
            for axes, stage in zip(line, ("train", "test"), strict=True):
                _spread(axes, own, "rank", f"{stage}/loss", by, "deviation")
                axes.axhline(trivial, color="0.4", linewidth=0.8, linestyle=":")
                axes.set_xlabel("CP rank")
                axes.set_ylabel(f"{stage} error")
                axes.set_title(source.replace("_", " "), fontsize=8)
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_ylim(bottom=0)
        _legend(figure, figure.axes[0])
        return figure


def completion_against_observations(
    rows: Rows, *, by: str = "variant", x: str = "observations", ranks: str = "cp rank"
) -> Figure:
    """Reconstruction error and estimated rank against the number of observed entries.

    As in *Implicit Regularization in Deep Learning May Not Be Explainable by Norms* (Razin, Cohen, 2020): median
    and quartiles over the runs of a point.

    Args:
        rows: One per run: its point and its last measurement.
        by: Column that separates the lines.
        x: Column of the number of observed entries.
        ranks: Column of the estimated rank; without it the panel is left out.
    """
    names = ["reconstruction_error", *([ranks] if any(ranks in row for row in rows) else [])]
    with rc_context(STYLE):
        figure = Figure(figsize=(len(names) * COLUMN, 2.3), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
            _spread(axes, rows, x, name, by, "quartiles")
            axes.set_xlabel("observed entries")
            axes.set_ylabel("reconstruction error" if name == "reconstruction_error" else "estimated CP rank")
            if name == "reconstruction_error":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        _legend(figure, figure.axes[0])
        return figure
