"""Gramians of a factored tensor, carried up and down its tree: matrix products only."""

from __future__ import annotations

__all__ = ["GramSweep", "gram_ratios", "gram_spectra", "gram_sweep", "ratio"]

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor

from lightning_locality.ranks.factored import FactoredTree, Inheritance, NodeValues, scaled
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors.mode_tree import Node

# matrices or diagonals (n, ...), and the binary logarithms (n,) of what they have been divided by
Scaled = tuple[Tensor, Tensor]

# half of the digits, times the condition: values below cannot be told from zero (ours)
ROUNDING = 10 * torch.finfo(torch.float64).eps ** 0.5


@final
@dataclass(frozen=True)
class GramSweep:
    r"""Gramians of all groups of nodes, each divided by a power of two.

    .. math::
        G_\nu = W_\nu^\top A_\nu W_\nu = U_\nu^\top U_\nu, \quad A_\nu = \prod_{c \in C(\nu)} G_c, \qquad
        B_c = F_\nu \prod_{d \ne c} G_d, \quad F_c = W_c B_c W_c^\top, \quad F_{[N]} = W_{[N]} W_{[N]}^\top

    with entry-wise products. The matricisation at a node is :math:`U_\nu \Psi_\nu^\top` with
    :math:`B_\nu = \Psi_\nu^\top \Psi_\nu`, so its squared singular values are the eigenvalues of
    :math:`G_\nu B_\nu` (ours; the reduced Gramians of "Hierarchical Singular Value Decomposition of Tensors",
    Grasedyck, 2010, for the diagonal transfer tensors of a hierarchical factorisation).

    Args:
        inside: G of every group but the root's ``(n, R_parent, R_parent)``, and its binary logarithms ``(n,)``.
        outside: B of every group but the root's, alike.
        below: Diagonals of A of every group with children ``(n, R)``, and their logarithms; None for leaves.
        above: Diagonals of F, alike.
        root: Squared norm of the tensor ``(1,)``, and its binary logarithm.
    """

    inside: list[Scaled]
    outside: list[Scaled]
    below: list[Scaled | None]
    above: list[Scaled | None]
    root: Scaled


def gram_sweep(form: FactoredTree) -> GramSweep:
    """All Gramians, leaves to root and back. Keeps the graph of the weights.

    Args:
        form: Weights of the nodes, in float64.
    """
    groups, last = form.groups, len(form.groups) - 1
    # before they are squared
    weights, sizes = zip(*map(scaled, form.weights), strict=True)
    grams: list[Tensor] = []
    logs: list[Tensor] = []
    below: list[Scaled | None] = []
    for group, weight, size in zip(groups, weights, sizes, strict=True):
        if group.leaf:
            gram, log = scaled(weight.mT @ weight)
            log = log + 2 * size
            below.append(None)
        else:
            inner, under = reduce(_times, zip(group.gather(grams), group.gather(logs), strict=True))
            below.append((inner.diagonal(dim1=1, dim2=2), under))
            gram, more = scaled(weight.mT @ inner @ weight)
            log = under + more + 2 * size
        grams.append(gram)
        logs.append(log)
    outside: list[Scaled] = []
    above: list[Scaled | None] = []
    handed, handed_logs = Inheritance(groups), Inheritance(groups)
    for k in range(last, -1, -1):
        group, weight = groups[k], weights[k]
        if k < last:
            outside.append((handed.take(k), handed_logs.take(k).flatten()))
        if group.leaf:
            above.append(None)
            continue
        front, log = scaled(weight @ weight.mT if k == last else weight @ outside[-1][0] @ weight.mT)
        log = log + 2 * sizes[k]
        log = log if k == last else log + outside[-1][1]
        above.append((front.diagonal(dim1=1, dim2=2), log))
        children = list(zip(group.gather(grams), group.gather(logs), strict=True))
        for child, (back, more) in enumerate(_without_one((front, log), children)):
            handed.give(group, child, back)
            handed_logs.give(group, child, more[:, None, None])
    inside = list(zip(grams[:last], logs[:last], strict=True))
    return GramSweep(inside, outside[::-1], below, above[::-1], (grams[last].flatten(), logs[last]))


