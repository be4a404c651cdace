"""Figures of recovery runs: staircases of what grows and when; an unobserved entry against the loss."""

from __future__ import annotations

__all__ = ["components", "curve_summary", "dynamics", "norm", "value"]

import math
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lightning_locality.arguments import checked
from lightning_locality.plotting import style
from lightning_locality.plotting.style import COLOURS, STYLE, WIDTHS, Drawn, Width, shown
from lightning_locality.results import find_columns, history, nearest, read_settings

_ERROR, _LOSS = "reconstruction_error", "train/loss"
# numbered columns that are not magnitudes: their numbers are modes
_OTHERS = ("effective rank", "entry", "train", "test")
_KINDS = {
    "component": "component norm",
    "node": "local component norm",
    "mode": "core slice norm",
    "bond": "singular value",
}
_CURVES: dict[str, Any] = {
    _ERROR: {"ylabel": "reconstruction error", "ylim": (0, None)},
    _LOSS: {"ylabel": "training loss", "yscale": "log"},
}
_GROUPS, _MOST_RUNS = 3, 16  # groups drawn by default, and runs in a figure
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (5, 1.5, 1.2, 1.5)), (0, (8, 1)))  # dots are the bounds
_Problem = tuple[float, float, float, bool]


def magnitude_groups(columns: Sequence[str] | pd.Index) -> dict[str, list[str]]:
    """Return the columns of magnitudes by group: ``component/1``, ``component/2``, ... are the group ``component``.

    Largest magnitudes come first, and nodes of a tree with the most modes.
    """
    found: dict[str, dict[int, str]] = {}
    for name in columns:
        match = re.fullmatch(r"(.+)/(\d+)", name)
        if match and match[1] not in _OTHERS:
            found.setdefault(match[1], {})[int(match[2])] = name
    order = sorted(found, key=lambda group: -group.count("-"))
    return {group: [found[group][rank] for rank in sorted(found[group])] for group in order}


def number_of_components(runs: pd.DataFrame, threshold: float = 0.01) -> pd.Series:
    """Count the magnitudes that exceed a share of the largest of their group, averaged over the groups."""
    groups = [runs[names] for names in magnitude_groups(runs.columns).values()]
    counts = [own.gt(threshold * own.max(axis=1), axis=0).sum(axis=1).where(own.notna().any(axis=1)) for own in groups]
    return pd.concat(counts, axis=1).mean(axis=1) if counts else pd.Series(np.nan, index=runs.index)


@checked
def curve_summary(history: pd.DataFrame, max_components: int = 6) -> pd.DataFrame:
    """Read numbers off the curves of a run, to be compared with those of published figures.

    For every group of magnitudes (singular values, component norms, local component norms) the last value of each of
    the largest, and the iteration at which it first exceeded half of that; the first iteration at which the
    reconstruction error is below 0.5, 0.1, 0.01 and 0.001, its minimum and its last value; and, if an unobserved entry
    is followed, its absolute value when the loss first falls below 0.1, 0.01, 0.001 and 0.0001 (between two
    measurements on the straight line in logarithms), and the sign of the determinant then.

    Args:
        history: Metrics by iteration, as :func:`~lightning_locality.results.history` reads them.
        max_components: Largest magnitudes of every group.
    """
    found: list[tuple[str, float]] = []
    for names in magnitude_groups(history.columns).values():
        last = history[names].iloc[-1]
        for name in names[:max_components]:
            if last[name] > 1e-3 * last[names[0]]:
                at_half = float(history.index[history[name] > last[name] / 2][0])
                found += [(name, last[name]), (f"{name} at half", at_half)]
    if _ERROR in history:
        error = history[_ERROR]
        below = {level: history.index[error < level] for level in (0.5, 0.1, 0.01, 0.001)}
        found += [(f"error below {level:g} at", float(at[0])) for level, at in below.items() if len(at)]
        found += [("least error", error.min()), ("last error", error.iloc[-1])]
    for name in (key for key in history.columns if key.startswith("entry/")):
        loss = history[_LOSS].to_numpy()
        for level in (1e-1, 1e-2, 1e-3, 1e-4):
            crossed = np.flatnonzero((loss[:-1] > level) & (loss[1:] <= level))
            if not crossed.size:
                continue
            before, after = history.iloc[crossed[0]], history.iloc[crossed[0] + 1]
            high, low = math.log(before[_LOSS]), math.log(after[_LOSS])
            start, end = (math.log(abs(row[name]) or 1e-300) for row in (before, after))
            share = (high - math.log(level)) / (high - low)
            found.append((f"|{name}| at loss {level:g}", math.exp(start + share * (end - start))))
            if "determinant" in history:
                found.append((f"sign of the determinant at loss {level:g}", math.copysign(1, after["determinant"])))
    return pd.DataFrame(found, columns=["quantity", "value"])


