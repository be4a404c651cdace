"""Distance over which single pixels influence what a network computes: to first order, by gradients.

Legend: n images, K channels, H and W the pixels, D bins of distance.
"""

from __future__ import annotations

__all__ = ["InfluenceProfile", "influence_by_distance"]

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor, nn

from lightning_locality.arguments import checked
from lightning_locality.ranks.evaluation import Evaluation, as_images
from lightning_locality.ranks.layers import as_map, check_layer, layer_output
from lightning_locality.ranks.patch_pairs import BAND, InteractionProfile, resamples

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BINS = 32  # of the default width, along the diagonal of an image
_ROUNDING = 1e-14  # of the largest value of a correlation by Fourier transforms


@final
@dataclass(frozen=True, eq=False)
class InfluenceProfile:
    """Influence of pixels against distance, made by :func:`influence_by_distance`.

    Tensors are on the CPU. Unknown values are NaN: bands without bootstraps, and all if no pixel has any influence.

    Args:
        distance: Mean distance of a unit and a pixel in a bin, in pixels ``(D,)``.
        strength, low, high: Influence of a pixel there over that of a pixel anywhere, 1 if all pixels have the same,
            and the ends of its 95 % band over images ``(D,)``.
        share: Share of all influence that is in a bin ``(D,)``.
        mean_distance, mean_distance_low, mean_distance_high: Influence-weighted, in pixels, and its 95 % band.
        uniform_mean_distance: What it would be if all pixels had the same influence.
        layer, samples: Name of the layer, None for the output, and number of images.
    """

    distance: Tensor
    strength: Tensor
    low: Tensor
    high: Tensor
    share: Tensor
    mean_distance: float
    mean_distance_low: float
    mean_distance_high: float
    uniform_mean_distance: float
    layer: str | None
    samples: int

    def plot(self, axes: Axes | None = None) -> Axes:
        """Plot strength and its band against distance on ``axes``, or on those of a new ``axes.figure``."""
        from matplotlib.figure import Figure

        from lightning_locality.plotting.ranks import plot_influence

        axes = Figure(layout="constrained").subplots() if axes is None else axes
        plot_influence(axes, self)
        return axes

    def plot_beside(self, profile: InteractionProfile, task_distance: float | None = None) -> Figure:
        """Plot influence and interaction side by side, each with its mean distance and, if given, that of the task.

        The range of a task of this package is the ``task_distance`` of its data module, in pixels.
        """
        from lightning_locality.plotting.ranks import range_figure

        return range_figure({"network": self}, {"network": profile}, task_distance)


