"""Spectra of factorisations whose small core says it all: Tucker and products of matrices."""

from __future__ import annotations

__all__ = ["matrix_ratio", "matrix_spectra", "tucker_ratios", "tucker_spectra"]

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.factored import doubled, scaled
from lightning_locality.ranks.grams import ratio
from lightning_locality.ranks.node_values import ROUNDING, Found, assembled, singular_values
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.ranks.triangles import reduced
from lightning_locality.tensors.chain import Chain
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.mode_tree import Node
from lightning_locality.tensors.tucker import Tucker


def tucker_spectra(model: Tucker, nodes: Sequence[Node]) -> NodeSpectra:
    r"""Those of the core, multiplied by the triangular factors of the matrices: these have orthonormal columns left.

    The condition is :math:`\bigl\| |\mathcal G| \times_1 |S_1| \cdots \times_N |S_N| \bigr\| / \sigma_1`, absolute
    values by entry and S_n the triangular factors (ours).

    Args:
        model: The factorisation.
        nodes: Groups of modes.
    """
    core, log = scaled(model.core.double().reshape(1, 1, -1))
    core = core.reshape(model.rank)
    triangles: list[Tensor] = []
    for chain in model.chains:
        triangle, more = scaled(reduced(doubled(cast(Chain, chain))[None]))
        triangles.append(triangle[0])
        log = log + more
    tensor, bound = _multiply(core, triangles), _multiply(core.abs(), [triangle.abs() for triangle in triangles])
    spread = bound.norm().reshape(1)
    dense = dense_spectra(tensor, nodes)
    found: list[Found] = [((node,), values[None], log, spread) for node, values in dense.items()]
    return assembled(found, nodes, ROUNDING)


def tucker_ratios(model: Tucker, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    r"""Participation ratios from :math:`P = [\![ \mathcal G \times_n V_n^\top V_n ]\!] [\![ \mathcal G ]\!]^\top`.

    Args:
        model: The factorisation; the graph of its weights is kept.
        nodes: Groups of modes.
    """
    core = scaled(model.core.double().reshape(1, 1, -1))[0].reshape(model.rank)
    factors = [scaled(doubled(cast(Chain, chain))[None])[0][0] for chain in model.chains]
    moved = _multiply(core, [factor.T @ factor for factor in factors])
    found = {}
    for node in nodes:
        rest = [mode for mode in range(model.order) if mode not in node]
        left, right = (t.permute([*node, *rest]).flatten(0, len(node) - 1).flatten(1) for t in (moved, core))
        products = left @ right.T if left.shape[0] <= left.shape[1] else left.T @ right
        found[node] = ratio(products[None])[0]
    return found


def matrix_spectra(model: DeepMatrix, nodes: Sequence[Node]) -> NodeSpectra:
    r"""Those of the product, in float64 and divided by a power of two after every layer.

    The condition is :math:`\bigl\| |W_L| \cdots |W_1| \bigr\| / \sigma_1`, absolute values by entry.

    Args:
        model: The factorisation.
        nodes: Rows, columns or both.
    """
    product, bound, log = _product(model)
    values, spread = singular_values(product)[None], bound.norm().reshape(1)
    return assembled([((node,), values, log, spread) for node in nodes], nodes, ROUNDING)


def matrix_ratio(model: DeepMatrix) -> Tensor:
    """Participation ratio of the product; the graph of the layers is kept.

    Args:
        model: The factorisation.
    """
    product = _product(model)[0]
    gram = product @ product.T if product.shape[0] <= product.shape[1] else product.T @ product
    return ratio(gram[None])[0]


def _product(model: DeepMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """The product, the product of absolute values, and the binary logarithm of what both have been divided by."""
    product, log = scaled(model.layers[0].double()[None])
    bound = product.detach().abs()
    for layer in list(model.layers)[1:]:
        weight = layer.double()
        product, more = scaled(weight @ product)
        bound, log = weight.detach().abs() @ bound / more.exp2()[:, None, None], log + more
    return product[0], bound[0], log


def _multiply(core: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The core times a matrix in every mode; each moves its mode from the front to the back."""
    for matrix in matrices:
        core = torch.tensordot(core, matrix, dims=([0], [1]))
    return core
