"""Growth laws of CP and deep CP factorisations: measured rates, the exponents fitted to them, and the predicted."""

from __future__ import annotations

__all__ = [
    "Curve",
    "Curves",
    "Fit",
    "Quantity",
    "fits",
    "growth_figure",
    "predicted",
    "read_curves",
    "slope",
    "write_curves",
]

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_locality.callbacks.history import written_whole
from lightning_locality.plotting.style import COLUMN, STYLE, line_style

Quantity = Literal["component norm", "norm of the vectors"]
Curve = tuple[NDArray[Any], NDArray[Any]]
# order, matrices, quantity -> curves at balanced points and along a gradient flow
Curves = dict[tuple[int, int, Quantity], tuple[Curve, Curve]]
_COLUMNS = ("order", "matrices", "quantity", "source", "size", "rate")
_SOURCES: tuple[Literal["points", "flow"], ...] = ("points", "flow")
_WIDE = 5.0  # inches


@dataclass(frozen=True)
class Fit:
    """One fitted exponent.

    Args:
        order: N.
        matrices: k, square matrices before every vector.
        quantity: sigma or tau.
        source: Balanced points, or a gradient flow.
        predicted: Exponent of the law.
        fitted: Slope of the logarithm of the rate, divided by gamma, against the logarithm of the quantity.
    """

    order: int
    matrices: int
    quantity: Quantity
    source: Literal["points", "flow"]
    predicted: float
    fitted: float


def predicted(order: int, matrices: int, quantity: Quantity) -> float:
    """Exponent of the law."""
    if quantity == "component norm":
        return 2 - 2 / (order * (matrices + 1))
    return matrices + 2 - 2 / order


def slope(curve: Curve) -> float:
    """Exponent of a power law, by least squares in logarithms."""
    return float(np.polyfit(np.log(curve[0]), np.log(curve[1]), 1)[0])


def fits(curves: Curves) -> list[Fit]:
    """Exponents of all curves beside the predicted."""
    return [
        Fit(*case, source, predicted(*case), slope(curve))
        for case, both in curves.items()
        for source, curve in zip(_SOURCES, both, strict=True)
    ]


def write_curves(curves: Curves, path: Path) -> None:
    """Write curves as a CSV file, whole or not at all: a row per measurement, the rate divided by gamma."""
    with written_whole(path) as file:
        writer = csv.writer(file)
        writer.writerow(_COLUMNS)
        for case, both in curves.items():
            for source, (sizes, rates) in zip(_SOURCES, both, strict=True):
                writer.writerows((*case, source, *pair) for pair in zip(sizes, rates, strict=True))


def read_curves(path: Path) -> Curves:
    """What :func:`write_curves` has written.

    Args:
        path: CSV file.

    Raises:
        ValueError: Another kind of file.
    """
    found: dict[tuple[int, int, Quantity], dict[str, list[tuple[float, float]]]] = {}
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(f"{path} holds no growth curves: expected the columns {', '.join(_COLUMNS)}")
        for row in reader:
            quantity: Quantity = next(q for q in get_args(Quantity) if q == row["quantity"])
            own = found.setdefault((int(row["order"]), int(row["matrices"]), quantity), {})
            own.setdefault(row["source"], []).append((float(row["size"]), float(row["rate"])))
    return {case: (_curve(own["points"]), _curve(own["flow"])) for case, own in found.items()}


def _curve(pairs: Sequence[tuple[float, float]]) -> Curve:
    sizes, rates = np.array(pairs).T
    return sizes, rates


def growth_figure(curves: Curves, width: float = 2 * COLUMN) -> Figure:
    """Rates divided by gamma against sizes: the flows as dots, the laws as lines.

    Args:
        curves: As measured.
        width: Of the figure, in inches; below 5 the panels stand above each other.
    """
    titles = {
        "CP": "CP: $\\sigma^{2-2/N}$",
        "component norm": "deep CP: $\\sigma^{2-2/(N(k+1))}$",
        "norm of the vectors": "deep CP: $\\tau^{k+2-2/N}$",
    }
    with rc_context(STYLE):
        beside = width > _WIDE
        figure = Figure(figsize=(width, 2.4 if beside else 6.6), layout="constrained")
        grid = figure.subplots(*((1, 3) if beside else (3, 1)))
        for axes, (panel, title) in zip(grid, titles.items(), strict=True):
            own = [c for c in curves if panel == ("CP" if c[1] == 0 and c[2] == "component norm" else c[2])]
            if panel == "component norm" and (3, 0, "component norm") in curves:
                own.insert(0, (3, 0, "component norm"))
            for position, (order, matrices, quantity) in enumerate(own):
                style = line_style(position)
                (_, (sizes, growth)), factor = curves[order, matrices, quantity], order
                if quantity == "component norm":
                    factor *= matrices + 1
                label = f"N = {order}" if panel == "CP" else f"k = {matrices}"
                law = factor * sizes ** predicted(order, matrices, quantity)
                axes.plot(sizes, growth, style["marker"], color=style["color"], markersize=2.5, label=label)
                axes.plot(sizes, law, color=style["color"], linewidth=0.8)
            axes.set_xscale("log")
            axes.set_yscale("log")
            symbol = "\\tau" if panel == "norm of the vectors" else "\\sigma"
            axes.set_xlabel(f"${symbol}$")
            axes.set_ylabel(f"$\\dot{{{symbol}}} / \\gamma$")
            axes.set_title(title, fontsize=8)
            if own:
                # the curves rise from the lower left to the upper right
                axes.legend(fontsize=7, loc="upper left", handletextpad=0.2, borderaxespad=0.1)
        return figure
