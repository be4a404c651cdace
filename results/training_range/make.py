"""Does training shrink or widen what networks use? The networks of a sweep as training left them and as it found them.

    python results/training_range/make.py runs/quickstart_seeds runs/pathfinder_terms --layer blocks.3 \
        --out results/training_range

Every run is rebuilt from its configuration and seed, with the weights before the first step and those of its last
checkpoint, and measured on the same test images: share of the output's variance that crosses left | right, mean
distance of two pixels that the output looks at, and of a pixel from a unit of a layer that looks at it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_locality import cut_share, halves, influence_by_distance
from lightning_locality.measurements import load_run, sample_images
from lightning_locality.plotting.style import COLUMN, STYLE, save_figure

QUANTITIES = {
    "cut": "share crossing left | right",
    "output": "influence on the output (pixels)",
    "layer": "influence on a unit (pixels)",
}


def measure(network: nn.Module, images: Tensor, layer: str) -> dict[str, float]:
    """All quantities of one network."""
    return {
        "cut": cut_share(network, images, halves(*images.shape[2:]), size=min(64, len(images) // 2)).share,
        "output": influence_by_distance(network, images, bootstraps=0).mean_distance,
        "layer": influence_by_distance(network, images, layer=layer, bootstraps=0).mean_distance,
    }


def measure_sweep(folder: Path, layer: str, count: int) -> list[dict[str, Any]]:
    """Rows of all finished runs of a sweep, as they were before and after training."""
    results, rows = pd.read_csv(folder / "results.csv"), list[dict[str, Any]]()
    for result in results.to_dict("records"):
        path, images = folder / str(result["run"]) / "last.ckpt", None
        for state in ("untrained", "trained"):
            run = load_run(path, initial=state == "untrained")
            images = sample_images(run, count, 0) if images is None else images
            about = {"sweep": folder.name, "variant": result["variant"], "seed": result["seed_everything"]}
            accuracy = result["test/accuracy"] if state == "trained" else None
            rows.append(about | {"state": state, "test_accuracy": accuracy} | measure(run.model, images, layer))
    return rows


def draw(table: pd.DataFrame) -> Figure:
    """Median and range of every quantity before and after training, a row of panels for each sweep."""
    with rc_context(STYLE):
        sweeps = list(table.groupby("sweep", sort=False))
        figure = Figure(figsize=(2 * COLUMN, 2.4 * len(sweeps)), layout="constrained")
        grid = figure.subplots(len(sweeps), len(QUANTITIES), squeeze=False, sharey="row")
        for panels, (sweep, own) in zip(grid, sweeps, strict=True):
            for axes, (quantity, label) in zip(panels, QUANTITIES.items(), strict=True):
                sns.pointplot(
                    own, x=quantity, y="variant", hue="state", estimator="median", errorbar=("pi", 100), dodge=0.3,
                    linestyle="none", markers=["o", "D"], markersize=3, err_kws={"linewidth": 1}, ax=axes,
                    legend=quantity == "cut",
                )  # fmt: skip
                axes.set(xlabel=label, ylabel="", xlim=(0, None))
                axes.margins(x=0.08)
            panels[0].set_title(sweep, loc="left")
            panels[0].legend(title=None, fontsize=6.5)
        return figure


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweeps", type=Path, nargs="+", help="folders of sweeps, with results.csv and the runs")
    parser.add_argument("--layer", required=True, help="whose units are measured")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True, help="folder for range.csv and the figure")
    options = parser.parse_args(arguments)
    table = pd.DataFrame(
        [row for sweep in options.sweeps for row in measure_sweep(sweep, options.layer, options.images)]
    )
    options.out.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.out / "range.csv", index=False, float_format="%.5g")
    medians = table.groupby(["sweep", "variant", "state"], sort=False)[list(QUANTITIES)].median()
    print(medians.round(3).to_string())
    save_figure(draw(table), options.out / "range")
    return table


if __name__ == "__main__":
    main()
