"""Spectra and participation ratios of CP, tensor trains, Tucker and deep matrices at groups of modes."""

from __future__ import annotations

__all__: list[str] = []

import math
from collections.abc import Sequence
from functools import reduce, singledispatch

import torch
from torch import Tensor

from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.factored import Scaled, ScaledSpectra, assemble, float64_factors, float64_weight, scaled
from lightning_locality.ranks.gram import times, trace_ratio
from lightning_locality.ranks.qr import join, triangular
from lightning_locality.ranks.spectra import NodeSpectra, singular_values
from lightning_locality.tensors import CP, DeepMatrix, Factorization, Node, TensorTrain, Tucker
from lightning_locality.tensors.mode_tree import node_name


@singledispatch
def spectra(model: Factorization, nodes: Sequence[Node]) -> NodeSpectra:
    """Spectra at groups of modes, without the tensor."""
    raise _unknown(model)


@singledispatch
def ratios(model: Factorization, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    """Participation ratios at groups of modes, with the graph of the weights."""
    raise _unknown(model)


def _unknown(model: Factorization) -> ValueError:
    return ValueError(f"no exact spectra for {type(model).__name__}: pass model.to_tensor() and a tree")


@spectra.register
def cp_spectra(model: CP, nodes: Sequence[Node]) -> NodeSpectra:
    """At any groups of modes: from triangular factors of the two Khatri-Rao products."""
    parts = [scaled(triangular(factor[None])) for factor in float64_factors(model)]
    found: list[ScaledSpectra] = []
    for node in nodes:
        (left, log), (right, more) = (reduce(join, side) for side in _two_sides(parts, node))
        spread = (left.norm(dim=1) * right.norm(dim=1)).sum(1)
        found.append(ScaledSpectra((node,), singular_values(left @ right.mT), log + more, spread))
    return assemble(found, nodes)


@ratios.register
def cp_ratios(model: CP, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    """At any groups of modes: from the products of the factors' Gramians on the two sides."""
    factors = [scaled(factor[None])[0] for factor in float64_factors(model)]
    grams = [scaled(factor.mT @ factor) for factor in factors]
    sides = {node: [reduce(times, side)[0] for side in _two_sides(grams, node)] for node in nodes}
    return {node: trace_ratio(inside @ outside)[0] for node, (inside, outside) in sides.items()}


def _two_sides(parts: Sequence[Scaled], node: Node) -> tuple[list[Scaled], list[Scaled]]:
    """The parts of a group's modes, and those of all others."""
    return [parts[mode] for mode in node], [part for mode, part in enumerate(parts) if mode not in node]


@spectra.register
def train_spectra(model: TensorTrain, nodes: Sequence[Node]) -> NodeSpectra:
    r"""Singular values at groups of neighbouring modes, or complements of such.

    .. math:: \sigma(\{a, \dots, b - 1\}) = \operatorname{svd} \bigl( M_{ab} (L_a \otimes R_b)^\top \bigr)

    with the triangular factors of the cores before a, :math:`L_a` with a column for each width of the bond, of those
    from b on, :math:`R_b`, and of those between, :math:`M_{ab}` with :math:`r_a r_b` columns; carried from core to
    core (ours). The condition is :math:`\sum_{ij} \|m_{ij}\| \|l_i\| \|r_j\| / \sigma_1` with their columns.
    """
    cores = _cores(model)
    one = cores[0][0].new_ones(1, 1), cores[0][0].new_zeros(1)
    left, right = [one], [one]
    for core, log in cores:
        triangle, before = left[-1]
        left.append(_triangular((triangle @ core.flatten(1)).reshape(-1, core.shape[2]), log + before))
    for core, log in reversed(cores):
        triangle, before = right[-1]
        right.append(_triangular((core @ triangle.T).flatten(1).T, log + before))
    right.reverse()
    found: list[ScaledSpectra] = []
    for node in nodes:
        start, stop = _interval(node, model.order)
        (first, more), (last, extra) = left[start], right[stop]
        if start == 0:
            inside, log = left[stop][0].unsqueeze(1), left[stop][1]
        elif stop == model.order:
            inside, log = right[start][0].unsqueeze(2), right[start][1]
        else:
            inside, log = _triangle_between(cores[start:stop])
        matrix = torch.einsum("tab,ka,mb->tkm", inside, first, last).flatten(1)
        spread = first.norm(dim=0) @ inside.norm(dim=0) @ last.norm(dim=0)
        found.append(ScaledSpectra((node,), singular_values(matrix)[None], log + more + extra, spread.reshape(1)))
    return assemble(found, nodes)


def _triangle_between(cores: Sequence[Scaled]) -> Scaled:
    """Triangular factor ``(t, r_start, r_stop)`` of neighbouring cores ``(r, D, s)``, and its logarithm."""
    core, log = cores[0]
    width = core.shape[0]
    rows, log = _triangular(core.transpose(0, 1).flatten(1), log)
    for core, more in cores[1:]:
        moved = torch.einsum("tab,bdc->tdac", rows.reshape(len(rows), width, -1), core)
        rows, log = _triangular(moved.flatten(2).flatten(0, 1), log + more)
    return rows.reshape(len(rows), width, -1), log


@ratios.register
def train_ratios(model: TensorTrain, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    """At the same groups, from Gramians of the cores."""
    cores = [core for core, _ in _cores(model)]
    left, right = [cores[0].new_ones(1, 1)], [cores[0].new_ones(1, 1)]
    for core in cores:
        left.append(_scaled(torch.einsum("ac,adb,cde->be", left[-1], core, core))[0])
    for core in reversed(cores):
        right.append(_scaled(torch.einsum("be,adb,cde->ac", right[-1], core, core))[0])
    right.reverse()
    found = {}
    for node in nodes:
        start, stop = _interval(node, model.order)
        if start == 0 or stop == model.order:
            products = left[start or stop] @ right[start or stop]
        else:
            products = _products_between(cores[start:stop], left[start], right[stop])
        found[node] = trace_ratio(products[None])[0]
    return found


def _products_between(cores: Sequence[Tensor], left: Tensor, right: Tensor) -> Tensor:
    """A matrix with the traces of cores between two bonds: from their entries if few, else from their Gramian."""
    if math.prod(core.shape[1] for core in cores) <= cores[0].shape[0] * cores[-1].shape[2]:
        block = cores[0].transpose(0, 1)
        for core in cores[1:]:
            block, _ = _scaled(torch.einsum("tab,bdc->tdac", block, core).flatten(0, 1))
        return (left @ block @ right).flatten(1) @ block.flatten(1).T
    gram = torch.einsum("adb,cde->abce", cores[0], cores[0])
    for core in cores[1:]:
        gram, _ = _scaled(torch.einsum("abce,bdf,edg->afcg", gram, core, core))
    return torch.einsum("abce,cf,eg->abfg", gram, left, right).flatten(2).flatten(0, 1)


def _interval(node: Node, order: int) -> tuple[int, int]:
    """First mode of a group, or of its complement, and the one after the last."""
    for modes in (set(node), set(range(order)) - set(node)):
        start, stop = min(modes), max(modes) + 1
        if stop - start == len(modes):
            return start, stop
    raise ValueError(
        f"tree has the node {node_name(node)}, and a tensor train is measured at groups of neighbouring modes only "
        "(or their complements): leave the node out, or pass model.to_tensor()"
    )


def _cores(model: TensorTrain) -> list[Scaled]:
    return [_scaled(float64_weight(chain)) for chain in model.chains]


def _scaled(values: Tensor) -> Scaled:
    flat, log = scaled(values.reshape(1, -1))
    return flat.reshape(values.shape), log


def _triangular(matrix: Tensor, log: Tensor) -> Scaled:
    triangle, more = scaled(triangular(matrix[None]))
    return triangle[0], log + more


@spectra.register
def tucker_spectra(model: Tucker, nodes: Sequence[Node]) -> NodeSpectra:
    r"""Spectra of the core times the triangular factors of the matrices, which leave orthonormal columns.

    The condition is :math:`\bigl\| |\mathcal G| \times_1 |S_1| \cdots \times_N |S_N| \bigr\| / \sigma_1`, absolute
    values by entry and S_n the triangular factors (ours).
    """
    core, log = _scaled(model.core.double())
    triangles: list[Tensor] = []
    for chain in model.chains:
        triangle, log = _triangular(float64_weight(chain), log)
        triangles.append(triangle)
    dense = dense_spectra(_multiply(core, triangles), nodes)
    spread = _multiply(core.abs(), [triangle.abs() for triangle in triangles]).norm().reshape(1)
    return assemble([ScaledSpectra((node,), values[None], log, spread) for node, values in dense.items()], nodes)


@ratios.register
def tucker_ratios(model: Tucker, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    r"""Participation ratios from :math:`P = [\![ \mathcal G \times_n V_n^\top V_n ]\!] [\![ \mathcal G ]\!]^\top`."""
    core, _ = _scaled(model.core.double())
    factors = [scaled(float64_weight(chain)[None])[0][0] for chain in model.chains]
    moved = _multiply(core, [factor.T @ factor for factor in factors])
    found = {}
    for node in nodes:
        rest = [mode for mode in range(model.order) if mode not in node]
        left, right = (t.permute([*node, *rest]).flatten(0, len(node) - 1).flatten(1) for t in (moved, core))
        found[node] = _ratio(left, right)
    return found


def _multiply(core: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The core times a matrix in every mode; each moves its mode from the front to the back."""
    for matrix in matrices:
        core = torch.tensordot(core, matrix, dims=([0], [1]))
    return core


def _ratio(left: Tensor, right: Tensor) -> Tensor:
    """Participation ratio from the smaller of the two products of matrices of the same shape."""
    products = left @ right.T if left.shape[0] <= left.shape[1] else left.T @ right
    return trace_ratio(products[None])[0]


@spectra.register
def matrix_spectra(model: DeepMatrix, nodes: Sequence[Node]) -> NodeSpectra:
    r"""Spectra of the product, in float64 and divided by a power of two after every layer.

    The condition is :math:`\bigl\| |W_L| \cdots |W_1| \bigr\| / \sigma_1`, absolute values by entry.
    """
    product, bound, log = _product(model)
    values, spread = singular_values(product)[None], bound.norm().reshape(1)
    return assemble([ScaledSpectra((node,), values, log, spread) for node in nodes], nodes)


@ratios.register
def matrix_ratios(model: DeepMatrix, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    """The participation ratio of the product."""
    product, _, _ = _product(model)
    return dict.fromkeys(nodes, _ratio(product, product))


def _product(model: DeepMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """The product, the product of absolute values, and the binary logarithm of their common divisor."""
    product, log = scaled(model.layers[0].double()[None])
    bound = product.detach().abs()
    for layer in list(model.layers)[1:]:
        weight = layer.double()
        product, more = scaled(weight @ product)
        bound, log = weight.detach().abs() @ bound / more.exp2()[:, None, None], log + more
    return product[0], bound[0], log
