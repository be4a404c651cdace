"""Balancing the weights on the two sides of one contracted index (a bond)."""

from __future__ import annotations

__all__ = ["balance_cyclically", "balanced_pair", "balancing_factors"]

from collections.abc import Callable

import torch
from torch import Tensor


def balanced_pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    r"""The factors L, R of the same product with :math:`L^\top L = R R^\top`, which have the least norm.

    From the singular value decomposition of the product, padded with zeros.

    Args:
        left: ``(M, K)``.
        right: ``(K, N)``.

    Example:
        >>> left, right = balanced_pair(torch.tensor([[8.0]]), torch.tensor([[2.0]]))
        >>> left.abs().item(), right.abs().item()
        (4.0, 4.0)
    """
    # reduced to triangular factors: the product itself may be large
    left_basis, left_triangle = torch.linalg.qr(left)
    right_basis, right_triangle = torch.linalg.qr(right.T)
    outer, values, inner = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    root, count = values.sqrt(), len(values)
    new_left, new_right = torch.zeros_like(left), torch.zeros_like(right)
    new_left[:, :count] = left_basis @ outer * root
    new_right[:count] = root[:, None] * (inner @ right_basis.T)
    return new_left, new_right


def balancing_factors(left: Tensor, left_degree: int, right: Tensor, right_degree: int) -> Tensor:
    r"""Numbers c with equal sums :math:`\sum_i (c\, l_i)^{2/p} = \sum_j (r_j / c)^{2/q}`; zero where one side is zero.

    The sums are the squared norms of one factor of every chain, if l and r are the norms of chains of p and q
    factors of equal norm.

    Args:
        left: Norms l ``(I, K)``.
        left_degree: p.
        right: Norms r ``(J, K)``.
        right_degree: q.

    Example:
        >>> balancing_factors(torch.tensor([[1.0]]), 1, torch.tensor([[4.0]]), 1).item()
        2.0
    """
    sums = left.pow(2 / left_degree).sum(0), right.pow(2 / right_degree).sum(0)
    alive = (sums[0] > 0) & (sums[1] > 0)
    ratio = torch.where(alive, sums[1], 1.0) / torch.where(alive, sums[0], 1.0)
    return torch.where(alive, ratio.pow(1 / (2 / left_degree + 2 / right_degree)), 0.0)


def balance_cyclically(sweep: Callable[[], float], tolerance: float = 1e-15, most: int = 2000) -> None:
    """Repeat a sweep over all bonds until it moves nothing any more, or no less than before.

    Args:
        sweep: Balances one bond after the other and returns the largest relative imbalance it met.
        tolerance: Imbalance to stop at.
        most: Sweeps; every one keeps the tensor, so that one too few is an imprecision only.
    """
    before = float("inf")
    for _ in range(most):
        met = sweep()
        # below 1e-12 rounding errors, which need not fall
        if met <= tolerance or (met < 1e-12 and met >= before):
            return
        before = met
