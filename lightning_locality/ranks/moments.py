"""Unbiased moments of a function of two blocks of pixels, from its values at every pair of samples."""

from __future__ import annotations

__all__ = ["PairMoments", "VarianceComponents", "pair_moments", "variance_components"]

from typing import NamedTuple

import torch
from torch import Tensor


class VarianceComponents(NamedTuple):
    """What the variance of a function of two blocks is made of, each ``()`` and unbiased, so perhaps below zero.

    Args:
        inside: Variance due to block I alone (the rows).
        outside: Variance due to block J alone (the columns).
        crossing: Variance that neither explains alone: what crosses the cut.
    """

    inside: Tensor
    outside: Tensor
    crossing: Tensor

    @property
    def total(self) -> Tensor:
        """Sum of the three."""
        return self.inside + self.outside + self.crossing

    @property
    def share(self) -> Tensor:
        """Share of the variance that crosses the cut; 0 for a constant."""
        return torch.where(self.total == 0, 0.0, self.crossing / torch.where(self.total == 0, 1.0, self.total))


class PairMoments(NamedTuple):
    r"""Sums over the spectrum of a function of two blocks, each ``()`` and unbiased.

    Args:
        s2sq: :math:`(\sum_k \sigma_k^2)^2`.
        s4: :math:`\sum_k \sigma_k^4`.
    """

    s2sq: Tensor
    s4: Tensor

    @property
    def participation_ratio(self) -> Tensor:
        """The quotient; 0 for a spectrum of zeros, NaN where the samples are too few for a positive ``s4``."""
        ratio = self.s2sq / torch.where(self.s4 > 0, self.s4, torch.nan)
        return torch.where((self.s2sq == 0) & (self.s4 == 0), 0.0, ratio)


def variance_components(matrix: Tensor) -> VarianceComponents:
    r"""Unbiased two-way variance components of a function of two blocks, summed over its outputs.

    .. math:: v_{IJ} = \mathrm{MS}_{IJ}, \qquad v_I = (\mathrm{MS}_I - \mathrm{MS}_{IJ}) / L, \qquad
        v_J = (\mathrm{MS}_J - \mathrm{MS}_{IJ}) / K

    with the mean squares of the random-effects analysis of variance of two crossed factors without replication,
    :math:`\mathrm{MS}_{IJ} = \lVert H F H \rVert^2 / ((K - 1)(L - 1))`, H the centring.

    Args:
        matrix: Values ``(K, L)`` or, of several outputs, ``(K, L, C)``; rows are samples of block I, columns
            samples of block J, all independent.

    Raises:
        ValueError: Another shape, fewer than two samples of a block, or values that are not finite.

    Example:
        >>> variance_components(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).share.item()  # a sum of two functions
        0.0
        >>> float(variance_components(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).crossing)
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


def pair_moments(matrix: Tensor, centred: bool = True) -> PairMoments:
    r"""Unbiased moments of the spectrum of a function of two blocks, as an operator between functions of each.

    .. math:: \textstyle \sum_k \sigma_k^4 = E \bigl[ \langle f(x, y), f(x', y) \rangle
        \langle f(x, y'), f(x', y') \rangle \bigr], \qquad
        \bigl( \sum_k \sigma_k^2 \bigr)^2 = E \bigl[ \lVert f(x, y) \rVert^2 \lVert f(x', y') \rVert^2 \bigr]

    with x, x' independent samples of block I and y, y' of block J. Outputs belong to block J's side of the operator, as
    in the K x LC matrix, but pairs are of different samples: two outputs of one sample are not independent.

    Without ``centred`` these are the means over all pairs of different rows and of different columns. With it, f
    is first freed of its mean and of what either block explains alone; as the sample's means stand in for the
    population's, the sums over equal and different indices are mixed, and unmixed again exactly (ours).

    Args:
        matrix: Values ``(K, L)`` or, of several outputs, ``(K, L, C)``; rows are samples of block I, columns
            samples of block J, all independent.
        centred: Of that part of f that crosses the cut; a matrix that is centred already gives the same.

    Raises:
        ValueError: Another shape, fewer than four samples of a block (two without ``centred``), or values that
            are not finite.

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
    """In float64 and as (K, L, C)."""
    if matrix.ndim not in (2, 3) or min(matrix.shape[:2]) < least:
        raise ValueError(
            f"matrix must be (K, L) or (K, L, C) with at least {least} samples of each block, "
            f"got {tuple(matrix.shape)}: draw more samples"
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
    # alike in all three indices: the loop is over the shortest, the longest is summed by matrix products
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
