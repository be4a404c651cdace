"""Figures of the course of recovery runs: what grows, and in which order."""

from __future__ import annotations

__all__ = ["Rows", "component_curves", "magnitude_groups", "read_iterations", "value_against_loss"]

import csv
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from numpy.typing import NDArray

from lightning_locality.plotting.style import COLOURS, COLUMN, STYLE

Rows = Sequence[Mapping[str, Any]]
Array = NDArray[np.floating[Any]]
Bound = Callable[[Array], Array]
_Panel = tuple[str, Rows, str]  # title, rows, and a group of magnitudes or one of the next two
_ERROR, _LOSS = "reconstruction_error", "train/loss"

# numbered columns that are not magnitudes: their numbers are modes
_OTHERS = ("effective rank", "entry", "train", "test")
_KINDS = {
    "component": "component norm",
    "singular value": "singular value",
    "node": "local component norm",
    "mode": "core slice norm",
    "bond": "singular value",
}
_GROUPS = 3  # drawn of a run where none are asked for
_COLUMNS = 4
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 1)))  # dots are the bounds
_WIDE = 5.0  # inches
_ENTRY = 0.15  # inches: a line of a legend


def read_iterations(path: Path) -> list[dict[str, float]]:
    """Rows of a recovery run's ``metrics.csv``, one per measurement.

    Args:
        path: File written by :class:`~lightning_locality.callbacks.history.MetricsFile`.

    Returns:
        Rows in order of ``iteration``; none where the run was of another kind.
    """
    rows: dict[int, dict[str, float]] = {}
    with Path(path).open(newline="") as file:
        for row in csv.DictReader(file):
            if row.get("iteration"):
                values = {key: float(value) for key, value in row.items() if value}
                rows.setdefault(int(values["iteration"]), {}).update(values)
    return [rows[iteration] for iteration in sorted(rows)]


def magnitude_groups(rows: Rows) -> dict[str, list[str]]:
    """Columns of the magnitudes by group: ``component/1``, ``component/2``, ... are the group ``component``.

    Args:
        rows: As :func:`read_iterations` gives them.

    Returns:
        Group -> its columns, largest magnitude first; nodes of a tree with the most modes first.

    Example:
        >>> magnitude_groups([{"iteration": 0, "node 0-1/2": 0.1, "node 0-1/1": 0.2, "node 0-1-2/1": 1.0}])
        {'node 0-1-2': ['node 0-1-2/1'], 'node 0-1': ['node 0-1/1', 'node 0-1/2']}
    """
    found: dict[str, dict[int, str]] = {}
    for name in dict.fromkeys(key for row in rows for key in row):
        match = re.fullmatch(r"(.+)/(\d+)", name)
        if match and match[1] not in _OTHERS:
            found.setdefault(match[1], {})[int(match[2])] = name
    order = sorted(found, key=lambda group: -group.count("-"))
    return {group: [found[group][rank] for rank in sorted(found[group])] for group in order}


def component_curves(
    runs: Mapping[str, Rows],
    *,
    groups: Sequence[str] = (),
    top: int = 10,
    x: Literal["iteration", "time"] = "iteration",
    loss: bool = False,
    width: float = 2 * COLUMN,
) -> Figure:
    """What grows one at a time, against the iteration, and the reconstruction error.

    One run: a panel per group and one for the error. Several runs: a column for each, its first group above and
    its error below, as in *Implicit Regularization in Tensor Factorization* (Razin, Maman, Cohen, 2021) and
    *Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks* (2022).

    Args:
        runs: Title -> rows of the run.
        groups: Which magnitudes (``component``, ``singular value``, ``node 0-1-2-3``, ...); those the runs have.
        top: The largest so many of each group.
        x: What they are drawn against; ``time`` for gradient flow.
        loss: A panel for the training loss as well.
        width: Of the figure, in inches; below 5 a line has two panels instead of four.

    Raises:
        ValueError: A run without magnitudes, or without those asked for.
    """
    chosen = {title: _chosen(title, rows, groups) for title, rows in runs.items()}
    columns = _COLUMNS if width > _WIDE else 2
    known = any(_ERROR in row for rows in runs.values() for row in rows)
    curves = (_ERROR, _LOSS) if loss and known else (_ERROR,)
    lines: list[list[_Panel]] = []
    if len(runs) == 1:
        ((title, rows),) = runs.items()
        groups_and_curves = [*((_place(group), group) for group in chosen[title]), *(("", name) for name in curves)]
        panels: list[_Panel] = [(place, rows, name) for place, name in groups_and_curves]
        lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    else:
        for start in range(0, len(runs), columns):
            block = list(runs.items())[start : start + columns]
            lines.append([(title, rows, chosen[title][0]) for title, rows in block])
            lines += [[("", rows, name) for _, rows in block] for name in curves]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 1.55 * len(lines) + 0.2), layout="constrained")
        grid = figure.subplots(len(lines), max(map(len, lines)), squeeze=False)
        for places, line in zip(grid, lines, strict=True):
            for axes in places[len(line) :]:
                axes.axis("off")
            for axes, (title, rows, group) in zip(places, line, strict=False):
                axes.set_title(title, fontsize=8)
                if group in curves:
                    _curve(axes, rows, x, group)
                else:
                    _magnitudes(axes, rows, magnitude_groups(rows)[group][:top], x)
                    place = _place(group) if len(runs) > 1 else ""
                    axes.set_ylabel(_kind(group) + (f"\n({place})" if place else ""))
        return figure


