"""Figures of ranks, singular values, interaction profiles and cuts."""

from __future__ import annotations

__all__: list[str] = []

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lightning_locality.plotting.style import COLOURS, COLUMN, STYLE, legend_below
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

Array = NDArray[np.floating[Any]]
Ranks = Mapping[str, Mapping[Node, float]]

_MAX_PANELS = 8  # nodes with a panel each; if there are more, those of a level share one
_MAX_LINES = 6  # nodes of a level with a line each; if there are more, their median and range
_MAX_GROUPS = 12  # numbers of modes told apart; if there are more, they are merged between powers of 2
_MAX_LEAVES = 64  # of a tree that is drawn as one
_ROUNDING = 1e-17  # smaller relative singular values are rounding in any case
_DECADES = 30.0  # ratio of largest to smallest above which the axis is logarithmic
_NO_INTERACTION = 1e-6  # of the largest strength
_MARKER = 2.6


def _color(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def _to_numpy(values: Any) -> Array:
    """Convert a tensor on any device, or a sequence."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)


def _legend(figure: Figure, labels: Sequence[str], **style: Any) -> None:
    """Explain the colours of several labels below the panels."""
    if len(labels) > 1:
        for position, label in enumerate(labels):
            figure.axes[0].plot([], [], color=_color(position), label=label, **style)
        legend_below(figure)


def _groups(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """Group nodes by their number of modes, which is the level in a perfect tree; many numbers by powers of 2."""
    sizes = {len(node) for node in nodes}
    largest, groups = max(sizes), dict[str, list[Node]]()
    for node in sorted(nodes, key=len):
        low = high = len(node)
        if len(sizes) > _MAX_GROUPS:
            low = 2 ** (low.bit_length() - 1)
            high = min(2 * low - 1, largest)
        groups.setdefault(str(low) if low == high else f"{low}–{high}", []).append(node)
    return groups


def spectra_figure(spectra: Mapping[str, Mapping[Node, Any]]) -> Figure:
    """Plot the singular values at the nodes of a tree, relative to the largest, against their index.

    Up to eight nodes have a panel each. If there are more, there is a panel for every number of modes, with the median
    and range of more than six nodes. Below the dotted line, the attribute ``tolerance`` of the spectra, singular values
    cannot be told from rounding.
    """
    nodes = list(dict.fromkeys(node for own in spectra.values() for node in own))
    if len(nodes) <= _MAX_PANELS:
        panels = {f"node {node_name(node)}": [node] for node in sorted(nodes, key=lambda node: (len(node), node))}
    else:
        panels = {
            f"{name} mode{'s' * (name != '1')}" + (f" ({len(own)} nodes)" if len(own) > 1 else ""): own
            for name, own in _groups(nodes).items()
        }
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(COLUMN if columns < 3 else 2 * COLUMN, 1.35 * rows + 0.45), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False, subplot_kw={"yscale": "log"})
        minimum = 0.25
        for axes, (title, own) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(title, fontsize=7)
            axes.set_xlabel("index")
            for position, values in enumerate(spectra.values()):
                smallest = _plot_spectra(axes, values, [node for node in own if node in values], _color(position))
                minimum = min(minimum, smallest)
            axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        for axes in grid.flat[len(panels) :]:
            axes.remove()
        grid[0, 0].set_ylim(0.4 * minimum, 2.5)
        figure.supylabel("relative singular value", fontsize=8)
        _legend(figure, list(spectra))
        return figure


def _plot_spectra(axes: Axes, spectra: Mapping[Node, Any], nodes: Sequence[Node], color: str) -> float:
    """Plot some nodes, and return the smallest value above rounding."""
    values = [_to_numpy(spectra[node]) for node in nodes]
    # one row per node, filled up with NaN
    relative = pd.DataFrame([pd.Series(one / one[0]) for one in values if one.size and one[0] > 0])
    # a zero belongs at the foot of a logarithmic axis
    relative = relative.mask(relative < _ROUNDING, _ROUNDING / 10)
    index, numbers = 1 + relative.columns.to_numpy(), relative.to_numpy()
    style: Any = {"color": color, "marker": "o" if len(index) <= 16 else "", "markersize": 2.2}
    if len(nodes) <= _MAX_LINES:
        axes.plot(index, numbers.T, linewidth=0.8, **style)
    else:
        axes.fill_between(index, relative.min(), relative.max(), color=color, alpha=0.25, linewidth=0)
        axes.plot(index, relative.median(), linewidth=1.0, **style)
    tolerance = getattr(spectra, "tolerance", {})
    if limits := [tolerance[node] for node in nodes if node in tolerance]:
        axes.axhline(float(np.median(limits)), color=color, linewidth=0.6, linestyle=":")
    return float(numbers[numbers >= _ROUNDING].min(initial=1.0))


def tree_figure(tree: ModeTree, ranks: Ranks, quantity: str = "rank") -> Figure:
    """Plot the rank at every node: on the tree if it has up to 64 modes, else against the node's number of modes.

    On the tree the rank is shown as a colour, and written if there is room; the root, whose matricisation has one
    column, is a small dot. For larger trees: smallest and largest rank, the middle half, and the median.
    """
    with rc_context(STYLE):
        return _rank_distribution(ranks, quantity) if tree.order > _MAX_LEAVES else _trees(tree, ranks, quantity)


def _trees(tree: ModeTree, ranks: Ranks, quantity: str) -> Figure:
    # two next to each other as long as their leaves fit into a column each
    columns = 2 if len(ranks) > 1 and tree.order <= 16 else 1
    rows = math.ceil(len(ranks) / columns)
    width = COLUMN if columns == 1 and tree.order <= 16 else 2 * COLUMN
    row_height = min(0.42 * tree.height(tree.root) + 0.6, 3.0)
    figure = Figure(figsize=(width, row_height * rows + 0.1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, subplot_kw={"frame_on": False, "xticks": [], "yticks": []})
    values = [value for own in ranks.values() for value in own.values()]
    low, high = min(values), max(values)
    colors = ScalarMappable(Normalize(low, high if high > low else low + 1), "viridis")
    ticks = MaxNLocator("auto", integer=all(float(value).is_integer() for value in values))
    figure.colorbar(colors, ax=grid, label=quantity, ticks=ticks, aspect=20 * rows)
    # printer's points between neighbouring leaves, and between levels
    room = 0.82 * width / columns * 72 / tree.order, 72 * (row_height - 0.5) / tree.height(tree.root)
    for axes, (label, own) in zip(grid.flat, ranks.items(), strict=False):
        _plot_tree(axes, tree, own, colors, room)
        if len(ranks) > 1:
            axes.set_title(textwrap.fill(label, int(width / columns * 15)), fontsize=8)
    return figure


def _plot_tree(axes: Axes, tree: ModeTree, ranks: Mapping[Node, float], colors: ScalarMappable, room: Any) -> None:
    x: dict[Node, float] = {(mode,): float(position) for position, mode in enumerate(tree.traversal)}
    for node in tree.interior:
        x[node] = float(np.mean([x[child] for child in tree.children(node)]))
    levels: dict[int, list[Node]] = {}
    for node in tree.nodes:
        levels.setdefault(tree.height(node), []).append(node)
    for height, nodes in levels.items():
        gap = np.diff(sorted(x[node] for node in nodes)).min(initial=np.inf)
        size = min(0.85 * gap * room[0], 0.8 * room[1], 13.0)
        for node in nodes:
            if node != tree.root:
                # down from the parent in a right angle: edges then never cross a node
                parent = tree.parent(node)
                ends = [x[parent], x[node]], [tree.height(parent), height]
                axes.plot(*ends, color="0.6", linewidth=0.6, zorder=1, drawstyle="steps-post")
            if node not in ranks:
                axes.plot(x[node], height, "o", color="black", markersize=2)
                continue
            shade, text = colors.to_rgba(np.asarray(ranks[node])), f"{ranks[node]:.3g}"
            axes.plot(x[node], height, "o", color=shade, markersize=size, markeredgewidth=0)
            font = min(7.0, 0.95 * size, 1.4 * size / len(text))
            if font >= 4.5:
                contrast = "white" if sum(shade[:3]) < 1.35 else "black"
                axes.text(x[node], height, text, fontsize=font, color=contrast, ha="center", va="center_baseline")
    if room[0] >= 9:
        axes.set_xticks(range(tree.order), list(map(str, tree.traversal)), fontsize=6, color="0.4")
        axes.tick_params(length=0, pad=0)
    axes.set_xlim(-0.7, tree.order - 0.3)
    axes.set_ylim(-0.3, tree.height(tree.root) + 0.3)


def _rank_distribution(ranks: Ranks, quantity: str) -> Figure:
    groups = _groups(list(dict.fromkeys(node for own in ranks.values() for node in own)))
    figure = Figure(figsize=(COLUMN if len(groups) * len(ranks) <= 28 else 2 * COLUMN, 2.1), layout="constrained")
    axes = figure.subplots()
    for number, own in enumerate(ranks.values()):
        values = [[float(own[node]) for node in nodes if node in own] for nodes in groups.values()]
        places = np.arange(len(groups)) + 0.7 / len(ranks) * (number - (len(ranks) - 1) / 2)
        lines = ("boxprops", "whiskerprops", "capprops", "medianprops")
        style: Any = {line: {"color": _color(number), "linewidth": 0.8} for line in lines}
        axes.boxplot(values, positions=places, widths=0.5 / len(ranks), whis=(0, 100), manage_ticks=False, **style)
    axes.set_xticks(range(len(groups)), list(groups), rotation=45 if len(groups) > 8 else 0, fontsize=7)
    axes.set(xlabel="modes of the node", ylabel=quantity, ylim=(0, None))
    _legend(figure, list(ranks))
    return figure


def plot_profile(axes: Axes, profile: Any, label: str | None = None, color: str | None = None) -> None:
    """Plot the strength of interaction against distance, with its band, on a logarithmic scale if it spans decades.

    Strengths below a millionth of a profile's largest are no interaction: a triangle at the foot of the axis.
    """
    # profiles are marked, so that they can be counted
    color = color or _color(sum(line.get_gid() == "profile" for line in axes.lines))
    distance, strength = _to_numpy(profile.distance), _to_numpy(profile.strength)
    largest = float(np.nanmax(strength, initial=0.0))
    nothing = ~(strength > _NO_INTERACTION * largest)
    # a lower end of zero has no place on a logarithmic axis
    low = np.maximum(_to_numpy(profile.low), 1e-3 * _NO_INTERACTION * largest)
    band: Any = {"where": (~nothing).tolist(), "alpha": 0.2, "linewidth": 0}
    axes.fill_between(distance, low, _to_numpy(profile.high), color=color, **band)
    strength = np.where(nothing, np.nan, strength)
    axes.plot(distance, strength, "-o", color=color, markersize=_MARKER, label=label, gid="profile")
    foot: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False, "in_layout": False, "zorder": 4}
    zeros = np.zeros(int(nothing.sum()))
    axes.plot(distance[nothing], zeros, "v", color=color, markersize=4, markerfacecolor="white", **foot)
    values = np.concatenate([_to_numpy(line.get_ydata()) for line in axes.lines if line.get_gid() == "profile"])
    positive = values[values > 0]
    if positive.max(initial=0.0) > _DECADES * positive.min(initial=np.inf):
        axes.set_yscale("log")
        axes.set_ylim(positive.min() / 2, positive.max() * 2)
    else:
        axes.set_ylim(0, 1.05 * float(axes.dataLim.y1) if positive.size else 1.0)
    axes.set(xlabel="distance (pixels)", ylabel="normalised interaction", xlim=(0, None))


def profile_figure(profiles: Mapping[str, Any]) -> Figure:
    """Plot interaction against distance for several networks: strength, cumulative share and change of the gradient.

    The panel in the middle shows the share of all interaction up to a distance, the radius that contains half of it
    (a dot) and, dotted, the share if all pairs interacted equally. The last panel is left out if no gradients were
    compared.
    """
    compared = any(np.isfinite(_to_numpy(profile.gradient_change)).any() for profile in profiles.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.0), layout="constrained")
        strength, cumulative, *others = figure.subplots(1, 2 + compared)
        for position, profile in enumerate(profiles.values()):
            plot_profile(strength, profile, color=_color(position))
            _plot_cumulative(cumulative, profile, _color(position))
            for axes in others:
                change = _to_numpy(profile.gradient_change)
                axes.plot(_to_numpy(profile.distance), change, "-o", color=_color(position), markersize=_MARKER)
        # the reference, once for every grid of patches
        grids = {tuple(_to_numpy(profile.distance)): _to_numpy(profile.uniform) for profile in profiles.values()}
        for distance, share in grids.items():
            style: Any = {"drawstyle": "steps-post", "color": "0.5", "linewidth": 0.9, "linestyle": ":"}
            cumulative.plot([0, *distance], [0, *share], **style)
        cumulative.legend(cumulative.lines[-1:], ["all pairs equal"], loc="lower right", fontsize=6)
        labels = ("cumulative share", "input-gradient change")
        for axes, label in zip((cumulative, *others), labels, strict=False):
            axes.set(xlabel="distance (pixels)", ylabel=label, xlim=(0, None), ylim=(0, None))
        _legend(figure, list(profiles))
        return figure


def plot_influence(axes: Axes, influence: Any, color: str | None = None) -> None:
    """Plot influence against distance as :func:`plot_profile` does interaction; 1 is that of a pixel anywhere."""
    plot_profile(axes, influence, color=color)
    axes.set(ylabel="relative influence", title=influence.layer or "output")


def range_figure(
    influences: Mapping[str, Any], profiles: Mapping[str, Any], task_distance: float | None = None
) -> Figure:
    """Plot influence (first order) and interaction (second order) of several networks against distance, side by side.

    Dashed: their mean distances, which the legends give in pixels. Dotted: the distance of the regions that the task
    needs.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.3), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, measured in zip(panels, (influences, profiles), strict=True):
            for position, own in enumerate(measured.values()):
                (plot_influence if measured is influences else plot_profile)(axes, own, color=_color(position))
            for position, (name, own) in enumerate(measured.items()):
                mean: Any = {"color": _color(position), "linewidth": 0.8, "linestyle": "--"}
                label = name if math.isnan(own.mean_distance) else f"{name}: {own.mean_distance:.3g}"
                # NaN, if there is none, draws nothing
                axes.axvline(own.mean_distance, label=label, **mean)
            if task_distance is not None:
                task: Any = {"color": "0.3", "linewidth": 0.9, "linestyle": ":"}
                axes.axvline(task_distance, label=f"task: {task_distance:.3g}", **task)
            # below, where no curve is
            place: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "ncols": min(3, len(measured) + 1)}
            axes.legend(title="mean distance (pixels)", fontsize=6.5, title_fontsize=6.5, columnspacing=1.0, **place)
        # one scale, on which the task's distance lies too
        right = max(*(axes.get_xlim()[1] for axes in panels), 1.05 * (task_distance or 0))
        for axes in panels:
            axes.set_xlim(0, right)
        panels[0].set_title("influence of a pixel, first order", fontsize=7)
        panels[1].set_title("interaction of patches, second order", fontsize=7)
        return figure


