"""Interaction of patches in every sample, and its profile over distance.

Legend: n samples, m patches, P pairs, D distances, K resamples.
"""

from __future__ import annotations

__all__ = ["InteractionProfile"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, final

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MAX_PATCHES = 64  # of the default side
_BOOTSTRAP_NUMBERS = 2**23  # float64 numbers that the bootstrap holds at a time: 64 MiB
BAND = torch.tensor([0.025, 0.975], dtype=torch.float64)  # ends of 95 %


def resamples(number: int, samples: int, seed: int) -> Tensor:
    """Return weights ``(number, n)`` of the samples in bootstrap resamples, which sum to 1, float64."""
    chosen = torch.randint(samples, (number, samples), generator=torch.Generator().manual_seed(int(seed)))
    counts = torch.zeros(number, samples, dtype=torch.float64)
    return counts.scatter_add_(1, chosen, torch.ones_like(counts)).div_(samples)


@final
class PatchGrid:
    """Square patches that tile an image, numbered row by row; ``patch`` is their side, which divides height and width.

    None: of the sides that give 2 to 64 patches the one nearest to a seventh of the shorter side (ours), the smaller of
    two that are equally near.
    """

    def __init__(self, height: int, width: int, patch: int | None = None) -> None:
        shorter = min(height, width)
        sides = [s for s in range(1, shorter + 1) if height % s == width % s == 0 and height * width > s * s]
        if patch is None:
            few = [side for side in sides if height * width <= _MAX_PATCHES * side**2]
            if not few:
                raise ValueError(
                    f"images of {height} x {width} pixels cannot be divided into 2 to {_MAX_PATCHES} square patches: "
                    "crop or resize them, or give patch= for more patches"
                )
            patch = min(few, key=lambda side: (abs(side - shorter / 7), side))
        elif patch not in sides:
            raise ValueError(
                f"patch must divide images of {height} x {width} pixels into two patches or more, got {patch}; "
                f"possible: {', '.join(map(str, sides)) or 'none; crop or resize them'}"
            )
        self.patch, self.rows, self.columns = patch, height // patch, width // patch

    def __len__(self) -> int:
        return self.rows * self.columns

    def pairs(self) -> Tensor:
        """Return all pairs of different patches ``(2, P)``, the first number below the second, int64."""
        return torch.triu_indices(len(self), len(self), 1)

    def distances(self, pairs: Tensor) -> Tensor:
        """Return Chebyshev distances ``(P,)`` of the positions of pairs ``(2, P)``, in patches."""
        across = (pairs // self.columns).diff(dim=0).abs()
        along = (pairs % self.columns).diff(dim=0).abs()
        return torch.maximum(across, along)[0]

    def labels(self) -> Tensor:
        """Return the patch that a pixel is in ``(H, W)``, int64."""
        numbers = torch.arange(len(self)).view(self.rows, self.columns)
        return numbers.repeat_interleave(self.patch, 0).repeat_interleave(self.patch, 1)

    def sums(self, values: Tensor) -> Tensor:
        """Return sums ``(B, m)`` of values ``(B, C, H, W)`` over channels and pixels of every patch."""
        tiles = values.reshape(*values.shape[:2], self.rows, self.patch, self.columns, self.patch)
        return tiles.sum((1, 3, 5)).flatten(1)


@final
@dataclass(frozen=True, eq=False)
class InteractionProfile:
    """Strength of interaction of image patches against their distance, made by ``interaction_profile``.

    Tensors are on the CPU, with D distances and m patches. Unknown values are NaN: the shares, radii and mean distance
    of a network that is additive over the patches, bands without bootstraps, the gradient change of the exact method.

    Args:
        distance, pairs: Chebyshev distance of two patches' positions, in pixels, and number of such pairs ``(D,)``.
        strength, low, high: Mean normalised interaction of the pairs at a distance and the ends of its 95 % band over
            samples ``(D,)``. By the exact method at most 1, up to sampling; the linear one may exceed it if the network
            is far from affine in a patch.
        share, cumulative: Share of all interaction that is at, and up to, a distance ``(D,)``.
        uniform, uniform_mean_distance: ``cumulative`` and ``mean_distance`` if all pairs interacted equally.
        gradient_change: Mean change of direction of a patch's input gradient ``(D,)``: 0 none, 1 orthogonal.
        mean_distance, mean_distance_low, mean_distance_high: Of the interaction, in pixels, and its 95 % band.
        r50, r90: Smallest distances, in pixels, up to which half and nine tenths of the interaction lie.
        patch, grid: Side of a patch, in pixels, and rows and columns of patches.
        method, samples: How it was measured, and on how many images, each with a donor.
        matrix: Interaction of patches A and B ``(m, m)``, patches row by row; NaN for pairs that were left out. The
            diagonal holds a patch's total effect.
    """

    distance: Tensor
    strength: Tensor
    low: Tensor
    high: Tensor
    share: Tensor
    cumulative: Tensor
    uniform: Tensor
    gradient_change: Tensor
    pairs: Tensor
    mean_distance: float
    mean_distance_low: float
    mean_distance_high: float
    r50: float
    r90: float
    uniform_mean_distance: float
    patch: int
    grid: tuple[int, int]
    method: Literal["linear", "exact"]
    samples: int
    matrix: Tensor

    def plot(self, axes: Axes | None = None) -> Axes:
        """Plot strength and its band against distance on ``axes``, or on those of a new ``axes.figure``."""
        from matplotlib.figure import Figure

        from lightning_locality.plotting.ranks import plot_profile

        axes = Figure(layout="constrained").subplots() if axes is None else axes
        plot_profile(axes, self)
        return axes

    def to_dict(self) -> dict[str, Any]:
        """Return all values as lists and numbers that JSON knows; NaN becomes None."""
        return {name: _plain(np.asarray(value)) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Restore a profile, to the last bit, from the result of :meth:`to_dict`, also by way of JSON."""
        types = {field.name: field.type for field in fields(cls)}
        missing, unknown = sorted(set(types) - set(values)), sorted(set(values) - set(types))
        if missing or unknown:
            wrong = f"missing {missing}, unknown {unknown}"
            raise ValueError(f"values are not of an InteractionProfile: {wrong}; pass what to_dict() gave")
        restored: dict[str, Any] = {name: math.nan if value is None else value for name, value in values.items()}
        restored["grid"] = tuple(values["grid"])
        for name in (name for name, kind in types.items() if kind == "Tensor"):
            # NumPy reads None as NaN
            restored[name] = torch.from_numpy(np.array(values[name], np.int64 if name == "pairs" else np.float64))
        return cls(**restored)


def _plain(value: np.ndarray) -> Any:
    return value.tolist() if value.dtype.kind == "U" else np.where(np.isfinite(value), value, np.array(None)).tolist()


@final
@dataclass(frozen=True)
class PairwiseInteractions:
    """Contributions of samples to the interaction of pairs of patches, float64."""

    grid: PatchGrid
    pairs: Tensor  # that were measured (2, P), at least one at every distance
    interaction: Tensor  # (n, P)
    effect: Tensor  # total effect of every patch (n, m)
    change: Tensor | None  # of the input gradient (n, P)
    noise: Tensor  # interaction that rounding alone can give to a pair (P,)
    effect_noise: float  # effect that rounding alone can give to a patch

    def profile(self, method: Literal["linear", "exact"], bootstraps: int, seed: int) -> InteractionProfile:
        """Take means over samples, with 95 % bands (percentiles) from ``bootstraps`` resamples of the samples."""
        device = self.interaction.device
        where = self.grid.distances(self.pairs.cpu())
        distances, number = torch.unique(self.grid.distances(self.grid.pairs()), return_counts=True)
        # averages over the pairs at a distance, as a matrix product
        average = (where[:, None] == distances).double().to(device)
        average /= average.sum(0)
        distance, weight = distances.double() * self.grid.patch, number.double().to(device)
        interaction, effect = self.interaction.mean(0), self.effect.mean(0)
        alive = interaction > self.noise
        interaction = torch.where(alive, interaction, 0.0)
        strength, mass = (x[0].cpu() for x in self._by_distance(interaction[None], effect[None], average, weight))
        # NaN if there is no interaction at all
        share = mass / torch.where(mass.sum() > 0, mass.sum(), math.nan)
        cumulative = share.cumsum(0)
        # 1e-12: sums that are the share up to rounding
        r50, r90 = (next(iter(distance[cumulative >= part - 1e-12].tolist()), math.nan) for part in (0.5, 0.9))
        unknown = torch.full_like(distance, math.nan)
        low, high, mean_low, mean_high = unknown, unknown, math.nan, math.nan
        if bootstraps:
            low, high, mean_low, mean_high = self._bands(alive, average, weight, distance, bootstraps, seed)
        matrix = torch.full((len(self.grid), len(self.grid)), math.nan, dtype=torch.float64)
        first, second = self.pairs.cpu()
        matrix[first, second] = matrix[second, first] = interaction.cpu()
        matrix.diagonal().copy_(effect)
        return InteractionProfile(
            distance=distance,
            strength=strength,
            low=low,
            high=high,
            share=share,
            cumulative=cumulative,
            uniform=number.cumsum(0) / number.sum(),
            gradient_change=unknown if self.change is None else (self.change.mean(0) @ average).cpu(),
            pairs=number,
            mean_distance=float(share @ distance),
            mean_distance_low=mean_low,
            mean_distance_high=mean_high,
            r50=r50,
            r90=r90,
            uniform_mean_distance=float(number.double() @ distance / number.sum()),
            patch=self.grid.patch,
            grid=(self.grid.rows, self.grid.columns),
            method=method,
            samples=len(self.interaction),
            matrix=matrix,
        )

    def _by_distance(self, interaction: Tensor, effect: Tensor, average: Tensor, weight: Tensor) -> list[Tensor]:
        """Strength and mass ``(K, D)`` of K means over samples."""
        # the root first: a product of two small effects may underflow
        root = torch.where(effect > self.effect_noise, effect, 0.0).sqrt()
        norm = root[:, self.pairs[0]] * root[:, self.pairs[1]]
        strength = torch.where(norm > 0, interaction / torch.where(norm > 0, norm, 1.0), 0.0)
        return [strength @ average, (interaction @ average) * weight]

    def _bands(
        self, alive: Tensor, average: Tensor, weight: Tensor, distance: Tensor, bootstraps: int, seed: int
    ) -> tuple[Tensor, Tensor, float, float]:
        """Bands of strength and of mean distance."""
        device = self.interaction.device
        counts = resamples(bootstraps, len(self.interaction), seed).to(device)
        contributions = torch.where(alive, self.interaction, 0.0)
        strengths, means = [], []
        for some in torch.split(counts, max(1, _BOOTSTRAP_NUMBERS // self.interaction.shape[1])):
            strength, mass = self._by_distance(some @ contributions, some @ self.effect, average, weight)
            strengths.append(strength.cpu())
            means.append((mass @ distance.to(device) / mass.sum(1)).cpu())
        low, high = torch.cat(strengths).quantile(BAND, 0)
        # a resample may have no interaction at all
        return low, high, *torch.cat(means).nanquantile(BAND).tolist()
