"""Sizes of the local components of a factorisation."""

from __future__ import annotations

__all__ = ["balanced_component_norms", "contribution_norms"]

import copy

import torch
from torch import Tensor

from lightning_locality.ranks.factored import check_finite, factored
from lightning_locality.ranks.gram import gram_sweep
from lightning_locality.tensors.cp import CP
from lightning_locality.tensors.factorization import Factorization
from lightning_locality.tensors.hierarchical import HierarchicalTensorFactorization
from lightning_locality.tensors.mode_tree import Node


@torch.no_grad()
def contribution_norms(model: Factorization, relative: bool = False) -> dict[Node, Tensor]:
    r"""Norm of what every local component adds to the tensor: interior node -> ``(R_node,)``, in float64.

    .. math:: \kappa^{(\nu, r)} = \bigl\| \mathcal{W}^{[\nu, r]} \bigr\|, \qquad
        \mathcal{W} = \sum_{r=1}^{R_\nu} \mathcal{W}^{[\nu, r]}

    with :math:`\mathcal{W}^{[\nu, r]}` the tensor without all other components of the node (ours). Unlike the norm of
    a local component, it stays where the factorisation is rewritten without changing the tensor's terms: columns
    scaled against rows, signs. Of a sum of rank-one tensors it is the norm of each, at the node of all modes.

    Args:
        model: :class:`HierarchicalTensorFactorization` or :class:`CP`.
        relative: Divide by the norm of the tensor; at high orders neither may be a float64 number, their ratio is.
            Where components cancel to less than about 1e-8 of their norms, that of the tensor is rounding, and the
            ratio may be infinite.

    Raises:
        ValueError: Another factorisation, or weights that are not finite.

    Example:
        >>> model = CP((2, 3), rank=2)
        >>> norms = contribution_norms(model)[(0, 1)]
        >>> bool(torch.allclose(norms, model.component_norms()))
        True
    """
    check_finite(model)
    form = factored(_with_components(model))
    sweep, norms = gram_sweep(form), dict[Node, Tensor]()
    root, log = sweep.root
    # rounding may leave components that cancel with a negative square
    shift = 0.5 * (root.clamp_min(0).log2() + log) if relative else torch.zeros_like(log)
    for group, below, above in zip(form.groups, sweep.below, sweep.above, strict=True):
        if below is not None and above is not None:
            values = below[0].clamp_min(0).sqrt() * above[0].clamp_min(0).sqrt()
            scale = (0.5 * (below[1] + above[1])[:, None] - shift).exp2()
            scale = torch.where(values > 0, scale, 0.0)
            norms |= dict(zip(group.nodes, (values * scale).unbind(), strict=True))
    return {node: norms[node] for node in form.tree.interior}


@torch.no_grad()
def balanced_component_norms(model: Factorization) -> dict[Node, Tensor]:
    r"""Norms of the local components at the balanced point of the same tensor: interior node -> ``(R_node,)``.

    .. math:: \sigma^{(\nu, r)} = \prod_{w \in (\nu, r)} \| w \|

    What the theory of incremental growth speaks of ("Implicit Regularization in Hierarchical Tensor Factorization and
    Deep Convolutional Neural Networks", Razin, Maman, Cohen, 2022); at any other point the norms change with the
    scales of the weights although the tensor does not. The model stays as it is. In float64.

    Args:
        model: :class:`HierarchicalTensorFactorization` of depth 1, or :class:`CP`.

    Raises:
        ValueError: Another factorisation, a depth above 1, or weights that are not finite.

    Example:
        >>> from lightning_locality.tensors import ModeTree
        >>> model = HierarchicalTensorFactorization(ModeTree.perfect(4), 2, 3, init_scale=1.0)
        >>> before = model.weight((0,)).clone()
        >>> norms = balanced_component_norms(model)
        >>> list(norms), bool(torch.equal(before, model.weight((0,))))
        ([(0, 1), (2, 3), (0, 1, 2, 3)], True)
    """
    moved = copy.deepcopy(_with_components(model)).double()
    check_finite(moved)
    if isinstance(moved, CP):
        # balancing keeps the components, and with them their norms
        return {tuple(range(moved.order)): moved.component_norms()}
    moved.balance_()
    return moved.local_component_norms()


def _with_components(model: Factorization) -> HierarchicalTensorFactorization | CP:
    if isinstance(model, (HierarchicalTensorFactorization, CP)):
        return model
    raise ValueError(
        f"model must be a HierarchicalTensorFactorization or CP, which have local components, "
        f"got {type(model).__name__}: see its magnitudes"
    )
