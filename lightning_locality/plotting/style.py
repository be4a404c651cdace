"""Lines of means or medians with their spread, and the legend below them."""

from __future__ import annotations

__all__ = [
    "COLOURS",
    "COLUMN",
    "STYLE",
    "Point",
    "Spread",
    "Statistic",
    "accuracy_curves",
    "draw_points",
    "example_inputs",
    "legend_below",
    "line_style",
    "points_by",
    "read_metrics",
    "save_figure",
    "training_curves",
]

import csv
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation
from numpy.typing import NDArray

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
_ROUND_DASHES = ("-", "--", ":")  # one for every round of the colours
_CURVES = (
    ("accuracy", "accuracy (%)", 100.0),
    ("loss", "loss", 1.0),
    ("regularizer", "regulariser $R$", 1.0),
)
Rows = Sequence[Mapping[str, float]]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.csv``, one per epoch: the last value logged of every metric.

    Args:
        path: File written by :class:`~lightning_locality.callbacks.history.MetricsFile`.

    Returns:
        Rows in order of epoch, each with ``epoch`` and the metrics logged in it.
    """
    epochs: dict[int, dict[str, float]] = {}
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            if not row.get("epoch"):
                continue
            epoch = int(float(row["epoch"]))
            values = {key: float(value) for key, value in row.items() if value}
            epochs.setdefault(epoch, {}).update(values, epoch=float(epoch))
    return [epochs[epoch] for epoch in sorted(epochs)]


def _draw(axes: Axes, rows: Rows, name: str, scale: float, **style: Any) -> bool:
    points = [(row["epoch"] + 1, row[name] * scale) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), **style)
    return bool(points)


def _epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def training_curves(rows: Rows) -> Figure:
    """Accuracy, loss and regulariser against the epoch, on training and validation data.

    Args:
        rows: One mapping per epoch, as :func:`read_metrics` gives them.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 1.9), layout="constrained")
        for axes, (name, label, scale) in zip(figure.subplots(1, 3), _CURVES, strict=True):
            for stage, colour in (("train", COLOURS[0]), ("val", COLOURS[1])):
                _draw(axes, rows, f"{stage}/{name}", scale, color=colour, label=stage)
            _epochs(axes)
            axes.set_ylabel(label)
            if name != "loss":
                axes.set_ylim(0, 1.03 * scale)
        if figure.axes[0].lines:
            figure.axes[0].legend(loc="lower right")
        return figure


def accuracy_curves(histories: Mapping[str, Sequence[Rows]]) -> Figure:
    """Training and validation accuracy against the epoch for several kinds of run.

    Args:
        histories: Label of a kind of run -> the rows of each of its runs; a thin line for every run, a panel
            for training and one for validation data. Where none is below 30 %, there are two classes, and a
            dotted line at chance.
    """
    rows_of_all = [row for runs in histories.values() for rows in runs for row in rows]
    seen = [row[name] for row in rows_of_all for name in ("train/accuracy", "val/accuracy") if name in row]
    two_classes = min(seen, default=1.0) >= 0.3
    with rc_context(STYLE):
        below = 0.17 * -(-len(histories) // 2)  # inches of the legend
        figure = Figure(figsize=(2 * COLUMN, 2.1 + below), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, stage, title in zip(panels, ("train", "val"), ("training", "unseen (validation)"), strict=True):
            for position, (label, runs) in enumerate(histories.items()):
                for number, rows in enumerate(runs):
                    _draw(
                        axes,
                        rows,
                        f"{stage}/accuracy",
                        100.0,
                        color=COLOURS[position % len(COLOURS)],
                        linestyle=_ROUND_DASHES[position // len(COLOURS) % len(_ROUND_DASHES)],
                        label=label if number == 0 else None,
                        alpha=1.0 if len(runs) == 1 else 0.7,
                        linewidth=1.2 if len(runs) == 1 else 0.7,
                    )
            if two_classes:
                axes.axhline(50, color="0.6", linewidth=0.6, linestyle=":")
            axes.set_title(title, fontsize=8)
            _epochs(axes)
            axes.set_ylim(30 if two_classes else 0, 103)
        panels[0].set_ylabel("accuracy (%)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        return figure


def example_inputs(
    images: NDArray[np.floating[Any]],
    titles: Sequence[str],
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None,
) -> Figure:
    """Example inputs, with the two patches of the regulariser outlined.

    Args:
        images: ``(N, C, H, W)`` with 1 or 3 channels, any scale.
        titles: One per image.
        masks: Where the gradient is compared (I) and what is replaced (J), each ``(N, H, W)``.
    """
    low, high = float(images.min()), float(images.max())
    shown = (images - low) / max(high - low, 1e-12)
    height, width = images.shape[2:]
    columns = 1 if width > 3 * height else min(4, len(images))
    rows = -(-len(images) // columns)
    panel = 2 * COLUMN / columns
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, rows * (panel * height / width + 0.25) + 0.3), layout="constrained")
        for number, axes in enumerate(np.atleast_1d(figure.subplots(rows, columns)).flat):
            axes.axis("off")
            if number >= len(images):
                continue
            picture = shown[number].transpose(1, 2, 0)
            axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set_title(titles[number], fontsize=7, loc="left", pad=2)
            for mask, colour in zip(masks or (), (COLOURS[5], COLOURS[4]), strict=False):
                _outline(axes, mask[number], colour)
        if masks is not None:
            handles = [_handle(COLOURS[5]), _handle(COLOURS[4])]
            labels = ["I: the gradient is compared here", "J: replaced by another sample's content"]
            figure.legend(handles, labels, loc="outside lower center", ncols=2)
        return figure


def _handle(colour: str) -> Line2D:
    return Line2D([], [], color=colour, linewidth=1.5)


def _outline(axes: Axes, mask: NDArray[np.bool_], colour: str) -> None:
    """Draw the border between the pixels of a mask and the others, on the pixel edges."""
    padded = np.pad(mask, 1)
    tall = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    flat = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    xs = np.concatenate([np.stack([tall[:, 1], tall[:, 1]]), np.stack([flat[:, 1], flat[:, 1] + 1])], axis=1)
    ys = np.concatenate([np.stack([tall[:, 0], tall[:, 0] + 1]), np.stack([flat[:, 0], flat[:, 0]])], axis=1)
    axes.plot(xs - 0.5, ys - 0.5, color=colour, linewidth=1.2, solid_capstyle="butt")


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
