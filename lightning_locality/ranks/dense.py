"""Spectra of the matricisations of a tensor that is written out."""

from __future__ import annotations

__all__ = ["dense_spectra"]

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_locality.ranks.spectra import NodeSpectra
from lightning_locality.tensors.mode_tree import ModeTree, Node


@contextmanager
def _torch_in_tensorly() -> Iterator[None]:
    """Tensorly's backend is torch, for this thread; its own context manager would set it for all on the way out."""
    import tensorly

    before = tensorly.backend.current_backend()
    tensorly.set_backend("pytorch", local_threadsafe=True)
    try:
        yield
    finally:
        tensorly.set_backend(before, local_threadsafe=True)


def dense_spectra(tensor: Tensor, cuts: ModeTree | Iterable[Node]) -> NodeSpectra:
    r"""Singular values of the matricisations of a tensor, through tensorly and in float64.

    .. math:: \sigma \left( [\![ \mathcal{W}; \nu ]\!] \right), \qquad [\![ \mathcal{W}; \nu ]\!]
        \in \mathbb{R}^{\prod_{n \in \nu} D_n \times \prod_{n \notin \nu} D_n}

    The ranks of these matrices for all nodes of a tree but the root are the hierarchical tensor rank: "Implicit
    Regularization in Hierarchical Tensor Factorization and Deep Convolutional Neural Networks" (Razin, Maman, Cohen,
    2022).

    Args:
        tensor: Of order N, any floating type.
        cuts: A tree, for all its nodes but the root, or groups of modes, counted from 0.

    Returns:
        For every group, in the order given, its singular values, descending. Their tolerance is the rounding of the
        tensor's own type times the longer side of the matricisation, the usual rule for dense matrices.

    Raises:
        ValueError: A tree of another order, or a group of modes that the tensor does not have, has twice or that is
            all or none of them.

    Example:
        >>> tensor = torch.zeros(2, 2, 2)
        >>> tensor[0, 0, 0], tensor[1, 1, 1] = 3.0, 2.0
        >>> {node: values.round(decimals=6).tolist() for node, values in dense_spectra(tensor, [(0, 1)]).items()}
        {(0, 1): [3.0, 2.0]}
    """
    import tensorly

    if isinstance(cuts, ModeTree):
        if cuts.order != tensor.ndim:
            raise ValueError(f"cuts is a tree of order {cuts.order} and the tensor has order {tensor.ndim}")
        cuts = cuts.nodes[:-1]
    groups = [tuple(cut) for cut in cuts]
    for group in groups:
        if not 0 < len(set(group)) == len(group) < tensor.ndim or not set(group) <= set(range(tensor.ndim)):
            raise ValueError(
                f"cuts must be groups of some, not all, of the modes 0 to {tensor.ndim - 1}, each once, got {group}"
            )
    measured = tensor.detach().double()
    with _torch_in_tensorly():
        matrices = [tensorly.base.matricize(measured, group) for group in groups]
    eps = torch.finfo(tensor.dtype if tensor.is_floating_point() else torch.float64).eps
    # a wide matrix is transposed: some drivers take longer for it
    values = [torch.linalg.svdvals(m if m.shape[0] >= m.shape[1] else m.mT) for m in matrices]
    tolerances = [max(m.shape) * eps for m in matrices]
    return NodeSpectra(dict(zip(groups, values, strict=True)), dict(zip(groups, tolerances, strict=True)))
