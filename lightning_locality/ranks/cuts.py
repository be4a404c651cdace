"""Variance of a network's output that depends on two blocks of pixels together."""

from __future__ import annotations

__all__ = ["CutShare", "cut_share", "pair_moments", "two_way_table", "variance_components"]

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.conversion import as_tensor
from lightning_locality.ranks.evaluation import Evaluation
from lightning_locality.ranks.masks import checked_mask
from lightning_locality.ranks.spectra import ROUNDING
from lightning_locality.ranks.splice import Network, SplicedNetwork, spliced

_MAX_REPETITIONS = 100_000


class VarianceComponents(NamedTuple):
    """Unbiased variance components of a function of two blocks, possibly below zero."""

    inside: Tensor  # due to block I alone (the rows)
    outside: Tensor  # due to block J alone (the columns)
    crossing: Tensor  # what neither block explains alone: it crosses the cut

    @property
    def share(self) -> Tensor:
        """Share of the variance that crosses the cut; 0 for a constant."""
        total = self.inside + self.outside + self.crossing
        return torch.where(total == 0, 0.0, self.crossing / torch.where(total == 0, 1.0, total))


class PairMoments(NamedTuple):
    """Unbiased moments of the spectrum of a function of two blocks."""

    s2_squared: Tensor  # (sum_k sigma_k^2)^2
    s4: Tensor  # sum_k sigma_k^4

    @property
    def participation_ratio(self) -> Tensor:
        """The quotient; 0 for a spectrum of zeros, NaN if the samples are too few for a positive ``s4``."""
        ratio = self.s2_squared / torch.where(self.s4 > 0, self.s4, torch.nan)
        return torch.where((self.s2_squared == 0) & (self.s4 == 0), 0.0, ratio)


@checked
def variance_components(matrix: Tensor) -> VarianceComponents:
    r"""Unbiased two-way variance components of a function of two blocks, summed over its outputs.

    .. math:: v_{IJ} = \mathrm{MS}_{IJ}, \qquad v_I = (\mathrm{MS}_I - \mathrm{MS}_{IJ}) / L, \qquad
        v_J = (\mathrm{MS}_J - \mathrm{MS}_{IJ}) / K

    with the mean squares of the random-effects analysis of variance of two crossed factors without replication,
    :math:`\mathrm{MS}_{IJ} = \lVert H F H \rVert^2 / ((K - 1)(L - 1))`, H the centring.

    Args:
        matrix: Values ``(K, L)`` or ``(K, L, C)`` at independent samples of block I (rows) and of block J (columns).

    Raises:
        ValueError: Another shape, fewer than two samples of a block, or values that are not finite.

    Example:
        >>> variance_components(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).crossing.item()
        4.0
    """
    values = _checked(matrix, 2)
    rows, columns = values.shape[:2]
    # the mean first: what is left is then not rounded to its size
    values = values - values.mean((0, 1))
    row_means, column_means = values.mean(1, keepdim=True), values.mean(0, keepdim=True)
    crossing = (values - row_means - column_means).square().sum() / ((rows - 1) * (columns - 1))
    inside = (row_means.square().sum() * columns / (rows - 1) - crossing) / columns
    outside = (column_means.square().sum() * rows / (columns - 1) - crossing) / rows
    return VarianceComponents(inside, outside, crossing)


