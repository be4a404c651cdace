"""What a tensor or a factorisation is at the nodes of a tree: spectra and participation ratios."""

from __future__ import annotations

__all__ = ["node_spectra", "participation_ratios"]

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_locality.ranks.dense import dense_spectra
from lightning_locality.ranks.factored import (
    ROUNDING,
    Found,
    assembled,
    check_finite,
    factored,
    factors_of,
    scaled,
    singular_values,
)
from lightning_locality.ranks.gram import gram_ratios, gram_spectra, ratio
from lightning_locality.ranks.qr import fold, reduced, triangle_spectra
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.ranks.trains import (
    matrix_ratio,
    matrix_spectra,
    train_ratios,
    train_spectra,
    tucker_ratios,
    tucker_spectra,
)
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.deep_matrix import DeepMatrix
from lightning_locality.tensors.factorization import Factorization
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import ModeTree, Node, node_name
from lightning_locality.tensors.tensor_train import TensorTrain
from lightning_locality.tensors.tucker import Tucker

Method = Literal["qr", "gram"]
Tree = ModeTree | Iterable[Node]


@torch.no_grad()
def node_spectra(subject: Factorization | Tensor, tree: Tree | None = None, method: Method = "qr") -> NodeSpectra:
    r"""Singular values of the matricisations of a tensor at the nodes of a tree.

    .. math:: \sigma \left( [\![ \mathcal{W}; \nu ]\!] \right), \qquad [\![ \mathcal{W}; \nu ]\!]
        \in \mathbb{R}^{\prod_{n \in \nu} D_n \times \prod_{n \notin \nu} D_n}

    The ranks of these matrices are the hierarchical tensor rank of "Implicit Regularization in Hierarchical Tensor
    Factorization and Deep Convolutional Neural Networks" (Razin, Maman, Cohen, 2022). Of a factorisation they are
    computed exactly and without the tensor, at a cost linear in the order; in float64 on the weights' device,
    whatever their type. Values below a node's tolerance cannot be told from rounding: 100 times that of float64,
    times the condition of the factored form there (ours); of a tensor, as :func:`dense_spectra` says. Values that
    the widths of the factorisation make zero may be left out, of one method and not of the other.

    Args:
        subject: A factorisation, or a tensor.
        tree: A tree, or groups of modes counted from 0. None for a hierarchical factorisation's own tree, which
            admits no other nodes; for a tensor train's groups of first modes and single modes (it admits groups of
            neighbouring modes); and otherwise for a perfect binary tree. A tensor needs one.
        method: ``"qr"``: by triangular factors, to full precision. ``"gram"``: by Gramians, to half the digits;
            hierarchical factorisations and CP over a tree only.

    Raises:
        ValueError: A tree of another order or with nodes the factorisation cannot give, weights or entries that are
            not finite, or a method that does not fit.

    Example:
        >>> model = HierarchicalTensorFactorization(ModeTree.perfect(4096), shape=2, widths=3, init_scale=1.0)
        >>> spectra = node_spectra(model)
        >>> spectra.rank((0,)), spectra.rank((0, 1)), spectra.rank((0, 1, 2, 3))
        (2, 3, 3)
    """
    if method not in ("qr", "gram"):
        raise ValueError(f"method must be 'qr' or 'gram', got {method!r}")
    if isinstance(subject, Tensor):
        _qr_only(method, "a tensor")
        if tree is None:
            raise ValueError("tree must be given for a tensor: ModeTree.perfect(tensor.ndim), or groups of modes")
        return dense_spectra(subject, tree)
    check_finite(subject)
    match subject:
        case HierarchicalTensorFactorization():
            form = factored(subject)
            spectra = triangle_spectra(form) if method == "qr" else gram_spectra(form)
            return spectra if tree is None or tree == subject.tree else _only(spectra, _own_nodes(subject, tree))
        case CP():
            if tree is not None and not isinstance(tree, ModeTree):
                _qr_only(method, "groups of modes without a tree")
                return _cp_spectra(subject, _nodes(subject, tree))
            tree = ModeTree.perfect(subject.order) if tree is None else tree
            _nodes(subject, tree)
            form = factored(subject, tree)
            return triangle_spectra(form) if method == "qr" else gram_spectra(form)
    _qr_only(method, type(subject).__name__)
    nodes = _nodes(subject, tree)
    match subject:
        case TensorTrain():
            return train_spectra(subject, nodes)
        case Tucker():
            return tucker_spectra(subject, nodes)
        case DeepMatrix():
            return matrix_spectra(subject, nodes)
    raise _unknown(subject)