@checked
def influence_by_distance(
    model: nn.Module,
    images: Tensor,
    *,
    layer: str | None = None,
    samples: int | None = None,
    units: int = 8,
    width: int | None = None,
    seed: int = 0,
    bootstraps: int = 1000,
    evaluation: Evaluation | None = None,
) -> InfluenceProfile:
    r"""How much pixels influence a unit of a layer against their distance from it, and the mean of that distance.

    .. math:: I_{uv} = \lVert \partial \langle w, h_u(x) \rangle / \partial x_v \rVert, \qquad
        R = \mathbb{E}_{x, u, w} \sum_v \lVert u - v \rVert \, I_{uv} \Big/ \sum_v I_{uv}

    with h_u the K channels of the layer's map at place u, v a pixel, and w a direction, uniform on the unit sphere. R
    is the influence-weighted receptive field of "Towards quantifying long-range interactions in graph machine
    learning" (Liang, Sáez de Ocáriz Borde, Sripathmanathan, Bronstein, Dong, 2025), and the range of a node in "On
    measuring long-range interactions in graph neural networks" (Bamberger, Gutteridge, le Roux, Bronstein, Dong, 2025),
    in pixels instead of hops and with this norm of the Jacobian, one backward pass each (both ours). A unit is where
    its cell of the map lies when the map covers the image; padded convolutions with strides are centred up to half of
    their joint stride further up and left. Units that no pixel influences are left out.

    A score has no place. There u is a pixel too, drawn by its own influence (ours):

    .. math:: R = \mathbb{E}_{x, w} \sum_{uv} \lVert u - v \rVert \, I_u I_v \Big/ \Bigl( \sum_v I_v \Bigr)^2

    the mean distance of two pixels that the score looks at. It does not say that they interact: a sum over all pixels
    has the widest. That is the range of a score in the second paper, which takes second derivatives, and those are zero
    in networks with ReLU: :func:`interaction_profile` takes differences.

    Args:
        model: Network; measured in evaluation mode and left as it was.
        images: ``(N, C, H, W)``, floating-point, scaled as for training.
        layer: Name in ``model.named_modules()``, such as "layer3"; None: the output.
        samples: Images taken, 1 to N; None: all, up to 64.
        units: Places of a map that are sampled for every image, each a forward and a backward pass.
        width: Of a bin of distance, in pixels; None: about a 32nd of the diagonal.
        seed: Seed of the images, places, directions and bands.
        bootstraps: Resamples of the images for the 95 % bands; 0 for none.
        evaluation: How the network is evaluated; None: the default.

    Raises:
        ValueError: An unknown layer, or one without a map or gradient; images of another form; numbers out of range.

    Example:
        >>> shift = torch.nn.Conv2d(1, 1, 5, padding=2, bias=False)
        >>> _ = shift.weight.data.zero_()[0, 0, 2, 4] = 1.0  # every unit copies the pixel that is two to its right
        >>> influence_by_distance(shift, torch.rand(9, 1, 6, 6), units=36).mean_distance
        2.0
    """
    images = as_images(images)
    check_layer(model, layer)
    samples = min(len(images), 64) if samples is None else samples
    if not 1 <= samples <= len(images):
        raise ValueError(f"samples must be 1 to the number of images, got {samples} of {len(images)}")
    for name, number, least in (("units", units, 1), ("width", width, 1), ("bootstraps", bootstraps, 0)):
        if number is not None and number < least:
            raise ValueError(f"{name} must be {least} or more, got {number}")
    width = max(1, round(math.hypot(*images.shape[2:]) / _BINS)) if width is None else width
    evaluation = Evaluation() if evaluation is None else evaluation
    generator = torch.Generator().manual_seed(int(seed))
    chosen = torch.randperm(len(images), generator=generator)[:samples]
    with torch.inference_mode(False), torch.no_grad(), evaluation.prepared(model) as network:
        used = evaluation.placed(network, images[chosen.to(images.device)])
        measured = _Influence(network, layer, used, units, width, generator)
        found = evaluation.map(measured.rows, samples * measured.units, used.device, used[0].numel())
    # of every image the sums over its units
    return _profile(found.view(samples, measured.units, -1).sum(1).cpu(), bootstraps, seed, layer)


