"""The balanced point of a hierarchical factorisation."""

from __future__ import annotations

__all__ = ["balance_cyclically", "balanced", "balanced_pair", "balancing_factors"]

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_locality.tensors.contraction import NodeGroup


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


SWEEPS = 2000


def balanced(groups: Sequence[NodeGroup]) -> list[Tensor]:
    r"""Weights of the same tensor for which the vectors of every local component have equal norms.

    .. math:: w \leftarrow \frac{w}{\|w\|} \Bigl( \prod_{w' \in (\nu, r)} \|w'\| \Bigr)^{1 / (|C(\nu)| + 1)}

    for the local components of one node after the other, over and over: scaling a component moves the norms of its
    neighbours, and the sweeps converge linearly. What sweeps would carry from one end of the tree to the other in
    about as many sweeps as there are nodes is done at once before each: at a balanced point the matrices of all nodes
    have the same Frobenius norm. A component with a zero vector becomes zero altogether. The method is ours.

    Args:
        groups: Children before parents, without chains.

    Returns:
        Weights of every group ``(n, R_node or D, R_parent)`` in float64.

    Raises:
        ValueError: No convergence.
    """
    weights = [group.weight().detach().double().clone() for group in groups]
    for _ in range(SWEEPS):
        moved = _equalize(weights)
        for k, group in enumerate(groups):
            if group.leaf:
                continue
            columns = [weights[source].norm(dim=1) if source in group.sources else None for source in range(k)]
            logs = torch.stack([weights[k].norm(dim=2), *group.gather(columns)]).log()
            target = logs.mean(0)
            alive = target > -torch.inf
            factors = torch.where(alive, (target - logs).exp(), 0.0)
            # a component that has just become zero has moved too
            change = torch.where(alive, (logs - target).abs(), (logs > -torch.inf).double())
            moved = max(moved, float(change.max()))
            weights[k] *= factors[0].unsqueeze(2)
            of_sources = {source: torch.ones_like(weights[source][:, 0]) for source in group.sources}
            group.scatter(list(factors[1:]), of_sources)
            for source, factor in of_sources.items():
                weights[source] *= factor.unsqueeze(1)
        if moved < 1e-13:
            return weights
    raise ValueError(
        f"weights cannot be balanced: after {SWEEPS} sweeps a vector still moved by a factor of e^{moved:.0e}; "
        "are they finite?"
    )


def _equalize(weights: Sequence[Tensor]) -> float:
    """Give all matrices the geometric mean of their norms: the tensor stays. The largest change, a logarithm."""
    logs = [weight.norm(dim=(1, 2)).log() for weight in weights]
    target = torch.cat(logs).mean()
    if target == -torch.inf:
        return 0.0
    for weight, log in zip(weights, logs, strict=True):
        weight *= (target - log).exp()[:, None, None]
    return max(float((log - target).abs().max()) for log in logs)
