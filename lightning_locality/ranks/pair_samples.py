"""What every sample says about the interaction of patches, and the profile over distance that it adds up to.

Legend: n samples, m patches, P pairs, D distances, K resamples.
"""

from __future__ import annotations

__all__ = ["PairSamples"]

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_locality.ranks.interactions import InteractionProfile
from lightning_locality.ranks.patch_grid import PatchGrid

_NUMBERS = 2**23  # of float64 held at a time by the bootstrap: 64 MiB


@final
@dataclass(frozen=True)
class PairSamples:
    """Contributions of samples to the interaction of pairs of patches, float64.

    Args:
        grid: The patches.
        pairs: Which pairs were measured ``(2, P)``, at every distance at least one.
        interaction: Of every sample and pair ``(n, P)``.
        effect: Total effect of every patch ``(n, m)``.
        change: Input-gradient change of every sample and pair ``(n, P)``, or None.
        noise: Interaction that rounding alone can give to a pair ``(P,)``.
        effect_noise: Effect that rounding alone can give to a patch.
    """

    grid: PatchGrid
    pairs: Tensor
    interaction: Tensor
    effect: Tensor
    change: Tensor | None
    noise: Tensor
    effect_noise: float

    def profile(self, method: Literal["linear", "exact"], bootstraps: int, seed: int) -> InteractionProfile:
        """Means over samples, and their 95 % bands by resampling the samples (percentiles).

        Args:
            method: By which the contributions were measured.
            bootstraps: Number of resamples; 0 for no bands.
            seed: Of the resampling.
        """
        device, samples = self.interaction.device, len(self.interaction)
        where = self.grid.distances(self.pairs.cpu())
        distances, number = torch.unique(self.grid.distances(self.grid.pairs()), return_counts=True)
        # averages over the pairs at a distance, as a matrix product
        average = (where[:, None] == distances).double().to(device)
        average /= average.sum(0)
        distance, number = distances.double() * self.grid.patch, number.cpu()
        weight = number.double().to(device)
        alive = self.interaction.mean(0) > self.noise
        effect, interaction = self.effect.mean(0), torch.where(alive, self.interaction.mean(0), 0.0)
        strength, mass = self._by_distance(interaction[None], effect[None], average, weight)
        mass = mass[0].cpu()
        total = float(mass.sum())
        share = mass / total if total > 0 else torch.full_like(mass, math.nan)
        cumulative, uniform = share.cumsum(0), (number.cumsum(0) / number.sum())
        low, high, centre_low, centre_high = self._bands(alive, average, weight, distance, bootstraps, seed)
        change = torch.full_like(distance, math.nan) if self.change is None else (self.change.mean(0) @ average).cpu()
        matrix = torch.full((len(self.grid), len(self.grid)), math.nan, dtype=torch.float64)
        matrix[self.pairs[0].cpu(), self.pairs[1].cpu()] = interaction.cpu()
        matrix[self.pairs[1].cpu(), self.pairs[0].cpu()] = interaction.cpu()
        matrix.diagonal().copy_(effect)
        return InteractionProfile(
            distance=distance,
            strength=strength[0].cpu(),
            low=low,
            high=high,
            share=share,
            cumulative=cumulative,
            uniform=uniform,
            gradient_change=change,
            pairs=number,
            mean_distance=float(share @ distance),
            mean_distance_low=centre_low,
            mean_distance_high=centre_high,
            r50=_radius(distance, cumulative, 0.5),
            r90=_radius(distance, cumulative, 0.9),
            uniform_mean_distance=float(number.double() @ distance / number.sum()),
            patch=self.grid.patch,
            grid=(self.grid.rows, self.grid.columns),
            method=method,
            samples=samples,
            matrix=matrix,
        )

    def _by_distance(self, interaction: Tensor, effect: Tensor, average: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        """Strength and mass ``(K, D)`` of K means over samples."""
        # the root first: a product of two small effects is not a float64
        root = torch.where(effect > self.effect_noise, effect, 0.0).sqrt()
        norm = root[:, self.pairs[0]] * root[:, self.pairs[1]]
        strength = torch.where(norm > 0, interaction / torch.where(norm > 0, norm, 1.0), 0.0) @ average
        return strength, (interaction @ average) * weight

    def _bands(
        self, alive: Tensor, average: Tensor, weight: Tensor, distance: Tensor, bootstraps: int, seed: int
    ) -> tuple[Tensor, Tensor, float, float]:
        """Of strength and of mean distance."""
        missing = torch.full_like(distance, math.nan)
        if not bootstraps:
            return missing, missing, math.nan, math.nan
        device, samples = self.interaction.device, len(self.interaction)
        drawn = torch.randint(samples, (bootstraps, samples), generator=torch.Generator().manual_seed(seed))
        counts = torch.zeros(bootstraps, samples, dtype=torch.float64)
        counts = counts.scatter_add_(1, drawn, torch.ones_like(counts)).div_(samples).to(device)
        contributions = torch.where(alive, self.interaction, 0.0)
        strengths, centres = [], []
        for chosen in torch.split(counts, max(1, _NUMBERS // self.interaction.shape[1])):
            strength, mass = self._by_distance(chosen @ contributions, chosen @ self.effect, average, weight)
            strengths.append(strength.cpu())
            centres.append((mass @ distance.to(device) / mass.sum(1)).cpu())
        ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
        low, high = torch.cat(strengths).quantile(ends, 0)
        # a resample may have no interaction at all
        centre_low, centre_high = torch.cat(centres).nanquantile(ends).tolist()
        return low, high, centre_low, centre_high


def _radius(distance: Tensor, cumulative: Tensor, share: float) -> float:
    # 1e-12: sums that are the share but for rounding
    reached = distance[cumulative >= share - 1e-12]
    return float(reached[0]) if len(reached) else math.nan
