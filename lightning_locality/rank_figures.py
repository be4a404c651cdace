"""Figures of how far networks see: interaction against distance, and what crosses a cut."""

from __future__ import annotations

__all__ = ["cut_figure", "draw_profile", "profile_figure", "spectra_figure", "tree_figure"]

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from lightning_locality.figures import COLOURS, COLUMN, STYLE
from lightning_locality.tree_figures import spectra_figure, to_numpy, tree_figure

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
