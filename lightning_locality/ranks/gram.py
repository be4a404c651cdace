"""Gramians of a factored tensor, carried up and down its tree: matrix products only, with the graph of the weights."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import TypeVar, final

import torch
from torch import Tensor

from lightning_locality.ranks.factored import FactoredTree, GroupSpectra, Inheritance, Scaled, scaled
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors.mode_tree import Node

T = TypeVar("T")


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
    """

    # G and B of every group (n, R_parent, R_parent)
    inside: list[Scaled]
    outside: list[Scaled]
    # diagonals of A and F of the groups with children (n, R)
    below: dict[int, Scaled]
    above: dict[int, Scaled]


def gram_sweep(form: FactoredTree) -> GramSweep:
    """All Gramians, leaves to root and back."""
    # before they are squared
    weights, sizes = zip(*map(scaled, form.weights), strict=True)
    inside, below = list[Scaled](), dict[int, Scaled]()
    for k, (group, weight, size) in enumerate(zip(form.groups, weights, sizes, strict=True)):
        if group.leaf:
            gram, log = scaled(weight.mT @ weight)
        else:
            inner, under = reduce(times, form.gather(group, inside))
            below[k] = inner.diagonal(dim1=1, dim2=2), under
            gram, more = scaled(weight.mT @ inner @ weight)
            log = under + more
        inside.append((gram, log + 2 * size))
    root = weights[-1]
    outside, above = [(root.new_ones(1, 1, 1), root.new_zeros(1))], dict[int, Scaled]()
    handed, handed_logs = Inheritance(form.groups), Inheritance(form.groups)
    for k in reversed(range(len(form.groups))):
        group, weight = form.groups[k], weights[k]
        if weight is not root:
            outside.append((handed.take(k), handed_logs.take(k).flatten()))
        if group.leaf:
            continue
        back, over = outside[-1]
        front, log = scaled(weight @ back @ weight.mT)
        log = log + 2 * sizes[k] + over
        above[k] = front.diagonal(dim1=1, dim2=2), log
        for child, (back, over) in enumerate(all_but_one((front, log), form.gather(group, inside), times)):
            handed.give(group, child, back)
            handed_logs.give(group, child, over[:, None, None])
    return GramSweep(inside, outside[::-1], below, above)


def all_but_one(first: T, factors: Sequence[T], times: Callable[[T, T], T]) -> Iterator[T]:
    """For every factor, the product of ``first`` and all others: from both ends, never by division."""
    suffixes = list(accumulate(factors[:0:-1], lambda product, factor: times(factor, product)))
    for prefix in accumulate(factors[:-1], times, initial=first):
        yield times(prefix, suffixes.pop()) if suffixes else prefix


def times(left: Scaled, right: Scaled) -> Scaled:
    """Entry-wise product."""
    values, more = scaled(left[0] * right[0])
    return values, left[1] + right[1] + more


def gram_spectra(form: FactoredTree) -> NodeSpectra:
    r"""Singular values at all nodes by Gramians: half the digits, and eigenvalues instead of QR decompositions.

    .. math:: \sigma(\nu) = \operatorname{svd}(X Y^\top), \qquad X^\top X = D^{-1} G_\nu D^{-1}, \quad
        Y^\top Y = D B_\nu D, \quad D_{rr} = (G_{rr} / B_{rr})^{1/4}

    by square roots, so that digits are lost only if one side carries the small values alone, and with equal
    diagonals, so that the lengths of the columns do not matter (ours).
    """
    sweep, spectra = gram_sweep(form), GroupSpectra(form)
    for k, ((gram, log), (back, more)) in enumerate(zip(sweep.inside[:-1], sweep.outside[:-1], strict=True)):
        inner, outer = gram.diagonal(dim1=1, dim2=2), back.diagonal(dim1=1, dim2=2)
        # a column that is zero on one side contributes nothing on the other
        alive = (inner > 0) & (outer > 0)
        # by roots: a float64 may not hold the quotient of a large and a tiny number
        ratio = torch.where(alive, inner.sqrt() / outer.where(alive, 1.0).sqrt(), 1.0)
        factors, inverse = ratio.sqrt().where(alive, 0.0), (1 / ratio.sqrt()).where(alive, 0.0)
        left = _root(inverse[:, :, None] * gram * inverse[:, None, :])
        right = _root(factors[:, :, None] * back * factors[:, None, :])
        spectra.add(k, left @ right.mT, 0.5 * (log + more), (inner.sqrt() * outer.sqrt()).sum(1))
    # half of the digits: values below it, times the condition and the largest, are indistinguishable from zero (ours)
    return spectra.spectra(10 * torch.finfo(torch.float64).eps ** 0.5)


def gram_ratios(form: FactoredTree) -> dict[Node, Tensor]:
    r"""Participation ratios :math:`\operatorname{tr}(G_\nu B_\nu)^2 / \operatorname{tr}((G_\nu B_\nu)^2)`."""
    sweep, found = gram_sweep(form), dict[Node, Tensor]()
    for group, (gram, _), (back, _) in zip(form.groups, sweep.inside, sweep.outside, strict=True):
        found |= dict(zip(group.nodes, trace_ratio(gram @ back).unbind(), strict=True))
    return found


def trace_ratio(products: Tensor) -> Tensor:
    """Squared trace over trace of the square ``(n,)`` of matrices ``(n, R, R)``; 0 for zeros."""
    products, _ = scaled(products)
    squares = (products * products.mT).sum((1, 2))
    alive, traces = squares > 0, products.diagonal(dim1=1, dim2=2).sum(1)
    ratios: Tensor = (traces.square() / squares.where(alive, 1.0)).where(alive, 0.0)
    return ratios


def _root(gram: Tensor) -> Tensor:
    """X with X^T X a positive semi-definite matrix; negative eigenvalues are rounding."""
    values, vectors = torch.linalg.eigh(gram)
    root: Tensor = values.clamp_min(0).sqrt().unsqueeze(2) * vectors.mT
    return root
