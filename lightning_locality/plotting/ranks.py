"""Figures of how far networks see: interaction against distance, and what crosses a cut."""

from __future__ import annotations

__all__ = ["cut_figure", "draw_profile", "profile_figure", "spectra_figure", "to_numpy", "tree_figure"]

from collections.abc import Mapping
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
Spectra = Mapping[Node, Any]

_PANELS = 8  # nodes with a panel of their own; more share one per level
_LINES = 6  # nodes of a level drawn one by one; of more, their median and range
_GROUPS = 12  # numbers of modes told apart; more are merged between powers of 2
_COLUMNS = 4
_ROUNDING = 1e-17  # relative singular values below are rounding of anything
_LEAVES = 64  # of a tree that is drawn as one
_POINTS = 72.0  # per inch


def to_numpy(values: Any) -> Array:
    """Numbers of a tensor, on any device, or of a sequence."""
    detached = values.detach().cpu() if hasattr(values, "detach") else values
    return np.asarray(detached, dtype=np.float64)


def _by_size(nodes: list[Node]) -> dict[str, list[Node]]:
    """Nodes by their number of modes, which in a perfect tree is the level; powers of 2 together where many."""
    sizes = sorted({len(node) for node in nodes})
    if len(sizes) > _GROUPS:
        low = [2**k for k in range(sizes[-1].bit_length())]
        bins = [(one, min(2 * one - 1, sizes[-1])) for one in low]
    else:
        bins = [(size, size) for size in sizes]
    groups = {
        str(low) if low == high else f"{low}–{high}": [node for node in nodes if low <= len(node) <= high]
        for low, high in bins
    }
    return {name: own for name, own in groups.items() if own}


def spectra_figure(spectra: Mapping[str, Spectra]) -> Figure:
    """Singular values at the nodes of a tree, relative to the largest, against their number.

    A panel for every node of up to eight; otherwise one for every number of modes, where more than six nodes are
    drawn as their median and range. Below the dotted line singular values cannot be told from rounding.

    Args:
        spectra: Label -> node -> singular values, descending; ``tolerance`` by node is drawn where they have one.

    Raises:
        ValueError: No spectra.
    """
    nodes = list(dict.fromkeys(node for own in spectra.values() for node in own))
    if not nodes:
        raise ValueError(f"spectra must hold a node at least, got {dict(spectra)}: measure one first")
    if len(nodes) <= _PANELS:
        panels = {_title(node): [node] for node in sorted(nodes, key=lambda node: (len(node), node))}
    else:
        panels = {f"{name} mode{'s' * (name != '1')}": own for name, own in _by_size(nodes).items()}
    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    width = COLUMN if columns < 3 else 2 * COLUMN
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 1.35 * lines + 0.55), layout="constrained")
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
        drawn = []
        for axes, (title, own) in zip(grid.flat, panels.items(), strict=False):
            axes.set_title(title + (f" ({len(own)} nodes)" if len(own) > 1 else ""), fontsize=7)
            for colour, one in zip(_colours(len(spectra)), spectra.values(), strict=True):
                drawn.append(_spectrum(axes, one, [node for node in own if node in one], colour))
        for number, axes in enumerate(grid.flat):
            if number >= len(panels):
                axes.axis("off")
            elif number + columns >= len(panels):
                axes.set_xlabel("index")
        least = min((float(values.min()) for values in drawn if values.size), default=_ROUNDING)
        grid[0, 0].set_yscale("log")
        grid[0, 0].set_ylim(min(0.4 * least, 0.1), 2.5)
        figure.supylabel("relative singular value", fontsize=8)
        _legend(figure, list(spectra))
        return figure


def _title(node: Node) -> str:
    name = node_name(node)
    return f"node {name}" if len(name) <= 16 else f"node {name[:6]}…{node[-1]}"


def _colours(count: int) -> list[str]:
    return [COLOURS[k % len(COLOURS)] for k in range(count)]


