"""Draw Cluttered ABC's published settings: pictures of both labels, with what is where, and their numbers.

python results/cluttered_abc/make.py --out results/cluttered_abc
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from scipy.spatial import KDTree

from lightning_locality.datamodules.cluttered_abc.parameters import PRESETS, ClutteredLetters
from lightning_locality.datamodules.cluttered_abc.placement import draw
from lightning_locality.plotting.style import COLOURS, STYLE, save_figure

NEIGHBOURS = 51


def from_markers(markers: np.ndarray, labels: np.ndarray) -> float:
    """Share of the last quarter of labels that the positions of the markers alone tell, by their nearest neighbours."""
    pairs, known = markers.reshape(len(markers), -1), len(markers) * 3 // 4
    neighbours = KDTree(pairs[:known]).query(pairs[known:], k=min(NEIGHBOURS, known))[1]
    return float(((labels[neighbours].mean(axis=1) > 0.5) == labels[known:]).mean())


def numbers(preset: str, count: int) -> dict[str, float | str]:
    """Ink, distance of the markers in sides of the picture, what their positions tell, and seconds, of a setting."""
    letters = ClutteredLetters.preset(preset)
    draw(letters, 0, "test", range(50), True)  # the middle lines of the letters are found once
    start = time.process_time()
    parts = [draw(letters, 0, "train", range(i, min(i + 250, count)), True) for i in range(0, count, 250)]
    seconds = time.process_time() - start
    ink = np.concatenate([(images > 0).mean(axis=(1, 2)) for images, _, _ in parts])
    labels = np.concatenate([labels for _, labels, _ in parts])
    markers = np.concatenate([known.markers for _, _, known in parts])
    apart = np.hypot(*(markers[:, 0] - markers[:, 1]).T) / letters.size
    return {
        "setting": preset,
        "size": letters.size,
        "label_1_percent": round(100 * float(labels.mean()), 1),
        "ink_percent": round(100 * float(ink.mean()), 2),
        "marker_distance_same_letter": round(float(apart[labels == 1].mean()), 3),
        "marker_distance_different_letters": round(float(apart[labels == 0].mean()), 3),
        "accuracy_from_marker_positions": round(from_markers(markers, labels), 3),
        "ms_per_picture": round(1000 * seconds / count, 1),
    }


def gallery() -> Figure:
    """A row for each setting; columns in pairs: picture and classes, two of label 0 and two of label 1."""
    figure = Figure(figsize=(9.6, 1.3 * len(PRESETS)), layout="constrained")
    axes = figure.subplots(len(PRESETS), 8)
    for axis in axes.flat:
        axis.set_axis_off()
    colours = ListedColormap(["black", COLOURS[0], COLOURS[1], "white"])
    for row, preset in zip(axes, PRESETS, strict=True):
        images, labels, known = draw(ClutteredLetters.preset(preset), 3, "test", range(24), True)
        chosen = [int(one) for label in (0, 1) for one in np.flatnonzero(labels == label)[:2]]
        for place, one in enumerate(chosen):
            picture, classes = row[2 * place], row[2 * place + 1]
            picture.imshow(images[one], cmap="gray")
            classes.imshow(known.segmentation[one], cmap=colours, vmin=0, vmax=3, interpolation="nearest")
            classes.scatter(*known.markers[one].T[::-1], s=14, facecolors="none", edgecolors="white", linewidths=0.8)
            picture.set_title(f"{preset}, label {labels[one]}", fontsize=7, loc="left")
    return figure


def main() -> None:
    """Write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of settings.png, settings.pdf and settings.csv")
    parser.add_argument("--pictures", type=int, default=4000, help="pictures that the numbers are means of")
    options = parser.parse_args()
    table = pd.DataFrame([numbers(preset, options.pictures) for preset in PRESETS])
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "settings.csv", index=False)
    print(table.to_string(index=False))
    with rc_context(STYLE):
        save_figure(gallery(), options.out / "settings")


if __name__ == "__main__":
    main()
