r"""Measure influence, interaction and cut share of trained networks at their output and after every part of them.

    python results/influence/make.py runs/a/last.ckpt runs/b/last.ckpt --labels "far, plain" "far, default" \
        --layers stem blocks.0 blocks.1 blocks.2 blocks.3 --out results/influence

All numbers are in influence.csv, those of the output in the figure influence, those of the layers in the figure layers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure

from lightning_locality import cut_share, halves, influence_by_distance, interaction_profile
from lightning_locality.measurements import load_run, sample_images
from lightning_locality.plotting.ranks import range_figure
from lightning_locality.plotting.style import COLUMN, STYLE, line_style, save_figure

OUTPUT = "output"
SHOWN = {"influence": "influence, mean distance (pixels)", "cut_share": "share crossing left | right"}


def draw(table: pd.DataFrame) -> Figure:
    """Draw influence and cut share against the layer."""
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.3), layout="constrained")
        for axes, (quantity, label) in zip(figure.subplots(1, 2), SHOWN.items(), strict=True):
            for position, (name, own) in enumerate(table[table["quantity"] == quantity].groupby("network", sort=False)):
                error = [own["value"] - own["low"], own["high"] - own["value"]]
                axes.errorbar(own["layer"], own["value"], error, label=name, **line_style(position))
            axes.set(ylabel=label)
            axes.tick_params("x", rotation=35)
            axes.legend(fontsize=6.5)
        return figure


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="of runs on one task")
    parser.add_argument("--labels", nargs="+", required=True, help="of the networks")
    parser.add_argument("--layers", nargs="*", default=[], help="names of layers, besides the output")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64, help="of them, for the interaction profile")
    parser.add_argument("--patch", type=int, default=4, help="of the interaction profile, in pixels")
    parser.add_argument("--out", type=Path, required=True, help="folder for influence.csv and the figures")
    options = parser.parse_args(arguments)
    rows, influences, profiles, task = list[dict[str, Any]](), {}, {}, None
    for path, label in zip(options.checkpoints, options.labels, strict=True):
        run = load_run(path)
        images, task = sample_images(run, options.images, 0), getattr(run.data, "task_distance", None)
        mask = halves(*images.shape[2:])
        for name in (*options.layers, OUTPUT):
            layer = None if name == OUTPUT else name
            influence = influence_by_distance(run.model, images, layer=layer, samples=len(images))
            profile = interaction_profile(
                run.model, images, layer=layer, samples=options.samples, patch=options.patch, method="exact"
            )
            cut = cut_share(run.model, images, mask, layer=layer, size=min(64, len(images) // 2))
            spread = 2 * cut.standard_error
            for quantity, value, low, high in (
                ("influence", influence.mean_distance, influence.mean_distance_low, influence.mean_distance_high),
                ("interaction", profile.mean_distance, profile.mean_distance_low, profile.mean_distance_high),
                ("cut_share", cut.share, cut.share - spread, cut.share + spread),
            ):
                row = {"network": label, "layer": name, "quantity": quantity, "value": value, "low": low, "high": high}
                rows.append(row | {"task_distance": task})
        # the last one is the output
        influences[label], profiles[label] = influence, profile
    table = pd.DataFrame(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "influence.csv", index=False, float_format="%.5g")
    save_figure(range_figure(influences, profiles, task), options.out / "influence")
    save_figure(draw(table), options.out / "layers")
    print(table.to_string(index=False))
    return table


if __name__ == "__main__":
    main()