def _plot_cumulative(axes: Axes, profile: Any, color: str) -> None:
    distance, share = _to_numpy(profile.distance), _to_numpy(profile.cumulative)
    if not np.isfinite(share).any():
        return
    # a sum over the distances that occur: nothing lies between two of them
    axes.plot([0, *distance], [0, *share], drawstyle="steps-post", color=color)
    dot: Any = {"markevery": [1], "markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.5}
    axes.plot([profile.r50] * 2, [0, 0.5], "--o", color=color, linewidth=0.6, zorder=4, **dot)


def cut_figure(cuts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot the share of the output's variance that crosses each cut, with two standard errors up and down.

    A second panel has the participation ratios if any is known. The order of the names is that of the axis.
    """
    names = list(dict.fromkeys(name for own in cuts.values() for name in own))

    def numbers(own: Mapping[str, Any], name: str) -> Array:
        # None is not a number
        return np.array([getattr(cut, name, None) for cut in own.values()], dtype=float)

    known = any(np.isfinite(numbers(own, "participation_ratio")).any() for own in cuts.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN if known or len(names) > 10 else COLUMN, 2.3), layout="constrained")
        panels = figure.subplots(1, 1 + known, squeeze=False)[0]
        for position, own in enumerate(cuts.values()):
            shift = 0.5 / len(cuts) * (position - (len(cuts) - 1) / 2)
            places = [names.index(name) + shift for name in own]
            errors = 2 * np.nan_to_num(numbers(own, "standard_error"))
            style: Any = {"color": _color(position), "markersize": _MARKER + 0.6}
            panels[0].errorbar(places, numbers(own, "share"), errors, fmt="o", elinewidth=0.9, capsize=1.6, **style)
            for axes in panels[1:]:
                axes.plot(places, numbers(own, "participation_ratio"), "o", **style)
        for axes, quantity in zip(panels, ("share crossing the cut", "participation ratio"), strict=False):
            axes.set_ylabel(quantity)
            axes.set_ylim(bottom=min(0.0, axes.dataLim.y0))
            slanted: Any = {"rotation": 35, "ha": "right", "rotation_mode": "anchor", "fontsize": 7}
            axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names], **slanted)
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.grid(axis="x", color="0.92", linewidth=0.5)
        _legend(figure, list(cuts), marker="o", linestyle="")
        return figure
