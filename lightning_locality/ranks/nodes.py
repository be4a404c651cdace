"""Spectra and participation ratios of a tensor or a factorisation at the nodes of a tree."""

from __future__ import annotations

__all__ = ["node_spectra", "participation_ratios"]

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks import trains
from lightning_locality.ranks.conversion import as_factorization, as_tensor
from lightning_locality.ranks.dense import dense_spectra, mode_groups
from lightning_locality.ranks.factored import FactoredTree, check_finite, factored
from lightning_locality.ranks.gram import gram_ratios, gram_spectra
from lightning_locality.ranks.qr import qr_spectra
from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors import CP, Factorization, HierarchicalTensorFactorization, ModeTree, Node, TensorTrain
from lightning_locality.tensors.mode_tree import node_name

Method = Literal["qr", "gram"]
Tree = ModeTree | Iterable[Node]


@checked
@torch.no_grad()
def node_spectra(subject: Any, tree: Tree | None = None, method: Method = "qr") -> NodeSpectra:
    """Singular values of the matricisations of a tensor at the nodes of a tree, as :func:`dense_spectra` defines them.

    The ranks of these matrices are the hierarchical tensor rank of "Implicit Regularization in Hierarchical Tensor
    Factorization and Deep Convolutional Neural Networks" (Razin, Maman, Cohen, 2022). Those of a factorisation are
    computed exactly and without the tensor, in float64 on the weights' device, at a cost linear in the order. Values
    below a node's tolerance are indistinguishable from rounding: 100 times that of float64, times the condition of
    the factored form there (ours). Values that the widths make zero may be left out by one method and not by the other.

    Args:
        subject: A factorisation, or tensorly's CPTensor, TuckerTensor or TTTensor, of which the same holds; or a tensor
            or array.
        tree: A tree, or groups of modes counted from 0; required for a tensor. A hierarchical factorisation is
            measured at nodes of its own tree only (None: all), a tensor train at groups of neighbouring modes only
            (None: all groups of first modes, and single modes), others anywhere (None: a perfect binary tree).
        method: ``"qr"``: by triangular factors, to full precision. ``"gram"``: by Gramians, to half the digits;
            hierarchical factorisations and CP over a tree only.

    Raises:
        ValueError: If the tree or the method does not fit, or if weights or entries are not finite.

    Example:
        >>> model = HierarchicalTensorFactorization(ModeTree.perfect(4096), shape=2, widths=3, init_scale=1.0)
        >>> spectra = node_spectra(model)
        >>> spectra.rank((0,)), spectra.rank((0, 1)), spectra.rank((0, 1, 2, 3))
        (2, 3, 3)
    """
    model = as_factorization(subject, "subject")
    if model is None:
        subject = as_tensor(subject, "subject, if it is no factorisation,")
        if method != "qr":
            raise _no_gramians("a tensor")
        if tree is None:
            raise ValueError("tree must be given for a tensor: ModeTree.perfect(tensor.ndim), or groups of modes")
        return dense_spectra(subject, mode_groups(tree, subject.ndim, "tree", "tensor"))
    nodes, form = _nodes_and_form(model, tree)
    if form is not None:
        spectra = qr_spectra(form) if method == "qr" else gram_spectra(form)
        return spectra if nodes == form.tree.nodes[:-1] else _select(spectra, nodes)
    if method != "qr":
        raise _no_gramians("groups of modes without a tree" if isinstance(model, CP) else type(model).__name__)
    return trains.spectra(model, nodes)


@checked
def participation_ratios(model: Any, tree: Tree | None = None) -> dict[Node, Tensor]:
    r"""Participation ratios at the nodes of a tree, by matrix products alone and differentiable.

    .. math:: \operatorname{PR}_\nu = \Bigl( \sum_k \sigma_k^2 \Bigr)^2 \Big/ \sum_k \sigma_k^4
        = \frac{\operatorname{tr}(G_\nu B_\nu)^2}{\operatorname{tr}(G_\nu B_\nu G_\nu B_\nu)}

    with the Gramians of the two sides of the matricisation (ours). In float64, with the graph of the weights: the sum
    of their logarithms, for example, is a penalty on the hierarchical rank. For a tensor of zeros the ratio and its
    gradient are 0, and the logarithm is not finite. Components that cancel cost digits: the relative error is below a
    small multiple of :math:`2^{-52} \kappa_\nu^4` with the condition that :func:`node_spectra` gives.

    Args:
        model: A factorisation or tensorly's, of which every node has a scalar between 1 and the rank.
        tree: As in :func:`node_spectra`, and so are the errors.

    Example:
        >>> model = HierarchicalTensorFactorization(ModeTree.perfect(4), shape=3, widths=3, init_scale=1.0)
        >>> ratios = participation_ratios(model)
        >>> torch.stack(list(ratios.values())).log().sum().backward()
        >>> bool(1 < ratios[(0, 1)] < 3), all(p.grad is not None for p in model.parameters())
        (True, True)
    """
    if (converted := as_factorization(model, "model")) is None:
        raise ValueError(f"model must be a factorisation, got {type(model).__name__}: node_spectra measures tensors")
    nodes, form = _nodes_and_form(converted, tree)
    if form is None:
        return trains.ratios(converted, nodes)
    ratios = gram_ratios(form)
    return {node: ratios[tuple(sorted(node))] for node in nodes}


def _nodes_and_form(model: Factorization, tree: Tree | None) -> tuple[tuple[Node, ...], FactoredTree | None]:
    """The groups of modes to measure, checked, and the form of a tree if the factorisation has one there."""
    check_finite(model)
    if tree is None:
        match model:
            case HierarchicalTensorFactorization():
                tree = model.tree
            case TensorTrain():
                tree = ModeTree([range(k) for k in range(2, model.order + 1)])
            case _:
                tree = ModeTree.perfect(model.order)
    nodes = mode_groups(tree, model.order, "tree", "factorisation")
    match model:
        case HierarchicalTensorFactorization():
            for node in nodes if tree != model.tree else ():
                if tuple(sorted(node)) not in model.tree:
                    raise ValueError(
                        f"tree has the node {node_name(node)}, which is not in the factorisation's own tree: leave "
                        "tree out, or pass model.to_tensor()"
                    )
            return nodes, factored(model)
        case CP() if isinstance(tree, ModeTree):
            return nodes, factored(model, tree)
    return nodes, None


def _select(spectra: NodeSpectra, nodes: Iterable[Node]) -> NodeSpectra:
    """The spectra at some nodes, whose modes may be in any order."""
    own, condition = {node: tuple(sorted(node)) for node in nodes}, spectra.condition or {}
    return NodeSpectra(
        {node: spectra[key] for node, key in own.items()},
        {node: spectra.tolerance[key] for node, key in own.items()},
        spectra.log_scale,
        {node: condition[key] for node, key in own.items()},
    )


def _no_gramians(subject: str) -> ValueError:
    return ValueError(f"method='gram' works for hierarchical factorisations and CP over a tree, not for {subject}")