def participation_ratios(model: Factorization, tree: Tree | None = None) -> dict[Node, Tensor]:
    r"""Participation ratios at the nodes of a tree, by matrix products alone and differentiable.

    .. math:: \operatorname{PR}_\nu = \Bigl( \sum_k \sigma_k^2 \Bigr)^2 \Big/ \sum_k \sigma_k^4
        = \frac{\operatorname{tr}(G_\nu B_\nu)^2}{\operatorname{tr}(G_\nu B_\nu G_\nu B_\nu)}

    with the Gramians of the two sides of the matricisation (ours). In float64, with the graph of the weights, so that
    for example ``torch.stack(list(participation_ratios(model).values())).log().sum()`` is a penalty on the
    hierarchical rank. Where the tensor is zero the ratio and its gradient are 0, and the logarithm is not finite.
    Components that cancel cost digits: the relative error is below a small multiple of :math:`2^{-52} \kappa_\nu^4`
    with the condition that :func:`node_spectra` gives.

    Args:
        model: A factorisation.
        tree: As in :func:`node_spectra`.

    Returns:
        Node -> scalar between 1 and the rank.

    Raises:
        ValueError: As in :func:`node_spectra`.

    Example:
        >>> model = HierarchicalTensorFactorization(ModeTree.perfect(4), shape=3, widths=3, init_scale=1.0)
        >>> ratios = participation_ratios(model)
        >>> torch.stack(list(ratios.values())).log().sum().backward()
        >>> bool(1 < ratios[(0, 1)] < 3), all(p.grad is not None for p in model.parameters())
        (True, True)
    """
    check_finite(model)
    match model:
        case HierarchicalTensorFactorization():
            ratios = gram_ratios(factored(model))
            nodes = model.tree.nodes[:-1] if tree is None or tree == model.tree else _own_nodes(model, tree)
            return {node: ratios[tuple(sorted(node))] for node in nodes}
        case CP():
            nodes = _nodes(model, tree)
            if tree is None or isinstance(tree, ModeTree):
                tree = ModeTree.perfect(model.order) if tree is None else tree
                return gram_ratios(factored(model, tree))
            return _cp_ratios(model, nodes)
        case TensorTrain():
            return train_ratios(model, _nodes(model, tree))
        case Tucker():
            return tucker_ratios(model, _nodes(model, tree))
        case DeepMatrix():
            return dict.fromkeys(_nodes(model, tree), matrix_ratio(model))
    raise _unknown(model)


def _cp_spectra(model: CP, nodes: Sequence[Node]) -> NodeSpectra:
    """At any groups of modes: triangular factors of the two Khatri-Rao products."""
    parts = [scaled(reduced(factor[None])) for factor in factors_of(model)]
    found: list[Found] = []
    for node in nodes:
        (left, log), (right, more) = (fold([parts[mode] for mode in modes]) for modes in _sides(node, model.order))
        spread = (left.norm(dim=1) * right.norm(dim=1)).sum(1)
        found.append(((node,), singular_values(left @ right.mT), log + more, spread))
    return assembled(found, nodes, ROUNDING)


def _cp_ratios(model: CP, nodes: Sequence[Node]) -> dict[Node, Tensor]:
    factors = [scaled(factor[None])[0] for factor in factors_of(model)]
    grams = [factor.mT @ factor for factor in factors]
    found = {}
    for node in nodes:
        sides = []
        for modes in _sides(node, model.order):
            gram = scaled(grams[modes[0]])[0]
            for mode in modes[1:]:
                gram = scaled(gram * grams[mode])[0]
            sides.append(gram)
        found[node] = ratio(sides[0] @ sides[1])[0]
    return found


def _sides(node: Node, order: int) -> tuple[Sequence[int], Sequence[int]]:
    return node, [mode for mode in range(order) if mode not in set(node)]


def _nodes(model: Factorization, tree: Tree | None) -> tuple[Node, ...]:
    """Groups of some, not all, of the modes."""
    if tree is None:
        chain = isinstance(model, TensorTrain)
        order = model.order
        tree = ModeTree([range(k) for k in range(2, order + 1)]) if chain else ModeTree.perfect(order)
    if isinstance(tree, ModeTree):
        if tree.order != model.order:
            raise ValueError(f"tree has order {tree.order} and the factorisation order {model.order}")
        return tree.nodes[:-1]
    nodes = tuple(tuple(node) for node in tree)
    for node in nodes:
        if not 0 < len(set(node)) == len(node) < model.order or not set(node) <= set(range(model.order)):
            raise ValueError(
                f"tree must hold groups of some, not all, of the modes 0 to {model.order - 1}, each once, got {node}"
            )
    return nodes


def _own_nodes(model: HierarchicalTensorFactorization, tree: Tree) -> tuple[Node, ...]:
    nodes = _nodes(model, tree)
    for node in nodes:
        if tuple(sorted(node)) not in model.tree:
            raise ValueError(
                f"tree has the node {node_name(node)}, which is not in the factorisation's own tree: leave tree out, "
                "or pass model.to_tensor()"
            )
    return nodes


def _only(spectra: NodeSpectra, nodes: Sequence[Node]) -> NodeSpectra:
    own = {node: tuple(sorted(node)) for node in nodes}
    condition = spectra.condition or {}
    return NodeSpectra(
        {node: spectra[found] for node, found in own.items()},
        {node: spectra.tolerance[found] for node, found in own.items()},
        spectra.log_scale,
        {node: condition[found] for node, found in own.items()},
    )


def _qr_only(method: Method, what: str) -> None:
    if method != "qr":
        raise ValueError(f"method='gram' is there for hierarchical factorisations and CP over a tree, not {what}")


def _unknown(model: Factorization) -> ValueError:
    return ValueError(f"no exact spectra for {type(model).__name__}: pass model.to_tensor() and a tree")
