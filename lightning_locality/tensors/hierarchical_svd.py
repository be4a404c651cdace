"""Hierarchical singular value decomposition: a tensor as bases and transfer tensors over a mode tree, truncated."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import scipy.linalg
import torch
from torch import Tensor

from lightning_locality.tensors.factorization import divided
from lightning_locality.tensors.mode_tree import ModeTree, Node

# change of the tensor, relative to its norm, above which given components are not kept (ours)
_EXACT = 1e-12


class TransferTensors(NamedTuple):
    r"""A tensor in the hierarchical Tucker format, with orthonormal bases.

    .. math:: U_\nu = \Bigl( \bigotimes_{c \in C(\nu)} U_c \Bigr) B_\nu, \qquad \mathcal W = e^{\text{log\_scale}}\,
        U_{[N]}, \qquad U_\nu^\top U_\nu = I \text{ below the root}

    Args:
        blocks: :math:`U_\nu` of a leaf ``(D_n, k_n)``, :math:`B_\nu` of an interior node ``(k_c, ..., k_node)``, with a
            last axis of 1 at the root; in float64.
        log_scale: Logarithm of the divisor of the root's block.
        coefficients: Interior node -> for every child ``(k_c, R)``: the columns of the child's weights in a
            factorisation, in the child's basis; empty for a tensor that was given by its entries.
        spectra: Node -> singular values that belong to the columns of its basis ``(k_node,)``, after truncation.
    """

    blocks: dict[Node, Tensor]
    log_scale: float = 0.0
    coefficients: Mapping[Node, Sequence[Tensor]] = {}
    spectra: Mapping[Node, Tensor] = {}


def transfers_of_tensor(tensor: Tensor, tree: ModeTree) -> TransferTensors:
    """Write a tensor exactly in transfer tensors: bases from the leaves to the root, by QR decompositions."""
    core, scale = divided(tensor.double())
    axes, blocks = list(tree.leaves), dict[Node, Tensor]()
    for node in tree.nodes[:-1]:
        places = [axes.index(child) for child in tree.children(node) or (node,)]
        rest = [place for place in range(core.ndim) if place not in places]
        sizes, others = [core.shape[place] for place in places], [core.shape[place] for place in rest]
        matrix = core.permute(places + rest).reshape(math.prod(sizes), -1)
        if matrix.shape[0] > matrix.shape[1]:
            basis, matrix = torch.linalg.qr(matrix)
        else:
            basis = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        blocks[node] = basis.reshape(*sizes, -1)
        core, axes = matrix.reshape(-1, *others), [node, *(axes[place] for place in rest)]
    blocks[tree.root] = core.permute([axes.index(child) for child in tree.children(tree.root)]).unsqueeze(-1)
    return TransferTensors(blocks, float(scale.log()))


def transfers_of_weights(weights: Mapping[Node, Tensor], tree: ModeTree) -> TransferTensors:
    r"""The same from the weights of a hierarchical factorisation, without the tensor.

    :math:`\bigl( \bigodot_c S_c \bigr) W_\nu = B_\nu S_\nu` by QR decompositions, leaves first, as in
    "Algorithm 941: htucker" (Kressner, Tobler, 2014) for dense transfer tensors.
    """
    triangles, blocks, coefficients = dict[Node, Tensor](), dict[Node, Tensor](), dict[Node, list[Tensor]]()
    log_scale = 0.0
    for node in tree.nodes:
        matrix, sizes = weights[node].double(), [len(weights[node])]
        if children := tree.children(node):
            coefficients[node] = [triangles[child] for child in children]
            sizes = [len(triangle) for triangle in coefficients[node]]
            matrix = _khatri_rao(coefficients[node]) @ matrix
        basis, triangle = torch.linalg.qr(matrix)
        # at order 4096 plain products underflow
        triangles[node], scale = divided(triangle)
        log_scale += float(scale.log())
        blocks[node] = basis.reshape(*sizes, -1)
    # 1, -1 or 0
    blocks[tree.root] = blocks[tree.root] * triangles[tree.root]
    return TransferTensors(blocks, log_scale, coefficients)


def truncated(transfers: TransferTensors, tree: ModeTree, rtol: float, ranks: Mapping[Node, int]) -> TransferTensors:
    r"""Project onto the leading singular vectors of the matricisation at every node but the root.

    .. math:: \sigma(c) = \operatorname{svd}(E_c), \qquad E_c = \operatorname{qr} \bigl( [\![ B_\nu \times_\nu E_\nu ;
        \text{all modes but } c ]\!] \bigr), \quad E_{[N]} = 1

    with qr the triangular factor. Every node discards at most :math:`\text{rtol} / \sqrt m` of the norm, with m
    different matricisations, and keeps at most its number of ``ranks`` and at least one.

    Source: root-to-leaves truncation of "Hierarchical Singular Value Decomposition of Tensors" (Grasedyck, 2010), with
    triangular factors instead of Gramians, which would keep half of the digits.
    """
    blocks, coefficients = transfers.blocks, transfers.coefficients
    one = blocks[tree.root].new_ones(1, 1)
    outer, bases, spectra = {tree.root: one}, {tree.root: one}, {tree.root: one[0]}
    # the two children of a binary root have the same singular values
    twins = tree.children(tree.root) if len(tree.children(tree.root)) == 2 else ()
    share = rtol / math.sqrt(len(tree) - (2 if twins else 1))
    for node in reversed(tree.interior):
        block = torch.tensordot(blocks[node], outer.pop(node), dims=([-1], [1]))
        children = tree.children(node)
        count = min(ranks[child] for child in children) if children == twins else None
        for place, child in enumerate(children):
            triangle = torch.linalg.qr(block.movedim(place, -1).flatten(0, -2), mode="r").R
            _, values, vectors = torch.linalg.svd(triangle, full_matrices=False)
            if place == 0 or children != twins:
                # from the smallest up: small values would vanish when added to large ones
                tails = values.flip(0).square().cumsum(0)
                kept = max(1, len(values) - int((tails <= share**2 * tails[-1]).sum()))
                kept = min(kept, ranks[child] if count is None else count)
            outer[child], bases[child], spectra[child] = triangle, vectors[:kept].mT, values[:kept]
    moved = {}
    for node, block in blocks.items():
        children = tree.children(node)
        for child in children:
            # every product moves a mode from the front to the back
            block = torch.tensordot(block, bases[child], dims=([0], [0]))
        moved[node] = torch.tensordot(block, bases[node], dims=([0 if children else 1], [0]))
    projected = {
        node: [bases[child].mT @ own for child, own in zip(tree.children(node), columns, strict=True)]
        for node, columns in coefficients.items()
    }
    return TransferTensors(moved, transfers.log_scale, projected, spectra)


def component_weights(transfers: TransferTensors, tree: ModeTree) -> dict[Node, Tensor]:
    r"""Weights of a hierarchical factorisation of the same tensor, divided by its scale.

    A CP decomposition :math:`B_\nu = \sum_r \bigotimes_c a^c_r \otimes b_r` of every transfer tensor gives the weights
    :math:`b^\top a` between neighbouring interior nodes, :math:`U_n a` at the leaves and :math:`b^\top` at the root.
    """
    weights, above = dict[Node, Tensor](), {tree.root: transfers.blocks[tree.root].new_ones(1, 1)}
    for node in reversed(tree.nodes):
        own = transfers.blocks[node]
        if children := tree.children(node):
            *below, last = _components(own, transfers.coefficients.get(node, ()), transfers.spectra[node])
            above |= dict(zip(children, below, strict=True))
            own = last.mT
        weights[node] = own @ above[node]
    return weights


def _components(block: Tensor, given: Sequence[Tensor], values: Tensor) -> list[Tensor]:
    r"""A CP decomposition of a transfer tensor: one matrix ``(k, R)`` per axis.

    With all unit vectors along the axes but the longest, as many as the product of the sizes of those; or with a subset
    of the given components of a factorisation if that is smaller and exact. Columns of the last axis count by their
    singular values, ``values``: the basis of a small one has only the digits that this has.
    """
    longest = max(range(block.ndim), key=lambda axis: block.shape[axis])
    others = [size for axis, size in enumerate(block.shape) if axis != longest]
    number = math.prod(others)
    if given:
        given = [torch.nn.functional.normalize(columns, dim=0) for columns in given]
        products = _khatri_rao(given)
        # pivots find the columns that are combinations of others
        triangle, order = scipy.linalg.qr(products.cpu().numpy(), mode="r", pivoting=True)
        pivots = abs(triangle.diagonal())
        if 0 < (count := int((pivots > _EXACT * pivots[0]).sum())) < number:
            chosen = torch.from_numpy(order[:count].copy()).to(block.device, torch.int64)
            matrix = block.flatten(0, -2)
            last = torch.linalg.lstsq(products[:, chosen], matrix).solution
            if ((products[:, chosen] @ last - matrix) * values).norm() <= _EXACT * values.norm():
                return [*(columns[:, chosen] for columns in given), last.mT]
    places = torch.unravel_index(torch.arange(number, device=block.device), others)
    columns = [
        torch.nn.functional.one_hot(place, size).to(block).mT for place, size in zip(places, others, strict=True)
    ]
    columns.insert(longest, block.movedim(longest, 0).flatten(1))
    return columns


def _khatri_rao(matrices: Sequence[Tensor]) -> Tensor:
    """Column-wise Kronecker product ``(k_1 k_2 ..., R)`` of ``(k_c, R)``."""
    return reduce(lambda a, b: (a.unsqueeze(1) * b.unsqueeze(0)).flatten(0, 1), matrices)