def _without_one(first: Scaled, factors: Sequence[Scaled]) -> Iterator[Scaled]:
    """For every factor the product of ``first`` and all others: from both ends, never by division."""
    suffixes = [factors[-1]]
    for factor in reversed(factors[1:-1]):
        suffixes.append(_times(factor, suffixes[-1]))
    prefix = first
    for factor in factors[:-1]:
        yield _times(prefix, suffixes.pop())
        prefix = _times(prefix, factor)
    yield prefix


def _times(left: Scaled, right: Scaled) -> Scaled:
    values, more = scaled(left[0] * right[0])
    return values, left[1] + right[1] + more


def gram_spectra(form: FactoredTree) -> NodeSpectra:
    r"""Singular values at all nodes by Gramians: half the digits, and eigenvalues in place of decompositions.

    .. math:: \sigma(\nu) = \operatorname{svd}(X Y^\top), \qquad X^\top X = D^{-1} G_\nu D^{-1}, \quad
        Y^\top Y = D B_\nu D, \quad D_{rr} = (G_{rr} / B_{rr})^{1/4}

    Of square roots, so that digits are lost only where one side carries the small values alone, and with equal
    diagonals, so that the lengths of the columns do not matter (ours). Values below about
    :math:`\sqrt{2^{-52}}\, \kappa_\nu \sigma_1` are not to be trusted.

    Args:
        form: Weights of the nodes, in float64.
    """
    sweep, values = gram_sweep(form), NodeValues(form)
    for k, ((gram, log), (back, more)) in enumerate(zip(sweep.inside, sweep.outside, strict=True)):
        inner, outer = gram.diagonal(dim1=1, dim2=2), back.diagonal(dim1=1, dim2=2)
        # a column that is zero on either side counts for nothing on the other
        alive = (inner > 0) & (outer > 0)
        # of roots: the quotient of a large and a tiny number may be no float64 number
        ratio = torch.where(alive, inner.sqrt() / torch.where(alive, outer, 1.0).sqrt(), 1.0)
        factors = torch.where(alive, ratio.sqrt(), 0.0)
        inverse = torch.where(alive, 1 / ratio.sqrt(), 0.0)
        left = _root(inverse[:, :, None] * gram * inverse[:, None, :])
        right = _root(factors[:, :, None] * back * factors[:, None, :])
        values.add(k, left @ right.mT, 0.5 * (log + more), (inner.sqrt() * outer.sqrt()).sum(1))
    return values.spectra(ROUNDING)


def gram_ratios(form: FactoredTree) -> dict[Node, Tensor]:
    r"""Participation ratios :math:`\operatorname{tr}(G_\nu B_\nu)^2 / \operatorname{tr}((G_\nu B_\nu)^2)` at all nodes.

    Args:
        form: Weights of the nodes, in float64; the graph of these is kept.
    """
    sweep, found = gram_sweep(form), dict[Node, Tensor]()
    for group, (gram, _), (back, _) in zip(form.groups[:-1], sweep.inside, sweep.outside, strict=True):
        found |= dict(zip(group.nodes, ratio(gram @ back).unbind(), strict=True))
    return {node: found[node] for node in form.tree.nodes[:-1]}


def ratio(products: Tensor) -> Tensor:
    """Squared trace over trace of the square ``(n,)`` of matrices ``(n, R, R)``; 0 for zeros."""
    products, _ = scaled(products)
    squares = (products * products.mT).sum((1, 2))
    alive = squares > 0
    traces = products.diagonal(dim1=1, dim2=2).sum(1)
    ratios: Tensor = torch.where(alive, traces.square() / torch.where(alive, squares, 1.0), 0.0)
    return ratios


def _root(gram: Tensor) -> Tensor:
    """X with X^T X a positive semi-definite matrix; negative eigenvalues are rounding."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = values.clamp_min(0).sqrt().unsqueeze(2) * vectors.mT
    return root