def _legend(figure: Figure, labels: list[str]) -> None:
    if len(labels) > 1:
        handles = [Line2D([], [], color=colour) for colour in _colours(len(labels))]
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 3), fontsize=7)


def _spectrum(axes: Axes, spectra: Spectra, nodes: list[Node], colour: str) -> Array:
    """Draw some nodes; what was drawn that is not zero comes back."""
    if not nodes:
        return np.empty(0)
    values = [to_numpy(spectra[node]) for node in nodes]
    relative = np.full((len(nodes), max(map(len, values))), np.nan)
    for row, one in zip(relative, values, strict=True):
        if one.size and one[0] > 0:
            row[: one.size] = one / one[0]
    # a zero of the spectrum belongs at the foot of a logarithmic axis
    relative = np.where(relative < _ROUNDING, _ROUNDING / 10, relative)
    known = ~np.isnan(relative).all(axis=0)
    number, relative = 1 + np.flatnonzero(known), relative[:, known]
    style: Any = {"color": colour, "marker": "o" if len(number) <= 16 else "", "markersize": 2.2}
    if len(nodes) <= _LINES:
        axes.plot(number, relative.T, linewidth=0.8, **style)
    else:
        low, median, high = np.nanmin(relative, 0), np.nanmedian(relative, 0), np.nanmax(relative, 0)
        axes.fill_between(number, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(number, median, linewidth=1.0, **style)
    tolerance = getattr(spectra, "tolerance", {})
    limits = [tolerance[node] for node in nodes if node in tolerance]
    if limits:
        axes.axhline(float(np.median(limits)), color=colour, linewidth=0.6, linestyle=":")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return relative[relative >= _ROUNDING]


def tree_figure(tree: ModeTree, ranks: Mapping[str, Mapping[Node, float]], quantity: str = "rank") -> Figure:
    """The rank at every node, on the tree of up to 64 modes, otherwise against the number of modes of the node.

    The colour is the rank, which is also written where there is room; the root, whose matricisation has one
    column, is a small dot. Of larger trees: smallest and largest rank, the middle half, and the median.

    Args:
        tree: The tree.
        ranks: Label -> node -> rank, or any other number for which larger means more dependence.
        quantity: What these are, for the scale.

    Raises:
        ValueError: No ranks, or ranks at nodes that are not in the tree.
    """
    values = [value for own in ranks.values() for value in own.values()]
    if not values:
        raise ValueError(f"ranks must hold a node at least, got {dict(ranks)}: measure them first")
    for label, own in ranks.items():
        missing = next((node for node in own if node not in tree), None)
        if missing is not None:
            raise ValueError(
                f"ranks of {label!r} has the node {_title(missing)[5:]}, which the tree has not: pass the tree that "
                "the ranks were measured on"
            )
    with rc_context(STYLE):
        return _strips(ranks, quantity) if tree.order > _LEAVES else _trees(tree, ranks, values, quantity)


def _trees(tree: ModeTree, ranks: Mapping[str, Mapping[Node, float]], values: list[float], quantity: str) -> Figure:
    # two side by side as long as the leaves of each have room in a column
    columns = 2 if len(ranks) > 1 and tree.order <= 16 else 1
    lines = -(-len(ranks) // columns)
    width = COLUMN if columns == 1 and tree.order <= 16 else 2 * COLUMN
    tall = min(0.42 * tree.height(tree.root) + 0.6, 3.0)
    figure = Figure(figsize=(width, tall * lines + 0.1), layout="constrained")
    low, high = min(values), max(values)
    colours = ScalarMappable(Normalize(low, high if high > low else low + 1), colormaps["viridis"])
    room = 0.82 * width / columns * _POINTS / tree.order, _POINTS * (tall - 0.5) / tree.height(tree.root)
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (label, own) in zip(grid.flat, ranks.items(), strict=False):
        _tree(axes, tree, own, colours, room)
        if len(ranks) > 1:
            axes.set_title(label, fontsize=8)
    length = min(0.8 * tall * lines, 1.6)
    size: Any = {"shrink": length / (tall * lines), "aspect": length / 0.1, "pad": 0.01}
    bar = figure.colorbar(colours, ax=list(grid.flat), label=quantity, **size)
    bar.locator = MaxNLocator(5, integer=all(float(value).is_integer() for value in values), min_n_ticks=1)
    bar.update_ticks()
    return figure


def _tree(
    axes: Axes, tree: ModeTree, ranks: Mapping[Node, float], colours: ScalarMappable, room: tuple[float, float]
) -> None:
    place: dict[Node, float] = {(mode,): float(position) for position, mode in enumerate(tree.traversal)}
    for node in tree.interior:
        place[node] = float(np.mean([place[child] for child in tree.children(node)]))
    levels: dict[int, list[float]] = {}
    for node in tree.nodes:
        height = tree.height(node)
        levels.setdefault(height, []).append(place[node])
        if node != tree.root:
            # down from the parent in a right angle: edges then never cross a node
            parent = tree.parent(node)
            xs, ys = [place[parent], place[node], place[node]], [tree.height(parent)] * 2 + [height]
            axes.plot(xs, ys, color="0.6", linewidth=0.6, zorder=1, solid_joinstyle="miter")
    gaps = {h: float(np.diff(sorted(xs)).min()) if len(xs) > 1 else np.inf for h, xs in levels.items()}
    for node in tree.nodes:
        height = tree.height(node)
        if node not in ranks:
            axes.plot(place[node], height, "o", color="black", markersize=2, zorder=2)
            continue
        size = min(0.85 * gaps[height] * room[0], 0.8 * room[1], 13.0)
        shade = colours.to_rgba(np.asarray(ranks[node]))
        axes.plot(place[node], height, "o", color=shade, markersize=size, markeredgewidth=0, zorder=2)
        text = f"{ranks[node]:.3g}"
        font = min(7.0, 0.95 * size, 0.85 * size / (0.6 * len(text)))
        if font >= 4.5:
            dark = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] < 0.5
            style: Any = {"ha": "center", "va": "center_baseline", "color": "white" if dark else "black"}
            axes.text(place[node], height, text, fontsize=font, zorder=3, **style)
    if room[0] >= 9:
        for position, mode in enumerate(tree.traversal):
            below = (0, -0.6 * min(0.85 * room[0], 0.8 * room[1], 13.0) - 1)
            axes.annotate(
                str(mode),
                (position, 0),
                below,
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=6,
                color="0.4",
            )
    axes.set_xlim(-0.7, tree.order - 0.3)
    axes.set_ylim(-0.7, tree.height(tree.root) + 0.3)


def _strips(ranks: Mapping[str, Mapping[Node, float]], quantity: str) -> Figure:
    groups = _by_size(list(dict.fromkeys(node for own in ranks.values() for node in own)))
    width = COLUMN if len(groups) * len(ranks) <= 28 else 2 * COLUMN
    figure = Figure(figsize=(width, 2.2), layout="constrained")
    axes = figure.subplots()
    step = 0.7 / len(ranks)
    for number, (colour, own) in enumerate(zip(_colours(len(ranks)), ranks.values(), strict=True)):
        for position, nodes in enumerate(groups.values()):
            values = np.array([float(own[node]) for node in nodes if node in own])
            if values.size == 0:
                continue
            x = position + step * (number - (len(ranks) - 1) / 2)
            low, lower, median, upper, high = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
            axes.plot([x, x], [low, high], color=colour, linewidth=0.7, solid_capstyle="butt")
            axes.plot([x, x], [lower, upper], color=colour, linewidth=2.6, solid_capstyle="butt", alpha=0.5)
            axes.plot([x], [median], "o", color=colour, markersize=2.8)
    axes.set_xticks(range(len(groups)), list(groups), rotation=45 if len(groups) > 8 else 0, fontsize=7)
    axes.set_xlabel("modes of the node")
    axes.set_ylabel(quantity)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    _legend(figure, list(ranks))
    return figure


_DECADES = 30.0  # a ratio of largest to smallest from which on the axis is logarithmic
_LEAST = 1e-6  # of the largest: less is drawn as none
_ERRORS = 2.0  # standard errors up and down
_MARKER = 2.6


def _colour(position: int) -> str:
    return COLOURS[position % len(COLOURS)]


def draw_profile(axes: Axes, profile: Any, label: str | None = None, colour: str | None = None) -> None:
    """Draw the strength of interaction against distance, with its band; the scale is logarithmic over decades.

    Below a millionth of a profile's largest strength there is no interaction: a triangle at the foot of the axis.

    Args:
        axes: Where; several profiles may be drawn one after the other.
        profile: With ``distance``, ``strength``, ``low`` and ``high``, each ``(D,)``, as of an interaction profile.
        label: In the legend.
        colour: Of matplotlib; None: the next one of the package's.
    """
    # those drawn before carry a mark
    colour = colour or _colour(sum(line.get_gid() == "profile" for line in axes.lines))
    distance, strength = to_numpy(profile.distance), to_numpy(profile.strength)
    low, high = to_numpy(profile.low), to_numpy(profile.high)
    largest = float(np.nanmax(strength, initial=0.0))
    nothing = ~(strength > _LEAST * largest)
    # a lower end of zero has no place on a logarithmic axis
    low = np.maximum(low, 1e-3 * _LEAST * largest)
    axes.fill_between(distance, low, high, where=(~nothing).tolist(), color=colour, alpha=0.2, linewidth=0)
    shown = np.where(nothing, np.nan, strength)
    axes.plot(distance, shown, "-o", color=colour, markersize=_MARKER, label=label, gid="profile")
    foot: Any = {"transform": axes.get_xaxis_transform(), "clip_on": False, "in_layout": False, "zorder": 4}
    zeros = np.zeros(int(nothing.sum()))
    axes.plot(distance[nothing], zeros, "v", color=colour, markersize=4, markerfacecolor="white", **foot)
    values = np.concatenate([to_numpy(line.get_ydata()) for line in axes.lines if line.get_gid() == "profile"])
    positive = values[values > 0]
    if positive.max(initial=0.0) > _DECADES * positive.min(initial=np.inf):
        axes.set_yscale("log", nonpositive="clip")
        axes.set_ylim(positive.min() / 2, positive.max() * 2)
    else:
        top = float(axes.dataLim.y1)
        axes.set_ylim(0, 1.05 * top if positive.size else 1.0)
    axes.set_ylabel("normalised interaction")
    _distances(axes)


def _distances(axes: Axes) -> None:
    axes.set_xlabel("distance (pixels)")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def profile_figure(profiles: Mapping[str, Any]) -> Figure:
    """Interaction against distance of several networks: its strength, where its mass lies, and the gradient's change.

    In the middle: the share of all interaction up to a distance, the radius of half of it (a dot), and, dotted, the
    share were all pairs to interact equally. The last panel is left out where no gradients were compared.

    Args:
        profiles: Label -> interaction profile.

    Raises:
        ValueError: No profiles.
    """
    if not profiles:
        raise ValueError("profiles must hold one profile at least, got none: measure one first")
    changes = any(np.isfinite(to_numpy(profile.gradient_change)).any() for profile in profiles.values())
    with rc_context(STYLE):
        # one legend line for three labels
        legend = 0.18 * -(-len(profiles) // 3) if len(profiles) > 1 else 0.0
        figure = Figure(figsize=(2 * COLUMN, 2.0 + legend), layout="constrained")
        panels = figure.subplots(1, 3 if changes else 2)
        for position, (label, profile) in enumerate(profiles.items()):
            draw_profile(panels[0], profile, label, _colour(position))
            _mass(panels[1], profile, _colour(position))
            if changes:
                change = to_numpy(profile.gradient_change)
                panels[2].plot(to_numpy(profile.distance), change, "-o", color=_colour(position), markersize=_MARKER)
        _uniform(panels[1], list(profiles.values()))
        panels[1].set_ylabel("cumulative share")
        panels[1].set_ylim(0, 1.03)
        if changes:
            panels[2].set_ylabel("input-gradient change")
            panels[2].set_ylim(0, 1.15 * max(panels[2].dataLim.y1, 1e-12))
        for axes in panels[1:]:
            _distances(axes)
        handles = [Line2D([], [], color=_colour(k)) for k in range(len(profiles))]
        if len(profiles) > 1:
            figure.legend(handles, list(profiles), loc="outside lower center", ncols=min(3, len(profiles)), fontsize=7)
        return figure


def _mass(axes: Axes, profile: Any, colour: str) -> None:
    distance, mass = to_numpy(profile.distance), to_numpy(profile.cumulative)
    if not np.isfinite(mass).any():
        return
    # a sum over distances that occur: nothing lies between two of them
    axes.plot([0, *distance], [0, *mass], drawstyle="steps-post", color=colour)
    half = float(profile.r50)
    if np.isfinite(half):
        axes.plot(
            [half], [0.5], "o", color=colour, markersize=4, markeredgecolor="white", markeredgewidth=0.5, zorder=4
        )
        axes.plot([half, half], [0, 0.5], color=colour, linewidth=0.6, linestyle="--")


def _uniform(axes: Axes, profiles: list[Any]) -> None:
    """The reference, once for each grid of patches."""
    seen: set[tuple[float, ...]] = set()
    for profile in profiles:
        distance, mass = to_numpy(profile.distance), to_numpy(profile.uniform)
        if tuple(distance) not in seen:
            seen.add(tuple(distance))
            label = "all pairs equal" if len(seen) == 1 else None
            axes.plot(
                [0, *distance],
                [0, *mass],
                drawstyle="steps-post",
                color="0.5",
                linewidth=0.9,
                linestyle=":",
                label=label,
            )
    axes.legend(loc="lower right", fontsize=6, handlelength=1.5, borderaxespad=0.2)


def cut_figure(cuts: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Share of the output's variance that crosses each cut, with two standard errors up and down.

    Args:
        cuts: Label -> name of the cut -> its share, with ``share`` and ``standard_error``; names in the order in which
            they are to be drawn, coarse to fine. A second panel has ``participation_ratio`` where that is known.

    Raises:
        ValueError: No cuts.
    """
    names = list(dict.fromkeys(name for own in cuts.values() for name in own))
    if not names:
        raise ValueError(f"cuts must hold one share at least, got {dict(cuts)}: measure one first")
    known = any(np.isfinite(_number(cut, "participation_ratio")) for own in cuts.values() for cut in own.values())
    with rc_context(STYLE):
        legend = 0.18 * -(-len(cuts) // 3) if len(cuts) > 1 else 0.0
        wide = known or len(names) > 10
        figure = Figure(figsize=(2 * COLUMN if wide else COLUMN, 2.3 + legend), layout="constrained")
        panels = figure.subplots(1, 1 + known, squeeze=False)[0]
        for position, own in enumerate(cuts.values()):
            shift = 0.5 / len(cuts) * (position - (len(cuts) - 1) / 2)
            places = [names.index(name) + shift for name in own]
            shares = np.array([_number(cut, "share") for cut in own.values()])
            errors = np.array([_number(cut, "standard_error") for cut in own.values()])
            style: Any = {"color": _colour(position), "markersize": _MARKER + 0.6}
            panels[0].errorbar(
                places, shares, _ERRORS * np.nan_to_num(errors), fmt="o", elinewidth=0.9, capsize=1.6, **style
            )
            if known:
                ratios = [_number(cut, "participation_ratio") for cut in own.values()]
                panels[1].plot(places, ratios, "o", **style)
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
        if len(cuts) > 1:
            handles = [Line2D([], [], color=_colour(k), marker="o", linestyle="") for k in range(len(cuts))]
            figure.legend(handles, list(cuts), loc="outside lower center", ncols=min(3, len(cuts)), fontsize=7)
        return figure


def _number(cut: Any, name: str) -> float:
    value = getattr(cut, name, None)
    return float("nan") if value is None else float(value)