def _histories(runs: pd.DataFrame) -> dict[Path, pd.DataFrame]:
    """Read the measurements of the finished recovery runs by run directory."""
    folders = style.finished(runs)["folder"].dropna()
    found = {folder: own for folder in folders if not (own := history(folder, "iteration")).empty}
    if not found:
        raise ValueError(
            "no finished recovery runs with a metrics.csv in their folder: give the folder of a sweep or of a run"
        )
    return found


def _summaries(histories: Mapping[Path, pd.DataFrame]) -> pd.DataFrame:
    own = [curve_summary(rows).assign(run=folder.name) for folder, rows in histories.items()]
    return pd.concat(own, ignore_index=True)[["run", "quantity", "value"]]


@checked
def dynamics(
    runs: pd.DataFrame,
    magnitudes: list[str] | None = None,
    top: int = 10,
    against: Literal["iteration", "time"] = "iteration",
    loss: bool = True,
    width: Width = "column",
    reference: dict[str, float] | None = None,
) -> Drawn:
    """Staircases: what grows, reconstruction error and loss against the iteration, a column per run.

    One run: a panel per group and one for the error. Several runs: a column for each, its first group above and
    its error below, as in *Implicit Regularization in Tensor Factorization* (Razin, Maman, Cohen, 2021) and
    *Implicit Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks* (2022).
    The numbers are those of :func:`curve_summary`.

    Args:
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        magnitudes: Groups of magnitudes, as component or node 0-1-2-3; by default those the runs have.
        top: Number of magnitudes of each group, the largest.
        against: Iteration, or time for gradient flow.
        loss: A panel for the training loss as well.
        width: 3.35 or 6.9 inches.
        reference: Name -> reconstruction error of something else on the same observations, a horizontal line.

    Raises:
        ValueError: No recovery runs, too many for one figure, or no such magnitudes.
    """
    if top < 1:
        raise ValueError(f"--top must be at least 1, got {top}")
    histories = _histories(runs)
    if len(histories) > _MOST_RUNS:
        raise ValueError(f"{len(histories)} runs do not fit into one figure: choose up to {_MOST_RUNS} with --where")
    titles = [folder.name for folder in histories]
    variants = runs[runs["folder"].isin(list(histories))].get("variant", pd.Series(dtype=str)).dropna()
    if variants.nunique() == len(titles):
        titles = list(variants)
    elif len(set(titles)) < len(titles):
        titles = [f"{folder.parent.name}/{folder.name}" for folder in histories]
    named = dict(zip(titles, histories.values(), strict=True))
    figure = component_curves(named, magnitudes or (), top, against, loss, WIDTHS[width], reference)
    return figure, _summaries(histories)


@checked
def components(
    runs: pd.DataFrame,
    groups: list[str] | None = None,
    top: int = 10,
    x: Literal["iteration", "time"] = "iteration",
    width: Width = "text",
    reference: dict[str, float] | None = None,
) -> Drawn:
    """Staircases and reconstruction error against the iteration: dynamics without the loss."""
    return dynamics(runs, groups, top, x, loss=False, width=width, reference=reference)


