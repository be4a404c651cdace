"""Entanglement of MNIST as it is, permuted, and rearranged by correlations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from lightning_locality import PermutedImages, data_alignment, data_entanglement
from lightning_locality.datamodules import feature_correlations
from lightning_locality.ranks.data import pixel_tree

ORDERS = {"original": {"scramble": 0.0}, "permuted": {}, "rearranged": {"rearranged": True}}


def measure(images: Tensor, labels: Tensor, few: int) -> dict[str, float]:
    """Means over the 4 + 16 canonical partitions and over neighbours; the first ``few`` images for what is slow."""
    height, width = images.shape[2:]
    correlation = feature_correlations(images)
    nodes = [list(node) for node in pixel_tree(height, width).interior[:-1]]
    # what a partition separates: all of its features' correlations but those among themselves
    cuts = [float(correlation[node].sum() - correlation[node][:, node].sum()) for node in nodes]
    grid = torch.arange(height * width).reshape(height, width)
    neighbours = torch.cat(
        [correlation[grid[:, 1:], grid[:, :-1]].flatten(), correlation[grid[1:], grid[:-1]].flatten()]
    )
    alignment = data_alignment(images[:few])
    entanglement = data_entanglement(images[:few], labels[:few] % 2)
    return {
        "correlation of neighbours": float(neighbours.mean()),
        "surrogate entanglement": sum(cuts) / len(cuts),
        "entanglement": sum(entanglement.values()) / len(entanglement),
        "alignment": sum(alignment.values()) / len(alignment),
    }


def main(arguments: Sequence[str] | None = None) -> pd.DataFrame:
    """Measure every order for every seed, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--source", default="mnist")
    parser.add_argument("--image_size", type=int, default=28)
    parser.add_argument("--images", type=int, default=3000, help="training images, as in the sweep")
    parser.add_argument("--few", type=int, default=500, help="those for entanglement and alignment")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    rows = []
    for seed in range(options.seeds):
        for name, settings in ORDERS.items():
            # between 0 and 1, the units of the angles
            data = PermutedImages(
                options.source,
                image_size=options.image_size,
                train=options.images,
                seed=seed,
                mean=[0],
                std=[1],
                **settings,
            )
            images, labels = data.batch("train", torch.arange(options.images))
            rows.append({"order": name, "seed": seed, **measure(images, labels, options.few)})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    table.to_csv(options.out / "entanglement.csv", index=False)
    return table


if __name__ == "__main__":
    print(main().groupby("order", sort=False).mean().drop(columns="seed"))