@checked
def pair_moments(matrix: Tensor, centred: bool = True) -> PairMoments:
    r"""Unbiased moments of the spectrum of a function of two blocks, as an operator between functions of each.

    .. math:: \textstyle \sum_k \sigma_k^4 = E \bigl[ \langle f(x, y), f(x', y) \rangle
        \langle f(x, y'), f(x', y') \rangle \bigr], \qquad
        \bigl( \sum_k \sigma_k^2 \bigr)^2 = E \bigl[ \lVert f(x, y) \rVert^2 \lVert f(x', y') \rVert^2 \bigr]

    with x, x' independent samples of block I and y, y' of block J. Outputs belong to block J's side of the operator, as
    in the K x LC matrix, but pairs are of different samples: two outputs of one sample are not independent.

    These are means over all pairs of different rows and of different columns. With ``centred``, the mean of f and what
    either block explains alone are first subtracted; as the sample's means replace the population's, the sums over
    equal and different indices are mixed, and unmixed again exactly (ours).

    Args:
        matrix: Values ``(K, L)`` or ``(K, L, C)`` at independent samples of block I (rows) and of block J (columns).
        centred: Take the part of f that crosses the cut.

    Raises:
        ValueError: Another shape, fewer than four samples of a block (two if not centred), or values not finite.

    Example:
        >>> matrix = torch.tensor([1.0, 2.0, 3.0, 5.0])[:, None] * torch.tensor([1.0, -1.0, 2.0, 1.0])
        >>> round(pair_moments(matrix).participation_ratio.item(), 6)  # one product
        1.0
    """
    values = _checked(matrix, 4 if centred else 2)
    rows, columns, outputs = values.shape
    if centred:
        values = values - values.mean((0, 1))
        values = values - values.mean(1, keepdim=True)
        values = values - values.mean(0, keepdim=True)
    by_column = values.transpose(0, 1)
    squares = values.square().sum(-1)
    # Four factors whose outputs are equal in the pairs 12 and 34. Rows of the table: the four row indices are all
    # equal, or equal in the pairs 12|34, 13|24, 14|23; columns: the same of the column indices.
    one_row = squares.sum(1).square().sum(), _gram_norm(values)
    one_column = squares.sum(0).square().sum(), _gram_norm(by_column)
    across, along = _gram_norm(values.reshape(rows, -1)), _gram_norm(by_column.reshape(columns, -1))
    equal, twisted = _gram_norm(values.reshape(-1, outputs)), _twisted(values)
    table = torch.stack(
        [
            *(squares.square().sum(), one_row[0], one_row[1], one_row[1]),
            *(one_column[0], squares.sum().square(), along, along),
            *(one_column[1], across, equal, twisted),
            *(one_column[1], across, twisted, equal),
        ]
    ).reshape(4, 4)
    left, right = (_mixing(count, centred, values.device) for count in (rows, columns))
    moments = torch.linalg.solve(right, torch.linalg.solve(left, table).mT).mT
    return PairMoments(moments[1, 1], moments[2, 1])


def _checked(matrix: Tensor, least: int) -> Tensor:
    """Return the matrix in float64 and as (K, L, C)."""
    matrix = as_tensor(matrix, "matrix")
    if matrix.ndim not in (2, 3) or min(matrix.shape[:2]) < least:
        raise ValueError(
            f"matrix must be (K, L) or (K, L, C) with at least {least} samples of each block, got "
            f"{tuple(matrix.shape)}: draw more samples"
        )
    if bad := int((~matrix.isfinite()).sum()):
        raise ValueError(f"matrix has {bad} of {matrix.numel()} values that are not finite: look at the network")
    return matrix.double().reshape(*matrix.shape[:2], -1)


def _gram_norm(values: Tensor) -> Tensor:
    """Sum of the squared Frobenius norms of the Gram matrices, over the shorter side (they are equal)."""
    gram = values @ values.mT if values.shape[-2] <= values.shape[-1] else values.mT @ values
    return gram.square().sum()


def _twisted(values: Tensor) -> Tensor:
    """Sum of f(i,j,c) f(i',j',c) f(i,j',c') f(i',j,c'): any two factors share one index."""
    # symmetric in the three indices: the loop is over the shortest, the longest is summed by matrix products
    values = values.permute(sorted(range(3), key=lambda axis: values.shape[axis]))
    total = values.new_zeros(())
    for plane in values:
        products = torch.einsum("yz,xwz->yxw", plane, values)
        total = total + (products * products.transpose(0, 2)).sum()
    return total


