"""Balanced points: the weights of least norm of a given tensor."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lightning_locality.tensors.contraction import NodeGroup

_MAX_SWEEPS = 2000


def balanced_pair(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    r"""Factor a product ``(M, K) (K, N)`` into L, R of least norm, which have :math:`L^\top L = R R^\top`."""
    # reduced to triangular factors: the product itself may be large
    left_basis, left_triangle = torch.linalg.qr(left)
    right_basis, right_triangle = torch.linalg.qr(right.T)
    outer, values, inner = torch.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    root, count = values.sqrt(), len(values)
    new_left, new_right = torch.zeros_like(left), torch.zeros_like(right)
    new_left[:, :count] = left_basis @ outer * root
    new_right[:count] = root[:, None] * (inner @ right_basis.T)
    return new_left, new_right


def balance_neighbours(
    left: Tensor, right: Tensor, norms: tuple[Tensor, Tensor], degrees: tuple[int, int], squares: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, float]:
    r"""Balance two factors that share an index of size K; return them and their relative imbalance before.

    Two single matrices ``(M, K)`` and ``(K, N)`` get equal Gramians. Columns and rows that are chains of p and q
    factors of equal norm (the degrees), with norms l ``(I, K)`` and r ``(J, K)``, are scaled by c and 1 / c with
    :math:`\sum_i (c\, l_i)^{2/p} = \sum_j (r_j / c)^{2/q}`, or by zero if one side is zero; ``squares`` holds the two
    sums at c = 1, ``(K,)``.
    """
    if degrees == (1, 1):
        gap = left.T @ left - right @ right.T
        left, right = balanced_pair(left, right)
    else:
        gap = squares[0] - squares[1]
        powers = 2 / degrees[0], 2 / degrees[1]
        sums = norms[0].pow(powers[0]).sum(0), norms[1].pow(powers[1]).sum(0)
        alive = (sums[0] > 0) & (sums[1] > 0)
        ratio = torch.where(alive, sums[1], 1.0) / torch.where(alive, sums[0], 1.0)
        factor = torch.where(alive, ratio.pow(1 / (powers[0] + powers[1])), 0.0)
        left, right = left * factor, torch.where(factor > 0, 1 / factor, 0.0)[:, None] * right
    return left, right, float(gap.abs().max() / (squares[0].max() + squares[1].max() + 1e-300))


def balance_cyclically(sweep: Callable[[], float], max_sweeps: int = _MAX_SWEEPS) -> None:
    """Repeat a sweep, which returns the largest relative imbalance it met, until that is zero or stops falling."""
    before = float("inf")
    # every sweep keeps the tensor, so stopping early costs only precision
    for _ in range(max_sweeps):
        met = sweep()
        # below 1e-12 there are rounding errors, which need not decrease
        if met <= 1e-15 or (met < 1e-12 and met >= before):
            return
        before = met


def balance_components(groups: Iterable[NodeGroup]) -> list[Tensor]:
    r"""Find weights of the same tensor for which the vectors of every local component have equal norms.

    .. math:: w \leftarrow \frac{w}{\|w\|} \Bigl( \prod_{w' \in (\nu, r)} \|w'\| \Bigr)^{1 / (|C(\nu)| + 1)}

    for the local components of one node after the other, repeatedly: scaling a component changes the norms of its
    neighbours, and the sweeps converge linearly. At a balanced point the matrices of all nodes have the same Frobenius
    norm; setting that before each sweep spares the many sweeps that would carry it through the tree. A component with
    a zero vector becomes zero altogether. The method is ours. Groups come children before parents, without chains;
    the weights are in float64.
    """
    groups = list(groups)
    weights = [group.weight().detach().double().clone() for group in groups]
    for _ in range(_MAX_SWEEPS):
        moved = _equalize(weights)
        for k, group in enumerate(groups):
            if group.leaf:
                continue
            columns = {source: weights[source].norm(dim=1) for source in group.sources}
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
        f"weights cannot be balanced: after {_MAX_SWEEPS} sweeps a vector still moved by a factor of e^{moved:.0e}; "
        "are they finite?"
    )


def _equalize(weights: list[Tensor]) -> float:
    """Give all matrices the geometric mean of their norms, which keeps the tensor; return the largest log change."""
    logs = [weight.norm(dim=(1, 2)).log() for weight in weights]
    target = torch.cat(logs).mean()
    if target == -torch.inf:
        return 0.0
    for weight, log in zip(weights, logs, strict=True):
        weight *= (target - log).exp()[:, None, None]
    return max(float((log - target).abs().max()) for log in logs)
