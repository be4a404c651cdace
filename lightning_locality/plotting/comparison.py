"""Figures that compare how runs end: any column against any other, and those of the recovery experiments."""

from __future__ import annotations

__all__ = ["accuracy", "depth", "observations", "rank", "xy"]

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_locality.arguments import checked
from lightning_locality.plotting import style
from lightning_locality.plotting.recovery import number_of_components
from lightning_locality.plotting.style import LETTERS, STYLE, WIDTHS, Drawn, Spread, Statistic, Width, shown
from lightning_locality.plotting.training import accuracy_curves
from lightning_locality.results import aggregate, find_column, find_columns, history, ordered

Log = Literal["x", "y", "xy", "none"]

_NAMES = {
    "distance": "distance (pixels)",
    "weight": "weight of the regulariser",
    "seed_everything": "seed",
    "seconds": "time (s)",
    "observations": "observed entries",
    "train": "training",
    "val": "validation",
}
_DISTANCES = ("distance", "path_length")
_DOTTED: Any = {"color": "0.4", "linewidth": 0.8, "linestyle": ":"}


@checked
@rc_context(STYLE)
def xy(
    runs: pd.DataFrame,
    x: str,
    y: str,
    group: list[str] | str | None = None,
    panel: str | None = None,
    over: list[str] | None = None,
    log: Log = "none",
    points: bool = False,
    statistic: Statistic = "mean",
    spread: Spread = "std",
    chance: float | Literal["none"] | None = None,
    labels: dict[str, str] | None = None,
    width: Width = "column",
) -> Drawn:
    """Any column against any other, a line for every group.

    Args:
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        x: Column along the axis.
        y: Column that is averaged.
        group: Columns with a line for every value.
        panel: Column with a panel for every value.
        over: Columns that may vary among the runs of a point; by default all others.
        log: Logarithmic axes.
        points: Marks alone, without lines between them.
        statistic: What the lines go through.
        spread: What the bars show; std divides by n.
        chance: Level of guessing, a dotted line; none for no line.
        labels: Column or value -> its text in the figure.
        width: 3.35 or 6.9 inches: a column of a two-column paper, or its text width.

    Raises:
        ValueError: No such column, or nothing to draw.
    """
    x, y = find_column(runs, x, "--x"), find_column(runs, y, "--y")
    groups = find_columns(runs, group, "--group")
    grid_of = find_columns(runs, panel, "--panel")
    keys = [*grid_of, *groups, x]
    if twice := [name for name in keys if keys.count(name) > 1]:
        raise ValueError(f"{twice[0]} is used twice: use it once in --x, --group and --panel")
    if words := [value for value in runs[y].dropna() if isinstance(value, str)]:
        raise ValueError(f"--y: {y} is not a number: {words[0]!r}; choose a column of numbers")
    numbers = aggregate(runs, keys, y)
    if not numbers["n"].sum():
        raise ValueError(f"no finished run has both {x} and a finite {y}: nothing to draw")
    notes = _averaged(runs, keys, over and find_columns(runs, over, "--over"))
    if lost := int(runs[x].isna().sum()):
        notes.append(f"{lost} run{'s' if lost > 1 else ''} without {x} left out")
    numbers.attrs = {"name": re.sub(r"\W+", "_", f"{y}_against_{x.split('.')[-1]}"), "notes": notes}

    labels, level = labels or {}, None if chance in (None, "none") else float(chance)
    known = {name for key in (*keys, y) for name in (key, _last(key))} | {shown(v) for k in keys for v in numbers[k]}
    if wrong := [name for name in labels if name not in known | ({"chance"} if level is not None else set())]:
        raise ValueError(f"--labels: {wrong[0]!r} is not in the figure; there are {', '.join(sorted(known))}")
    data = style.finished(runs)
    data = data[np.isfinite(pd.to_numeric(data[y])) & data[x].notna()]
    for axis, name in (("x", x), ("y", y)):
        if axis in log and (bad := [v for v in data[name] if isinstance(v, str) or v <= 0]):
            raise ValueError(f"--log {log}: {name} has {bad[0]!r}, which has no logarithm")

    def texts_of(rows: pd.DataFrame, names: Sequence[str], named: bool) -> pd.Series:
        return rows.apply(lambda row: ", ".join(_value(row[n], labels, n if named else "") for n in names), axis=1)

    numeric = pd.api.types.is_numeric_dtype(data[x]) and not pd.api.types.is_bool_dtype(data[x])
    # names stand along the vertical axis, where there is room for them
    names = [] if numeric else ordered(data[x])
    along: Literal["x", "y"] = "x" if numeric else "y"
    across = "y" if numeric else "x"
    # a table from elsewhere may be in per cent already
    per_cent = y.endswith("accuracy") and not (pd.to_numeric(runs[y]) > 1).any()
    scale, unit = (100.0, " (%)") if per_cent else (1.0, "")
    axis_labels = {along: _column(x, labels) if numeric else "", across: _column(y, labels) + unit}
    drawn = pd.DataFrame({along: data[x] if numeric else data[x].map(names.index), across: scale * data[y]})
    drawn["line"], drawn["title"] = texts_of(data, groups, len(groups) > 1), texts_of(data, grid_of, True)
    lines = texts_of(numbers[numbers["n"] > 0], groups, len(groups) > 1).unique().tolist()
    titles = texts_of(numbers, grid_of, True).unique().tolist()
    column = WIDTHS[width] / (min(len(titles), 3) if width == "text" else 1)
    names = [textwrap.fill(_value(name, labels), int(0.45 * LETTERS * column)) for name in names]
    height = 2.3 if len(titles) == 1 else 1.8
    if names:
        height = 0.13 * len(names) * max(name.count("\n") + 1.4 for name in names) + 0.6
    figure, grid = style.panels(len(titles), width, height, share=True)
    if names:
        grid[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    for axes, title in zip(grid, titles, strict=True):
        own, joined = drawn[drawn["title"] == title], numeric and not points
        style.plot_lines(axes, own, lines, statistic, spread, joined=joined, orient=along)
        if level is not None:
            draw_level = axes.axhline if numeric else axes.axvline
            draw_level(scale * level, zorder=0, label=_value("chance", labels), **_DOTTED)
        axes.grid(visible=not numeric, axis="y")
        axes.set_title(textwrap.fill(title, int(0.8 * LETTERS * column)), fontsize=8)
        axes.set(xlabel=axis_labels["x"], ylabel=axis_labels["y"])
        axes.tick_params(labelbottom=True)
    grid[0].set(**{f"{axis}scale": "log" for name, axis in (("x", along), ("y", across)) if name in log})
    places = sorted(set(drawn["x"]))
    on_axis = np.log10(places) if "x" in log else np.array(places)
    # ticks at the places themselves, if they are few and do not touch
    if numeric and len(places) <= 7 and (np.diff(on_axis) >= 0.09 * np.ptp(on_axis)).all():
        grid[0].set_xticks(places, [_value(place, labels) for place in places])
        grid[0].set_xticks([], minor=True)
    style.legend_below(figure, _column(groups[0], labels) if len(groups) == 1 and groups[0] != "variant" else None)
    return figure, numbers


@checked
def accuracy(
    runs: pd.DataFrame,
    x: str | None = None,
    y: str = "test/accuracy",
    group: list[str] | str | None = None,
    chance: float | Literal["none"] | None = 0.5,
    **options: Any,
) -> Drawn:
    """Test accuracy against distance or path length, a line per weight; or accuracy against the epoch.

    Args:
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        x: Column along the axis; by default distance or path_length, if that varies, or else epoch.
        y: Column that is averaged.
        group: Columns with a line for every value; by default weight and variant, as far as they vary.
        chance: Level of guessing, a dotted line; none for no line.
        options: Of :func:`xy`.
    """
    settings = runs.attrs.get("settings", ())
    if x is None:
        found = [name for name in runs.columns if name not in settings and _last(name) in _DISTANCES]
        x = found[0] if len(found) == 1 else "epoch"
    if x == "epoch":
        return _against_epoch(runs, group)
    if group is None:
        used = [find_column(runs, name, "--x") for name in (x, options.get("panel")) if name]
        weights = [name for name in runs.columns if _last(name) == "weight" and name not in settings]
        found = [name for name in ("variant", *weights) if name in runs and name not in used]
        group = [name for name in found if runs[name].nunique(dropna=False) > 1]
        # one of two is enough if it determines the other
        pairs = len(runs[group].drop_duplicates())
        group = [name for name in reversed(group) if len(group) == 2 and runs[name].nunique() == pairs][:1] or group
    return xy(runs, x, y, group, chance=chance, **options)


def _last(name: str) -> str:
    return re.split(r"[./]", name)[-1]


def _column(name: str, labels: Mapping[str, str]) -> str:
    """Return the text of a column: ``validation accuracy`` for ``val/accuracy``."""
    if found := labels.get(name) or labels.get(_last(name)):
        return found
    return " ".join(_NAMES.get(part, part.replace("_", " ")) for part in name.split(".")[-1].split("/"))


def _value(value: Any, labels: Mapping[str, str], name: str = "") -> str:
    """Return the text of a value, of a number with the name of its column if one is given."""
    text = shown(value)
    if not name or isinstance(value, str) or text in labels:
        return labels.get(text, text)
    return f"{labels.get(name) or labels.get(_last(name)) or _last(name).replace('_', ' ')} {text}"


def _averaged(runs: pd.DataFrame, keys: Sequence[str], over: Sequence[str] | None) -> list[str]:
    """Say which columns vary among the runs of a point, and check that they may."""
    found = []
    for name in runs.attrs.get("varied", ()):
        if name in keys or not (runs.groupby(list(keys), dropna=False)[name].nunique(dropna=False) > 1).any():
            continue
        if over is not None and name not in over:
            raise ValueError(
                f"--over {' '.join(over)}: {name} varies as well among runs that would be averaged; put it into "
                "--group, --panel or --over, or choose one value with --where"
            )
        values = [shown(value) for value in ordered(runs[name])]
        found.append(f"{name} ({', '.join(values) if len(values) <= 6 else f'{len(values)} values'})")
    return [f"averaged over {', '.join(found)}"] if found else []


def _against_epoch(runs: pd.DataFrame, group: Sequence[str] | str | None) -> Drawn:
    """Draw accuracy against the epoch, a thin line for every run."""
    groups = find_columns(runs, group or ("variant" if "variant" in runs else "run"), "--group")
    histories: dict[str, list[pd.DataFrame]] = {}
    tables = []
    for row in style.finished(runs).to_dict("records"):
        own = history(row["folder"]) if row["folder"] else pd.DataFrame()
        if columns := [name for name in own.columns if name in ("train/accuracy", "val/accuracy")]:
            histories.setdefault(", ".join(shown(row[name]) for name in groups), []).append(own)
            # epochs count from one, as on the axis
            table = own[columns].dropna(how="all").rename(index=lambda epoch: epoch + 1).reset_index()
            tables.append(pd.DataFrame({name: row[name] for name in ("run", *groups)}, index=table.index).join(table))
    if not histories:
        known = [name for name in runs.columns if name not in runs.attrs.get("settings", ())]
        raise ValueError(
            f"--x: there is no single column {' or '.join(_DISTANCES)}, and no run directory with accuracies by epoch; "
            f"choose one of {', '.join(known)}"
        )
    return accuracy_curves(histories), pd.concat(tables, ignore_index=True)


@checked
@rc_context(STYLE)
def depth(runs: pd.DataFrame, x: str = "depth", group: str = "variant", width: Width = "text") -> Drawn:
    """Effective rank, number of components and reconstruction error against the depth: median and range.

    The effective rank is the mean over the matricisations logged.

    Args:
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        x: Column of the depth.
        group: Column with a line for every value.
        width: 3.35 or 6.9 inches.
    """
    ranks = [name for name in runs.columns if name.startswith("effective rank/")]
    more = {"effective rank": runs[ranks].mean(axis=1), "number of components": number_of_components(runs)}
    figure, axes = style.panels(3, width, 1.8)
    numbers = _plot_ends(axes, runs.assign(**more), x, (*more, "reconstruction_error"), group, "median", "range")
    style.legend_below(figure)
    return figure, numbers


@checked
@rc_context(STYLE)
def rank(
    runs: pd.DataFrame, group: str = "variant", scale: float = 0.25, trivial: float = 0.09, width: Width = "text"
) -> Drawn:
    """Training and test error against the CP rank, a row of panels per image set: mean and standard deviation.

    As in *Implicit Regularization in Tensor Factorization* (Razin, Maman, Cohen, 2021).

    Args:
        runs: With the column rank, and source if there are several image sets.
        group: Column with a line for every value.
        scale: Factor of the errors in the figure: a quarter if the targets are 0 and 2 and the error is to be that of
            0 and 1.
        trivial: Error of the best constant prediction, a dotted line.
        width: 3.35 or 6.9 inches.
    """
    settings = runs.attrs.get("settings", ())
    if not any(_last(name) == "rank" and name not in settings for name in runs.columns):
        raise ValueError("there is no column 'rank': the rank of the CP factorisation was not varied in these runs")
    sources = [name for name in runs.columns if _last(name) == "source" and name not in settings][:1]
    values = runs[sources[0]] if sources else pd.Series("", index=runs.index)
    tables = []
    figure = Figure(figsize=(WIDTHS[width], 1.8 * values.nunique()), layout="constrained")
    for axes, source in zip(figure.subplots(values.nunique(), 2, squeeze=False), ordered(values), strict=True):
        own = runs[values == source]
        table = _plot_ends(axes, own, "rank", ("train/loss", "test/loss"), group, "mean", "std", scale, trivial)
        tables.append(table)
        for name in sources:
            table.insert(1, name, source)
        for panel in axes:
            panel.set(xlabel="CP rank", ylabel=panel.get_ylabel().replace("loss", "error"))
            panel.set_title(source.replace("_", " "), fontsize=8)
    style.legend_below(figure)
    return figure, pd.concat(tables, ignore_index=True)


@checked
@rc_context(STYLE)
def observations(
    runs: pd.DataFrame, x: str = "observations", group: str = "variant", ranks: str = "cp rank", width: Width = "text"
) -> Drawn:
    """Reconstruction error, and the estimated rank, against the number of observed entries: median and quartiles.

    As in *Implicit Regularization in Deep Learning May Not Be Explainable by Norms* (Razin, Cohen, 2020).

    Args:
        runs: As :func:`~lightning_locality.results.read_runs` reads them.
        x: Column of the number of observed entries.
        group: Column with a line for every value.
        ranks: Column of the estimated rank; without it the panel is left out.
        width: 3.35 or 6.9 inches.
    """
    names = ["reconstruction_error", *([ranks] if ranks in runs else [])]
    figure, axes = style.panels(len(names), width, 2.1)
    numbers = _plot_ends(axes, runs, x, names, group, "median", "quartiles")
    if len(names) > 1:
        axes[1].set_ylabel("estimated CP rank")
    style.legend_below(figure)
    return figure, numbers


def _plot_ends(
    axes: Sequence[Axes],
    runs: pd.DataFrame,
    x: str,
    quantities: Sequence[str],
    group: str,
    statistic: Statistic,
    spread: Spread,
    scale: float = 1.0,
    level: float | None = None,
) -> pd.DataFrame:
    """Draw a panel for every quantity, a line with a band for every value of ``group``, and return the numbers."""
    x, group = find_column(runs, x, "--x"), find_column(runs, group, "--group")
    if not any(runs[name].notna().any() for name in quantities if name in runs):
        raise ValueError(f"none of the runs has {' or '.join(quantities)}: there is nothing to draw")
    data = style.finished(runs)
    data = data.assign(line=data[group].map(shown), x=pd.to_numeric(data[x]))
    lines = [shown(value) for value in ordered(runs[group])]
    tables = []
    for panel, name in zip(axes, quantities, strict=True):
        if name in runs:
            style.plot_lines(panel, data.assign(y=scale * data[name]), lines, statistic, spread, band=True)
            tables.append(aggregate(runs, [group, x], name))
            tables[-1].insert(0, "quantity", name)
        if level is not None:
            panel.axhline(level, **_DOTTED)
        panel.set(xlabel=_column(x, {}), ylabel=_column(name, {}))
        panel.locator_params(axis="x", integer=True)
        if name == "reconstruction_error":
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
    return pd.concat(tables, ignore_index=True)