def _chosen(title: str, rows: Rows, groups: Sequence[str]) -> list[str]:
    known = list(magnitude_groups(rows))
    chosen = [group for group in groups if group in known] if groups else known[:_GROUPS]
    if not chosen:
        raise ValueError(f"run {title!r} has no {' or '.join(groups) or 'magnitudes'}; it has {known or 'none'}")
    return chosen


def _kind(group: str) -> str:
    """``core slice norm`` of ``mode 0``."""
    return _KINDS.get(group, _KINDS.get(group.split(" ")[0], group))


def _place(group: str) -> str:
    """``mode 0`` of ``mode 0``; nothing where a factorisation has one group only."""
    return group if group.split(" ")[0] in _KINDS and group not in _KINDS else ""


def _points(rows: Rows, x: str, y: str) -> tuple[list[float], list[float]]:
    points = [(row[x], row[y]) for row in rows if x in row and y in row]
    return [p for p, _ in points], [q for _, q in points]


def _progress(axes: Axes, x: str) -> None:
    axes.set_xlabel(x)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 4, 5, 10]))


def _magnitudes(axes: Axes, rows: Rows, names: Sequence[str], x: str) -> None:
    for position, name in enumerate(names):
        colour = COLOURS[position] if position < len(COLOURS) else "0.6"
        axes.plot(*_points(rows, x, name), color=colour, linewidth=1.0, zorder=3 - 0.01 * position)
    axes.set_ylim(bottom=0)
    _progress(axes, x)


def _curve(axes: Axes, rows: Rows, x: str, name: str) -> None:
    """Loss, or reconstruction error; where no target is known, the loss instead."""
    known = name == _ERROR and any(_ERROR in row for row in rows)
    axes.plot(*_points(rows, x, _ERROR if known else _LOSS), color=COLOURS[-1], linewidth=1.0)
    if known:
        axes.set_ylabel("reconstruction error")
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylabel("training loss")
        axes.set_yscale("log")
    _progress(axes, x)


def value_against_loss(
    runs: Mapping[str, Sequence[Rows]],
    *,
    entry: str = "0-0",
    split: str = "",
    least: float = 0.0,
    bounds: Mapping[str, Bound] | None = None,
    width: float | None = None,
) -> Figure:
    """Size of an unobserved entry against the loss, which decreases to the right.

    As in *Implicit Regularization in Deep Learning May Not Be Explainable by Norms* (Razin, Cohen, 2020).

    Args:
        runs: Label -> the rows of each of its runs; one colour per label.
        entry: Its indices, joined by ``-``; its column is ``entry/0-0``.
        split: Labels are ``PANEL SPLIT LABEL``, and there is a panel for every PANEL.
        least: Smallest loss that is shown.
        bounds: Label -> lower bound of the entry as a function of an array of losses, NaN where it says nothing;
            dotted, in the colour of the runs with that label, in black and in all panels where there are none.
        width: Of the figure, in inches; by default 4 for one panel and 6.8 for several.
    """
    runs = {label: [[row for row in r if row["train/loss"] >= least] for r in own] for label, own in runs.items()}
    panels: dict[str, dict[str, str]] = {}
    for label in runs:
        title, _, rest = label.partition(split) if split and split in label else ("", "", label)
        panels.setdefault(title, {})[label] = rest
    width = width or (1.2 if len(panels) == 1 else 2) * COLUMN
    columns = len(panels) if width > _WIDE else 1
    lines = -(-len(panels) // columns)
    entries = max(map(len, panels.values()), default=0) + 1
    with rc_context(STYLE):
        figure = Figure(figsize=(width, lines * (2.1 + _ENTRY * entries)), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
            _value_panel(axes, runs, names, f"entry/{entry}", bounds or {})
            axes.set_title(title, fontsize=8)
            # below the panel, where it hides nothing
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.26), fontsize=7, handlelength=2.6)
        for axes in grid[:, 0]:
            axes.set_ylabel(f"|entry ({entry.replace('-', ', ')})|")
        return figure


def _value_panel(
    axes: Axes,
    runs: Mapping[str, Sequence[Rows]],
    names: Mapping[str, str],
    column: str,
    bounds: Mapping[str, Bound],
) -> None:
    losses: list[float] = []
    colours = {label: COLOURS[position % len(COLOURS)] for position, label in enumerate(names)}
    for position, (label, name) in enumerate(names.items()):
        style: Any = {"color": colours[label], "linestyle": _DASHES[position % len(_DASHES)], "linewidth": 1.0}
        for number, rows in enumerate(runs[label]):
            xs, ys = _points(rows, "train/loss", column)
            axes.plot(xs, np.abs(ys), label=name if number == 0 else None, **style)
            losses += [x for x in xs if x > 0]
    axes.set_xscale("log")
    axes.set_yscale("log")
    if losses:
        low, high = axes.get_ylim()
        shown = np.geomspace(min(losses), max(losses), 400)
        for label, bound in bounds.items():
            if label in names or label not in runs:
                style = {"color": colours.get(label, "black"), "label": None if label in runs else label}
                axes.plot(shown, bound(shown), linewidth=0.8, linestyle=":", **style)
        if bounds.keys() <= runs.keys() and bounds.keys() & names.keys():  # none that explains the dots
            axes.plot([], [], color="0.4", linewidth=0.8, linestyle=":", label="lower bound")
        # the bound starts at zero, far below the runs
        axes.set_ylim(low, high)
    axes.invert_xaxis()
    axes.set_xlabel("loss")