@final
class _Influence:
    """Influence on sampled units, by distance."""

    def __init__(
        self,
        network: nn.Module,
        layer: str | None,
        images: Tensor,
        units: int,
        width: int,
        generator: torch.Generator,
    ) -> None:
        self.network, self.layer, self.images, self.width = network, layer, images, width
        self.size, device = (images.shape[2], images.shape[3]), images.device
        self.bins = int(math.hypot(*self.size) / width) + 1
        channels, *self.grid = as_map(network, layer_output(network, layer, images[:1])).shape[1:]
        places = self.grid[0] * self.grid[1]
        self.units = min(units, places)
        order = torch.rand(len(images), places, generator=generator).argsort(1)
        self.places = order[:, : self.units].flatten().to(device)
        directions = torch.randn(len(self.places), channels, generator=generator, dtype=torch.float64)
        self.directions = (directions / directions.norm(dim=1, keepdim=True)).to(device)
        self.pixels = [torch.arange(n, device=device, dtype=torch.float64) for n in self.size]

    def rows(self, rows: Tensor) -> Tensor:
        """By bin influence on a unit, uniform influence, and that times distance; mean distance; 1 if there is any."""
        influence = self._gradient(rows)
        total = influence.sum((1, 2), keepdim=True)
        influence = influence / torch.where(total == 0, 1.0, total)
        if self.grid == [1, 1]:
            weight, uniform, distance = self._pairs(influence)
        else:
            weight, distance = influence.flatten(1), self._distances(self.places[rows])
            uniform = torch.full_like(weight, 1 / weight.shape[1])
        bins = (distance / self.width).long()
        empty = weight.new_zeros(len(rows), self.bins)
        parts = [empty.scatter_add(1, bins, values) for values in (weight, uniform, uniform * distance)]
        moment = (weight * distance).sum(1, keepdim=True)
        return torch.cat([*parts, moment, torch.ones_like(moment)], 1) * (total != 0)[:, :, 0]

    def _gradient(self, rows: Tensor) -> Tensor:
        """Norms ``(n, H, W)`` of the gradients of units by the pixels, float64."""
        refusal = "model cannot be differentiated by its images, which the influence of pixels takes"
        with torch.enable_grad():
            x = self.images[rows // self.units].requires_grad_()
            maps = as_map(self.network, layer_output(self.network, self.layer, x)).flatten(2)
            unit = maps[torch.arange(len(rows), device=x.device), :, self.places[rows]]
            if not unit.requires_grad:
                raise ValueError(refusal)
            projected = (unit * self.directions[rows].to(unit)).sum()
            (found,) = torch.autograd.grad(projected, x, allow_unused=True)
        gradient: Tensor = torch.zeros_like(x) if found is None else found
        return gradient.double().square().sum(1).sqrt()

    def _distances(self, places: Tensor) -> Tensor:
        """Distances ``(n, H W)`` of pixels from places of the map."""
        along = (places // self.grid[1], places % self.grid[1])
        # centres of the cells, in pixels
        centers = [(k + 0.5) * n / m - 0.5 for k, n, m in zip(along, self.size, self.grid, strict=True)]
        rows, columns = ((pixel - center[:, None]).square() for pixel, center in zip(self.pixels, centers, strict=True))
        return (rows[:, :, None] + columns[:, None]).sqrt().flatten(1)

    def _pairs(self, influence: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Influence of pairs of pixels by their offset ``(n, 4 H W)``, the same if uniform, and the offset's length."""
        height, width = self.size
        frequencies = torch.fft.rfft2(influence, s=(2 * height, 2 * width))
        pairs = torch.fft.irfft2(frequencies.abs().square(), s=(2 * height, 2 * width)).flatten(1)
        pairs = torch.where(pairs <= _ROUNDING * pairs.amax(1, keepdim=True), 0.0, pairs)
        # offsets 0, ..., n, n - 1, ..., 1: the latter are negative
        rows, columns = (torch.cat([pixel, n - pixel]) for pixel, n in zip(self.pixels, self.size, strict=True))
        number = ((height - rows)[:, None] * (width - columns)).flatten() / (height * width) ** 2
        distance = torch.hypot(rows[:, None], columns).flatten()
        # n and n itself: no two pixels are that far apart
        distance = torch.where(number > 0, distance, 0.0)
        return pairs, number.expand_as(pairs), distance.expand_as(pairs)


def _profile(sums: Tensor, bootstraps: int, seed: int, layer: str | None) -> InfluenceProfile:
    """Means over images, from the sums over the units of each ``(n, 3 D + 2)``."""
    bins = (sums.shape[1] - 2) // 3

    def means(weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        total = weights @ sums
        number = torch.where(total[:, -1:] > 0, total[:, -1:], math.nan)
        share, uniform, spread = torch.split(total[:, :-2] / number, bins, 1)
        return share / uniform, share, uniform, spread, total[:, -2] / number[:, 0]

    all_of_them = torch.ones(1, len(sums), dtype=torch.float64)
    strength, share, uniform, spread, mean = (value[0] for value in means(all_of_them))
    # bins that no distance falls into; all are kept if there is no influence, and so nothing is known
    there = ~(uniform == 0)
    low = high = torch.full_like(strength, math.nan)
    mean_low = mean_high = math.nan
    if bootstraps:
        again = means(resamples(bootstraps, len(sums), seed))
        low, high = again[0].nanquantile(BAND, 0)
        mean_low, mean_high = again[4].nanquantile(BAND).tolist()
    return InfluenceProfile(
        distance=(spread / uniform)[there],
        strength=strength[there],
        low=low[there],
        high=high[there],
        share=share[there],
        mean_distance=float(mean),
        mean_distance_low=mean_low,
        mean_distance_high=mean_high,
        uniform_mean_distance=float(spread.sum()),
        layer=layer,
        samples=len(sums),
    )
