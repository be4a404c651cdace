"""Figures of training: accuracy, loss and regulariser against the epoch, and example inputs."""

from __future__ import annotations

__all__ = ["accuracy_curves", "example_inputs", "training_curves"]

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from lightning_locality.arguments import checked
from lightning_locality.plotting.style import COLOURS, COLUMN, STYLE, legend_below

_ROUND_DASHES = ("-", "--", ":")  # one for every round of the colours
_STAGES = {"training": "train/accuracy", "unseen (validation)": "val/accuracy"}
_CURVES = (("accuracy", "accuracy (%)", 100.0), ("loss", "loss", 1.0), ("regularizer", "regulariser $R$", 1.0))
_PATCHES = {"I: the gradient is compared here": COLOURS[5], "J: replaced by another sample's content": COLOURS[4]}


def _plot(axes: Axes, history: pd.DataFrame, name: str, scale: float, **style: Any) -> None:
    if name in history:
        values = history[name].dropna()
        axes.plot(values.index + 1, values * scale, **style)
    axes.set_xlabel("epoch")
    axes.locator_params(axis="x", integer=True)


@checked
def training_curves(history: pd.DataFrame) -> Figure:
    """Draw accuracy, loss and regulariser, of several each, against the epoch, on training and validation data.

    Args:
        history: Metrics by epoch, as :func:`~lightning_locality.results.history` reads them.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 1.9), layout="constrained")
        for axes, (name, label, scale) in zip(figure.subplots(1, 3), _CURVES, strict=True):
            # the quantity itself, or those below it, as regularizer/NAME
            logged = dict.fromkeys(str(column).partition("/")[2] for column in history)
            found = [one for one in logged if f"{one}/".startswith(f"{name}/")]
            for stage, color in (("train", COLOURS[0]), ("val", COLOURS[1])):
                for dashes, one in zip(itertools.cycle(_ROUND_DASHES), found, strict=False):
                    style = {"color": color, "linestyle": dashes, "label": stage + one.removeprefix(name)}
                    _plot(axes, history, f"{stage}/{one}", scale, **style)
            if len(found) > 1:
                axes.legend(fontsize=6)
            axes.set_ylabel(label)
            if name != "loss":
                axes.set_ylim(0, 1.03 * scale)
        if figure.axes[0].lines:
            figure.axes[0].legend()
        return figure


@checked
def accuracy_curves(histories: Mapping[str, Sequence[pd.DataFrame]]) -> Figure:
    """Draw training and validation accuracy against the epoch for several kinds of runs.

    Args:
        histories: Label of a kind of run -> metrics by epoch of each of its runs; a thin line for every run, a panel
            for training and one for validation data. If none is below 30 %, there are two classes, and a dotted line
            at chance.
    """
    seen = [h[name].min() for own in histories.values() for h in own for name in h if name in _STAGES.values()]
    two_classes = min(seen, default=1.0) >= 0.3
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.0), layout="constrained")
        for axes, (title, name) in zip(figure.subplots(1, 2, sharey=True), _STAGES.items(), strict=True):
            for position, (kind, own) in enumerate(histories.items()):
                style: Any = {"alpha": 0.7, "linewidth": 0.7} if len(own) > 1 else {}
                style["color"] = COLOURS[position % len(COLOURS)]
                style["linestyle"] = _ROUND_DASHES[position // len(COLOURS) % len(_ROUND_DASHES)]
                for number, history in enumerate(own):
                    # the first run of every kind explains its colour
                    _plot(axes, history, name, 100.0, label="" if number else kind, **style)
            if two_classes:
                axes.axhline(50, color="0.6", linewidth=0.6, linestyle=":")
            axes.set_title(title, fontsize=8)
            axes.set_ylim(30 if two_classes else 0, 103)
        figure.axes[0].set_ylabel("accuracy (%)")
        legend_below(figure)
        return figure


@checked
def example_inputs(
    images: NDArray[np.floating[Any]],
    titles: Sequence[str],
    masks: tuple[NDArray[np.bool_], NDArray[np.bool_]] | None = None,
) -> Figure:
    """Draw example inputs, with the two patches of the regulariser outlined.

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
        for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
            axes.axis("off")
            if number >= len(images):
                continue
            picture = shown[number].transpose(1, 2, 0)
            axes.imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
            axes.set_title(titles[number], fontsize=7, loc="left", pad=2)
            for mask, color in zip(masks or (), _PATCHES.values(), strict=False):
                _outline(axes, mask[number], color)
        if masks is not None:
            handles = [Line2D([], [], color=color, linewidth=1.5) for color in _PATCHES.values()]
            figure.legend(handles, list(_PATCHES), loc="outside lower center", ncols=2)
        return figure


def _outline(axes: Axes, mask: NDArray[np.bool_], color: str) -> None:
    """Draw the border between the pixels of a mask and the others, on the pixel edges."""
    padded = np.pad(mask, 1)
    tall = np.argwhere(padded[1:-1, 1:] != padded[1:-1, :-1])
    flat = np.argwhere(padded[1:, 1:-1] != padded[:-1, 1:-1])
    xs = np.concatenate([np.stack([tall[:, 1], tall[:, 1]]), np.stack([flat[:, 1], flat[:, 1] + 1])], axis=1)
    ys = np.concatenate([np.stack([tall[:, 0], tall[:, 0] + 1]), np.stack([flat[:, 0], flat[:, 0]])], axis=1)
    axes.plot(xs - 0.5, ys - 0.5, color=color, linewidth=1.2, solid_capstyle="butt")
