"""What every sample says about the interaction of patches, and the profile over distance that it adds up to.

Legend: n samples, m patches, P pairs, D distances, K resamples.
"""

from __future__ import annotations

__all__ = ["InteractionProfile", "PairSamples", "PatchGrid"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self, final

import torch
from torch import Tensor

_MOST = 64  # patches that the default side gives at most


@final
@dataclass(frozen=True)
class PatchGrid:
    """Square patches that tile an image, numbered row by row.

    Args:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        patch: Side of a patch, in pixels; divides height and width.

    Raises:
        ValueError: A side that does not divide both, or that leaves fewer than two patches.

    Example:
        >>> grid = PatchGrid(4, 6, patch=2)
        >>> grid.rows, grid.columns, grid.distances(torch.tensor([[0, 0, 0], [1, 2, 3]])).tolist()
        (2, 3, [1, 2, 1])
        >>> PatchGrid.of(8, 80).patch, PatchGrid.of(224, 224).patch
        (4, 32)
    """

    height: int
    width: int
    patch: int

    def __post_init__(self) -> None:
        if self.patch < 1 or self.height % self.patch or self.width % self.patch or len(self) < 2:
            sides = ", ".join(str(side) for side in _sides(self.height, self.width)) or "none; crop or resize them"
            raise ValueError(
                f"patch must divide images of {self.height} x {self.width} pixels into two patches or more, got "
                f"{self.patch}; possible: {sides}"
            )

    @classmethod
    def of(cls, height: int, width: int, patch: int | None = None) -> Self:
        """The grid with a given side of the patches, or with a default one.

        Args:
            height: Of the images, in pixels.
            width: Of the images, in pixels.
            patch: Side of a patch, in pixels. None: of the sides that give 2 to 64 patches the one nearest to a
                seventh of the images' shorter side (ours), the smaller of two as near.

        Raises:
            ValueError: No such side.
        """
        if patch is None:
            sides = [side for side in _sides(height, width) if height * width <= _MOST * side**2]
            if not sides:
                raise ValueError(
                    f"images of {height} x {width} pixels cannot be divided into 2 to {_MOST} square patches: crop or "
                    "resize them, or give patch= for more patches"
                )
            patch = min(sides, key=lambda side: (abs(side - min(height, width) / 7), side))
        return cls(height, width, patch)

    @property
    def rows(self) -> int:
        """Patches from top to bottom."""
        return self.height // self.patch

    @property
    def columns(self) -> int:
        """Patches from left to right."""
        return self.width // self.patch

    def __len__(self) -> int:
        return self.rows * self.columns

    def pairs(self) -> Tensor:
        """All pairs of different patches ``(2, P)``, the first number below the second, int64."""
        return torch.triu_indices(len(self), len(self), 1)

    def distances(self, pairs: Tensor) -> Tensor:
        """Chebyshev distances ``(P,)`` of the positions of pairs ``(2, P)``, in patches."""
        across = (pairs // self.columns).diff(dim=0).abs()
        along = (pairs % self.columns).diff(dim=0).abs()
        return torch.maximum(across, along)[0]

    def labels(self) -> Tensor:
        """Which patch a pixel is in ``(H, W)``, int64."""
        numbers = torch.arange(len(self)).view(self.rows, self.columns)
        return numbers.repeat_interleave(self.patch, 0).repeat_interleave(self.patch, 1)

    def sums(self, values: Tensor) -> Tensor:
        """Sums ``(B, m)`` of values ``(B, C, H, W)`` over channels and pixels of every patch."""
        tiles = values.reshape(*values.shape[:2], self.rows, self.patch, self.columns, self.patch)
        return tiles.sum((1, 3, 5)).flatten(1)


def _sides(height: int, width: int) -> list[int]:
    """Of patches that tile an image, two or more."""
    return [s for s in range(1, min(height, width) + 1) if height % s == width % s == 0 and height * width > s * s]


if TYPE_CHECKING:
    from matplotlib.axes import Axes


@final
@dataclass(frozen=True, eq=False)
class InteractionProfile:
    """Strength of interaction of image patches against their distance, made by ``interaction_profile``.

    All tensors are float64 on the CPU unless said otherwise; D is the number of distances, m that of patches. What
    is not known is not a number: the shares, radii and mean distance of a network that is additive over the patches,
    bands without bootstraps, the input-gradient change by the exact method.

    Args:
        distance: Chebyshev distance of the positions of two patches, in pixels ``(D,)``.
        strength: Mean normalised interaction of the pairs at a distance ``(D,)``, 0 none. By the exact method at most
            1, up to sampling; the linear one may go beyond where the network is far from affine in a patch.
        low: Lower end of its 95 % band over samples ``(D,)``.
        high: Upper end ``(D,)``.
        share: Share of all interaction that is at a distance ``(D,)``.
        cumulative: Share up to a distance ``(D,)``.
        uniform: What ``cumulative`` would be were all pairs to interact equally ``(D,)``.
        gradient_change: Mean change of direction of a patch's input gradient ``(D,)``: 0 none, 1 orthogonal.
        pairs: Number of pairs at a distance, int64 ``(D,)``.
        mean_distance: Of the interaction, in pixels.
        mean_distance_low: Lower end of its 95 % band over samples.
        mean_distance_high: Upper end.
        r50: Least of the distances up to which half of the interaction lies, in pixels; nothing is interpolated.
        r90: Likewise for nine tenths.
        uniform_mean_distance: Mean distance were all pairs to interact equally, in pixels.
        patch: Side of a patch, in pixels.
        grid: Rows and columns of patches.
        method: How it was measured.
        samples: Number of images, each with a donor.
        matrix: Interaction of patches A and B ``(m, m)``, patches row by row; not a number where the pair was left
            out. On the diagonal a patch's total effect.

    Example:
        >>> from lightning_locality.ranks.profile import interaction_profile
        >>> product = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 2]
        >>> images = torch.randn(8, 1, 1, 3, generator=torch.Generator().manual_seed(0))
        >>> profile = interaction_profile(product, images, patch=1)
        >>> profile.share.tolist(), profile.mean_distance, profile.r50
        ([0.0, 1.0], 2.0, 2.0)
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
        """Draw strength and its band against distance.

        Args:
            axes: Where; None: new ones, of a figure of their own: ``axes.figure``, which a notebook shows and
                ``axes.figure.savefig(path)`` writes.

        Returns:
            The axes.
        """
        from lightning_locality.plotting.ranks import draw_profile

        if axes is None:
            from matplotlib.figure import Figure

            axes = Figure(layout="constrained").subplots()
        draw_profile(axes, self)
        return axes

    def to_dict(self) -> dict[str, Any]:
        """All values as lists and numbers that JSON knows, with None for what is not a number."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The profile that :meth:`to_dict` was called on, to the last bit.

        Args:
            values: What :meth:`to_dict` gave, also by way of JSON.

        Raises:
            ValueError: Names that are missing or not known.
        """
        known = {field.name: str(field.type) for field in fields(cls)}
        if set(values) != set(known):
            raise ValueError(
                f"values are not of an InteractionProfile: missing {sorted(set(known) - set(values))}, unknown "
                f"{sorted(set(values) - set(known))}; pass what to_dict() gave"
            )
        return cls(**{name: _restored(values[name], kind, name == "pairs") for name, kind in known.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(one) for one in value]
    return math.nan if value is None else value


def _restored(value: Any, kind: str, whole: bool) -> Any:
    if kind == "Tensor":
        return torch.tensor(_numbers(value), dtype=torch.int64 if whole else torch.float64)
    if kind == "float":
        return _numbers(value)
    return tuple(value) if kind.startswith("tuple") else value


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
