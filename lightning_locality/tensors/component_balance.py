"""The balanced point of a hierarchical factorisation."""

from __future__ import annotations

__all__ = ["balanced"]

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_locality.tensors.node_groups import NodeGroup

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
