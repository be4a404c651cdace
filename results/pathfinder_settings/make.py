"""Draw Pathfinder's published settings: for each a picture of both labels, with what is where, and its numbers.

python results/pathfinder_settings/make.py --out results/pathfinder_settings
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lightning_locality.datamodules.pathfinder.parameters import PathfinderCurves
from lightning_locality.datamodules.pathfinder.placement import draw
from lightning_locality.plotting.style import COLOURS, STYLE, save_figure

SETTINGS = [("icml2022", length) for length in (3, 9)]
SETTINGS += [(name, length) for name in ("lra32", "lra64", "lra128", "lra256") for length in (6, 9, 14)]
SETTINGS += [("pathx", 14), *(("linsley300", length) for length in (6, 14, 25))]


def numbers(preset: str, length: int, count: int) -> dict[str, float | str]:
    """What pictures of a setting have in the mean: ink, dashes, distance of the discs in sides of the picture."""
    curves = PathfinderCurves.preset(preset, length)
    images, labels, targets = draw(curves, 0, "train", range(count))
    apart = np.hypot(*(targets.markers[:, 0] - targets.markers[:, 1]).T) / curves.size
    return {
        "setting": preset,
        "path_length": length,
        "size": curves.size,
        "distractors": curves.distractor_count,
        "dashes_per_distractor": curves.paddles_per_distractor,
        "ink_percent": round(100 * float((images > 0).mean()), 2),
        "disc_distance_connected": round(float(apart[labels == 1].mean()), 3),
        "disc_distance_not_connected": round(float(apart[labels == 0].mean()), 3),
    }


def gallery(settings: list[tuple[str, int]]) -> Figure:
    """Columns in pairs: picture and classes of label 0, then of label 1."""
    rows, across = -(-len(settings) // 2), 8
    figure = Figure(figsize=(across * 1.05, rows * 1.18), layout="constrained")
    axes = figure.subplots(rows, across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    colours = ListedColormap(["black", COLOURS[0], COLOURS[1], "0.6"])
    for number, (preset, length) in enumerate(settings):
        row, first = number % rows, 4 * (number // rows)
        curves = PathfinderCurves.preset(preset, length)
        images, labels, targets = draw(curves, 3, "test", range(16))
        for label in (0, 1):
            one = int(np.flatnonzero(labels == label)[0])
            picture, classes = axes[row, first + 2 * label], axes[row, first + 2 * label + 1]
            picture.imshow(images[one], cmap="gray", interpolation="nearest")
            classes.imshow(targets.segmentation[one], cmap=colours, vmin=0, vmax=3, interpolation="nearest")
            classes.scatter(*targets.markers[one].T[::-1], s=14, facecolors="none", edgecolors="white", linewidths=0.8)
        axes[row, first].set_title(f"{preset}, {length}", fontsize=7, loc="left")
    return figure


def main() -> None:
    """Write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of settings.png, settings.pdf and settings.csv")
    parser.add_argument("--pictures", type=int, default=1000, help="pictures that the numbers are means of")
    options = parser.parse_args()
    table = pd.DataFrame([numbers(preset, length, options.pictures) for preset, length in SETTINGS])
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "settings.csv", index=False)
    print(table.to_string(index=False))
    with rc_context(STYLE):
        save_figure(gallery(SETTINGS), options.out / "settings")


if __name__ == "__main__":
    main()
