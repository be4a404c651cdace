"""Spectra and participation ratios of a tensor or a factorisation at the nodes of a tree."""

from __future__ import annotations

__all__ = ["node_spectra", "participation_ratios"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from lightning_locality.ranks import trains
from lightning_locality.ranks.dense import dense_spectra, mode_groups
from lightning_locality.ranks.factored import FactoredTree, check_finite, factored
from lightning_locality.ranks.gram import gram_ratios, gram_spectra
from lightning_locality.ranks.qr import qr_spectra
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors import (
    CP,
    DeepMatrix,
    Factorization,
    HierarchicalTensorFactorization,
    ModeTree,
    Node,
    TensorTrain,
    Tucker,
)
from lightning_locality.tensors.mode_tree import node_name

Method = Literal["qr", "gram"]
Tree = ModeTree | Iterable[Node]
V = TypeVar("V")


@torch.no_grad()
def node_spectra(subject: Factorization | Tensor, tree: Tree | None = None, method: Method = "qr") -> NodeSpectra:
    r"""Singular values of the matricisations of a tensor at the nodes of a tree.

    .. math:: \sigma \left( [\![ \mathcal{W}; \nu ]\!] \right), \qquad [\![ \mathcal{W}; \nu ]\!]
        \in \mathbb{R}^{\prod_{n \in \nu} D_n \times \prod_{n \notin \nu} D_n}

    The ranks of these matrices are the hierarchical tensor rank of "Implicit Regularization in Hierarchical Tensor
    Factorization and Deep Convolutional Neural Networks" (Razin, Maman, Cohen, 2022). Those of a factorisation are
    computed exactly and without the tensor, at a cost linear in the order; in float64 on the weights' device,
    whatever their type. Values below a node's tolerance are indistinguishable from rounding: 100 times that of
    float64, times the condition of the factored form there (ours); for a tensor, see :func:`dense_spectra`. Values
    that the widths of the factorisation make zero may be left out by one method and not by the other.

    Args:
        subject: A factorisation, or a tensor.
        tree: A tree, or groups of modes counted from 0. None: for a hierarchical factorisation its own tree, whose
            nodes are the only ones allowed; for a tensor train the groups of first modes and the single modes (only
            groups of neighbouring modes are allowed); otherwise a perfect binary tree. Required for a tensor.
        method: ``"qr"``: by triangular factors, to full precision. ``"gram"``: by Gramians, to half the digits;
            hierarchical factorisations and CP over a tree only.

    Raises:
        ValueError: If the tree has another order or nodes that the factorisation does not give, if weights or entries
            are not finite, or if the method does not fit.

    Example:
        >>> model = HierarchicalTensorFactorization(ModeTree.perfect(4096), shape=2, widths=3, init_scale=1.0)
        >>> spectra = node_spectra(model)
        >>> spectra.rank((0,)), spectra.rank((0, 1)), spectra.rank((0, 1, 2, 3))
        (2, 3, 3)
    """
    if method not in ("qr", "gram"):
        raise ValueError(f"method must be 'qr' or 'gram', got {method!r}")
    if isinstance(subject, Tensor):
        if method != "qr":
            raise _no_gramians("a tensor")
        if tree is None:
            raise ValueError("tree must be given for a tensor: ModeTree.perfect(tensor.ndim), or groups of modes")
        return dense_spectra(subject, mode_groups(tree, subject.ndim, "tree", "tensor"))
    check_finite(subject)
    nodes = _nodes(subject, tree)
    if (form := _tree_form(subject, tree)) is not None:
        spectra = qr_spectra(form) if method == "qr" else gram_spectra(form)
        return spectra if nodes == form.tree.nodes[:-1] else _select(spectra, nodes)
    if method != "qr":
        raise _no_gramians("groups of modes without a tree" if isinstance(subject, CP) else type(subject).__name__)
    match subject:
        case CP():
            return trains.cp_spectra(subject, nodes)
        case TensorTrain():
            return trains.train_spectra(subject, nodes)
        case Tucker():
            return trains.tucker_spectra(subject, nodes)
        case DeepMatrix():
            return trains.matrix_spectra(subject, nodes)
    raise _unknown(subject)


def participation_ratios(model: Factorization, tree: Tree | None = None) -> dict[Node, Tensor]:
    r"""Participation ratios at the nodes of a tree, by matrix products alone and differentiable.

    .. math:: \operatorname{PR}_\nu = \Bigl( \sum_k \sigma_k^2 \Bigr)^2 \Big/ \sum_k \sigma_k^4
        = \frac{\operatorname{tr}(G_\nu B_\nu)^2}{\operatorname{tr}(G_\nu B_\nu G_\nu B_\nu)}

    with the Gramians of the two sides of the matricisation (ours). In float64, with the graph of the weights, so that
    for example ``torch.stack(list(participation_ratios(model).values())).log().sum()`` is a penalty on the
    hierarchical rank. For a tensor of zeros the ratio and its gradient are 0, and the logarithm is not finite.
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
    nodes = _nodes(model, tree)
    if (form := _tree_form(model, tree)) is not None:
        ratios = gram_ratios(form)
        return {node: ratios[tuple(sorted(node))] for node in nodes}
    match model:
        case CP():
            return trains.cp_ratios(model, nodes)
        case TensorTrain():
            return trains.train_ratios(model, nodes)
        case Tucker():
            return trains.tucker_ratios(model, nodes)
        case DeepMatrix():
            return dict.fromkeys(nodes, trains.matrix_ratio(model))
    raise _unknown(model)


def _nodes(model: Factorization, tree: Tree | None) -> tuple[Node, ...]:
    """The groups of modes to measure, checked."""
    nodes = mode_groups(_default_tree(model) if tree is None else tree, model.order, "tree", "factorisation")
    if isinstance(model, HierarchicalTensorFactorization) and tree is not None and tree != model.tree:
        for node in nodes:
            if tuple(sorted(node)) not in model.tree:
                raise ValueError(
                    f"tree has the node {node_name(node)}, which is not in the factorisation's own tree: leave tree "
                    "out, or pass model.to_tensor()"
                )
    return nodes


def _default_tree(model: Factorization) -> ModeTree:
    match model:
        case HierarchicalTensorFactorization():
            return model.tree
        case TensorTrain():
            return ModeTree([range(k) for k in range(2, model.order + 1)])
    return ModeTree.perfect(model.order)


def _tree_form(model: Factorization, tree: Tree | None) -> FactoredTree | None:
    """The form of a tree that a hierarchical factorisation, or CP over a tree, has; None for any other."""
    match model:
        case HierarchicalTensorFactorization():
            return factored(model)
        case CP() if tree is None or isinstance(tree, ModeTree):
            return factored(model, _default_tree(model) if tree is None else tree)
    return None


def _select(spectra: NodeSpectra, nodes: Sequence[Node]) -> NodeSpectra:
    """The spectra at some nodes, whose modes may be in any order."""

    def of(values: Mapping[Node, V]) -> dict[Node, V]:
        return {node: values[tuple(sorted(node))] for node in nodes}

    return NodeSpectra(of(spectra), of(spectra.tolerance), spectra.log_scale, of(spectra.condition or {}))


def _no_gramians(subject: str) -> ValueError:
    return ValueError(f"method='gram' works for hierarchical factorisations and CP over a tree, not for {subject}")


def _unknown(model: Factorization) -> ValueError:
    return ValueError(f"no exact spectra for {type(model).__name__}: pass model.to_tensor() and a tree")