@rc_context(STYLE)
def component_curves(
    runs: Mapping[str, pd.DataFrame],
    groups: Sequence[str] = (),
    top: int = 10,
    x: Literal["iteration", "time"] = "iteration",
    loss: bool = False,
    width: float = WIDTHS["text"],
    reference: Mapping[str, float] | None = None,
) -> Figure:
    """Draw the figure of :func:`dynamics` from metrics by iteration; below 5 inches a row has two panels, not four."""
    chosen = {}
    for title, rows in runs.items():
        known = list(magnitude_groups(rows.columns))
        chosen[title] = [group for group in groups if group in known] if groups else known[:_GROUPS]
        if not chosen[title]:
            raise ValueError(f"run {title!r} has no {' or '.join(groups) or 'magnitudes'}; it has {known or 'none'}")
    columns = 4 if width > 5 else 2
    curves = [_ERROR, _LOSS] if loss and any(_ERROR in rows for rows in runs.values()) else [_ERROR]
    # rows of panels: title, metrics, and a group or curve
    if len(runs) == 1:
        table = [[("", rows, name) for title, rows in runs.items() for name in (*chosen[title], *curves)]]
    else:
        table = [[(title, rows, chosen[title][0]) for title, rows in runs.items()]]
        table += [[("", rows, name) for rows in runs.values()] for name in curves]
    grid = [row[start : start + columns] for start in range(0, len(table[0]), columns) for row in table]
    figure = Figure(figsize=(width, 1.55 * len(grid) + 0.2), layout="constrained")
    all_axes = figure.subplots(len(grid), max(map(len, grid)), squeeze=False)
    for row_axes, row in zip(all_axes, grid, strict=True):
        for axes in row_axes[len(row) :]:
            axes.axis("off")
        for axes, (title, rows, group) in zip(row_axes, row, strict=False):
            rows, along = rows.reset_index(), x if x in rows else "iteration"  # only gradient flow has a time
            rows = rows.set_index(along)
            if group in curves:
                # the loss instead of the error if the target is unknown
                name = group if group in rows else _LOSS
                axes.plot(rows[name].dropna(), color=COLOURS[-1], linewidth=1.0)
                levels = (reference or {}).items() if name == _ERROR else ()
                for (label, error), dashes in zip(levels, cycle((":", "--", "-.")), strict=False):
                    axes.axhline(error, label=label, color="0.3", linewidth=0.8, linestyle=dashes)
                axes.set(**_CURVES[name])
            else:
                for position, name in enumerate(magnitude_groups(rows.columns)[group][:top]):
                    color = COLOURS[position] if position < len(COLOURS) else "0.6"
                    axes.plot(rows[name].dropna(), color=color, linewidth=1.0, zorder=3 - 0.01 * position)
                axes.set(ylabel=_label(group), ylim=(0, None))
            axes.set_title(title, fontsize=8)
            axes.set_xlabel(along)
            axes.locator_params(axis="x", nbins=3)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    style.legend_below(figure)
    return figure


def _label(group: str) -> str:
    """Return ``component norm`` for ``component``, the only group, and ``core slice norm (mode 0)`` for ``mode 0``."""
    kind = _KINDS.get(group.split(" ")[0], group)
    return kind if group in (kind, *_KINDS) else f"{kind}\n({group})"


