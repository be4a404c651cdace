"""Figures of ranks, singular values, interaction profiles and cuts."""

from __future__ import annotations

__all__ = ["cut_figure", "plot_profile", "profile_figure", "spectra_figure", "tree_figure"]

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lightning_locality.plotting.style import COLOURS, COLUMN, STYLE
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name

Array = NDArray[np.floating[Any]]
Ranks = Mapping[str, Mapping[Node, float]]

_MAX_PANELS = 8  # nodes with a panel each; if there are more, those of a level share one
_MAX_LINES = 6  # nodes of a level with a line each; if there are more, their median and range
_MAX_GROUPS = 12  # numbers of modes told apart; if there are more, they are merged between powers of 2
_MAX_COLUMNS = 4
_MAX_LEAVES = 64  # of a tree that is drawn as one
_ROUNDING = 1e-17  # smaller relative singular values are rounding in any case
_DECADES = 30.0  # ratio of largest to smallest above which the axis is logarithmic
_NO_INTERACTION = 1e-6  # of the largest strength
_STANDARD_ERRORS = 2.0  # up and down
_MARKER = 2.6
_POINTS = 72.0  # per inch
_LETTERS = 17  # per inch, in a legend


def _color(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def _to_numpy(values: Any) -> Array:
    """Convert a tensor on any device, or a sequence."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, dtype=np.float64)


def _legend(figure: Figure, labels: Sequence[str], **style: Any) -> None:
    """Explain several labels below the panels, in up to three columns; the figure grows by their height."""
    if len(labels) < 2:
        return
    width, height = figure.get_size_inches()
    texts = [textwrap.fill(label, int(width * _LETTERS) - 6) for label in labels]
    columns = min(3, len(labels), max(1, int(width * _LETTERS) // (max(map(len, labels)) + 6)))
    handles = [Line2D([], [], color=_color(position), **style) for position in range(len(labels))]
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=7)
    figure.set_size_inches(width, height + 0.18 * math.ceil(sum(1 + text.count("\n") for text in texts) / columns))


def _groups(nodes: Sequence[Node]) -> dict[str, list[Node]]:
    """Group nodes by their number of modes, which is the level in a perfect tree; many numbers by powers of 2."""
    sizes = sorted({len(node) for node in nodes})
    bins = [(size, size) for size in sizes]
    if len(sizes) > _MAX_GROUPS:
        bins = [(2**k, min(2 ** (k + 1) - 1, sizes[-1])) for k in range(sizes[-1].bit_length())]
    groups = {
        str(low) if low == high else f"{low}–{high}": [node for node in nodes if low <= len(node) <= high]
        for low, high in bins
    }
    return {name: own for name, own in groups.items() if own}


def _name(node: Node) -> str:
    name = node_name(node)
    return name if len(name) <= 16 else f"{name[:6]}…{node[-1]}"


def spectra_figure(spectra: Mapping[str, Mapping[Node, Any]]) -> Figure:
    """Plot the singular values at the nodes of a tree, relative to the largest, against their index.

    Up to eight nodes have a panel each. If there are more, there is a panel for every number of modes, with the median
    and range of more than six nodes. Below the dotted line singular values cannot be told from rounding.

    Args:
        spectra: Label -> node -> singular values, descending. The attribute ``tolerance`` (by node) is drawn if they
            have one.

    Raises:
        ValueError: No spectra.
    """
    nodes = list(dict.fromkeys(node for own in spectra.values() for node in own))
    if not nodes:
        raise ValueError(f"spectra must hold at least one node, got {dict(spectra)}: measure one first")
    if len(nodes) <= _MAX_PANELS:
        panels = {f"node {_name(node)}": [node] for node in sorted(nodes, key=lambda node: (len(node), node))}
    else:
        panels = {
            f"{name} mode{'s' * (name != '1')}" + (f" ({len(own)} nodes)" if len(own) > 1 else ""): own
            for name, own in _groups(nodes).items()
        }
    columns = min(_MAX_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(COLUMN if columns < 3 else 2 * COLUMN, 1.35 * rows + 0.45), layout="constrained")
        grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
        minimum = 0.25
        for axes, (title, own) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(title, fontsize=7)
            for position, values in enumerate(spectra.values()):
                minimum = min(minimum, _plot_spectra(axes, values, [node for node in own if node in values], position))
        for number, axes in enumerate(grid.flat):
            if number >= len(panels):
                axes.axis("off")
            elif number + columns >= len(panels):
                axes.set_xlabel("index")
        grid[0, 0].set_yscale("log")
        grid[0, 0].set_ylim(0.4 * minimum, 2.5)
        figure.supylabel("relative singular value", fontsize=8)
        _legend(figure, list(spectra))
        return figure


def _plot_spectra(axes: Axes, spectra: Mapping[Node, Any], nodes: Sequence[Node], position: int) -> float:
    """Plot some nodes, and return the smallest value above rounding."""
    if not nodes:
        return 1.0
    values = [_to_numpy(spectra[node]) for node in nodes]
    relative = np.full((len(nodes), max(map(len, values))), np.nan)
    for row, one in zip(relative, values, strict=True):
        if one.size and one[0] > 0:
            row[: one.size] = one / one[0]
    # a zero belongs at the foot of a logarithmic axis
    relative = np.where(relative < _ROUNDING, _ROUNDING / 10, relative)
    known = ~np.isnan(relative).all(axis=0)
    index, relative = 1 + np.flatnonzero(known), relative[:, known]
    style: Any = {"color": _color(position), "marker": "o" if len(index) <= 16 else "", "markersize": 2.2}
    if len(nodes) <= _MAX_LINES:
        axes.plot(index, relative.T, linewidth=0.8, **style)
    else:
        low, median, high = np.nanmin(relative, 0), np.nanmedian(relative, 0), np.nanmax(relative, 0)
        axes.fill_between(index, low, high, color=_color(position), alpha=0.25, linewidth=0)
        axes.plot(index, median, linewidth=1.0, **style)
    tolerance = getattr(spectra, "tolerance", {})
    if limits := [tolerance[node] for node in nodes if node in tolerance]:
        axes.axhline(float(np.median(limits)), color=_color(position), linewidth=0.6, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return float(relative[relative >= _ROUNDING].min(initial=1.0))


def tree_figure(tree: ModeTree, ranks: Ranks, quantity: str = "rank") -> Figure:
    """Plot the rank at every node: on the tree if it has up to 64 modes, else against the node's number of modes.

    On the tree the rank is shown as a colour, and written if there is room; the root, whose matricisation has one
    column, is a small dot. For larger trees: smallest and largest rank, the middle half, and the median.

    Args:
        tree: The tree.
        ranks: Label -> node -> rank, or any other number for which larger means more dependence.
        quantity: Name of these numbers, for the scale.

    Raises:
        ValueError: No ranks, or ranks at nodes that are not in the tree.
    """
    if not any(ranks.values()):
        raise ValueError(f"ranks must hold at least one node, got {dict(ranks)}: measure them first")
    for label, own in ranks.items():
        missing = next((node for node in own if node not in tree), None)
        if missing is not None:
            raise ValueError(
                f"ranks of {label!r} has the node {_name(missing)}, which the tree does not have: pass the tree that "
                "the ranks were measured on"
            )
    with rc_context(STYLE):
        return _rank_distribution(ranks, quantity) if tree.order > _MAX_LEAVES else _trees(tree, ranks, quantity)


def _trees(tree: ModeTree, ranks: Ranks, quantity: str) -> Figure:
    # two next to each other as long as their leaves fit into a column each
    columns = 2 if len(ranks) > 1 and tree.order <= 16 else 1
    rows = math.ceil(len(ranks) / columns)
    width = COLUMN if columns == 1 and tree.order <= 16 else 2 * COLUMN
    row_height = min(0.42 * tree.height(tree.root) + 0.6, 3.0)
    figure = Figure(figsize=(width, row_height * rows + 0.1), layout="constrained")
    values = [value for own in ranks.values() for value in own.values()]
    low, high = min(values), max(values)
    colors = ScalarMappable(Normalize(low, high if high > low else low + 1), colormaps["viridis"])
    # printer's points between neighbouring leaves, and between levels
    room = 0.82 * width / columns * _POINTS / tree.order, _POINTS * (row_height - 0.5) / tree.height(tree.root)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (label, own) in zip(grid.flat, ranks.items(), strict=False):
        _plot_tree(axes, tree, own, colors, room)
        if len(ranks) > 1:
            axes.set_title(textwrap.fill(label, int(width / columns * 15)), fontsize=8)
    length = min(0.8 * row_height * rows, 1.6)
    size: Any = {"shrink": length / (row_height * rows), "aspect": length / 0.1, "pad": 0.01}
    bar = figure.colorbar(colors, ax=list(grid.flat), label=quantity, **size)
    bar.locator = MaxNLocator(5, integer=all(float(value).is_integer() for value in values), min_n_ticks=1)
    bar.update_ticks()
    return figure


def _plot_tree(
    axes: Axes, tree: ModeTree, ranks: Mapping[Node, float], colors: ScalarMappable, room: tuple[float, float]
) -> None:
    x: dict[Node, float] = {(mode,): float(position) for position, mode in enumerate(tree.traversal)}
    for node in tree.interior:
        x[node] = float(np.mean([x[child] for child in tree.children(node)]))
    levels: dict[int, list[float]] = {}
    for node in tree.nodes:
        height = tree.height(node)
        levels.setdefault(height, []).append(x[node])
        if node != tree.root:
            # down from the parent in a right angle: edges then never cross a node
            parent = tree.parent(node)
            heights = [tree.height(parent), tree.height(parent), height]
            style: Any = {"color": "0.6", "linewidth": 0.6, "zorder": 1, "solid_joinstyle": "miter"}
            axes.plot([x[parent], x[node], x[node]], heights, **style)
    gaps = {height: float(np.diff(sorted(xs)).min()) if len(xs) > 1 else np.inf for height, xs in levels.items()}
    for node in tree.nodes:
        height = tree.height(node)
        if node not in ranks:
            axes.plot(x[node], height, "o", color="black", markersize=2, zorder=2)
            continue
        size = min(0.85 * gaps[height] * room[0], 0.8 * room[1], 13.0)
        shade = colors.to_rgba(np.asarray(ranks[node]))
        axes.plot(x[node], height, "o", color=shade, markersize=size, markeredgewidth=0, zorder=2)
        text = f"{ranks[node]:.3g}"
        font = min(7.0, 0.95 * size, 0.85 * size / (0.6 * len(text)))
        if font >= 4.5:
            dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
            style = {"ha": "center", "va": "center_baseline", "color": "white" if dark else "black"}
            axes.text(x[node], height, text, fontsize=font, zorder=3, **style)
    if room[0] >= 9:
        below = (0, -0.6 * min(0.85 * room[0], 0.8 * room[1], 13.0) - 1)
        style = {"textcoords": "offset points", "ha": "center", "va": "top", "fontsize": 6, "color": "0.4"}
        for position, mode in enumerate(tree.traversal):
            axes.annotate(str(mode), (position, 0), below, **style)
    axes.set_xlim(-0.7, tree.order - 0.3)
    axes.set_ylim(-0.7, tree.height(tree.root) + 0.3)


def _rank_distribution(ranks: Ranks, quantity: str) -> Figure:
    groups = _groups(list(dict.fromkeys(node for own in ranks.values() for node in own)))
    width = COLUMN if len(groups) * len(ranks) <= 28 else 2 * COLUMN
    figure = Figure(figsize=(width, 2.1), layout="constrained")
    axes = figure.subplots()
    for number, own in enumerate(ranks.values()):
        for position, nodes in enumerate(groups.values()):
            values = [float(own[node]) for node in nodes if node in own]
            if not values:
                continue
            x = position + 0.7 / len(ranks) * (number - (len(ranks) - 1) / 2)
            low, lower, median, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
            style: Any = {"color": _color(number)}
            axes.plot([x, x], [low, high], linewidth=0.7, solid_capstyle="butt", **style)
            axes.plot([x, x], [lower, upper], linewidth=2.6, solid_capstyle="butt", alpha=0.5, **style)
            axes.plot([x], [median], "o", markersize=2.8, **style)
    axes.set_xticks(range(len(groups)), list(groups), rotation=45 if len(groups) > 8 else 0, fontsize=7)
    axes.set_xlabel("modes of the node")
    axes.set_ylabel(quantity)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(figure, list(ranks))
    return figure


def plot_profile(axes: Axes, profile: Any, label: str | None = None, color: str | None = None) -> None:
    """Plot the strength of interaction against distance, with its band, on a logarithmic scale if it spans decades.

    Strengths below a millionth of a profile's largest are no interaction: a triangle at the foot of the axis.

    Args:
        axes: Axes, which may hold other profiles already.
        profile: An interaction profile, or any object with ``distance``, ``strength``, ``low`` and ``high``, each
            ``(D,)``.
        label: Label in the legend.
        color: Colour; None: the next of the package's.
    """
    # profiles are marked, so that they can be counted
    color = color or _color(sum(line.get_gid() == "profile" for line in axes.lines))
    distance, strength, low, high = (
        _to_numpy(getattr(profile, name)) for name in ("distance", "strength", "low", "high")
    )
    largest = float(np.nanmax(strength, initial=0.0))
    nothing = ~(strength > _NO_INTERACTION * largest)
    # a lower end of zero has no place on a logarithmic axis
    low = np.maximum(low, 1e-3 * _NO_INTERACTION * largest)
    axes.fill_between(distance, low, high, where=(~nothing).tolist(), color=color, alpha=0.2, linewidth=0)
    strength = np.where(nothing, np.nan, strength)
    axes.plot(distance, strength, "-o", color=color, markersize=_MARKER, label=label, gid="profile")
    foot: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False, "in_layout": False, "zorder": 4}
    zeros = np.zeros(int(nothing.sum()))
    axes.plot(distance[nothing], zeros, "v", color=color, markersize=4, markerfacecolor="white", **foot)
    values = np.concatenate([_to_numpy(line.get_ydata()) for line in axes.lines if line.get_gid() == "profile"])
    positive = values[values > 0]
    if positive.max(initial=0.0) > _DECADES * positive.min(initial=np.inf):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(positive.min() / 2, positive.max() * 2)
    else:
        axes.set_ylim(0, 1.05 * float(axes.dataLim.y1) if positive.size else 1.0)
    axes.set_ylabel("normalised interaction")
    _label_distances(axes)


def _label_distances(axes: Axes) -> None:
    axes.set_xlabel("distance (pixels)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def profile_figure(profiles: Mapping[str, Any]) -> Figure:
    """Plot interaction against distance for several networks: strength, cumulative share and change of the gradient.

    The panel in the middle shows the share of all interaction up to a distance, the radius that contains half of it
    (a dot) and, dotted, the share if all pairs interacted equally. The last panel is left out if no gradients were
    compared.

    Args:
        profiles: Label -> interaction profile.

    Raises:
        ValueError: No profiles.
    """
    if not profiles:
        raise ValueError("profiles must hold at least one profile, got none: measure one first")
    changes = {label: _to_numpy(profile.gradient_change) for label, profile in profiles.items()}
    compared = any(np.isfinite(change).any() for change in changes.values())
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.0), layout="constrained")
        panels = figure.subplots(1, 2 + compared)
        for position, (label, profile) in enumerate(profiles.items()):
            plot_profile(panels[0], profile, label, _color(position))
            _plot_cumulative(panels[1], profile, _color(position))
            if compared:
                style: Any = {"color": _color(position), "markersize": _MARKER}
                panels[2].plot(_to_numpy(profile.distance), changes[label], "-o", **style)
        _plot_uniform(panels[1], list(profiles.values()))
        panels[1].set_ylabel("cumulative share")
        panels[1].set_ylim(0, 1.03)
        if compared:
            panels[2].set_ylabel("input-gradient change")
            panels[2].set_ylim(0, 1.15 * max(panels[2].dataLim.y1, 1e-12))
        for axes in panels[1:]:
            _label_distances(axes)
        _legend(figure, list(profiles))
        return figure


def _plot_cumulative(axes: Axes, profile: Any, color: str) -> None:
    distance, share = _to_numpy(profile.distance), _to_numpy(profile.cumulative)
    if not np.isfinite(share).any():
        return
    # a sum over the distances that occur: nothing lies between two of them
    axes.plot([0, *distance], [0, *share], drawstyle="steps-post", color=color)
    half = float(profile.r50)
    if np.isfinite(half):
        style: Any = {"markersize": 4, "markeredgecolor": "white", "markeredgewidth": 0.5, "zorder": 4}
        axes.plot([half], [0.5], "o", color=color, **style)
        axes.plot([half, half], [0, 0.5], color=color, linewidth=0.6, linestyle="--")


def _plot_uniform(axes: Axes, profiles: Sequence[Any]) -> None:
    """Plot the reference, once for every grid of patches."""
    grids = {tuple(_to_numpy(profile.distance)): _to_numpy(profile.uniform) for profile in profiles}
    style: Any = {"drawstyle": "steps-post", "color": "0.5", "linewidth": 0.9, "linestyle": ":"}
    for number, (distance, share) in enumerate(grids.items()):
        axes.plot([0, *distance], [0, *share], label=None if number else "all pairs equal", **style)
    axes.legend(loc="lower right", fontsize=6, handlelength=1.5, borderaxespad=0.2)


def cut_figure(cuts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot the share of the output's variance that crosses each cut, with two standard errors up and down.

    Args:
        cuts: Label -> name of the cut -> its share, an object with ``share`` and ``standard_error``; names in the
            order of the axis, coarse to fine. A second panel has ``participation_ratio`` if any is known.

    Raises:
        ValueError: No cuts.
    """
    names = list(dict.fromkeys(name for own in cuts.values() for name in own))
    if not names:
        raise ValueError(f"cuts must hold at least one share, got {dict(cuts)}: measure one first")

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
            errors = _STANDARD_ERRORS * np.nan_to_num(numbers(own, "standard_error"))
            style: Any = {"color": _color(position), "markersize": _MARKER + 0.6}
            panels[0].errorbar(places, numbers(own, "share"), errors, fmt="o", elinewidth=0.9, capsize=1.6, **style)
            if known:
                panels[1].plot(places, numbers(own, "participation_ratio"), "o", **style)
        panels[0].set_ylabel("share crossing the cut")
        panels[0].set_ylim(bottom=min(0.0, panels[0].dataLim.y0))
        if known:
            panels[1].set_ylabel("participation ratio")
            panels[1].set_ylim(bottom=0)
        for axes in panels:
            axes.set_xticks(range(len(names)), [name.replace("_", " ") for name in names])
            axes.tick_params(axis="x", labelrotation=35, labelsize=7)
            for text in axes.get_xticklabels():
                text.set(ha="right", rotation_mode="anchor")
            axes.set_xlim(-0.5, len(names) - 0.5)
            axes.grid(axis="x", color="0.92", linewidth=0.5)
            axes.set_axisbelow(True)
        _legend(figure, list(cuts), marker="o", linestyle="")
        return figure