def _mixing(count: int, centred: bool, device: torch.device) -> Tensor:
    """Expected share of every pattern of equal indices (columns) in the sum over a pattern (rows)."""
    if centred:
        # sums of products of entries of the projection 1 - 11^T / n
        kept = 1 - 1 / count
        all_in_all = count * (kept**4 + (count - 1) / count**4)
        pair_in_all = count * kept**2 - all_in_all
        all_in_pair, same, other = count * kept**2, count * (count - 1) * kept**2, kept
    else:
        all_in_all, pair_in_all, all_in_pair, same, other = count, 0, count, count * (count - 1), 0
    mixing = torch.full((4, 4), float(other), dtype=torch.float64, device=device)
    mixing.fill_diagonal_(float(same))
    mixing[0, :], mixing[:, 0] = pair_in_all, all_in_pair
    mixing[0, 0] = all_in_all
    return mixing


@checked
def two_way_table(
    model: Network, images_i: Tensor, images_j: Tensor, mask: Tensor, *, evaluation: Evaluation | None = None
) -> Tensor:
    r"""Outputs for all pairs of a block I and its complement J.

    .. math:: F_{ijc} = f_c \bigl( x_I^{(i)}, x_J^{(j)} \bigr)

    in K L forward passes: ``(K, L, outputs)`` in float64, on the model's device. If f is a sum of R products of a
    function of block I and one of block J, the rank of F is at most R, and R for enough samples. F over the root of K L
    approaches the operator between functions of either block whose kernel is f.

    Args:
        model: Module, or function of networks in evaluation mode: ``(n, C, H, W)`` to ``(n,)`` or ``(n, outputs)``.
        images_i: Where block I is taken from, ``(K, C, H, W)``.
        images_j: Where block J is taken from, ``(L, C, H, W)``.
        mask: ``(H, W)``, True in block I.
        evaluation: How the network is evaluated; None: the default.

    Raises:
        ValueError: Images, mask and model that do not fit together, or outputs that are not finite.

    Example:
        >>> product = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 1]
        >>> images = torch.tensor([1.0, 2.0, 3.0])[:, None, None, None].expand(3, 1, 1, 2)
        >>> two_way_table(product, images, images, torch.tensor([[True, False]]))[..., 0].int().tolist()
        [[1, 2, 3], [2, 4, 6], [3, 6, 9]]
    """
    images_i, images_j = as_tensor(images_i, "images_i"), as_tensor(images_j, "images_j")
    mask = checked_mask(mask, images_i)
    if images_j.ndim != 4 or images_i.shape[1:] != images_j.shape[1:] or not len(images_i) or not len(images_j):
        raise ValueError(
            "images_i and images_j must be images (B, C, H, W) of one size, at least one each, got "
            f"{tuple(images_i.shape)} and {tuple(images_j.shape)}"
        )
    images = torch.cat([images_i, images_j.to(images_i)])
    with spliced(model, images, (~mask).long(), evaluation) as network:
        return _table(network, 0, len(images_i), len(images_i), len(images_j))


