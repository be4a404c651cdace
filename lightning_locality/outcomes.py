"""Figures of how recovery runs end, against what was varied between them."""

from __future__ import annotations

__all__ = ["against_depth", "completion_against_observations", "number_of_components", "rank_against_fit"]

from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_locality.plotting.style import COLUMN, STYLE, Spread, Statistic, draw_points, legend_below, points_by
from lightning_locality.trajectories import Rows, magnitude_groups


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


def _lines(axes: Axes, rows: Rows, x: str, y: str, by: str, spread: Spread) -> None:
    """One line per value of ``by``: the centre over the rows that share x, and a band."""
    statistic: Statistic = "mean" if spread == "std" else "median"
    for position, (label, points) in enumerate(points_by(rows, x, y, by).items()):
        draw_points(axes, points, position, label=label, statistic=statistic, spread=spread, band=True)


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
        figure = Figure(figsize=(2 * COLUMN, 1.9), layout="constrained")
        names = ("effective rank", "number of components", "reconstruction_error")
        for axes, name in zip(figure.subplots(1, 3), names, strict=True):
            _lines(axes, extended, x, name, by, "range")
            axes.set_xlabel(x)
            axes.set_ylabel(name.replace("_", " "))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if name == "reconstruction_error":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
        legend_below(figure, *figure.axes[0].get_legend_handles_labels())
        return figure


def rank_against_fit(
    rows: Rows, *, by: str = "variant", scale: float = 0.25, trivial: float = 0.09, width: float = 1.6 * COLUMN
) -> Figure:
    """Training and test error against the number of components, for data with structure and without.

    As in *Implicit Regularization in Tensor Factorization* (Razin, Maman, Cohen, 2021): mean and standard
    deviation over the runs of a point, a line of panels per image set.

    Args:
        rows: One per run: its point (``rank``, and ``source`` where there are several image sets) and its last
            measurement.
        by: Column that separates the lines.
        scale: Factor of the errors; a quarter for targets 0 and 2 where the error is to be that of 0 and 1.
        trivial: Error of the best constant prediction, drawn as a level.
        width: Of the figure, in inches.
    """
    sources = list(dict.fromkeys(str(row.get("source", "")) for row in rows)) or [""]
    scaled = [{**row, **{k: scale * row[k] for k in ("train/loss", "test/loss") if k in row}} for row in rows]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 1.7 * len(sources)), layout="constrained")
        for line, source in zip(figure.subplots(len(sources), 2, squeeze=False), sources, strict=True):
            own = [row for row in scaled if str(row.get("source", "")) == source]
            for axes, stage in zip(line, ("train", "test"), strict=True):
                _lines(axes, own, "rank", f"{stage}/loss", by, "std")
                axes.axhline(trivial, color="0.4", linewidth=0.8, linestyle=":")
                axes.set_xlabel("CP rank")
                axes.set_ylabel(f"{stage} error")
                axes.set_title(source.replace("_", " "), fontsize=8)
                axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
                axes.set_ylim(bottom=0)
        legend_below(figure, *figure.axes[0].get_legend_handles_labels())
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
        figure = Figure(figsize=(len(names) * COLUMN, 2.1), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(names), squeeze=False).flat, names, strict=True):
            _lines(axes, rows, x, name, by, "quartiles")
            axes.set_xlabel("observed entries")
            axes.set_ylabel("reconstruction error" if name == "reconstruction_error" else "estimated CP rank")
            if name == "reconstruction_error":
                axes.set_yscale("log")
            else:
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        legend_below(figure, *figure.axes[0].get_legend_handles_labels())
        return figure