@checked
@rc_context(STYLE)
def value(
    runs: pd.DataFrame,
    group: list[str] | str | None = None,
    entry: str | None = None,
    split: str = "",
    least: float = 0.0,
    width: Width | None = None,
) -> Drawn:
    """Size of an unobserved entry against the loss, which decreases to the right, with its lower bound.

    As in *Implicit Regularization in Deep Learning May Not Be Explainable by Norms* (Razin, Cohen, 2020). The numbers
    are those of :func:`curve_summary`.

    Args:
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        group: Columns with a colour for every value; by default the variant.
        entry: Its indices, as 0-0; by default the one the runs follow.
        split: Labels are PANEL SPLIT LABEL, with a panel for every PANEL.
        least: Smallest loss that is shown.
        width: 3.35 or 6.9 inches; by default 3.35 for one panel and 6.9 for several.

    Raises:
        ValueError: No entry is followed, or not this one.
    """
    histories = _histories(runs)
    followed = [name for own in histories.values() for name in own.columns if name.startswith("entry/")]
    known = [name.removeprefix("entry/") for name in sorted(set(followed))]
    if not known:
        raise ValueError("none of the runs follows an unobserved entry (entry/0-0): there is nothing to draw")
    if entry is not None and entry not in known:
        raise ValueError(f"--entry: no run follows {entry!r}{nearest(entry, known)}; there are {', '.join(known)}")
    entry = entry or known[0]
    groups = find_columns(runs, group or ("variant" if "variant" in runs else "run"), "--group")
    kept = {folder: own for folder, own in histories.items() if f"entry/{entry}" in own}
    rows = []
    for row in runs[runs["folder"].isin(list(kept))].to_dict("records"):
        label = ", ".join(shown(row[name]) for name in groups)
        title, _, rest = label.partition(split) if split and split in label else ("", "", label)
        rows.append((title, rest, row["folder"], _problem(row["folder"])))
    table = pd.DataFrame(rows, columns=["title", "label", "folder", "problem"])
    curves = {folder: own.set_index(_LOSS)[f"entry/{entry}"].abs() for folder, own in kept.items()}
    curves = {folder: curve[curve.index >= least] for folder, curve in curves.items()}
    titles = table["title"].unique()
    figure, grid = style.panels(len(titles), width or ("column" if len(titles) == 1 else "text"), 2.1)
    for axes, title in zip(grid, titles, strict=True):
        _plot_values(axes, table[table["title"] == title], table["label"].unique().tolist(), curves)
        axes.set(xlabel="loss", ylabel=f"|entry ({entry.replace('-', ', ')})|")
        axes.set_title(title, fontsize=8)
    style.legend_below(figure)
    return figure, _summaries(kept)


norm = value


def _problem(run: Path) -> _Problem | None:
    """Return z, z', eps of the data module and whether it is larger than 2x2, if it has a lower bound."""
    data = (read_settings(run).get("data") or {}).get("init_args") or {}
    if not {"rows", "cols", "z", "z_prime", "eps"} <= data.keys() or data["rows"] != data["cols"]:
        return None
    return data["z"], data["z_prime"], data["eps"], data["rows"] > 2


def _plot_values(axes: Axes, runs: pd.DataFrame, labels: list[str], curves: Mapping[Path, pd.Series]) -> None:
    """Draw the entry of every run, and the bound of each problem: in black if all runs share it."""
    axes.set(xscale="log", yscale="log")
    bounds: dict[_Problem, str] = {}
    losses: list[float] = []
    for label in runs["label"].unique():
        own, position = runs[runs["label"] == label], labels.index(label)
        color, dashes = COLOURS[position % len(COLOURS)], _DASHES[position % len(_DASHES)]
        for curve in (curves[folder] for folder in own["folder"]):
            axes.plot(curve, label=label, linewidth=1.0, color=color, linestyle=dashes)
            losses += curve.index[curve.index > 0].tolist()
        # the runs of a label with several problems share no bound
        if own["problem"].nunique(dropna=False) == 1 and (problem := own["problem"].iloc[0]) is not None:
            bounds[problem] = color
    low, high = axes.get_ylim()
    if losses and bounds:
        from lightning_locality.tensors.deep_matrix import lower_bound  # here because torch takes a second

        at = np.geomspace(min(losses), max(losses), 400)
        shared = runs["problem"].nunique(dropna=False) == 1
        for problem, color in bounds.items():
            bound = lower_bound(at, *problem[:3], larger=problem[3])
            bound = np.where(bound > 0, bound, np.nan)
            axes.plot(at, bound, color="black" if shared else color, linewidth=0.8, linestyle=":")
        axes.plot([], [], color="black" if shared else "0.4", linewidth=0.8, linestyle=":", label="lower bound")
    # the bound starts at zero, far below the runs
    axes.set_ylim(low, high)
    axes.invert_xaxis()
