"""Sizes of the local components of a factorisation."""

from __future__ import annotations

__all__ = ["balanced_component_norms", "contribution_norms"]

import copy

import torch
from torch import Tensor

from lightning_locality.arguments import checked
from lightning_locality.ranks.factored import check_finite, factored
from lightning_locality.ranks.gram import gram_sweep
from lightning_locality.tensors import CP, Factorization, HierarchicalTensorFactorization, Node


@checked
@torch.no_grad()
def contribution_norms(model: Factorization, relative: bool = False) -> dict[Node, Tensor]:
    r"""Norm of every local component's contribution to the tensor: interior node -> ``(R_node,)``, in float64.

    .. math:: \kappa^{(\nu, r)} = \bigl\| \mathcal{W}^{[\nu, r]} \bigr\|, \qquad
        \mathcal{W} = \sum_{r=1}^{R_\nu} \mathcal{W}^{[\nu, r]}

    with :math:`\mathcal{W}^{[\nu, r]}` the tensor without all other components of the node (ours). Unlike the norm of
    a local component, it does not depend on how the terms are written: columns may be scaled against rows, or change
    signs. For a sum of rank-one tensors it is the norm of each, at the node of all modes.

    Args:
        model: :class:`HierarchicalTensorFactorization` or :class:`CP`.
        relative: Divide by the norm of the tensor: at high orders a float64 may hold neither norm, but their ratio. If
            components cancel to below about 1e-8 of their norms, it is rounding, and the ratio may be infinite.

    Raises:
        ValueError: If the factorisation is another one or has weights that are not finite.

    Example:
        >>> model = CP((2, 3), rank=2)
        >>> norms = contribution_norms(model)[(0, 1)]
        >>> bool(torch.allclose(norms, model.component_norms()))
        True
    """
    check_finite(model)
    form, norms = factored(_with_components(model)), dict[Node, Tensor]()
    sweep = gram_sweep(form)
    root, log = sweep.inside[-1]
    # rounding may make the square negative if components cancel
    shift = 0.5 * (root.flatten().clamp_min(0).log2() + log) if relative else torch.zeros_like(log)
    for k, (below, log) in sweep.below.items():
        above, more = sweep.above[k]
        values = below.clamp_min(0).sqrt() * above.clamp_min(0).sqrt()
        scale = (0.5 * (log + more)[:, None] - shift).exp2().where(values > 0, 0.0)
        norms |= dict(zip(form.groups[k].nodes, (values * scale).unbind(), strict=True))
    return {node: norms[node] for node in form.tree.interior}


@checked
@torch.no_grad()
def balanced_component_norms(model: Factorization) -> dict[Node, Tensor]:
    r"""Norms of the local components at the balanced point of the same tensor: interior node -> ``(R_node,)``.

    .. math:: \sigma^{(\nu, r)} = \prod_{w \in (\nu, r)} \| w \|

    These are the norms of the theory of incremental growth ("Implicit Regularization in Hierarchical Tensor
    Factorization and Deep Convolutional Neural Networks", Razin, Maman, Cohen, 2022); at any other point the norms
    change with the scales of the weights although the tensor does not. The model is not changed. In float64.

    Args:
        model: :class:`HierarchicalTensorFactorization` of depth 1, or :class:`CP`.

    Raises:
        ValueError: If the factorisation is another one, has a depth above 1 or weights that are not finite.

    Example:
        >>> from lightning_locality.tensors import ModeTree
        >>> model = HierarchicalTensorFactorization(ModeTree.perfect(4), 2, 3, init_scale=1.0)
        >>> list(balanced_component_norms(model))
        [(0, 1), (2, 3), (0, 1, 2, 3)]
    """
    balanced = copy.deepcopy(_with_components(model)).double()
    check_finite(balanced)
    if isinstance(balanced, CP):
        # balancing preserves the components, and with them their norms
        return {tuple(range(balanced.order)): balanced.component_norms()}
    balanced.balance_()
    return balanced.local_component_norms()


def _with_components(model: Factorization) -> HierarchicalTensorFactorization | CP:
    if isinstance(model, (HierarchicalTensorFactorization, CP)):
        return model
    raise ValueError(
        "model must be a HierarchicalTensorFactorization or CP, which have local components, "
        f"got {type(model).__name__}: see its magnitudes"
    )