def _table(
    network: SplicedNetwork, first: int, second: int, rows: int, columns: int, rounding_seed: int | None = None
) -> Tensor:
    """Outputs ``(K, L, C)``: block 0 from images first, first + 1, ..., block 1 from images second, second + 1, ..."""
    choose = lambda k: torch.stack([first + k // columns, second + k % columns], dim=1)
    return network.map(choose, rows * columns, rounding_seed).reshape(rows, columns, -1)


@final
@dataclass(frozen=True)
class CutShare:
    r"""Share of the output's variance that crosses a cut, with its error and spectrum; ``float()`` is the share.

    Args:
        share, standard_error: Crossing over all variance, 0 to 1 up to sampling, and its error over choices of images.
        crossing, inside, outside: Variance that neither block explains alone, and due to block I, and J, alone.
        participation_ratio: Number of products of functions of either block that make up the crossing part, estimated
            as in :func:`pair_moments`. NaN if the crossing part may be rounding, or if the images are too few.
        spectrum, noise: Singular values of the crossing part, over the root of K L, descending ``(R,)``, on the CPU,
            root mean squares over repetitions; and the level below which they may be rounding.
        size, repetitions: Images per block, K = L, and number of tables.
    """

    share: float
    standard_error: float
    crossing: float
    inside: float
    outside: float
    participation_ratio: float
    spectrum: Tensor = field(compare=False)
    noise: float
    size: int
    repetitions: int

    def __float__(self) -> float:
        return self.share

    @property
    def rank(self) -> int:
        """Number of values of the spectrum above the noise; a lower bound, at most ``size - 1`` for one output."""
        return int((self.spectrum > self.noise).sum())

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists, including the rank; NaN becomes None."""
        ratio = None if math.isnan(self.participation_ratio) else self.participation_ratio
        return vars(self) | {"participation_ratio": ratio, "spectrum": self.spectrum.tolist(), "rank": self.rank}


@checked
def cut_share(
    model: Network,
    images: Tensor,
    mask: Tensor,
    *,
    size: int | None = None,
    repetitions: int = 1,
    seed: int = 0,
    layer: str | None = None,
    evaluation: Evaluation | None = None,
) -> CutShare:
    r"""Share of the variance of a network's output that crosses a cut through the image.

    .. math:: S_{IJ} = \frac{v_{IJ}}{v_I + v_J + v_{IJ}}, \qquad
        f = f_0 + f_I(x_I) + f_J(x_J) + f_{IJ}(x_I, x_J)

    with v the variances of these parts, block I of one image beside block J of another: 0 if and only if the network
    adds a function of either block. Interactions inside a block do not count. This is the second-order Sobol' index of
    the two blocks: the total index of either less its closed index ("Global sensitivity indices for nonlinear
    mathematical models and their Monte Carlo estimates", Sobol', 2001). Variances are the :func:`variance_components`
    of a :func:`two_way_table`, summed over outputs. Those of a layer are as in :func:`interaction_profile`.

    Outputs that do not vary beyond rounding, estimated from images moved by one unit in the last place, have a share of
    0. Where the standard error comes from is in docs/measuring.md.

    Args:
        model: Module, or function of networks in evaluation mode: ``(n, C, H, W)`` to ``(n,)`` or ``(n, outputs)``.
        images: ``(B, C, H, W)``, from the distribution of interest.
        mask: ``(H, W)``, True in block I.
        size: Images K for either block, at least 4; None: 64, or half of all images.
        repetitions: Number of tables, of independently drawn images if there are enough; their variances are pooled.
        seed: Of the choice of images.
        layer: Name in ``model.named_modules()``, such as "layer3", whose outputs are taken; None: the network's.
        evaluation: How the network is evaluated, ``size ** 2`` times per repetition and up to 256 times for the noise.

    Raises:
        ValueError: Numbers out of range, images, mask, layer and model that do not fit together, or outputs not finite.

    Example:
        >>> near = lambda x: x[:, 0, 0, 0] * x[:, 0, 0, 1] + x[:, 0, 0, 2] * x[:, 0, 0, 3]
        >>> round(float(cut_share(near, torch.randn(100, 1, 1, 4), torch.tensor([[True, True, False, False]]))), 6)
        0.0
    """
    images = as_tensor(images, "images")
    mask = checked_mask(mask, images)
    size = min(len(images) // 2, 64) if size is None else size
    if size < 4 or 2 * size > len(images):
        raise ValueError(
            f"size must be 4 or more images per block, and 2 x size at most as many as there are, got size={size} and "
            f"{len(images)} images: give more images or a smaller size"
        )
    if not 1 <= repetitions <= _MAX_REPETITIONS:
        raise ValueError(f"repetitions must be 1 to {_MAX_REPETITIONS:,}, got {repetitions}")
    chosen, own = _sample_images(len(images), 2 * size, repetitions, seed)
    with spliced(model, images[chosen.to(images.device)], (~mask).long(), evaluation, layer) as network:
        tables = [_table(network, start, start + size, size, size) for start in range(0, len(chosen), 2 * size)]
        noise, floor = _noise(network, tables[0], seed)
    parts = [variance_components(table) for table in tables]
    pooled = VarianceComponents(*(torch.stack(part).mean() for part in zip(*parts, strict=True)))
    inside, outside, crossing = map(float, pooled)
    spectrum = torch.stack([_spectrum(_crossing(table)) for table in tables]).square().mean(0).sqrt()
    ratio, share, error = math.nan, 0.0, 0.0
    if any(_spectrum(table - table.mean((0, 1)))[0] > floor for table in tables):
        share = float(pooled.share)
        variance = torch.stack([_jackknife(table) for table in tables]).mean()
        if repetitions > 1:
            variance = torch.maximum(variance, torch.stack([part.share for part in parts]).var())
        error = float((variance / own).sqrt())
        if spectrum[0] > noise:
            s2_squared, s4 = (float(sum(part)) for part in zip(*map(pair_moments, tables), strict=True))
            ratio = s2_squared / s4 if s4 > 0 and s2_squared > 0 else math.nan
    return CutShare(share, error, crossing, inside, outside, ratio, spectrum.cpu(), noise, size, repetitions)


def _sample_images(available: int, needed: int, repetitions: int, seed: int) -> tuple[Tensor, float]:
    """Return image numbers, and the number of repetitions that have images of their own."""
    generator = torch.Generator().manual_seed(int(seed))
    if repetitions * needed <= available:
        return torch.randperm(available, generator=generator)[: repetitions * needed], repetitions
    samples = [torch.randperm(available, generator=generator)[:needed] for _ in range(repetitions)]
    return torch.cat(samples), available / needed


def _noise(network: SplicedNetwork, table: Tensor, seed: int) -> list[float]:
    """Singular values that rounding can give to the crossing part, and to the table less its mean."""
    size = len(table)
    corner = min(16, size)  # rows and columns: a sixteenth of the work at the default size
    moved = _table(network, 0, size, corner, corner, rounding_seed=seed) - table[:corner, :corner]
    scale = table.square().sum(2).mean().sqrt()
    # the outputs themselves are rounded, and so is the decomposition
    least = scale * max(2 * network.eps / size**0.5, ROUNDING)
    parts = _crossing(moved), moved - moved.mean((0, 1))
    return [float(torch.maximum(3 * _spectrum(part)[0], least)) for part in parts]


def _crossing(table: Tensor) -> Tensor:
    """Subtract the mean and what rows and columns explain."""
    table = table - table.mean((0, 1))
    table = table - table.mean(0, keepdim=True)
    return table - table.mean(1, keepdim=True)


def _spectrum(table: Tensor) -> Tensor:
    rows, columns, _ = table.shape
    return torch.div(torch.linalg.svdvals(table.reshape(rows, -1).mT), (rows * columns) ** 0.5)


def _jackknife(table: Tensor) -> Tensor:
    """Variance of the share from leaving out rows, and columns."""
    residual, mean = _crossing(table), table.mean((0, 1))
    row, column = table.mean(1) - mean, table.mean(0) - mean
    shares = (_without_each(residual, row, column), _without_each(residual.transpose(0, 1), column, row))
    return torch.stack([(len(share) - 1) ** 2 / len(share) * share.var() for share in shares]).sum()


def _without_each(residual: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """The share without row i, for all i, from the parts of the full table (K, L, C), (K, C) and (L, C)."""
    # the parts stay the same except for means that are no longer zero, which move to the next larger part
    rows, columns = residual.shape[:2]
    squares, own = residual.square().sum((1, 2)), row.square().sum(1)
    crossing = (squares.sum() - squares * rows / (rows - 1)) / ((rows - 2) * (columns - 1))
    inside = (own.sum() - own * rows / (rows - 1)) / (rows - 2) - crossing / columns
    moved = torch.einsum("klc,lc->k", residual, column) / (rows - 1)
    outside = (column.square().sum() - 2 * moved + squares / (rows - 1) ** 2) / (columns - 1) - crossing / (rows - 1)
    return VarianceComponents(inside, outside, crossing).share
