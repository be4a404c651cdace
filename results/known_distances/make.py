"""Measure interaction distance and cut share of networks for which both are known.

1. Untrained convolutional networks of 3x3 convolutions without pooling before the last average: two patches can only
   interact if some receptive field reaches both. Largest distance with an interaction, found and possible.
2. Networks trained to predict a sum of products of pairs of patches: adjacent patches ("near"), or patches at the two
   ends of a row ("far"). Interaction distance, share of the variance that crosses the cut between left and right, and
   number of products that cross it (participation ratio), measured and as the task has them.

    python results/known_distances/make.py --out results/known_distances
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from lightning_locality import cut_share, halves, interaction_profile
from lightning_locality.plotting.style import COLOURS, COLUMN, STYLE, save_figure
from lightning_locality.ranks import InteractionProfile

PATCH = 4
GRID = 4  # patches per side of the images of the trained networks


@dataclass(frozen=True)
class Reading:
    """One measured number and its expected value.

    Args:
        network: Which network.
        quantity: What is measured.
        measured: As measured.
        error: Its standard error; 0 if the number is exact.
        expected: From the receptive field or the task.
    """

    network: str
    quantity: str
    measured: float
    error: float
    expected: float


def convolutions(layers: int, seed: int) -> nn.Module:
    """Build 3x3 convolutions and an average: receptive field ``2 layers + 1`` pixels."""
    torch.manual_seed(seed)
    stack: list[nn.Module] = []
    for layer in range(layers):
        convolution = nn.Conv2d(1 if layer == 0 else 8, 8, 3, padding=1)
        nn.init.kaiming_normal_(convolution.weight)
        # smooth: of a ReLU a far corner of the field changes nothing unless it happens to switch it
        stack += [convolution, nn.GELU()]
    return nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1)).double()


def farthest(layers: int) -> int:
    """Return the largest distance in pixels of two patches that one receptive field reaches."""
    # the nearest pixels of two patches d patches apart are PATCH * (d - 1) + 1 pixels apart
    return PATCH * ((2 * layers - 1) // PATCH + 1)


def products(kind: str) -> Tensor:
    """Return the pairs ``(P, 2)`` whose products the task sums: in every row, all adjacent patches or the two ends."""
    rows = [GRID * row for row in range(GRID)]
    if kind == "near":
        return torch.tensor([(row + k, row + k + 1) for row in rows for k in range(GRID - 1)])
    return torch.tensor([(row, row + GRID - 1) for row in rows])


def images_of(values: Tensor) -> Tensor:
    """Return images ``(B, 1, H, W)`` of patches of constant value ``(B, GRID ** 2)``."""
    side = values.reshape(-1, 1, GRID, GRID)
    return side.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)


def trained(kind: str, steps: int, seed: int) -> tuple[nn.Module, float]:
    """Train a network on the sum of products; return it and the share of the target's variance it explains."""
    torch.manual_seed(seed)
    width = 256
    network = nn.Sequential(
        nn.Conv2d(1, 8, PATCH, PATCH), nn.Flatten(), nn.Linear(8 * GRID**2, width), nn.GELU(), nn.Linear(width, width),
        nn.GELU(), nn.Linear(width, 1),
    )  # fmt: skip
    pairs = products(kind)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        values = torch.randn(count, GRID**2)
        target = (values[:, pairs[:, 0]] * values[:, pairs[:, 1]]).sum(1) / len(pairs) ** 0.5
        return images_of(values), target

    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, target = batch(512)
        loss = (network(x).squeeze(1) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, target = batch(4000)
        explained = 1 - float((network(x).squeeze(1) - target).var() / target.var())
    return network.double(), explained


def draw(fields_: dict[int, InteractionProfile], tasks: dict[str, InteractionProfile]) -> Figure:
    """Draw strength against distance of the untrained networks, and the shares of the trained ones."""
    with rc_context(STYLE):
        figure = Figure(figsize=(2 * COLUMN, 2.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for color, (layers, profile) in zip(COLOURS, fields_.items(), strict=False):
            seen = profile.strength > 0
            left.plot(
                profile.distance[seen],
                profile.strength[seen],
                "o-",
                color=color,
                markersize=3,
                label=f"{2 * layers + 1}",
            )
            left.axvline(farthest(layers) + PATCH / 2, color=color, linewidth=0.8, linestyle=":")
        left.set_yscale("log")
        left.set_xlabel("distance of two patches (pixels)")
        left.set_ylabel("interaction strength")
        left.legend(title="receptive field", fontsize=6.5, title_fontsize=6.5)
        width = 0.27 * PATCH
        shown = {"near": tasks["near"].share, "far": tasks["far"].share}
        uniform = tasks["near"].uniform.diff(prepend=torch.zeros(1))
        distance = tasks["near"].distance.numpy()
        for place, (label, share) in enumerate({**shown, "uniform": uniform}.items()):
            color = "0.7" if label == "uniform" else COLOURS[place]
            right.bar(distance + (place - 1) * width, share.numpy(), width, color=color, label=label)
        right.set_xticks(distance)
        right.set_xlabel("distance of two patches (pixels)")
        right.set_ylabel("share of the interaction")
        right.legend(fontsize=6.5)
        return figure


def main(arguments: Sequence[str] | None = None) -> list[Reading]:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for known_distances.csv, .pdf and .png")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 2, 4, 8], help="convolutions of the untrained networks"
    )
    parser.add_argument("--side", type=int, default=48, help="side of their images, in pixels")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the trained networks")
    parser.add_argument("--samples", type=int, default=24, help="images per profile")
    parser.add_argument("--repetitions", type=int, default=16, help="of the cuts, of 64 x 64 images each")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    generator = torch.Generator().manual_seed(options.seed)
    readings: list[Reading] = []

    noise = torch.randn(options.samples, 1, options.side, options.side, generator=generator, dtype=torch.float64)
    reached: dict[int, InteractionProfile] = {}
    for layers in options.layers:
        profile = interaction_profile(convolutions(layers, options.seed), noise, patch=PATCH, seed=options.seed)
        seen = profile.distance[profile.strength > 0]
        name = f"receptive field {2 * layers + 1}"
        expected = min(farthest(layers), options.side - PATCH)
        readings.append(Reading(name, "largest distance (pixels)", float(seen.max()), 0.0, expected))
        reached[layers] = profile

    profiles: dict[str, InteractionProfile] = {}
    side = GRID * PATCH
    for kind, distance, share, crossing in (("near", PATCH, 1 / 3, GRID), ("far", side - PATCH, 1.0, GRID)):
        network, explained = trained(kind, options.steps, options.seed)
        images = images_of(torch.randn(128 * options.repetitions, GRID**2, generator=generator, dtype=torch.float64))
        profile = interaction_profile(network, images[:128], patch=PATCH, seed=options.seed)
        cut = cut_share(
            network, images, halves(side, side), size=64, repetitions=options.repetitions, seed=options.seed
        )
        band = (profile.mean_distance_high - profile.mean_distance_low) / 4
        readings += [
            Reading(kind, "explained variance of the task", explained, 0.0, 1.0),
            Reading(kind, "mean distance (pixels)", profile.mean_distance, band, distance),
            Reading(kind, "share crossing left | right", cut.share, cut.standard_error, share),
            # of as many independent products of equal size as there are
            Reading(kind, "participation ratio of left | right", cut.participation_ratio, float("nan"), crossing),
        ]
        profiles[kind] = profile

    options.out.mkdir(parents=True, exist_ok=True)
    # as objects: whole numbers stay whole
    table = pd.DataFrame(readings, dtype=object)
    table.to_csv(options.out / "known_distances.csv", index=False, na_rep="nan", lineterminator="\r\n")
    save_figure(draw(reached, profiles), options.out / "known_distances")
    for r in readings:
        print(f"{r.network:<20} {r.quantity:<36} {r.measured:>9.4f} ± {r.error:.4f}   expected {r.expected:.4f}")
    return readings


if __name__ == "__main__":
    main()
