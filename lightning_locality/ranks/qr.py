"""The QR sweep: spectra of a factored tensor from triangular factors, carried up and down its tree."""

from __future__ import annotations

__all__: list[str] = []

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_locality.ranks.factored import FactoredTree, GroupSpectra, Inheritance, Scaled, scaled
from lightning_locality.ranks.spectra import ROUNDING, NodeSpectra

# float64 numbers of an intermediate, of which a decomposition keeps about three: 4 MB, which a processor's cache
# holds, and 256 MB for a GPU, which needs many matrices at once
MOST_NUMBERS, MOST_NUMBERS_ON_GPU = 2**19, 2**25
SPLIT_FROM = 24  # width from which halving the columns of products of triangles pays (a rough figure)


def qr_spectra(form: FactoredTree) -> NodeSpectra:
    r"""Singular values of the matricisations at all nodes, without the tensor and to full precision.

    .. math::
        \text{up:}\quad S_\nu = \operatorname{qr} \Bigl( \operatorname{qr} \bigl( \bigodot_{c \in C(\nu)} S_c \bigr)
            W_\nu \Bigr), \qquad
        \text{down:}\quad Z_c = \operatorname{qr} \Bigl( E_\nu \odot \bigodot_{d \ne c} S_d \Bigr), \quad
        E_c = \operatorname{qr} (Z_c W_c^\top), \qquad
        \sigma(c) = \operatorname{svd} (S_c Z_c^\top)

    with qr the triangular factor and :math:`E_{[N]} = W_{[N]}^\top`: if :math:`U_c = Q_c S_c` with orthonormal
    :math:`Q_c`, the Khatri-Rao product of the :math:`U_c` is that of the :math:`S_c` up to orthonormal columns
    (ours). The error of a value is below a small multiple of :math:`2^{-52} \kappa_\nu \sigma_1`,
    :math:`\kappa_\nu = \sum_r \|s_r\| \|z_r\| / \sigma_1` with the columns of :math:`S_\nu` and :math:`Z_\nu`. All
    nodes of a group are one batched operation; the cost is proportional to the fourth power of the widths.
    """
    triangles: list[Scaled] = []
    for group, weight in zip(form.groups[:-1], form.weights[:-1], strict=True):
        if group.leaf:
            triangles.append(scaled(triangular(weight)))
        else:
            folded, below = reduce(join, form.gather(group, triangles))
            triangle, log = scaled(triangular(folded @ weight))
            triangles.append((triangle, log + below))
    spectra = GroupSpectra(form)
    tops, talls, sizes = (Inheritance(form.groups) for _ in range(3))
    end = scaled(form.weights[-1].mT)
    for k in reversed(range(len(form.groups))):
        group, weight = form.groups[k], form.weights[k]
        if k < len(triangles):
            triangle, own = triangles[k]
            log, norms = sizes.take(k).squeeze(1).tensor_split([1], dim=1)
            log, spread = log.squeeze(1), (triangle.norm(dim=1) * norms).sum(1)
            if _short(form, k):
                spectra.add(k, talls.take(k), log + own, spread)
            else:
                top = tops.take(k)
                spectra.add(k, triangle @ top.mT, log + own, spread)
                if not group.leaf:
                    rows, more = scaled(triangular(top @ weight.mT))
                    end = rows, log + more
        if group.leaf:
            continue
        children = form.gather(group, triangles)
        for child, (left, right) in enumerate(_complements(end, children)):
            log, norms = left[1] + right[1], left[0].norm(dim=1) * right[0].norm(dim=1)
            sizes.give(group, child, torch.cat([log[:, None], norms], 1).unsqueeze(1))
            short = [_short(form, source) for source in group.sources_of_child[child]]
            if any(short):
                talls.give(group, child, _khatri_rao_triangle(left[0], right[0], children[child][0].mT))
            if not all(short):
                tops.give(group, child, _khatri_rao_triangle(left[0], right[0]))
    return spectra.spectra(ROUNDING)


def join(left: Scaled, right: Scaled) -> Scaled:
    """Triangular factor of the Khatri-Rao product ``(n, k, R)``."""
    rows, more = scaled(_khatri_rao_triangle(left[0], right[0]))
    return rows, left[1] + right[1] + more


def _complements(end: Scaled, children: Sequence[Scaled]) -> list[tuple[Scaled, Scaled]]:
    """For every child, two factors whose Khatri-Rao product is that of everything but the child."""
    prefixes = list(accumulate(children[:-2], join, initial=end))
    suffixes = list(accumulate(children[:0:-1], lambda product, child: join(child, product)))
    return [*zip(prefixes, reversed(suffixes), strict=True), (prefixes[-1], children[-2])]


def _short(form: FactoredTree, k: int) -> bool:
    """Whether a group's own vectors are so short that it pays to multiply by them before decomposing."""
    return form.groups[k].leaf and 2 * form.weights[k].shape[1] < form.weights[k].shape[2]


def triangular(matrices: Tensor) -> Tensor:
    """Triangular factors ``(n, min(k, R), R)`` of matrices ``(n, k, R)``.

    Square and wide matrices are decomposed too: if columns are nearly orthogonal, their small multiples then stay
    apart from large ones, and the next product knows the zeros.
    """
    triangle: Tensor = torch.linalg.qr(matrices, mode="r").R
    return triangle


def _khatri_rao_triangle(left: Tensor, right: Tensor, last: Tensor | None = None) -> Tensor:
    """Triangular factors of column-wise Kronecker products times matrices, in chunks of bounded size.

    Of triangles ``(n, p, R)`` and ``(n, q, R)`` and ``last`` ``(n, R, m)`` (None: identities): ``(n, min(p q, m), m)``.
    """
    n, p, width = left.shape
    most = MOST_NUMBERS_ON_GPU if left.is_cuda else MOST_NUMBERS
    numbers = p * right.shape[1] * width
    if n > 1 and n * numbers > most:
        step = max(1, most // numbers)
        chunks = [slice(start, start + step) for start in range(0, n, step)]
        return torch.cat([_khatri_rao_triangle(left[c], right[c], None if last is None else last[c]) for c in chunks])
    if last is None and p == right.shape[1] == width >= SPLIT_FROM and numbers <= 16 * most:
        return _split_triangle(left, right)
    triangle: Tensor | None = None
    step = max(1, 16 * p * most // max(numbers, 16 * most))
    for start in range(0, p, step):
        block = _khatri_rao(left[:, start : start + step], right)
        block = block if last is None else block @ last
        triangle = triangular(block if triangle is None else torch.cat([triangle, block], 1))
    assert triangle is not None
    return triangle


def _split_triangle(left: Tensor, right: Tensor) -> Tensor:
    """The same for square triangles, in less than half the operations.

    Row (i, j) of the product is zero before column max(i, j): three quarters of them have the second half only.
    """
    half = left.shape[2] // 2
    top = triangular(_khatri_rao(left[:, :half], right[:, :half]))
    below = _khatri_rao(left[:, half:, half:], right[:, :, half:])
    beside = _khatri_rao(left[:, :half, half:], right[:, half:, half:])
    bottom = triangular(torch.cat([part.mT for part in (top[:, half:, half:], below, beside)], 2).mT)
    return torch.cat([top[:, :half], F.pad(bottom, (half, 0))], 1)


def _khatri_rao(left: Tensor, right: Tensor) -> Tensor:
    """Column-wise Kronecker products ``(n, p q, R)``."""
    # columns first: the decomposition needs them contiguous in memory
    return (left.mT.unsqueeze(3) * right.mT.unsqueeze(2)).flatten(2).mT
